"""Token files on disk: open, read and check them. No JAX is needed. Batches are made in data.py.

A data set is a folder in one of two forms:

- `train.bin` and `test.bin` (or `val.bin`): token ids one after another without a header, uint8 unless meta.json says
  `"dtype": "uint16"`;
- shards `NAME_train_*.bin` and `NAME_val_*.bin`: uint16 ids after a header of 256 int32 (magic number, version, token count),
  the format of llm.c and modded-nanogpt.

`meta.json` may describe it; see meta.py.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from token_files.meta import read_meta

HEADER_INTS = 256  # int32 words before the tokens of a shard
MAGIC, VERSION = 20240520, 1
BLOCK_TOKENS = 1 << 22  # read at a time where a whole file is walked: 4 or 8 MB, which fits in a CPU cache
FINGERPRINT_BYTES, FINGERPRINT_BLOCKS = 1 << 16, 64


class Tokens(NamedTuple):
    """One split of a data set, read as one endless stream of token ids, however many files hold it."""

    files: tuple[Path, ...]
    parts: tuple[np.memmap, ...]  # the tokens of each file, without its header
    dtype: np.dtype
    vocab_size: int | None  # None where the data set does not say
    pad_id: int | None  # targets with this id carry no loss; None: every target counts

    @property
    def size(self) -> int:
        """Number of tokens in one pass over the stream."""
        return sum(len(part) for part in self.parts)

    def read(self, start: int, count: int) -> np.ndarray:
        """Ids [count] from position `start`; after its end the stream starts again. A view of the file where one file has them."""
        pieces, start = [], start % self.size
        while True:
            for part in self.parts:
                if start < len(part):
                    pieces.append(part[start : start + count])
                    count -= len(pieces[-1])
                    if count <= 0:
                        return np.asarray(pieces[0]) if len(pieces) == 1 else np.concatenate(pieces)
                start = max(0, start - len(part))


def split_files(folder: Path, split: str) -> list[Path]:
    """The files of a split ('train' or 'test') in reading order. Raises FileNotFoundError that says what was wanted."""
    if not folder.is_dir():
        raise FileNotFoundError(f'{folder}: no such folder; ds_path must name one with train.bin and test.bin')
    names = ['train'] if split == 'train' else ['test', 'val']
    for name in names:
        if (folder / f'{name}.bin').exists():
            return [folder / f'{name}.bin']
    for name in names:
        if shards := sorted(folder.glob(f'*_{name}_*.bin')):
            return shards
    wanted = ' or '.join([f'{name}.bin' for name in names] + [f'*_{name}_*.bin' for name in names])
    unfinished = any(folder.glob('*.part')) or (folder / '.preparing').exists()
    hint = '; an unfinished download or preparation is there: run the same command again' if unfinished else ''
    raise FileNotFoundError(f'{folder}: no {split} data; wanted {wanted}{hint}')


def map_file(path: Path, dtype: str, is_shard: bool) -> np.memmap:
    """The tokens of one file. `dtype` is for a file without a header; `is_shard` requires a header. Raises ValueError."""
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f'{path}: is empty; delete it, then prepare or download it again')
    header = np.fromfile(path, '<i4', min(HEADER_INTS, size // 4))
    if len(header) and header[0] == MAGIC:
        if len(header) < HEADER_INTS or header[1] != VERSION:
            raise ValueError(f'{path}: a shard header of version {header[1:2]}, {len(header)} words; wanted version {VERSION}')
        held, promised = (size - 4 * HEADER_INTS) / 2, int(header[2])
        if promised <= 0 or held != promised:
            raise ValueError(f'{path}: its header promises {promised} uint16 tokens, it holds {held:g}; download it again')
        return np.memmap(path, '<u2', 'r', offset=4 * HEADER_INTS, shape=promised)
    if is_shard:
        raise ValueError(f'{path}: begins with {header[:1]}, not with the magic number {MAGIC} of a shard; a file without a '
                         'header must be named train.bin or test.bin')
    if dtype == 'uint16' and size % 2:
        raise ValueError(f'{path}: {size} bytes are not a whole number of uint16 tokens; it is cut short, or dtype in '
                         'meta.json should be "uint8"')
    return np.memmap(path, '<u2' if dtype == 'uint16' else 'u1', 'r')


def open_tokens(path: str | Path, split: str = 'train') -> Tokens:
    """One split ('train' or 'test') of the data set in folder `path`, or the single file `path`. Reads headers and sizes only.

    Raises FileNotFoundError or ValueError with one line: the file, what it holds, what was wanted.
    """
    path = Path(path)
    files = [path] if path.is_file() else split_files(path, split)
    folder = files[0].parent
    meta = read_meta(folder)
    is_shard = files[0].stem not in ('train', 'test', 'val') and not path.is_file()
    parts = [map_file(file, meta.get('dtype', 'uint8'), is_shard) for file in files]
    dtype = parts[0].dtype
    if any(part.dtype != dtype for part in parts):
        raise ValueError(f'{folder}: one split has shards with and without a header; keep one kind')
    for file, part in zip(files, parts, strict=True):
        promised = meta.get('tokens', {}).get(file.name, len(part))
        if promised != len(part):
            raise ValueError(f'{file}: {len(part)} tokens, meta.json promises {promised}; prepare or download it again')
    for key in ('pad_id', 'bos'):
        if (meta.get(key) or 0) > np.iinfo(dtype).max:
            raise ValueError(f'{folder}/meta.json: {key}={meta[key]}, but no {dtype} token can be that; correct one of them')
    return Tokens(tuple(files), tuple(parts), dtype, meta.get('vocab_size'), meta.get('pad_id'))


def read_blocks(tokens: Tokens, progress: str | None = None):
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
