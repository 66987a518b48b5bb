"""The loop: where it evaluates, what it logs, how a run ends; stretches, fused seeds and pieces of a batch change nothing."""
import json
import math
import signal
from collections import Counter
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache

import data
import model as models
import optimizer
import train
from trainer import config, programs, run_folder


def rows(folder):
    return [json.loads(line) for line in (folder / 'history.jsonl').read_text().splitlines()]


@pytest.fixture(scope='module')
def straight(small_mlp, tmp_path_factory):
    """The history of a small run of 20 steps, one seed alone, seed 1."""
    folder = tmp_path_factory.mktemp('straight')
    run = small_mlp(f'run_dir={folder}', 'seed=1')
    (summary,) = train.train(run)
    return SimpleNamespace(run=run, folder=folder, rows=rows(folder), summary=summary)


class Bench:
    """The jitted programs of a run, driven by hand from one state."""

    def __init__(self, run):
        self.run, self.task = run, data.open_task(run, run.all_seeds)
        self.program = programs.build(run, self.task)
        self.state = self.program.init(jnp.stack([jax.random.key(seed) for seed in run.all_seeds]), self.task.test)
        self.peak_lrs = optimizer.peak_lrs(run)
        self.s = optimizer.schedule(run.opt.schedule, run.opt.decay_frac, run.derived.warmup_steps, run.derived.steps)
        self.raw = self.task.block(0)

    def train(self, first, count):
        s = np.resize(self.s[:-1], self.task.block_steps).astype(np.float32)
        self.state = self.program.train(self.state, self.peak_lrs, self.raw, s, np.int32(first), np.int32(count))

    def evaluate(self):
        """{name: [seeds]} of this state."""
        self.state, metrics = self.program.evaluate(self.state, self.peak_lrs, self.task.test)
        return {k: np.asarray(v) for k, v in metrics.items()}

    def params(self, seed=0):
        return jax.tree.map(lambda a: np.asarray(a[seed]), self.state.params)


# What a run logs

ALWAYS = {'step', 'tokens', 'compute', 'tau', 'lr', 'test_loss', 'h', 'f', 'Bgvar', 'gvar', 'g2_mean', 'gmean2'}
LATER = {'train_loss', 'dh', 'df', 'Buvar', 'uvar', 'u2_mean', 'umean2'}


def test_both_ends_are_evaluated_and_nothing_undefined_is_logged(straight):
    run = straight.run
    assert [row['step'] for row in straight.rows] == list(run.derived.eval_points) and straight.rows[-1]['step'] == 20
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


def test_step_0_is_the_loss_of_knowing_nothing(straight):
    y = data.open_task(straight.run, [1]).test.y
    # half the mean square of y, float32 sums of 64 numbers
    assert straight.rows[0]['test_loss'] == pytest.approx(float(np.mean(np.asarray(y, np.float64)**2) / 2), rel=1e-6)


def test_a_finished_run_is_left_alone_and_another_refused(straight, small_mlp):
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in straight.folder.iterdir()}
    assert train.train(straight.run) == [straight.summary]
    with pytest.raises(run_folder.RunFolderError, match='opt.lr=0.003 there, 0.004 asked'):
        train.train(small_mlp(f'run_dir={straight.folder}', 'seed=1', 'opt.lr=0.004'))
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in straight.folder.iterdir()} == before


# How the work is cut changes nothing

def test_stretches_and_blocks_do_not_show(straight, small_mlp, tmp_path, monkeypatch):
    """One step at a time through blocks of seven steps gives the same history, bit for bit."""
    monkeypatch.setattr(train, 'DISPATCH_SECONDS', 0.0)
    monkeypatch.setattr(data, 'BLOCK_STEPS', 7)
    counts = []
    train.train(small_mlp(f'run_dir={tmp_path}', 'seed=1'), lambda steps, shown: counts.append(steps))
    assert rows(tmp_path) == straight.rows
    assert set(counts) == {0, 1} and sum(counts) == 20  # the control: it was cut


def test_fused_seeds_are_the_seeds_alone(straight, small_mlp, tmp_path):
    summaries = train.train(small_mlp(f'run_dir={tmp_path}', 'seeds=[0,1,2]'))
    assert sorted(s['seed'] for s in summaries) == [0, 1, 2] and {s['seeds_together'] for s in summaries} == {3}
    histories = {seed: rows(tmp_path / f'seed{seed}') for seed in (0, 1, 2)}
    for alone, fused in zip(straight.rows, histories[1], strict=True):
        assert alone.keys() == fused.keys()
        for k in alone:
            # Measured: no bit of difference. Batched products may sum in another order elsewhere: 1e-7 a step, over 20 steps.
            assert fused[k] == pytest.approx(alone[k], rel=1e-4), (k, alone['step'])
    assert histories[0][-1]['test_loss'] != pytest.approx(histories[1][-1]['test_loss'], rel=1e-4)  # the control
    assert config.settings(straight.run, 1)['model'] == config.settings(small_mlp('seeds=[0,1,2]'), 1)['model']


def test_any_cut_of_the_same_steps_gives_the_same_state(small_mlp):
    states = []
    for cuts in ((6,), (1, 1, 1, 1, 1, 1), (4, 2)):
        if not states:
            bench = Bench(small_mlp())
        else:
            bench.state = bench.program.init(jnp.stack([jax.random.key(0)]), bench.task.test)
        done = 0
        for count in cuts:
            bench.train(done, count)
            done += count
        states.append(jax.device_get(bench.state))
    for other in states[1:]:
        jax.tree.map(np.testing.assert_array_equal, states[0], other)
    assert states[0].step[0] == 6 and states[0].params['readout'].any()


# Pieces of a batch, weights

def padded(rng, size):
    """Tokens of which some sequences are nearly all padding (id 0), others not at all."""
    tokens = rng.integers(1, 54, (size // 16, 16), np.uint8)
    for row, length in enumerate(rng.integers(1, 17, len(tokens))):
        if row % 3:
            tokens[row, length:] = 0
    return tokens.ravel()


@pytest.fixture
def padded_folder(write_tokens):
    rng = np.random.default_rng(0)
    return write_tokens({'pad_id': 0}, train=padded(rng, 4096), test=padded(rng, 1024))


# Large eps: Adam's first steps are then smooth in the gradient, where eps = 0 would turn its rounding errors into signs.
SMOOTH = ('opt.eps=1', 'opt.lr=1', 'opt.embed_lr_mult=1', 'opt.readout_lr_mult=1')


def test_an_accumulated_batch_is_the_full_batch(small_transformer, padded_folder):
    """Pieces hold different numbers of counting targets; the gradient is still the mean over all of the batch's."""
    benches = {B_max: Bench(small_transformer(padded_folder, f'opt.B_max={B_max}', *SMOOTH)) for B_max in (8, 2)}
    assert [b.run.derived.microbatches for b in benches.values()] == [1, 4]
    for bench in benches.values():
        bench.train(0, 3)
    whole, pieces = benches.values()
    start = whole.program.init(jnp.stack([jax.random.key(0)]), whole.task.test).params
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a[0]) - b).max(), start, whole.params())
    assert max(jax.tree.leaves(moved)) > 0.01
    # float32 sums in another order: some 1e-6 of a gradient of order 0.1, three times
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole.params(), pieces.params())
    # By hand, from the model's outputs: the mean over the targets that count, whichever of the test batches they are in.
    forward = jax.jit(lambda params, x: nnx.merge(models.structure('transformer', whole.run.model)[0], params)(x)[0])
    x = whole.task.test.x.reshape(-1, 16)
    f = np.asarray(forward(whole.params(), x), np.float64)
    losses = [np.log(np.exp(f[row, s]).sum()) - f[row, s, x[row, s + 1]]
              for row in range(len(x)) for s in range(15) if x[row, s + 1] != 0]
    assert pieces.evaluate()['test_loss'][0] == pytest.approx(np.mean(losses), rel=1e-5)  # float32 logits

    # The control: pieces count differently, and a mean of their means is another number.
    counts = np.asarray(jax.jit(whole.task.batch)(whole.raw[0]).weight).reshape(4, -1).sum(1)
    assert len(set(counts)) > 1
    by_batch = [np.mean(group) for group in np.split(losses, [np.asarray(whole.task.test.weight[0]).sum()])]
    assert abs(np.mean(by_batch) - np.mean(losses)) > 1e-4


def test_targets_of_weight_zero_change_nothing(small_transformer, padded_folder):
    bench = Bench(small_transformer(padded_folder))
    test = bench.task.test
    other = (test.y + 17) % bench.run.model.V
    metrics = []
    for y in (test.y, jnp.where(test.weight, test.y, other), jnp.where(test.weight, other, test.y)):
        bench.state, found = bench.program.evaluate(bench.state, bench.peak_lrs, test._replace(y=y))
        metrics.append({k: float(found[k][0]) for k in ('test_loss', 'g2_mean', 'gmean2', 'Bgvar')})
    assert metrics[0] == metrics[1] and 0 < float(jnp.mean(test.weight)) < 0.9
    assert metrics[0]['gmean2'] != metrics[2]['gmean2']  # the control: of the others, each one counts

    @jax.jit
    @jax.grad
    def gradient(params, x, y, weight):  # of the mean over the targets that count
        f, _ = nnx.merge(models.structure('transformer', bench.run.model)[0], params)(x)
        losses = -jnp.take_along_axis(jax.nn.log_softmax(f), y[..., None], -1)[..., 0]
        return jnp.sum(losses * weight) / jnp.sum(weight)

    norms = {}
    for name, weight in (('counted', test.weight), ('all', jnp.ones_like(test.weight))):
        batches = [jax.tree.leaves(gradient(bench.params(), test.x[b], test.y[b], weight[b])) for b in range(len(test.x))]
        norms[name] = np.mean([sum(np.sum(np.float64(g) ** 2) for g in leaves) for leaves in batches])
    assert metrics[0]['g2_mean'] == pytest.approx(norms['counted'], rel=1e-5)  # float32 gradients
    assert norms['all'] != pytest.approx(norms['counted'], rel=0.01)


# The trace at an evaluation

def test_every_logged_number_agrees_with_plain_numpy(small_mlp):
    """Each quantity of one evaluation from stacked gradients, one batch at a time, in float64."""
    bench = Bench(small_mlp('T_eval=160', 'opt.eps=1e-3', 'opt.embed_lr_mult=3', 'opt.readout_lr_mult=0.5', 'model.D=32'))
    graphdef, _, _ = models.structure('mlp', bench.run.model)
    before = bench.evaluate()
    bench.train(0, 5)
    params, moments = bench.params(), jax.device_get(jax.tree.map(lambda a: a[0], bench.state.moments))
    start = bench.program.init(jnp.stack([jax.random.key(0)]), bench.task.test)
    got = {k: v[0] for k, v in bench.evaluate().items()}

    @jax.jit
    @jax.value_and_grad
    def loss(params, x, y):
        return jnp.mean(0.5 * (nnx.merge(graphdef, params)(x)[0][:, 0] - y) ** 2)

    x, y = bench.task.test.x, bench.task.test.y
    assert len(x) == 5
    losses, gradients = zip(*[loss(params, x[b], y[b]) for b in range(5)], strict=True)
    g = np.array([np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in gradients], np.float64)

    o, count = bench.run.opt, 5
    nu = [np.float64(v) for v in jax.tree.leaves(moments[0].nu)]
    base = 16 / 32  # base_D over D
    roles = {'input': 3, 'hidden': base, 'output': 0.5 * base}
    peak = [o.lr * roles[role] for role in jax.tree.leaves(models.structure('mlp', bench.run.model)[2])]
    P = np.concatenate([np.ravel(lr / (np.sqrt(v / (1 - o.b2**count)) + o.eps)) for lr, v in zip(peak, nu, strict=True)])
    u = g * np.sqrt(P)
    want = {'test_loss': np.mean(losses)}
    for letter, a in (('g', g), ('u', u)):
        spread = a.var(axis=0).sum()  # over the population
        want |= {f'B{letter}var': spread, f'{letter}var': 32 * spread, f'{letter}2_mean': (a**2).sum(1).mean(),
                 f'{letter}mean2': (a.mean(0)**2).sum()}

    forward = jax.jit(lambda params: nnx.merge(graphdef, params)(x[0]))
    (f0, h0), (f1, h1) = (jax.tree.map(np.float64, forward(p)) for p in (jax.tree.map(lambda a: a[0], start.params), params))
    rms = lambda a: np.sqrt((a**2).mean())  # noqa: E731
    want |= {'h': rms(h1), 'f': rms(f1), 'dh': rms(h1 - h0), 'df': rms(f1 - f0)}
    assert got.keys() == want.keys() | {'train_loss'}
    for k, value in want.items():  # float32 gradients of 32 examples; dh is a difference of nearly equal numbers
        np.testing.assert_allclose(got[k], value, rtol=2e-4, err_msg=k)
    assert before['h'][0] == pytest.approx(rms(h0), rel=1e-5)


def test_train_loss_is_the_mean_since_the_last_evaluation(small_mlp):
    bench = Bench(small_mlp('opt.lr=1e-9'))  # nothing moves: losses are those of the untrained model, half of y²
    draw = jax.jit(bench.task.batch)
    means = [float(np.mean(np.float64(draw(bench.raw[i]).y) ** 2) / 2) for i in range(7)]
    bench.train(0, 4)
    assert bench.evaluate()['train_loss'][0] == pytest.approx(np.mean(means[:4]), rel=1e-4)
    bench.train(4, 3)
    assert bench.evaluate()['train_loss'][0] == pytest.approx(np.mean(means[4:]), rel=1e-4)


# How a run ends

def test_a_signal_stops_it_and_the_record_says_so(small_mlp, tmp_path):
    folder, done = tmp_path / 'run', []

    def on_steps(steps, shown):
        done.append(steps)
        if sum(done) >= 5:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(train.Interrupted) as stop:
        train.train(small_mlp(f'run_dir={folder}'), on_steps)
    assert stop.value.args == (signal.SIGINT,) and signal.getsignal(signal.SIGINT) is before
    summary = run_folder.read_summary(folder)
    assert summary['state'] == 'interrupted' and 5 <= summary['steps'] < 20
    assert {row['step'] for row in rows(folder)} < set(config.evaluation_points(6, 20))


def test_a_signal_in_the_last_evaluation_is_not_lost(small_mlp, tmp_path):
    """The run has finished, and what comes after it in a sweep has not."""
    def on_steps(steps, shown):
        if run_folder.read_history(tmp_path) and run_folder.read_history(tmp_path)[-1]['step'] == 20:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(train.Interrupted):
        train.train(small_mlp(f'run_dir={tmp_path}'), on_steps)
    assert run_folder.read_summary(tmp_path)['state'] == 'finished'


def test_one_seed_diverges_and_the_others_go_on(straight, small_mlp, tmp_path, monkeypatch):
    init = models.init

    def seed_2_is_broken(arch, cfg, key):
        bad = jax.random.key_data(key)[-1] == 2
        return jax.tree.map(lambda w: jnp.where(bad, jnp.nan, w), init(arch, cfg, key))

    monkeypatch.setattr(models, 'init', seed_2_is_broken)
    summaries = {s['seed']: s for s in train.train(small_mlp(f'run_dir={tmp_path}', 'seeds=[2,1]'))}
    assert {seed: s['state'] for seed, s in summaries.items()} == {2: 'diverged', 1: 'finished'}
    assert rows(tmp_path / 'seed2') == []
    assert rows(tmp_path / 'seed1')[-1]['test_loss'] == pytest.approx(straight.rows[-1]['test_loss'], rel=1e-4)


def test_too_large_a_rate_ends_as_diverged(small_mlp, tmp_path):
    (summary,) = train.train(small_mlp(f'run_dir={tmp_path}', 'opt.lr=1e25'))
    assert summary['state'] == 'diverged' and summary['steps'] < 20
    assert rows(tmp_path)[0]['step'] == 0 and all(math.isfinite(v) for row in rows(tmp_path) for v in row.values())


# The published numbers

def test_metrics_of_the_published_code(published, resolve):
    """Steps 0, 1 and 22 of the published reference runs: every metric within the spread of three seeds."""
    reference = [[json.loads(line) for line in (published / 'ref_curves' / f'mlp_d64_seed{i}.jsonl').read_text().splitlines()]
                 for i in range(3)]
    bench = Bench(resolve('mlp', 'model.N=5', 'model.D=64', 'opt.lr=0.001', 'opt.readout_lr_mult=1', 'opt.schedule=linear',
                          'T=2048000', 'num_evals=6', 'seeds=[0,1,2]'))
    done = 0
    for point, step in enumerate((0, 1, 22)):
        bench.train(done, step - done)
        done = step
        ours = bench.evaluate()
        theirs = [seed[point] for seed in reference]
        assert {row['step'] for row in theirs} == {step}
        assert theirs[0]['lr'] == pytest.approx(0.001 * bench.s[step], rel=1e-5)
        for k in ours.keys() & theirs[0].keys():
            published_values = np.array([row[k] for row in theirs], np.float64)
            if np.isnan(published_values).any():
                continue
            a, b = np.log(np.maximum([published_values, ours[k]], 1e-30))
            # means of three seeds each: their difference has standard error √(s²/3 + s²/3); Student's t, 4 degrees of freedom,
            # exceeds 8.6 once in a thousand. Relative 1e-3 for what hardly depends on the seed.
            spread = math.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 3)
            assert abs(a.mean() - b.mean()) < 8.6 * spread + 1e-3, (k, step, published_values, ours[k])
    assert ours['test_loss'].mean() < 0.45


def test_nothing_is_compiled_again(small_mlp, tmp_path):
    """Not by more stretches, blocks or evaluations, and not for other rates, schedules or horizons of the same shapes."""
    kept, met = jax.config.jax_compilation_cache_dir, Counter()
    jax.config.update('jax_compilation_cache_dir', str(tmp_path / 'cache'))  # an empty one: nothing is known from earlier tests
    compilation_cache.reset_cache()
    jax.monitoring.register_event_listener(lambda event, **_: met.update([event.rsplit('/')[-1]]))

    def compiled(name, *overrides):
        met.clear()
        train.train(small_mlp(f'run_dir={tmp_path / name}', *overrides))
        return met['cache_misses'], met['cache_hits'] + met['cache_misses']

    try:
        compiled('first', 'opt.B=24')  # what is compiled once for all: the data's own programs too
        misses, programs = compiled('more', 'opt.B=24', 'num_evals=40', f'T={24 * 3000}', 'opt.lr=0.001', 'opt.schedule=cosine')
        assert misses == 0 and programs > 0
        assert compiled('wider', 'opt.B=24', 'model.D=24')[0] > 0  # the control: another shape is another program
    finally:
        jax.monitoring.clear_event_listeners()
        jax.config.update('jax_compilation_cache_dir', kept)
        compilation_cache.reset_cache()
