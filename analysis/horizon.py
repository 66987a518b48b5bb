"""The compute-optimal horizon C* = (p / scale)^exponent · 1e15 FLOPs, from constant-rate runs trained past it.

Qiu et al. (2025) appendix C, after approach 1 of Hoffmann et al. (2022). `scale` is κ and `exponent` is 1 + γ; the tokens
are t* = C* / (6p) ∝ p^γ. What is done with the horizon is left to the other modules.
"""

from typing import NamedTuple

import numpy as np

from analysis.columns import PETA
from analysis.scaling_law import interval
from analysis.table import LogError, require

POINTS_PER_DECADE = 40   # of the common grid of compute
BANDWIDTH = 0.05         # decades of compute over which a loss curve is smoothed, small beside a model's reign (~0.3)
WINDOW = 0.4             # decades either side of the tangent point over which its root is fitted
STAIRCASE = 1000         # points of the envelope in the authors' fit
ENOUGH_POINTS = 5        # tangent points; with fewer a note says that they are few


class Curves(NamedTuple):
    """Smoothed loss curves of a ladder on a common grid of compute."""
    compute: np.ndarray  # [G] FLOPs
    p: np.ndarray        # [M] parameters, increasing
    loss: list           # M arrays [seeds, G], NaN outside a run


class Horizon(NamedTuple):
    scale: float
    exponent: float
    scale_ci: list        # [low, high], or None when there is nothing to resample
    exponent_ci: list
    r2: float             # of log C* on log p
    p: np.ndarray         # [K] models that gave a tangent point: all but the smallest and the largest
    compute: np.ndarray   # [K] FLOPs at the tangent point
    spread: np.ndarray    # [K] standard error of log C* over the seeds, NaN for one seed
    seeds: int            # the fewest of any model
    staircase: dict       # the fit to the envelope's steps, as in the paper: scale, exponent, r2, points


def optimal_compute(p, scale, exponent):
    """C* in FLOPs of a model with p parameters."""
    return PETA * (np.asarray(p, float) / scale) ** exponent


def with_horizon(table, scale, exponent):
    """The table with opt_compute set to the fitted C* of each run's model."""
    return table.assign(opt_compute=optimal_compute(table['num_params'], scale, exponent))


def at_horizon(table):
    """The constant-rate runs with C* known: as in the log if it has it for every run, else from the fit to these runs.

    Runs that end before their C* are for `clean` to leave out.
    """
    table, _ = constant_rate(table)
    if 'opt_compute' in table and table['opt_compute'].notna().all():
        return table
    found = fit(smooth_curves(table))
    return with_horizon(table, found.scale, found.exponent)


def constant_rate(table):
    """(the constant-rate runs, a note if others were left out). LogError if a log that knows its schedules has none."""
    require(table, ['num_params', 'compute', 'test_loss'], 'the horizon fit')
    if 'schedule' not in table or table['schedule'].isna().all():
        return table, ['the log does not say which schedule its runs had; all are taken as constant-rate runs']
    kept = table[table['schedule'] == 'const']
    if not len(kept):
        found = ', '.join(sorted(table['schedule'].dropna().unique()))
        raise LogError(f'the horizon is read off constant-rate runs, and the log has none (schedules: {found})')
    left = table['run'].nunique() - kept['run'].nunique()
    return kept, [f'{left} runs with a decaying rate left out'] if left else []


def smooth_curves(table, lowest=None, highest=None):
    """Every run's log-loss, smoothed over BANDWIDTH decades, on a log grid of compute (FLOPs) between the bounds.

    Smoothing is a local line in log C with a Gaussian kernel, so that it neither bends nor shifts a power law.
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
    """Local linear regression of y on x at `grid`, NaN outside x; where evaluations are sparse it interpolates."""
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
    """The compute-optimal frontier on the grid: (loss [G], index of the best model [G], -1 where no run has data)."""
    loss = np.stack([L.mean(0) for L in curves.loss]) if loss is None else loss
    known = np.isfinite(loss).any(0)
    filled = np.where(np.isfinite(loss), loss, np.inf)
    return np.where(known, filled.min(0), np.nan), np.where(known, filled.argmin(0), -1)


def tangent_points(curves, loss=None):
    """log C* where each model's curve touches the envelope, NaN for the two ends and where it cannot be told.

    loss [..., M, G], by default the seed means of the curves; returns [..., M]. At fixed compute the optimal model has
    dL/dp = 0 (Qiu et al. appendix E). For model i the derivative of log L with respect to log p is taken through it and its
    two neighbours; it falls with compute, and a parabola through it around its change of
    sign gives the root (a line would be off by W²/12 in log C for µ = ½ and a window of W nats either side).
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
    """Where slope [..., G], falling and noisy, crosses zero along x [G]; NaN where it does not or the ends are reached."""
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
        # Half a window a turn at most: a root far outside the fitted stretch would be an extrapolation.
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
    """scale, exponent, r2 of log C* = exponent·(log p - log scale) + log 1e15 by least squares."""
    x, y = log_p - log_p.mean(), log_compute - log_compute.mean()
    exponent = (x * y).sum() / (x ** 2).sum()
    scale = np.exp(log_p.mean() - (log_compute.mean() - np.log(PETA)) / exponent)
    total = (y ** 2).sum()
    return float(scale), float(exponent), float(1 - ((y - exponent * x) ** 2).sum() / total) if total > 0 else np.nan


def fit(curves, draws=400, seed=0):
    """Horizon from the tangent points of all models but the smallest and the largest, with 90% intervals.

    Each draw resamples the seeds within every model (deviations stretched by √(n/(n-1)), as n seeds show only (n-1)/n of
    their variance) and adds to each tangent point the scatter among models that the seeds leave unexplained. Resampling
    the points themselves as well would count the seeds' noise twice: 98 to 100% coverage, measured.
    Raises LogError if fewer than two models have a tangent point; the intervals need three.
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
        drawn = np.where(np.isfinite(drawn), drawn, found)  # a draw that moves a crossing off the data says nothing new
    scale_ci = exponent_ci = None
    if len(used) > 2:
        residual = found - exponent * log_p
        scatter = ((residual - residual.mean()) ** 2).sum() / (len(used) - 2)
        extra = np.sqrt(max(0.0, scatter - drawn.var(0).mean()))
        fits = [_line_fit(log_p, row)[:2] for row in drawn + extra * rng.normal(size=drawn.shape)]
        scale_ci, exponent_ci = (interval(values) for values in np.transpose(fits))
    spread = drawn.std(0) if seeds > 1 else np.full(len(used), np.nan)
    return Horizon(scale, exponent, scale_ci, exponent_ci, r2, curves.p[used], np.exp(found), spread, seeds, staircase(curves))
