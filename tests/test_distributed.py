"""One device, several devices and several processes give the same losses. A sharded state takes its share of each device."""
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import train
from trainer import checkpoint, distributed, run_folder

ROOT = Path(train.__file__).parent
# 40 steps on tokens.
WORK = ('chess', 'model.D=16', 'model.base_D=16', 'model.dh=8', 'model.N=1', 'model.L=16', 'opt.B=16', 'opt.lr=0.01',
        'opt.warmup_tokens=0', 'T=10240', 'T_eval=512', 'num_evals=4', 'wandb_mode=disabled')
CLOSE = 2e-5  # relative: float32 sums over a batch in another order, some 1e-7 a step, over 40 steps


@pytest.fixture(scope='module')
def tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tokens')
    for split, size in (('train', 5000), ('test', 1024)):
        np.random.default_rng(0).integers(0, 54, size, np.uint8).tofile(folder / f'{split}.bin')
    return folder


def losses(folder):
    return [row['test_loss'] for row in run_folder.read_history(folder)]


@pytest.fixture(scope='module')
def one_device(resolve, tokens, tmp_path_factory):
    """The losses of the run on one device."""
    folder = tmp_path_factory.mktemp('one')
    train.train(resolve(*WORK, f'ds_path={tokens}', f'run_dir={folder}'))
    found = losses(folder)
    assert found[-1] < 0.99 * found[0]  # it learns: how common the tokens are, and the few training tokens by heart
    return found


@pytest.fixture(scope='module')
def eight_devices(tokens, tmp_path_factory):
    """The folder, the findings and the warnings of eight_devices.py, which trains the run sharded over eight virtual devices.

    measure_distributed.py also trains on 2 and 4 devices, and on 2 and 4 processes.
    """
    folder = tmp_path_factory.mktemp('eight')
    done = subprocess.run([sys.executable, ROOT / 'tests' / 'eight_devices.py', folder, *WORK, f'ds_path={tokens}'], text=True,
                          capture_output=True, env={**os.environ, 'JAX_NUM_CPU_DEVICES': '8'})
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(folder=folder, stderr=done.stderr, **json.loads(done.stdout))


def test_eight_devices_that_share_the_state_compute_what_one_does(one_device, eight_devices):
    assert losses(eight_devices.folder / 'sharded') == pytest.approx(one_device, rel=CLOSE)


def test_ten_steps_of_every_sharding_are_those_of_one_device(eight_devices):
    """To 1e-6, the metrics relatively: float32 sums in another order. Weights, of order 0.1, are split with FSDP, else whole."""
    for name, (weights, metrics, share) in eight_devices.differences.items():
        assert weights < 1e-6 and metrics < 1e-6, (name, weights, metrics)
        assert share == (1 / 8 if name.startswith('split') else 1), name
    assert {'whole', 'split', 'MLP'} <= set(eight_devices.differences)


def test_sharding_over_eight_leaves_a_sixth_at_most_on_each(eight_devices):
    """Parameters and moments, with data and probe: all arguments of a training step, from XLA's report."""
    whole = 3 * 4 * (2 * 64 * 256 + 16 * 256 + 6 * 256**2)  # bytes: p float32 numbers, and two moments of each
    assert whole / 9 < eight_devices.arguments <= whole / 6


def test_eight_devices_share_each_microbatch_and_each_batch_of_an_mlp(eight_devices):
    """XLA's FLOPs of one device: an eighth of the examples', and the whole update of the weights, which is small."""
    for alone, shared in eight_devices.step_flops:
        assert alone / 9 < shared < alone / 5  # a quarter if two devices computed the same examples


def test_sharded_checkpoint_is_restored_into_its_shardings(eight_devices):
    found = eight_devices.checkpoint
    assert found['step'] == 20 and found['shardings kept'] and found['shardings of the stacked state']
    assert len(found['bytes on a device']) == 8 and max(found['bytes on a device']) < found['bytes'] / 6


def test_sharded_run_resumes_bit_for_bit(eight_devices):
    history = [(eight_devices.folder / name / 'history.jsonl').read_text() for name in ('sharded', 'interrupted')]
    assert history[0] == history[1] and 'resuming from step 20 of 40' in eight_devices.stderr


def test_checksum_on_shards_is_that_of_the_whole_state_and_finds_a_flipped_bit(eight_devices):
    found = eight_devices.checkpoint
    assert found['checksum'] == found['checksum of whole arrays']
    assert found['undetected bit flips'] == []
    assert 'is damaged (the checksum does not match)' in eight_devices.stderr  # Orbax does not find every flip itself


def test_wide_evaluation_on_two_devices_is_that_on_one():
    """The shape at which jaxlib 0.10.2 once evaluated rows wrongly without YNNPACK fusions (benchmarks/check_jaxlib.py)."""
    environment = {**os.environ, 'JAX_NUM_CPU_DEVICES': '2', 'XLA_FLAGS': ''}  # compiled as users have it
    done = subprocess.run([sys.executable, ROOT / 'tests' / 'wide_evaluation.py'], text=True, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    one, two = json.loads(done.stdout)
    variances = {'Bgvar', 'gvar', 'Buvar', 'uvar'}
    # float32 sums in another order: 2e-7 of a sum. A variance is a difference of batch gradients, which rounds at 1e-6.
    assert {k: two[k] for k in two.keys() - variances} == pytest.approx({k: one[k] for k in one.keys() - variances}, rel=1e-6)
    assert {k: two[k] for k in variances} == pytest.approx({k: one[k] for k in variances}, rel=1e-5)


def test_a_compiler_option_that_this_jaxlib_does_not_know_is_left_out():
    assert distributed.accepted('xla_cpu_no_such_option', 'x') == {}
    assert distributed.accepted('xla_cpu_multi_thread_eigen', False) == {'xla_cpu_multi_thread_eigen': False}


# Several processes

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def start(count, *overrides, devices=1):
    """`count` processes that train one run together, each with `devices` devices."""
    port = free_port()
    command = [sys.executable, ROOT / 'train.py', '-cn', *WORK, *map(str, overrides), f'num_processes={count}',
               f'coordinator=127.0.0.1:{port}']
    environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': str(devices)}
    return [subprocess.Popen([*command, f'process_id={i}'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             env=environment) for i in range(count)]


@pytest.mark.slow
def test_two_processes_compute_what_one_does(one_device, tokens, tmp_path):
    processes = start(2, f'ds_path={tokens}', f'run_dir={tmp_path}/run')
    ended = [p.communicate(timeout=300) for p in processes]
    assert [p.returncode for p in processes] == [0, 0], ended
    assert losses(tmp_path / 'run') == pytest.approx(one_device, rel=CLOSE)
    assert not (tmp_path / 'run' / 'checkpoints').exists()


@pytest.mark.slow
def test_two_processes_that_share_the_weights_resume_bit_for_bit_after_a_kill(tokens, tmp_path):
    """At D = 512 the hidden weights are large enough to be split."""
    work = (f'ds_path={tokens}', 'model.D=512', 'model.dh=64', 'model.fsdp_enabled=true', 'checkpoint_minutes=0.0001')
    for name, killed in (('whole', False), ('killed', True), ('killed', False)):
        processes = start(2, *work, f'run_dir={tmp_path}/{name}')
        while killed and not checkpoint.steps([tmp_path / name]) and all(p.poll() is None for p in processes):
            time.sleep(0.01)
        for p in processes:
            if killed:
                p.kill()
        ended = [p.communicate(timeout=300) for p in processes]
        assert [p.returncode for p in processes] == [-9 * killed] * 2, ended
    assert 'resuming from step' in ended[0][1]
    whole, resumed = ((tmp_path / name / 'history.jsonl').read_text() for name in ('whole', 'killed'))
    assert whole == resumed


@pytest.mark.slow
def test_error_of_one_process_ends_all_with_one_line(tokens, tmp_path, lock_holder):
    """Only the main process locks the folder. The other one ends with it, and does not wait for its next message."""
    with lock_holder(tmp_path / 'run'):
        processes = start(2, f'ds_path={tokens}', f'run_dir={tmp_path}/run')
        stderr, codes, ends = [], [], []
        for p in processes:
            stderr.append(p.communicate(timeout=300)[1])
            codes.append(p.returncode)
            ends.append(time.monotonic())
    assert codes == [1, 1]
    assert ends[1] - ends[0] < 5
    for text in stderr:
        (line,) = [line for line in text.splitlines() if 'error' in line.lower()]
        assert line.startswith('error: ') and 'is being trained by another process' in line and 'Traceback' not in text
    assert 'error: process 0: ' in stderr[1]


def test_each_process_reads_its_rows_of_a_batch(monkeypatch):
    monkeypatch.setattr(distributed.jax, 'process_count', lambda: 4)
    rows = []
    for i in range(4):
        monkeypatch.setattr(distributed.jax, 'process_index', lambda i=i: i)
        rows += range(16)[distributed.local_rows(16)]
    assert rows == list(range(16))


def test_batch_is_split_over_all_devices_or_over_some_of_the_cores(monkeypatch):
    def devices(platform):
        monkeypatch.setattr(distributed.jax, 'devices', lambda: [SimpleNamespace(platform=platform)] * 8)

    devices('cpu')
    assert [len(distributed.devices_for(B)) for B in (96, 100, 7, 3)] == [8, 5, 7, 3]
    assert [len(distributed.devices_for(96, microbatches)) for microbatches in (4, 8)] == [8, 6]
    devices('gpu')
    assert len(distributed.devices_for(96)) == 8
    with pytest.raises(ValueError, match='opt.B=100 .* 8 devices; set opt.B to a multiple of 8'):
        distributed.devices_for(100)
