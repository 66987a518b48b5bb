"""Schedules and τ in closed form, µP learning rates, Adam and the gradient trace against plain NumPy, and what µP achieves."""
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import data
import model as models
import optimizer

# Schedules

ENDS = {'const': 1, 'linear': 0, 'cosine': 0, 'quadratic': 0, 'power': 0, 'exp': 0.1, 'multicosine': 0}
MIDDLES = {'const': 1, 'linear': 0.5, 'cosine': 0.5, 'quadratic': 0.75, 'power': 0.25, 'exp': 10**-0.5, 'multicosine': 0.5}


def test_every_schedule_is_tested_here():
    assert set(optimizer.SCHEDULES) == set(ENDS) == set(MIDDLES)


@pytest.mark.parametrize('name', ENDS)
@pytest.mark.parametrize('warmup, decay_frac', [(0, 1), (40, 1), (40, 0.2)])
def test_schedule_warms_up_holds_and_decays_to_its_end(name, warmup, decay_frac):
    steps = 1000
    s = optimizer.schedule(name, decay_frac, warmup, steps)
    start = round(steps - decay_frac * (steps - warmup))  # of the decay: the last decay_frac of the steps after the warm-up
    assert s.shape == (steps + 1,) and s.min() >= 0 and s.max() <= 1
    np.testing.assert_allclose(s[:warmup], np.arange(warmup) / max(warmup, 1), atol=1e-12)
    np.testing.assert_allclose(s[warmup:start + 1], 1, atol=1e-12)
    np.testing.assert_allclose(s[[(start + steps) // 2, steps]], [MIDDLES[name], ENDS[name]], atol=1e-12)
    if name != 'const':
        assert s[start + 1] < 1


def test_multicosine_goes_down_up_and_down():
    s = optimizer.schedule('multicosine', 1, 0, 300)
    np.testing.assert_allclose(s[[0, 100, 200, 300]], [1, 0, 1, 0], atol=1e-12)


def test_published_learning_rates(resolve):
    """The learning rates of the published logs: the last step of mlp D=384, and the first of the constant-rate chess runs."""
    run = resolve('mlp', 'model.N=5', 'model.D=384', 'opt.lr=0.001', 'opt.schedule=linear', 'scale=1346251.612836',
                  'exponent=2.040882')
    lrs = run.opt.lr * optimizer.schedule(run.opt.schedule, run.opt.decay_frac, run.derived.warmup_steps, run.derived.steps)
    assert lrs[33308] == pytest.approx(3.004e-8, rel=1e-3)  # published in float32: 1 - u there is a multiple of 6e-8

    run = resolve('chess', 'ds_path=x', 'model.D=768', 'opt.lr=0.01', 'opt.schedule=const', 'T=25e9')
    lrs = run.opt.lr * optimizer.schedule(run.opt.schedule, run.opt.decay_frac, run.derived.warmup_steps, run.derived.steps)
    assert lrs[0] == 0 and lrs[1] == pytest.approx(0.01 / 152, rel=1e-12) and lrs[152] == 0.01


@pytest.mark.parametrize('name, closed_form', [
    ('const', lambda u: u),
    ('linear', lambda u: u - u**2 / 2),
    ('cosine', lambda u: u / 2 + np.sin(np.pi * u) / (2 * np.pi)),
])
def test_gradient_flow_time_is_the_integral_of_the_rate(name, closed_form):
    steps, lr = 10_000, 0.3
    tau = optimizer.gradient_flow_time(lr * optimizer.schedule(name, 1, 0, steps))
    u = np.arange(steps + 1) / steps
    # a left Riemann sum of a monotone function is off by at most one step times the fall of the learning rate
    np.testing.assert_allclose(tau, lr * steps * closed_form(u), atol=lr)
    assert tau[0] == 0 and tau[1] == lr  # the steps before the current one
    if name == 'linear':
        np.testing.assert_allclose(tau[-1], lr * (steps + 1) / 2, rtol=1e-12)


# Learning rates by role

LR, D, BASE = 0.02, 512, 128
EVERY_WEIGHT = {  # under µP with embed_lr_mult 10 and readout_lr_mult 0.1
    'embed': 10 * LR, 'position': 10 * LR, 'readout': 0.1 * LR * BASE / D,
    'qkv': LR * BASE / D, 'out': LR * BASE / D, 'fc1': LR * BASE / D, 'fc2': LR * BASE / D}


@pytest.mark.parametrize('overrides, factor', [
    ((), {}),
    (('model.match_mup_at_D=256',), dict.fromkeys(('qkv', 'out', 'fc1', 'fc2', 'readout'), 2)),
    (('opt.mup=false',), dict.fromkeys(('qkv', 'out', 'fc1', 'fc2', 'readout'), 4)),
    (('model.D=128',), dict.fromkeys(('qkv', 'out', 'fc1', 'fc2', 'readout'), 4)),
    (('model.D=128', 'opt.mup=false'), dict.fromkeys(('qkv', 'out', 'fc1', 'fc2', 'readout'), 4)),
    (('model.mlp_expansion=4',), {}),  # the fan-in of fc2 over that of the base model stays the ratio of widths
])
def test_peak_learning_rate_of_every_weight(resolve, overrides, factor):
    run = resolve('chess', 'ds_path=x', f'model.D={D}', f'opt.lr={LR}', 'opt.embed_lr_mult=10', *overrides)
    _, _, roles = models.structure('transformer', run.model)
    for path, role in jax.tree_util.tree_leaves_with_path(roles):
        name = path[-1].key
        assert optimizer.peak_lr(role, run) == pytest.approx(EVERY_WEIGHT[name] * factor.get(name, 1), rel=1e-12), path
    with pytest.raises(KeyError):
        optimizer.peak_lr('unheard of', run)


# Adam

def test_adam_agrees_with_plain_numpy(resolve):
    run = resolve('mlp', 'opt.b1=0.8', 'opt.b2=0.9', 'opt.eps=0.01', 'opt.weight_decay=0.1')
    o, rng = run.opt, np.random.default_rng(0)
    w = {'a': rng.normal(size=(3, 4)), 'b': rng.normal(size=5)}
    lr = {'a': 0.1, 'b': 0.02}
    s = [0.0, 0.5, 1.0, 0.7, 0.3]
    grads = [{k: rng.normal(size=v.shape) for k, v in w.items()} for _ in s]

    adam, params = optimizer.adam(run), jax.tree.map(jnp.float32, w)
    moments = adam.init(params)
    for g, s_t in zip(grads, s, strict=True):
        updates, moments = adam.update(jax.tree.map(jnp.float32, g), moments, params)
        params = optimizer.apply_updates(params, updates, lr, s_t)

    v_hat = {}
    for k in w:
        m = v = 0
        for t, (g, s_t) in enumerate(zip(grads, s, strict=True), 1):
            m, v = o.b1 * m + (1 - o.b1) * g[k], o.b2 * v + (1 - o.b2) * g[k]**2
            v_hat[k] = v / (1 - o.b2**t)
            update = m / (1 - o.b1**t) / (np.sqrt(v_hat[k]) + o.eps) + o.weight_decay * w[k]
            w[k] = w[k] - s_t * lr[k] * update
    for k in w:
        np.testing.assert_allclose(params[k], w[k], rtol=1e-5, atol=1e-6)  # five float32 updates
    P = optimizer.preconditioner(moments, lr, run)
    for k in w:
        np.testing.assert_allclose(P[k], lr[k] / (np.sqrt(v_hat[k]) + o.eps), rtol=1e-5)


# The gradient trace

def np_trace(g, u, B):
    """The metrics from stacked gradients [n, p]: g, and u, which is preconditioned."""
    out = {}
    for letter, a in (('g', g), ('u', u)):
        variance = a.var(axis=0).sum()  # population variance
        out |= {f'B{letter}var': variance, f'{letter}var': B * variance, f'{letter}2_mean': (a * a).sum(1).mean(),
                f'{letter}mean2': (a.mean(0) ** 2).sum()}
    return out


@pytest.mark.parametrize('mean', [1.0, 300.0])  # a difference of two large sums would lose the variance beside a mean of 300
def test_gradient_trace_agrees_with_plain_numpy(mean):
    n, B, rng = 7, 16, np.random.default_rng(1)
    g = {'a': mean + rng.normal(size=(n, 3, 4)), 'b': rng.normal(size=(n, 5))}
    P = {'a': rng.uniform(0.1, 2, (3, 4)), 'b': rng.uniform(0.1, 2, 5)}
    to32 = lambda tree: jax.tree.map(jnp.float32, tree)  # noqa: E731
    aux, trace = optimizer.gradient_trace(lambda b: (b['b'][0], b), to32(g), to32(P), B)
    np.testing.assert_array_equal(aux, np.float32(g['b'][:, 0]))

    flat = np.concatenate([g['a'].reshape(n, -1), g['b']], 1)
    flat_P = np.concatenate([P['a'].ravel(), P['b']])
    want = np_trace(flat, flat * np.sqrt(flat_P), B)
    assert trace.keys() == want.keys()
    for k in want:  # deviations of order 1 from a mean with float32 rounding errors (300·6e-8 = 2e-5)
        np.testing.assert_allclose(trace[k], want[k], rtol=1e-4, err_msg=k)


def test_trace_of_equal_batches_has_no_variance():
    g = jnp.broadcast_to(jnp.float32([0.1, 1e3]), (24, 2))
    _, trace = optimizer.gradient_trace(lambda b: (0.0, b), g, jnp.ones(2), 4)
    assert trace['Bgvar'] == 0 and trace['gmean2'] > 1e5


# What µP achieves

B, STEPS = 128, 100


def learn(resolve, arch, D, rates, steps, seeds, targets):
    """{mup: (features h and outputs f before and after [rate, seed, …], losses [rate, seed, steps])} of Adam at constant rates.

    It uses model.py and optimizer.py alone. Learning rates are arguments of one compiled program.
    """
    overrides = {'mlp': ('mlp', 'model.base_D=64', 'model.N=1', 'opt.readout_lr_mult=1'),
                 'transformer': ('chess', 'ds_path=x', 'model.base_D=64', 'model.N=1', 'model.dh=16', 'model.L=8', 'model.V=32',
                                 'opt.embed_lr_mult=10', 'opt.readout_lr_mult=1')}[arch]
    runs = {mup: resolve(*overrides, f'model.D={D}', f'opt.B={B}', f'opt.mup={mup}', 'opt.lr=1', 'opt.warmup_tokens=0')
            for mup in (True, False)}
    graphdef, _, roles = models.structure(arch, runs[True].model)
    adam = optimizer.adam(runs[True])
    x, y = targets  # [steps, B, …]

    def loss(params, x, y):
        f, h = nnx.merge(graphdef, params)(x)
        if arch == 'mlp':
            return jnp.mean(0.5 * (f[:, 0] - y) ** 2), (h, f)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(f, y)), (h, f)

    def one(lrs, seed):
        def step(carry, batch):
            params, moments = carry
            (value, _), g = jax.value_and_grad(loss, has_aux=True)(params, *batch)
            updates, moments = adam.update(g, moments, params)
            return (optimizer.apply_updates(params, updates, lrs, 1.0), moments), value

        params = models.init(arch, runs[True].model, jax.random.key(seed))
        (last, _), losses = jax.lax.scan(step, (params, adam.init(params)), (x[:steps], y[:steps]))
        return [loss(p, x[0], y[0])[1] for p in (params, last)], losses

    program = jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))
    return {mup: program(jax.tree.map(lambda role, run=run: np.float32(rates) * np.float32(optimizer.peak_lr(role, run)), roles),
                         np.arange(seeds)) for mup, run in runs.items()}


@pytest.fixture(scope='module')
def power_law_batches(resolve):
    """The first training batches of the power-law task, x [STEPS, B, 8] and y [STEPS, B]."""
    task = data.fourier_task(resolve('mlp', f'opt.B={B}', f'T_eval={B}', f'T={STEPS * B}'))
    batch = jax.jit(lambda raw: jax.lax.map(task.batch, raw))(task.block(0)[:STEPS])
    return batch.x, batch.y


@pytest.mark.parametrize('arch', ['mlp', 'transformer'])
def test_update_sizes_do_not_depend_on_width(resolve, power_law_batches, arch):
    """Fits the exponent of D in the RMS of the last features h, of their change dh and of the output's change df over 4 steps."""
    targets, widths, rate = power_law_batches, (32, 256), 0.0005
    if arch == 'transformer':  # the next id is a function of the current one, which can be learned
        tokens = np.random.default_rng(0).integers(0, 32, (4, 64, 8))
        targets, widths, rate = (tokens, (tokens * 5 + 3) % 32), (64, 256), 0.004
    sizes = {True: [], False: []}
    for D in widths:
        for mup, ((before, after), _) in learn(resolve, arch, D, [rate], 4, 3, targets).items():
            change = [np.asarray(a) - np.asarray(b) for a, b in zip(after, before, strict=True)]
            sizes[mup].append([np.sqrt(np.mean(a * a)) for a in (np.asarray(after[0]), *change)])  # over three seeds
    slopes = {mup: dict(zip(('h', 'dh', 'df'), np.polyfit(np.log(widths), np.log(rows), 1)[0], strict=True))
              for mup, rows in sizes.items()}
    print(slopes)
    # measured: at most 0.03 with µP (0.13 for the df of the transformer at these small widths); without it 0.8 to 1.1
    assert max(map(abs, slopes[True].values())) < 0.15, slopes
    assert slopes[False]['dh'] > 0.3 and slopes[False]['df'] > 0.3, slopes  # the control: they grow without µP


def test_the_best_learning_rate_transfers_across_width(resolve, power_law_batches):
    log_rates = np.arange(-13, -5)
    best = {}
    for D in (32, 256):
        for mup, (_, losses) in learn(resolve, 'mlp', D, 2.0**log_rates, STEPS, 1, power_law_batches).items():
            final = np.asarray(losses)[:, 0, -40:].mean(1)  # the mean over forty batches, the same for every rate
            i = np.clip(np.argmin(final), 1, len(final) - 2)
            a, b, _ = np.polyfit(log_rates[i - 1:i + 2], final[i - 1:i + 2], 2)  # the minimum, between the learning rates tried
            best[mup, D] = -b / (2 * a)
    print(best)
    assert abs(best[True, 256] - best[True, 32]) < 1, best  # within a factor of two, for widths a factor of eight apart
    assert best[False, 32] - best[False, 256] > 2, best  # the control: it falls with the width without µP
