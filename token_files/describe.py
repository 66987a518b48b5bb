"""What `python -m token_files DIR` prints: a description of a data set, as YAML comments, and a configuration to start from."""

import hashlib
import itertools
import json
import math
from pathlib import Path

import numpy as np
from scipy.stats import entropy

from token_files.files import Tokens, check_ids, open_tokens, read_blocks
from token_files.meta import Meta

MAX_COMPARED = 100_000  # test sequences that are looked for in train: bounds the memory
PUBLISHED_BATCH = 65_536  # tokens in a batch of the paper's transformers (Qiu et al. 2025, appendix A)


def sequences(tokens: Tokens, length: int, bos: int | None, progress: str | None = None):
    """Yield the bytes of each sequence: a document where the id `bos` opens each, else a block of `length` tokens.

    Documents come without their `bos`; their tokens must be uint8.
    """
    rest, size = b'', length * tokens.dtype.itemsize
    for _, _, ids in read_blocks(tokens, progress):
        data = rest + ids.tobytes()
        if bos is None:
            *found, rest = (data[i : i + size] for i in range(0, len(data) + 1, size))
        else:
            *found, rest = data.split(bytes([bos]))
        yield from filter(None, found)
    if rest and bos is not None:
        yield rest


def count_repeated(train: Tokens, test: Tokens, length: int, bos: int | None) -> tuple[int, int]:
    """(different test sequences that occur in train, different test sequences), of the first MAX_COMPARED ones."""
    wanted = set(itertools.islice(sequences(test, length, bos), MAX_COMPARED))
    return len(wanted.intersection(sequences(train, length, bos, 'looking for test sequences'))), len(wanted)


def decode(ids: np.ndarray, meta: Meta) -> str:
    """The ids in readable form: by the vocabulary of the data set, else as text where tokens are bytes, else as numbers."""
    if words := meta.vocabulary:
        return ''.join(words[i] if i < len(words) else '?' for i in ids)
    is_text = ids.dtype == np.uint8 and meta.image is None
    return ids.tobytes().decode('utf-8', 'replace') if is_text else str(ids[:64])


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
ds_path: {json.dumps(str(folder), ensure_ascii=False)}
T: {train // batch * batch}  # one pass
T_eval: {min(2_048_000, test, max(batch, train // 40)) // batch * batch}
num_evals: 20
model: {{D: 128, N: 3, L: {L}, V: {V}, mlp_expansion: 1}}
opt: {{B: {B}, lr: 0.01, embed_lr_mult: 10, readout_lr_mult: 1, schedule: linear, warmup_tokens: {train // 100}}}'''


def describe_split(name: str, tokens: Tokens) -> np.ndarray:
    """How often each id occurs in a split [256 or 65536]; size and ids are printed. Raises ValueError if a checksum is wrong."""
    counts, sums = np.zeros(np.iinfo(tokens.dtype).max + 1, np.int64), {file: hashlib.sha256() for file in tokens.files}
    for file, _, ids in read_blocks(tokens, f'counting the ids of {name}'):
        counts += np.bincount(ids, minlength=len(counts))
        sums[file].update(ids)
    for file, sha in sums.items():
        wanted = tokens.meta.sha256.get(file.name)
        if wanted not in (None, sha.hexdigest()):
            raise ValueError(f'{file}: its SHA-256 is {sha.hexdigest()}, but {wanted} in meta.json; prepare or download it again')
    used = np.flatnonzero(counts)
    files = ', '.join(file.name for file in tokens.files[:3]) + (' …' if len(tokens.files) > 3 else '')
    print_comment(f'{name}: {tokens.size:,} tokens of {tokens.dtype} in {files}, '
                  f'{len(used)} different ids from {used[0]} to {used[-1]}')
    return counts


def describe(folder: Path) -> None:
    """Print what the data set holds, then a configuration to start from.

    Raises ValueError or FileNotFoundError at the first thing that is wrong.
    """
    train, test = open_tokens(folder, 'train'), open_tokens(folder, 'test')
    meta = train.meta
    L = math.prod(meta.image) if meta.image else 128
    for tokens in (train, test):
        if tokens.size < L:
            raise ValueError(f'{tokens.files[0]}: {tokens.size} tokens are fewer than one sequence of {L}; more text is needed')

    train_counts, test_counts = describe_split('train', train), describe_split('test', test)
    ids = meta.vocab_size or max(np.flatnonzero(train_counts)[-1], np.flatnonzero(test_counts)[-1]) + 1
    V = -(-ids // 32) * 32  # rounded up to a multiple of 32, as the trainer does
    origin = '' if meta.vocab_size else ' (up to the largest one used; no vocab_size in meta.json)'
    print_comment(f'vocabulary: {ids} ids{origin}, so V={V}')
    for tokens in (train, test):
        check_ids(tokens, ids)

    bos = meta.bos if train.dtype == np.uint8 else None
    if bos is not None and not train_counts[bos]:  # all of train would be one document, too large for the memory
        raise ValueError(f'{folder}/meta.json: bos={bos} never occurs in train; correct or delete it')
    if meta.pad_id is not None:
        share = train_counts[meta.pad_id] / train.size
        print_comment(f'padding: id {meta.pad_id}, {share:.2%} of train; such targets carry no loss')
        train_counts[meta.pad_id] = test_counts[meta.pad_id] = 0
    print_comment(f'unigram entropy: {entropy(train_counts):.4f} nats a token of train, {entropy(test_counts):.4f} of test; '
                  f'ln V = {np.log(V):.4f}')
    found, compared = count_repeated(train, test, L, bos)
    kind = 'documents' if bos is not None else f'blocks of {L} tokens'
    print_comment(f'repeated: {found:,} of {compared:,} different test {kind} occur in train')
    print_comment('test begins:', *decode(test.read(0, min(test.size, 300)), meta).splitlines())
    print(starting_config(folder, V, L, train.size, test.size))
