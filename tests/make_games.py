"""Plays chess games with an engine and writes them as parquet in the form of the Lichess data set. For tests and small runs.

    python tests/make_games.py DIR --games 2000 --files 4     # needs the programs `stockfish` (Debian) and python-chess

Two Stockfish players of different strength (skill level and nodes a move are drawn for each game) start after a few random moves.
A game ends by the rules or by resignation, as most online games do. Without Stockfish, the tests let both sides play random moves.
"""

import argparse
import functools
import multiprocessing
import random
import shutil
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

STOCKFISH = shutil.which('stockfish') or shutil.which('stockfish', path='/usr/games')
SCHEMA = pa.schema([('Event', pa.string()), ('White', pa.string()), ('Black', pa.string()), ('Result', pa.string()),
                    ('WhiteElo', pa.int16()), ('BlackElo', pa.int16()), ('TimeControl', pa.string()),
                    ('movetext', pa.string())])  # fmt: skip


class Engine:
    """Stockfish in a process of its own, and the commands of the UCI protocol that are needed to play."""

    def __init__(self):
        self.process = subprocess.Popen([STOCKFISH], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self.say('uci\nsetoption name Hash value 1\nisready')
        self.wait('readyok')

    def say(self, text):
        self.process.stdin.write(text + '\n')
        self.process.stdin.flush()

    def wait(self, word):
        while not (line := self.process.stdout.readline()).startswith(word):
            if not line:
                raise RuntimeError('stockfish has stopped')
        return line

    def move(self, history, skill, nodes):
        self.say(f'setoption name Skill Level value {skill}\nposition startpos moves {" ".join(history)}\ngo nodes {nodes}')
        return self.wait('bestmove').split()[1]


@functools.cache
def engine() -> Engine:  # one for each worker process
    return Engine()


def play(seed: int) -> dict:
    """One game as a row of SCHEMA. The ratings follow from the skill: 0 … 20 become about 600 … 2800."""
    import chess  # here, so that the schema can be imported without python-chess

    rng = random.Random(seed)
    if STOCKFISH:
        engine().say('ucinewgame')
    skill, nodes = [rng.randint(0, 20) for _ in range(2)], [int(8 * 2 ** rng.uniform(0, 4)) for _ in range(2)]
    opening, last = rng.choice([0, 2, 4, 6, 8]), int(rng.lognormvariate(4.15, 0.5))  # a median of 63 half-moves
    board, sans, history = chess.Board(), [], []
    while not board.is_game_over() and len(sans) < last:
        if len(sans) < opening or not STOCKFISH:
            move = rng.choice(list(board.legal_moves))
        else:
            side = len(sans) % 2
            move = chess.Move.from_uci(engine().move(history, skill[side], nodes[side]))
        sans.append(board.san(move))
        history.append(move.uci())
        board.push(move)
    result = board.result()
    result = rng.choice(['1-0', '0-1']) if result == '*' else result
    elos = [600 + 110 * s + rng.randint(-99, 99) for s in skill]
    return {'Event': 'Rated Blitz game', 'White': f'sf{skill[0]}', 'Black': f'sf{skill[1]}', 'Result': result,
            'WhiteElo': elos[0], 'BlackElo': elos[1], 'TimeControl': '180+0',
            'movetext': movetext(sans, result, rng)}  # fmt: skip


def movetext(sans, result, rng) -> str:
    """The moves as Lichess writes them: numbers for both sides, clocks in braces, in every fourth game evaluations and ?! marks."""
    words, clocks, judged = [], [180, 180], rng.random() < 0.25
    for i, san in enumerate(sans):
        clocks[i % 2] = max(1, clocks[i % 2] - rng.randint(0, 4))
        mark = rng.choice(['', '', '', '', '?!', '?', '??']) if judged else ''
        judgement = f'[%eval {rng.uniform(-9, 9):.2f}] ' if judged else ''
        clock = f'[%clk 0:{clocks[i % 2] // 60:02}:{clocks[i % 2] % 60:02}]'
        words.append(f'{i // 2 + 1}.{".." * (i % 2)} {san}{mark} {{ {judgement}{clock} }}')
    return ' '.join([*words, result])


def games(count: int, seed: int = 0, jobs: int = 2) -> list[dict]:
    with multiprocessing.Pool(jobs) as pool:
        seeds = range(seed * 10**7, seed * 10**7 + count)
        return list(tqdm(pool.imap(play, seeds, chunksize=8), total=count, unit=' games', desc='playing', disable=None))


def write_parquet(rows: list[dict], path: Path, row_group: int = 10_000):
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), path, row_group_size=row_group, compression='snappy')


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('dir', type=Path)
    parser.add_argument('--games', type=int, default=2000)
    parser.add_argument('--files', type=int, default=4, help='number of parquet files')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--jobs', type=int, default=2)
    args = parser.parse_args()
    if STOCKFISH is None:
        raise SystemExit('make_games: no program `stockfish`; install it, e.g. with `apt-get install stockfish`')
    args.dir.mkdir(parents=True, exist_ok=True)
    rows = games(args.games, args.seed, args.jobs)
    for i in range(args.files):
        write_parquet(rows[i :: args.files], args.dir / f'train-{i:05}-of-{args.files:05}.parquet')


if __name__ == '__main__':
    main()
