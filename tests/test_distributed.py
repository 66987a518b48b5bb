"""One device, several, or several processes: the same losses. Sharded, a state takes its share of each device."""
import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import train
from trainer import distributed

ROOT = Path(train.__file__).parent
# 40 steps on tokens.
WORK = ['-cn', 'chess', 'model.D=16', 'model.base_D=16', 'model.dh=8', 'model.N=1', 'model.L=16', 'opt.B=16', 'opt.lr=0.01',
        'opt.warmup_tokens=0', 'T=10240', 'T_eval=512', 'num_evals=4', 'wandb_mode=disabled']


@pytest.fixture(scope='module')
def tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tokens')
    for split, size in (('train', 5000), ('test', 1024)):
        np.random.default_rng(0).integers(0, 54, size, np.uint8).tofile(folder / f'{split}.bin')
    return folder


def losses(folder):
    return [json.loads(line)['test_loss'] for line in (folder / 'history.jsonl').read_text().splitlines()]


def python(program, *arguments):
    return subprocess.run([sys.executable, '-c', textwrap.dedent(program), *map(str, arguments)], cwd=ROOT, check=True, text=True,
                          stdout=subprocess.PIPE).stdout


@pytest.fixture(scope='module')
def on_devices(tokens, tmp_path_factory):
    """{name: losses} of one run on one virtual device, and sharded over 8, in a process of their own; what XLA says of the memory
    of a larger one; and of a step's FLOPs on one device and on each of eight, the batch in two pieces. (measure_distributed.py trains on
    2, 4 and 8 devices, and on 2 and 4 processes.)"""
    folder = tmp_path_factory.mktemp('devices')
    python('''
        import json, sys
        import hydra, jax
        import config, dry_run, train

        jax.config.update('jax_num_cpu_devices', 8)
        process.enable_compilation_cache()
        configs, out, tokens, *words = sys.argv[1:]
        devices = jax.devices()

        def resolve(*more):
            with hydra.initialize_config_dir(configs, version_base=None):
                return config.resolve(hydra.compose('chess', [*words, f'ds_path={tokens}', *more]))

        for name, n, more in (('1', 1, []), ('sharded', 8, ['model.fsdp_enabled=true'])):
            jax.devices = lambda n=n: devices[:n]
            train.train(resolve(f'run_dir={out}/{name}', *more))
        jax.devices = lambda: devices
        run = resolve('model.D=256', 'model.base_D=256', 'model.dh=64', 'model.fsdp_enabled=true')

        def measure(run, devices):
            return dry_run.measure(run, dry_run.stand_in(run), train.programs, train.peak_rates, devices)

        json.dump(measure(run, devices), open(f'{out}/memory.json', 'w'))
        run = resolve('opt.B_max=8')
        json.dump([measure(run, devices[:n])['step_flops'] for n in (1, 8)], open(f'{out}/flops.json', 'w'))
        ''', ROOT / 'configs', folder, tokens, *WORK[2:])
    found = {path.name: losses(path) for path in folder.iterdir() if path.is_dir()}
    return found, *(json.loads((folder / f'{name}.json').read_text()) for name in ('memory', 'flops'))


# float32 sums over a batch in another order: some 1e-7 a step, over 40 steps
CLOSE = 2e-5


def test_eight_devices_that_share_the_state_compute_what_one_does(on_devices):
    found, *_ = on_devices
    assert found['sharded'] == pytest.approx(found['1'], rel=CLOSE)
    assert found['1'][-1] < 0.99 * found['1'][0]  # it learns: random tokens by how common they are, and by heart


def test_sharding_over_eight_leaves_a_sixth_at_most_on_each(on_devices):
    """Of parameters and moments, from XLA's report: all that a training step is given, data and probe included."""
    _, memory, _ = on_devices
    whole = 3 * 4 * (2 * 64 * 256 + 16 * 256 + 6 * 256**2)  # p floats, and two moments each
    assert whole / 9 < memory['arguments'] <= whole / 6


def test_eight_devices_share_each_piece_of_a_batch(on_devices):
    """XLA's count on one device: an eighth of the examples' FLOPs, and all of the update of the weights, which is small."""
    *_, (alone, shared) = on_devices
    assert alone / 9 < shared < alone / 5  # two devices that do the same work would make it a quarter


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def start(count, *overrides, devices=1):
    """So many processes that train one run together, each with so many devices."""
    port = free_port()
    return [subprocess.Popen([sys.executable, ROOT / 'train.py', *WORK, *map(str, overrides), f'num_processes={count}',
                              f'process_id={i}', f'coordinator=127.0.0.1:{port}'], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             text=True, env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': str(devices)})
            for i in range(count)]


@pytest.mark.slow
def test_two_processes_compute_what_one_does(on_devices, tokens, tmp_path):
    processes = start(2, f'ds_path={tokens}', f'run_dir={tmp_path}/run')
    ended = [p.communicate(timeout=300) for p in processes]
    assert [p.returncode for p in processes] == [0, 0], ended
    assert losses(tmp_path / 'run') == pytest.approx(on_devices[0]['1'], rel=CLOSE)
    assert not (tmp_path / 'run' / 'checkpoints').exists()


def test_a_process_reads_its_rows(monkeypatch):
    monkeypatch.setattr(distributed.jax, 'process_count', lambda: 4)
    rows = []
    for i in range(4):
        monkeypatch.setattr(distributed.jax, 'process_index', lambda i=i: i)
        rows += range(16)[distributed.local_rows(16)]
    assert rows == list(range(16))


def test_a_batch_spreads_over_all_devices_or_over_some_of_the_cores(monkeypatch):
    monkeypatch.setattr(distributed.jax, 'devices', lambda: list(range(8)))
    assert [len(distributed.devices_for(B)) for B in (96, 100, 7, 3)] == [8, 5, 7, 3]
    assert len(distributed.devices_for(96, pieces=4)) == 8 and len(distributed.devices_for(96, pieces=8)) == 6
    monkeypatch.setattr(distributed.jax, 'default_backend', lambda: 'gpu')
    assert len(distributed.devices_for(96)) == 8
    with pytest.raises(ValueError, match='opt.B=100 .* 8 devices; set opt.B to a multiple of 8'):
        distributed.devices_for(100)
