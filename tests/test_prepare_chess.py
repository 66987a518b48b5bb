"""Chess preparation: positions by the rules, every game kept exactly once, the same bytes however the run went."""

import collections
import gzip
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import chess
import killing
import make_games
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import prepare_chess
from token_files import chess_positions

GAMES = 160


@pytest.fixture(scope='session')
def rows():
    return make_games.games(GAMES)


@pytest.fixture(scope='session')
def inputs(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp('games')
    for i in range(3):
        make_games.write_parquet(rows[i::3], folder / f'{i}.parquet')
    return sorted(folder.iterdir())


@pytest.fixture(scope='session')
def prepared(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp('chess')
    ran = killing.run('prepare_chess.py', *inputs, '--out', out, '--test-games', 40)
    assert ran.returncode == 0, ran.stderr
    return out


def sans(row):
    return [w for w in re.sub(r'\{[^}]*\}|\d+\.+', '', row['movetext']).split()[:-1]]


def fen_by_python_chess(moves):
    board = chess.Board()
    try:
        for move in moves:
            board.push_san(move.rstrip('?!'))
    except ValueError:
        return None
    return board.fen().encode()


def read_back(path):
    """[(moves, White's rating, Black's rating, FEN)] from the tokens alone."""
    text = ''.join('\0\1'[i] if i < 2 else prepare_chess.VOCABULARY[i] for i in np.fromfile(path, np.uint8))
    assert text.startswith('\0') and text.endswith('\1')
    games = []
    for game in text[1:-1].split('\1\0'):
        moves, white, black, fen = game.split('|')
        games.append((tuple(re.split('[,;]', moves)), int(white), int(black), fen))
    return games


def read_all(folder):
    return read_back(folder / 'train.bin') + read_back(folder / 'test.bin')


# ---------------------------------------------------------------- the rules


def random_games(count, seed):
    """Games of random legal moves: promotions, en passant, castling and pins are common in them."""
    rng = random.Random(seed)
    for _ in range(count):
        board, moves = chess.Board(), []
        while not board.is_game_over() and len(moves) < rng.choice([30, 60, 120, 240]):
            move = rng.choice(list(board.legal_moves))
            moves.append(board.san(move))
            board.push(move)
        yield moves


def test_positions_and_legality_agree_with_python_chess():
    games, rng = list(random_games(150, seed=1)), random.Random(2)
    words = sorted({move for game in games for move in game})
    for game in games[:100]:  # the same games with a move that is mostly illegal
        at = rng.randrange(len(game))
        games.append([*game[:at], rng.choice(words), *game[at + 1 :]])
    codes = chess_positions.Codes()
    ours = chess_positions.replay([[codes[move.encode()] for move in game] for game in games])
    theirs = [fen_by_python_chess(game) for game in games]
    assert ours == theirs
    assert None in theirs[150:] and None not in theirs[:150]


@pytest.mark.parametrize('moves, fen', [
    ('e4 a6 e5 d5 exd6', True), ('e4 a6 e5 d5 a3 a5 exd6', False),  # en passant, at once or never
    ('e4 e5 Ke2 a6 Ke1 a5 Nf3 a4 Be2 a3 O-O', False),  # the king has moved
    ('e4 e5 Nf3 Bc5 Bc4 a6 O-O', True), ('f4 e5 Nf3 Bc5 g3 a6 Bg2 a5 O-O', False),  # the king would cross an attack
    ('e4 e5 Qh5 Ke7 Qxe5', True), ('e4 e5 Qh5 Nc6 Qxf7 a6', False),  # in check, and does not answer it
    ('d4 e6 Nc3 Bb4 Nd5', False),  # pinned
    ('d4 e6 Nc3 Bb4 e4 a6 Ne2', True),  # of two knights only one is free to go
    ('a4 b5 axb5 a6 bxa6 Bb7 axb7 h6 bxa8=N', True), ('a4 b5 axb5 a6 bxa6 Bb7 axb7 h6 bxa8', False),  # must promote
])  # fmt: skip
def test_rules_by_name(moves, fen):
    words = moves.split()
    [ours] = chess_positions.replay([[chess_positions.parse_san(w.encode()) for w in words]])
    assert (ours is not None) == fen
    assert ours == fen_by_python_chess(words)


# ---------------------------------------------------------------- the data set


def test_every_game_is_in_one_split_and_reads_back(rows, prepared):
    train, test = (read_back(prepared / f'{name}.bin') for name in ('train', 'test'))
    assert len(test) == 40
    want = collections.Counter((tuple(sans(row)), row['WhiteElo'], row['BlackElo']) for row in rows)
    assert collections.Counter(game[:3] for game in train + test) == want
    for moves, _, _, fen in (train + test)[::7]:
        assert fen.encode() == fen_by_python_chess(moves)


def test_order_owes_nothing_to_the_input(rows, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_chess, 'BUCKETS', 2)  # few, so that their own order shows
    monkeypatch.setattr(prepare_chess, 'progress', multiprocessing.Value('q'), raising=False)
    monkeypatch.setattr(prepare_chess, 'stop', threading.Event(), raising=False)
    for i, path in enumerate(inputs):
        prepare_chess.read_file(i, str(path), tmp_path, seed=42, position=False)
    pieces = [json.loads((tmp_path / f'{i:05}.json').read_text()) for i in range(len(inputs))]
    prepare_chess.shuffle(tmp_path, pieces, tmp_path, seed=42, test_games=40)
    place = {(tuple(sans(row)), row['WhiteElo']): i for i, row in enumerate(rows[0::3] + rows[1::3] + rows[2::3])}
    games = read_back(tmp_path / 'train.bin.part') + read_back(tmp_path / 'test.bin.part')
    correlation = np.corrcoef([place[game[:2]] for game in games], np.arange(len(games)))[0, 1]
    assert abs(correlation) < 4 / np.sqrt(len(games))  # four standard errors of independence


def test_meta_tells_the_vocabulary_and_the_padding(prepared):
    meta = json.loads((prepared / 'meta.json').read_text())
    assert (meta['vocab_size'], meta['bos'], meta['eos'], meta['pad_id']) == (54, 0, 1, 0)
    b = [i for i, word in enumerate(meta['vocabulary']) if word == 'b']
    used = np.bincount(np.fromfile(prepared / 'train.bin', np.uint8), minlength=54)
    assert len(b) == 2 and used[b[0]] == 0 and used[b[1]] > 0  # the twin that a dict built in order maps 'b' to


def test_pgn_plain_and_compressed_give_the_games_of_parquet(rows, prepared, tmp_path):
    make_games.write_pgn(rows[:99], tmp_path / '0.pgn')
    make_games.write_pgn(rows[99:], tmp_path / '1.pgn')
    (tmp_path / '1.pgn.gz').write_bytes(gzip.compress((tmp_path / '1.pgn').read_bytes()))
    ran = killing.run('prepare_chess.py', tmp_path / '0.pgn', tmp_path / '1.pgn.gz', '--out', tmp_path / 'out', '--test-games', 40)
    assert ran.returncode == 0, ran.stderr
    assert sorted(read_all(tmp_path / 'out')) == sorted(read_all(prepared))


def test_what_is_no_game_is_skipped_counted_and_reported(rows, tmp_path):
    good = rows[0]['movetext']
    bad = [dict(rows[0], movetext=text) for text in (
        '', None, '1-0', '{ all comment } 0-1',  # no moves: 4
        '1. e4 $1 e5 1-0', '1. e4 { unclosed 1... e5 1-0', '1. e4 é 1-0',  # outside the vocabulary: 3
        '1. e4 e6 2. e6 1-0', '1. e4 e5 2. Nf6 1-0', '1. e4 (1. d4 d5) e5', '1. e4 e5 2. 0-1 Nf3', '1. e9',  # illegal: 5
    )]  # fmt: skip
    bad += [dict(rows[0], WhiteElo=None), dict(rows[0], BlackElo=None), dict(rows[0], WhiteElo=0)]  # missing rating: 3
    make_games.write_parquet([dict(rows[0], movetext=good)] * 2 + bad, tmp_path / 'mixed.parquet')
    ran = killing.run('prepare_chess.py', tmp_path / 'mixed.parquet', '--out', tmp_path / 'out', '--test-games', 1)
    assert ran.returncode == 0, ran.stderr
    skipped = json.loads((tmp_path / 'out' / 'meta.json').read_text())['games']['skipped']
    assert skipped == {'no moves': 4, 'character outside the vocabulary': 3, 'illegal move': 5, 'missing rating': 3}
    assert '2 of 17 games' in ran.stderr and '5 illegal move' in ran.stderr


def test_without_the_position_the_rest_is_the_same(inputs, prepared, tmp_path):
    ran = killing.run('prepare_chess.py', *inputs, '--out', tmp_path / 'out', '--test-games', 40, '--no-position')
    assert ran.returncode == 0, ran.stderr
    want = [game[:3] for game in read_back(prepared / 'train.bin')]
    assert [game[:3] for game in read_back(tmp_path / 'out' / 'train.bin')] == want


# ---------------------------------------------------------------- interruptions and refusals


def test_the_bytes_depend_neither_on_jobs_nor_on_kills(inputs, prepared, tmp_path):
    out = tmp_path / 'out'
    arguments = [*inputs, '--out', out, '--test-games', 40, '--jobs', 1]
    killing.kill_at_random('prepare_chess.py', arguments, out, killing.checksums(prepared), kills=2, seconds=1.5)
    assert not (out / '.preparing').exists()


def test_killed_between_the_two_names_ends_in_the_same_bytes(inputs, prepared, tmp_path):
    out = tmp_path / 'out'
    shutil.copytree(prepared, out)
    source = json.loads((out / 'meta.json').read_text())['source']
    del source['test_games']
    (out / '.preparing').mkdir()
    (out / '.preparing' / 'manifest.json').write_text(json.dumps(source))
    (out / 'meta.json').unlink()
    (out / 'test.bin').rename(out / 'test.bin.part')
    ran = killing.run('prepare_chess.py', *inputs, '--out', out, '--test-games', 40)
    assert ran.returncode == 0, ran.stderr
    assert killing.checksums(out) == killing.checksums(prepared)


def test_finished_work_is_not_done_again(inputs, prepared):
    before = killing.checksums(prepared)
    ran = killing.run('prepare_chess.py', *inputs, '--out', prepared, '--test-games', 40)
    assert ran.returncode == 0 and 'holds this data set already' in ran.stderr
    assert killing.checksums(prepared) == before


def broken_inputs(rows, folder):
    table = pa.Table.from_pylist(rows[:50], make_games.SCHEMA)
    pq.write_table(table, folder / 'whole.parquet')
    whole = (folder / 'whole.parquet').read_bytes()
    (folder / 'half.parquet').write_bytes(whole[: len(whole) // 2])
    (folder / 'hole.parquet').write_bytes(whole[:200] + bytes(2000) + whole[2200:])  # the footer is fine, the pages are not
    pq.write_table(table.drop(['BlackElo']), folder / 'column.parquet')
    pq.write_table(table.set_column(4, 'WhiteElo', pa.array(['1500'] * 50)), folder / 'type.parquet')
    (folder / 'notes.pgn').write_text('no games here\n')


@pytest.mark.parametrize('name, says', [
    ('half.parquet', 'cut short or damaged'), ('hole.parquet', 'cut short or damaged'),
    ('column.parquet', 'has no column BlackElo'), ('type.parquet', 'WhiteElo is string; wanted integers'),
    ('absent.parquet', 'no such file'), ('notes.pgn', '0 of 1 games are usable'),
])  # fmt: skip
def test_bad_input_is_one_clear_line(rows, tmp_path, name, says):
    broken_inputs(rows, tmp_path)
    ran = killing.run('prepare_chess.py', tmp_path / name, '--out', tmp_path / 'out', '--test-games', 4)
    last = ran.stderr.splitlines()[-1]
    assert ran.returncode == 1 and last.startswith('prepare_chess: ') and says in last, ran.stderr
    assert 'Traceback' not in ran.stderr and not list(tmp_path.glob('out/*.bin'))


def test_what_is_wrong_with_a_file_afar_is_not_called_the_connection(rows, tmp_path):
    broken_inputs(rows, tmp_path)
    with pytest.raises(ValueError, match=r'^file://\S+/column\.parquet: has no column BlackElo'):
        prepare_chess.size_up(f'file://{tmp_path}/column.parquet')


def test_test_games_and_twins_are_refused_before_any_work(inputs, tmp_path):
    with pytest.raises(ValueError, match='--test-games is 0; wanted 1 or more'):
        prepare_chess.make([str(inputs[0])], tmp_path, test_games=0)
    with pytest.raises(ValueError, match='0.parquet: is named twice'):
        prepare_chess.make([str(inputs[0]), str(inputs[0])], tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_data_set_that_lost_a_file_is_not_called_finished(inputs, prepared, tmp_path):
    out = tmp_path / 'out'
    shutil.copytree(prepared, out)
    (out / 'train.bin').unlink()
    ran = killing.run('prepare_chess.py', *inputs, '--out', out, '--test-games', 40)
    assert ran.returncode == 1 and 'not whole; move it' in ran.stderr


def test_a_full_disk_leaves_no_final_name_and_is_survived(inputs, prepared, tmp_path):
    out = tmp_path / 'out'
    arguments = [*inputs, '--out', out, '--test-games', 40]
    limit = (prepared / 'train.bin').stat().st_size * 2 // 3  # no file may grow larger: the pieces fit, train.bin does not
    ran = killing.run('prepare_chess.py', *arguments, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert ran.returncode == 1 and 'free some room' in ran.stderr.splitlines()[-1], ran.stderr
    assert not list(out.glob('*.bin'))
    ran = killing.run('prepare_chess.py', *arguments)
    assert '3 of 3 input files were prepared before' in ran.stderr
    assert killing.checksums(out) == killing.checksums(prepared)


def test_another_data_set_is_not_written_over(inputs, tmp_path):
    (tmp_path / 'train.bin').write_bytes(b'mine')
    ran = killing.run('prepare_chess.py', *inputs, '--out', tmp_path, '--test-games', 40)
    assert ran.returncode == 1 and 'of another data set' in ran.stderr
    assert (tmp_path / 'train.bin').read_bytes() == b'mine'


# ---------------------------------------------------------------- from afar


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as reading one file takes: the repository, its tree, the file by byte ranges."""

    def do_GET(self):
        content, kind = self.server.content, {'Content-Type': 'application/json'}
        if '/resolve/' in self.path:
            first, last = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers['Range']).groups()
            body = content[int(first) : int(last or len(content)) + 1]
            kind = {'Content-Range': f'bytes {first}-{int(first) + len(body) - 1}/{len(content)}'}
        elif '/tree/' in self.path:
            body = json.dumps([{'type': 'file', 'path': 'data/0.parquet', 'size': len(content), 'oid': 'a' * 40}]).encode()
        else:
            body = json.dumps({'id': 'Lichess/standard-chess-games', 'sha': 'b' * 40, 'siblings': [], 'private': False}).encode()
        self.send_response(206 if '/resolve/' in self.path else 200)
        for name, value in {**kind, 'Content-Length': str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_a_file_on_the_hub_is_read_as_one_here_and_offline_is_told(inputs, tmp_path):
    server = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    server.content = inputs[0].read_bytes()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = 'hf://datasets/Lichess/standard-chess-games/data/0.parquet'
    env = {**os.environ, 'HF_ENDPOINT': f'http://127.0.0.1:{server.server_port}', 'HF_HUB_DISABLE_TELEMETRY': '1', 'no_proxy': '*'}
    ran = killing.run('prepare_chess.py', url, '--out', tmp_path / 'out', '--test-games', 10, env=env)
    assert ran.returncode == 0, ran.stderr
    moves = [tuple(sans(row)) for row in pq.read_table(inputs[0]).to_pylist()]
    assert sorted(game[0] for game in read_all(tmp_path / 'out')) == sorted(moves)
    server.shutdown()
    server.server_close()
    ran = killing.run('prepare_chess.py', url, '--out', tmp_path / 'offline', '--test-games', 10, env=env)
    assert ran.returncode == 1 and f'prepare_chess: {url}: cannot be reached' in ran.stderr.splitlines()[-1], ran.stderr
