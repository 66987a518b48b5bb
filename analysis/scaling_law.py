"""The scaling law L(C) = L0 + a·C^(-b) through the compute-optimal points, with intervals for a, b and L0.

The objective is the summed Huber loss with δ = 1e-3 of the residuals of the log-loss (Hoffmann et al. 2022; Qiu et al. 2025 §2.2).
"""

from typing import NamedTuple

import numpy as np

from analysis.columns import PETA
from analysis.table import LogError, require, runs

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
    """The Points of a table: C* and the losses at C*. C* is `opt_compute` where the log has it, else the end of the run.

    The loss at C* is interpolated in (log C, log L). Raises LogError if a run ends before its C*, or if the runs of one model have
    different C*.
    """
    require(table, ['num_params', 'compute', 'test_loss'], 'a scaling law')
    ends = runs(table)
    target = horizon_of(table)
    compute, loss = {}, {}
    for run, rows in table.groupby('run', sort=False):
        value = loss_at(rows, [target[run]])[0]
        if np.isnan(value):
            raise LogError(f'run {run} ends at {rows["compute"].iloc[-1]:.4g} FLOPs, before its C* = {target[run]:.4g}; '
                           'leave it out with --where, or train it longer')
        p = ends.at[run, 'num_params']
        compute.setdefault(p, []).append(target[run])
        loss.setdefault(p, []).append(value)
    p = sorted(compute)
    for one in p:
        if max(compute[one]) > 1.02 * min(compute[one]):  # seeds of one model have the same horizon, up to one evaluation
            raise LogError(f'the runs of the model with {one:.4g} parameters end at different compute ({min(compute[one]):.4g} '
                           f'to {max(compute[one]):.4g} FLOPs); choose one ladder, e.g. --where T=… or --where schedule=…')
    return Points(np.array(p), np.array([np.mean(compute[one]) for one in p]), [np.array(loss[one]) for one in p])


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
    """[K] loss of one run at `compute` [K] FLOPs, interpolated in (log C, log L). NaN outside the run."""
    C, L = rows['compute'].to_numpy(), rows['test_loss'].to_numpy()
    C, L = C[C > 0], L[C > 0]
    compute = np.asarray(compute, float)
    inside = (compute >= C[0] * (1 - 1e-9)) & (compute <= C[-1] * (1 + 1e-9))
    return np.where(inside, np.exp(np.interp(np.log(compute), np.log(C), np.log(L))), np.nan)


# ---- the fit --------------------------------------------------------------------------------------------------------

# The solver is ours because a fit is repeated for every bootstrap draw. 400 draws of mlp.pkl take 0.1 s as one batch, and 2.4 s
# with scipy.optimize.least_squares(loss='huber'). The 90% intervals of b agree within 1%.


def fit(compute, loss, delta=DELTA):
    """The Law with the smallest summed Huber loss over a, b, L0 >= 0. compute [M] in FLOPs, loss [M].

    Given L0, log(L - L0) is a straight line in log C. So the starts are a dense line of values of L0, each with its line.
    Raises LogError for fewer than three models, or if the loss does not fall with compute.
    """
    u, centre, y = _centred(compute, loss)
    if len(u) < 3:
        raise LogError(f'a fit of L0 + a·C^(-b) needs at least three models, got {len(u)}; give L0 (--L0) instead')
    theta, objective = _best(u[None], y[None], delta, _starts(u, y))
    theta, objective = theta[0], objective[0]
    if not theta[1] > 1e-6:
        raise LogError('the final loss does not fall with compute; there is no scaling law to fit')
    return _law(theta, centre, u, y, objective)


def fit_given_L0(compute, loss, L0, delta=DELTA):
    """The Law with the best a and b for a given L0. Raises LogError unless 0 <= L0 < every loss."""
    loss = np.asarray(loss, float)
    if not 0 <= L0 < loss.min():
        raise LogError(f'L0={L0:g} must be at least 0 and below the smallest final loss, {loss.min():.6g}')
    u, centre, y = _centred(compute, loss)
    if len(u) < 2:
        raise LogError('a scaling law needs at least two models, got 1')
    start = _line(u, y, np.array([L0]))
    theta, objective = _minimise(start, u[None], y[None], delta, free=(0, 1))
    return _law(theta[0], centre, u, y, objective[0])


def _centred(compute, loss):
    """(log C minus its mean, that mean, log L). The fit then does not depend on the unit of compute."""
    u, y = np.log(np.asarray(compute, float)), np.log(np.asarray(loss, float))
    return u - u.mean(), u.mean(), y


def _law(theta, centre, u, y, objective):
    alpha, b, floor = theta
    a = np.exp(alpha + b * (centre - np.log(PETA)))
    residual = _model(theta[None], u[None])[0][0] - y
    spread = np.sum((y - y.mean()) ** 2)
    r2 = 1 - np.sum(residual ** 2) / spread if spread > 0 else np.nan
    return Law(float(a), float(b), float(np.exp(floor)), float(objective), float(r2))


def _line(u, y, L0):
    """theta [S, 3] = (α, b, log L0) for each L0 [S]: log(L - L0) = α - b·u by least squares."""
    with np.errstate(divide='ignore'):
        floor = np.log(L0)
    reducible = np.log(np.exp(y) - L0[:, None])                      # [S, M]
    b = -(reducible * u).sum(-1) / (u ** 2).sum()
    return np.stack([reducible.mean(-1), b, floor], -1)


def _starts(u, y, count=24):
    """theta [S, 3] for values of L0 from 0 to just below the smallest loss, dense near both ends."""
    share = np.concatenate([[0.0], np.geomspace(1e-3, 0.5, count // 2), 1 - np.geomspace(0.4, 1e-3, count // 2)])
    return _line(u, y, share * np.exp(y.min()))


def _best(u, y, delta, starts, tolerance=1e-10, iterations=200):
    """(theta [R, 3], objective [R]): the lowest minimum reached from the starts [S, 3], for each of R data sets u, y [R, M]."""
    R, S = len(y), len(starts)
    theta = np.broadcast_to(starts, (R, S, 3)).reshape(-1, 3)
    wide = [np.repeat(np.broadcast_to(v, y.shape), S, axis=0) for v in (u, y)]
    theta, objective = _minimise(theta, *wide, delta, free=(0, 1, 2), tolerance=tolerance, iterations=iterations)
    flat = np.stack([y.mean(-1), _slope(u, y), np.full(R, -np.inf)], -1)  # L0 = 0, the boundary
    zero, at_zero = _minimise(flat, u, y, delta, free=(0, 1), tolerance=tolerance, iterations=iterations)
    theta = np.concatenate([theta.reshape(R, S, 3), zero[:, None]], 1)
    objective = np.concatenate([objective.reshape(R, S), at_zero[:, None]], 1)
    pick = objective.argmin(1)
    return theta[np.arange(R), pick], objective[np.arange(R), pick]


def _slope(u, y):
    u = np.broadcast_to(u, y.shape)
    return -(u * y).sum(-1) / (u ** 2).sum(-1)


def _model(theta, u):
    """(log L [R, M] of theta [R, 3] = (α, b, log L0) at u, reducible share s = a·C^(-b) / L [R, M])."""
    power, floor = theta[:, :1] - theta[:, 1:2] * u, theta[:, 2:]
    log_loss = np.logaddexp(power, floor)
    return log_loss, np.exp(power - log_loss)


def _objective(theta, u, y, delta):
    r = _model(theta, u)[0] - y
    size = np.abs(r)
    return np.where(size <= delta, 0.5 * r ** 2, delta * (size - 0.5 * min(delta, 1e300))).sum(-1)


def _minimise(theta, u, y, delta, free, tolerance=1e-10, iterations=200):
    """(theta [R, 3], objective [R]) after damped Newton steps on the summed Huber loss from theta [R, 3]; u and y [R, M].

    With the reducible share s and v = (1, -u, -1), the gradient of log L is (s, -u·s, 1 - s) and its Hessian is s(1 - s)·v·vᵀ.
    The damping grows until a step lowers the objective. `free` lists the components of theta that move.
    """
    theta, u, y = (np.array(np.broadcast_to(v, (len(theta), v.shape[-1])), float) for v in (theta, u, y))
    free = list(free)
    best = _objective(theta, u, y, delta)
    damping = np.full(len(theta), 1e-3)
    active = np.arange(len(theta))
    quiet = np.zeros(len(theta), int)
    for _ in range(iterations):
        if not len(active):
            break
        t, x = theta[active], u[active]
        log_loss, s = _model(t, x)
        r = log_loss - y[active]
        psi, curved = np.clip(r, -delta, delta), (np.abs(r) <= delta).astype(float)
        J = np.stack([s, -x * s, 1 - s], -1)[..., free]                      # [A, M, F]
        v = np.stack([np.ones_like(x), -x, -np.ones_like(x)], -1)[..., free]
        gradient = np.einsum('am,amf->af', psi, J)
        gauss = np.einsum('am,amf,amg->afg', curved + 1e-6, J, J)
        hessian = gauss + np.einsum('am,amf,amg->afg', psi * s * (1 - s), v, v)
        scale = np.einsum('amf,amf->af', J, J) + 1e-300
        shift = damping[active, None] * scale  # a Hessian that is not positive is damped until the step goes downhill
        step = np.linalg.solve(hessian + shift[..., None] * np.eye(len(free)), -gradient[..., None])[..., 0]
        trial = t.copy()
        trial[:, free] += np.clip(step, -2, 2)
        value = _objective(trial, x, y[active], delta)
        better = value < best[active]
        gain = best[active] - value
        moved = active[better]
        theta[moved], best[moved] = trial[better], value[better]
        damping[active] = np.clip(np.where(better, damping[active] / 10, damping[active] * 10), 1e-14, 1e12)
        # A fit ends after several steps in a row with a negligible relative gain.
        quiet[active] = np.where(gain > tolerance * best[active], 0, quiet[active] + 1)
        active = active[(quiet[active] < 6) & (best[active] > 1e-28)]
    return theta, best


# ---- uncertainty ----------------------------------------------------------------------------------------------------


def resampled_losses(points, law, draws, rng):
    """(losses [draws, M] of resampled seeds, source of the noise: 'seeds', 'residuals' or 'none').

    Seeds are resampled within each model. Their deviations from the model's mean are multiplied by √(n/(n-1)), because the variance
    of n seeds about their own mean is (n-1)/n of the true one. A model with one seed uses the relative deviations of the others. If
    every model has one seed, the residuals of the law are used, multiplied by √(M/(M-3)).
    """
    mean = points.loss
    relative = [np.zeros(0) if len(L) < 2 else (L / L.mean() - 1) * np.sqrt(len(L) / (len(L) - 1)) for L in points.losses]
    pooled = np.concatenate(relative)
    origin = 'seeds'
    if not len(pooled):
        M = len(mean)
        if M <= 3:
            return None, 'none'
        pooled, origin = (predict(law, points.compute) / mean - 1) * np.sqrt(M / (M - 3)), 'residuals'
    noise = [rng.choice(d if len(d) else pooled, (draws, max(1, n))).mean(-1) for d, n in zip(relative, points.seeds, strict=True)]
    return mean * (1 + np.stack(noise, -1)), origin


def bootstrap(points, law, draws=400, seed=0, delta=DELTA):
    """({'a', 'b', 'L0': [draws]} of fits to resampled seeds, source of the noise). The first is None if there is no noise."""
    losses, origin = resampled_losses(points, law, draws, np.random.default_rng(seed))
    if losses is None:
        return None, origin
    return fit_batch(points.compute, losses, law, delta), origin


def fit_batch(compute, losses, law, delta=DELTA):
    """{'a', 'b', 'L0': [R]} of fits to the data sets losses [R, M] at the same compute [M], started near `law`."""
    u, centre, y = _centred(compute, losses)
    floors = np.array([max(law.L0, 1e-3 * np.exp(y.min())), 0.7 * np.exp(y.min())])
    starts = _line(u, y.mean(0), np.minimum(floors, 0.99 * np.exp(y.mean(0).min())))
    theta, _ = _best(u[None], y, delta, starts, tolerance=1e-6)  # converged, measured on mlp.pkl; 1e-4 is not
    return {'a': np.exp(theta[:, 0] + theta[:, 1] * (centre - np.log(PETA))), 'b': theta[:, 1], 'L0': np.exp(theta[:, 2])}


def interval(values, level=LEVEL):
    """Percentile interval [low, high] of draws, without NaN. None if there are no draws."""
    if values is None or not np.isfinite(values).any():
        return None
    return [float(v) for v in np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])]


class Profile(NamedTuple):
    """The profile of L0: the least-squares misfit at each L0, with a and b fitted there, and the interval it gives."""
    L0: np.ndarray       # [G] grid around the interval, within 0 and the smallest loss
    chi2: np.ndarray     # [G] rise over the minimum, in units of the noise
    cut: float           # the rise that bounds the interval
    ci: list             # [low, high]
    identifiable: bool   # False if the interval reaches 0 or the smallest loss


def profile(points, level=LEVEL, size=200):
    """The Profile of L0. None for three models or fewer, where the fit is exact.

    Weighted least squares on the log-loss. The variance of a model's mean is the pooled variance of seeds over its number of seeds,
    or the misfit of the law if that is larger. So the cut is a quantile of the F distribution with 1 and M-3 degrees of freedom.
    """
    from scipy.special import fdtri
    M = len(points.p)
    if M <= 3:
        return None
    u, _, y = _centred(points.compute, points.loss)
    dof = np.sum(points.seeds - 1)
    noise = np.sqrt(sum(((L / L.mean() - 1) ** 2).sum() for L in points.losses) / dof) if dof > 0 else 0.0
    weight = points.seeds / points.seeds.mean()

    def squares(floors):
        theta, _ = _minimise(_line(u, y, floors), u[None], y[None], np.inf, free=(0, 1), iterations=30)
        return (weight * (_model(theta, u[None])[0] - y) ** 2).sum(-1)

    top, cut = np.exp(y.min()), fdtri(1, M - 3, level)
    low, high = 0.0, top
    for _ in range(4):  # zoom in until the grid resolves the interval
        grid = np.linspace(low, high, size + 1)[:-1] if high == top else np.linspace(low, high, size)
        sums = squares(grid)
        scale = max(sums.min() / (M - 3), noise ** 2 / points.seeds.mean(), 1e-300)
        rise = (sums - sums.min()) / scale
        inside = np.flatnonzero(rise <= cut)
        if len(inside) > size // 8:
            break
        low, high = grid[max(0, inside[0] - 1)], grid[inside[-1] + 1] if inside[-1] + 1 < len(grid) else high
    ci = [float(grid[inside[0]]), float(grid[inside[-1]])]
    return Profile(grid, rise, float(cut), ci, bool(ci[0] > 0 and inside[-1] < len(grid) - 1))
