"""Lichess games as token files, one character a token: train.bin, test.bin, meta.json and meta.pkl in one folder.

    python prepare_chess.py                      # January 2025 from Hugging Face: 36 files, about 20 billion tokens
    python prepare_chess.py games/*.parquet      # or your own files

Inputs are parquet files with the columns movetext, WhiteElo and BlackElo: local paths, or URLs that Hugging Face `datasets` opens.
A game becomes `<BOS>moves|WhiteElo|BlackElo|FEN<EOS>`. Moves are in standard algebraic notation (SAN), with ',' after White's and
';' after Black's, without comments, move numbers and result. FEN is the final position (Qiu et al. 2025, appendix A).

The games are shuffled in two passes, so that memory does not grow with the data. The first pass puts each game into one of BUCKETS
random buckets on disk; the second shuffles one bucket after another in memory and writes it. Together this is a uniform shuffle of
all games (Rao 1961, Sandelius 1962). The last --test-games games are the test set. docs/data.md has time, memory and disk.
"""

import argparse
import glob
import hashlib
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import sys
import threading
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
from chess import Board
from tqdm import tqdm

from token_files import prepare
from token_files.atomic import atomic_write

LICHESS = 'hf://datasets/Lichess/standard-chess-games/data/year=2025/month=01/train-{:05}-of-00072.parquet'
COLUMNS = {'movetext': ('string', 'large_string'), 'WhiteElo': ('int', 'uint'), 'BlackElo': ('int', 'uint')}  # type prefixes
# The order of the published data set. It has 'b' twice: a file and a bishop of Black both get the later id.
VOCABULARY = ['<BOS>', '<EOS>', *',;+#=?!\n /0123456789-xabcdefghKQRBNOP()lkv:*|rnbqpwm']
BOS, EOS = 0, 1
IDS = {character: i for i, character in enumerate(VOCABULARY)}
TO_IDS = bytes(IDS.get(chr(byte), 255) for byte in range(256))  # a table for bytes.translate
CHARACTERS = frozenset(VOCABULARY[2:])
COMMENT_OR_NUMBER = re.compile(r'\{[^}]*\}|\b\d+\.+')
MOVE = re.compile(r'(O-O(-O)?|[KQRBN]?[a-h]?[1-8]?x?[a-h][1-8](=[QRBN])?)[+#]?[!?]{0,2}')  # one move in SAN
RESULTS = ('1-0', '0-1', '1/2-1/2', '*')
BATCH = 1024  # games that a process tokenises at a time: about a second of work
BUCKETS = 256  # 20 GB of games make buckets of 80 MB


def open_parquet(path: str, **options):
    """The rows of a parquet file as a stream, datasets.IterableDataset. Raises ValueError if the file cannot be opened.

    The file is not copied: at a URL it is read as the stream goes on, and lost connections are tried again.
    """
    from datasets import load_dataset  # not needed by the processes that tokenise

    with prepare.clear_errors(path):
        # `datasets` reads data_files as a pattern, hence escape
        return load_dataset('parquet', data_files=glob.escape(path), split='train', streaming=True, **options)


def check_input(path: str) -> int | None:
    """The size in bytes of an input file, None at a URL. Raises ValueError if it is missing or its columns are wrong."""
    features = open_parquet(path).features
    for name, types in COLUMNS.items():
        found = getattr(features.get(name), 'dtype', 'missing or nested')
        if not found.startswith(types):
            raise ValueError(f'{path}: column {name} is {found}; wanted {types[0]}')
    return None if '://' in path else Path(path).stat().st_size


def read_games(path: str):
    """Yield batches {column: list [at most BATCH]} of the games in a file. Missing values are None. Raises ValueError."""
    games = open_parquet(path, columns=list(COLUMNS))
    with prepare.clear_errors(path):
        yield from games.iter(BATCH)


def tokenise(movetext: str | None, white: int | None, black: int | None) -> bytes:
    """The token ids of one game, a byte each. Raises ValueError with the reason why a game is skipped."""
    words = COMMENT_OR_NUMBER.sub(' ', movetext or '').split()
    if words and words[-1] in RESULTS:
        words.pop()
    if not words:
        raise ValueError('no moves')
    if not white or not black or white < 0 or black < 0:
        raise ValueError('missing rating')
    if not CHARACTERS.issuperset(''.join(words)):
        raise ValueError('character outside the vocabulary')
    if not all(map(MOVE.fullmatch, words)):
        raise ValueError('illegal move')
    board = Board()
    try:
        for word in words:
            board.push_san(word.rstrip('!?'))
    except ValueError as error:
        raise ValueError('illegal move') from error
    rounds = ';'.join(','.join(words[i : i + 2]) for i in range(0, len(words), 2))
    return bytes([BOS]) + f'{rounds}|{white}|{black}|{board.fen()}'.encode().translate(TO_IDS) + bytes([EOS])


def tokenise_batch(batch: dict[str, list]) -> tuple[list[bytes], Counter]:
    """(token ids of each game of a batch, in order; how many games were skipped for which reason)."""
    games, skipped = [], Counter()
    for row in zip(*(batch[name] for name in COLUMNS), strict=True):
        try:
            games.append(tokenise(*row))
        except ValueError as reason:
            skipped[str(reason)] += 1
    return games, skipped


def start_worker():
    """Make a worker process ignore Ctrl-C, which its parent handles, and end when its parent ends, also by a kill."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def map_in_order(pool, function, items, ahead: int):
    """Yield function(item) of each item, in order. At most `ahead` items are in work, so that reading waits for tokenising."""
    futures = deque()
    for item in items:
        if len(futures) == ahead:
            yield futures.popleft().result()
        futures.append(pool.submit(function, item))
    yield from (future.result() for future in futures)


def read_input(path: str, number: int, folder: Path, seed: int, pool, ahead: int, bar) -> Counter:
    """Put the games of one input into buckets, folder/000 …, drawn by a generator of the seed and the input's number.

    Returns the number of games kept and of those skipped for each reason.
    """
    rng, counts = np.random.default_rng([seed, number]), Counter()
    with closing(read_games(path)) as batches:
        for games, skipped in map_in_order(pool, tokenise_batch, batches, ahead):
            drawn = rng.integers(BUCKETS, size=len(games))
            for bucket in np.unique(drawn).tolist():
                with open(folder / f'{bucket:03}', 'ab') as file:
                    file.write(b''.join([games[i] for i in np.flatnonzero(drawn == bucket)]))
            counts.update(skipped, kept=len(games))
            bar.update(len(games) + skipped.total())
    return counts


def buckets_name(path: str, number: int, seed: int) -> str:
    """Name of the folder of an input's buckets: a hash of all that they depend on. A corrected input has another name."""
    stat = None if '://' in path else Path(path).stat()
    identity = path, stat and (stat.st_size, stat.st_mtime_ns), number, seed
    return 'input-' + hashlib.sha256(repr(identity).encode()).hexdigest()[:16]


def read_inputs(paths: list[str], folder: Path, seed: int, jobs: int) -> list[Path]:
    """The folder with the buckets and the counts.json of each input. What an earlier run has finished is not read again."""
    inputs = [folder / buckets_name(path, number, seed) for number, path in enumerate(paths)]
    missing = [number for number, buckets in enumerate(inputs) if not buckets.exists()]
    if len(missing) < len(paths):
        print(f'{len(paths) - len(missing)} of {len(paths)} input files were read by an earlier run', file=sys.stderr)
    for outdated in set(folder.glob('input-*')) - set(inputs):
        shutil.rmtree(outdated)
    unfinished = folder / 'reading'
    with (ProcessPoolExecutor(jobs, multiprocessing.get_context('spawn'), start_worker) as pool,
          tqdm(unit=' games', desc='reading', smoothing=0.05, unit_scale=True) as bar):
        for done, number in enumerate(missing, 1):
            shutil.rmtree(unfinished, ignore_errors=True)  # of a killed run
            unfinished.mkdir()
            counts = read_input(paths[number], number, unfinished, seed, pool, 4 * jobs, bar)
            (unfinished / 'counts.json').write_text(json.dumps(counts))
            os.sync()  # all of it must be on disk before the folder has its final name
            os.rename(unfinished, inputs[number])
            bar.total = bar.n * len(missing) // done  # an estimate, as input files are about equal
    return inputs


def shuffle(inputs: list[Path], folder: Path, seed: int, games: int, test_games: int) -> None:
    """Write train.bin and test.bin into `folder`: the games of bucket after bucket, each bucket in random order."""
    train_left = games - test_games
    with (open(folder / 'train.bin', 'wb') as train, open(folder / 'test.bin', 'wb') as test,
          tqdm(total=games, unit=' games', desc='shuffling', unit_scale=True) as bar):
        for bucket in range(BUCKETS):
            files = [buckets / f'{bucket:03}' for buckets in inputs]
            bucket_games = b''.join(file.read_bytes() for file in files if file.exists()).split(bytes([EOS]))[:-1]
            order = np.random.default_rng([seed, len(inputs), bucket]).permutation(len(bucket_games))
            shuffled = [bucket_games[i] for i in order]
            for file, part in ((train, shuffled[:train_left]), (test, shuffled[train_left:])):
                file.write(bytes([EOS]).join([*part, b'']))
            train_left = max(0, train_left - len(shuffled))
            bar.update(len(shuffled))


def make(paths: list[str], out: Path, seed: int = 42, test_games: int = 16384, jobs: int = 2) -> None:
    """Write the data set of these input files into `out`. Raises ValueError or OSError with one line."""
    prepare.check_no_duplicates(paths)
    if test_games < 1:
        raise ValueError(f'--test-games is {test_games}; wanted 1 or more')
    sizes = [check_input(path) for path in tqdm(paths, desc='checking inputs', unit=' files', disable=len(paths) < 8)]
    source = {'inputs': [[Path(path).name, size] for path, size in zip(paths, sizes, strict=True)], 'seed': seed,
              'position': True, 'test_games': test_games}  # position: each game ends with it

    def write(folder):
        inputs = read_inputs(paths, folder, seed, jobs)
        skipped = sum((Counter(json.loads((buckets / 'counts.json').read_text())) for buckets in inputs), Counter())
        kept = skipped.pop('kept', 0)
        reasons = ', '.join(f'{n:,} {reason}' for reason, n in sorted(skipped.items()))
        report = f'{kept:,} of {kept + skipped.total():,} games are usable (skipped: {reasons or "none"})'
        if kept <= test_games:
            raise ValueError(f'{report}, but the test set alone takes {test_games:,}; give more or corrected input, or a smaller '
                             '--test-games')
        print(report, file=sys.stderr)
        shuffle(inputs, folder, seed, kept, test_games)
        atomic_write(folder / 'meta.pkl', pickle.dumps({
            'vocab_size': len(VOCABULARY), 'bos': BOS, 'eos': EOS, 'stoi': IDS, 'itos': dict(enumerate(VOCABULARY))}))
        return {'vocab_size': len(VOCABULARY), 'bos': BOS, 'eos': EOS, 'pad_id': BOS, 'vocabulary': VOCABULARY,
                'games': {'train': kept - test_games, 'test': test_games, 'skipped': skipped},
                'split': f'all games shuffled with seed {seed}, the last {test_games} are the test set', 'source': source}

    prepare.make_data_set(out, source, write)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('inputs', nargs='*', help='parquet files; default: the 36 files of January 2025 on Hugging Face')
    parser.add_argument('--out', type=Path, default=Path('chess'))
    parser.add_argument('--seed', type=int, default=42, help='of the shuffle')
    parser.add_argument('--test-games', type=int, default=16384)
    parser.add_argument('--jobs', type=int, default=os.cpu_count(), help='processes that tokenise; default: all cores')
    args = parser.parse_args()
    paths = sorted(args.inputs) or [LICHESS.format(i) for i in range(36)]
    prepare.run_command('prepare_chess', args.out, lambda: make(paths, args.out, args.seed, args.test_games, args.jobs))


if __name__ == '__main__':
    main()
