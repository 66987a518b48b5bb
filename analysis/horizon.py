"""The compute-optimal horizon C* = (p / scale)^exponent · 1e15 FLOPs, fitted to constant-rate runs that go beyond it.

`scale` is κ and `exponent` is 1 + γ of Qiu et al. (2025) appendix C, so that the tokens are t* = C* / (6p) ∝ p^γ. Their own fit,
after approach 1 of Hoffmann et al. (2022), is `staircase`. Ours is a surface fitted to all curves.
"""

from typing import NamedTuple

import numpy as np
from scipy.special import ndtri

from analysis.columns import PETA
from analysis.scaling_law import LEVEL
from analysis.table import LogError, require

POINTS_PER_DECADE = 40   # of the common grid of compute
BANDWIDTH = 0.05         # decades of compute over which a loss curve is smoothed; one model is the best one over some 0.3 decades
WINDOW = 2               # standard deviation of the weights around C*, as a factor of compute
STAIRCASE = 1000         # points of the envelope in the authors' fit
ENOUGH_MODELS = 6        # with fewer a note says that they are few


class Curves(NamedTuple):
    """Smoothed loss curves of a scaling ladder on a common grid of compute."""
    compute: np.ndarray  # [G] FLOPs
    p: np.ndarray        # [M] parameters, increasing
    loss: list           # M arrays [seeds, G], NaN outside a run

    @property
    def mean(self):      # [M, G] over seeds
        return np.stack([loss.mean(0) for loss in self.loss])


class Horizon(NamedTuple):
    """C* = (p / scale)^exponent · 1e15 FLOPs."""
    scale: float
    exponent: float
    scale_ci: list        # 90% interval [low, high], or None if leaving out one model leaves no horizon
    exponent_ci: list
    residual: float       # rms distance of log L from the fitted surface
    p: np.ndarray         # [K] models with evaluations on both sides of their C*
    compute: np.ndarray   # [K] their C*, FLOPs
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


def _surface(curves):
    """(log scale, exponent, rms residual of log L) of the horizon in a surface fitted to the seed means. None if there is none.

    With v = log C and z = v - log C*(p), log L is a cubic in v plus z² times a line in v, by least squares with Gaussian weights in
    z. At fixed compute it is lowest at z = 0, as the optimal model has dL/dp = 0 (Qiu et al. appendix E). Terms in z and z·v are
    fitted too. Newton steps, halved, as whole ones may go astray, move C* until their coefficients are 0.
    """
    log_p, log_compute, loss = np.log(curves.p), np.log(curves.compute / PETA), np.log(curves.mean)
    if len(log_p) < 3:
        return None
    crossings = log_compute[np.argmax(np.cumsum(np.nan_to_num(np.diff(loss, axis=0)), 1), 1)]  # of the curves of neighbours
    known = np.isfinite(loss)
    u, v = (np.broadcast_to(a, known.shape)[known] for a in (log_p[:, None], log_compute))
    loss, u_mean, v_mean = loss[known], u.mean(), v.mean()
    u, v = u - u_mean, v - v_mean
    # At C*, v = exponent·u + offset. The start is γ = 1, with the crossings of neighbours halfway between their C*.
    exponent, offset = 2.0, np.median(crossings - log_p[1:] - log_p[:-1]) + 2 * u_mean - v_mean
    for _ in range(300):
        z = v - exponent * u - offset
        root = np.exp(-0.25 * (z / np.log(WINDOW)) ** 2)        # square root of the weight
        terms = np.stack([z, z * v, z ** 2, z ** 2 * v, np.ones_like(v), v, v ** 2, v ** 3], 1)
        found = np.linalg.lstsq(root[:, None] * terms, root * loss)[0]
        shift, tilt, curvature = found[:3]
        stretch = 1 + tilt / (2 * curvature)                    # the minimum is where shift + tilt·v + 2·curvature·z = 0
        step = np.array([exponent, offset - shift / (2 * curvature)]) / stretch - (exponent, offset)
        if not np.isfinite(step).all():
            return None
        exponent, offset = (exponent, offset) + step / 2
        if np.abs(step).sum() < 1e-6:
            break
    if not (np.abs(step).sum() < 1e-6 and curvature > 0 and exponent > 0):
        return None
    residual = np.sqrt(np.average((loss - terms @ found) ** 2, weights=root ** 2))
    return u_mean - (offset + v_mean) / exponent, exponent, residual


def _staircase_points(curves):
    """(log p of the best model [n], log C [n], True where a smaller model is the best one again at a larger compute [n]).

    Amounts of compute where the best model is the smallest or the largest one are left out.
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
    """What the user should know about a fit: how many models it rests on, and why the paper's own kind of fit differs."""
    if found.exponent_ci is None:
        paper = f'; the fit to the steps of the envelope gives {found.staircase["exponent"]:.2f}' if found.staircase else ''
        return [f'without one of the {len(curves.p)} models no horizon is found, so there is no interval{paper}. Do not use '
                'this exponent: train more widths']
    said = []
    if len(curves.p) < ENOUGH_MODELS:
        said.append(f'the horizon is fitted to {len(curves.p)} models only; more widths narrow the interval of the exponent')
    if found.staircase is None or found.exponent_ci[0] <= found.staircase['exponent'] <= found.exponent_ci[1]:
        return said
    reason = '. Its points are correlated, and it has no interval of its own'
    log_p, log_compute, early = _staircase_points(curves)
    if early.any() and len(np.unique(log_p[~early])) > 1:
        reason = (f': {early.sum()} of its {len(early)} points lie where a smaller model becomes the best one again at a larger '
                  f'compute. Without them it gives {_line_fit(log_p[~early], log_compute[~early])[1]:.2f}')
    return said + [f'the fit to the steps of the envelope gives {found.staircase["exponent"]:.2f}, outside the 90% interval of '
                   f'the fit{reason}']


def _line_fit(log_p, log_compute):
    """(scale, exponent, R²) of log C* = exponent·(log p - log scale) + log 1e15 by least squares to points [n]."""
    exponent, offset = np.polyfit(log_p, log_compute - np.log(PETA), 1)
    return np.exp(-offset / exponent), exponent, np.corrcoef(log_p, log_compute)[0, 1] ** 2


def fit(curves):
    """The Horizon of the fitted surface, with 90% intervals by the jackknife: the fit is repeated without each of the models.

    Raises LogError if the curves have no horizon: fewer than three models, or fewer than two evaluated on both sides of their C*.
    """
    found, models = _surface(curves), len(curves.p)
    compute = optimal_compute(curves.p, np.exp(found[0]), found[1]) if found else np.full(models, np.nan)
    ends = [curves.compute[np.isfinite(row)][[0, -1]] for row in curves.mean]
    inside = np.array([low < C < high for C, (low, high) in zip(compute, ends, strict=True)])
    if inside.sum() < 2:
        raise LogError(f'the horizon needs at least three widths, and two that are trained past it; found {inside.sum()} such '
                       f'among {models} models. Add widths, or train them longer')
    without = [_surface(Curves(curves.compute, np.delete(curves.p, i), curves.loss[:i] + curves.loss[i + 1:]))
               for i in range(models)]
    intervals = [None, None]
    if all(without):
        margin = ndtri(0.5 + LEVEL / 2) * np.sqrt((models - 1) * np.var(without, 0))[:2]
        log_scale, exponent = np.transpose([found[:2] - margin, found[:2] + margin])
        intervals = [np.exp(log_scale).tolist(), exponent.tolist()]
    return Horizon(np.exp(found[0]), found[1], *intervals, found[2], curves.p[inside], compute[inside], staircase(curves))
