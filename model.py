"""The two model families, MLP and decoder-only transformer: shapes, roles and initial values of the weights, and the forward pass.

Letters: B batch, S position (up to L), D width, F hidden width of a branch, H heads, K head size (D = H·K), N blocks, V vocabulary
(or input size of the MLP). No biases and no learned norm scales. Learning rates are in optimizer.py, losses in data.py.
"""
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

LONG = 512  # tokens from which GPUs take the queries in pieces, and TPUs Pallas' kernel


def weight(rngs, shape, std, role):
    """A trainable array [shape], drawn from N(0, std²) in float32, with its role in µP (Tensor Programs V, table 3).

    The role is 'input' (its fan-in is a fixed size), 'hidden' or 'output' (its fan-in is the width). It decides the learning rate
    (optimizer.peak_lr) and the group in which the weight is counted. With std = 0 nothing is drawn.
    """
    value = std * jax.random.normal(rngs.params(), shape) if std else jnp.zeros(shape)
    return nnx.Param(value, role=role)


@jax.custom_vjp
def rms_norm(x):
    """x [..., D] divided by its root mean square, eps 1e-6; always computed in float32."""
    return _rms_norm_forward(x)[0]


def _rms_norm_forward(x):
    y = x.astype(jnp.float32)
    r = jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-6)
    y = (y * r).astype(x.dtype)
    return y, (y, r)


def _rms_norm_backward(residuals, g):
    """r (g - y mean(g y)). It reads the output y, which the next matrix product keeps anyway, and not x."""
    y, r = residuals
    y, g = y.astype(jnp.float32), g.astype(jnp.float32)
    return (r * (g - y * jnp.mean(g * y, -1, keepdims=True))).astype(residuals[0].dtype),


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


class MLP(nnx.Module):
    """Regression MLP, x [B, V] -> f [B, 1], features h [B, D]: p = VD + 2ND² + D."""

    def __init__(self, cfg, rngs):
        D = cfg.D
        std = cfg.init_std_mult / math.sqrt(D)
        self.embed = weight(rngs, (cfg.V, D), 1 / math.sqrt(cfg.V), 'input')
        self.blocks = nnx.List([FeedForward(D, D, std, rngs) for _ in range(cfg.N)])
        self.readout = weight(rngs, (D, 1), 0, 'output')
        self.branch_scale = 6 / cfg.N if cfg.scale_by_depth else 1.0
        self.dtype, self.remat = compute_dtype(cfg), cfg.remat

    def __call__(self, x):
        h = x.astype(self.dtype) @ self.embed.astype(self.dtype)  # [B, D]
        for block in self.blocks:
            branch = nnx.remat(FeedForward.__call__) if self.remat else FeedForward.__call__
            h = h + self.branch_scale * branch(block, h)
        return readout(h, self.readout), h


class Transformer(nnx.Module):
    """Causal pre-norm transformer, tokens [B, S] -> logits f [B, S, V], features h [B, S, D].

    p = 2VD + LD + N(4 + 2·mlp_expansion)D².
    """

    def __init__(self, cfg, rngs, attention=None):
        D = cfg.D
        std = cfg.init_std_mult / math.sqrt(D)
        embed_std = cfg.init_std_mult * cfg.embed_init_std
        self.embed = weight(rngs, (cfg.V, D), embed_std, 'input')
        self.position = weight(rngs, (cfg.L, D), embed_std, 'input')
        self.blocks = nnx.List([Block(cfg, std, rngs, attention) for _ in range(cfg.N)])
        self.readout = weight(rngs, (D, cfg.V), 0, 'output')
        self.branch_scale = 3 / cfg.N if cfg.scale_by_depth else 1.0
        self.dtype, self.remat = compute_dtype(cfg), cfg.remat

    def __call__(self, tokens):
        h = (self.embed[tokens] + self.position[:tokens.shape[1]]).astype(self.dtype)  # [B, S, D]
        for block in self.blocks:
            call = nnx.remat(Block.__call__, static_argnums=2) if self.remat else Block.__call__
            h = call(block, h, self.branch_scale)
        return readout(h, self.readout), h


class Block(nnx.Module):
    """Attention, then a GELU MLP, each a residual branch times branch_scale; h [B, S, D] -> [B, S, D]."""

    def __init__(self, cfg, std, rngs, attention):
        self.attention = Attention(cfg.D, cfg.dh, std, rngs, attention)
        self.mlp = FeedForward(cfg.D, cfg.mlp_expansion * cfg.D, std, rngs)

    def __call__(self, h, branch_scale):
        h = h + branch_scale * self.attention(h)
        return h + branch_scale * self.mlp(h)


class Attention(nnx.Module):
    """Causal attention with RMS-normalised queries and keys per head, scores scaled by 1/√K. attention: causal_attention."""

    def __init__(self, D, K, std, rngs, attention):
        self.attention = attention or causal_attention
        self.qkv = weight(rngs, (D, 3, D // K, K), std, 'hidden')
        self.out = weight(rngs, (D // K, K, D), 0, 'hidden')

    def __call__(self, h):
        D, _, H, K = self.qkv.shape
        qkv = rms_norm(h) @ self.qkv.astype(h.dtype).reshape(D, 3 * D)  # one matrix product: einsum would transpose its result
        q, k, v = (a.reshape(*a.shape[:-1], H, K) for a in jnp.split(qkv, 3, -1))  # each [B, S, H, K]
        mixed = self.attention(rms_norm(q), rms_norm(k), v)
        return mixed.reshape(h.shape) @ self.out.astype(h.dtype).reshape(D, D)


IMPLEMENTATIONS = ('pieces', 'large pieces', 'splash', 'xla', 'cudnn')  # of the attention


def attention_for(cfg, device) -> str:
    """One of IMPLEMENTATIONS for this device: 'pieces' or 'large pieces' of queries, 'xla' (JAX's plain call), or a fused kernel.

    cuDNN's kernels take bfloat16 and heads of up to 128. Otherwise a GPU needs less memory with JAX's call for short sequences, and
    with pieces for long ones. A TPU needs least with splash, whose blocks have 128 tokens or more, for long sequences, and for
    short ones with pieces that fill its matrix unit (docs/performance.md).
    """
    if device.platform == 'cpu':
        return 'pieces'
    if 'NVIDIA' in device.device_kind and compute_dtype(cfg) == jnp.bfloat16 and cfg.dh % 8 == 0 and cfg.dh <= 128:
        return 'cudnn'
    if device.platform == 'tpu':
        return 'splash' if cfg.L >= LONG and cfg.L % 128 == cfg.dh % 8 == 0 else 'large pieces'
    return 'large pieces' if cfg.L >= LONG else 'xla'


def causal_attention(q, k, v, implementation='pieces', mesh=None):
    """softmax(q kᵀ/√K) v over the positions up to each query's own. q, k, v and the result are [B, S, H, K]; q and k have unit rms.

    'pieces' takes 64 queries or more at a time, 'large pieces' 128 or more, each with the keys up to its last query. That leaves
    out nearly half of the scores of long sequences, and on a CPU the rest stays in the caches. Scores of unit-rms vectors are at
    most √K, so exp needs no maximum subtracted, and the normalisation can follow the product with v. The others are JAX's.
    """
    if implementation == 'splash':
        return splash_attention(q, k, v, mesh)
    if implementation in ('xla', 'cudnn'):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)
    S, K = q.shape[1], q.shape[-1]
    q, k, v = (a.swapaxes(1, 2) for a in (q * K**-0.5, k, v))  # [B, H, S, K]
    size = max(128 if implementation == 'large pieces' else 64, S // 8)
    pieces = []
    for start in range(0, S, size):
        end = min(start + size, S)
        seen = jnp.tril(jnp.ones((end - start, end), bool), start)
        scores = (q[:, :, start:end] @ k[:, :, :end].swapaxes(2, 3)).astype(jnp.float32)
        weights = jnp.where(seen, jnp.exp(scores), 0)
        pieces.append(weights.astype(v.dtype) @ v[:, :, :end] / jnp.sum(weights, -1, keepdims=True))
    return jnp.concatenate(pieces, axis=2).swapaxes(1, 2).astype(v.dtype)


def splash_attention(q, k, v, mesh):
    """causal_attention by splash, Pallas' kernel for TPUs, which keeps no scores. Every device takes its examples of the batch.

    Positions are the last axis in memory, since a TPU pads that one to a multiple of 128, and a head's size is 64.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash
    B, S, H, K = q.shape
    names = ('block_q', 'block_kv', 'block_kv_compute', 'block_q_dkv', 'block_kv_dkv', 'block_kv_dkv_compute')
    sizes = splash.BlockSizes(**dict.fromkeys(names, math.gcd(S, 512)), use_fused_bwd_kernel=True,
                              **dict.fromkeys(('q_layout', 'k_layout', 'v_layout'), splash.QKVLayout.SEQ_MINOR))
    kernel = splash.make_splash_mha(splash.MultiHeadMask([splash.CausalMask((S, S))] * H), block_sizes=sizes, head_shards=1,
                                    q_seq_shards=1, interpret=mesh.devices.flat[0].platform == 'cpu')  # in tests
    spec = PartitionSpec('data' if B % mesh.size == 0 else None)
    over_batch = jax.shard_map(jax.vmap(kernel), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return over_batch(*(a.swapaxes(1, 2) for a in (q * K**-0.5, k, v))).swapaxes(1, 2)


class FeedForward(nnx.Module):
    """fc2(gelu(fc1(rms_norm(h)))) with the tanh form of GELU, h [..., D] -> [..., D]."""

    def __init__(self, D, F, std, rngs):
        self.fc1 = weight(rngs, (D, F), std, 'hidden')
        self.fc2 = weight(rngs, (F, D), 0, 'hidden')

    def __call__(self, h):
        return jax.nn.gelu(rms_norm(h) @ self.fc1.astype(h.dtype)) @ self.fc2.astype(h.dtype)


def readout(h, weights):
    """Logits [..., V] of the features h [..., D], float32 so that the loss is computed in float32."""
    return (rms_norm(h) @ weights.astype(h.dtype)).astype(jnp.float32)


def compute_dtype(cfg):
    return jnp.dtype(cfg.dtype or 'float32')


ARCHS = {'mlp': MLP, 'transformer': Transformer}


@functools.cache
def structure(arch, cfg, **options):
    """(graphdef, params, roles) of a model, without allocating it.

    params and roles are nested dicts of the same structure, of ShapeDtypeStruct and of role names. nnx.merge(graphdef, params) is
    the callable model. options: attention=… of a Transformer.
    """
    graphdef, state = nnx.split(nnx.eval_shape(lambda: ARCHS[arch](cfg, nnx.Rngs(0), **options)), nnx.Param)
    roles = jax.tree.map(lambda w: w.get_metadata('role'), state, is_leaf=lambda w: isinstance(w, nnx.Param))
    return graphdef, nnx.to_pure_dict(state), nnx.to_pure_dict(roles)


def init(arch, cfg, key):
    """The initial weights, a nested dict of float32 arrays. A pure function of the PRNG key."""
    return nnx.to_pure_dict(nnx.state(ARCHS[arch](cfg, nnx.Rngs(key)), nnx.Param))


def param_groups(arch, cfg):
    """Number of trainable scalars by role, {'input', 'hidden', 'output'}; their sum is p (embeddings included)."""
    _, params, roles = structure(arch, cfg)
    groups = dict.fromkeys(('input', 'hidden', 'output'), 0)
    for w, role in zip(jax.tree.leaves(params), jax.tree.leaves(roles), strict=True):
        groups[role] += w.size
    return groups


def train_flops_per_token(arch, cfg):
    """FLOPs per token of a training step: 6 for each weight in a matrix product, and 12·N·L·D for attention.

    For the MLP this is 6p. A transformer's embedding tables are looked up rather than multiplied, so it is 6(p - VD - LD) + 12NLD.
    It is used for speeds only; the compute of the scaling law is C = 6tp.
    """
    groups = param_groups(arch, cfg)
    if arch == 'mlp':
        return 6 * sum(groups.values())
    return 6 * (groups['hidden'] + groups['output']) + 12 * cfg.N * cfg.L * cfg.D
