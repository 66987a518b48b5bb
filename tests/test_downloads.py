"""The download scripts against a server on this machine: whole, interrupted, damaged, offline."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent.parent


class Server(BaseHTTPRequestHandler):
    """Files from a dict, by ranges, with the checksum that the real server sends. `cut`: bytes after which it hangs up once."""

    files, ranges, cut, lie = {}, [], None, False

    def do_HEAD(self):
        self.answer(b'')

    def do_GET(self):
        body = self.files.get(self.path, b'')
        start = int((re.match(r'bytes=(\d+)-', self.headers.get('Range', '')) or [0, 0])[1])
        self.ranges.append((self.path, start))
        self.answer(body[start:], start)

    def answer(self, body, start=None):
        whole = self.files.get(self.path)
        if whole is None:
            self.send_error(404)
            return
        self.send_response(206 if start else 200)
        self.send_header('Content-Length', str(len(whole) - (start or 0)))
        if start:
            self.send_header('Content-Range', f'bytes {start}-{len(whole) - 1}/{len(whole)}')
        md5 = hashlib.md5(b'other' if self.lie else whole).digest()
        self.send_header('x-goog-hash', 'crc32c=AAAAAA==')
        self.send_header('x-goog-hash', f'md5={base64.b64encode(md5).decode()}')
        self.end_headers()
        if self.server.cut is not None and len(body) > self.server.cut:
            body, self.server.cut = body[: self.server.cut], None
            self.close_connection = True
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    rng = np.random.default_rng(0)
    Server.files = {f'/cifar5m-tokenized/{name}.bin': rng.integers(256, size=1024 * n, dtype=np.uint8).tobytes()
                    for name, n in (('train', 700), ('test', 20))}
    Server.ranges, Server.lie = [], False
    running = ThreadingHTTPServer(('127.0.0.1', 0), Server)
    running.cut = None
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield running
    running.shutdown()


def download(server, out, name='cifar5m'):
    env = {**os.environ, 'TOKENIZED_URL': f'http://127.0.0.1:{server.server_port}', 'no_proxy': '*', 'PYTHON': sys.executable}
    command = re.search(rf'^.*download_{name}\.sh', (HERE / 'README.md').read_text(), re.M)[0]  # as the README has it
    return subprocess.run(['sh', '-c', f'{command} "$0"', out], cwd=HERE, env=env, capture_output=True, text=True, timeout=60)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_download_is_checked_and_described(server, tmp_path):
    ran = download(server, tmp_path / 'out')
    assert ran.returncode == 0, ran.stderr
    assert names(tmp_path / 'out') == ['meta.json', 'test.bin', 'train.bin']
    for name in ('train', 'test'):
        assert (tmp_path / 'out' / f'{name}.bin').read_bytes() == Server.files[f'/cifar5m-tokenized/{name}.bin']
    assert 'unigram entropy: 5.54' in ran.stdout  # uniform ids: ln 256 = 5.545
    asked = len(Server.ranges)
    assert download(server, tmp_path / 'out').returncode == 0 and len(Server.ranges) == asked  # nothing is fetched twice


def test_an_interrupted_download_goes_on_where_it_stopped(server, tmp_path):
    half = Server.files['/cifar5m-tokenized/train.bin'][:300_000]
    (tmp_path / 'train.bin.part').write_bytes(half)  # as a killed download leaves it
    assert download(server, tmp_path).returncode == 0
    assert ('/cifar5m-tokenized/train.bin', 300_000) in Server.ranges
    assert (tmp_path / 'train.bin').read_bytes() == Server.files['/cifar5m-tokenized/train.bin']


def test_a_lost_connection_leaves_no_final_name(server, tmp_path):
    server.cut = 200_000  # in train.bin, as test.bin is smaller
    ran = download(server, tmp_path)
    assert ran.returncode != 0 and 'start again to go on' in ran.stderr
    assert names(tmp_path) == ['test.bin', 'train.bin.part']
    assert (tmp_path / 'train.bin.part').stat().st_size == 200_000
    assert download(server, tmp_path).returncode == 0
    assert ('/cifar5m-tokenized/train.bin', 200_000) in Server.ranges


def test_damage_on_the_way_is_found(server, tmp_path):
    Server.lie = True  # the server's checksum is of something else
    ran = download(server, tmp_path)
    assert ran.returncode != 0 and 'damaged on the way' in ran.stderr
    assert names(tmp_path) == []


def test_offline_is_one_clear_line(server, tmp_path):
    server.shutdown()
    server.server_close()
    ran = download(server, tmp_path)
    assert ran.returncode != 0 and names(tmp_path) == []
    assert ran.stderr.splitlines()[-1].startswith('download_cifar5m: cannot reach http://127.0.0.1')
    assert 'prepare_cifar5m.py' in ran.stderr


def test_chess_brings_its_padding_id(server, tmp_path):
    games = np.random.default_rng(1).integers(54, size=50_000, dtype=np.uint8).tobytes()
    import pickle

    meta = pickle.dumps({'vocab_size': 54, 'bos': 0, 'eos': 1})
    Server.files = {f'/chess-tokenized/{name}': body for name, body in
                    (('train.bin', games), ('test.bin', games[:5000]), ('meta.pkl', meta))}
    ran = download(server, tmp_path, 'chess')
    assert ran.returncode == 0, ran.stderr
    assert json.loads((tmp_path / 'meta.json').read_text())['pad_id'] == 0
    assert 'V=64' in ran.stdout
