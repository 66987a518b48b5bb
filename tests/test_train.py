"""Training: evaluation points, logged metrics, how a run ends. The sizes of dispatches and microbatches do not change results."""
import math
import signal
from collections import Counter
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SMALL_MLP
from jax.experimental.compilation_cache import compilation_cache

import data
import model as models
import train
from trainer import config, process, run_folder


@pytest.fixture(scope='module')
def straight(small_mlp, tmp_path_factory):
    """A finished run of 20 steps: its configuration, folder, rows and summary. It trains seed 1 alone."""
    folder = tmp_path_factory.mktemp('straight')
    run = small_mlp(f'run_dir={folder}', 'seed=1')
    (summary,) = train.train(run)
    return SimpleNamespace(run=run, folder=folder, rows=run_folder.read_history(folder), summary=summary)


# What a run logs

ALWAYS = {'step', 'tokens', 'compute', 'tau', 'lr', 'test_loss', 'h', 'f', 'Bgvar', 'gvar', 'g2_mean', 'gmean2'}
LATER = {'train_loss', 'dh', 'df', 'Buvar', 'uvar', 'u2_mean', 'umean2'}


def test_both_ends_are_evaluated_and_undefined_values_are_not_logged(straight):
    run = straight.run
    assert tuple(row['step'] for row in straight.rows) == run.derived.eval_points and straight.rows[-1]['step'] == 20
    for row in straight.rows:
        assert row.keys() == (ALWAYS | LATER if row['step'] else ALWAYS)
        assert all(math.isfinite(v) for v in row.values())
        assert row['tokens'] == row['step'] * 32
        assert row['compute'] == 6 * row['tokens'] * run.derived.num_params
        assert row['lr'] == pytest.approx(0.003) and row['tau'] == pytest.approx(0.003 * row['step'])
    assert straight.rows[0]['f'] == 0
    assert straight.rows[-1]['test_loss'] != straight.rows[-2]['test_loss']  # the last update was made


def test_summary_of_a_finished_run(straight):
    summary = straight.summary
    assert summary == run_folder.read_summary(straight.folder)
    assert (summary['state'], summary['steps'], summary['tokens'], summary['seed']) == ('finished', 20, 640, 1)
    assert summary['test_loss'] == straight.rows[-1]['test_loss']
    assert summary['tokens_per_second'] > 0 and 0 < summary['mfu'] < 1
    assert summary['wall_seconds'] > summary['train_seconds'] + summary['eval_seconds'] + summary['compile_seconds']


def test_train_loss_of_the_summary_is_a_mean_over_steps():
    """The last two evaluations are one step apart, so that the last row is the loss of a single batch."""
    points = config.evaluation_points(10, 1000)
    rng = np.random.default_rng(0)
    batch_losses = rng.normal(1, 0.1, 1000)  # of steps 0 … 999
    rows = [{'step': 0}] + [{'step': b, 'train_loss': np.mean(batch_losses[a:b])} for a, b in zip(points, points[1:], strict=False)]
    first = max(point for point in points if point <= 990)  # the last hundredth of 1,000 steps begins at 990
    assert run_folder.final_train_loss(rows)['train_loss'] == pytest.approx(np.mean(batch_losses[first:]), rel=1e-12)
    assert rows[-1]['train_loss'] == batch_losses[-1]  # the control: one batch
    assert run_folder.final_train_loss(rows[:1]) == run_folder.final_train_loss([]) == {}


def test_loss_at_step_0_is_that_of_predicting_zero(straight):
    y = data.open_task(straight.run, [1]).test.y
    # half the mean square of y, float32 sums of 64 numbers
    assert straight.rows[0]['test_loss'] == pytest.approx(float(np.mean(np.asarray(y, np.float64)**2) / 2), rel=1e-6)


def test_finished_run_is_not_trained_again_and_its_folder_refuses_another(straight, small_mlp, capsys):
    def files():
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in straight.folder.iterdir()}

    before = files()
    assert train.train(straight.run) == [straight.summary]
    assert f'seed 1: already finished; to train it again, delete {straight.folder}' in capsys.readouterr().err
    with pytest.raises(run_folder.RunFolderError, match='opt.lr=0.003 there, 0.004 here'):
        train.train(small_mlp(f'run_dir={straight.folder}', 'seed=1', 'opt.lr=0.004'))
    assert files() == before


# The sizes of dispatches, blocks and groups of seeds do not change results

def test_dispatch_and_block_sizes_do_not_change_the_history(straight, small_mlp, tmp_path, monkeypatch):
    """One step a dispatch, through blocks of seven steps, gives the same history bit for bit."""
    monkeypatch.setattr(train, 'DISPATCH_SECONDS', 0.0)
    monkeypatch.setattr(data, 'BLOCK_STEPS', 7)
    counts = []
    train.train(small_mlp(f'run_dir={tmp_path}', 'seed=1'), lambda steps, metrics: counts.append(steps))
    assert run_folder.read_history(tmp_path) == straight.rows
    assert set(counts) == {0, 1} and sum(counts) == 20  # the control: one step a dispatch


def test_seeds_trained_together_equal_seeds_trained_alone(straight, small_mlp, tmp_path):
    summaries = train.train(small_mlp(f'run_dir={tmp_path}', 'seeds=[0,1,2]'))
    assert sorted(s['seed'] for s in summaries) == [0, 1, 2] and {s['seeds_together'] for s in summaries} == {3}
    histories = {seed: run_folder.read_history(tmp_path / f'seed{seed}') for seed in (0, 1, 2)}
    for alone, together in zip(straight.rows, histories[1], strict=True):
        assert alone.keys() == together.keys()
        for k in alone:
            # Measured: equal to the bit. On other machines batched products may sum in another order: 1e-7 a step, over 20 steps.
            assert together[k] == pytest.approx(alone[k], rel=1e-4), (k, alone['step'])
    assert histories[0][-1]['test_loss'] != pytest.approx(histories[1][-1]['test_loss'], rel=1e-4)  # the control
    assert config.settings(straight.run, 1)['model'] == config.settings(small_mlp('seeds=[0,1,2]'), 1)['model']


# How a run ends

def test_signal_interrupts_the_run_and_the_record_says_so(small_mlp, tmp_path, stop_at):
    run = small_mlp(f'run_dir={tmp_path}/run')
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(process.Interrupted) as stop:
        train.train(run, stop_at(5, number=signal.SIGINT))
    assert stop.value.args == (signal.SIGINT,) and signal.getsignal(signal.SIGINT) is before
    summary = run_folder.read_summary(tmp_path / 'run')
    assert summary['state'] == 'interrupted' and 5 <= summary['steps'] < 20
    assert {row['step'] for row in run_folder.read_history(tmp_path / 'run')} < set(run.derived.eval_points)


def test_signal_during_the_last_evaluation_still_raises(small_mlp, tmp_path):
    """The run itself has finished. The exception stops the sweep that it belongs to."""
    def on_steps(steps, metrics):
        rows = run_folder.read_history(tmp_path)
        if rows and rows[-1]['step'] == 20:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(process.Interrupted):
        train.train(small_mlp(f'run_dir={tmp_path}'), on_steps)
    assert run_folder.read_summary(tmp_path)['state'] == 'finished'


def test_other_seeds_train_on_when_one_diverges(straight, small_mlp, tmp_path, monkeypatch):
    init = models.init

    def nan_for_seed_2(arch, cfg, key):
        bad = jax.random.key_data(key)[-1] == 2
        return jax.tree.map(lambda w: jnp.where(bad, jnp.nan, w), init(arch, cfg, key))

    monkeypatch.setattr(models, 'init', nan_for_seed_2)
    summaries = {s['seed']: s for s in train.train(small_mlp(f'run_dir={tmp_path}', 'seeds=[2,1]'))}
    assert {seed: s['state'] for seed, s in summaries.items()} == {2: 'diverged', 1: 'finished'}
    assert run_folder.read_history(tmp_path / 'seed2') == []
    last = run_folder.read_history(tmp_path / 'seed1')[-1]
    assert last['test_loss'] == pytest.approx(straight.rows[-1]['test_loss'], rel=1e-4)


def test_too_large_a_learning_rate_ends_as_diverged(small_mlp, tmp_path):
    (summary,) = train.train(small_mlp(f'run_dir={tmp_path}', 'opt.lr=1e25'))
    assert summary['state'] == 'diverged' and summary['steps'] < 20
    rows = run_folder.read_history(tmp_path)
    assert rows[0]['step'] == 0 and all(math.isfinite(v) for row in rows for v in row.values())


# What a user is told

def test_run_stopped_by_its_forecast_says_why(small_mlp, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, 'follow_ladder', lambda run: lambda rows: {'forecast_lo90': 0.3 if rows[-1]['step'] else 0.1})
    (summary,) = train.train(small_mlp(f'run_dir={tmp_path}', 'watch=ladder', 'stop_above=0.25'))
    assert (summary['state'], summary['steps']) == ('stopped', 1)
    assert ('seed 0: stopped at step 1 of 20: its forecast final loss is above 0.3 with 95% probability, and stop_above=0.25'
            in capsys.readouterr().err.splitlines())


def test_evaluations_that_cost_more_than_training_are_announced_before_it(compose, tmp_path, capsys):
    """20 steps have 8 evaluations on 8 batches: 64 gradients for 20."""
    train.run_config(compose(*SMALL_MLP, 'num_evals=8', 'T_eval=256', f'run_dir={tmp_path}/costly'))
    told = capsys.readouterr().err
    warning = told.index('note: evaluations cost ')
    assert warning < told.index('/20') and 'lower num_evals=8 or T_eval=256' in told.splitlines()[1]  # /20: the progress bar
    train.run_config(compose(*SMALL_MLP, 'num_evals=2', 'T_eval=32', f'run_dir={tmp_path}/cheap'))
    assert 'note:' not in capsys.readouterr().err


def test_programs_are_compiled_once_for_the_same_shapes(small_mlp, tmp_path):
    """More dispatches, blocks or evaluations, another learning rate, schedule or horizon: none of them compiles a program."""
    usual_cache, events = jax.config.jax_compilation_cache_dir, Counter()
    jax.config.update('jax_compilation_cache_dir', str(tmp_path / 'cache'))  # an empty cache, without the programs of other tests
    compilation_cache.reset_cache()
    jax.monitoring.register_event_listener(lambda event, **_: events.update([event.rsplit('/')[-1]]))

    def train_counting(name, *overrides):
        """(cache misses, programs compiled or read from the cache) of one run."""
        events.clear()
        train.train(small_mlp(f'run_dir={tmp_path / name}', *overrides))
        return events['cache_misses'], events['cache_hits'] + events['cache_misses']

    try:
        train_counting('first', 'opt.B=24')
        misses, total = train_counting('more', 'opt.B=24', 'num_evals=40', f'T={24 * 3000}', 'opt.lr=0.001', 'opt.schedule=cosine')
        assert misses == 0 and total > 0
        assert train_counting('wider', 'opt.B=24', 'model.D=24')[0] > 0  # the control: another shape is another program
    finally:
        jax.monitoring.clear_event_listeners()
        jax.config.update('jax_compilation_cache_dir', usual_cache)
        compilation_cache.reset_cache()
