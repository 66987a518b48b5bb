"""A whole run with Muon: seeds together, resume, sharding, memory, and what its record says of the optimiser and the decay."""
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import train
from analysis import table as logs
from trainer import config, dry_run, process, run_folder

ROOT = Path(train.__file__).parent
MUON = ('opt.name=muon', 'opt.lr=0.02', 'opt.embed_lr_mult=0.1', 'opt.readout_lr_mult=0.1', 'opt.decay_timescale=0.5')


@pytest.fixture(scope='module')
def straight(small_mlp, tmp_path_factory):
    """The folder of a run of two seeds, trained together without interruption."""
    folder = tmp_path_factory.mktemp('straight')
    train.train(small_mlp(*MUON, 'seeds=[0,1]', f'run_dir={folder}'))
    return folder


def history(folder):
    return (folder / 'history.jsonl').read_text()


def losses(folder):
    return [row['test_loss'] for row in run_folder.read_history(folder)]


def test_it_learns_and_seeds_trained_together_equal_seeds_trained_alone(small_mlp, straight, tmp_path):
    train.train(small_mlp(*MUON, 'seed=1', f'run_dir={tmp_path}'))
    assert losses(tmp_path) == pytest.approx(losses(straight / 'seed1'), rel=1e-5)  # float32 sums in another order
    assert losses(straight / 'seed0') != pytest.approx(losses(tmp_path), rel=1e-3)  # the control
    assert losses(tmp_path)[-1] < 0.99 * losses(tmp_path)[0]


def test_interrupted_run_resumes_bit_for_bit(small_mlp, straight, tmp_path, stop_at):
    run = small_mlp(*MUON, 'seeds=[0,1]', f'run_dir={tmp_path}')
    with pytest.raises(process.Interrupted):
        train.train(run, stop_at(7))
    assert history(tmp_path / 'seed1') != history(straight / 'seed1')  # the control: rows are missing
    train.train(run)
    for seed in ('seed0', 'seed1'):
        assert history(tmp_path / seed) == history(straight / seed)


def test_the_record_says_which_optimiser_and_decay_and_lacks_the_preconditioned_trace(straight):
    table = logs.load(straight)
    assert set(table['optimizer']) == {'muon'} and set(table['decay_timescale']) == {0.5}
    np.testing.assert_allclose(table['decay_per_step'], 1 / (0.5 * 20))  # of 20 steps
    assert (table['weight_decay'] == 0).all() and (table['independent_decay'] == 0).all()
    assert table['Bgvar'].notna().all()
    assert not {'Buvar', 'uvar', 'u2_mean', 'umean2'} & {column for column in table if table[column].notna().any()}


TWO_DEVICES = """
import sys
import hydra
import train
from trainer import config, process, programs

process.enable_compilation_cache()
programs.WHOLE_BYTES = 0  # the weights of this small model are split too
with hydra.initialize_config_dir(str(config.CONFIGS), version_base=None):
    train.train(config.resolve(hydra.compose(sys.argv[1], sys.argv[2:])))
"""


def test_a_run_sharded_over_two_devices_computes_what_one_does(small_transformer, write_tokens, tmp_path):
    run = small_transformer(write_tokens(), *MUON, f'run_dir={tmp_path}/one')
    train.train(run)
    settings = config.flatten(config.identity(run, 0)) | {'run_dir': f'{tmp_path}/two', 'model.fsdp_enabled': True}
    overrides = [f'{key}={"null" if value is None else value}' for key, value in settings.items()] + ['wandb_mode=disabled']
    done = subprocess.run([sys.executable, '-c', TWO_DEVICES, 'chess', *overrides], cwd=ROOT, text=True, capture_output=True,
                          env={**os.environ, 'JAX_NUM_CPU_DEVICES': '2'})
    assert done.returncode == 0, done.stderr
    # float32 sums in another order; five Newton-Schulz steps amplify what they change in small singular values up to 500-fold
    assert losses(tmp_path / 'two') == pytest.approx(losses(tmp_path / 'one'), rel=1e-4)


def test_muon_keeps_one_moment_of_hidden_weights_and_adam_two_of_the_others(small_mlp):
    run = small_mlp(*MUON, 'seeds=[0,1,2]')
    found, groups = dry_run.measure(run, dry_run.open_stand_in(run), jax.devices()), run.derived.params_by_role
    counts = 2 + 3  # steps of Muon and of Adam; optax also keeps the three coefficients of Newton-Schulz
    assert found['moments'] == 3 * 4 * (groups['hidden'] + 2 * (groups['input'] + groups['output']) + counts)
    of_adam = small_mlp('seeds=[0,1,2]')
    assert found['moments'] < 0.7 * dry_run.measure(of_adam, dry_run.open_stand_in(of_adam), jax.devices())['moments']
