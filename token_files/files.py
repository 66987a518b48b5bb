"""Token files on disk, in the two formats of docs/data.md: open, read and check them. Batches are made in data.py."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from token_files.meta import Meta, read_meta

HEADER_BYTES = 1024  # 256 int32 before the tokens of a shard: magic number, version, number of tokens, then zeros
MAGIC, VERSION = 20240520, 1
BLOCK_TOKENS = 1 << 22  # read at a time where a whole file is walked: 4 or 8 MB, which fits in a CPU cache
FINGERPRINT_BYTES, FINGERPRINT_BLOCKS = 1 << 16, 64


class Tokens(NamedTuple):
    """One split of a data set, read as one endless stream of token ids over all its files."""

    files: list[Path]
    parts: list[np.memmap]  # the tokens of each file, without its header
    meta: Meta

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0].dtype

    @property
    def size(self) -> int:
        """Number of tokens in one pass over the stream."""
        return sum(len(part) for part in self.parts)

    def read(self, start: int, count: int) -> np.ndarray:
        """Ids [count] from position `start`; after its end the stream starts again. A view of the file where one file has them."""
        pieces, start = [], start % self.size
        while count > 0:
            for part in self.parts:
                pieces.append(part[start : start + count])  # empty where the part ends before `start`
                count -= len(pieces[-1])
                start = max(0, start - len(part))
        pieces = [piece for piece in pieces if len(piece)]
        return np.asarray(pieces[0]) if len(pieces) == 1 else np.concatenate(pieces)


def split_files(folder: Path, split: str) -> list[Path]:
    """The files of a split ('train' or 'test') in reading order. Raises FileNotFoundError that says what was wanted."""
    if not folder.is_dir():
        raise FileNotFoundError(f'{folder}: no such folder; ds_path must name one with train.bin and test.bin')
    names = ['train'] if split == 'train' else ['test', 'val']
    patterns = [f'{name}.bin' for name in names] + [f'*_{name}_*.bin' for name in names]
    for pattern in patterns:
        if found := sorted(folder.glob(pattern)):
            return found
    unfinished = any(folder.glob('*.part')) or (folder / '.preparing').exists()
    hint = '; an unfinished download or preparation is there: run the same command again' if unfinished else ''
    raise FileNotFoundError(f'{folder}: no {split} data; wanted {" or ".join(patterns)}{hint}')


def map_file(path: Path, dtype: str) -> np.memmap:
    """The tokens of one file. `dtype` is for a file without a header. Raises ValueError."""
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f'{path}: is empty; delete it, then prepare or download it again')
    header = np.fromfile(path, '<i4', min(3, size // 4))
    if len(header) == 3 and header[0] == MAGIC:
        held = (size - HEADER_BYTES) / 2
        if header[1] != VERSION or not header[2] == held > 0:
            raise ValueError(f'{path}: its header says version {header[1]} and {header[2]} uint16 tokens; wanted version {VERSION} '
                             f'and {held:g} tokens, by the size of the file; download it again')
        return np.memmap(path, '<u2', 'r', offset=HEADER_BYTES)
    if path.stem not in ('train', 'test', 'val'):
        raise ValueError(f'{path}: begins with {header[:1]}, not with the magic number {MAGIC} of a shard; a file without a '
                         'header must be named train.bin or test.bin')
    if dtype == 'uint16' and size % 2:
        raise ValueError(f'{path}: {size} bytes are not a whole number of uint16 tokens; it is cut short, or dtype in '
                         'meta.json should be "uint8"')
    return np.memmap(path, '<u2' if dtype == 'uint16' else 'u1', 'r')


def open_tokens(folder: str | Path, split: str = 'train') -> Tokens:
    """One split ('train' or 'test') of a data set. Reads headers and sizes only.

    Raises FileNotFoundError or ValueError with one line: the file, what it holds, what was wanted.
    """
    folder = Path(folder)
    files, meta = split_files(folder, split), read_meta(folder)
    tokens = Tokens(files, [map_file(file, meta.dtype) for file in files], meta)
    for file, part in zip(files, tokens.parts, strict=True):
        promised = meta.tokens.get(file.name, len(part))
        if promised != len(part):
            raise ValueError(f'{file}: {len(part)} tokens, meta.json promises {promised}; prepare or download it again')
    for key, value in (('pad_id', meta.pad_id), ('bos', meta.bos)):
        if value is not None and value > np.iinfo(tokens.dtype).max:
            raise ValueError(f'{folder}/meta.json: {key}={value}, but no {tokens.dtype} token can be that; correct one of them')
    return tokens


def read_blocks(tokens: Tokens, progress: str | None):
    """Yield (file, position in it, ids [at most BLOCK_TOKENS]) through all files.

    Blocks are read, not memory-mapped, so that only one is in memory. `progress` labels a progress bar; None shows none.
    """
    with tqdm(total=tokens.size, desc=progress, unit=' tokens', unit_scale=True, disable=progress is None, leave=False,
              delay=1) as bar:
        for file, part in zip(tokens.files, tokens.parts, strict=True):
            for start in range(0, len(part), BLOCK_TOKENS):
                count = min(BLOCK_TOKENS, len(part) - start)
                yield file, start, np.fromfile(file, part.dtype, count, offset=part.offset + start * part.itemsize)
                bar.update(count)


def check_ids(tokens: Tokens, V: int) -> None:
    """Raise ValueError with file, position and value of the first id that is not below V. Reads every file once."""
    if np.iinfo(tokens.dtype).max < V:
        return
    for file, start, ids in read_blocks(tokens, 'checking ids'):
        if ids.max() >= V:
            first = int(np.argmax(ids >= V))
            raise ValueError(f'{file}: token {start + first} is {ids[first]}, but ids must lie below V={V}; set vocab_size in '
                             f'meta.json (model.V without one) to at least {ids[first] + 1}, or check its dtype')


def fingerprints(path: str | Path) -> dict[str, str]:
    """{file name: size and digest} of the token files of a data set, in milliseconds.

    The digest covers 64 blocks of 64 KiB, spread evenly over a file that is larger. It tells whether a file has changed.
    """
    found = {}
    for file in (file for split in ('train', 'test') for file in split_files(Path(path), split)):
        size, sha = file.stat().st_size, hashlib.sha256()
        starts = np.linspace(0, max(0, size - FINGERPRINT_BYTES), FINGERPRINT_BLOCKS).astype(int)
        with open(file, 'rb') as f:
            for start in np.unique(starts).tolist():
                f.seek(start)
                sha.update(f.read(FINGERPRINT_BYTES))
        found[file.name] = f'{size} bytes, {sha.hexdigest()[:16]}'
    return found
