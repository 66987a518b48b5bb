"""Trains small models at constant rates with model.py and optimizer.py alone, at many rates at once, for tests and measurements."""
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import data
import model as models
import optimizer

B, STEPS = 128, 100
ARCHS = {'mlp': ('mlp', 'model.base_D=64', 'model.N=1', 'opt.readout_lr_mult=1', f'T={STEPS * B}'),
         'transformer': ('chess', 'ds_path=x', 'model.base_D=64', 'model.N=1', 'model.dh=16', 'model.L=8', 'model.V=32',
                         'opt.embed_lr_mult=10', 'opt.readout_lr_mult=1', f'T={8 * STEPS * B}')}


def power_law_batches(resolve):
    """The first training batches of the power-law task, x [STEPS, B, 8] and y [STEPS, B]."""
    task = data.fourier_task(resolve('mlp', f'opt.B={B}', f'T_eval={B}', f'T={STEPS * B}'))
    batch = jax.jit(lambda raw: jax.lax.map(task.batch, raw))(task.block(0)[:STEPS])
    return batch.x, batch.y


def learn(resolve, optimiser, arch, D, rates, steps, seeds, targets, overrides=()):
    """{mup: (features h and outputs f before and after [rate, seed, …], losses [rate, seed, steps])} with and without µP.

    Rates are arguments of one compiled program: factors on an opt.lr of 1, as those of a schedule.
    """
    runs = {mup: resolve(*ARCHS[arch], f'opt.name={optimiser}', f'model.D={D}', f'opt.B={B}', f'opt.mup={mup}', 'opt.lr=1',
                         'opt.warmup_tokens=0', *overrides) for mup in (True, False)}
    x, y = targets  # [steps, B, …]

    def of(run):
        graphdef, _, roles = models.structure(arch, run.model)
        transform, peaks = optimizer.transformation(run), optimizer.peak_lrs(run)

        def loss(params, x, y):
            f, h = nnx.merge(graphdef, params)(x)
            if arch == 'mlp':
                return jnp.mean(0.5 * (f[:, 0] - y) ** 2), (h, f)
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(f, y)), (h, f)

        def one(rate, seed):
            def step(carry, batch):
                params, moments = carry
                (value, _), g = jax.value_and_grad(loss, has_aux=True)(params, *batch)
                updates, moments = transform.update(g, moments, params)
                return (optimizer.apply_updates(params, updates, peaks, rate), moments), value

            params = models.init(arch, run.model, jax.random.key(seed))
            (last, _), losses = jax.lax.scan(step, (params, transform.init(params)), (x[:steps], y[:steps]))
            return [loss(p, x[0], y[0])[1] for p in (params, last)], losses

        return jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))(np.float32(rates), np.arange(seeds))

    return {mup: of(run) for mup, run in runs.items()}


def best_rate(log_rates, losses):
    """log2 of the rate with the smallest mean loss over seeds and the last forty batches, the same for every rate."""
    final = np.nan_to_num(np.asarray(losses)[:, :, -40:].mean((1, 2)), nan=np.inf)
    i = np.clip(np.argmin(final), 1, len(final) - 2)
    a, b, _ = np.polyfit(log_rates[i - 1:i + 2], final[i - 1:i + 2], 2)  # the minimum, between the learning rates tried
    return -b / (2 * a)
