"""Chess preparation: every usable game is kept exactly once, and the bytes are the same however the run was interrupted."""

import collections
import fcntl
import json
import os
import re
import resource
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import killing
import make_games
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import prepare_chess

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


def prepare(*arguments, test_games=40, **options):
    """The finished process of prepare_chess.py with two worker processes."""
    return killing.run('prepare_chess.py', *arguments, '--jobs', 2, '--test-games', test_games, **options)


@pytest.fixture(scope='session')
def prepared(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp('chess')
    ran = prepare(*inputs, '--out', out)
    assert ran.returncode == 0, ran.stderr
    return out


def moves_of(row):
    return re.sub(r'\{[^}]*\}|\d+\.+', '', row['movetext']).split()[:-1]


def key_of(row):
    return tuple(moves_of(row)), row['WhiteElo'], row['BlackElo']


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


# ---------------------------------------------------------------- one game


def text_of(movetext, white=1500, black=1600):
    """The characters of a game's tokens, or the reason why it is skipped."""
    try:
        return ''.join(prepare_chess.VOCABULARY[i] for i in prepare_chess.tokenise(movetext, white, black))
    except ValueError as reason:
        return str(reason)


def test_a_game_is_written_as_the_paper_describes():
    movetext = '1. e4 { [%clk 0:03:00] } 1... e5 2. Nf3?! { [%eval 0.1] } 2... Nc6 1-0'
    position = 'r1bqkbnr/pppp1ppp/2n5/4p3/4P3/5N2/PPPP1PPP/RNBQKB1R w KQkq - 2 3'  # known from any chess book
    assert text_of(movetext) == f'<BOS>e4,e5;Nf3?!,Nc6|1500|1600|{position}<EOS>'


def test_the_position_names_en_passant_only_where_it_is_possible():
    assert ' w KQkq d6 0 3<EOS>' in text_of('1. e4 a6 2. e5 d5 *')  # a white pawn stands on e5
    assert ' w KQkq - 0 2<EOS>' in text_of('1. e4 e5 *')


@pytest.mark.parametrize('movetext, reason', [
    ('', 'no moves'), (None, 'no moves'), ('1-0', 'no moves'), ('{ all comment } 0-1', 'no moves'),
    ('1. e4 $1 e5 1-0', 'character outside the vocabulary'), ('1. e4 { unclosed 1... e5 1-0', 'character outside the vocabulary'),
    ('1. e4 é 1-0', 'character outside the vocabulary'),
    ('1. e4 e6 2. e6 1-0', 'illegal move'), ('1. e4 e5 2. Nf6 1-0', 'illegal move'), ('1. e4 (1. d4 d5) e5', 'illegal move'),
    ('1. e4 e5 2. 0-1 Nf3', 'illegal move'), ('1. e9', 'illegal move'), ('1. e4 -- 2. d4', 'illegal move'),
    ('1. d4 e6 2. Nc3 Bb4 3. Nd5 *', 'illegal move'),  # the knight is pinned
])  # fmt: skip
def test_an_unusable_game_is_skipped_with_a_reason(movetext, reason):
    assert text_of(movetext) == reason


@pytest.mark.parametrize('white, black', [(None, 1600), (1500, None), (0, 1600), (1500, -1)])
def test_a_game_without_ratings_is_skipped(white, black):
    assert text_of('1. e4 e5 *', white, black) == 'missing rating'


# ---------------------------------------------------------------- the data set


def test_every_game_is_in_one_split_and_reads_back(rows, prepared):
    train, test = (read_back(prepared / f'{name}.bin') for name in ('train', 'test'))
    assert len(test) == 40
    assert collections.Counter(game[:3] for game in train + test) == collections.Counter(map(key_of, rows))
    assert all(game[3].count('/') == 7 for game in train + test)  # a FEN


def test_the_order_is_independent_of_the_input_order(rows, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_chess, 'BUCKETS', 2)  # few, so that an order within a bucket would show
    prepare_chess.make(list(map(str, inputs)), tmp_path / 'out', test_games=40)
    place = {key_of(row): i for i, row in enumerate(rows[0::3] + rows[1::3] + rows[2::3])}
    games = read_all(tmp_path / 'out')
    correlation = np.corrcoef([place[game[:3]] for game in games], np.arange(len(games)))[0, 1]
    assert abs(correlation) < 4 / np.sqrt(len(games))  # four standard errors of independence


def test_meta_gives_the_vocabulary_and_the_padding(prepared):
    meta = json.loads((prepared / 'meta.json').read_text())
    assert (meta['vocab_size'], meta['bos'], meta['eos'], meta['pad_id']) == (54, 0, 1, 0)
    b = [i for i, word in enumerate(meta['vocabulary']) if word == 'b']
    used = np.bincount(np.fromfile(prepared / 'train.bin', np.uint8), minlength=54)
    assert len(b) == 2 and used[b[0]] == 0 and used[b[1]] > 0  # 'b' has two ids, of which the published data use the later


def test_skipped_games_are_counted_and_reported(rows, tmp_path):
    bad = [dict(rows[0], movetext=text) for text in ('', None, '1. e4 $1 e5 1-0', '1. e4 e6 2. e6 1-0')]
    bad += [dict(rows[0], WhiteElo=None), dict(rows[0], BlackElo=None)]
    make_games.write_parquet([rows[0]] * 2 + bad, tmp_path / 'mixed.parquet')
    ran = prepare(tmp_path / 'mixed.parquet', '--out', tmp_path / 'out', test_games=1)
    assert ran.returncode == 0, ran.stderr
    skipped = json.loads((tmp_path / 'out' / 'meta.json').read_text())['games']['skipped']
    assert skipped == {'no moves': 2, 'character outside the vocabulary': 1, 'illegal move': 1, 'missing rating': 2}
    assert '2 of 8 games' in ran.stderr and '1 illegal move' in ran.stderr


# ---------------------------------------------------------------- interruptions and refusals


def test_the_bytes_depend_neither_on_jobs_nor_on_kills(inputs, prepared, tmp_path):
    out = tmp_path / 'out'
    arguments = [*inputs, '--out', out, '--test-games', 40, '--jobs', 1]
    killing.kill_at_random('prepare_chess.py', arguments, out, killing.checksums(prepared), kills=2, seconds=1.5)
    assert not (out / '.preparing').exists()


def test_a_kill_while_files_are_renamed_ends_in_the_same_bytes(inputs, prepared, tmp_path):
    out = tmp_path / 'out'
    shutil.copytree(prepared, out)
    (out / '.preparing').mkdir()
    for name in ('meta.json', 'test.bin', 'meta.pkl'):  # train.bin has been renamed, the others have not
        (out / name).rename(out / '.preparing' / name)
    ran = prepare(*inputs, '--out', out)
    assert ran.returncode == 0, ran.stderr
    assert killing.checksums(out) == killing.checksums(prepared)


def test_a_complete_data_set_is_not_made_again(inputs, prepared):
    before = killing.checksums(prepared)
    ran = prepare(*inputs, '--out', prepared)
    assert ran.returncode == 0 and 'holds this data set already' in ran.stderr
    assert killing.checksums(prepared) == before


def test_corrected_input_is_read_and_the_rest_is_kept(rows, inputs, prepared, tmp_path):
    """An input whose games lack ratings is reported; after it is corrected, the same command succeeds."""
    corrected, out = tmp_path / 'corrected.parquet', tmp_path / 'out'
    make_games.write_parquet([dict(row, WhiteElo=None) for row in rows[0::3]], corrected)
    ran = prepare(corrected, *inputs[1:], '--out', out, test_games=120)
    assert ran.returncode == 1 and 'missing rating' in ran.stderr.splitlines()[-1], ran.stderr
    shutil.copy(inputs[0], corrected)
    ran = prepare(corrected, *inputs[1:], '--out', out)
    assert ran.returncode == 0 and '2 of 3 input files were read by an earlier run' in ran.stderr, ran.stderr
    assert sorted(read_all(out)) == sorted(read_all(prepared))


def test_a_changed_input_is_noticed_by_its_size_or_its_time(tmp_path):
    path = tmp_path / '0.parquet'
    path.write_bytes(b'12')
    os.utime(path, ns=(0, 0))
    before = prepare_chess.buckets_name(str(path), 0, 42)
    assert prepare_chess.buckets_name(str(path), 0, 42) == before
    path.write_bytes(b'21')  # as long, but written later
    assert prepare_chess.buckets_name(str(path), 0, 42) != before
    path.write_bytes(b'123')
    os.utime(path, ns=(0, 0))
    assert prepare_chess.buckets_name(str(path), 0, 42) != before


def test_other_options_start_over(inputs, prepared, tmp_path):
    out = tmp_path / 'out'
    assert prepare(*inputs, '--out', out, '--seed', 7, test_games=GAMES).returncode == 1  # no game is left to train on
    outdated = set((out / '.preparing').glob('input-*'))
    ran = prepare(*inputs, '--out', out, test_games=GAMES)
    assert ran.returncode == 1 and 'by an earlier run' not in ran.stderr, ran.stderr
    assert not outdated & set((out / '.preparing').glob('input-*'))  # they would take disk space until the end
    ran = prepare(*inputs, '--out', out)
    assert ran.returncode == 0, ran.stderr
    assert killing.checksums(out) == killing.checksums(prepared)


def broken_inputs(rows, folder):
    table = pa.Table.from_pylist(rows[:50], make_games.SCHEMA)
    pq.write_table(table, folder / 'whole.parquet')
    whole = (folder / 'whole.parquet').read_bytes()
    (folder / 'half.parquet').write_bytes(whole[: len(whole) // 2])
    (folder / 'hole.parquet').write_bytes(whole[:200] + bytes(2000) + whole[2200:])  # the footer is right, the pages are not
    pq.write_table(table.drop(['BlackElo']), folder / 'column.parquet')
    pq.write_table(table.set_column(4, 'WhiteElo', pa.array(['1500'] * 50)), folder / 'type.parquet')
    (folder / 'notes.txt').write_text('no games here\n')


@pytest.mark.parametrize('name, says', [
    ('half.parquet', 'cannot be read'), ('hole.parquet', 'cannot be read'),
    ('column.parquet', 'column BlackElo is missing'), ('type.parquet', 'WhiteElo is string; wanted int'),
    ('absent.parquet', 'no such file'), ('notes.txt', 'cannot be read'),
])  # fmt: skip
def test_bad_input_is_one_clear_line(rows, tmp_path, name, says):
    broken_inputs(rows, tmp_path)
    ran = prepare(tmp_path / name, '--out', tmp_path / 'out', test_games=4)
    last = ran.stderr.splitlines()[-1]
    assert ran.returncode == 1 and last.startswith('prepare_chess: ') and says in last, ran.stderr
    assert 'Traceback' not in ran.stderr and not list(tmp_path.glob('out/*.bin'))


def test_wrong_options_and_inputs_are_refused_before_any_folder_is_made(rows, inputs, tmp_path):
    broken_inputs(rows, tmp_path)
    for options, says in (({'test_games': 0}, '--test-games is 0; wanted 1 or more'),
                          ({'paths': [str(inputs[0])] * 2}, '0.parquet: is given 2 times'),
                          ({'paths': [str(inputs[0]), str(tmp_path / 'column.parquet')]}, 'column BlackElo is missing')):
        with pytest.raises(ValueError, match=says):
            prepare_chess.make(**{'paths': [str(inputs[0])], 'out': tmp_path / 'out', **options})
    assert not (tmp_path / 'out').exists()


def test_a_file_name_is_not_taken_for_a_pattern(inputs, tmp_path):
    shutil.copy(inputs[0], tmp_path / 'games[1].parquet')
    assert prepare_chess.check_input(str(tmp_path / 'games[1].parquet')) == inputs[0].stat().st_size


def test_a_data_set_with_a_missing_file_is_not_complete(inputs, prepared, tmp_path):
    out = tmp_path / 'out'
    shutil.copytree(prepared, out)
    (out / 'train.bin').unlink()
    ran = prepare(*inputs, '--out', out)
    assert ran.returncode == 1 and 'incomplete data set; move it' in ran.stderr


def test_a_full_disk_leaves_no_result_and_the_next_run_succeeds(inputs, prepared, tmp_path):
    out = tmp_path / 'out'
    limit = (prepared / 'train.bin').stat().st_size * 2 // 3  # bytes of one file: the buckets fit, train.bin does not
    ran = prepare(*inputs, '--out', out, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert ran.returncode == 1 and 'free some space' in ran.stderr.splitlines()[-1], ran.stderr
    assert not list(out.glob('*.bin'))
    ran = prepare(*inputs, '--out', out)
    assert '3 of 3 input files were read by an earlier run' in ran.stderr
    assert killing.checksums(out) == killing.checksums(prepared)


def test_two_processes_do_not_prepare_the_same_data_set(inputs, tmp_path):
    (tmp_path / '.preparing').mkdir()
    with open(tmp_path / '.preparing' / 'lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ran = prepare(*inputs, '--out', tmp_path)
    assert ran.returncode == 1 and 'another process is preparing it' in ran.stderr


def test_another_data_set_is_not_written_over(inputs, tmp_path):
    (tmp_path / 'train.bin').write_bytes(b'mine')
    ran = prepare(*inputs, '--out', tmp_path)
    assert ran.returncode == 1 and 'of another or an incomplete data set' in ran.stderr
    assert (tmp_path / 'train.bin').read_bytes() == b'mine'


# ---------------------------------------------------------------- at a URL


class Hub(BaseHTTPRequestHandler):
    """A Hugging Face hub with one file, for reading: the repository, its list of files, the file by byte ranges.

    The first `server.cut` answers with a part of the file end in the middle.
    """

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
        if '/resolve/' in self.path and self.server.cut:
            self.server.cut -= 1
            body = body[: len(body) // 2]
            self.close_connection = True
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(inputs):
    """(a running Hub with the first input, the environment that makes Hugging Face libraries use it)."""
    server = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    server.content, server.cut = inputs[0].read_bytes(), 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server, {**os.environ, 'HF_ENDPOINT': f'http://127.0.0.1:{server.server_port}', 'HF_HUB_DISABLE_TELEMETRY': '1',
                   'no_proxy': '*'}
    server.shutdown()
    server.server_close()


URL = 'hf://datasets/Lichess/standard-chess-games/data/0.parquet'


@pytest.mark.parametrize('cut', [0, 1])
def test_a_file_on_the_hub_is_read_like_a_local_one(hub, rows, tmp_path, cut):
    server, env = hub
    server.cut = cut
    ran = prepare(URL, '--out', tmp_path / 'out', test_games=10, env=env)
    assert ran.returncode == 0, ran.stderr
    assert sorted(game[:3] for game in read_all(tmp_path / 'out')) == sorted(map(key_of, rows[0::3]))
    assert server.cut == 0


def test_an_unreachable_hub_is_one_clear_line(hub, tmp_path):
    server, env = hub
    server.shutdown()
    server.server_close()
    ran = prepare(URL, '--out', tmp_path / 'out', test_games=10, env=env)
    assert ran.returncode == 1 and f'prepare_chess: {URL}: cannot be read' in ran.stderr.splitlines()[-1], ran.stderr
    assert not (tmp_path / 'out').exists()


def test_what_is_wrong_with_a_file_at_a_url_is_not_blamed_on_the_connection(rows, tmp_path):
    broken_inputs(rows, tmp_path)
    with pytest.raises(ValueError, match=r'^file://\S+/column\.parquet: column BlackElo is missing'):
        prepare_chess.check_input(f'file://{tmp_path}/column.parquet')
