"""The hierarchical model of a ladder: given the floor L0, the logs of all its reducible losses are one Gaussian field.

    z = link(L_m(x)) = g(x) - b·u + w(u) + d(x, u) + noise(m, x),     u = log C* of model m, x = C/C*

link is log(L - L0), but for small models near the plateau before learning. g, the universal curve, is free. b has a wide prior
from published laws. w is what the law departs from a power law, d the drift of ℓ with size; w and d's early transients are
corrections to scaling, whose steps die out as C*^(-q) (the paper's limit is the common curve). d has a lasting part beside them,
smooth in log x: a floor L0 that is off bends the curves smoothly too, and would be blamed for what a rough d cannot explain.
d vanishes at x = 1, where ℓ = 1, and is the freer the earlier. The noise has the seeds' covariance, and a share that all seeds of a
model have in common: they see the same batches.

So a curve's early part, its end and the other models' curves are jointly Gaussian: a forecast is conditioning, and an early
read-out is the same with more to condition on; the scales (L0, the sizes of w and d, the shared noise) are sampled from their
posterior. L0 owes most to the whole curves: differences L(x) - L(1) fall as C^(-b) whatever L0 is.
"""

from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls
from scipy.special import logsumexp, ndtr

from analysis import collapse, scaling_law
from analysis.table import LogError

KNOTS = np.array([0.02, 0.04, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.55, 0.7, 0.85, 1.0])  # x of the model, dense where curves bend
EXPONENT = 0.16, 0.07  # prior of b: Hoffmann et al. 2022 0.15 in compute, Henighan et al. 2020 0.05 to 0.24
FADING = 0.4           # q: of corrections to scaling; a model's 10% are 4% at ten times its compute
MEMORY = 1.5           # of the noise along a run, in log x: by the seeds' differences in four ladders, within a nat of the
                       # likeliest of 14 kernels tried (Matérn 3/2 with 2.0), and 50 nats above an exponential one of 0.7
# Log-uniform priors: the exponent's walk (w), d's lasting part (a nat of compute and of x) and transients, the shared noise.
SCALES = np.log([[3e-4, 0.03], [1e-4, 0.2], [1e-5, 0.1], [0.1, 3.0]])
ONE_SEED = np.array([4e-5, 4e-5, 2e-5, 0])  # shape of the noise where no model has two seeds; its size is then sampled
NEAR = 0.95            # a loss nearer to the plateau than this share is taken to be there
FLAT = 1.0             # prior variance of g about the ladder's mean: nothing is known
SAME = 0.01            # nats of compute within which models are of one size: horizons are rounded to whole steps
ENOUGH, TAILS = 400, 5  # even weights that a sample is worth; degrees of freedom of its proposals


class Ladder(NamedTuple):
    """Loss curves by model, ordered by size."""
    x: np.ndarray        # [K] knots
    p: np.ndarray        # [M] parameters
    compute: np.ndarray  # [M] FLOPs, C*
    losses: list         # M arrays [seeds, K]
    fine: np.ndarray     # [G] the grid of figures/collapse.py
    mean: np.ndarray     # [M, G] seed means on it
    plateau: float       # loss before the first update, inf if the log does not have it


class Draws(NamedTuple):
    """Posterior draws of the curves of models that are not (wholly) seen."""
    L0: np.ndarray       # [S]
    loss: np.ndarray     # [S, T, G] at Ladder.fine


def gather(table, more=()):
    """The Ladder of a clean table; `more` are x to be knots too (where an early part ends)."""
    knots = np.unique(np.concatenate([KNOTS, np.asarray(more, float)]))
    curves, fine = collapse.curves(table, knots), collapse.curves(table)
    points = scaling_law.optimal_points(table)
    if len(points.p) < 3:
        raise LogError(f'a forecast needs a ladder of at least three models, got {len(points.p)}')
    use = fine.x >= curves.x[0] - 1e-9
    mean = np.stack([fine.loss[fine.model == m][:, use].mean(0) for m in range(len(fine.p))])
    start = table.loc[table['compute'] == 0, 'test_loss'].median()
    return Ladder(curves.x, points.p, points.compute, [curves.loss[curves.model == m] for m in range(len(curves.p))],
                  fine.x[use], mean, float(start) if np.isfinite(start) else np.inf)


def choose(ladder, keep):
    """The Ladder of the models keep [M] (indices or booleans)."""
    index = np.arange(len(ladder.p))[keep]
    return ladder._replace(p=ladder.p[index], compute=ladder.compute[index], losses=[ladder.losses[i] for i in index],
                           mean=ladder.mean[index])


def link(loss, L0, plateau, kappa):
    """z = the log of the power law behind a loss, and dz/dlog(loss - L0): what is learned is bounded by the plateau.

    (L - L0)^-k = e^(-k·z) + (plateau - L0)^-k, k = 1/kappa: the M4 of Alabdulmohsin et al. 2022 for k = 1, the plain logarithm
    for k → ∞. loss [H, ...]; L0, kappa [H].
    """
    L0, k = (np.reshape(one, np.shape(one) + (1,) * (np.ndim(loss) - 1)) for one in (L0, 1 / kappa))
    left = 1 - np.minimum((loss - L0) / (plateau - L0), NEAR) ** k
    return np.log(loss - L0) - np.log(left) / k, 1 / left


def unlink(z, L0, plateau, kappa):
    """Reducible loss of z, the inverse of link; shapes as there."""
    L0, k = (np.reshape(one, np.shape(one) + (1,) * (np.ndim(z) - 1)) for one in (L0, 1 / kappa))
    return np.exp(z - np.logaddexp(0, k * (z - np.log(plateau - L0))) / k)


def noise(ladder, L0, x):
    """Noise of a run about its model, relative to the reducible loss: (whole run, remembered, white, tilt).

    Its standard deviation at x is x^tilt times that of the three parts, whose variances are found by least squares. None if no
    model has two seeds that differ.
    """
    away = np.concatenate([(L - L.mean(0)) / (L.mean(0) - L0) for L in ladder.losses])
    variance, freedom = (away ** 2).sum(0), sum(len(L) - 1 for L in ladder.losses)
    if not variance.any():
        return None
    tilt = np.polyfit(np.log(x), np.log(variance + 1e-9 * variance.max()), 1)[0] / 2
    covariance = (away / x ** tilt).T @ (away / x ** tilt) / freedom
    found, _ = nnls(along(x).reshape(3, -1).T, covariance.ravel())
    return np.append(np.maximum(found, 1e-3 * np.trace(covariance) / len(x)), tilt)


def noise_covariance(ladder, L0, x):
    """[K, K] covariance of a run about its model, relative to the reducible loss."""
    *variances, tilt = ONE_SEED if (found := noise(ladder, L0, x)) is None else found
    return np.tensordot(variances, along(x), 1) * np.outer(x, x) ** tilt


def along(x):
    """[3, K, K] correlations along a run: of the whole run, remembered over MEMORY (Matérn 3/2), white."""
    lag = np.sqrt(3) * np.abs(np.log(x)[:, None] - np.log(x)) / MEMORY
    return np.stack([np.ones_like(lag), (1 + lag) * np.exp(-lag), np.eye(len(x))])


def _across(u):
    """Covariances [3, M, M] between models at u = log C*: of w, and d's lasting part (trend and steps) and transients."""
    t = np.linspace(u.min(), u.max(), 300)
    steps = np.exp(-2 * FADING * (t - np.median(u))) * (t[1] - t[0])  # variance of a step of the walk
    since = np.maximum(u[:, None] - t, 0)                             # [M, 300]
    lasting = np.outer(u, u) + np.minimum.outer(u - u.min(), u - u.min())
    return np.stack([(since * steps) @ since.T, lasting, ((since > 0) * steps) @ (since > 0).T])


class Field(NamedTuple):
    """The Gaussian field over the ladder's models and, after them, the targets; N = (M + T)·K entries, knots fastest."""
    ladder: Ladder
    loss: np.ndarray     # [M + T, K] means over a model's seeds; NaN: not seen
    top: float           # the least loss of all: L0 lies below it
    u: np.ndarray        # [M + T] log C*, about the ladder's mean
    seeds: np.ndarray    # [M + T]
    share: np.ndarray    # [G] floors L0/top at which the noise was fitted
    noise: np.ndarray    # [G, 4] its variances and tilt there
    fixed: np.ndarray    # [N, N] covariance of g and b
    parts: np.ndarray    # [9, N, N] covariances that the scales weigh: w, lasting d, early d; own noise × 3; shared noise × 3
    seen: np.ndarray     # [n] entries that are
    among: np.ndarray    # [10, n·n] fixed and parts between them


def field(ladder, compute, losses=None, seeds=1):
    """The Field with targets at compute [T] FLOPs; losses [T, K] are their early parts (NaN: not seen), means of `seeds` runs."""
    x, T = ladder.x, len(compute)
    losses = np.full((T, len(x)), np.nan) if losses is None else losses
    loss = np.concatenate([[L.mean(0) for L in ladder.losses], losses])
    u = np.log(np.concatenate([ladder.compute, compute]))
    u -= u[:-T].mean()
    seeds = np.array([len(L) for L in ladder.losses] + [seeds] * T, float)
    share = np.linspace(0, 1, 15)[:-1]
    top = min(np.nanmin(loss), min(L.min() for L in ladder.losses))
    variances = [noise(ladder, one * top, x) for one in share]
    own = np.zeros(len(u)) if variances[0] is None else 1 / seeds
    variances = np.array([ONE_SEED if one is None else one for one in variances])
    w, lasting, fading = _across(u)
    correlations = whole, _, white = along(x)
    near, far = (one.outer(-np.log(x), -np.log(x)) for one in (np.minimum, np.maximum))
    smooth = near * far + near ** 2 * (3 * far - near) / 6            # a slope in log x that walks: the cubic spline's kernel
    early = np.minimum.outer(1 / x ** 2 - 1, 1 / x ** 2 - 1)          # Brownian from the end, as transients 1/t
    fixed = np.kron(np.ones_like(w), FLAT * white) + EXPONENT[1] ** 2 * np.kron(np.outer(u, u), whole)
    parts = np.stack([np.kron(w, whole), np.kron(lasting, smooth), np.kron(fading, early),
                      *(np.kron(np.diag(own), one) for one in correlations),
                      *(np.kron(np.isclose(u[:, None], u, rtol=0, atol=SAME), one) for one in correlations)])  # the same batches
    seen = np.flatnonzero(np.isfinite(loss))
    among = np.concatenate([fixed[None], parts])[:, seen][:, :, seen].reshape(10, -1)
    return Field(ladder, loss, top, u, seeds, share, variances, fixed, parts, seen, among)


def _read(field, scales):
    """scales [H, 6] = (arcsin (L0/top)^¼, kappa, log of SCALES) -> L0 [H], kappa [H], weights of the parts [H, 9], tilt [H]."""
    share = np.sin(scales[:, 0]) ** 4  # uniform in the angle: L0 may be anything, and next to nothing rather often
    *own, tilt = (np.interp(share, field.share, one) for one in field.noise.T)
    own = np.stack(own, -1)
    weights = np.concatenate([np.exp(2 * scales[:, 2:5]), own, np.exp(2 * scales[:, 5:]) * own], 1)
    return share * field.top, scales[:, 1], weights, tilt


def _values(field, L0, kappa, tilt):
    """What is seen as link(L) less its prior mean [H, n]; its level at each knot [H, K]; the log Jacobian of L [H]; and
    how much larger noise is [H, N], by its tilt and dz/dlog(L - L0): where a model is not seen, as at the model nearest in size.

    One value a knot goes into g, whose prior is flat in the loss: it does not count in the Jacobian.
    """
    level, slope = link(np.broadcast_to(field.loss, (len(L0), *field.loss.shape)), L0, field.ladder.plateau, kappa)  # [H, M + T, K]
    centre = np.nanmean(level, 1)
    count = np.isfinite(field.loss).sum(0)
    per_loss = np.nanmean(np.log(slope) - np.log(field.loss - L0[:, None, None]), 1)     # [H, K]
    value = level - centre[:, None] + EXPONENT[0] * field.u[:, None]
    nearest = np.abs(field.u[:, None] - field.u[:len(field.ladder.p)]).argmin(1)
    slope = np.where(np.isfinite(slope), slope, slope[:, nearest]) * field.ladder.x ** tilt[:, None, None]
    slope = slope.reshape(len(L0), -1)
    return value.reshape(len(L0), -1)[:, field.seen], centre, ((count - 1) * per_loss).sum(-1), slope


def evidence(field, scales):
    """Log posterior density of scales [H, 6], up to a constant."""
    L0, kappa, weights, tilt = _read(field, scales)
    value, _, jacobian, slope = _values(field, L0, kappa, tilt)
    n = len(field.seen)
    bordered = np.full((len(L0), n + 1, n + 1), 1e15)
    bordered[:, :n, :n] = _among_seen(field, weights, slope)
    bordered[:, n, :n] = bordered[:, :n, n] = value
    factor = np.linalg.cholesky(bordered)                # the last row is the whitened value
    logdet = np.log(np.diagonal(factor, axis1=1, axis2=2)[:, :n]).sum(-1)
    return jacobian - logdet - 0.5 * (factor[:, n, :n] ** 2).sum(-1)


def _among_seen(field, weights, slope):
    n, slope = len(field.seen), slope[:, field.seen]
    # einsum, not @: a matrix product of this shape wakes threads that cost more than they do
    model = np.einsum('hj,jn->hn', np.insert(weights[:, :3], 0, 1, axis=1), field.among[:4]).reshape(-1, n, n)
    return model + np.einsum('hj,jn->hn', weights[:, 3:], field.among[4:]).reshape(-1, n, n) * slope[:, :, None] * slope[:, None]


def _covariance(field, weights, slope, rows, columns):
    at = np.ix_(rows, columns)
    parts = np.stack([part[at] for part in field.parts])
    model = field.fixed[at] + np.tensordot(weights[:, :3], parts[:3], 1)
    return model + np.tensordot(weights[:, 3:], parts[3:], 1) * slope[:, rows, None] * slope[:, None, columns]


def sample(field, rng, size=500, each=400, rounds=30):
    """Scales [size, 6] from their posterior, by adaptive multiple importance sampling (Cornuet et al. 2012).

    In coordinates z whose prior is standard normal, so that likelihood × prior has light tails, `each` draws a round are taken from
    a Student t with the moments of all before, the prior first; every draw is weighed by the mixture of all rounds. It ends when
    the weights are worth ENOUGH even ones; that takes some 3,000 draws. Raises LogError if it comes to nothing.
    """
    low, high = np.concatenate([[0.0, 0.02], SCALES[:, 0]]), np.concatenate([[1.5, 1.0], SCALES[:, 1]])
    n, proposals = len(low), [(np.zeros(len(low)), np.eye(len(low)))]
    z, target = np.empty((0, n)), np.empty(0)
    for _ in range(rounds):
        mean, factor = proposals[-1]
        new = mean + (rng.normal(size=(each, n)) / np.sqrt(rng.chisquare(TAILS, (each, 1)) / TAILS)) @ factor.T
        z, target = np.concatenate([z, new]), np.concatenate([target, evidence(field, low + (high - low) * ndtr(new))])
        density = logsumexp([-(TAILS + n) / 2 * np.log1p((np.linalg.solve(F, (z - m).T) ** 2).sum(0) / TAILS)
                             - np.log(np.diagonal(F)).sum() for m, F in proposals], axis=0)
        log_weight = target - (z ** 2).sum(1) / 2 - density
        weight = _weights(log_weight, 1.0)
        if _worth(weight) >= ENOUGH:
            break
        power = 1.0
        while _worth(tempered := _weights(log_weight, power)) < 10 * n:  # else a few lucky draws make the next round too narrow
            power *= 0.8
        mean = tempered @ z
        proposals.append((mean, np.linalg.cholesky((tempered * (z - mean).T) @ (z - mean) + 1e-6 * np.eye(n))))
    if not _worth(weight) >= ENOUGH / 10:
        raise LogError(f'the posterior of this ladder could not be sampled: {len(z)} draws are worth {_worth(weight):.0f}')
    cumulative = np.cumsum(weight)
    return low + (high - low) * ndtr(z[np.searchsorted(cumulative / cumulative[-1], (np.arange(size) + rng.random()) / size)])


def _weights(log_weight, power):
    """Weights that sum to one; a power below 1 evens them out."""
    weight = np.exp(power * (log_weight - log_weight.max()))
    return weight / weight.sum()


def _worth(weight):
    """Effective sample size of normalised weights."""
    return 1 / (weight ** 2).sum()


def conditional(field, scales):
    """z = link(L) of the targets at the knots, given what is seen and scales [H, 6].

    Returns L0 [H], kappa [H], mean [H, T·K], covariance [H, T·K, T·K], both without the white noise of an evaluation; that
    noise's variance at x = 1 [H, T], relative to the reducible loss, and the tilt [H].
    """
    L0, kappa, weights, tilt = _read(field, scales)
    value, centre, _, slope = _values(field, L0, kappa, tilt)
    first = len(field.ladder.p)
    targets = np.arange(first * len(field.ladder.x), field.loss.size)
    smooth = weights * [1, 1, 1, 1, 1, 0, 1, 1, 0]
    across = _covariance(field, smooth, slope, targets, field.seen)
    gain = np.linalg.solve(_among_seen(field, weights, slope), np.swapaxes(across, 1, 2))        # [H, n, T·K]
    prior = (centre[:, None] - EXPONENT[0] * field.u[first:, None]).reshape(len(L0), -1)
    mean = prior + np.einsum('hnk,hn->hk', gain, value)
    own = 1 / field.seeds[first:] if field.parts[3].any() else 0      # without a second seed anywhere all noise is shared
    white = weights[:, 5:6] * own + weights[:, 8:9]
    return L0, kappa, mean, _covariance(field, smooth, slope, targets, targets) - across @ gain, white, tilt


def draw(field, rng, scales, each=4):
    """`each` posterior curves of every target for each of scales [H, 6], as Draws."""
    L0, kappa, mean, covariance, white, tilt = (np.repeat(part, each, 0) for part in conditional(field, scales))
    ladder = field.ladder
    factor = np.linalg.cholesky(covariance + 1e-10 * np.eye(covariance.shape[-1]))
    z = mean + np.einsum('hij,hj->hi', factor, rng.normal(size=mean.shape))
    z = z.reshape(len(L0), -1, len(ladder.x))
    # Between the knots the ladder's own mean curve leads; what departs from it is interpolated.
    lead = link(np.broadcast_to(ladder.mean, (len(L0), *ladder.mean.shape)), L0, ladder.plateau, kappa)[0].mean(1)   # [H, G]
    s, fine = np.log(ladder.x), np.log(ladder.fine)
    right = np.clip(np.searchsorted(s, fine), 1, len(s) - 1)
    part = np.clip((fine - s[right - 1]) / (s[right] - s[right - 1]), 0, 1)
    away = z - np.stack([np.interp(s, fine, one) for one in lead])[:, None]
    away = away[..., right - 1] * (1 - part) + away[..., right] * part
    jitter = np.sqrt(white)[..., None] * ladder.fine ** tilt[:, None, None] * rng.normal(size=away.shape)
    loss = unlink(lead[:, None] + away, L0, ladder.plateau, kappa) * np.exp(jitter)
    return Draws(L0, L0[:, None, None] + loss)
