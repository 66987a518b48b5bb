"""Says whether the installed jaxlib evaluates an MLP on two CPU devices as on one:  python benchmarks/check_jaxlib.py

It needs JAX and NumPy alone. jaxlib 0.10.2 was once seen to fail on a CPU with AVX2 and without AVX-512, with every YNNPACK fusion
off and xla_cpu_multi_thread_eigen=false: at width 384, 4,096 examples and 24 batches the first 96 rows of each device's half of
every batch were wrong. 96 rows are two of the 48-row panels in which Eigen packs a matrix for oneDNN's kernel, so these products
are suspected. With the environment variable ONEDNN_MAX_CPU_ISA=AVX2 (or AVX, SSE41) oneDNN takes its kernels for older processors.
"""
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

D, B, BATCHES, BLOCKS, INPUTS = 384, 4096, 24, 5, 8
FUSIONS = 'xla_cpu_experimental_ynn_fusion_type'
SETTINGS = {'defaults': {}, 'no YNNPACK': {FUSIONS: ''},
            'products alone in YNNPACK': {FUSIONS: 'LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT'}}


def example_losses(weights, x):
    """Losses [B] of a residual MLP on inputs x [B, INPUTS]."""
    h = x @ weights['in']
    for a, b in weights['blocks']:
        y = h * jax.lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-6)
        h = h + jax.nn.gelu(y @ a) @ b
    return jnp.square((h @ weights['out'])[:, 0] - jnp.sum(x, -1))


def evaluate(weights, batches):
    """(losses [BATCHES, B], squared gradient norms [BATCHES]) of the batches [BATCHES, B, INPUTS]."""
    def one(_, x):
        def mean(weights):
            losses = example_losses(weights, x)
            return jnp.mean(losses), losses
        (_, losses), gradient = jax.value_and_grad(mean, has_aux=True)(weights)
        return None, (losses, sum(jnp.sum(g * g) for g in jax.tree.leaves(gradient)))

    return jax.lax.scan(one, None, batches)[1]


def on_devices(n, options, weights, batches):
    """The results of `evaluate` on n devices, each with one thread if there are several."""
    mesh = Mesh(jax.devices()[:n], ('data',))
    batches = jax.device_put(batches, NamedSharding(mesh, PartitionSpec(None, 'data')))
    options = options | ({'xla_cpu_multi_thread_eigen': False} if n > 1 else {})
    program = jax.jit(evaluate, compiler_options=options)
    return [np.asarray(a, np.float64) for a in program(jax.device_put(weights, NamedSharding(mesh, PartitionSpec())), batches)]


def main():
    jax.config.update('jax_num_cpu_devices', 2)
    draw = np.random.default_rng(0).standard_normal
    matrix = partial(lambda scale, *shape: (scale * draw(shape)).astype(np.float32), D**-0.5)
    weights = {'in': matrix(INPUTS, D), 'blocks': [(matrix(D, D), matrix(D, D)) for _ in range(BLOCKS)], 'out': matrix(D, 1)}
    batches = draw((BATCHES, B, INPUTS)).astype(np.float32)
    losses, norms = on_devices(1, {}, weights, batches)
    print(f'jaxlib {jax.lib.__version__}, {jax.devices()[0].device_kind}; two devices against one:')
    failed = False
    for name, options in SETTINGS.items():
        found, found_norms = on_devices(2, options, weights, batches)
        error = np.abs(found - losses) / losses.mean()
        wrong = np.unique(np.nonzero(error > 1e-4)[1])  # rounding alone gives 1e-6
        failed |= bool(len(wrong))
        rows = f'; {len(wrong)} rows wrong, the first are {wrong[:4].tolist()}' if len(wrong) else ''
        norm_error = np.abs(found_norms / norms - 1).max()
        print(f'  {name}: largest error of a loss {error.max():.1e}, of a gradient norm {norm_error:.1e}{rows}')
    sys.exit(failed)


if __name__ == '__main__':
    main()
