"""The optimiser: µP learning rates by role, learning-rate schedules with their gradient-flow time, Adam, and the gradient trace.

All functions are pure and written for one seed. Weights come as nested dicts from model.py, numbers from config.Run.
"""
import jax
import jax.numpy as jnp
import numpy as np
import optax

import model as models

# Shape f(u) of each decay, with u the share of the decay that has passed (paper, §2.5 and appendix A).
SCHEDULES = {
    'const': lambda u: np.ones_like(u),
    'linear': lambda u: 1 - u,
    'cosine': lambda u: (1 + np.cos(np.pi * u)) / 2,
    'quadratic': lambda u: 1 - u**2,
    'power': lambda u: (1 - u) ** 2,
    'exp': lambda u: 10.0**-u,
    'multicosine': lambda u: (1 + np.cos(3 * np.pi * u)) / 2,
}


def schedule(name, decay_frac, warmup_steps, steps):
    """s [steps + 1] float64 in [0, 1]: the factor on every learning rate at steps 0 … steps (the last is the end of the curve).

    Linear from 0 over warmup_steps, then the named shape over the last decay_frac of what remains.
    """
    step = np.arange(steps + 1, dtype=np.float64)
    start = warmup_steps + (1 - decay_frac) * (steps - warmup_steps)
    s = SCHEDULES[name](np.clip((step - start) / (steps - start), 0, 1))
    s[:warmup_steps] = step[:warmup_steps] / max(warmup_steps, 1)
    return s


def gradient_flow_time(lrs):
    """τ [n]: the sum of the learning rates lrs [n] over the steps taken before each step (paper §3.2)."""
    return np.concatenate([[0.0], np.cumsum(lrs[:-1])])


def peak_lr(role, run):
    """Peak learning rate of a weight under µP with Adam: opt.lr × role multiplier × width multiplier (Tensor Programs V, table 3).

    The width multiplier is base fan-in over fan-in, base_D/D for every weight fed by the width ('hidden', 'output'), and 1 for
    'input'. model.match_mup_at_D holds it at another width's value; opt.mup=false makes it 1.
    """
    m, o = run.model, run.opt
    by_role = {'input': o.embed_lr_mult, 'hidden': 1.0, 'output': o.readout_lr_mult}
    width = m.base_D / (m.match_mup_at_D or m.D) if o.mup and role != 'input' else 1.0
    return o.lr * by_role[role] * width


def peak_lrs(run):
    """The peak learning rate of every weight, in the tree of the parameters."""
    _, _, roles = models.structure(run.arch, run.model)
    return jax.tree.map(lambda role: np.float32(peak_lr(role, run)), roles)


def adam(run):
    """Bias-corrected Adam and decoupled weight decay as an optax transformation; learning rates are applied in apply_updates."""
    o = run.opt
    return optax.chain(optax.scale_by_adam(b1=o.b1, b2=o.b2, eps=o.eps), optax.add_decayed_weights(o.weight_decay))


def apply_updates(params, updates, peak_lrs, lr_scale):
    """params - lr_scale·peak_lr·update, leaf by leaf; lr_scale is the schedule at this step."""
    return jax.tree.map(lambda w, u, lr: w - lr_scale * lr * u, params, updates, peak_lrs)


def preconditioner(moments, peak_lrs, run):
    """P [like params] = peak_lr / (√v̂ + eps): Adam's preconditioner with the schedule left out (paper §3.2).

    v̂ is the bias-corrected second moment. Undefined before the first update, where every entry is NaN or infinite. A weight that
    has had no gradient yet (all but the readout at step 1, for readout and branches start at zero) has P = peak_lr/eps,
    so the traces of the first steps are huge at eps 1e-20; analysis/schedules.py leaves them out.
    """
    adam_state = moments[0]
    correction = 1 - run.opt.b2 ** adam_state.count.astype(jnp.float32)
    return jax.tree.map(lambda v, lr: lr / (jnp.sqrt(v / correction) + run.opt.eps), adam_state.nu, peak_lrs)


def gradient_trace(gradient, batches, P, B):
    """Traces of the mini-batch covariance of g_b and of u_b = P^{1/2} g_b over the batches (paper eq. 13: Tr Σ is Buvar).

    gradient: batch -> (aux, g), g like params. batches: a pytree whose leaves have the number of batches in front. P like params.
    Returns (aux stacked over batches, dict of scalars): Bgvar and Buvar the population variances, gvar = B·Bgvar and
    uvar = B·Buvar those of one example, g2_mean and u2_mean the mean squared norms, gmean2 and umean2 the squared norm of the mean.

    Welford's update keeps the running mean and the current gradient, two copies of the parameters in all, and does not lose the
    variance in the difference of two large numbers. P is fixed here, so mean u = P^{1/2} mean g and one mean serves both.
    """
    def norms(tree):  # |g|² and |P^{1/2} g|²
        g2 = jax.tree.map(lambda g: jnp.sum(g * g), tree)
        u2 = jax.tree.map(lambda g, p: jnp.sum(g * g * p), tree, P)
        return jnp.stack([sum(jax.tree.leaves(g2)), sum(jax.tree.leaves(u2))])

    def add(carry, batch):
        n, mean, spread = carry
        aux, g = gradient(batch)
        delta = jax.tree.map(jnp.subtract, g, mean)
        mean = jax.tree.map(lambda m, d: m + d / (n + 1), mean, delta)
        return (n + 1, mean, spread + norms(delta) * n / (n + 1)), aux

    zero = jax.tree.map(jnp.zeros_like, P)
    (n, mean, spread), aux = jax.lax.scan(add, (jnp.float32(0), zero, jnp.zeros(2)), batches)
    (gvar, uvar), (gmean2, umean2) = spread / n, norms(mean)
    return aux, {'Bgvar': gvar, 'Buvar': uvar, 'gvar': B * gvar, 'uvar': B * uvar, 'gmean2': gmean2, 'umean2': umean2,
                 'g2_mean': gvar + gmean2, 'u2_mean': uvar + umean2}
