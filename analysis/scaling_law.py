"""The scaling law L(C) = L0 + a·C^(-b) through the compute-optimal points, with intervals for a, b and L0.

The objective is the summed Huber loss with δ = 1e-3 of the residuals of the log-loss (Hoffmann et al. 2022; Qiu et al. 2025 §2.2).
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.special import fdtri, huber

from analysis.columns import PETA
from analysis.table import LogError, runs

DELTA = 1e-3  # Huber threshold on log-loss residuals, as in Hoffmann et al. (2022)
LEVEL = 0.9   # of every confidence interval


class Points(NamedTuple):
    """The compute-optimal points of a scaling ladder, one entry for each model, ordered by parameters."""
    p: np.ndarray        # [M] parameters
    compute: np.ndarray  # [M] FLOPs, C*
    losses: list         # M arrays with the loss of each seed

    @property
    def loss(self):      # [M] seed means
        return np.array([np.mean(seeds) for seeds in self.losses])

    @property
    def seeds(self):     # [M]
        return np.array([len(seeds) for seeds in self.losses])


class Law(NamedTuple):
    """L = L0 + a·(C / 1e15 FLOPs)^(-b)."""
    a: float
    b: float
    L0: float
    objective: float = np.nan  # summed Huber loss
    r2: float = np.nan         # of the log-loss


def predict(law, compute):
    """Loss of the law at `compute` FLOPs."""
    return law.L0 + law.a * (np.asarray(compute) / PETA) ** -law.b


def optimal_points(table):
    """The Points of one ladder (see collapse.ladder): C* and the losses at C*. Raises LogError if a run ends before its C*."""
    target, p = horizon_of(table), runs(table)['num_params']
    loss = pd.Series({run: float(loss_at(rows, target[run])) for run, rows in table.groupby('run', sort=False)})
    if loss.isna().any():
        run = loss.isna().idxmax()
        raise LogError(f'run {run} ends before its C* = {target[run]:.4g} FLOPs; leave it out with --where, or train it longer')
    by_model = loss.groupby(p)
    return Points(np.array(list(by_model.groups)), target.groupby(p).mean().to_numpy(), [one.to_numpy() for _, one in by_model])


def horizon_of(table):
    """[runs] FLOPs at x = 1: `opt_compute` where it is known, else the run's last evaluation.

    A run trained to C* ends on the last whole step before it. So an end less than 1% below C* counts as C*.
    """
    ends = runs(table)
    if 'opt_compute' not in ends:
        return ends['compute']
    target = ends['opt_compute'].fillna(ends['compute'])
    return target.where((target <= ends['compute']) | (target > 1.01 * ends['compute']), ends['compute'])


def loss_at(rows, compute):
    """Loss of one run at `compute` FLOPs, of any shape, interpolated in (log C, log L). NaN outside the run."""
    C, L = rows['compute'].to_numpy(), rows['test_loss'].to_numpy()
    C, L = C[C > 0], L[C > 0]
    compute = np.asarray(compute, float)
    inside = (compute >= C[0] * (1 - 1e-9)) & (compute <= C[-1] * (1 + 1e-9))
    return np.where(inside, np.exp(np.interp(np.log(compute), np.log(C), np.log(L))), np.nan)


# The solver is ours because a fit is repeated for every bootstrap draw. 400 draws of mlp.pkl take 0.1 s as one batch, and 2.4 s
# with scipy.optimize.least_squares(loss='huber'). The 90% intervals of b agree within 1%. It works on θ = (α, b, log L0) with
# log L = log(exp(α - b·u) + L0), where u is log C minus its mean, so that the fit does not depend on the unit of compute.


def fit(compute, loss, L0=None):
    """The Law with the smallest summed Huber loss over a, b and L0 >= 0. compute [M] in FLOPs, loss [M].

    Given L0, log(L - L0) is a straight line in log C. So the starts are a dense line of values of L0, each with its line.
    A given L0 is held; with one model a and b are then NaN. Raises LogError for fewer than three models without L0, if the loss
    does not fall with compute, or if L0 is not below every loss.
    """
    u, centre, y = _centred(compute, loss)
    least = np.exp(y.min())
    if len(u) == 1 and L0 is not None:
        return Law(np.nan, np.nan, L0)
    if L0 is None:
        if len(u) < 3:
            raise LogError(f'a fit of L0 + a·C^(-b) needs at least three models, got {len(u)}; give L0 (--L0) instead')
        share = np.concatenate([[0.0], np.geomspace(1e-3, 0.5, 12), 1 - np.geomspace(0.4, 1e-3, 12)])  # dense near both ends
        theta, objective = _best(u, y[None], _line(u, y, share * least))
        if not theta[0, 1] > 1e-6:
            raise LogError('the final loss does not fall with compute; there is no scaling law to fit')
    elif 0 <= L0 < least:
        theta, objective = _minimise(_line(u, y, [L0]), u, y, free=(0, 1))
    else:
        raise LogError(f'L0={L0:g} must be at least 0 and below the smallest final loss, {least:.6g}')
    a, b, floor = _parameters(theta[0], centre)
    residual = _log_loss(theta[0], u)[0] - y
    r2 = 1 - (residual ** 2).sum() / ((y - y.mean()) ** 2).sum()
    return Law(float(a), float(b), float(floor), float(objective[0]), float(r2))


def fit_batch(compute, losses, law, L0=None):
    """{'a', 'b', 'L0': [R]} of fits to data sets losses [R, M] at the same compute [M], started near `law`. A given L0 is held."""
    u, centre, y = _centred(compute, losses)
    if L0 is None:
        floors = np.array([max(law.L0, 1e-3 * np.exp(y.min())), 0.7 * np.exp(y.min())])
        starts = _line(u, y.mean(0), np.minimum(floors, 0.99 * np.exp(y.mean(0).min())))
        theta, _ = _best(u, y, starts, tolerance=1e-6)  # converged, measured on mlp.pkl; 1e-4 is not
    else:
        theta, _ = _minimise(_line(u, y, L0), u, y, free=(0, 1))
    return dict(zip(('a', 'b', 'L0'), _parameters(theta, centre), strict=True))


def _centred(compute, loss):
    """(log C minus its mean, that mean, log L)."""
    u, y = np.log(np.asarray(compute, float)), np.log(np.asarray(loss, float))
    return u - u.mean(), u.mean(), y


def _parameters(theta, centre):
    """a, b and L0 [...] of theta [..., 3]."""
    alpha, b, floor = np.moveaxis(theta, -1, 0)
    return np.exp(alpha + b * (centre - np.log(PETA))), b, np.exp(floor)


def _line(u, y, L0):
    """theta [..., 3] for each L0 [...]: log(L - L0) = α - b·u by least squares. y [..., M]."""
    L0 = np.asarray(L0, float)
    reducible = np.log(np.exp(y) - L0[..., None])
    b = -(reducible * u).sum(-1) / (u ** 2).sum()
    with np.errstate(divide='ignore'):
        return np.stack([reducible.mean(-1), b, np.broadcast_to(np.log(L0), b.shape)], -1)


def _best(u, y, starts, tolerance=1e-10):
    """(theta [R, 3], objective [R]): the lowest minimum reached from the starts [S, 3] or with L0 = 0, for data y [R, M]."""
    theta, objective = _minimise(np.repeat(starts[None], len(y), 0), u, y[:, None], tolerance=tolerance)
    at_zero, objective_at_zero = _minimise(_line(u, y, 0)[:, None], u, y[:, None], free=(0, 1), tolerance=tolerance)
    theta = np.concatenate([theta, at_zero], 1)
    objective = np.concatenate([objective, objective_at_zero], 1)
    best = np.arange(len(y)), objective.argmin(1)
    return theta[best], objective[best]


def _log_loss(theta, u):
    """(log L [..., M] of theta [..., 3] at u, reducible share s = a·C^(-b) / L [..., M])."""
    power, floor = theta[..., :1] - theta[..., 1:2] * u, theta[..., 2:]
    log_loss = np.logaddexp(power, floor)
    return log_loss, np.exp(power - log_loss)


def _minimise(theta, u, y, free=(0, 1, 2), delta=DELTA, tolerance=1e-10, iterations=200):
    """(theta [..., 3], objective [...]) after damped Newton steps on the summed Huber loss from theta; u and y [..., M].

    With the reducible share s and v = (1, -u, -1), the gradient of log L is (s, -u·s, 1 - s) and its Hessian is s(1 - s)·v·vᵀ.
    The damping grows until a step lowers the objective. `free` lists the components of theta that move.
    """
    shape, M, free = theta.shape, y.shape[-1], list(free)
    u, y = (np.broadcast_to(v, (*shape[:-1], M)).reshape(-1, M) for v in (u, y))
    theta = theta.reshape(-1, 3).copy()
    best = huber(delta, _log_loss(theta, u)[0] - y).sum(-1)
    damping, quiet, active = np.full(len(theta), 1e-3), np.zeros(len(theta), int), np.arange(len(theta))
    for _ in range(iterations):
        if not len(active):
            break
        x = u[active]
        log_loss, s = _log_loss(theta[active], x)
        r = log_loss - y[active]
        J = np.stack([s, -x * s, 1 - s], -1)[..., free]                      # [A, M, F]
        v = np.stack([np.ones_like(x), -x, -np.ones_like(x)], -1)[..., free]
        psi, curved = np.clip(r, -delta, delta), (np.abs(r) <= delta) + 1e-6
        gradient = np.einsum('am,amf->af', psi, J)
        hessian = np.einsum('am,amf,amg->afg', curved, J, J) + np.einsum('am,amf,amg->afg', psi * s * (1 - s), v, v)
        # A Hessian that is not positive is damped until the step goes downhill.
        shift = damping[active, None] * (np.einsum('amf,amf->af', J, J) + 1e-300)
        step = np.linalg.solve(hessian + shift[..., None] * np.eye(len(free)), -gradient[..., None])[..., 0]
        trial = theta[active]
        trial[:, free] += np.clip(step, -2, 2)
        value = huber(delta, _log_loss(trial, x)[0] - y[active]).sum(-1)
        gain = best[active] - value
        better = gain > 0
        theta[active[better]], best[active[better]] = trial[better], value[better]
        damping[active] = np.clip(np.where(better, damping[active] / 10, damping[active] * 10), 1e-14, 1e12)
        # A fit ends after several steps in a row with a negligible relative gain.
        quiet[active] = np.where(gain > tolerance * best[active], 0, quiet[active] + 1)
        active = active[(quiet[active] < 6) & (best[active] > 1e-28)]
    return theta.reshape(shape), best.reshape(shape[:-1])


def resampled_losses(points, law, draws, rng):
    """(losses [draws, M] of resampled seeds, source of the noise: 'seeds', 'residuals' or 'none').

    Seeds are resampled within each model. Their deviations from the model's mean are multiplied by √(n/(n-1)), because the variance
    of n seeds about their own mean is (n-1)/n of the true one. A model with one seed uses the relative deviations of the others. If
    every model has one seed, the residuals of the law are used, multiplied by √(M/(M-3)); the losses are None if M is 3.
    """
    mean, M, origin = points.loss, len(points.p), 'seeds'
    relative = [(L / L.mean() - 1) * np.sqrt(len(L) / (len(L) - 1)) if len(L) > 1 else L[:0] for L in points.losses]
    pooled = np.concatenate(relative)
    if not len(pooled):
        if M <= 3:
            return None, 'none'
        pooled, origin = (predict(law, points.compute) / mean - 1) * np.sqrt(M / (M - 3)), 'residuals'
    noise = [rng.choice(own if len(own) else pooled, (draws, n)).mean(-1) for own, n in zip(relative, points.seeds, strict=True)]
    return mean * (1 + np.stack(noise, -1)), origin


def bootstrap(points, law, draws=400, L0=None):
    """({'a', 'b', 'L0': [draws]} of fits to resampled seeds, source of the noise). None for no noise. A given L0 is held."""
    losses, origin = resampled_losses(points, law, draws, np.random.default_rng(0))
    return (None if losses is None else fit_batch(points.compute, losses, law, L0)), origin


def interval(draws):
    """Percentile interval [low, high] of draws along the first axis, without NaN, as lists."""
    return np.nanquantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0).tolist()


def profile(points):
    """(interval [low, high] of L0, False if it reaches 0 or the smallest loss). None for three models, where the fit is exact.

    The interval holds the L0 at which the least-squares misfit of the log-loss, with the best a and b, is close to its minimum.
    The variance of a model's mean is the pooled variance of seeds over its number of seeds, or the misfit of the law if that is
    larger. So the rise that bounds the interval is a quantile of the F distribution with 1 and M-3 degrees of freedom.
    """
    M = len(points.p)
    if M <= 3:
        return None
    u, _, y = _centred(points.compute, points.loss)
    dof = np.sum(points.seeds - 1)
    noise = sum(((L / L.mean() - 1) ** 2).sum() for L in points.losses) / max(dof, 1) / points.seeds.mean()
    weight = points.seeds / points.seeds.mean()
    low, high = 0.0, np.exp(y.min())
    for _ in range(4):  # until the grid resolves the interval
        grid = np.linspace(low, high, 200, endpoint=high < np.exp(y.min()))
        theta, _ = _minimise(_line(u, y, grid), u, y, free=(0, 1), delta=np.inf, iterations=30)
        misfit = (weight * (_log_loss(theta, u)[0] - y) ** 2).sum(-1)
        rise = (misfit - misfit.min()) / max(misfit.min() / (M - 3), noise, 1e-300)
        inside = np.flatnonzero(rise <= fdtri(1, M - 3, LEVEL))
        if len(inside) > 25:
            break
        low, high = grid[max(0, inside[0] - 1)], grid[inside[-1] + 1] if inside[-1] + 1 < len(grid) else high
    return [float(grid[inside[0]]), float(grid[inside[-1]])], bool(grid[inside[0]] > 0 and inside[-1] < len(grid) - 1)
