"""Token files on disk: open, read and check them. NumPy only, so that it runs where no JAX is; batches are data.py's business.

A data set is a folder with `train.bin` and `test.bin` (or `val.bin`), flat streams of token ids without a header, uint8 unless
`meta.json` says `"dtype": "uint16"`; or with shards `NAME_train_*.bin` and `NAME_val_*.bin` of uint16 behind a header of 256 int32
(magic 20240520, version 1, token count). `meta.json` (or, as published data sets have it, `meta.pkl`) is optional:

    vocab_size  ids lie in [0, vocab_size)          pad_id    targets with this id carry no loss
    dtype       'uint8' or 'uint16'                 bos       id that opens every document
    vocabulary  the text of every id, in order      image     [rows, columns] of one sequence of pixels
    tokens      {file: count}                       sha256    {file: checksum}

`python -m dataset DIR [--config NAME]` validates a data set, describes it and prints a configuration to start from.
"""

import argparse
import hashlib
import json
import math
import pickle
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

HEADER_INTS = 256  # int32 words before the tokens of a shard
MAGIC, VERSION = 20240520, 1
BLOCK = 1 << 25  # tokens read at a time by everything that walks a whole file: 32 to 64 MB of memory
META_BYTES = 1 << 20  # a vocabulary of 50,000 words takes about half of this


class Tokens(NamedTuple):
    """One split as one endless stream of token ids, whatever the number of files behind it."""

    files: tuple[Path, ...]
    parts: tuple[np.memmap, ...]  # the tokens of each file, header excluded
    dtype: np.dtype
    vocab_size: int | None  # None where the data set does not say
    pad_id: int | None  # targets with this id carry no loss; None: every target counts

    @property
    def size(self) -> int:
        """Tokens in one pass over the stream."""
        return sum(len(part) for part in self.parts)

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start … start + count - 1 of the stream, which begins again at its end. A view where one file holds them all."""
        pieces, start = [], start % self.size
        while True:
            for part in self.parts:
                if start < len(part):
                    pieces.append(part[start : start + count])
                    count -= len(pieces[-1])
                    if count <= 0:
                        return np.asarray(pieces[0]) if len(pieces) == 1 else np.concatenate(pieces)
                start = max(0, start - len(part))


class _Builtins(pickle.Unpickler):
    """Loads numbers, strings and containers. A pickle that names any class or function is refused before anything runs."""

    def find_class(self, module, name):
        raise ValueError(f'it asks for {module}.{name}')


def read_meta(folder: Path) -> dict:
    """The facts of a data set: `meta.json` over `meta.pkl`, {} with neither. Raises ValueError with file and reason."""
    meta = {}
    for path in (folder / 'meta.pkl', folder / 'meta.json'):
        if not path.exists():
            continue
        if path.stat().st_size > META_BYTES:
            raise ValueError(f'{path}: {path.stat().st_size} bytes are no description of a data set (at most {META_BYTES})')
        try:
            with open(path, 'rb') as f:
                found = _Builtins(f).load() if path.suffix == '.pkl' else json.load(f)
        except Exception as e:  # a damaged pickle raises nearly anything; no object was built, so naming the file is all there is to do
            raise ValueError(f'{path}: cannot be read ({e}); a dict of plain numbers, strings, lists and dicts is wanted') from e
        if not isinstance(found, dict):
            raise ValueError(f'{path}: holds a {type(found).__name__}, not a dict')
        for key in meta.keys() & found.keys() & {'vocab_size', 'pad_id', 'bos', 'dtype'}:
            if meta[key] != found[key]:
                raise ValueError(f'{path}: {key} is {found[key]!r}, but {meta[key]!r} in meta.pkl; delete the one that is wrong')
        meta |= found
    for key in ('vocab_size', 'pad_id', 'bos'):
        value = meta.get(key)
        if value is not None and (type(value) is not int or not 0 <= value <= 65536):
            raise ValueError(f'{folder}/meta.json: {key}={value!r} is not an integer in 0 … 65536')
    if meta.get('dtype', 'uint8') not in ('uint8', 'uint16'):
        raise ValueError(f'{folder}/meta.json: dtype={meta["dtype"]!r}; the formats read are "uint8" and "uint16"')
    return meta


def split_files(folder: Path, split: str) -> list[Path]:
    """The files of a split ('train' or 'test') in reading order. Raises FileNotFoundError that says what was looked for."""
    if not folder.is_dir():
        raise FileNotFoundError(f'{folder}: no such folder; a data set is a folder with train.bin and test.bin (key ds_path)')
    names = ['train'] if split == 'train' else ['test', 'val']
    for name in names:
        if (folder / f'{name}.bin').exists():
            return [folder / f'{name}.bin']
    for name in names:
        if shards := sorted(folder.glob(f'*_{name}_*.bin')):
            return shards
    wanted = ' or '.join([f'{n}.bin' for n in names] + [f'*_{n}_*.bin' for n in names])
    part = ' (a half-made file is there: run the script that prepares or downloads it again)' if any(
        folder.glob('*.part')) else ''
    raise FileNotFoundError(f'{folder}: no {split} data; wanted {wanted}{part}')


def map_file(path: Path, dtype: str, sharded: bool) -> np.memmap:
    """The tokens of one file. `dtype` is that of a file without a header; `sharded` demands the header."""
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f'{path}: is empty; delete it and prepare or download it again')
    head = np.fromfile(path, '<i4', min(HEADER_INTS, size // 4))
    if len(head) and head[0] == MAGIC:
        if len(head) < HEADER_INTS or head[1] != VERSION:
            raise ValueError(f'{path}: a shard header of version {head[1] if len(head) > 1 else "none"}; wanted {VERSION}')
        held, count = (size - 4 * HEADER_INTS) / 2, int(head[2])
        if count <= 0 or held != count:
            raise ValueError(f'{path}: its header promises {count} uint16 tokens, it holds {held:g}; fetch the shard again')
        return np.memmap(path, '<u2', 'r', offset=4 * HEADER_INTS, shape=count)
    if sharded:
        raise ValueError(f'{path}: begins with {head[0] if len(head) else "nothing"}, not with the magic number {MAGIC} of a '
                         f'shard; name a file without a header train.bin or test.bin')
    if dtype == 'uint16' and size % 2:
        raise ValueError(f'{path}: {size} bytes are not a whole number of uint16 tokens; it is cut short, or dtype in meta.json '
                         f'should be "uint8"')
    return np.memmap(path, '<u2' if dtype == 'uint16' else 'u1', 'r')


def open_tokens(path: str | Path, split: str = 'train') -> Tokens:
    """Open one split ('train' or 'test') of the data set in folder `path`, or the single file `path`.

    Reads headers and sizes only. Raises FileNotFoundError or ValueError: one line with the file, what came and what was wanted.
    """
    path = Path(path)
    files = [path] if path.is_file() else split_files(path, split)
    meta = read_meta(files[0].parent)
    sharded = files[0].stem not in ('train', 'test', 'val') and not path.is_file()
    parts = [map_file(file, meta.get('dtype', 'uint8'), sharded) for file in files]
    if len({part.dtype for part in parts}) > 1:
        raise ValueError(f'{files[0].parent}: shards with and without a header in one split; keep one kind')
    for file, part in zip(files, parts, strict=True):
        promised = meta.get('tokens', {}).get(file.name, len(part))
        if promised != len(part):
            raise ValueError(f'{file}: {len(part)} tokens, meta.json promises {promised}; prepare or download it again')
    return Tokens(tuple(files), tuple(parts), parts[0].dtype, meta.get('vocab_size'), meta.get('pad_id'))


def blocks(tokens: Tokens, bar: tqdm | None = None):
    """Yield (file, first position in the file, ids) through all files, read rather than mapped: memory stays at one block."""
    for file, part in zip(tokens.files, tokens.parts, strict=True):
        for start in range(0, len(part), BLOCK):
            offset = part.offset + start * part.itemsize
            yield file, start, np.fromfile(file, part.dtype, min(BLOCK, len(part) - start), offset=offset)
            if bar is not None:
                bar.update(min(BLOCK, len(part) - start))


def check_ids(tokens: Tokens, V: int) -> None:
    """Raise ValueError with file, position and value of the first id that is not in [0, V). Reads everything once."""
    if np.iinfo(tokens.dtype).max < V:
        return
    for file, start, ids in blocks(tokens):
        if ids.max() >= V:
            at = int(np.argmax(ids >= V))
            raise ValueError(f'{file}: token {start + at} is {ids[at]}, but ids must lie below V={V}; set model.V to at least '
                             f'{ids[at] + 1}, or check dtype in meta.json')
