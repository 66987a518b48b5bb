"""Logs saved from folders and from W&B hold every evaluation of the finished runs; the others are named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import save_logs
from analysis import table as logs
from tests.test_table import run_folder


def program(*arguments, environment=None):
    return subprocess.run([sys.executable, 'save_logs.py', *map(str, arguments)], capture_output=True, text=True,
                          env=environment, cwd=Path(save_logs.__file__).parent)


def folders(tmp_path):
    losses = list(np.geomspace(3, 1, 11))
    run_folder(tmp_path / 'runs/mine/a', losses, seed=0)
    run_folder(tmp_path / 'runs/mine/b', list(np.geomspace(3, 1.1, 11)), seed=1)
    run_folder(tmp_path / 'runs/mine/copy', losses, seed=0)
    run_folder(tmp_path / 'runs/mine/killed', losses[:4], state=None, tail='{"step":')
    run_folder(tmp_path / 'runs/mine/gone', losses[:4], state='diverged')
    return tmp_path / 'runs'


def test_from_folders(tmp_path):
    out = tmp_path / 'log.parquet'
    done = program('--runs', folders(tmp_path), '--tag', 'mine', '--out', out)
    assert done.returncode == 0 and '2 runs, 22 evaluations' in done.stdout
    assert '1 diverged left out: mine/gone' in done.stderr and '1 unfinished left out: mine/killed' in done.stderr
    assert '1 runs are there twice' in done.stderr
    first = out.read_bytes()
    program('--runs', tmp_path / 'runs', '--tag', 'mine', '--out', out)
    assert out.read_bytes() == first                                            # saving again changes nothing
    table = logs.load(out)
    assert len(table) == 22 and not list(tmp_path.glob('*.tmp*')) and 'Buvar' not in table
    assert (table['num_test_batches'] == 7).all()
    whole = logs.clean(logs.load(tmp_path / 'runs'))[0]
    np.testing.assert_array_equal(np.sort(table['test_loss']), np.sort(whole['test_loss']))
    origin = json.loads(pq.read_schema(out).metadata[logs.METADATA_KEY])
    assert (origin['revision'], origin['device']) == (['abc1234'], ['cpu'])
    assert origin['hours'] == 0.2                                               # two runs of two seeds each, 720 s together


@pytest.mark.parametrize('arguments, words', [
    ([], 'either --runs DIR'), (['--runs', 'RUNS', '--project', 'p', '--tag', 'mine'], 'either --runs DIR'),
    (['--runs', 'RUNS', '--tag', 'other', '--out', 'x.parquet'], 'no run tagged other; tags there: mine'),
    (['--runs', 'RUNS'], 'give --tag'), (['--runs', 'RUNS', '--tag', 'mine', '--where', 'D=1'], 'no run with D=1')])
def test_errors_are_one_line(tmp_path, arguments, words):
    folder = str(folders(tmp_path))
    done = program(*[folder if a == 'RUNS' else a for a in arguments])
    assert done.returncode == 2 and words in done.stderr.splitlines()[-1] and 'Traceback' not in done.stderr


def test_without_a_login_the_error_names_the_command(tmp_path):
    environment = {'PATH': os.environ['PATH'], 'HOME': str(tmp_path), 'WANDB_BASE_URL': 'http://127.0.0.1:9'}  # no server there
    done = program('--project', 'p', '--tag', 'mine', environment=environment)
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and 'wandb login' in done.stderr


TRAIN = """
import sys, wandb
name, rows, code, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
run = wandb.init(project='p', entity='e', name=name, tags=['mine'], settings=wandb.Settings(silent=True, console='off'),
                 config={'model.D': 64, 'D': 64, 'opt.lr': 0.01, 'lr': 0.01, 'opt.B': 4, 'B': 4, 'seed': seed, 'T': 4 * rows,
                         'num_params': 100, 'opt.schedule': 'linear', 'schedule': 'linear', 'wandb_tag': 'mine'})
for step in range(rows):
    row = {'step': step, 'tokens': 4 * step, 'compute': 2400 * step, 'lr': 0.01, 'test_loss': 3 / (1 + step)}
    run.log({**row, 'Buvar': float('nan')} if step == 0 else {**row, 'Buvar': 1.0})
run.finish(exit_code=code)
"""


FOREIGN = """
import sys, wandb
name, width, lost = sys.argv[1], int(sys.argv[2]), sys.argv[3] == 'lost'
run = wandb.init(project='foreign', entity='e', name=name, settings=wandb.Settings(silent=True, console='off'),
                 config={'model': {'n_params': 10 * width}, 'optimizer': {'learning_rate': 0.01}})
for step in range(1, 41):
    rates = {'throughput/total_tokens': 64 * step, 'optim/lr': 0.01 * (1 - step / 40), 'train/CrossEntropyLoss': 9 / step}
    run.log(rates, step=step)
    if step % 10 == 0 and not lost:
        pile = float('nan') if step == 20 else 4 / step
        run.log({'eval/c4/CrossEntropyLoss': 5 / step, 'eval/pile/CrossEntropyLoss': pile}, step=step)
run.finish()
"""


def test_runs_of_other_code_from_wandb(loopback, tmp_path):
    """Losses every ten steps beside rates at every step, two runs of one name, and a run without a validation loss."""
    maps = [part for one in ('num_params=config:model.n_params', 'tokens=history:throughput/total_tokens', 'lr=history:optim/lr',
                             'loss.c4=history:eval/c4/CrossEntropyLoss', 'loss.pile=history:eval/pile/CrossEntropyLoss',
                             'peak_lr=config:optimizer.learning_rate', 'step=history:_step') for part in ('--map', one)]
    with loopback.WandbLoopback() as server:
        environment = server.env(WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL='1', WANDB_DIR=str(tmp_path))
        training = [subprocess.Popen([sys.executable, '-c', FOREIGN, *arguments], cwd=tmp_path, env=environment)
                    for arguments in (('small', '1', ''), ('large', '2', ''), ('large', '4', ''), ('blind', '8', 'lost'))]
        assert [one.wait(120) for one in training] == [0] * 4
        save = ('--project', 'foreign', '--entity', 'e', '--out')
        done = program(*save, tmp_path / 'log.parquet', *maps, environment=environment)
        trained = program(*save, tmp_path / 'train.parquet', *maps[:6], '--map', 'train_loss=history:train/CrossEntropyLoss',
                          '--smooth', '0.2', environment=environment)
        wrong = program(*save, tmp_path / 'none.parquet', *maps, '--map', 'num_params=config:model.nparams',
                        environment=environment)
    assert done.returncode == 0, done.stderr
    assert '3 runs, 12 evaluations' in done.stdout and 'left out: blind' in done.stderr
    assert "run blind has no history key 'eval/c4/CrossEntropyLoss'; did you mean train/CrossEntropyLoss" in done.stderr
    table = logs.load(tmp_path / 'log.parquet')
    small = table[table['run'] == 'small']
    assert small['tokens'].tolist() == [640, 1280, 1920, 2560]
    assert set(small['num_params']) == {10} and set(small['peak_lr']) == {0.01}
    np.testing.assert_allclose(small['test_loss'], 5 / np.array([10, 20, 30, 40]))
    np.testing.assert_allclose(small['loss.pile'], [0.4, np.nan, 4 / 30, 0.1])
    assert sorted(table['num_params'].unique()) == [10, 20, 40] and table['run'].nunique() == 3
    assert trained.returncode == 0 and '4 runs, 124 evaluations' in trained.stdout, trained.stderr   # of 40 losses, a window is 9
    assert wrong.returncode == 2 and wrong.stderr.splitlines()[-1].endswith('did you mean model.n_params?')


def test_from_wandb_nothing_is_sampled_away(loopback, tmp_path):
    """W&B's client with a server on this machine. A run has 1,300 rows, of which a sampled history would give 500."""
    out = tmp_path / 'log.parquet'
    with loopback.WandbLoopback() as server:
        environment = server.env(WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL='1', WANDB_DIR=str(tmp_path))
        training = [subprocess.Popen([sys.executable, '-c', TRAIN, name, str(rows), str(code), str(seed)], cwd=tmp_path,
                                     env=environment)
                    for name, rows, code, seed in (('whole', 1300, 0, 0), ('again', 1300, 0, 0), ('broken', 20, 1, 1))]
        assert [one.wait(120) for one in training] == [0, 0, 0]
        server.fail_every(4)                                                     # requests that fail are repeated
        arguments = ('--project', 'p', '--entity', 'e', '--tag', 'mine', '--out', out)
        done = program(*arguments, environment=environment)
        server.fail_every(0)
        nothing = program(*arguments[:-3], 'other', '--out', out, environment=environment)
    assert done.returncode == 0, done.stderr
    assert '1 runs, 1300 evaluations' in done.stdout and '1 runs are there twice' in done.stderr
    assert 'left out: broken' in done.stderr
    assert nothing.returncode == 2 and 'is tagged other' in nothing.stderr
    table = logs.load(out)
    np.testing.assert_allclose(table['test_loss'], 3 / (1 + np.arange(1300)), rtol=0)
    assert np.isnan(table['Buvar'][0]) and (table['Buvar'][1:] == 1).all()       # missing stays missing
    assert (table['D'] == 64).all() and (table['peak_lr'] == 0.01).all() and (table['seed'] == 0).all()
