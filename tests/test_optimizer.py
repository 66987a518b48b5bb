"""Schedules and τ in closed form, µP rates, Adam, Muon and the gradient trace against plain NumPy, and what µP achieves."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from learning import best_rate, learn, power_law_batches

import model as models
import optimizer
from trainer import config

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


# Adam, and the three ways to set a weight decay

@pytest.mark.parametrize('decay, shares', [  # of a weight that a step at the peak rate takes, at twice the base width
    ('opt.weight_decay=0', {'input': 0, 'hidden': 0, 'output': 0}),
    ('opt.weight_decay=0.1', {'input': 0.1 * 0.3, 'hidden': 0.1 * 0.05, 'output': 0.1 * 0.01}),  # times each weight's rate
    ('opt.independent_decay=0.02', {'input': 0.02, 'hidden': 0.01, 'output': 0.01}),  # not times the rate; half at twice the width
    ('opt.decay_timescale=0.5', {'input': 0.1, 'hidden': 0.1, 'output': 0.1}),  # 1/(0.5 · 20 steps), the same for all
])
def test_adam_agrees_with_plain_numpy(small_mlp, decay, shares):
    run = small_mlp('model.D=16', 'model.base_D=8', 'opt.b1=0.8', 'opt.b2=0.9', 'opt.eps=0.01', 'opt.lr=0.1', 'opt.embed_lr_mult=3',
                    'opt.readout_lr_mult=0.2', decay)
    assert run.derived.steps == 20
    assert config.settings(run, 0)['derived']['decay_per_step'] == pytest.approx(shares['hidden'])  # what its record says
    o, rng = run.opt, np.random.default_rng(0)
    _, shapes, roles = models.structure('mlp', run.model)
    weights = jax.tree.map(lambda a: rng.normal(size=a.shape), shapes)
    s = [0.0, 0.5, 1.0, 0.7, 0.3]
    grads = [jax.tree.map(lambda a: rng.normal(size=a.shape), shapes) for _ in s]

    transform, lr, params = optimizer.transformation(run), optimizer.peak_lrs(run), jax.tree.map(jnp.float32, weights)
    moments = transform.init(params)
    for g, s_t in zip(grads, s, strict=True):
        updates, moments = transform.update(jax.tree.map(jnp.float32, g), moments, params)
        params = optimizer.apply_updates(params, updates, lr, s_t)
    P = optimizer.preconditioner(moments, lr, run)

    for (path, w), role in zip(jax.tree_util.tree_leaves_with_path(weights), jax.tree.leaves(roles), strict=True):
        get = lambda tree, path=path: functools.reduce(lambda branch, key: branch[key.key], path, tree)  # noqa: E731
        m = v = 0
        for t, (g, s_t) in enumerate(zip(grads, s, strict=True), 1):
            m, v = o.b1 * m + (1 - o.b1) * get(g), o.b2 * v + (1 - o.b2) * get(g)**2
            v_hat = v / (1 - o.b2**t)
            w = w - s_t * (get(lr) * m / (1 - o.b1**t) / (np.sqrt(v_hat) + o.eps) + shares[role] * w)
        np.testing.assert_allclose(get(params), w, rtol=1e-5, atol=1e-6)  # five float32 updates
        np.testing.assert_allclose(get(P), get(lr) / (np.sqrt(v_hat) + o.eps), rtol=1e-5)


# Muon

def hidden_matrices(block):
    """Every matrix of a block of a transformer [D, D], [D, F] or [F, D], inputs first, with √(fan-out/fan-in)."""
    qkv, out, fc1, fc2 = (np.asarray(a) for a in (block['attention']['qkv'], block['attention']['out'], block['mlp']['fc1'],
                                                  block['mlp']['fc2']))
    D, F = fc1.shape
    return [*((qkv[:, i].reshape(D, D), 1) for i in range(3)), (out.reshape(D, D), 1), (fc1, (F / D)**0.5), (fc2, (D / F)**0.5)]


def test_muon_orthogonalises_the_nesterov_momentum_of_every_hidden_matrix(small_transformer):
    """Singular vectors are those of the momentum, singular values lie about √(fan-out/fan-in); Adam takes the other weights."""
    run, adam = (small_transformer('x', f'opt.name={name}', 'opt.momentum=0.8', 'model.V=32', 'model.mlp_expansion=4')
                 for name in ('muon', 'adam'))
    _, shapes, _ = models.structure('transformer', run.model)
    rng = np.random.default_rng(0)
    params, *grads = [jax.tree.map(lambda a: jnp.float32(rng.normal(size=a.shape)), shapes) for _ in range(3)]
    updates = {}
    for one in (run, adam):
        transform = optimizer.transformation(one)
        moments = transform.init(params)
        for g in grads:
            updates[one.opt.name], moments = transform.update(g, moments, params)
    for key in ('embed', 'position', 'readout'):
        np.testing.assert_array_equal(updates['muon'][key], updates['adam'][key])

    mean = lambda a, b: 0.8 * (0.8 * 0.2 * a + 0.2 * b) / (1 - 0.8**3) + 0.2 * b / (1 - 0.8**2)  # noqa: E731
    momentum = jax.tree.map(mean, *grads)
    pairs = [pair for block in updates['muon']['blocks'] for pair in zip(
        hidden_matrices(updates['muon']['blocks'][block]), hidden_matrices(momentum['blocks'][block]), strict=True)]
    assert len(pairs) == 6
    for (update, size), (want, _) in pairs:
        U, values, V = np.linalg.svd(want, full_matrices=False)
        aligned = U.T @ update @ V.T / size
        np.testing.assert_allclose(aligned, np.diag(np.diag(aligned)), atol=1e-3)  # float32; five steps amplify small ones 500-fold
        large = values > 0.05 * values.max()  # Newton-Schulz with optax's coefficients: 0.7 to 1.2, less for the smallest
        assert large.sum() > 0.8 * len(large) and (np.diag(aligned)[large] > 0.6).all() and (np.diag(aligned) < 1.3).all()


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

@pytest.fixture(scope='module')
def batches(resolve):
    return power_law_batches(resolve)


@pytest.mark.parametrize('arch, optimiser', [('mlp', 'adam'), ('mlp', 'muon'), ('transformer', 'adam'), ('transformer', 'muon')])
def test_update_sizes_do_not_depend_on_width(resolve, batches, arch, optimiser):
    """Fits the exponent of D in the RMS of the last features h, of their change dh and of the output's change df over 4 steps."""
    targets, widths, rate = batches, (32, 256), 0.0005
    if arch == 'transformer':  # the next id is a function of the current one, which can be learned
        tokens = np.random.default_rng(0).integers(0, 32, (4, 64, 8))
        targets, widths, rate = (tokens, (tokens * 5 + 3) % 32), (64, 256), 0.004
    sizes = {True: [], False: []}
    for D in widths:
        for mup, ((before, after), _) in learn(resolve, optimiser, arch, D, [rate], 4, 3, targets).items():
            change = [np.asarray(a) - np.asarray(b) for a, b in zip(after, before, strict=True)]
            sizes[mup].append([np.sqrt(np.mean(a * a)) for a in (np.asarray(after[0]), *change)])  # over three seeds
    slopes = {mup: dict(zip(('h', 'dh', 'df'), np.polyfit(np.log(widths), np.log(rows), 1)[0], strict=True))
              for mup, rows in sizes.items()}
    print(slopes)
    # measured: at most 0.03 with µP (0.13 for the df of the transformer at these small widths); without it 0.8 to 1.1
    assert max(map(abs, slopes[True].values())) < 0.15, slopes
    assert slopes[False]['df'] > 0.3, slopes  # the control: it grows without µP
    assert slopes[False]['dh'] > 0.3 or optimiser == 'muon', slopes  # features too, but for Muon's


@pytest.mark.parametrize('optimiser, log_rates, D', [('adam', np.arange(-13, -5), 256), ('muon', np.arange(-11, -4), 128)])
def test_the_best_learning_rate_transfers_across_width(resolve, batches, optimiser, log_rates, D):
    """Over widths that differ by a factor of 8 or 4; measure_learning_rates.py has more widths, and AdamW."""
    best = {(mup, width): best_rate(log_rates, losses) for width in (32, D)
            for mup, (_, losses) in learn(resolve, optimiser, 'mlp', width, 2.0**log_rates, 100, 1, batches).items()}
    print(best)
    assert abs(best[True, D] - best[True, 32]) < 1, best  # within a factor of two
    assert best[False, 32] - best[False, D] > 1.2, best  # the control: it falls with the width without µP
