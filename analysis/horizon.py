"""The compute-optimal horizon C* = (p / scale)^exponent · 1e15 FLOPs, fitted to constant-rate runs that go beyond it.

Qiu et al. (2025) appendix C, after approach 1 of Hoffmann et al. (2022). `scale` is κ and `exponent` is 1 + γ, so that the tokens
are t* = C* / (6p) ∝ p^γ.
"""

from typing import NamedTuple

import numpy as np

from analysis.columns import PETA
from analysis.scaling_law import interval
from analysis.table import LogError, require

POINTS_PER_DECADE = 40   # of the common grid of compute
BANDWIDTH = 0.05         # decades of compute over which a loss curve is smoothed; one model is the best one over some 0.3 decades
WINDOW = 0.4             # decades on either side of a tangent point that are used to find it
STAIRCASE = 1000         # points of the envelope in the authors' fit
ENOUGH_POINTS = 5        # tangent points; with fewer a note says that they are few


class Curves(NamedTuple):
    """Smoothed loss curves of a scaling ladder on a common grid of compute."""
    compute: np.ndarray  # [G] FLOPs
    p: np.ndarray        # [M] parameters, increasing
    loss: list           # M arrays [seeds, G], NaN outside a run

    @property
    def mean(self):      # [M, G] over seeds
        return np.stack([loss.mean(0) for loss in self.loss])


class Horizon(NamedTuple):
    """C* = (p / scale)^exponent · 1e15 FLOPs, fitted to K tangent points."""
    scale: float
    exponent: float
    scale_ci: list        # 90% interval [low, high], or None for two tangent points
    exponent_ci: list
    r2: float             # of log C* on log p
    p: np.ndarray         # [K] models with a tangent point: at most all but the smallest and the largest
    compute: np.ndarray   # [K] FLOPs at the tangent point
    spread: np.ndarray    # [K] standard error of log C* over the seeds, NaN for one seed
    seeds: int            # the smallest number of seeds of any model
    staircase: dict       # scale, exponent, r2 and points of the paper's own kind of fit, see `staircase`


def optimal_compute(p, scale, exponent):
    """C* in FLOPs of a model with p parameters."""
    return PETA * (np.asarray(p, float) / scale) ** exponent


def at_horizon(table):
    """The constant-rate runs of the table with C* in opt_compute: from the log if every run has it, else from a fit to these runs.

    `clean` then leaves out the runs that end before their C*.
    """
    table, _ = constant_rate(table)
    if 'opt_compute' in table and table['opt_compute'].notna().all():
        return table
    found = fit(smooth_curves(table))
    return table.assign(opt_compute=optimal_compute(table['num_params'], found.scale, found.exponent))


def constant_rate(table):
    """(the constant-rate runs, notes). Raises LogError if the log has schedules and none is constant."""
    require(table, ['num_params', 'compute', 'test_loss'], 'the horizon fit')
    if 'schedule' not in table or table['schedule'].isna().all():
        return table, ['the log has no schedules; all runs are taken as constant-rate runs']
    kept = table[table['schedule'] == 'const']
    if not len(kept):
        found = ', '.join(sorted(table['schedule'].dropna().unique()))
        raise LogError(f'the horizon fit needs constant-rate runs, and the log has none (schedules: {found})')
    left = table['run'].nunique() - kept['run'].nunique()
    return kept, [f'{left} runs with a decaying rate left out'] if left else []


def smooth_curves(table, lowest=None, highest=None):
    """Curves with the loss of every run, smoothed over BANDWIDTH decades, on a log grid of compute between the bounds (FLOPs).

    The log-loss is smoothed by local linear regression on log C with a Gaussian kernel, which leaves a power law unchanged.
    """
    table = table[table['compute'] > 0]
    low, high = np.log10([lowest or table['compute'].min(), highest or table['compute'].max()])
    if not high > low:
        raise LogError(f'no compute between {10 ** low:.3g} and {10 ** high:.3g} FLOPs')
    grid = np.linspace(low, high, int(np.ceil((high - low) * POINTS_PER_DECADE)) + 1)
    table = table.assign(log_compute=np.log10(table['compute']), log_loss=np.log(table['test_loss']))
    loss = {p: np.exp([_local_line(rows['log_compute'].to_numpy(), rows['log_loss'].to_numpy(), grid)
                       for _, rows in of_model.groupby('run', sort=False)]) for p, of_model in table.groupby('num_params')}
    return Curves(10 ** grid, np.array(list(loss)), list(loss.values()))


def _local_line(x, y, grid):
    """[G] local linear regression of y on x at `grid`; linear interpolation where evaluations are sparse, NaN outside x."""
    distance = grid[:, None] - x                                              # [G, n]
    weight = np.exp(-0.5 * (distance / BANDWIDTH) ** 2)
    total, first, second = weight.sum(1), (weight * distance).sum(1), (weight * distance ** 2).sum(1)
    spread = total * second - first ** 2
    dense = (total > 3) & (spread > 1e-3 * (total * BANDWIDTH) ** 2)
    line = ((second[:, None] - first[:, None] * distance) * weight) @ y / np.where(dense, spread, 1)
    value = np.interp(grid, x, y, left=np.nan, right=np.nan)
    return np.where(dense & np.isfinite(value), line, value)


def envelope(curves):
    """(smallest loss of any model [G], index of that model [G], -1 where no run has data)."""
    known = np.isfinite(curves.mean).any(0)
    filled = np.nan_to_num(curves.mean, nan=np.inf)
    return np.where(known, filled.min(0), np.nan), np.where(known, filled.argmin(0), -1)


def tangent_points(curves, loss):
    """[..., M] log C* where the curve of each model touches the envelope. NaN for the smallest and the largest model.

    loss [..., M, G] is on the grid of the curves. At fixed compute the optimal model has dL/dp = 0 (Qiu et al. appendix E). The
    derivative of log L with respect to log p is taken through the model and its two neighbours. It falls with compute, and the
    root of a parabola fitted around its change of sign is C*; NaN if there is none. A line would be off by W²/12 in log C, for
    µ = ½ and a window of W nats on either side.
    """
    u = np.log(curves.p)
    h, k = np.diff(u)[:-1, None], np.diff(u)[1:, None]
    change = np.diff(np.log(loss), axis=-2)
    slope = (h / k * change[..., 1:, :] + k / h * change[..., :-1, :]) / (h + k)  # 2nd order, uneven spacing
    roots = np.full(loss.shape[:-1], np.nan)
    roots[..., 1:-1] = _falling_root(np.log10(curves.compute), slope) * np.log(10)
    return roots


def _falling_root(x, slope):
    """[...] x at which slope [..., G], falling and noisy, crosses zero along x [G]. NaN if it does not do so inside the data."""
    known = np.isfinite(slope)
    slope = np.where(known, slope, 0)
    crosses = (slope > 0).any(-1) & (slope < 0).any(-1)
    centre = x[np.argmax(np.cumsum(slope, -1), -1)]  # positive before, negative after: the sum peaks at the crossing
    for _ in range(5):
        z = (x - centre[..., None]) / WINDOW
        near = known & (np.abs(z) <= 1)
        crosses &= near.sum(-1) >= 6
        basis = near[..., None] * z[..., None] ** np.arange(3)                   # [..., G, 3]
        normal = basis.swapaxes(-1, -2) @ basis + 1e-9 * np.eye(3)
        level, tilt, _ = np.moveaxis(np.linalg.solve(normal, basis.swapaxes(-1, -2) @ slope[..., None])[..., 0], -1, 0)
        crosses &= tilt < 0
        # At most half a window per iteration, because a root far outside the fitted window is an extrapolation.
        step = np.clip(np.divide(-level, tilt, out=np.zeros_like(level), where=crosses), -0.5, 0.5)
        centre = centre + WINDOW * step
    inside = (centre > np.where(known, x, np.inf).min(-1)) & (centre < np.where(known, x, -np.inf).max(-1))
    return np.where(crosses & inside, centre, np.nan)


def _staircase_points(curves):
    """(log p of the best model [n], log C [n], True where a smaller model is the best one again at a larger compute [n]).

    These are STAIRCASE log-spaced amounts of compute, without those where the best model is the smallest or the largest.
    """
    fine = np.geomspace(curves.compute[0], curves.compute[-1], STAIRCASE)
    best = envelope(curves)[1][np.searchsorted(np.sqrt(curves.compute[1:] * curves.compute[:-1]), fine)]
    smallest_later = np.minimum.accumulate(np.where(best < 0, len(curves.p), best)[::-1])[::-1]
    used = (best > 0) & (best < len(curves.p) - 1)
    return np.log(curves.p[best[used]]), np.log(fine[used]), (best > smallest_later)[used]


def staircase(curves):
    """The authors' fit by least squares to the best model at STAIRCASE log-spaced amounts of compute, without the end models.

    Its points are the steps of a staircase and far from independent, so that it gives no interval. None for fewer than two steps.
    """
    log_p, log_compute, _ = _staircase_points(curves)
    if len(np.unique(log_p)) < 2:
        return None
    return dict(zip(('scale', 'exponent', 'r2'), _line_fit(log_p, log_compute), strict=True)) | {'points': len(log_p)}


def notes(curves, found):
    """What the user should know about a fit: how many points it rests on, and why the paper's own kind of fit differs."""
    said = []
    if found.seeds == 1:
        said.append('a model has one seed, so the noise of its seeds is not in the intervals')
    if found.exponent_ci is None:
        paper = f'; the fit to the steps of the envelope gives {found.staircase["exponent"]:.2f}' if found.staircase else ''
        return said + [f'two tangent points: any two lie on a line, so R² says nothing and there is no interval{paper}. Do not use '
                       'this exponent: train more widths']
    if len(found.p) < ENOUGH_POINTS:
        said.append(f'the line is fitted to {len(found.p)} tangent points only; more widths narrow the interval of the exponent')
    if found.staircase is None or found.exponent_ci[0] <= found.staircase['exponent'] <= found.exponent_ci[1]:
        return said
    reason = '. Its points are correlated, and it has no interval of its own'
    log_p, log_compute, early = _staircase_points(curves)
    if early.any() and len(np.unique(log_p[~early])) > 1:
        reason = (f': {early.sum()} of its {len(early)} points lie where a smaller model becomes the best one again at a larger '
                  f'compute. Without them it gives {_line_fit(log_p[~early], log_compute[~early])[1]:.2f}')
    return said + [f'the fit to the steps of the envelope gives {found.staircase["exponent"]:.2f}, outside the 90% interval of the '
                   f'tangent points{reason}']


def _line_fit(log_p, log_compute):
    """(scale, exponent, R²), each [...], of log C* [..., K] = exponent·(log p - log scale) + log 1e15 by least squares."""
    x, centre = log_p - log_p.mean(), log_compute.mean(-1)
    y = log_compute - centre[..., None]
    exponent = (x * y).sum(-1) / (x ** 2).sum()
    scale = np.exp(log_p.mean() - (centre - np.log(PETA)) / exponent)
    return scale, exponent, 1 - ((y - exponent[..., None] * x) ** 2).sum(-1) / (y ** 2).sum(-1)


def fit(curves, draws=400, seed=0):
    """The Horizon from the tangent points of the models, with 90% intervals.

    A draw resamples the seeds of every model, with deviations multiplied by √(n/(n-1)) as in scaling_law.py. It adds to each
    tangent point the scatter among models that the seeds do not explain. The tangent points are not resampled too, because that
    counts the noise of the seeds twice (coverage 98 to 100%, measured). Raises LogError for fewer than two tangent points.
    """
    roots = tangent_points(curves, curves.mean)
    used = np.flatnonzero(np.isfinite(roots))
    if len(used) < 2:
        raise LogError(f'the horizon needs at least two models with a smaller and a larger one beside them whose curves '
                       f'cross, so at least four widths; found {len(used)} among {len(curves.p)} models. Add widths, or train '
                       'them longer')
    log_p, found = np.log(curves.p[used]), roots[used]
    scale, exponent, r2 = (float(value) for value in _line_fit(log_p, found))
    rng, seeds = np.random.default_rng(seed), [len(loss) for loss in curves.loss]
    drawn = np.broadcast_to(found, (draws, len(used)))
    if max(seeds) > 1:
        resampled = [mean + np.sqrt(n / max(1, n - 1)) * (loss[rng.integers(n, size=(draws, n))].mean(1) - mean)
                     for loss, mean, n in zip(curves.loss, curves.mean, seeds, strict=True)]
        drawn = tangent_points(curves, np.stack(resampled, 1))[:, used]
        drawn = np.where(np.isfinite(drawn), drawn, found)  # a draw may move a tangent point out of the data
    spread = drawn.std(0) if min(seeds) > 1 else np.full(len(used), np.nan)
    scale_ci = exponent_ci = None
    if len(used) > 2:
        residual = found - exponent * log_p
        scatter = residual.var() * len(used) / (len(used) - 2)
        extra = np.sqrt(max(0.0, scatter - drawn.var(0).mean()))
        scale_ci, exponent_ci = map(interval, _line_fit(log_p, drawn + extra * rng.normal(size=drawn.shape))[:2])
    return Horizon(scale, exponent, scale_ci, exponent_ci, r2, curves.p[used], np.exp(found), spread, min(seeds), staircase(curves))
