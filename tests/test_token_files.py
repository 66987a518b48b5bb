"""Token files: every format reads as what was written, every fault is one clear line, and no pickle runs code."""

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

from token_files import files as dataset

HERE = Path(__file__).parent.parent


def write_shard(path, tokens, magic=20240520, version=1, count=None):
    header = np.zeros(256, '<i4')
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, '<u2').tobytes())


def write_raw(folder, train=b'abcdefgh' * 100, test=b'abcd' * 100, **meta):
    (folder / 'train.bin').write_bytes(train)
    (folder / 'test.bin').write_bytes(test)
    if meta:
        (folder / 'meta.json').write_text(json.dumps(meta))
    return folder


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize('kind', ['uint8', 'uint16', 'shards'])
def test_stream_reads_as_written_and_wraps(tmp_path, kind):
    ids = np.random.default_rng(0).integers(256 if kind == 'uint8' else 50_000, size=1000)
    if kind == 'shards':
        for i, piece in enumerate(np.split(ids, [300, 301, 700])):
            write_shard(tmp_path / f'fw_train_{i:03}.bin', piece)
    else:
        write_raw(tmp_path, ids.astype('u1' if kind == 'uint8' else '<u2').tobytes(), dtype=kind)
    tokens = dataset.open_tokens(tmp_path)
    assert tokens.size == 1000 and tokens.dtype == (np.uint8 if kind == 'uint8' else np.uint16)
    for start, count in ((0, 10), (299, 3), (295, 500), (990, 20), (12_345, 3000), (999, 1), (1000, 1)):
        np.testing.assert_array_equal(tokens.read(start, count), np.take(ids, np.arange(start, start + count), mode='wrap'))


def test_test_split_may_be_called_val(tmp_path):
    (write_raw(tmp_path) / 'test.bin').rename(tmp_path / 'val.bin')
    assert dataset.open_tokens(tmp_path, 'test').files == (tmp_path / 'val.bin',)


def test_padding_is_what_the_data_set_says_not_id_0(tmp_path):
    assert dataset.open_tokens(write_raw(tmp_path)).pad_id is None
    assert dataset.open_tokens(write_raw(tmp_path, vocab_size=200, pad_id=7)).pad_id == 7


def test_published_meta_is_read(tmp_path):
    write_raw(tmp_path, bytes([0, 1, 2] * 50))
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 3, 'itos': {0: 'a', 1: 'b', 2: 'c'}}))
    assert dataset.open_tokens(tmp_path).vocab_size == 3
    assert dataset.decode(np.array([2, 0, 1]), dataset.read_meta(tmp_path)) == 'cab'


class Payload:
    def __reduce__(self):
        return os.system, ('touch executed',)


@pytest.mark.parametrize('thing', [Payload(), {'vocab_size': np.int64(54)}, {'vocab_size': 54, 'x': Path('x')}])
def test_a_pickle_that_names_any_function_is_refused(tmp_path, monkeypatch, thing):
    monkeypatch.chdir(tmp_path)
    (write_raw(tmp_path) / 'meta.pkl').write_bytes(pickle.dumps(thing))
    with pytest.raises(ValueError, match='meta.pkl: cannot be read'):
        dataset.open_tokens(tmp_path)
    assert not (tmp_path / 'executed').exists()


# ---------------------------------------------------------------- faults


def fault(folder, name):
    if name == 'odd':
        write_raw(folder, b'abc', dtype='uint16')
    elif name == 'empty':
        write_raw(folder, b'')
    elif name == 'half-made':
        (folder / 'train.bin.part').write_bytes(b'abc')
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
    elif name == 'json':
        (write_raw(folder) / 'meta.json').write_text('{"vocab_size": ')
    elif name == 'disagree':
        (write_raw(folder, vocab_size=256) / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 54}))
    elif name == 'magic':
        write_shard(folder / 'x_train_0.bin', range(9), magic=7)
    elif name == 'version':
        write_shard(folder / 'x_train_0.bin', range(9), version=2)
    elif name == 'short':
        write_shard(folder / 'x_train_0.bin', range(9), count=10)


@pytest.mark.parametrize('name, says', [
    ('odd', '3 bytes are not a whole number of uint16'), ('empty', 'train.bin: is empty'),
    ('none', 'no train data; wanted train.bin'), ('half-made', 'half-made file'),
    ('dtype', "dtype='float32'"), ('count', '800 tokens, meta.json promises 801'),
    ('words', 'vocabulary=[1, 2] is not a list of strings'), ('image', 'image=[32] is not [rows, columns]'),
    ('pad', 'pad_id=300, but no uint8 token'), ('counts', 'tokens=[800] is not {file: count}'),
    ('vocab', "vocab_size='54'"), ('json', 'meta.json: cannot be read'), ('disagree', 'vocab_size is 256, but 54 in meta.pkl'),
    ('magic', 'magic number 20240520'), ('version', 'wanted version 1'), ('short', 'promises 10 uint16 tokens, it holds 9'),
])  # fmt: skip
def test_a_fault_is_one_clear_line(tmp_path, name, says):
    fault(tmp_path, name)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        dataset.open_tokens(tmp_path)
    assert says in str(error.value) and str(tmp_path) in str(error.value) and '\n' not in str(error.value)
    ran = subprocess.run([sys.executable, '-m', 'dataset', tmp_path], cwd=HERE, capture_output=True, text=True)
    assert ran.returncode == 1 and ran.stderr.startswith('dataset: ') and 'Traceback' not in ran.stderr


def test_a_missing_folder_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match='no such folder; ds_path'):
        dataset.open_tokens(tmp_path / 'absent')


def test_the_first_id_outside_the_vocabulary_is_named(tmp_path):
    ids = np.zeros(dataset.BLOCK + 1000, np.uint8)
    ids[dataset.BLOCK + 7 :] = 64, *[99] * 992  # the first one is in the second block
    write_raw(tmp_path, ids.tobytes())
    tokens = dataset.open_tokens(tmp_path)
    dataset.check_ids(tokens, 100)
    with pytest.raises(ValueError, match=rf'train.bin: token {dataset.BLOCK + 7} is 64, but ids must lie below V=64'):
        dataset.check_ids(tokens, 64)


# ---------------------------------------------------------------- describing


def test_entropy_of_known_frequencies():
    assert dataset.entropy(np.array([5, 5, 0, 5, 5])) == pytest.approx(np.log(4), rel=1e-12)  # four equal ids
    assert dataset.entropy(np.array([0, 9])) == 0


def test_histogram_and_checksum_of_a_stream(tmp_path):
    ids = np.random.default_rng(0).integers(40, size=dataset.BLOCK + 999, dtype=np.uint8)
    counts, sums = dataset.histogram(dataset.open_tokens(write_raw(tmp_path, ids.tobytes())))
    np.testing.assert_array_equal(counts, np.bincount(ids, minlength=256))
    assert sums == {'train.bin': hashlib.sha256(ids.tobytes()).hexdigest()}


def test_repeated_sequences_are_found_wherever_they_stand(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, 'BLOCK', 37)  # sequences lie across the blocks read
    rng = np.random.default_rng(0)
    documents = [bytes([0, *rng.integers(1, 9, size=n)]) for n in rng.integers(20, 40, size=60)]
    write_raw(tmp_path, b''.join(documents[:50]), b''.join(documents[47:]))  # three in both
    train, test = (dataset.open_tokens(tmp_path, split) for split in ('train', 'test'))
    assert dataset.repeated(train, test, 8, bos=0) == (3, 13)
    rows = rng.integers(256, size=(40, 16), dtype=np.uint8)
    write_raw(tmp_path, rows[:30].tobytes(), rows[25:].tobytes())
    train, test = (dataset.open_tokens(tmp_path, split) for split in ('train', 'test'))
    assert dataset.repeated(train, test, 16, bos=None) == (5, 15)


def test_validator_finds_a_changed_byte(tmp_path):
    train, test = os.urandom(100_000), os.urandom(5000)
    write_raw(tmp_path, train, test, sha256={'train.bin': hashlib.sha256(train).hexdigest()})
    dataset.describe(tmp_path, None)
    (tmp_path / 'train.bin').write_bytes(bytes([train[0] ^ 1]) + train[1:])
    with pytest.raises(ValueError, match='its SHA-256 is'):
        dataset.describe(tmp_path, None)


def test_validator_refuses_what_no_model_can_be_trained_on(tmp_path):
    with pytest.raises(ValueError, match='test.bin: 100 tokens are fewer than one sequence of 128'):
        dataset.describe(write_raw(tmp_path, test=b'abcd' * 25), None)
    with pytest.raises(ValueError, match='bos=255 never occurs in train'):
        dataset.describe(write_raw(tmp_path, bos=255), None)


@pytest.mark.parametrize('name', ['2024', 'my: #1', "Austen's"])
def test_a_configuration_names_its_folder_whatever_that_is_called(tmp_path, name, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    dataset.describe(write_raw(Path(name)), None)
    assert OmegaConf.create(capsys.readouterr().out).ds_path == name


def test_documents_are_told_apart_by_a_byte_only(tmp_path, capsys):
    dataset.describe(write_raw(tmp_path, bos=0, dtype='uint16'), None)
    assert 'different test blocks of 128 tokens' in capsys.readouterr().out  # not documents: blocks were compared


def test_validator_compares_with_a_configuration(tmp_path, capsys):
    write_raw(tmp_path, os.urandom(3_000_000), os.urandom(2_100_000))
    dataset.describe(tmp_path, 'cifar5m')
    assert 'cifar5m: fits (V=256, L=1024' in capsys.readouterr().out
    with pytest.raises(ValueError, match='256 ids, but chess has model.V=64; set model.V=256'):
        dataset.describe(tmp_path, 'chess')
    with pytest.raises(FileNotFoundError, match='no such configuration'):
        dataset.describe(tmp_path, 'absent')
