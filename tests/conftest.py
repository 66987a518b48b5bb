"""Fixtures that several test files use: small runs, composed as the command line composes them, and small data sets."""
import importlib.util
import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import hydra
import numpy as np
import pytest

from trainer import config, process

# The tests wait mostly for the compiler, and their programs run for milliseconds. They use one device unless a test says otherwise.
# Subprocesses inherit these settings.
COMPILE_QUICKLY = '--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false'
os.environ['JAX_NUM_CPU_DEVICES'] = '1'
os.environ['XLA_FLAGS'] = f"{os.environ.get('XLA_FLAGS', '')} {COMPILE_QUICKLY}".strip()

# Runs of 20 steps, which take milliseconds once compiled.
SMALL_MLP = ('mlp', 'model.D=16', 'model.base_D=16', 'model.N=1', 'opt.B=32', 'opt.lr=0.003', 'opt.readout_lr_mult=1', 'T=640',
             'T_eval=64', 'num_evals=6', 'wandb_mode=disabled')
SMALL_TRANSFORMER = ('chess', 'model.D=32', 'model.base_D=32', 'model.dh=16', 'model.N=1', 'model.L=16', 'opt.B=8', 'opt.lr=0.01',
                     'opt.warmup_tokens=0', 'T=2560', 'T_eval=256', 'num_evals=6', 'wandb_mode=disabled')


@pytest.fixture(scope='session', autouse=True)
def compilation_cache():
    """Keeps compiled programs in .jax_cache/ for the next test session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('XDG_CACHE_HOME', str(config.CONFIGS.parent / '.jax_cache'))
        process.enable_compilation_cache()
        yield


@pytest.fixture(scope='session')
def compose():
    """compose(name, *overrides) -> what Hydra composes from configs/NAME.yaml and the overrides."""
    def composed(name, *overrides):
        with hydra.initialize_config_dir(str(config.CONFIGS), version_base=None):
            return hydra.compose(name, list(overrides))

    return composed


@pytest.fixture(scope='session')
def resolve(compose):
    """resolve(name, *overrides) -> config.Run."""
    return lambda *args, **kwargs: config.resolve(compose(*args), **kwargs)


@pytest.fixture(scope='session')
def small_mlp(resolve):
    return lambda *overrides: resolve(*SMALL_MLP, *overrides)


@pytest.fixture(scope='session')
def small_transformer(resolve):
    return lambda ds_path, *overrides: resolve(*SMALL_TRANSFORMER, f'ds_path={ds_path}', *overrides)


@pytest.fixture(scope='session')
def stop_at():
    """stop_at(*steps, number=SIGTERM) -> an on_steps callback that raises the signal once, at each of these step counts."""
    def callback(*steps, number=signal.SIGTERM):
        done, pending = [], list(steps)

        def on_steps(count, metrics):
            done.append(count)
            if pending and sum(done) >= pending[0]:
                del pending[0]
                signal.raise_signal(number)

        return on_steps

    return callback


@pytest.fixture(scope='session')
def lock_holder():
    """lock_holder(folder) -> a context in which another process holds the lock of this run folder."""
    program = ('import fcntl, sys, time; file = open(sys.argv[1], "a"); fcntl.flock(file, fcntl.LOCK_EX); '
               'print("held", flush=True); time.sleep(99)')

    @contextmanager
    def holding(folder):
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, '-c', program, folder / 'lock']
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
            try:
                assert holder.stdout.readline() == 'held\n'
                yield
            finally:
                holder.kill()

    return holding


@pytest.fixture
def write_tokens(tmp_path):
    """write_tokens(meta, train=…, test=…, name=…) -> the folder of a data set; random ids below 54 unless arrays are given."""
    def written(meta=None, name='tokens', **arrays):
        folder = tmp_path / name
        folder.mkdir()
        rng = np.random.default_rng(0)
        for split, size in (('train', 5000), ('test', 1024)):
            arrays.get(split, rng.integers(0, 54, size, np.uint8)).tofile(folder / f'{split}.bin')
        if meta is not None:
            (folder / 'meta.json').write_text(json.dumps(meta))
        return folder

    return written


@pytest.fixture(scope='session')
def published():
    """The folder with the published logs and reference curves, which this project does not ship."""
    folder = os.environ.get('SUPERCOLLAPSE_SHARED')
    if folder is None:
        pytest.skip('SUPERCOLLAPSE_SHARED does not name the folder of published logs')
    return Path(folder)


@pytest.fixture(scope='session')
def loopback():
    """The module of a local W&B server, which this project does not ship."""
    folder = os.environ.get('SUPERCOLLAPSE_SHARED')
    if folder is None:
        pytest.skip('SUPERCOLLAPSE_SHARED does not name the folder that holds tools/wandb_loopback.py, a local W&B server')
    spec = importlib.util.spec_from_file_location('wandb_loopback', Path(folder) / 'tools/wandb_loopback.py')
    module = sys.modules['wandb_loopback'] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
