"""The models: counts, initial values, the forward pass against plain NumPy, causality, compute type, rematerialisation."""
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import model as models


@pytest.fixture(scope='module')
def cfg_of(resolve):
    """cfg_of(arch, *overrides) -> the config.Model of a small model."""
    small = {'mlp': ('mlp', 'model.D=32', 'model.N=2'),
             'transformer': ('chess', 'ds_path=x', 'model.D=32', 'model.dh=16', 'model.N=2', 'model.L=12', 'T=1e6',
                             'opt.warmup_tokens=0')}
    return lambda arch, *overrides: resolve(*small[arch], *overrides).model


def dense(arch, cfg):
    """Weights without zeros, so that every path through the model has an effect. They are the same at every call."""
    rng = np.random.default_rng(1)
    _, shapes, _ = models.structure(arch, cfg)
    return jax.tree.map(lambda w: rng.standard_normal(w.shape, np.float32) / np.float32(math.sqrt(w.shape[0])), shapes)


def forward(arch, cfg):
    graphdef, _, _ = models.structure(arch, cfg)
    return jax.jit(lambda params, x: nnx.merge(graphdef, params)(x))


def init(arch, cfg, seed=0):
    return jax.jit(lambda key: models.init(arch, cfg, key))(jax.random.key(seed))


def inputs(arch, cfg, B=3):
    rng = np.random.default_rng(5)
    return rng.standard_normal((B, cfg.V), np.float32) if arch == 'mlp' else rng.integers(0, cfg.V, (B, cfg.L))


# Counts

@pytest.mark.parametrize('name, overrides, p', [
    ('mlp', ('model.D=384', 'model.N=5'), 1_478_016),  # published
    ('chess', ('ds_path=x', 'model.D=768'), 10_813_440),  # published: V 64, L 128, N 3, mlp_expansion 1
    ('chess', ('ds_path=x', 'model.D=768', 'model.mlp_expansion=4'), 2 * 64 * 768 + 128 * 768 + 3 * 12 * 768**2),
])
def test_parameter_counts(resolve, name, overrides, p):
    assert resolve(name, *overrides).derived.num_params == p


def test_every_weight_has_a_role(cfg_of):
    declared = {'mlp': {'input': 1, 'hidden': 4, 'output': 1}, 'transformer': {'input': 2, 'hidden': 8, 'output': 1}}
    for arch, expected in declared.items():
        _, params, roles = models.structure(arch, cfg_of(arch))
        assert jax.tree.structure(params) == jax.tree.structure(roles)
        found = jax.tree.leaves(roles)
        assert {role: found.count(role) for role in set(found)} == expected


def product_flops(function, *args):
    """FLOPs of all matrix products in the traced function: 2 for each multiplication and its addition."""
    def walk(jaxpr):
        total = 0
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == 'dot_general':
                (contracted, _), _ = eqn.params['dimension_numbers']
                total += 2 * eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
            for param in eqn.params.values():
                inner = getattr(param, 'jaxpr', param)
                if hasattr(inner, 'eqns'):
                    total += walk(inner)
        return total

    return walk(jax.make_jaxpr(function)(*args).jaxpr)


@pytest.mark.parametrize('arch', ['mlp', 'transformer'])
def test_training_flops_are_three_times_those_of_the_forward_products(cfg_of, arch):
    cfg = cfg_of(arch)
    _, params, _ = models.structure(arch, cfg)
    x = inputs(arch, cfg)
    tokens = x.size if arch == 'transformer' else len(x)
    assert models.train_flops_per_token(arch, cfg) * tokens == 3 * product_flops(forward(arch, cfg), params, x)


def test_flops_of_the_mlp_are_six_a_parameter(cfg_of):
    cfg = cfg_of('mlp')
    assert models.train_flops_per_token('mlp', cfg) == 6 * sum(models.param_groups('mlp', cfg).values())


# Initial values

def test_zero_readout_gives_the_loss_of_a_uniform_prediction(cfg_of):
    cfg = cfg_of('transformer')
    params = init('transformer', cfg)
    f, _ = forward('transformer', cfg)(params, inputs('transformer', cfg))
    loss = jax.jit(optax.softmax_cross_entropy_with_integer_labels)(f, inputs('transformer', cfg))
    np.testing.assert_allclose(loss, math.log(cfg.V), rtol=3e-7)  # 64 equal logits; float32 rounding of one logarithm

    cfg = cfg_of('mlp')
    f, h = forward('mlp', cfg)(init('mlp', cfg), inputs('mlp', cfg))
    assert f.shape == (3, 1) and not f.any() and h.any()


@pytest.mark.parametrize('arch', ['mlp', 'transformer'])
def test_initial_variances_and_zero_starts(cfg_of, arch):
    mult = 2.0
    cfg = cfg_of(arch, 'model.D=256', 'model.dh=64', 'model.N=1', f'model.init_std_mult={mult}', 'model.embed_init_std=0.3')
    params = init(arch, cfg)
    block = params['blocks'][0]
    if arch == 'mlp':
        assert_std(params['embed'], 1 / math.sqrt(8))
        hidden, zero = {'fc1': block['fc1']}, {'fc2': block['fc2'], 'readout': params['readout']}
    else:
        assert_std(params['embed'], mult * 0.3)
        assert_std(params['position'], mult * 0.3)
        hidden = {'fc1': block['mlp']['fc1'], 'qkv': block['attention']['qkv']}
        zero = {'fc2': block['mlp']['fc2'], 'out': block['attention']['out'], 'readout': params['readout']}
    for w in hidden.values():
        assert_std(w, mult / math.sqrt(256))  # fan-in is the width
    assert not any(w.any() for w in zero.values())
    assert len(jax.tree.leaves(params)) == (1 if arch == 'mlp' else 2) + len(hidden) + len(zero)


def assert_std(w, std):
    # The mean and the std of n normal draws have standard errors std/√n and std/√2n. The bound is five of them.
    n = w.size
    assert abs(float(w.mean())) < 5 * std / math.sqrt(n)
    assert abs(float(w.std()) / std - 1) < 5 / math.sqrt(2 * n)


def test_init_is_a_function_of_the_key(cfg_of):
    cfg = cfg_of('mlp')
    a, same, other = (init('mlp', cfg, k) for k in (0, 0, 1))
    assert all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a, same)))
    assert not (a['embed'] == other['embed']).any()
    first, second = a['blocks'][0]['fc1'], a['blocks'][1]['fc1']
    assert not (first == second).any()  # weights of one model are drawn independently


# The forward pass in plain NumPy, float64

def np_norm(x):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)


def np_gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def np_mlp(params, x, N):
    h = x @ params['embed']
    for block in params['blocks'].values():
        h = h + 6 / N * np_gelu(np_norm(h) @ block['fc1']) @ block['fc2']
    return np_norm(h) @ params['readout'], h


def np_transformer(params, tokens, N):
    """The model with a loop over sequences, heads and positions."""
    out_f, out_h = [], []
    for row in tokens:
        h = params['embed'][row] + params['position'][:len(row)]
        for block in params['blocks'].values():
            qkv, out = block['attention']['qkv'], block['attention']['out']  # [D, 3, H, K], [H, K, D]
            x, mixed = np_norm(h), np.zeros_like(h)
            for head in range(out.shape[0]):
                q, k, v = (x @ qkv[:, i, head] for i in range(3))  # each [S, K]
                q, k = np_norm(q), np_norm(k)
                for s in range(len(row)):
                    score = np.exp(k[:s + 1] @ q[s] / math.sqrt(q.shape[1]))
                    mixed[s] += (score / score.sum()) @ v[:s + 1] @ out[head]
            h = h + 3 / N * mixed
            h = h + 3 / N * np_gelu(np_norm(h) @ block['mlp']['fc1']) @ block['mlp']['fc2']
        out_f.append(np_norm(h) @ params['readout'])
        out_h.append(h)
    return np.array(out_f), np.array(out_h)


@pytest.mark.parametrize('arch, reference', [('mlp', np_mlp), ('transformer', np_transformer)])
def test_forward_pass_agrees_with_plain_numpy(cfg_of, arch, reference):
    cfg = cfg_of(arch)
    params = dense(arch, cfg)
    x = inputs(arch, cfg)
    f, h = forward(arch, cfg)(params, x)
    want_f, want_h = reference(jax.tree.map(lambda w: np.asarray(w, np.float64), params), np.asarray(x), cfg.N)
    # float32 sums of a few hundred terms of order 1 are good to 1e-5 of the largest entry
    np.testing.assert_allclose(f, want_f, atol=2e-5 * abs(want_f).max())
    np.testing.assert_allclose(h, want_h, atol=2e-5 * abs(want_h).max())


@pytest.mark.parametrize('arch, factor', [('mlp', 6), ('transformer', 3)])
def test_depth_scales_the_branches(cfg_of, arch, factor):
    """In a model of one block, scale_by_depth multiplies the MLP branch by 6/N (MLP) or 3/N (transformer)."""
    step = {}
    for scaled in (True, False):
        cfg = cfg_of(arch, 'model.N=1', f'model.scale_by_depth={scaled}')
        params = dense(arch, cfg)
        block = params['blocks'][0]
        if arch == 'transformer':
            block['attention']['out'] = 0 * block['attention']['out']
            block = block['mlp']
        after = forward(arch, cfg)(params, inputs(arch, cfg))[1]
        block['fc2'] = 0 * block['fc2']
        step[scaled] = after - forward(arch, cfg)(params, inputs(arch, cfg))[1]
    assert abs(step[False]).max() > 0.1
    np.testing.assert_allclose(step[True], factor * step[False], atol=1e-5 * abs(step[True]).max())  # float32 rounding of h


@pytest.mark.parametrize('implementation, S', [('pieces', 200), ('large pieces', 200), ('splash', 384)])
@pytest.mark.parametrize('dtype, size', [('float32', 1e-5), ('bfloat16', 0.03)])
def test_attention_in_pieces_equals_attention(implementation, S, dtype, size):
    """Value and gradients, with the largest possible score (q = k), in pieces of 64 or 128 and a rest, or in blocks of 128."""
    mesh = jax.sharding.Mesh(jax.devices()[:1], ('data',))
    q, k, v, g = (jax.random.normal(key, (2, S, 2, 16), dtype) for key in jax.random.split(jax.random.key(0), 4))
    q, k = models.rms_norm(q), models.rms_norm(k)
    k = k.at[:, 150].set(q[:, 170])

    def result_and_gradients(implementation, *inputs):
        mixed, backward = jax.vjp(lambda *a: models.causal_attention(*a, implementation, mesh), *inputs)
        return jax.tree.map(np.float32, (mixed, backward(g.astype(mixed.dtype))))

    pieces, xla = (result_and_gradients(name, q, k, v) for name in (implementation, 'xla'))
    exact = result_and_gradients('xla', *(a.astype('float32') for a in (q, k, v)))
    for a, b, c in zip(*map(jax.tree.leaves, (pieces, xla, exact)), strict=True):
        # float32: sums of S terms; bfloat16: a few roundings of 0.4%, of which the sum of the gradient of k has S
        assert np.linalg.norm(a - c) < size * np.linalg.norm(c) and np.linalg.norm(b - c) < size * np.linalg.norm(c)


def test_attention_of_each_platform(cfg_of):
    """The device decides, not the platform of the process, which is a CPU here."""
    cpu, h100, amd, tpu = (SimpleNamespace(platform=platform, device_kind=kind) for platform, kind in (
        ('cpu', 'cpu'), ('gpu', 'NVIDIA H100 80GB HBM3'), ('gpu', 'AMD Instinct MI300X'), ('tpu', 'TPU v5 lite')))
    short, long = ((f'model.L={L}', 'model.dh=16') for L in (models.LONG - 1, models.LONG))
    for device, dtype, overrides, wanted in [
            (cpu, 'bfloat16', short, 'pieces'), (h100, 'bfloat16', short, 'cudnn'), (h100, 'bfloat16', long, 'cudnn'),
            (h100, 'float32', short, 'xla'), (h100, 'float32', long, 'large pieces'), (amd, 'bfloat16', short, 'xla'),
            (tpu, 'bfloat16', short, 'large pieces'), (tpu, 'float32', long, 'splash')]:
        assert models.attention_for(cfg_of('transformer', f'model.dtype={dtype}', *overrides), device) == wanted
    odd = cfg_of('transformer', 'model.dtype=bfloat16', 'model.D=36', 'model.dh=12')
    assert models.attention_for(odd, h100) == 'xla'  # no kernel of cuDNN has heads of 12


# Causality

def test_no_gradient_from_the_future(cfg_of):
    """Row s of the table holds the norm of the derivative of output s by the embedding at each position."""
    cfg = cfg_of('transformer')
    run = forward('transformer', cfg)
    params = dense('transformer', cfg)
    tokens = inputs('transformer', cfg, B=1)
    weights = np.random.default_rng(3).standard_normal(cfg.V, np.float32)

    def outputs(position):  # positional embeddings are added to those of the tokens, so their gradients are equal
        return run({**params, 'position': position}, tokens)[0][0] @ weights  # [L]

    table = np.linalg.norm(jax.jit(jax.jacobian(outputs))(params['position']), axis=-1)  # [L outputs, L positions]
    future = np.triu(np.ones((cfg.L, cfg.L), bool), 1)
    assert (table[future] == 0).all()
    assert (table[~future] > 1e-4).all()  # the control: past and present have an effect


# Compute type, remat

@pytest.mark.parametrize('arch', ['mlp', 'transformer'])
def test_bfloat16_computes_on_float32_weights(cfg_of, arch):
    wide, narrow = cfg_of(arch), cfg_of(arch, 'model.dtype=bfloat16')
    params = dense(arch, narrow)
    x = inputs(arch, wide)
    (f32, _), (f16, h16) = forward(arch, wide)(params, x), forward(arch, narrow)(params, x)
    assert h16.dtype == jnp.bfloat16 and f16.dtype == jnp.float32
    error = np.linalg.norm(f16 - f32) / np.linalg.norm(f32)
    assert 1e-4 < error < 0.05  # bfloat16 keeps 8 bits: 0.4% a rounding, a dozen roundings. Below 1e-4 it would not be in use.
    g = jax.eval_shape(jax.grad(lambda p: jnp.sum(forward(arch, narrow)(p, x)[0] ** 2)), params)
    assert {w.dtype for w in jax.tree.leaves((params, g))} == {jnp.dtype('float32')}


@pytest.mark.parametrize('arch', ['mlp', 'transformer'])
def test_remat_changes_no_gradient(cfg_of, arch):
    gradients, traces = [], []
    for remat in (False, True):
        cfg = cfg_of(arch, f'model.remat={remat}')
        params = dense(arch, cfg)
        gradient = jax.grad(lambda p, cfg=cfg: jnp.mean(forward(arch, cfg)(p, inputs(arch, cfg))[0] ** 2))
        gradients.append(jax.jit(gradient)(params))
        traces.append(str(jax.make_jaxpr(gradient)(params)))
    # float32 rounding of the largest entry: the compiler may sum in another order
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * abs(a).max()), *gradients)
    assert 'remat' not in traces[0] and 'remat' in traces[1]  # the control: blocks are recomputed
