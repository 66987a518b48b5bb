"""The optimiser: µP rules by role, learning-rate schedules with their gradient-flow time, Adam and Muon, and the gradient trace.

All functions are pure and written for one seed. Weights come as nested dicts from model.py, numbers from config.Run.
"""
import math

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


# The width rules of µP: the power of base_D/D in the learning rate, and in the independent weight decay, of a weight of each role.
WIDTH_POWERS = {
    'adam': {'input': 0, 'hidden': 1, 'output': 1},  # Tensor Programs V, table 3
    # Hidden: the update has the spectral norm √(fan-out/fan-in), right at any width (arXiv:2310.17813, 2512.05620). Others: Adam.
    'muon': {'input': 0, 'hidden': 0, 'output': 1},
    # arXiv:2512.05620. Of input weights it is ours: with Adam, an independent decay of lr·λ is then a weight decay of λ.
    'independent_decay': {'input': 0, 'hidden': 1, 'output': 1}}

# Axes of the fan-in and of the fan-out of the matrix that a hidden weight holds, by its number of axes: a matrix, the out [H, K, D]
# and the qkv [D, 3, H, K] of attention. An axis that is neither counts matrices, which are orthogonalised one by one.
MATRIX_AXES = {2: ((0,), (1,)), 3: ((0, 1), (2,)), 4: ((0,), (2, 3))}


def width_factor(rule, role, run):
    """The factor of one of WIDTH_POWERS. model.match_mup_at_D holds it at another width's value; opt.mup=false makes it 1."""
    m = run.model
    return (m.base_D / (m.match_mup_at_D or m.D)) ** WIDTH_POWERS[rule][role] if run.opt.mup else 1.0


def peak_lr(role, run):
    """Peak learning rate of a weight: opt.lr × role multiplier × width factor."""
    o = run.opt
    by_role = {'input': o.embed_lr_mult, 'hidden': 1.0, 'output': o.readout_lr_mult}
    return o.lr * by_role[role] * width_factor(o.name, role, run)


def peak_lrs(run):
    """The peak learning rate of every weight, in the tree of the parameters."""
    _, _, roles = models.structure(run.arch, run.model)
    return jax.tree.map(lambda role: np.float32(peak_lr(role, run)), roles)


def decay_per_step(role, run):
    """The share of a weight that a step at the peak rate takes; it follows the schedule. Set in one of three ways.

    opt.weight_decay is multiplied by the weight's learning rate. opt.independent_decay is not, and has a width factor of its own.
    opt.decay_timescale τ is 1/(share · steps), in runs, the same for every weight (Wang and Aitchison 2024, arXiv:2405.13698).
    """
    o = run.opt
    if o.decay_timescale:
        return 1 / (o.decay_timescale * run.derived.steps)
    return peak_lr(role, run) * o.weight_decay + o.independent_decay * width_factor('independent_decay', role, run)


def transformation(run):
    """The optimiser and its weight decay as an optax transformation; learning rates are applied in apply_updates.

    Muon (Jordan 2024) takes hidden weights, with optax's Nesterov momentum and five Newton-Schulz steps. Adam takes the rest.
    """
    o, (_, _, roles) = run.opt, models.structure(run.arch, run.model)
    step = optax.scale_by_adam(b1=o.b1, b2=o.b2, eps=o.eps)
    if o.name == 'muon':
        muon = optax.chain(optax.contrib.scale_by_muon(beta=o.momentum, eps=o.eps, weight_dimension_numbers=matrices),
                           optax.stateless(lambda updates, _: jax.tree.map(lambda u: u * spectral_norm(u.shape), updates)))
        step = optax.partition({'adam': step, 'muon': muon},
                               jax.tree.map(lambda role: 'muon' if role == 'hidden' else 'adam', roles))
    decay = jax.tree.map(lambda role: decay_per_step(role, run) / (peak_lr(role, run) or math.inf), roles)  # none at a rate of 0
    return optax.chain(step, optax.stateless(lambda updates, params: jax.tree.map(
        lambda u, w, share: u + share * w if share else u, updates, params, decay)))


def matrices(weights):
    """optax's name for MATRIX_AXES, weight by weight."""
    return jax.tree.map(lambda w: optax.contrib.MuonDimensionNumbers(*MATRIX_AXES[w.ndim]), weights)


def spectral_norm(shape):
    """√(fan-out/fan-in) of the matrix that a hidden weight of this shape holds: the size of Muon's update at a rate of 1."""
    fan_in, fan_out = (math.prod(shape[axis] for axis in axes) for axes in MATRIX_AXES[len(shape)])
    return math.sqrt(fan_out / fan_in)


def apply_updates(params, updates, peak_lrs, lr_scale):
    """params - lr_scale·peak_lr·update, leaf by leaf; lr_scale is the schedule at this step."""
    return jax.tree.map(lambda w, u, lr: w - lr_scale * lr * u, params, updates, peak_lrs)


def preconditioner(moments, peak_lrs, run):
    """P [like params] = peak_lr / (√v̂ + eps): Adam's preconditioner with the schedule left out (paper §3.2).

    v̂ is the bias-corrected second moment. Undefined before the first update, where every entry is NaN or infinite. A weight that
    has had no gradient yet (all but the readout at step 1, for readout and branches start at zero) has P = peak_lr/eps,
    so the traces of the first steps are huge at eps 1e-20; analysis/schedules.py leaves them out. Muon's preconditioner of a
    matrix is not diagonal: with it every entry is NaN, and so are the traces of the preconditioned gradient.
    """
    if run.opt.name != 'adam':
        _, shapes, _ = models.structure(run.arch, run.model)
        return jax.tree.map(lambda w: jnp.full(w.shape, jnp.nan), shapes)
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
