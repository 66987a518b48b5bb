"""Lichess games to token files, a character a token: train.bin, test.bin, meta.json and meta.pkl in one folder.

    python prepare_chess.py                                  # January 2025 from Hugging Face: 36 files, some 20 billion tokens
    python prepare_chess.py games/*.parquet month.pgn.zst    # or files of one's own

Inputs are parquet files with the columns movetext, WhiteElo and BlackElo (local, or a URL that fsspec opens), and PGN files,
plain or compressed. A game becomes `<BOS>moves|WhiteElo|BlackElo|FEN<EOS>`: moves in SAN, a ',' between White's and Black's,
a ';' between rounds, without comments, move numbers and result; FEN that of the final position (Qiu et al. 2025, appendix A).

Every input file becomes one piece, its games dealt at random into BUCKETS groups (by a generator of the seed and the file's
number); then each group, read from all pieces, is shuffled in memory and written. That is a uniform shuffle of all games
(Rao 1961, Sandelius 1962), of which the last --test-games are the test set. Killed and started again, a run keeps the pieces
it had finished and ends in the same bytes. Memory is some 200 MB a process (--jobs); the disk holds twice the result at most.
"""

import argparse
import io
import json
import multiprocessing
import os
import pickle
import re
import signal
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait as wait_for_end
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from token_files import prepare
from token_files.chess_positions import Codes, replay

LICHESS = 'hf://datasets/Lichess/standard-chess-games/data/year=2025/month=01/train-{:05}-of-00072.parquet'
COLUMNS = ['movetext', 'WhiteElo', 'BlackElo']
# The order of the published data set. It holds 'b' twice: files and pieces alike are written as the later id.
VOCABULARY = ['<BOS>', '<EOS>', *',;+#=?!\n /0123456789-xabcdefghKQRBNOP()lkv:*|rnbqpwm']
BOS, EOS = 0, 1
IDS = {character: i for i, character in enumerate(VOCABULARY)}
# One table turns text into ids; the bytes 0 and 1 in the text are BOS and EOS already.
TABLE = bytes([BOS, EOS, *(IDS.get(chr(byte), 255) for byte in range(2, 256))])
KNOWN = ''.join(VOCABULARY[2:]).encode()
RESULTS = {b'1-0', b'0-1', b'1/2-1/2', b'*'}
TAG = re.compile(rb'\[(\w+) "(.*)"\]\s*')
CHUNK = 8192  # games replayed at once: enough to hide NumPy's call overhead, about 100 MB of memory
BUCKETS = 256  # 20 GB of games make groups of 80 MB


# ---------------------------------------------------------------- reading


@contextmanager
def opened(path: str):
    """A parquet file, local or at a URL, or a local PGN file. Raises ValueError naming the file where it cannot be read."""
    try:
        if path.endswith('.parquet'):
            with fsspec.open(path, 'rb') as f:
                # buffer_size: read a column page by page, as a row group of a million games would not fit
                yield pq.ParquetFile(f, buffer_size=1 << 20, pre_buffer=False)
        else:
            with pa.input_stream(path, compression='detect') as f:
                yield io.BufferedReader(f)
    except FileNotFoundError as e:
        raise ValueError(f'{path}: no such file') from e
    except Exception as e:  # the transports under fsspec raise errors of their own kinds
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        if '://' in path and not isinstance(e, pa.ArrowException):
            raise ValueError(f'{path}: cannot be reached ({reason}); start again, which goes on from here, or pass files that '
                             'you have') from e
        if isinstance(e, pa.ArrowException | OSError):
            raise ValueError(f'{path}: cut short or damaged ({reason}); fetch it again') from e
        raise


def size_up(path: str) -> tuple[int, int]:
    """(bytes, by which a run knows its input again, and games, 0 if unknown). Checks columns and types before any is read."""
    if not path.endswith('.parquet'):
        with opened(path) as file:
            head = file.read(1 << 22)
        size = Path(path).stat().st_size
        return size, 0 if path.endswith(('.zst', '.gz', '.bz2')) else round(head.count(b'[Event ') * size / max(1, len(head)))
    with opened(path) as file:
        schema, facts = file.schema_arrow, file.metadata
    if missing := [name for name in COLUMNS if name not in schema.names]:
        raise ValueError(f'{path}: has no column {", ".join(missing)}; it has {", ".join(schema.names)}')
    for name in COLUMNS:
        kind = schema.field(name).type
        if not (pa.types.is_integer(kind) if name.endswith('Elo') else pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise ValueError(f'{path}: column {name} is {kind}; wanted {"integers" if name.endswith("Elo") else "text"}')
    return sum(facts.row_group(i).total_byte_size for i in range(facts.num_row_groups)), facts.num_rows


def read_games(path: str):
    """Yield (movetexts, White's ratings, Black's ratings), lists of CHUNK games; what is missing is None."""
    with opened(path) as file:
        if not path.endswith('.parquet'):
            yield from read_pgn(file)
            return
        for batch in file.iter_batches(CHUNK, columns=COLUMNS, use_threads=False):
            yield (batch['movetext'].cast(pa.binary()).to_pylist(), *(batch[c].to_pylist() for c in COLUMNS[1:]))


def read_pgn(lines):
    """The same of the lines of a PGN file. A game from another starting position has no movetext here: it is no plain game."""
    games, tags, moves = [], {}, []

    def finish():
        ratings = [int(tags[c]) if tags.get(c, b'').isdigit() else None for c in (b'WhiteElo', b'BlackElo')]
        games.append((None if b'FEN' in tags else b' '.join(moves), *ratings))
        tags.clear()
        moves.clear()

    for line in lines:
        if line.startswith(b'[') and (tag := TAG.fullmatch(line)):
            if moves or tag[1] in tags:
                finish()
            tags[tag[1]] = tag[2]
        elif line := line.strip():
            moves.append(line)
        if len(games) == CHUNK:
            yield tuple(zip(*games, strict=True))
            games.clear()
    if tags or moves:
        finish()
    if games:
        yield tuple(zip(*games, strict=True))


# ---------------------------------------------------------------- games to tokens


def without_comments(text: bytes) -> bytes:
    """Text without its {…}; as it is, braces and all, where they do not pair. (Three times as fast as a regular expression.)"""
    if text.count(b'{') != text.count(b'}'):
        return text
    head, *rest = text.split(b'{')
    return head + b''.join([part.partition(b'}')[2] for part in rest])


def tokenise(texts, whites, blacks, codes: Codes, position: bool) -> tuple[list[bytes], Counter]:
    """Token strings of the games that are whole and legal, in order, and how many were skipped for which reason.

    codes is chess_positions.Codes, kept from call to call. Without `position` the FEN is left out and legality is not checked, only
    that every word is a move.
    """
    skipped, kept, lines = Counter(), [], []
    for text, white, black in zip(texts, whites, blacks, strict=True):
        text = without_comments(text or b'').replace(b'.', b' ')
        words = [word for word in text.split() if not word.isdigit()]  # move numbers go
        if words and words[-1] in RESULTS:
            words.pop()
        moves = [codes[word] for word in words]
        if not words:
            skipped['no moves'] += 1
        elif not white or not black or white < 0 or black < 0:
            skipped['missing rating'] += 1
        elif min(moves) < 0:
            skipped['character outside the vocabulary' if b''.join(words).translate(None, KNOWN) else 'illegal move'] += 1
        else:
            rounds = b';'.join([b','.join(words[i : i + 2]) for i in range(0, len(words), 2)])
            kept.append(moves)
            lines.append(b'\0%s|%d|%d|' % (rounds, white, black))
    fens = (replay(kept) if kept else []) if position else [b''] * len(kept)
    games = [line + fen + b'\1' for line, fen in zip(lines, fens, strict=True) if fen is not None]
    skipped['illegal move'] += len(kept) - len(games)
    return [game.translate(TABLE) for game in games], +skipped


def read_file(number: int, path: str, folder: Path, seed: int, position: bool):
    """One input file to NUMBER.games, each chunk in order of its buckets, and then NUMBER.json, which completes it."""
    rng, codes = np.random.default_rng([seed, number]), Codes()
    chunks, counts, skipped = [], Counter(), Counter()
    part = folder / f'{number:05}.part'
    part.unlink(missing_ok=True)  # a file of its own, whatever a killed run may still hold open
    with open(part, 'wb') as f:
        for texts, whites, blacks in read_games(path):
            games, bad = tokenise(texts, whites, blacks, codes, position)
            buckets = rng.integers(BUCKETS, size=len(games))
            f.write(b''.join([games[i] for i in np.argsort(buckets, kind='stable')]))
            lengths = np.array([len(game) for game in games], float)
            chunks.append(np.bincount(buckets, lengths, BUCKETS).astype(int).tolist())
            counts.update(read=len(texts), kept=len(games))
            skipped.update(bad)
            with progress.get_lock():
                progress.value += len(texts)
            if stop.is_set():
                return
        prepare.to_disk(f)
    os.replace(part, part.with_suffix('.games'))
    prepare.write_atomically(part.with_suffix('.json'), json.dumps({**counts, 'skipped': skipped, 'chunks': chunks}).encode())


def start_worker(counter, event):
    """Set what the processes share: games read, and the sign to stop. End this one when its parent does, however that ended."""
    global progress, stop
    progress, stop = counter, event
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    parent = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: (wait_for_end([parent]), os._exit(1)), daemon=True).start()


def read_files(paths, folder, seed, position, jobs, total):
    """All pieces that are not there yet, `jobs` at a time."""
    done = [(folder / f'{i:05}.json').exists() for i in range(len(paths))]
    if any(done):
        print(f'{sum(done)} of {len(paths)} input files were prepared before', file=sys.stderr)
    context = multiprocessing.get_context('spawn')
    counter, event = context.Value('q', 0), context.Event()
    total = sum(n for n, d in zip(total, done, strict=True) if not d) if all(total) else None
    with (ProcessPoolExecutor(jobs, context, start_worker, (counter, event)) as pool,
          tqdm(total=total, unit=' games', desc='reading', smoothing=0.05, unit_scale=True) as bar):
        waiting = {pool.submit(read_file, i, path, folder, seed, position)
                   for i, path in enumerate(paths) if not done[i]}
        try:
            while waiting:
                finished, waiting = wait(waiting, timeout=0.5)
                bar.update(counter.value - bar.n)
                for future in finished:
                    future.result()
        except BrokenProcessPool as e:
            raise ValueError('a reading process was killed, perhaps for want of memory; start again with --jobs '
                             f'{max(1, jobs // 2)}, finished files are kept') from e
        finally:
            event.set()
            pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------- shuffling and writing


def shuffle(folder: Path, pieces: list[dict], out: Path, seed: int, test_games: int):
    """train.bin.part and test.bin.part from the pieces: bucket after bucket, each in random order."""
    sizes = [np.array(piece['chunks'], int).reshape(-1, BUCKETS) for piece in pieces]  # bytes of [chunk, bucket] in each piece
    starts = [(size.cumsum() - size.ravel()).reshape(size.shape) for size in sizes]
    left = sum(piece.get('kept', 0) for piece in pieces) - test_games  # of the training games still to write
    with (open(out / 'train.bin.part', 'wb') as train, open(out / 'test.bin.part', 'wb') as test,
          tqdm(total=left + test_games, unit=' games', desc='shuffling', unit_scale=True) as bar):
        for bucket in range(BUCKETS):
            data = bytearray()
            for i in range(len(pieces)):
                with open(folder / f'{i:05}.games', 'rb') as f:
                    for start, size in zip(starts[i][:, bucket], sizes[i][:, bucket], strict=True):
                        f.seek(start)
                        data += f.read(size)
            ends = (np.flatnonzero(np.frombuffer(data, np.uint8) == EOS) + 1).tolist()
            begins = [0, *ends]
            order = np.random.default_rng([seed, len(pieces), bucket]).permutation(len(ends)).tolist()
            for f, games in ((train, order[:left]), (test, order[left:])):
                for i in range(0, len(games), CHUNK):
                    f.write(b''.join([data[begins[g] : ends[g]] for g in games[i : i + CHUNK]]))
            left = max(0, left - len(order))
            bar.update(len(order))
        for f in (train, test):
            prepare.to_disk(f)


def make(paths: list[str], out: Path, seed=42, test_games=16384, position=True, jobs=2):
    """The whole way from input files to a data set in `out`. Raises ValueError or OSError, one clear line each."""
    prepare.check_distinct(paths)
    if test_games < 1:
        raise ValueError(f'--test-games is {test_games}; wanted 1 or more')
    sized = [size_up(path) for path in tqdm(paths, desc='inputs', unit=' files', disable=len(paths) < 8)]
    source = {'inputs': [[Path(p).name, n] for p, (n, _) in zip(paths, sized, strict=True)], 'seed': seed, 'position': position}
    with prepare.workplace(out, source, test_games=test_games) as folder:
        if folder is None:
            return
        started = time.time()
        read_files(paths, folder, seed, position, min(jobs, len(paths)), [n for _, n in sized])
        pieces = [prepare.read_json(folder / f'{i:05}.json') for i in range(len(paths))]
        read, kept = (sum(piece.get(key, 0) for piece in pieces) for key in ('read', 'kept'))
        skipped = sum((Counter(piece['skipped']) for piece in pieces), Counter())
        report = f'skipped: {", ".join(f"{n:,} {why}" for why, n in sorted(skipped.items())) or "none"}'
        if kept <= test_games:
            raise ValueError(f'{kept:,} of {read:,} games are usable ({report}), but the test set alone takes {test_games:,}; '
                             'give more input, or a smaller --test-games')
        prepare.check_room(out, sum(path.stat().st_size for path in folder.glob('*.games')))
        shuffle(folder, pieces, out, seed, test_games)
        prepare.write_atomically(out / 'meta.pkl', pickle.dumps({
            'vocab_size': len(VOCABULARY), 'bos': BOS, 'eos': EOS, 'stoi': IDS, 'itos': dict(enumerate(VOCABULARY))}))
        meta = prepare.complete(out, {
            'vocab_size': len(VOCABULARY), 'bos': BOS, 'eos': EOS, 'pad_id': BOS, 'vocabulary': VOCABULARY,
            'games': {'train': kept - test_games, 'test': test_games, 'skipped': skipped},
            'split': f'all games shuffled with seed {seed}, the last {test_games} are the test set',
            'source': {**source, 'test_games': test_games}})
    print(f'{kept:,} of {read:,} games, {sum(meta["tokens"].values()):,} tokens in {out} ({time.time() - started:.0f} s); {report}',
          file=sys.stderr)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('inputs', nargs='*', help='parquet or PGN files; default: the 36 files of January 2025 on Hugging Face')
    parser.add_argument('--out', type=Path, default=Path('chess'))
    parser.add_argument('--seed', type=int, default=42, help='of the shuffle')
    parser.add_argument('--test-games', type=int, default=16384)
    parser.add_argument('--no-position', action='store_true', help='leave out the final position, and its check of legality')
    parser.add_argument('--jobs', type=int, default=min(8, os.cpu_count()), help='files read at once, some 200 MB of memory each')
    args = parser.parse_args()
    paths = sorted(args.inputs) or [LICHESS.format(i) for i in range(36)]
    options = args.seed, args.test_games, not args.no_position, args.jobs
    prepare.run('prepare_chess', args.out, lambda: make(paths, args.out, *options))


if __name__ == '__main__':
    main()
