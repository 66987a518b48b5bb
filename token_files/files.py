"""Token files on disk: open, read, check and describe them. No JAX is needed. Batches are data.py's.

A data set is a folder with `train.bin` and `test.bin` (or `val.bin`), flat streams of token ids without a header,
uint8 unless `meta.json` says `"dtype": "uint16"`; or with shards `NAME_train_*.bin` and `NAME_val_*.bin` of uint16
behind a header of 256 int32 (magic 20240520, version 1, token count). `meta.json` (or, in published data sets,
`meta.pkl`) is optional, and so is everything in it:

    vocab_size  ids lie in [0, vocab_size)          pad_id    targets with this id carry no loss
    dtype       'uint8' or 'uint16'                 bos       id that opens every document
    vocabulary  the text of every id, in order      image     [rows, columns] of one sequence of pixels
    tokens      {file: count}                       sha256    {file: checksum}

`python -m dataset DIR [--config NAME]` validates a data set, describes it and prints a configuration to start from.
"""

import argparse
import hashlib
import json
import pickle
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from omegaconf import OmegaConf
from tqdm import tqdm

HEADER_INTS = 256  # int32 words before the tokens of a shard
MAGIC, VERSION = 20240520, 1
BLOCK = 1 << 22  # tokens read at a time by whatever walks a whole file: 4 or 8 MB, which a cache still holds
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
        """[count] ids from `start` on; the stream begins again at its end. A view of the file where one file holds them."""
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
    """Loads numbers, strings and containers. A pickle that names any class or function is refused before it runs."""

    def find_class(self, module, name):
        raise ValueError(f'it asks for {module}.{name}')


def read_meta(folder: Path) -> dict:
    """The facts of a data set: `meta.json` over `meta.pkl`, {} with neither. Raises ValueError with file and reason."""
    meta = {}
    for path in (folder / 'meta.pkl', folder / 'meta.json'):
        if not path.exists():
            continue
        if path.stat().st_size > META_BYTES:
            raise ValueError(f'{path}: {path.stat().st_size} bytes; a description of a data set has at most {META_BYTES}')
        try:
            with open(path, 'rb') as f:
                found = _Builtins(f).load() if path.suffix == '.pkl' else json.load(f)
        except Exception as e:  # a damaged pickle raises nearly anything; nothing was built, so naming the file is all
            raise ValueError(f'{path}: cannot be read ({e}); wanted a dict of plain numbers, strings, lists and dicts') from e
        if not isinstance(found, dict):
            raise ValueError(f'{path}: holds a {type(found).__name__}, not a dict')
        for key in meta.keys() & found.keys() & {'vocab_size', 'pad_id', 'bos', 'dtype'}:
            if meta[key] != found[key]:
                raise ValueError(f'{path}: {key} is {found[key]!r}, but {meta[key]!r} in meta.pkl; delete the wrong one')
        meta |= found
    for key in ('vocab_size', 'pad_id', 'bos'):
        value = meta.get(key)
        if value is not None and (type(value) is not int or not 0 <= value <= 65536):
            raise ValueError(f'{folder}/meta.json: {key}={value!r} is not an integer in 0 … 65536')
    if 'itos' in meta and 'vocabulary' not in meta:  # what published tooling calls it
        names = dict(enumerate(meta['itos'])) if isinstance(meta['itos'], list) else meta['itos']
        meta['vocabulary'] = [str(names.get(i, '?')) for i in range(meta.get('vocab_size', len(names)))]
    words, image = meta.get('vocabulary', []), meta.get('image', [1, 1])
    for key, right, wanted in (
            ('vocabulary', isinstance(words, list) and all(isinstance(word, str) for word in words), 'a list of strings'),
            ('image', isinstance(image, list) and [type(n) is int and n > 0 for n in image] == [True] * 2, '[rows, columns]'),
            ('tokens', isinstance(meta.get('tokens', {}), dict), '{file: count}'),
            ('sha256', isinstance(meta.get('sha256', {}), dict), '{file: checksum}')):  # fmt: skip
        if not right:
            raise ValueError(f'{folder}/meta.json: {key}={str(meta[key])[:40]} is not {wanted}')
    if 'vocabulary' in meta and len(meta['vocabulary']) != meta.get('vocab_size'):
        raise ValueError(f'{folder}/meta.json: vocabulary has {len(meta["vocabulary"])} entries, vocab_size is '
                         f'{meta.get("vocab_size")}; they must agree')
    if meta.get('dtype', 'uint8') not in ('uint8', 'uint16'):
        raise ValueError(f'{folder}/meta.json: dtype={meta["dtype"]!r}; the formats read are "uint8" and "uint16"')
    return meta


def split_files(folder: Path, split: str) -> list[Path]:
    """The files of a split ('train' or 'test') in reading order. Raises FileNotFoundError, which says what was wanted."""
    if not folder.is_dir():
        raise FileNotFoundError(f'{folder}: no such folder; ds_path must name one with train.bin and test.bin')
    names = ['train'] if split == 'train' else ['test', 'val']
    for name in names:
        if (folder / f'{name}.bin').exists():
            return [folder / f'{name}.bin']
    for name in names:
        if shards := sorted(folder.glob(f'*_{name}_*.bin')):
            return shards
    wanted = ' or '.join([f'{n}.bin' for n in names] + [f'*_{n}_*.bin' for n in names])
    half = '; a half-made file is there: prepare or download it again' if any(folder.glob('*.part')) else ''
    raise FileNotFoundError(f'{folder}: no {split} data; wanted {wanted}{half}')


def map_file(path: Path, dtype: str, sharded: bool) -> np.memmap:
    """The tokens of one file. `dtype` is that of a file without a header; `sharded` demands the header."""
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f'{path}: is empty; delete it and prepare or download it again')
    head = np.fromfile(path, '<i4', min(HEADER_INTS, size // 4))
    if len(head) and head[0] == MAGIC:
        if len(head) < HEADER_INTS or head[1] != VERSION:
            raise ValueError(f'{path}: a shard header of version {head[1:2]}, {len(head)} words; wanted version {VERSION}')
        held, count = (size - 4 * HEADER_INTS) / 2, int(head[2])
        if count <= 0 or held != count:
            raise ValueError(f'{path}: its header promises {count} uint16 tokens, it holds {held:g}; fetch it again')
        return np.memmap(path, '<u2', 'r', offset=4 * HEADER_INTS, shape=count)
    if sharded:
        raise ValueError(f'{path}: begins with {head[:1]}, not with the magic number {MAGIC} of a shard; a file without a '
                         'header must be named train.bin or test.bin')
    if dtype == 'uint16' and size % 2:
        raise ValueError(f'{path}: {size} bytes are not a whole number of uint16 tokens; it is cut short, or dtype in '
                         'meta.json should be "uint8"')
    return np.memmap(path, '<u2' if dtype == 'uint16' else 'u1', 'r')


def open_tokens(path: str | Path, split: str = 'train') -> Tokens:
    """Open one split ('train' or 'test') of the data set in folder `path`, or the single file `path`.

    Reads headers and sizes only. Raises FileNotFoundError or ValueError, one line: file, what came, what was wanted.
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
    for key in ('pad_id', 'bos'):
        if (meta.get(key) or 0) > np.iinfo(parts[0].dtype).max:
            raise ValueError(f'{files[0].parent}/meta.json: {key}={meta[key]}, but no {parts[0].dtype} token can be; correct one')
    return Tokens(tuple(files), tuple(parts), parts[0].dtype, meta.get('vocab_size'), meta.get('pad_id'))


def blocks(tokens: Tokens, what: str | None = None):
    """Yield (file, position in it, ids) through all files, read rather than mapped: memory stays at one block.

    `what` names the work on a progress bar.
    """
    with tqdm(total=tokens.size, desc=what, unit=' tokens', unit_scale=True, disable=what is None, leave=False, delay=1) as bar:
        for file, part in zip(tokens.files, tokens.parts, strict=True):
            for start in range(0, len(part), BLOCK):
                offset = part.offset + start * part.itemsize
                yield file, start, np.fromfile(file, part.dtype, min(BLOCK, len(part) - start), offset=offset)
                bar.update(min(BLOCK, len(part) - start))


def fingerprints(path: str | Path) -> dict[str, str]:
    """{file name: size in bytes and a digest} of the token files: of 64 blocks of 64 KiB, spread over a file that is larger."""
    found = {}
    for file in [file for split in ('train', 'test') for file in split_files(Path(path), split)]:
        size, sha = file.stat().st_size, hashlib.sha256()
        with open(file, 'rb') as f:
            for start in sorted({int(at) for at in np.linspace(0, max(0, size - (1 << 16)), 64)}):
                f.seek(start)
                sha.update(f.read(1 << 16))
        found[file.name] = f'{size} bytes, {sha.hexdigest()[:16]}'
    return found


def check_ids(tokens: Tokens, V: int) -> None:
    """Raise ValueError with file, position and value of the first id that is not below V. Reads everything once."""
    if np.iinfo(tokens.dtype).max < V:
        return
    for file, start, ids in blocks(tokens, 'checking ids'):
        if ids.max() >= V:
            at = int(np.argmax(ids >= V))
            raise ValueError(f'{file}: token {start + at} is {ids[at]}, but ids must lie below V={V}; set '
                             f'vocab_size in meta.json (model.V without one) to at least {ids[at] + 1}, or check its dtype')


# ---------------------------------------------------------------- describing: python -m dataset


def histogram(tokens: Tokens) -> tuple[np.ndarray, dict[str, str]]:
    """How often each id occurs [256 or 65536], and the SHA-256 of each file's tokens, in one pass."""
    counts, sums = np.zeros(np.iinfo(tokens.dtype).max + 1, np.int64), {}
    for file, _, ids in blocks(tokens, 'counting ids'):
        counts += np.bincount(ids, minlength=len(counts))
        sums.setdefault(file.name, hashlib.sha256()).update(ids)
    return counts, {name: sha.hexdigest() for name, sha in sums.items()}


def entropy(counts: np.ndarray) -> float:
    """Entropy of the frequencies, in nats a token: the loss of a model that knows only how common each id is."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def sequences(tokens: Tokens, length: int, bos: int | None, what: str | None = None):
    """Yield the bytes of every document (where `bos`, of uint8, opens each), or of every block of `length` tokens."""
    rest, size = b'', length * tokens.dtype.itemsize
    for _, _, ids in blocks(tokens, what):
        data = rest + ids.tobytes()
        if bos is not None:
            *whole, rest = data.split(bytes([bos]))
            yield from filter(None, whole)
        else:
            end = len(data) // size * size
            yield from (data[i : i + size] for i in range(0, end, size))
            rest = data[end:]
    if bos is not None and rest:
        yield rest


def repeated(train: Tokens, test: Tokens, length: int, bos: int | None) -> tuple[int, int]:
    """(test sequences that occur in train, test sequences), of the first 100,000 different ones."""
    wanted = set()
    for sequence in sequences(test, length, bos):
        wanted.add(sequence)
        if len(wanted) == 100_000:
            break
    found = wanted.intersection(sequences(train, length, bos, 'looking for test sequences'))
    return len(found), len(wanted)


def decode(ids: np.ndarray, meta: dict) -> str:
    """Ids as a reader sees them: by the vocabulary, as a picture of characters, as text, or else as numbers."""
    if words := meta.get('vocabulary'):
        return ''.join(words[int(i)] for i in ids)
    if 'image' in meta and ids.dtype == np.uint8:
        shades = np.array(list(' .:-=+*#%@'))[ids.astype(int) * 10 // 256].reshape(meta['image'])
        return '\n'.join(''.join(row) for row in shades[::2])  # a character is twice as high as wide
    text = ids.tobytes().decode('utf-8', 'replace') if ids.dtype == np.uint8 else ''
    return text if text and sum(c.isprintable() or c.isspace() for c in text) > 0.9 * len(text) else str(ids[:64])


def starting_config(folder: Path, V: int, L: int, train: int, test: int) -> str:
    """A configuration of small size for one pass over the data, with the published learning rates (Qiu et al. 2025, appendix A).

    The batch has the published 65,536 tokens where that leaves at least 100 steps; evaluations take at most half of the training.
    """
    B = 1 << max(0, min(65536 // L, test // L, train // (100 * L)).bit_length() - 1)
    return f'''defaults: [default, _self_]
arch: transformer
{OmegaConf.to_yaml({'ds_path': str(folder)}).strip()}
T: {train // (B * L) * B * L}  # one pass
T_eval: {min(2_048_000, test, max(B * L, train // 40)) // (B * L) * B * L}
num_evals: 20
model: {{D: 128, N: 3, L: {L}, V: {V}, mlp_expansion: 1}}
opt: {{B: {B}, lr: 0.01, embed_lr_mult: 10, readout_lr_mult: 1, schedule: linear, warmup_tokens: {train // 100}}}'''


def describe(folder: Path, config: str | None) -> None:
    """Print what the data set is, as the comments of a configuration to start from; or how it fits the `config` given.

    Raises ValueError or FileNotFoundError at the first thing that is wrong with it.
    """
    cfg = OmegaConf.create()
    if config is not None:
        configs = [Path(__file__).parent / 'configs' / f'{name}.yaml' for name in ('default', config)]
        if not configs[1].exists():
            raise FileNotFoundError(f'{configs[1]}: no such configuration')
        cfg = OmegaConf.merge(*map(OmegaConf.load, configs))
    meta, train, test = read_meta(folder), open_tokens(folder, 'train'), open_tokens(folder, 'test')
    L = cfg.model.L if config else int(np.prod(meta.get('image', 128)))
    for tokens in (train, test):
        if tokens.size < L:
            raise ValueError(f'{tokens.files[0]}: {tokens.size} tokens are fewer than one sequence of {L}; more text is needed')
    bos = meta.get('bos') if train.dtype == np.uint8 else None  # a byte to split at
    counts, words = {}, meta.get('vocabulary')
    for name, tokens in (('train', train), ('test', test)):
        counts[name], sums = histogram(tokens)
        for file, found in sums.items():
            if found != meta.get('sha256', {}).get(file, found):
                raise ValueError(f'{folder / file}: its SHA-256 is {found}, not the {meta["sha256"][file]} of meta.json; '
                                 'prepare or download it again')
        used = np.flatnonzero(counts[name])
        say(f'{name}: {tokens.size:,} tokens of {tokens.dtype} in {", ".join(file.name for file in tokens.files[:3])}'
            f'{" …" * (len(tokens.files) > 3)}, {len(used)} different ids from {used[0]} to {used[-1]}')
    size = train.vocab_size or int(max(np.flatnonzero(c)[-1] for c in counts.values())) + 1
    V = -(-size // 32) * 32
    say(f'vocabulary: {size} ids{"" if train.vocab_size else " (by the largest: no meta.json says)"}, so V={V}')
    for tokens in (train, test):
        check_ids(tokens, size)
    if bos is not None and not counts['train'][bos]:  # all of it would be one document, too large to hold
        raise ValueError(f'{folder}/meta.json: bos={bos} never occurs in train; correct or delete it')
    if train.pad_id is not None:
        say(f'padding: id {train.pad_id}, {counts["train"][train.pad_id] / train.size:.2%} of train, carries no loss as a target')
        for c in counts.values():
            c[train.pad_id] = 0
    common = np.argsort(-counts['train'], kind='stable')[:10].tolist()
    shares = counts['train'] / max(1, counts['train'].sum())
    say('most common: ' + ', '.join(f'{repr(words[i]) if words else i} {shares[i]:.1%}' for i in common))
    say(f'unigram entropy: {entropy(counts["train"]):.4f} nats a token of train, {entropy(counts["test"]):.4f} of test, '
        f'against ln V = {np.log(V):.4f}')
    found, wanted = repeated(train, test, L, bos)
    kind = 'documents' if bos is not None else f'blocks of {L} tokens'
    say(f'repeated: {found:,} of {wanted:,} different test {kind} occur in train')
    say('test begins:', *decode(test.read(0, min(test.size, int(np.prod(meta.get('image', 300))))), meta).splitlines())
    if config is None:
        print(starting_config(folder, V, L, train.size, test.size))
        return
    B = cfg.opt.B
    if train.vocab_size is None and cfg.model.V < size:  # where the data set says, the trainer follows it
        raise ValueError(f'{folder}: {size} ids, but {config} has model.V={cfg.model.V}; set model.V={V}')
    if max(cfg.T_eval or 0, B * L) > test.size or B * L > train.size:
        raise ValueError(f'{folder}: {train.size} train and {test.size} test tokens, but {config} evaluates on '
                         f'T_eval={cfg.T_eval} in batches of opt.B={B} times model.L={L}; lower T_eval or opt.B')
    passes = f', T={cfg.T:g} is {cfg.T / train.size:.3g} passes over train' if cfg.T else ''
    say(f'{config}: fits (V={V}, L={L}, B={B}){passes}')


def say(*lines: str) -> None:
    """Print lines as comments, with nothing in them that a terminal or YAML takes for more than text."""
    for line in lines:
        print('# ' + ''.join(c if c.isprintable() else '·' for c in line))


def main():
    parser = argparse.ArgumentParser(prog='python -m dataset', description='validate and describe a data set')
    parser.add_argument('dir', type=Path)
    parser.add_argument('--config', help='name of a file in configs/ that the data set should fit')
    args = parser.parse_args()
    try:
        describe(args.dir, args.config)
    except (ValueError, OSError) as e:
        sys.exit(f'dataset: {e}')


if __name__ == '__main__':
    main()
