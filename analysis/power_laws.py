"""Sums of power laws L(t, p) = L0 + Σ a·t^(-µ)·p^(-ν), whose collapse can be computed exactly, and their fit to loss curves.

Qiu et al. (2025) §3.1, fig. 5 and theorem F.1, with the exponents of "4+3 phases" by Paquette et al. (2024, arXiv 2405.15074). Two
balanced terms collapse exactly at the compute-optimal data exponent γ*, and at no other exponent.
"""

from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize, nnls

from analysis import collapse
from analysis.scaling_law import optimal_points
from analysis.table import LogError


class Terms(NamedTuple):
    """One entry for each term a·t^(-µ)·p^(-ν)."""
    mu: tuple
    nu: tuple
    a: tuple


TWO_TERMS = Terms((0.5, 0.0), (0.0, 0.5), (1.0, 1.0))  # fig. 5b, row 1: γ* = ν/µ = 1
MODELS = np.geomspace(10, 1e9, 9)                        # p of fig. 5b
LATE = 0.3  # x from which our constant-rate curves are a sum of two power laws, to 3%


def loss(terms, t, p):
    """L(t, p) - L0, eq. 8. t and p broadcast."""
    return sum(a * t ** -mu * p ** -nu for mu, nu, a in zip(*terms, strict=True))


def phase_two(alpha, beta):
    """(Terms F0, Fpp and Fac with coefficients 1, γ* in t* ∝ p^γ*) of power-law random features with data exponents α and β.

    They hold in phase II of Paquette et al. (2024), for α > 1/2 and 1/2 <= β < α. Raises ValueError elsewhere.
    """
    if not 0.5 <= beta < alpha:
        raise ValueError(f'alpha={alpha:g}, beta={beta:g} is not in phase II; wanted alpha > 1/2 and 1/2 <= beta < alpha')
    tail = 1 / (2 * alpha)
    terms = Terms((0.0, 1 + beta / alpha - tail, 1 - tail), (2 * alpha, 0.0, 1.0), (1.0, 1.0, 1.0))
    return terms, alpha / beta  # p* ∝ c^(β/(α + β)) at compute c, and t = c/(6p)


def normalised(terms, gamma, p, x):
    """ℓ [M, K] at horizons t* = p^gamma: L(x·t*, p) / L(t*, p) with L0 = 0 (eq. 7)."""
    p = np.asarray(p, float)[:, None]
    return loss(terms, x * p ** gamma, p) / loss(terms, p ** gamma, p)


def deviation(terms, gamma, p=MODELS):
    """The largest Δ(x) of the models p over 0.01 <= x < 1; 0 for an exact collapse."""
    ell = normalised(terms, gamma, p, np.geomspace(0.01, 1, 50)[:-1])
    return float((ell.std(0) / ell.mean(0)).max())


class JointFit(NamedTuple):
    """L = L0 + A·t^(-µ) + B·p^(-ν), t in tokens."""
    L0: float
    A: float
    mu: float
    B: float
    nu: float
    error: float   # root mean square relative residual


def fit_joint(t, p, loss_values, ratio=None):
    """Fit of eq. 5 with free multipliers to points t, p, L [n] of constant-rate runs (fig. 5a), by relative least squares.

    `ratio` holds ν/µ. Given µ and ν the fit is linear with non-negative coefficients, so only µ and ν are searched (variable
    projection): a grid, then Nelder-Mead from its best point. Raises LogError for fewer than three models.
    """
    t, p, L = (np.asarray(v, float) for v in (t, p, loss_values))
    if len(np.unique(p)) < 3:
        raise LogError(f'the joint fit in t and p needs at least three models, got {len(np.unique(p))}')
    t0, p0 = np.exp(np.log(t).mean()), np.exp(np.log(p).mean())

    def exponents(free):  # free: log µ, and log ν if it is not held
        return np.exp(free[0]), ratio * np.exp(free[0]) if ratio else np.exp(free[1])

    def linear(free):
        mu, nu = exponents(free)
        columns = np.stack([np.ones_like(t), (t / t0) ** -mu, (p / p0) ** -nu], -1) / L[:, None]
        return nnls(columns, np.ones_like(t))
    axis = np.log(np.geomspace(0.05, 2, 12))
    grid = [(m,) for m in axis] if ratio else [(m, n) for m in axis for n in axis]
    start = min(grid, key=lambda free: linear(free)[1])
    best = minimize(lambda free: linear(free)[1], start, method='Nelder-Mead', options={'xatol': 1e-5, 'fatol': 1e-9}).x
    (L0, A, B), residual = linear(best)
    mu, nu = exponents(best)
    return JointFit(L0, A * t0 ** mu, mu, B * p0 ** nu, nu, residual / np.sqrt(len(t)))


def notes(table, found):
    """Two sentences on why ν/µ of the joint fit is outside the interval of γ of the horizon fit `found`; [] if it is inside.

    The two are equal where a sum of two power laws describes the whole curves. So the misfit is compared with the noise of the
    seeds, and the fit is repeated with ν/µ held at γ, and for x >= LATE only. `table` is the argument of `mean_curves`.
    """
    gamma, points = found.exponent - 1, mean_curves(table)
    whole = fit_joint(*points)
    low, high = found.exponent_ci or [found.exponent] * 2
    if low <= 1 + whole.nu / whole.mu <= high:
        return []
    held, end = fit_joint(*points, ratio=gamma), fit_joint(*mean_curves(table, LATE))
    variances = [seeds.var(ddof=1) / len(seeds) / seeds.mean() ** 2 for seeds in optimal_points(table).losses if len(seeds) > 1]
    beside = f', {whole.error / np.sqrt(np.mean(variances)):.1f} times the noise of the seed means' if variances else ''
    return [f'ν/µ = {whole.nu / whole.mu:.2f} of the joint fit is not γ = {gamma:.2f} of the horizon fit: a sum of two power laws '
            f'misses the whole curves by {whole.error:.2%} (root mean square){beside}',
            f'fitted from x = {LATE:g} on, ν/µ is {end.nu / end.mu:.2f} and the misfit {end.error:.2%}; with ν/µ held at γ, the '
            f'misfit of the whole curves is {held.error:.2%}']


def mean_curves(table, from_x=0.02):
    """(t, p, L) [n] of the seed-mean loss curves at log-spaced tokens, from x = from_x of each horizon on.

    The start of training is left out, because early transients are not power laws (fig. 5a leaves out 1B tokens).
    """
    curves = collapse.curves(table, np.geomspace(from_x, 1, 60))
    tokens = optimal_points(table).compute / (6 * curves.p)
    mean = np.array([curves.loss[curves.model == m].mean(0) for m in range(len(curves.p))])
    return np.outer(tokens, curves.x).ravel(), np.repeat(curves.p, len(curves.x)), mean.ravel()
