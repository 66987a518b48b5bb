"""Lichess games as token files, one character a token: train.bin, test.bin, meta.json and meta.pkl in one folder.

    python prepare_chess.py                                  # January 2025 from Hugging Face: 36 files, about 20 billion tokens
    python prepare_chess.py games/*.parquet month.pgn.zst    # or your own files

Inputs are parquet files with the columns movetext, WhiteElo and BlackElo (local paths, or URLs that Hugging Face `datasets` opens),
and local PGN files, plain or compressed (.gz, .bz2, .zst). A game becomes `<BOS>moves|WhiteElo|BlackElo|FEN<EOS>`. Moves are in
standard algebraic notation (SAN), with ',' after White's and ';' after Black's, without comments, move numbers and result. FEN is
the final position (Qiu et al. 2025, appendix A). python-chess replays each game for it; a game with an illegal move is skipped.

The games are shuffled in two passes, so that memory does not grow with the data. The first pass puts each game into one of BUCKETS
random buckets on disk; the second shuffles one bucket after another in memory and writes it. Together this is a uniform shuffle of
all games (Rao 1961, Sandelius 1962). The last --test-games games are the test set.

The buckets of each input file are kept until the end: after a kill, the same command reads only the inputs that are not finished,
and the result has the same bytes. The disk holds at most twice the result.
"""

import argparse
import glob
import io
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import sys
import threading
import time
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from chess import Board
from tqdm import tqdm

from token_files import prepare
from token_files.atomic import atomic_write, flush_to_disk

LICHESS = 'hf://datasets/Lichess/standard-chess-games/data/year=2025/month=01/train-{:05}-of-00072.parquet'
COLUMNS = ['movetext', 'WhiteElo', 'BlackElo']
# The order of the published data set. It has 'b' twice: a file and a bishop of Black both get the later id.
VOCABULARY = ['<BOS>', '<EOS>', *',;+#=?!\n /0123456789-xabcdefghKQRBNOP()lkv:*|rnbqpwm']
BOS, EOS = 0, 1
IDS = {character: i for i, character in enumerate(VOCABULARY)}
TO_IDS = bytes(IDS.get(chr(byte), 255) for byte in range(256))  # a table for bytes.translate
CHARACTERS = frozenset(VOCABULARY[2:])
COMMENT_OR_NUMBER = re.compile(r'\{[^}]*\}|\b\d+\.+')
MOVE = re.compile(r'(O-O(-O)?|[KQRBN]?[a-h]?[1-8]?x?[a-h][1-8](=[QRBN])?)[+#]?[!?]{0,2}')  # one move in SAN
RESULTS = ('1-0', '0-1', '1/2-1/2', '*')
TAG = re.compile(rb'\[(\w+) "(.*)"\]\s*')  # a header line of a PGN file
BATCH = 1024  # games that a process tokenises at a time: about a second of work
BUCKETS = 256  # 20 GB of games make buckets of 80 MB


# ---------------------------------------------------------------- reading


def open_parquet(path: str, **options):
    """The rows of a parquet file as a stream, datasets.IterableDataset. Raises ValueError if the file cannot be opened.

    The file is not copied: at a URL it is read as the stream goes on, and lost connections are tried again.
    """
    from datasets import load_dataset  # here, as the processes that tokenise do not need it

    with clear_errors(path):
        # escape: `datasets` takes data_files for patterns
        return load_dataset('parquet', data_files=glob.escape(path), split='train', streaming=True, **options)


@contextmanager
def clear_errors(path: str):
    """Turn an error of reading this input into a ValueError with one line."""
    try:
        yield
    except Exception as error:  # each transport to a URL raises errors of its own types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, FileNotFoundError):
            raise ValueError(f'{path}: no such file') from error
        if '://' in path and not isinstance(error, pa.ArrowException):
            raise ValueError(f'{path}: cannot be reached ({reason}); check the connection and run the same command again, or give '
                             'files that are on this machine') from error
        if isinstance(error, OSError | ValueError | pa.ArrowException):
            raise ValueError(f'{path}: cut short or damaged ({reason}); download it again') from error
        raise


def check_input(path: str) -> int | None:
    """The size in bytes of an input file, None at a URL. Raises ValueError if it is missing or its columns are wrong."""
    if '://' not in path and not Path(path).is_file():
        raise ValueError(f'{path}: no such file')
    if path.endswith('.parquet'):
        features = open_parquet(path).features
        if missing := [name for name in COLUMNS if name not in features]:
            raise ValueError(f'{path}: has no column {", ".join(missing)}; it has {", ".join(features)}')
        for name in COLUMNS:
            dtype, wanted = getattr(features[name], 'dtype', 'nested'), 'integers' if name.endswith('Elo') else 'text'
            if not (dtype.startswith(('int', 'uint')) if wanted == 'integers' else dtype in ('string', 'large_string')):
                raise ValueError(f'{path}: column {name} is {dtype}; wanted {wanted}')
    elif '://' in path:
        raise ValueError(f'{path}: a PGN file must be on this machine; download it first')
    return None if '://' in path else Path(path).stat().st_size


def read_games(path: str):
    """Yield batches {column: list [at most BATCH]} of the games in a file. Missing values are None. Raises ValueError."""
    if path.endswith('.parquet'):
        games = open_parquet(path, columns=COLUMNS)
        with clear_errors(path):
            yield from games.iter(BATCH)
    else:
        with clear_errors(path), pa.input_stream(path, compression='detect') as file:
            yield from read_pgn(io.BufferedReader(file))


def read_pgn(lines):
    """Yield the batches of `read_games` from the lines (bytes) of a PGN file.

    A game that starts from a given position gets no movetext, so that it is skipped.
    """
    games, tags, moves = [], {}, []

    def end_game():
        ratings = [int(tags[c]) if tags.get(c, b'').isdigit() else None for c in (b'WhiteElo', b'BlackElo')]
        games.append((None if b'FEN' in tags else b' '.join(moves).decode('utf-8', 'replace'), *ratings))
        tags.clear()
        moves.clear()

    def batch():
        return dict(zip(COLUMNS, map(list, zip(*games, strict=True)), strict=True))

    for line in lines:
        if line.startswith(b'[') and (tag := TAG.fullmatch(line)):
            if moves or tag[1] in tags:
                end_game()
            tags[tag[1]] = tag[2]
        elif line := line.strip():
            moves.append(line)
        if len(games) == BATCH:
            yield batch()
            games.clear()
    if tags or moves:
        end_game()
    if games:
        yield batch()


# ---------------------------------------------------------------- games to tokens


class Skipped(ValueError):
    """A game that is left out; the message is the reason, under which it is counted."""


def final_position(moves: list[str]) -> str:
    """FEN of the position after these moves in SAN from the usual start. Raises Skipped if one is illegal."""
    board = Board()
    try:
        for move in moves:
            board.push_san(move.rstrip('!?'))
    except ValueError as error:
        raise Skipped('illegal move') from error
    return board.fen()


def tokenise(movetext: str | None, white: int | None, black: int | None, position: bool) -> bytes:
    """The token ids of one game, a byte each. Raises Skipped if the game is not whole or not legal.

    Without `position` the FEN is left out, and it is only checked that every word is a move, not that the move is legal.
    """
    words = COMMENT_OR_NUMBER.sub(' ', movetext or '').split()
    if words and words[-1] in RESULTS:
        words.pop()
    if not words:
        raise Skipped('no moves')
    if not white or not black or white < 0 or black < 0:
        raise Skipped('missing rating')
    if not CHARACTERS.issuperset(''.join(words)):
        raise Skipped('character outside the vocabulary')
    if not all(map(MOVE.fullmatch, words)):
        raise Skipped('illegal move')
    rounds = ';'.join(','.join(words[i : i + 2]) for i in range(0, len(words), 2))
    fen = final_position(words) if position else ''
    return bytes([BOS]) + f'{rounds}|{white}|{black}|{fen}'.encode().translate(TO_IDS) + bytes([EOS])


def tokenise_batch(batch: dict[str, list], position: bool) -> tuple[list[bytes], Counter]:
    """(token ids of each game of a batch, in order; how many games were skipped for which reason)."""
    games, skipped = [], Counter()
    for row in zip(*(batch[name] for name in COLUMNS), strict=True):
        try:
            games.append(tokenise(*row, position))
        except Skipped as reason:
            skipped[str(reason)] += 1
    return games, skipped


# ---------------------------------------------------------------- first pass: input files to buckets


def start_worker():
    """Make a worker process ignore Ctrl-C, which its parent handles, and end when its parent ends, also by a kill."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def map_in_order(pool, function, items, ahead: int):
    """Yield function(item) of each item, in order. At most `ahead` items are in work, so that reading waits for tokenising."""
    futures = deque()
    for item in items:
        futures.append(pool.submit(function, item))
        if len(futures) == ahead:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()


def read_input(path: str, number: int, folder: Path, seed: int, position: bool, pool, ahead: int, bar) -> dict:
    """Put the games of one input into its buckets, folder/NUMBER/000 …, and return the counts {read, kept, skipped, bytes}.

    The buckets are drawn by a generator of the seed and the input's number.
    """
    shutil.rmtree(buckets_of(folder, number), ignore_errors=True)  # of a killed run
    buckets_of(folder, number).mkdir()
    rng, counts, skipped = np.random.default_rng([seed, number]), Counter(), Counter()
    with closing(read_games(path)) as batches:
        for games, reasons in map_in_order(pool, partial(tokenise_batch, position=position), batches, ahead):
            drawn = rng.integers(BUCKETS, size=len(games))
            for bucket in np.unique(drawn).tolist():
                with open(buckets_of(folder, number) / f'{bucket:03}', 'ab') as file:
                    file.write(b''.join([games[i] for i in np.flatnonzero(drawn == bucket)]))
            read = len(games) + reasons.total()
            counts.update(read=read, kept=len(games), bytes=sum(map(len, games)))
            skipped.update(reasons)
            bar.update(read)
    return {'read': 0, 'kept': 0, 'bytes': 0, **counts, 'skipped': skipped}


def buckets_of(folder: Path, number: int) -> Path:
    return folder / f'{number:05}'


def identity(path: str, **options) -> dict:
    """What the buckets of an input depend on. If anything differs, they are made again."""
    stat = None if '://' in path else Path(path).stat()
    return {'path': path, 'size': stat and stat.st_size, 'changed': stat and stat.st_mtime_ns, **options}


def read_inputs(paths: list[str], folder: Path, seed: int, position: bool, jobs: int) -> list[dict]:
    """The counts of each input, whose games are then in its buckets. What an earlier run has finished is not read again."""
    wanted = [identity(path, seed=seed, position=position) for path in paths]
    found = [prepare.read_json(folder / f'{number:05}.json') or {} for number in range(len(paths))]
    counts = [there.get('counts') if there.get('identity') == want else None for there, want in zip(found, wanted, strict=True)]
    missing = [number for number, there in enumerate(counts) if there is None]
    if len(missing) < len(paths):
        print(f'{len(paths) - len(missing)} of {len(paths)} input files were read by an earlier run', file=sys.stderr)
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context('spawn'), start_worker)
    try:
        with tqdm(unit=' games', desc='reading', smoothing=0.05, unit_scale=True) as bar:
            for done, number in enumerate(missing, 1):
                counts[number] = read_input(paths[number], number, folder, seed, position, pool, 4 * jobs, bar)
                os.sync()  # the buckets must be on disk before the file that says so
                atomic_write(folder / f'{number:05}.json', json.dumps({'identity': wanted[number], 'counts': counts[number]}))
                if len(missing) > 1:
                    bar.total = bar.n * len(missing) // done  # an estimate, as input files are about equal
    except BrokenProcessPool as error:
        raise ValueError('a worker process was killed, perhaps for lack of memory; run the same command again with --jobs '
                         f'{max(1, jobs // 2)}: finished input files are kept') from error
    finally:
        pool.shutdown(cancel_futures=True)
    return counts


# ---------------------------------------------------------------- second pass: buckets to train.bin and test.bin


def shuffle(folder: Path, inputs: int, seed: int, games: int, test_games: int) -> None:
    """Write train.bin and test.bin into `folder`: the games of bucket after bucket, each bucket in random order."""
    train_left = games - test_games
    with (open(folder / 'train.bin', 'wb') as train, open(folder / 'test.bin', 'wb') as test,
          tqdm(total=games, unit=' games', desc='shuffling', unit_scale=True) as bar):
        for bucket in range(BUCKETS):
            files = [buckets_of(folder, number) / f'{bucket:03}' for number in range(inputs)]
            bucket_games = b''.join(file.read_bytes() for file in files if file.exists()).split(bytes([EOS]))[:-1]
            order = np.random.default_rng([seed, inputs, bucket]).permutation(len(bucket_games))
            shuffled = [bucket_games[i] for i in order]
            for file, part in ((train, shuffled[:train_left]), (test, shuffled[train_left:])):
                file.write(bytes([EOS]).join([*part, b'']))
            train_left = max(0, train_left - len(shuffled))
            bar.update(len(shuffled))
        flush_to_disk(train)
        flush_to_disk(test)


def make(paths: list[str], out: Path, seed: int = 42, test_games: int = 16384, position: bool = True, jobs: int = 2) -> None:
    """Write the data set of these input files into `out`. Raises ValueError or OSError with one line."""
    prepare.check_no_duplicates(paths)
    if test_games < 1:
        raise ValueError(f'--test-games is {test_games}; wanted 1 or more')
    sizes = [check_input(path) for path in tqdm(paths, desc='checking inputs', unit=' files', disable=len(paths) < 8)]
    source = {'inputs': [[Path(path).name, size] for path, size in zip(paths, sizes, strict=True)], 'seed': seed,
              'position': position, 'test_games': test_games}
    with prepare.preparation(out, source) as folder:
        if folder is None:
            return
        started = time.time()
        counts = read_inputs(paths, folder, seed, position, jobs)
        read, kept, size = (sum(count[key] for count in counts) for key in ('read', 'kept', 'bytes'))
        skipped = sum((Counter(count['skipped']) for count in counts), Counter())
        report = f'skipped: {", ".join(f"{n:,} {why}" for why, n in sorted(skipped.items())) or "none"}'
        if kept <= test_games:
            raise ValueError(f'{kept:,} of {read:,} games are usable ({report}), but the test set alone takes {test_games:,}; '
                             'give more or corrected input, or a smaller --test-games')
        prepare.check_free_space(folder, size)
        shuffle(folder, len(paths), seed, kept, test_games)
        atomic_write(folder / 'meta.pkl', pickle.dumps({
            'vocab_size': len(VOCABULARY), 'bos': BOS, 'eos': EOS, 'stoi': IDS, 'itos': dict(enumerate(VOCABULARY))}))
        prepare.finish(folder, out, {
            'vocab_size': len(VOCABULARY), 'bos': BOS, 'eos': EOS, 'pad_id': BOS, 'vocabulary': VOCABULARY,
            'games': {'train': kept - test_games, 'test': test_games, 'skipped': skipped},
            'split': f'all games shuffled with seed {seed}, the last {test_games} are the test set', 'source': source})
    print(f'{out}: {kept:,} of {read:,} games, {size:,} tokens ({time.time() - started:.0f} s); {report}', file=sys.stderr)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('inputs', nargs='*', help='parquet or PGN files; default: the 36 files of January 2025 on Hugging Face')
    parser.add_argument('--out', type=Path, default=Path('chess'))
    parser.add_argument('--seed', type=int, default=42, help='of the shuffle')
    parser.add_argument('--test-games', type=int, default=16384)
    parser.add_argument('--no-position', action='store_true', help='leave out the final position, and do not check legality')
    parser.add_argument('--jobs', type=int, default=os.cpu_count(), help='processes that tokenise; default: all cores')
    args = parser.parse_args()
    paths = sorted(args.inputs) or [LICHESS.format(i) for i in range(36)]
    prepare.run_command('prepare_chess', args.out,
                        lambda: make(paths, args.out, args.seed, args.test_games, not args.no_position, args.jobs))


if __name__ == '__main__':
    main()
