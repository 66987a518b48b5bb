"""The download scripts against a server on this machine: complete, interrupted, damaged, unreachable, from any directory."""

import base64
import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

CHECKOUT = Path(__file__).parent.parent


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files` {path: bytes} by ranges, with the checksum header that the real server sends."""

    def do_HEAD(self):
        self.answer(b'')

    def do_GET(self):
        body = self.server.files.get(self.path, b'')
        start = int((re.match(r'bytes=(\d+)-', self.headers.get('Range', '')) or [0, 0])[1])
        self.server.requests.append((self.path, start))
        self.answer(body[start:], start)

    def answer(self, body, start=0):
        whole = self.server.files.get(self.path)
        if whole is None:
            self.send_error(404)
            return
        self.send_response(206 if start else 200)
        self.send_header('Content-Length', str(len(whole) - start))
        if start:
            self.send_header('Content-Range', f'bytes {start}-{len(whole) - 1}/{len(whole)}')
        md5 = hashlib.md5(b'other' if self.server.wrong_checksum else whole).digest()
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
    """A running server: files {path: bytes}, requests [(path, first byte)], cut (bytes after which it hangs up once)."""
    running = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    rng = np.random.default_rng(0)
    running.files = {f'/cifar5m-tokenized/{name}.bin': rng.integers(256, size=1024 * n, dtype=np.uint8).tobytes()
                     for name, n in (('train', 700), ('test', 20))}
    running.requests, running.cut, running.wrong_checksum = [], None, False
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


def run(server, *command, cwd):
    url = f'http://127.0.0.1:{server.server_port}'
    env = {**os.environ, 'TOKENIZED_URL': url, 'PAPER_LOGS_URL': f'{url}/logs', 'no_proxy': '*', 'PYTHON': sys.executable}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60)


def download(server, out, name='cifar5m', cwd=CHECKOUT):
    return run(server, CHECKOUT / f'download_{name}.sh', out, cwd=cwd)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_download_is_verified_and_described(server, tmp_path):
    ran = download(server, tmp_path / 'out')
    assert ran.returncode == 0, ran.stderr
    assert names(tmp_path / 'out') == ['meta.json', 'test.bin', 'train.bin']
    for name in ('train', 'test'):
        assert (tmp_path / 'out' / f'{name}.bin').read_bytes() == server.files[f'/cifar5m-tokenized/{name}.bin']
    assert 'unigram entropy: 5.54' in ran.stdout  # uniform ids: ln 256 = 5.545
    requests = len(server.requests)
    assert download(server, tmp_path / 'out').returncode == 0 and len(server.requests) == requests  # nothing is downloaded twice


def test_it_works_from_any_directory_with_a_relative_folder(server, tmp_path):
    ran = download(server, 'out', cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert names(tmp_path / 'out') == ['meta.json', 'test.bin', 'train.bin'] and 'unigram entropy' in ran.stdout


def test_an_interrupted_download_continues(server, tmp_path):
    half = server.files['/cifar5m-tokenized/train.bin'][:300_000]
    (tmp_path / 'train.bin.part').write_bytes(half)  # as a killed download leaves it
    assert download(server, tmp_path).returncode == 0
    assert ('/cifar5m-tokenized/train.bin', 300_000) in server.requests
    assert (tmp_path / 'train.bin').read_bytes() == server.files['/cifar5m-tokenized/train.bin']


def test_after_a_lost_connection_no_file_has_its_final_name(server, tmp_path):
    server.cut = 200_000  # in train.bin, as test.bin is smaller
    ran = download(server, tmp_path)
    assert ran.returncode != 0 and 'run this again to continue' in ran.stderr
    assert names(tmp_path) == ['test.bin', 'train.bin.part']
    assert (tmp_path / 'train.bin.part').stat().st_size == 200_000
    assert download(server, tmp_path).returncode == 0
    assert ('/cifar5m-tokenized/train.bin', 200_000) in server.requests


def test_a_damaged_file_is_deleted(server, tmp_path):
    server.wrong_checksum = True
    ran = download(server, tmp_path / 'out')
    assert ran.returncode != 0 and 'wrong checksum' in ran.stderr
    assert not (tmp_path / 'out').exists()


def test_without_a_connection_there_is_one_clear_line_and_no_folder(server, tmp_path):
    server.shutdown()
    server.server_close()
    ran = download(server, tmp_path / 'out')
    assert ran.returncode != 0 and not (tmp_path / 'out').exists()
    assert ran.stderr.splitlines()[-1].startswith('download_cifar5m: cannot reach http://127.0.0.1')
    assert 'prepare_cifar5m.py' in ran.stderr


def test_chess_gets_its_padding_id(server, tmp_path):
    games = np.random.default_rng(1).integers(54, size=50_000, dtype=np.uint8).tobytes()
    meta = pickle.dumps({'vocab_size': 54, 'bos': 0, 'eos': 1})
    server.files = {f'/chess-tokenized/{name}': body for name, body in
                    (('train.bin', games), ('test.bin', games[:5000]), ('meta.pkl', meta))}
    ran = download(server, tmp_path / 'out', 'chess')
    assert ran.returncode == 0, ran.stderr
    assert json.loads((tmp_path / 'out' / 'meta.json').read_text())['pad_id'] == 0
    assert 'V=64' in ran.stdout


# ---------------------------------------------------------------- the authors' logs


@pytest.fixture
def checkout(tmp_path):
    """The script of the logs and what it uses, in a checkout of its own, as it writes beside itself."""
    (tmp_path / 'logs').mkdir()
    shutil.copy(CHECKOUT / 'logs/download_paper_logs.sh', tmp_path / 'logs')
    shutil.copytree(CHECKOUT / 'analysis', tmp_path / 'analysis')
    return tmp_path


def small_log():
    history = pd.DataFrame({'step': [0, 10], 'compute': [0.0, 1.0], 'test_loss': [0.5, 0.2], 'lr': [0.1, 0.0], 'tau': [0.0, 0.5]})
    return pickle.dumps(pd.DataFrame([{'D': 64, 'N': 3, 'B': 32, 'lr': 0.1, 'P': 1000, 'schedule': 'linear', 'decay_frac': 1.0,
                                       'seed': 0, 'history': history}]))


def test_logs_are_downloaded_from_any_directory_and_only_once(server, checkout):
    server.files = {'/logs/mlp.pkl': small_log()}
    (checkout / 'elsewhere').mkdir()
    for _ in range(2):
        ran = run(server, 'sh', '../logs/download_paper_logs.sh', 'mlp', cwd=checkout / 'elsewhere')
        assert ran.returncode == 0, ran.stderr
    assert names(checkout / 'logs/paper') == ['mlp.pkl'] and 'already there' in ran.stdout
    assert server.requests == [('/logs/mlp.pkl', 0)]


def test_an_unreadable_or_missing_log_is_refused_and_the_others_are_downloaded(server, checkout):
    server.files = {'/logs/mlp.pkl': small_log(), '/logs/c5m.pkl': b'not a log'}
    ran = run(server, 'sh', checkout / 'logs/download_paper_logs.sh', 'c5m', 'chess', 'mlp', cwd=checkout)
    assert ran.returncode == 1 and 'c5m.part.pkl has the right size but is not a readable log' in ran.stderr
    assert 'Traceback' not in ran.stderr
    assert f'cannot reach http://127.0.0.1:{server.server_port}/logs/chess.pkl' in ran.stderr
    assert names(checkout / 'logs/paper') == ['c5m.part.pkl', 'mlp.pkl']
