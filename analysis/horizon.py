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


class Horizon(NamedTuple):
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


def with_horizon(table, scale, exponent):
    """The table with the fitted C* of each run's model in opt_compute."""
    return table.assign(opt_compute=optimal_compute(table['num_params'], scale, exponent))


def at_horizon(table):
    """The constant-rate runs of the table with C* in opt_compute: from the log if every run has it, else from a fit to these runs.

    `clean` then leaves out the runs that end before their C*.
    """
    table, _ = constant_rate(table)
    if 'opt_compute' in table and table['opt_compute'].notna().all():
        return table
    found = fit(smooth_curves(table))
    return with_horizon(table, found.scale, found.exponent)


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
    low = np.log10(lowest or table['compute'].min())
    high = np.log10(highest or table['compute'].max())
    if not high > low:
        raise LogError(f'no compute between {10 ** low:.3g} and {10 ** high:.3g} FLOPs')
    grid = np.linspace(low, high, int(np.ceil((high - low) * POINTS_PER_DECADE)) + 1)
    losses = {}
    for _, rows in table.groupby('run', sort=False):
        value = _local_line(np.log10(rows['compute'].to_numpy()), np.log(rows['test_loss'].to_numpy()), grid)
        losses.setdefault(rows['num_params'].iloc[0], []).append(np.exp(value))
    p = sorted(losses)
    return Curves(10 ** grid, np.array(p), [np.array(losses[one]) for one in p])


def _local_line(x, y, grid):
    """[G] local linear regression of y on x at `grid`; linear interpolation where evaluations are sparse, NaN outside x."""
    inside = (grid >= x[0]) & (grid <= x[-1])
    distance = grid[:, None] - x                                              # [G, n]
    weight = np.exp(-0.5 * (distance / BANDWIDTH) ** 2)
    total, first, second = weight.sum(1), (weight * distance).sum(1), (weight * distance ** 2).sum(1)
    spread = total * second - first ** 2
    dense = (total > 3) & (spread > 1e-3 * (total * BANDWIDTH) ** 2)
    value = np.interp(grid, x, y)
    line = ((second[:, None] - first[:, None] * distance) * weight) @ y
    value[dense] = line[dense] / spread[dense]
    return np.where(inside, value, np.nan)


def envelope(curves, loss=None):
    """(smallest loss of any model [G], index of that model [G], -1 where no run has data)."""
    loss = np.stack([L.mean(0) for L in curves.loss]) if loss is None else loss
    known = np.isfinite(loss).any(0)
    filled = np.where(np.isfinite(loss), loss, np.inf)
    return np.where(known, filled.min(0), np.nan), np.where(known, filled.argmin(0), -1)


def tangent_points(curves, loss=None):
    """[..., M] log C* where the curve of each model touches the envelope. NaN for the smallest and the largest model.

    loss [..., M, G] is by default the seed mean of the curves. At fixed compute the optimal model has dL/dp = 0 (Qiu et al.
    appendix E). The derivative of log L with respect to log p is taken through the model and its two neighbours. It falls with
    compute, and the root of a parabola fitted around its change of sign is C*; NaN if there is none. A line would be off by W²/12
    in log C, for µ = ½ and a window of W nats on either side.
    """
    loss = np.stack([L.mean(0) for L in curves.loss]) if loss is None else loss
    u, x = np.log(curves.p), np.log10(curves.compute)
    y = np.log(loss)
    roots = np.full(loss.shape[:-1], np.nan)
    for i in range(1, len(u) - 1):
        h, k = u[i] - u[i - 1], u[i + 1] - u[i]
        rise, fall = y[..., i + 1, :] - y[..., i, :], y[..., i, :] - y[..., i - 1, :]
        roots[..., i] = _falling_root(x, (h / k * rise + k / h * fall) / (h + k)) * np.log(10)  # 2nd order, uneven spacing
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
        z0 = near.astype(float)
        z1, value = z * z0, slope * z0
        z2 = z1 * z1
        m0, m1, m2, m3, m4 = z0.sum(-1), z1.sum(-1), z2.sum(-1), (z1 * z2).sum(-1), (z2 * z2).sum(-1)
        normal = np.stack([m0, m1, m2, m1, m2, m3, m2, m3, m4], -1).reshape(*m0.shape, 3, 3) + 1e-9 * np.eye(3)
        right = np.stack([value.sum(-1), (value * z1).sum(-1), (value * z2).sum(-1)], -1)
        level, tilt, _ = np.moveaxis(np.linalg.solve(normal, right[..., None])[..., 0], -1, 0)
        crosses &= tilt < 0
        # At most half a window per iteration, because a root far outside the fitted window is an extrapolation.
        step = np.clip(np.divide(-level, tilt, out=np.zeros_like(level), where=crosses), -0.5, 0.5)
        centre = centre + WINDOW * step
    first = np.where(known, x, np.inf).min(-1)
    last = np.where(known, x, -np.inf).max(-1)
    return np.where(crosses & (centre > first) & (centre < last), centre, np.nan)


def staircase(curves):
    """The authors' fit by least squares to the best model at STAIRCASE log-spaced amounts of compute, without the end models.

    Its points are the steps of a staircase and far from independent, so that it gives no interval. None for fewer than two steps.
    """
    best, compute = _steps(curves)
    used = (best > 0) & (best < len(curves.p) - 1)
    if len(np.unique(best[used])) < 2:
        return None
    scale, exponent, r2 = _line_fit(np.log(curves.p[best[used]]), np.log(compute[used]))
    return {'scale': scale, 'exponent': exponent, 'r2': r2, 'points': int(used.sum())}


def _steps(curves):
    """(index of the best model, -1 where no run has data; compute in FLOPs) at STAIRCASE log-spaced amounts of compute."""
    fine = np.geomspace(curves.compute[0], curves.compute[-1], STAIRCASE)
    return envelope(curves)[1][np.searchsorted(np.sqrt(curves.compute[1:] * curves.compute[:-1]), fine)], fine


def notes(curves, found):
    """What the user should know about a fit: how many points it rests on, and why the paper's own kind of fit differs."""
    said = []
    if found.seeds == 1:
        said.append('a model has one seed, so the noise of its seeds is not in the intervals')
    if found.exponent_ci is None:
        return said + ['two tangent points: the line through them is exact and has no interval']
    if len(found.p) < ENOUGH_POINTS:
        said.append(f'the line is fitted to {len(found.p)} tangent points only; more widths narrow the interval of the exponent')
    low, high = found.exponent_ci
    if found.staircase is None or low <= found.staircase['exponent'] <= high:
        return said
    text = (f'the fit to the steps of the envelope gives {found.staircase["exponent"]:.2f}, outside the 90% interval of the '
            'tangent points')
    best, compute = _steps(curves)
    later = np.minimum.accumulate(np.where(best < 0, len(curves.p), best)[::-1])[::-1]  # smallest best model from here on
    used = (best > 0) & (best < len(curves.p) - 1)
    early, kept = used & (best > later), used & (best <= later)
    if early.any() and len(np.unique(best[kept])) > 1:
        without = _line_fit(np.log(curves.p[best[kept]]), np.log(compute[kept]))[1]
        return said + [f'{text}: {early.sum()} of its {used.sum()} points lie where a smaller model becomes the best one again at '
                       f'a larger compute. Without them it gives {without:.2f}']
    return said + [f'{text}. Its points are correlated, and it has no interval of its own']


def _line_fit(log_p, log_compute):
    """(scale, exponent, R²) of log C* = exponent·(log p - log scale) + log 1e15 by least squares."""
    x, y = log_p - log_p.mean(), log_compute - log_compute.mean()
    exponent = (x * y).sum() / (x ** 2).sum()
    scale = np.exp(log_p.mean() - (log_compute.mean() - np.log(PETA)) / exponent)
    total = (y ** 2).sum()
    return float(scale), float(exponent), float(1 - ((y - exponent * x) ** 2).sum() / total) if total > 0 else np.nan


def fit(curves, draws=400, seed=0):
    """The Horizon from the tangent points of the models, with 90% intervals.

    A draw resamples the seeds of every model, with deviations multiplied by √(n/(n-1)) as in scaling_law.py. It adds to each
    tangent point the scatter among models that the seeds do not explain. The tangent points are not resampled too, because that
    counts the noise of the seeds twice (coverage 98 to 100%, measured). Raises LogError for fewer than two tangent points.
    """
    roots = tangent_points(curves)
    used = np.flatnonzero(np.isfinite(roots))
    if len(used) < 2:
        raise LogError(f'the horizon needs at least two models with a smaller and a larger one beside them whose curves '
                       f'cross; found {len(used)} among {len(curves.p)} models. Add widths, or train them longer')
    log_p, found = np.log(curves.p[used]), roots[used]
    scale, exponent, r2 = _line_fit(log_p, found)
    rng = np.random.default_rng(seed)
    seeds = min(len(L) for L in curves.loss)
    drawn = np.broadcast_to(found, (draws, len(used)))
    if max(len(L) for L in curves.loss) > 1:
        loss = np.stack([L.mean(0) + np.sqrt(len(L) / max(1, len(L) - 1))
                         * (L[rng.integers(len(L), size=(draws, len(L)))].mean(1) - L.mean(0)) for L in curves.loss], 1)
        drawn = tangent_points(curves, loss)[:, used]
        drawn = np.where(np.isfinite(drawn), drawn, found)  # a draw may move a tangent point out of the data
    scale_ci = exponent_ci = None
    if len(used) > 2:
        residual = found - exponent * log_p
        scatter = ((residual - residual.mean()) ** 2).sum() / (len(used) - 2)
        extra = np.sqrt(max(0.0, scatter - drawn.var(0).mean()))
        fits = [_line_fit(log_p, row)[:2] for row in drawn + extra * rng.normal(size=drawn.shape)]
        scale_ci, exponent_ci = (interval(values) for values in np.transpose(fits))
    spread = drawn.std(0) if seeds > 1 else np.full(len(used), np.nan)
    return Horizon(scale, exponent, scale_ci, exponent_ci, r2, curves.p[used], np.exp(found), spread, seeds, staircase(curves))
