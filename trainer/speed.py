"""Training speed, as tokens a second and as a share of the machine's own matrix-multiply rate."""
import functools
import time
from contextlib import contextmanager

import jax
import jax.numpy as jnp


@functools.cache
def matmul_rate(dtype='float32'):
    """Measured FLOP/s of [2048, 2048]·[2048, 2048] on all devices together (all cores of a CPU), best of three."""
    a = jnp.ones((2048, 2048), dtype)
    multiply = jax.jit(jnp.matmul)
    multiply(a, a).block_until_ready()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        multiply(a, a).block_until_ready()
        seconds.append(time.perf_counter() - start)
    units = jax.process_count() if jax.default_backend() == 'cpu' else jax.device_count()
    return 2 * 2048**3 / min(seconds) * units


def speed(run, steps, seconds):
    """{tokens_per_second, mfu} of `steps` steps, summed over seeds, in `seconds`; {} for no step.

    mfu is the model's FLOPs (model.train_flops_per_token) a second over matmul_rate.
    """
    if not steps:
        return {}
    tokens_per_second = steps * run.derived.tokens_per_step / seconds
    return {'tokens_per_second': tokens_per_second,
            'mfu': tokens_per_second * run.derived.flops_per_token / matmul_rate(run.model.dtype or 'float32')}


@contextmanager
def timed(clock, name):
    """Adds the seconds that the block takes to clock[name]."""
    start = time.perf_counter()
    yield
    clock[name] += time.perf_counter() - start
