"""`python -m token_files DIR [--config NAME]`: check a data set, describe it, and print a configuration to start from.

Every file is read from start to end. The description is printed as YAML comments, so that the output is a configuration file.
With --config, the data set is compared with configs/NAME.yaml instead.
"""

import argparse
import difflib
import hashlib
import sys
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf

from token_files.files import Tokens, check_ids, open_tokens, read_blocks
from token_files.meta import read_meta

CONFIGS = Path(__file__).parent.parent / 'configs'
MAX_COMPARED = 100_000  # different test sequences that are looked for in train: bounds the memory
PUBLISHED_BATCH = 65_536  # tokens in a batch of the paper's transformers (Qiu et al. 2025, appendix A)
SHADES = ' .:-=+*#%@'  # from black to white


def count_ids(tokens: Tokens) -> tuple[np.ndarray, dict[str, str]]:
    """(how often each id occurs [256 or 65536], {file name: SHA-256 of its tokens}), in one pass."""
    counts, sums = np.zeros(np.iinfo(tokens.dtype).max + 1, np.int64), {}
    for file, _, ids in read_blocks(tokens, 'counting ids'):
        counts += np.bincount(ids, minlength=len(counts))
        sums.setdefault(file.name, hashlib.sha256()).update(ids)
    return counts, {name: sha.hexdigest() for name, sha in sums.items()}


def entropy(counts: np.ndarray) -> float:
    """Entropy of the id frequencies, in nats a token: the loss of a model that only knows how common each id is."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def blocks_of(tokens: Tokens, length: int, progress: str | None = None):
    """Yield the bytes of each block of `length` tokens."""
    rest, size = b'', length * tokens.dtype.itemsize
    for _, _, ids in read_blocks(tokens, progress):
        data = rest + ids.tobytes()
        end = len(data) // size * size
        yield from (data[i : i + size] for i in range(0, end, size))
        rest = data[end:]


def documents_of(tokens: Tokens, bos: int, progress: str | None = None):
    """Yield the bytes of each document, without the id `bos` that opens it. The tokens must be uint8."""
    rest = b''
    for _, _, ids in read_blocks(tokens, progress):
        *documents, rest = (rest + ids.tobytes()).split(bytes([bos]))
        yield from filter(None, documents)
    if rest:
        yield rest


def count_repeated(train: Tokens, test: Tokens, length: int, bos: int | None) -> tuple[int, int]:
    """(test sequences that occur in train, test sequences), of the first MAX_COMPARED different ones.

    A sequence is a document where `bos` opens each, else a block of `length` tokens.
    """

    def sequences(tokens, progress=None):
        return blocks_of(tokens, length, progress) if bos is None else documents_of(tokens, bos, progress)

    wanted = set()
    for sequence in sequences(test):
        wanted.add(sequence)
        if len(wanted) == MAX_COMPARED:
            break
    found = wanted.intersection(sequences(train, 'looking for test sequences'))
    return len(found), len(wanted)


def decode(ids: np.ndarray, meta: dict) -> str:
    """The ids in readable form: by the vocabulary of the data set, as a picture of characters, as text, or as numbers."""
    if words := meta.get('vocabulary'):
        return ''.join(words[int(i)] for i in ids)
    if 'image' in meta and ids.dtype == np.uint8:
        picture = np.array(list(SHADES))[ids.astype(int) * len(SHADES) // 256].reshape(meta['image'])
        return '\n'.join(''.join(row) for row in picture[::2])  # every second row: a character is twice as high as wide
    text = ids.tobytes().decode('utf-8', 'replace') if ids.dtype == np.uint8 else ''
    readable = sum(character.isprintable() or character.isspace() for character in text)
    return text if text and readable > 0.9 * len(text) else str(ids[:64])


def print_comment(*lines: str) -> None:
    """Print lines as YAML comments. Characters that could act on a terminal or end the line are replaced by a dot."""
    for line in lines:
        print('# ' + ''.join(character if character.isprintable() else '·' for character in line))


def starting_config(folder: Path, V: int, L: int, train: int, test: int) -> str:
    """The YAML of a small model that sees `train` tokens once, with the published learning rates (Qiu et al. 2025, appendix A).

    The batch has the published number of tokens where that leaves at least 100 steps. T_eval is at most 1/40 of the training
    tokens, so that 20 evaluations take at most half of the time of training.
    """
    largest = min(PUBLISHED_BATCH // L, test // L, train // (100 * L))
    B = 1 << max(0, largest.bit_length() - 1)  # the largest power of two below
    batch = B * L
    return f'''defaults: [default, _self_]
arch: transformer
{OmegaConf.to_yaml({'ds_path': str(folder)}).strip()}
T: {train // batch * batch}  # one pass
T_eval: {min(2_048_000, test, max(batch, train // 40)) // batch * batch}
num_evals: 20
model: {{D: 128, N: 3, L: {L}, V: {V}, mlp_expansion: 1}}
opt: {{B: {B}, lr: 0.01, embed_lr_mult: 10, readout_lr_mult: 1, schedule: linear, warmup_tokens: {train // 100}}}'''


def load_config(name: str):
    """configs/NAME.yaml over configs/default.yaml. Raises FileNotFoundError with a similar name, if there is one."""
    path = CONFIGS / f'{name}.yaml'
    if not path.exists():
        similar = difflib.get_close_matches(name, [p.stem for p in CONFIGS.glob('*.yaml')], 1)
        raise FileNotFoundError(f'{path}: no such configuration' + (f'; did you mean {similar[0]}?' if similar else ''))
    return OmegaConf.merge(OmegaConf.load(CONFIGS / 'default.yaml'), OmegaConf.load(path))


def check_against_config(folder: Path, name: str, cfg, train: Tokens, test: Tokens, ids: int, V: int) -> None:
    """Print how the data set fits a configuration. Raises ValueError with the key to change."""
    B, L = cfg.opt.B, cfg.model.L
    if train.vocab_size is None and cfg.model.V < ids:  # with a vocab_size in meta.json, the trainer takes V from there
        raise ValueError(f'{folder}: {ids} ids, but {name} has model.V={cfg.model.V}; set model.V={V}')
    if max(cfg.T_eval or 0, B * L) > test.size or B * L > train.size:
        raise ValueError(f'{folder}: {train.size} train and {test.size} test tokens, but {name} evaluates on T_eval={cfg.T_eval} '
                         f'in batches of opt.B={B} times model.L={L}; lower T_eval or opt.B')
    passes = f', T={cfg.T:g} is {cfg.T / train.size:.3g} passes over train' if cfg.T else ''
    print_comment(f'{name}: fits (V={V}, L={L}, B={B}){passes}')


def describe_split(folder: Path, name: str, tokens: Tokens, meta: dict) -> np.ndarray:
    """How often each id occurs in a split, whose size and ids are printed. Raises ValueError if a checksum is wrong."""
    counts, sums = count_ids(tokens)
    for file, found in sums.items():
        wanted = meta.get('sha256', {}).get(file, found)
        if found != wanted:
            raise ValueError(f'{folder / file}: its SHA-256 is {found}, but {wanted} in meta.json; prepare or download it again')
    used = np.flatnonzero(counts)
    files = ', '.join(file.name for file in tokens.files[:3]) + (' …' if len(tokens.files) > 3 else '')
    print_comment(f'{name}: {tokens.size:,} tokens of {tokens.dtype} in {files}, '
                  f'{len(used)} different ids from {used[0]} to {used[-1]}')
    return counts


def describe(folder: Path, config: str | None = None) -> None:
    """Print what the data set holds, then a configuration to start from, or how it fits the configuration named `config`.

    Raises ValueError or FileNotFoundError at the first thing that is wrong.
    """
    cfg = load_config(config) if config else None
    meta, train, test = read_meta(folder), open_tokens(folder, 'train'), open_tokens(folder, 'test')
    image = meta.get('image')
    L = cfg.model.L if cfg else int(np.prod(image)) if image else 128
    for tokens in (train, test):
        if tokens.size < L:
            raise ValueError(f'{tokens.files[0]}: {tokens.size} tokens are fewer than one sequence of {L}; more text is needed')

    counts = {name: describe_split(folder, name, tokens, meta) for name, tokens in (('train', train), ('test', test))}
    ids = train.vocab_size or max(int(np.flatnonzero(c)[-1]) for c in counts.values()) + 1
    V = -(-ids // 32) * 32  # rounded up to a multiple of 32, as the trainer does
    origin = '' if train.vocab_size else ' (up to the largest one used; no vocab_size in meta.json)'
    print_comment(f'vocabulary: {ids} ids{origin}, so V={V}')
    for tokens in (train, test):
        check_ids(tokens, ids)

    bos = meta.get('bos') if train.dtype == np.uint8 else None
    if bos is not None and not counts['train'][bos]:  # all of train would be one document, too large for the memory
        raise ValueError(f'{folder}/meta.json: bos={bos} never occurs in train; correct or delete it')
    if train.pad_id is not None:
        share = counts['train'][train.pad_id] / train.size
        print_comment(f'padding: id {train.pad_id}, {share:.2%} of train; such targets carry no loss')
        for c in counts.values():
            c[train.pad_id] = 0
    words, shares = meta.get('vocabulary'), counts['train'] / max(1, counts['train'].sum())
    common = np.argsort(-counts['train'], kind='stable')[:10].tolist()
    print_comment('most common: ' + ', '.join(f'{repr(words[i]) if words else i} {shares[i]:.1%}' for i in common))
    print_comment(f'unigram entropy: {entropy(counts["train"]):.4f} nats a token of train, {entropy(counts["test"]):.4f} of test; '
                  f'ln V = {np.log(V):.4f}')
    found, compared = count_repeated(train, test, L, bos)
    kind = 'documents' if bos is not None else f'blocks of {L} tokens'
    print_comment(f'repeated: {found:,} of {compared:,} different test {kind} occur in train')
    print_comment('test begins:', *decode(test.read(0, min(test.size, int(np.prod(image)) if image else 300)), meta).splitlines())

    if cfg:
        check_against_config(folder, config, cfg, train, test, ids, V)
    else:
        print(starting_config(folder, V, L, train.size, test.size))


def main():
    parser = argparse.ArgumentParser(prog='python -m token_files', description='check and describe a data set')
    parser.add_argument('dir', type=Path)
    parser.add_argument('--config', help='name of a file in configs/ to compare the data set with')
    args = parser.parse_args()
    try:
        describe(args.dir, args.config)
    except (ValueError, OSError) as error:
        sys.exit(f'token_files: {error}')
