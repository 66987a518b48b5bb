"""Token files: every format is read as it was written, every fault is one clear line, and no pickle runs code."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from token_files import describe, files, meta
from token_files.atomic import atomic_write

CHECKOUT = Path(__file__).parent.parent


def write_shard(path, tokens, magic=20240520, version=1, count=None):
    header = np.zeros(256, '<i4')
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, '<u2').tobytes())


def write_raw(folder, train=b'abcdefgh' * 100, test=b'abcd' * 100, **described):
    (folder / 'train.bin').write_bytes(train)
    (folder / 'test.bin').write_bytes(test)
    if described:
        (folder / 'meta.json').write_text(json.dumps(described))
    return folder


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize('kind', ['uint8', 'uint16', 'shards'])
def test_tokens_are_read_as_written_and_start_again_at_the_end(tmp_path, kind):
    ids = np.random.default_rng(0).integers(256 if kind == 'uint8' else 50_000, size=1000)
    if kind == 'shards':
        for i, piece in enumerate(np.split(ids, [300, 301, 700])):
            write_shard(tmp_path / f'fw_train_{i:03}.bin', piece)
    else:
        write_raw(tmp_path, ids.astype('u1' if kind == 'uint8' else '<u2').tobytes(), dtype=kind)
    tokens = files.open_tokens(tmp_path)
    assert tokens.size == 1000 and tokens.dtype == (np.uint8 if kind == 'uint8' else np.uint16)
    for start, count in ((0, 10), (299, 3), (295, 500), (990, 20), (12_345, 3000), (999, 1), (1000, 1)):
        np.testing.assert_array_equal(tokens.read(start, count), np.take(ids, np.arange(start, start + count), mode='wrap'))


def test_the_test_split_may_be_called_val(tmp_path):
    (write_raw(tmp_path) / 'test.bin').rename(tmp_path / 'val.bin')
    assert files.open_tokens(tmp_path, 'test').files == [tmp_path / 'val.bin']


def test_the_padding_id_comes_from_the_data_set_and_is_not_0_by_default(tmp_path):
    assert files.open_tokens(write_raw(tmp_path)).meta.pad_id is None
    assert files.open_tokens(write_raw(tmp_path, vocab_size=200, pad_id=7)).meta.pad_id == 7


def test_the_published_meta_pkl_is_read(tmp_path):
    write_raw(tmp_path, bytes([0, 1, 2] * 50))
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 3, 'itos': {0: 'a', 1: 'b', 2: 'c'}}))
    assert files.open_tokens(tmp_path).meta.vocab_size == 3
    assert describe.decode(np.array([2, 0, 1, 3]), meta.read_meta(tmp_path)) == 'cab?'


def test_keys_of_meta_json_take_the_place_of_those_of_meta_pkl(tmp_path):
    write_raw(tmp_path, vocab_size=256)
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 54, 'bos': 1}))
    found = meta.read_meta(tmp_path)
    assert (found.vocab_size, found.bos) == (256, 1)


class Payload:
    def __reduce__(self):
        return os.system, ('touch executed',)


@pytest.mark.parametrize('thing', [Payload(), {'vocab_size': np.int64(54)}, {'vocab_size': 54, 'x': Path('x')}])
def test_a_pickle_that_names_any_function_is_refused(tmp_path, monkeypatch, thing):
    monkeypatch.chdir(tmp_path)
    (write_raw(tmp_path) / 'meta.pkl').write_bytes(pickle.dumps(thing))
    with pytest.raises(ValueError, match='meta.pkl: cannot be read'):
        files.open_tokens(tmp_path)
    assert not (tmp_path / 'executed').exists()


# ---------------------------------------------------------------- faults


def fault(folder, name):
    if name == 'odd':
        write_raw(folder, b'abc', dtype='uint16')
    elif name == 'empty':
        write_raw(folder, b'')
    elif name == 'download':
        (folder / 'train.bin.part').write_bytes(b'abc')
    elif name == 'preparation':
        (folder / '.preparing').mkdir()
    elif name == 'dtype':
        write_raw(folder, dtype='float32')
    elif name == 'count':
        write_raw(folder, tokens={'train.bin': 801})
    elif name == 'vocab':
        write_raw(folder, vocab_size='54')
    elif name == 'words':
        write_raw(folder, vocab_size=2, vocabulary=[1, 2])
    elif name == 'image':
        write_raw(folder, image=[32])
    elif name == 'pad':
        write_raw(folder, pad_id=300)
    elif name == 'counts':
        write_raw(folder, tokens=[800])
    elif name == 'list':
        (write_raw(folder) / 'meta.json').write_text('[1]')
    elif name == 'json':
        (write_raw(folder) / 'meta.json').write_text('{"vocab_size": ')
    elif name == 'magic':
        write_shard(folder / 'x_train_0.bin', range(9), magic=7)
    elif name == 'version':
        write_shard(folder / 'x_train_0.bin', range(9), version=2)
    elif name == 'short':
        write_shard(folder / 'x_train_0.bin', range(9), count=10)


@pytest.mark.parametrize('name, says', [
    ('odd', '3 bytes are not a whole number of uint16'), ('empty', 'train.bin: is empty'),
    ('none', 'no train data; wanted train.bin'), ('download', 'an unfinished download or preparation is there'),
    ('preparation', 'an unfinished download or preparation is there'),
    ('dtype', "dtype='float32' is wrong: Input should be 'uint8' or 'uint16'"),
    ('vocab', "vocab_size='54' is wrong: Input should be a valid integer"),
    ('words', "vocabulary.0='1' is wrong: Input should be a valid string"),
    ('image', "image='[32]' is wrong: List should have at least 2 items"),
    ('counts', "tokens='[800]' is wrong: Input should be a valid dictionary"),
    ('count', '800 tokens, meta.json promises 801'), ('pad', 'pad_id=300, but no uint8 token'),
    ('json', 'meta.json: cannot be read'), ('list', 'it holds a list'),
    ('magic', 'magic number 20240520'), ('version', 'version 2 and 9 uint16 tokens; wanted version 1'),
    ('short', 'version 1 and 10 uint16 tokens; wanted version 1 and 9 tokens'),
])  # fmt: skip
def test_a_fault_is_one_clear_line(tmp_path, name, says):
    fault(tmp_path, name)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        files.open_tokens(tmp_path)
    assert says in str(error.value) and str(tmp_path) in str(error.value) and '\n' not in str(error.value)
    ran = subprocess.run([sys.executable, '-m', 'token_files', tmp_path], cwd=CHECKOUT, capture_output=True, text=True)
    assert ran.returncode == 1 and ran.stderr.startswith('token_files: ') and 'Traceback' not in ran.stderr


def test_a_missing_folder_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match='no such folder; ds_path'):
        files.open_tokens(tmp_path / 'absent')


def test_the_first_id_outside_the_vocabulary_is_named(tmp_path):
    ids = np.zeros(files.BLOCK_TOKENS + 1000, np.uint8)
    ids[files.BLOCK_TOKENS + 7 :] = 64, *[99] * 992  # the first one is in the second block
    write_raw(tmp_path, ids.tobytes())
    tokens = files.open_tokens(tmp_path)
    files.check_ids(tokens, 100)
    with pytest.raises(ValueError, match=rf'train.bin: token {files.BLOCK_TOKENS + 7} is 64, but ids must lie below V=64'):
        files.check_ids(tokens, 64)


# ---------------------------------------------------------------- describing


def test_histogram_and_checksum_of_a_stream(tmp_path, capsys):
    ids = np.random.default_rng(0).integers(40, size=files.BLOCK_TOKENS + 999, dtype=np.uint8)
    sums = {'train.bin': hashlib.sha256(ids.tobytes()).hexdigest()}
    counts = describe.describe_split('train', files.open_tokens(write_raw(tmp_path, ids.tobytes(), sha256=sums)))
    np.testing.assert_array_equal(counts, np.bincount(ids, minlength=256))
    assert '40 different ids from 0 to 39' in capsys.readouterr().out


def test_repeated_sequences_are_found_at_any_position(tmp_path, monkeypatch):
    monkeypatch.setattr(files, 'BLOCK_TOKENS', 37)  # sequences cross the borders of the blocks read
    rng = np.random.default_rng(0)
    documents = [bytes([0, *rng.integers(1, 9, size=n)]) for n in rng.integers(20, 40, size=60)]
    write_raw(tmp_path, b''.join(documents[:50]), b''.join(documents[47:]))  # three in both
    train, test = (files.open_tokens(tmp_path, split) for split in ('train', 'test'))
    assert describe.count_repeated(train, test, 8, bos=0) == (3, 13)
    rows = rng.integers(256, size=(40, 16), dtype=np.uint8)
    write_raw(tmp_path, rows[:30].tobytes(), rows[25:].tobytes())
    train, test = (files.open_tokens(tmp_path, split) for split in ('train', 'test'))
    assert describe.count_repeated(train, test, 16, bos=None) == (5, 15)


def test_a_changed_byte_is_found(tmp_path):
    train, test = os.urandom(100_000), os.urandom(5000)
    write_raw(tmp_path, train, test, sha256={'train.bin': hashlib.sha256(train).hexdigest()})
    describe.describe(tmp_path)
    (tmp_path / 'train.bin').write_bytes(bytes([train[0] ^ 1]) + train[1:])
    with pytest.raises(ValueError, match='its SHA-256 is'):
        describe.describe(tmp_path)


def test_data_that_no_model_can_be_trained_on_is_refused(tmp_path):
    with pytest.raises(ValueError, match='test.bin: 100 tokens are fewer than one sequence of 128'):
        describe.describe(write_raw(tmp_path, test=b'abcd' * 25))
    with pytest.raises(ValueError, match='bos=255 never occurs in train'):
        describe.describe(write_raw(tmp_path, bos=255))


@pytest.mark.parametrize('name', ['2024', 'my: #1', "Austen's", 'Émile 📖'])
def test_the_printed_configuration_names_its_folder(tmp_path, name, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    describe.describe(write_raw(Path(name)))
    assert OmegaConf.create(capsys.readouterr().out).ds_path == name


def test_documents_are_compared_only_where_tokens_are_bytes(tmp_path, capsys):
    describe.describe(write_raw(tmp_path, bos=0, dtype='uint16'))
    assert 'different test blocks of 128 tokens' in capsys.readouterr().out


def test_a_changed_file_has_another_fingerprint(tmp_path):
    before = files.fingerprints(write_raw(tmp_path))
    assert files.fingerprints(tmp_path) == before and before['train.bin'].startswith('800 bytes')
    (tmp_path / 'test.bin').write_bytes(b'abce' + b'abcd' * 99)
    after = files.fingerprints(tmp_path)
    assert after['test.bin'] != before['test.bin'] and after['train.bin'] == before['train.bin']


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize('content', ['α = 1\n', bytes(range(256))])
def test_a_file_is_written_as_a_whole(tmp_path, content):
    path = tmp_path / 'file'
    atomic_write(path, content)
    assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / 'file'
    atomic_write(path, 'old')

    def full(_):
        raise OSError(28, 'disk full')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='disk full'):
        atomic_write(path, 'new')
    assert path.read_text() == 'old'
