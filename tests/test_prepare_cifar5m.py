"""CIFAR-5M preparation: equal to plain NumPy, in little memory, with the same bytes after kills."""

import json
import resource
import shutil
import subprocess
import sys

import killing
import make_images
import numpy as np
import pytest

import prepare_cifar5m

COUNTS = (5000, 300, 4097)  # images: more than a block of 4,096, less than one, one more than one


@pytest.fixture(scope='session')
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp('parts')
    for i, count in enumerate(COUNTS):
        make_images.write_part(folder / f'cifar5m_part{i}.npz', count, seed=i)
    return sorted(folder.iterdir())


@pytest.fixture(scope='session')
def prepared(parts, tmp_path_factory):
    out = tmp_path_factory.mktemp('cifar5m')
    ran = killing.run('prepare_cifar5m.py', *parts, '--out', out)
    assert ran.returncode == 0, ran.stderr
    return out


def test_the_result_equals_plain_numpy(parts, prepared):
    grey = np.concatenate([np.load(part)['X'].mean(axis=-1).astype(np.uint8).reshape(-1, 1024) for part in parts])
    test = np.sort(np.random.default_rng(2357).choice(sum(COUNTS), 2000, replace=False))
    train = np.fromfile(prepared / 'train.bin', np.uint8).reshape(-1, 1024)
    np.testing.assert_array_equal(train, np.delete(grey, test, axis=0))
    np.testing.assert_array_equal(np.fromfile(prepared / 'test.bin', np.uint8).reshape(-1, 1024), grey[test])


def test_grey_is_the_truncated_mean_for_every_sum():
    r, g = np.meshgrid(np.arange(256), np.arange(256))
    for b in (0, 1, 2, 255):
        colour = np.stack([r, g, np.full_like(r, b)], -1).reshape(-1, 3).astype(np.uint8)
        np.testing.assert_array_equal(prepare_cifar5m.grey(colour), colour.mean(axis=-1).astype(np.uint8))


def test_meta_has_no_padding(prepared):
    meta = json.loads((prepared / 'meta.json').read_text())
    assert meta['vocab_size'] == 256 and 'pad_id' not in meta and 'bos' not in meta  # 0 is a black pixel
    assert meta['tokens'] == {'train.bin': (sum(COUNTS) - 2000) * 1024, 'test.bin': 2000 * 1024}


def test_memory_does_not_grow_with_the_part(tmp_path):
    peaks = []
    for count in (4096, 12 * 4096):  # 12 and 151 MB of colour
        make_images.write_part(tmp_path / f'{count}.npz', count, seed=0)
        code = ('import sys, pathlib, resource, prepare_cifar5m; part = pathlib.Path(sys.argv[1]); '
                'prepare_cifar5m.make([part], part.with_suffix("")); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)')
        ran = subprocess.run([sys.executable, '-c', code, tmp_path / f'{count}.npz'], cwd=killing.HERE, capture_output=True,
                             text=True, check=True)
        peaks.append(int(ran.stdout))  # KiB
    assert peaks[1] - peaks[0] < 20_000  # room for the memory allocator; loading the part would add 139,000


def test_killed_runs_end_in_the_same_bytes(parts, prepared, tmp_path):
    out = tmp_path / 'out'
    killing.kill_at_random('prepare_cifar5m.py', [*parts, '--out', out], out, killing.checksums(prepared), kills=3, seconds=0.6)


def broken_parts(part, folder):
    whole, X = part.read_bytes(), np.load(part)['X']
    (folder / 'half.npz').write_bytes(whole[: len(whole) // 2])
    bit = len(whole) // 2
    (folder / 'bit.npz').write_bytes(whole[:bit] + bytes([whole[bit] ^ 1]) + whole[bit + 1 :])
    np.savez(folder / 'dtype.npz', X=X.astype(np.float32))
    np.savez(folder / 'shape.npz', X=X.transpose(0, 3, 1, 2))
    np.savez(folder / 'none.npz', images=X)
    np.savez(folder / 'fortran.npz', X=np.asfortranarray(X))
    np.savez(folder / 'few.npz', X=X[:100])
    np.savez_compressed(folder / 'stream.npz', X=X)
    np.savez(folder / 'header.npz', X=X)
    for name, at, what in (('stream', 60, bytes(40)), ('header', (folder / 'header.npz').read_bytes().index(b'(300'), b'((((')):
        whole = (folder / f'{name}.npz').read_bytes()
        (folder / f'{name}.npz').write_bytes(whole[:at] + what + whole[at + len(what) :])


def test_a_kill_while_files_are_renamed_ends_in_the_same_bytes(parts, prepared, tmp_path):
    out = tmp_path / 'out'
    shutil.copytree(prepared, out)
    (out / '.preparing').mkdir()
    for name in ('meta.json', 'test.bin'):  # train.bin has been renamed, the others have not
        (out / name).rename(out / '.preparing' / name)
    ran = killing.run('prepare_cifar5m.py', *parts, '--out', out)
    assert ran.returncode == 0, ran.stderr
    assert killing.checksums(out) == killing.checksums(prepared)


def test_corrected_options_start_over(parts, prepared, tmp_path):
    out = tmp_path / 'out'
    (out / '.preparing').mkdir(parents=True)  # a killed run with other options
    (out / '.preparing' / 'train.bin').write_bytes(b'unfinished')
    ran = killing.run('prepare_cifar5m.py', *parts, '--out', out)
    assert ran.returncode == 0, ran.stderr
    assert killing.checksums(out) == killing.checksums(prepared)


@pytest.mark.parametrize('name, says', [
    ('half.npz', 'cannot be read'), ('bit.npz', 'cannot be read (Bad CRC-32'), ('dtype.npz', 'wanted [images, 32, 32, 3] uint8'),
    ('shape.npz', 'X is [300, 3, 32, 32] uint8'), ('none.npz', "no item named 'X.npy'"), ('fortran.npz', 'Fortran order'),
    ('few.npz', '--test-images is 2000, but there are 100 images'), ('absent.npz', 'no such file'),
    ('stream.npz', 'cannot be read'), ('header.npz', 'cannot be read'),
])  # fmt: skip
def test_bad_input_is_one_clear_line(parts, tmp_path, name, says):
    broken_parts(parts[1], tmp_path)
    ran = killing.run('prepare_cifar5m.py', tmp_path / name, '--out', tmp_path / 'out',
                      '--test-images', 2000 if name == 'few.npz' else 50)
    last = ran.stderr.splitlines()[-1]
    assert ran.returncode == 1 and last.startswith('prepare_cifar5m: ') and says in last, ran.stderr
    assert 'Traceback' not in ran.stderr and not list(tmp_path.glob('out/*.bin'))


def test_a_full_disk_leaves_no_result_and_the_next_run_succeeds(parts, prepared, tmp_path):
    out, limit = tmp_path / 'out', COUNTS[0] * 1024  # bytes of one file: the first part fits, all parts do not
    ran = killing.run('prepare_cifar5m.py', *parts, '--out', out,
                      preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert ran.returncode == 1 and 'free some space' in ran.stderr.splitlines()[-1], ran.stderr
    assert not list(out.glob('*.bin'))
    assert killing.run('prepare_cifar5m.py', *parts, '--out', out).returncode == 0
    assert killing.checksums(out) == killing.checksums(prepared)
