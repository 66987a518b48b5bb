"""The compiled programs: microbatches, weights of targets, and every metric against plain NumPy and against published numbers."""
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import data
import model as models
import optimizer
from trainer import dry_run, programs


class Stepper:
    """Calls the compiled programs of a run step by step, without a training loop. `state` is the newest state."""

    def __init__(self, run):
        self.run, self.task = run, data.open_task(run, run.all_seeds)
        self.program = programs.build(run, self.task)
        self.state = self.initial_state()
        self.peak_lrs = optimizer.peak_lrs(run)
        self.schedule = optimizer.schedule(run.opt.schedule, run.opt.decay_frac, run.derived.warmup_steps, run.derived.steps)
        self.raw = self.task.block(0)

    def initial_state(self):
        return self.program.init(jnp.stack([jax.random.key(seed) for seed in self.run.all_seeds]), self.task.test)

    def train(self, first, count):
        lr_scales = np.resize(self.schedule[:-1], self.task.block_steps).astype(np.float32)
        self.state = self.program.train(self.state, self.peak_lrs, self.raw, lr_scales, np.int32(first), np.int32(count))

    def evaluate(self):
        """{name: [seeds]}: the metrics of the newest state."""
        self.state, metrics = self.program.evaluate(self.state, self.peak_lrs, self.task.test)
        return {k: np.asarray(v) for k, v in metrics.items()}

    def params(self, seed=0):
        return jax.tree.map(lambda a: np.asarray(a[seed]), self.state.params)


def test_six_steps_give_the_same_state_in_any_number_of_dispatches(small_mlp):
    stepper, states = Stepper(small_mlp()), []
    for counts in ((6,), (1, 1, 1, 1, 1, 1), (4, 2)):
        stepper.state = stepper.initial_state()
        done = 0
        for count in counts:
            stepper.train(done, count)
            done += count
        states.append(jax.device_get(stepper.state))
    for other in states[1:]:
        jax.tree.map(np.testing.assert_array_equal, states[0], other)
    assert states[0].step[0] == 6 and states[0].params['readout'].any()


# Microbatches and weights of targets

def padded(rng, size):
    """Token ids [size]. Two of three sequences end in padding (id 0), of different lengths; the third has none."""
    tokens = rng.integers(1, 54, (size // 16, 16), np.uint8)
    for row, length in enumerate(rng.integers(1, 17, len(tokens))):
        if row % 3:
            tokens[row, length:] = 0
    return tokens.ravel()


@pytest.fixture
def padded_folder(write_tokens):
    rng = np.random.default_rng(0)
    return write_tokens({'pad_id': 0}, train=padded(rng, 4096), test=padded(rng, 1024))


# With a large eps Adam's first steps are smooth in the gradient. With eps = 0 they are its sign, rounding errors included.
SMOOTH = ('opt.eps=1', 'opt.lr=1', 'opt.embed_lr_mult=1', 'opt.readout_lr_mult=1')


def test_accumulated_gradient_is_that_of_the_full_batch(small_transformer, padded_folder):
    """Microbatches hold different numbers of targets that count. The gradient is the mean over all targets of the batch."""
    steppers = {B_max: Stepper(small_transformer(padded_folder, f'opt.B_max={B_max}', *SMOOTH)) for B_max in (8, 2)}
    assert [b.run.derived.microbatches for b in steppers.values()] == [1, 4]
    for stepper in steppers.values():
        stepper.train(0, 3)
    whole, pieces = steppers.values()
    start = whole.initial_state().params
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a[0]) - b).max(), start, whole.params())
    assert max(jax.tree.leaves(moved)) > 0.01
    # float32 sums in another order: some 1e-6 of a gradient of order 0.1, three times
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole.params(), pieces.params())
    # The test loss by hand, from the model's outputs: the mean over the targets that count in all test batches together.
    forward = jax.jit(lambda params, x: nnx.merge(models.structure('transformer', whole.run.model)[0], params)(x)[0])
    x = whole.task.test.x.reshape(-1, 16)
    f = np.asarray(forward(whole.params(), x), np.float64)
    losses = [np.log(np.exp(f[row, s]).sum()) - f[row, s, x[row, s + 1]]
              for row in range(len(x)) for s in range(15) if x[row, s + 1] != 0]
    assert pieces.evaluate()['test_loss'][0] == pytest.approx(np.mean(losses), rel=1e-5)  # float32 logits

    # The control: the microbatches' counts differ, and the mean of their means is another number.
    counts = np.asarray(jax.jit(whole.task.batch)(whole.raw[0]).weight).reshape(4, -1).sum(1)
    assert len(set(counts)) > 1
    by_batch = [np.mean(group) for group in np.split(losses, [np.asarray(whole.task.test.weight[0]).sum()])]
    assert abs(np.mean(by_batch) - np.mean(losses)) > 1e-4


def test_targets_of_weight_zero_change_nothing(small_transformer, padded_folder):
    stepper = Stepper(small_transformer(padded_folder))
    test = stepper.task.test
    other = (test.y + 17) % stepper.run.model.V
    metrics = []
    for y in (test.y, jnp.where(test.weight, test.y, other), jnp.where(test.weight, other, test.y)):
        stepper.state, found = stepper.program.evaluate(stepper.state, stepper.peak_lrs, test._replace(y=y))
        metrics.append({k: float(found[k][0]) for k in ('test_loss', 'g2_mean', 'gmean2', 'Bgvar')})
    assert metrics[0] == metrics[1] and 0 < float(jnp.mean(test.weight)) < 0.9
    assert metrics[0]['gmean2'] != metrics[2]['gmean2']  # the control: targets of weight 1 count

    @jax.jit
    @jax.grad
    def gradient(params, x, y, weight):  # of the mean over the targets that count
        f, _ = nnx.merge(models.structure('transformer', stepper.run.model)[0], params)(x)
        losses = -jnp.take_along_axis(jax.nn.log_softmax(f), y[..., None], -1)[..., 0]
        return jnp.sum(losses * weight) / jnp.sum(weight)

    norms = {}
    for name, weight in (('counted', test.weight), ('all', jnp.ones_like(test.weight))):
        batches = [jax.tree.leaves(gradient(stepper.params(), test.x[b], test.y[b], weight[b])) for b in range(len(test.x))]
        norms[name] = np.mean([sum(np.sum(np.float64(g) ** 2) for g in leaves) for leaves in batches])
    assert metrics[0]['g2_mean'] == pytest.approx(norms['counted'], rel=1e-5)  # float32 gradients
    assert norms['all'] != pytest.approx(norms['counted'], rel=0.01)


# The metrics of an evaluation

def test_every_metric_agrees_with_plain_numpy(small_mlp):
    """Recomputes each metric of one evaluation in float64 from the stacked gradients of the test batches."""
    stepper = Stepper(small_mlp('T_eval=160', 'opt.eps=1e-3', 'opt.embed_lr_mult=3', 'opt.readout_lr_mult=0.5', 'model.D=32'))
    graphdef, _, _ = models.structure('mlp', stepper.run.model)
    before = stepper.evaluate()
    stepper.train(0, 5)
    params, moments = stepper.params(), jax.device_get(jax.tree.map(lambda a: a[0], stepper.state.moments))
    start = stepper.initial_state()
    got = {k: v[0] for k, v in stepper.evaluate().items()}

    @jax.jit
    @jax.value_and_grad
    def loss(params, x, y):
        return jnp.mean(0.5 * (nnx.merge(graphdef, params)(x)[0][:, 0] - y) ** 2)

    x, y = stepper.task.test.x, stepper.task.test.y
    assert len(x) == 5
    losses, gradients = zip(*[loss(params, x[b], y[b]) for b in range(5)], strict=True)
    g = np.array([np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in gradients], np.float64)

    o, count = stepper.run.opt, 5
    nu = [np.float64(v) for v in jax.tree.leaves(moments[0].nu)]
    base = 16 / 32  # base_D over D
    roles = {'input': 3, 'hidden': base, 'output': 0.5 * base}
    peak = [o.lr * roles[role] for role in jax.tree.leaves(models.structure('mlp', stepper.run.model)[2])]
    P = np.concatenate([np.ravel(lr / (np.sqrt(v / (1 - o.b2**count)) + o.eps)) for lr, v in zip(peak, nu, strict=True)])
    u = g * np.sqrt(P)
    want = {'test_loss': np.mean(losses)}
    for letter, a in (('g', g), ('u', u)):
        spread = a.var(axis=0).sum()  # population variance
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
    stepper = Stepper(small_mlp('opt.lr=1e-9'))  # the weights hardly move: the loss stays half the mean of y²
    draw = jax.jit(stepper.task.batch)
    means = [float(np.mean(np.float64(draw(stepper.raw[i]).y) ** 2) / 2) for i in range(7)]
    stepper.train(0, 4)
    assert stepper.evaluate()['train_loss'][0] == pytest.approx(np.mean(means[:4]), rel=1e-4)
    stepper.train(4, 3)
    assert stepper.evaluate()['train_loss'][0] == pytest.approx(np.mean(means[4:]), rel=1e-4)


# The probe

def test_probe_of_all_seeds_stays_within_its_limit(resolve):
    """Counts both arrays, the features and the logits, of all the seeds together."""
    sizes = {}
    for seeds in ('[0]', '[0,1,2,3,4]'):
        run = resolve('chess', 'ds_path=absent', 'model.D=768', f'seeds={seeds}')
        task = dry_run.open_stand_in(run)
        keys = jax.random.split(jax.random.key(0), len(run.all_seeds))
        state = jax.eval_shape(programs.build(run, task).init, keys, task.test)
        sizes[seeds] = sum(a.size * a.dtype.itemsize for a in state.probe)
        rows = state.probe[0].shape[1]
        assert rows > 1 and len(state.probe) == 2
        assert programs.PROBE_BYTES * (1 - 1 / rows) < sizes[seeds] <= programs.PROBE_BYTES  # as many sequences as fit


# The published numbers

def test_metrics_agree_with_the_published_code(published, resolve):
    """Every metric at steps 0, 1 and 22 agrees with the published reference runs, within the spread of three seeds."""
    paths = [published / 'ref_curves' / f'mlp_d64_seed{i}.jsonl' for i in range(3)]
    reference = [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]
    stepper = Stepper(resolve('mlp', 'model.N=5', 'model.D=64', 'opt.lr=0.001', 'opt.readout_lr_mult=1', 'opt.schedule=linear',
                          'T=2048000', 'num_evals=6', 'seeds=[0,1,2]'))
    done = 0
    for point, step in enumerate((0, 1, 22)):
        stepper.train(done, step - done)
        done = step
        ours = stepper.evaluate()
        theirs = [seed[point] for seed in reference]
        assert {row['step'] for row in theirs} == {step}
        assert theirs[0]['lr'] == pytest.approx(0.001 * stepper.schedule[step], rel=1e-5)
        for k in ours.keys() & theirs[0].keys():
            published_values = np.array([row[k] for row in theirs], np.float64)
            if np.isnan(published_values).any():
                continue
            a, b = np.log(np.maximum([published_values, ours[k]], 1e-30))
            # The difference of two means of three seeds has standard error √(s²/3 + s²/3). Student's t with 4 degrees of freedom
            # exceeds 8.6 once in a thousand. 1e-3 (relative) is for metrics that hardly depend on the seed.
            spread = math.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 3)
            assert abs(a.mean() - b.mean()) < 8.6 * spread + 1e-3, (k, step, published_values, ours[k])
    assert ours['test_loss'].mean() < 0.45
