"""The statistical model behind the forecasts: a Gaussian process over all loss curves of a ladder of models.

A ladder is a family of models, each trained to its horizon C* FLOPs. Its curves are compared at equal normalised compute x = C/C*.
Write u = log C* and let L0 be the irreducible loss. One run of a model is

    z(x, u) = link(L) = g(x) - b·u + w(u) + d(x, u) + level + noise,     link(L) ≈ log(L - L0)

- link is log(L - L0), bent where a small model is still close to its loss before training (see `link`).
- g is the normalised curve that all models share. It is free at every knot.
- b is the exponent of the scaling law. Its prior is normal, from published laws (EXPONENT_PRIOR).
- w is the smooth departure of the final losses from a power law: an integrated random walk in u.
- d is the drift of the normalised curve with size. It vanishes at x = 1, where every curve is normalised. One part of it lasts: it
  is smooth in log x. The other is transient: rough and largest at small x. Both are smooth in u, plus a share of each model.
- level is a model's own departure from the law, alike at all x, as models differ in tuning, batch and data order.
- noise is the variation of one run. A run of the same model with another seed shares part of it, as both see the same batches.

What is smooth in u is a random walk. The lasting drift also has a trend in u. A wrong L0 bends the curves along a trend, too. So
the prior of the trend decides how much their collapse says about L0, and its width is fixed (DRIFT_TREND).

Given L0 and six other parameters, everything above is jointly Gaussian, so a forecast is a conditional distribution. Conditioning
on the first part of the target's own curve is the same calculation with more data. The seven parameters ("scales") are

    arcsin((L0/least loss)^(1/2)), kappa of the link, and the logarithms of five standard deviations:
    w, lasting d, transient d, level, noise shared by seeds (relative to the noise of one seed)

The first two have uniform priors (for L0 it is Jeffreys' prior of a proportion). The standard deviations have half-Cauchy priors:
among few models a log-uniform prior would make them vanish (Gelman 2006). importance_sampling.py samples the posterior.
"""

from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls
from scipy.special import ndtr

from analysis import collapse, scaling_law
from analysis.beyond import importance_sampling
from analysis.table import LogError

KNOTS = np.array([0.02, 0.04, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.55, 0.7, 0.85, 1.0])  # x of the model, dense where curves bend
EXPONENT_PRIOR = 0.16, 0.07   # mean, sd of b: Hoffmann et al. 2022 find 0.15 in compute, Henighan et al. 2020 0.05 to 0.24
CURVE_PRIOR_VARIANCE = 1.0    # of g about the ladder's mean curve: nothing is known before
# Length in log x over which a run's noise is correlated. From the differences between seeds of four ladders: within 1 nat of the
# best of 14 kernels tried (Matérn 3/2 with 2.0), and 50 nats better than an exponential kernel with length 0.7.
NOISE_CORRELATION_LENGTH = 1.5
DRIFT_TREND = 0.003           # sd, per nat of compute and of x. With the law's L0: authors' MLPs 0.001, our transformers 0.02
ANGLE_AND_KAPPA_BOUNDS = np.array([[0.0, 1.5], [0.02, 1.0]])
# Medians of the half-Cauchy priors, in the order above; w and d are per nat of compute (and of x). Level: 104 language models
# depart from one law by 0.8% of the loss in the median (Gadre et al. 2024, figure 5), so the sd is 1% of L and 2% of L - L0. The
# others are near their posterior medians for the authors' ladders and ours.
SCALE_SIZES = np.array([3e-3, 3e-3, 3e-4, 2e-2, 0.5])
SINGLE_SEED_NOISE = np.array([4e-5, 4e-5, 2e-5, 0])  # used if no model has two seeds; only its shape counts, its size is sampled
NOISE_L0 = np.arange(14) / 14   # L0 over the least loss, where the noise relative to L - L0 is fitted; in between interpolated
MAX_PLATEAU_SHARE = 0.95      # (L - L0)/(initial loss - L0) is cut here: a larger share says only that nothing is learned yet
SAME_SIZE_TOLERANCE = 0.01    # in log C*: models this close are one size, as horizons are rounded to whole steps


class Ladder(NamedTuple):
    """Loss curves by model, ordered by size."""
    x: np.ndarray         # [K] knots
    p: np.ndarray         # [M] parameters
    compute: np.ndarray   # [M] FLOPs, C*
    losses: list          # M arrays [seeds, K]
    grid: np.ndarray      # [G] the finer x of collapse.GRID, for the curves that are returned
    mean: np.ndarray      # [M, G] mean over seeds at `grid`
    initial_loss: float   # before the first update; inf if the log does not have it


class Draws(NamedTuple):
    """Posterior draws of the curves of T targets."""
    L0: np.ndarray        # [S]
    loss: np.ndarray      # [S, T, G] at Ladder.grid


def read_ladder(table, extra_knots=()):
    """The Ladder of a clean table. extra_knots are more x to use as knots, e.g. where the known part of a target ends.

    Raises LogError for fewer than three models.
    """
    knots = np.union1d(KNOTS, extra_knots)
    curves, points = collapse.curves(table, np.union1d(knots, collapse.GRID)), scaling_law.optimal_points(table)
    if len(points.p) < 3:
        raise LogError(f'a forecast needs a ladder of at least three models, got {len(points.p)}')
    knot = np.isin(curves.x, knots)
    fine = np.isin(curves.x, collapse.GRID) & (curves.x >= curves.x[knot][0])
    losses = [curves.loss[curves.model == m] for m in range(len(points.p))]
    initial_loss = table.loc[table['compute'] == 0, 'test_loss'].median()
    return Ladder(curves.x[knot], points.p, points.compute, [L[:, knot] for L in losses], curves.x[fine],
                  np.stack([L[:, fine].mean(0) for L in losses]), float(initial_loss) if np.isfinite(initial_loss) else np.inf)


def select(ladder, keep):
    """The Ladder of the models keep [M], given as indices or booleans."""
    losses = [ladder.losses[m] for m in np.arange(len(ladder.p))[keep]]
    return ladder._replace(p=ladder.p[keep], compute=ladder.compute[keep], losses=losses, mean=ladder.mean[keep])


def link(loss, L0, initial_loss, kappa):
    """(z, dz/dlog(loss - L0)): the logarithm of the power law behind a loss that cannot exceed the initial loss.

    With k = 1/kappa,  (L - L0)^(-k) = e^(-k·z) + (initial_loss - L0)^(-k).  k = 1 is the model M4 of Alabdulmohsin et al. 2022;
    k → ∞ is the plain logarithm. loss, L0 and kappa broadcast.
    """
    left = 1 - np.minimum((loss - L0) / (initial_loss - L0), MAX_PLATEAU_SHARE) ** (1 / kappa)
    return np.log(loss - L0) - np.log(left) * kappa, 1 / left


def inverse_link(z, L0, initial_loss, kappa):
    """The reducible loss L - L0 of z; shapes as in `link`."""
    return np.exp(z - np.logaddexp(0, (z - np.log(initial_loss - L0)) / kappa) * kappa)


def noise_correlations(x):
    """[3, K, K] correlations of a run's noise along x: constant, correlated (Matérn 3/2), white."""
    lag = np.sqrt(3) * np.abs(np.log(x)[:, None] - np.log(x)) / NOISE_CORRELATION_LENGTH
    return np.stack([np.ones_like(lag), (1 + lag) * np.exp(-lag), np.eye(len(x))])


def fit_noise(ladder, L0):
    """[4] noise of a run relative to the reducible loss: variances of the three parts of noise_correlations, and the tilt.

    The noise has covariance x^tilt · x'^tilt · Σ variance·correlation. The variances are fitted to the covariance of the seeds by
    non-negative least squares. None if no model has two seeds that differ.
    """
    deviations = np.concatenate([(L - L.mean(0)) / (L.mean(0) - L0) for L in ladder.losses])
    square, freedom, x = (deviations ** 2).sum(0), sum(len(L) - 1 for L in ladder.losses), ladder.x
    if not square.any():
        return None
    tilt = np.polyfit(np.log(x), np.log(square + 1e-9 * square.max()), 1)[0] / 2
    covariance = (deviations / x ** tilt).T @ (deviations / x ** tilt) / freedom
    variances, _ = nnls(noise_correlations(x).reshape(3, -1).T, covariance.ravel())
    return np.append(np.maximum(variances, 1e-3 * np.trace(covariance) / len(x)), tilt)


class Field(NamedTuple):
    """The Gaussian process at the knots of the M models of a ladder and, after them, of T targets.

    N = (M + T)·K values, the knots varying fastest. The covariance is the sum of the eleven `parts`, weighted by `_unpack`.
    """
    ladder: Ladder
    loss: np.ndarray           # [M + T, K] mean over a model's seeds; NaN where not observed
    least_loss: float          # of all runs: L0 lies below it
    u: np.ndarray              # [M + T] log C*, about the ladder's mean
    own_noise: np.ndarray      # [M + T] variance of a seed's own noise in the mean over seeds: 1/seeds, or 0 if all noise is shared
    noise: np.ndarray          # [14, 4] at L0 = NOISE_L0·least_loss, see fit_noise
    parts: np.ndarray          # [11, N, N] of g, b and trend; w; lasting d; transient d; level; own noise (3); shared noise (3)
    observed: np.ndarray       # [n] indices of the observed values


def build_field(ladder, compute, losses=None, seeds=1):
    """The Field with targets at compute [T] FLOPs.

    losses [T, K] are the observed parts of the targets' curves, means over `seeds` runs, NaN where not observed.
    """
    x, T = ladder.x, len(compute)
    losses = np.full((T, len(x)), np.nan) if losses is None else losses
    loss = np.concatenate([[L.mean(0) for L in ladder.losses], losses])
    least_loss = min(np.nanmin(loss), min(L.min() for L in ladder.losses))
    u = np.log(np.concatenate([ladder.compute, compute]))
    u -= u[:-T].mean()

    fitted = [fit_noise(ladder, share * least_loss) for share in NOISE_L0]
    own_noise = 1 / np.array([len(L) for L in ladder.losses] + [seeds] * T)
    if fitted[0] is None:  # with one seed a model, all noise counts as shared
        fitted, own_noise = [SINGLE_SEED_NOISE] * len(NOISE_L0), 0 * own_noise
    return Field(ladder, loss, least_loss, u, own_noise, np.array(fitted), _covariance_parts(u, x, own_noise),
                 np.flatnonzero(np.isfinite(loss)))


def _covariance_parts(u, x, own_noise):
    """The parts [11, N, N] of the Field for models at u = log C*: each a covariance across models times one along the curve."""
    size, age = u - u.min(), -np.log(x)
    walk, transient = (np.minimum.outer(t, t) for t in (size, 1 / x ** 2 - 1))   # Brownian motions; transients fall as 1/x
    integrated_walk, curved = (np.minimum.outer(t, t) ** 2 * (3 * np.maximum.outer(t, t) - np.minimum.outer(t, t)) / 6
                               for t in (size, age))
    lasting = np.outer(age, age) + curved                                        # a cubic smoothing spline in log x
    trend, same_size = np.outer(u, u), np.isclose(u[:, None], u, rtol=0, atol=SAME_SIZE_TOLERANCE)
    noise = noise_correlations(x)
    constant, _, white = noise

    g_b_and_trend = (np.kron(np.ones_like(walk), CURVE_PRIOR_VARIANCE * white)
                     + np.kron(trend, EXPONENT_PRIOR[1] ** 2 * constant + DRIFT_TREND ** 2 * lasting))
    return np.stack([g_b_and_trend, np.kron(integrated_walk, constant), np.kron(walk + same_size, lasting),
                     np.kron(walk + same_size, transient), np.kron(same_size, constant),
                     *(np.kron(np.diag(own_noise), one) for one in noise), *(np.kron(same_size, one) for one in noise)])


def _unpack(field, scales):
    """L0 [H], kappa [H], weights of the parts [H, 11] and tilt of the noise [H] of scales [H, 7]."""
    share = np.sin(scales[:, 0]) ** 2
    *own, tilt = (np.interp(share, NOISE_L0, one) for one in field.noise.T)
    own = np.stack(own, -1)
    weights = np.concatenate([np.ones((len(share), 1)), np.exp(2 * scales[:, 2:6]), own, np.exp(2 * scales[:, 6:]) * own], 1)
    return share * field.least_loss, scales[:, 1], weights, tilt


def _transform(field, L0, kappa, tilt):
    """The observed losses in the coordinates of the Gaussian process, for H values of the parameters.

    Returns z less its prior mean [H, n]; the mean of z at each knot [H, K]; the log Jacobian of the transformation [H]; and the
    factor [H, N] by which noise is larger in z than relative to the loss, from its tilt and the slope of the link. Where a model is
    not observed, the slope is that of the model nearest in size.
    """
    L0, kappa, tilt = (one[:, None, None] for one in (L0, kappa, tilt))
    z, slope = link(field.loss, L0, field.ladder.initial_loss, kappa)                        # [H, M + T, K]
    centre = np.nanmean(z, 1)
    value = z - centre[:, None] + EXPONENT_PRIOR[0] * field.u[:, None]
    # One value a knot determines g, whose prior is flat in the loss. It does not count in the Jacobian.
    count = np.isfinite(field.loss).sum(0)
    jacobian = ((count - 1) * np.nanmean(np.log(slope) - np.log(field.loss - L0), 1)).sum(-1)
    nearest = np.abs(field.u[:, None] - field.u[:len(field.ladder.p)]).argmin(1)
    noise_factor = np.where(np.isfinite(slope), slope, slope[:, nearest]) * field.ladder.x ** tilt
    return (value.reshape(len(L0), -1)[:, field.observed], centre, jacobian, noise_factor.reshape(len(L0), -1))


def _covariance(field, weights, noise_factor, rows, columns):
    """[H, rows, columns] covariance between the values at these indices."""
    parts = field.parts[:, rows[:, None], columns]
    # einsum and not @: a matrix product of this shape starts threads that cost more time than they save
    signal, noise = (np.einsum('hj,jrc->hrc', weights[:, some], parts[some]) for some in (slice(5), slice(5, None)))
    return signal + noise * noise_factor[:, rows, None] * noise_factor[:, None, columns]


def log_likelihood(field, scales):
    """Log density [H] of the observed losses given scales [H, 7], up to a constant."""
    L0, kappa, weights, tilt = _unpack(field, scales)
    value, _, jacobian, noise_factor = _transform(field, L0, kappa, tilt)
    n = len(field.observed)
    # The data are appended to the covariance as one more row. The last row of the Cholesky factor is then the whitened data.
    bordered = np.full((len(L0), n + 1, n + 1), 1e15)
    bordered[:, :n, :n] = _covariance(field, weights, noise_factor, field.observed, field.observed)
    bordered[:, n, :n] = bordered[:, :n, n] = value
    factor = np.linalg.cholesky(bordered)
    log_determinant = np.log(np.diagonal(factor, axis1=1, axis2=2)[:, :n]).sum(-1)
    return jacobian - log_determinant - 0.5 * (factor[:, n, :n] ** 2).sum(-1)


def sample_scales(field, rng):
    """Draws [S, 7] of the scales from their posterior; some 3,000 evaluations of the likelihood. Raises LogError on failure."""
    low, high = ANGLE_AND_KAPPA_BOUNDS.T

    def scales_of(z):  # ndtr turns a standard normal variable into a uniform one; the tangent makes that half-Cauchy
        uniform = np.clip(ndtr(z), 1e-3, 1 - 1e-3)
        return np.concatenate([low + (high - low) * uniform[:, :2], np.log(SCALE_SIZES * np.tan(np.pi / 2 * uniform[:, 2:]))], 1)

    return scales_of(importance_sampling.sample(lambda z: log_likelihood(field, scales_of(z)), 7, rng))


def condition(field, scales):
    """Distribution of z = link(L) of the targets at the knots, given the observed losses and scales [H, 7].

    Returns the mean [H, T·K] and the covariance [H, T·K, T·K], without the white noise of single evaluations.
    """
    L0, kappa, weights, tilt = _unpack(field, scales)
    value, centre, _, noise_factor = _transform(field, L0, kappa, tilt)
    M = len(field.ladder.p)
    targets = np.arange(M * len(field.ladder.x), field.loss.size)
    smooth = weights * [1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 0]                                         # without white noise
    across = _covariance(field, smooth, noise_factor, targets, field.observed)
    observed = _covariance(field, weights, noise_factor, field.observed, field.observed)
    gain = np.linalg.solve(observed, np.swapaxes(across, 1, 2))                               # [H, n, T·K]
    prior_mean = (centre[:, None] - EXPONENT_PRIOR[0] * field.u[M:, None]).reshape(len(L0), -1)
    mean = prior_mean + np.einsum('hnk,hn->hk', gain, value)
    return mean, _covariance(field, smooth, noise_factor, targets, targets) - across @ gain


def draw_curves(field, rng, scales, curves_per_scale=4):
    """Posterior curves of the targets as Draws: several for each of scales [H, 7]."""
    mean, covariance = (np.repeat(one, curves_per_scale, 0) for one in condition(field, scales))
    ladder, (L0, kappa, weights, tilt) = field.ladder, _unpack(field, np.repeat(scales, curves_per_scale, 0))
    factor = np.linalg.cholesky(covariance + 1e-10 * np.eye(covariance.shape[-1]))
    z = mean + np.einsum('hij,hj->hi', factor, rng.normal(size=mean.shape))
    z = z.reshape(len(L0), -1, len(ladder.x))                                                 # [S, T, K]

    # Between the knots the curves follow the ladder's mean curve. Only the deviation from it is interpolated, linearly in log x.
    L0, kappa, tilt = (one[:, None, None] for one in (L0, kappa, tilt))
    mean_curve = link(ladder.mean, L0, ladder.initial_loss, kappa)[0].mean(1, keepdims=True)  # [S, 1, G]
    knots, grid = np.log(ladder.x), np.log(ladder.grid)
    at_knots, at_grid = (np.stack([np.interp(new, old, one) for one in np.eye(len(old))])     # linear interpolation as matrices
                         for new, old in ((knots, grid), (grid, knots)))
    deviation = (z - mean_curve @ at_knots) @ at_grid                                         # [S, T, G]

    white_variance = weights[:, 7:8] * field.own_noise[len(ladder.p):] + weights[:, 10:]       # [S, T] at x = 1
    white_noise = np.sqrt(white_variance)[..., None] * ladder.grid ** tilt * rng.normal(size=deviation.shape)
    reducible = inverse_link(mean_curve + deviation, L0, ladder.initial_loss, kappa) * np.exp(white_noise)
    return Draws(L0[:, 0, 0], L0 + reducible)


def posterior_curves(ladder, compute, observed=None, seeds=1, scales=None):
    """Draws for T targets at compute [T] FLOPs.

    observed [T, K]: see build_field. scales [S, 7]: from sample_scales, to save the time of sampling.
    """
    rng = np.random.default_rng(0)
    field = build_field(ladder, compute, observed, seeds)
    return draw_curves(field, rng, sample_scales(field, rng) if scales is None else scales)
