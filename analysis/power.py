"""What Δ of a ladder can show: the Δ that the fitted law predicts for misscaled ladders, and the smallest error that Δ detects.

The reducible loss of a run is R(x) = F(x) + N(x). N = ¼·η·Tr Σ is the noise of SGD (Qiu et al. 2025 eq. 14), from the trace in the
log. F follows L0 + A·t^(-µ) + B·p^(-ν) (eq. 5). At the optimum the term of t has the share s = γ/(1 + γ) of F(1) (eq. 6), and
b = µγ/(1 + γ). So for f times the horizon, with the curve as logged at f = 1 (eq. 7),

    R(x) = (F(x) - F(1))·f^(-µ) + F(1)·(s·f^(-µ) + 1 - s) + N(x).

N at a given x does not depend on the horizon. On our MLPs it changes by 1% on average and 9% at most, from x = 0.5 on, for 0.7 to
1.5 times the horizon. Without a trace N is 0. Seeds differ by a relative Gaussian noise with the covariance of those in the log.
"""

from typing import NamedTuple

import numpy as np
from scipy.special import ndtri

from analysis import collapse, horizon, power_laws, scaling_law, schedules
from analysis.table import LogError, clean

X = (0.25, 0.5, 0.75, 0.9)           # where Δ is taken
POWER, FALSE_ALARMS = 0.9, 0.05
DRAWS = 1000                         # simulated ladders; more for a threshold, fewer where L0 is refitted to each, which is slow
SEEDS, MOST_MODELS = (1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 50), 12   # seeds per model and added models that are tried, at most
FACTORS = (0.6, 0.8, 1.0, 1.2, 1.4)  # of γ, whose Δ is predicted


class Ladder(NamedTuple):
    """M models at normalised compute x [K], the last of which is 1."""
    p: np.ndarray          # [M] parameters
    tokens: np.ndarray     # [M] horizon
    seeds: np.ndarray      # [M] runs of each model
    x: np.ndarray
    curve: np.ndarray      # [M, K] R(x) / R(1), without the seeds
    sgd: np.ndarray        # [M, K] N(x) / R(1), without the seeds
    noise: np.ndarray      # [M, K] N(x) / R(1) as logged
    law: scaling_law.Law   # R(1) = a·C^(-b)
    gamma: float
    mu: float
    share: float           # s
    deviations: np.ndarray  # [k, K], k <= K; deviationsᵀ·deviations is the covariance of the seeds relative to R(x)
    dof: int               # degrees of freedom of that covariance


def read(table, L0=None, constant=None):
    """(Ladder, notes) of a log. A given L0 is held. µ and s follow from b and γ of the ladder, or from a fit to the constant-rate
    runs of the table `constant`, with ν/µ held at γ. Raises LogError for a log that is too small."""
    curves, points = collapse.curves(table, (*X, 1)), scaling_law.optimal_points(table)
    p, tokens, dof = curves.p, points.compute / (6 * curves.p), int((points.seeds - 1).sum())
    gamma = float(np.polyfit(np.log(p), np.log(tokens), 1)[0]) if len(p) > 1 else 0.0
    if gamma < 0.1 or not dof or len(curves.x) < 2:
        raise LogError('the power of Δ needs two models or more, two seeds of a model, whose difference is the noise, horizons '
                       'that grow with size, and evaluations before the end')
    law, average = scaling_law.fit(points.compute, points.loss, L0), collapse.model_average(curves)
    mu, share = law.b * (1 + gamma) / gamma, gamma / (1 + gamma)
    if constant is not None:
        joint = power_laws.fit_joint(*power_laws.mean_curves(clean(horizon.at_horizon(constant))[0], power_laws.LATE), ratio=gamma)
        of_t, mu = joint.A * tokens ** -joint.mu, joint.mu
        share = float((of_t / (of_t + joint.B * p ** -joint.nu)).mean())
    reducible = curves.loss - law.L0
    mean, noise, notes = average @ reducible, 0 * reducible, []
    traced = table[table['Buvar'].notna()] if 'Buvar' in table else table[:0]
    if np.isfinite(curves.lr).all() and set(traced['run']) == set(curves.run):
        trace = collapse.curves(traced.assign(test_loss=traced['Buvar'] / schedules.trace_share(traced)), curves.x).loss
        noise = schedules.THEORY * curves.lr * trace
    else:
        notes.append('the log has no trace Tr Σ, so N is not told apart from F; an error in γ then looks easier to see than it is')
    residuals = (reducible / mean[curves.model] - 1) / np.sqrt(dof)
    _, sizes, axes = np.linalg.svd(residuals, full_matrices=False)
    curve, noise = mean / mean[:, -1:], average @ noise / mean[:, -1:]
    # A part of the scatter of the models' means is the noise of their seeds. It is taken out, by moving the means closer together.
    within = (((residuals - residuals[:, -1:]) * curve.mean(0)) ** 2).sum(0) * (1 / points.seeds).mean()
    kept = np.sqrt(np.clip(1 - within / np.maximum(curve.var(0, ddof=1), 1e-300), 0, 1))
    curve, sgd = (one.mean(0) + kept * (one - one.mean(0)) for one in (curve, noise))
    return Ladder(p, tokens, points.seeds, curves.x, curve, sgd, noise, law, gamma, mu, share, sizes[:, None] * axes, dof), notes


def collapsed(ladder, seeds=None, more=0):
    """The Ladder with one curve for all models, so that only seeds differ. `seeds` is the number of every model; `more` larger
    models are added, at the ladder's mean step in log p."""
    M, step = len(ladder.p) + more, (ladder.p[-1] / ladder.p[0]) ** (1 / (len(ladder.p) - 1))
    p = np.append(ladder.p, ladder.p[-1] * step ** np.arange(1, more + 1))
    number = np.resize(ladder.seeds if seeds is None else seeds, M)
    curve, sgd = (np.broadcast_to(values.mean(0), (M, len(ladder.x))) for values in (ladder.curve, ladder.sgd))
    return ladder._replace(p=p, tokens=ladder.tokens[0] * (p / p[0]) ** ladder.gamma, seeds=number, curve=curve, sgd=sgd,
                           dof=max(ladder.dof, int((number - 1).sum())))  # more seeds would also tell the noise better


def wrong_gamma(ladder, factor):
    """{'horizon': [M] times the ladder's tokens} for `factor` times its γ at the same total compute."""
    tilt, compute = ladder.p ** ((factor - 1) * ladder.gamma), ladder.p * ladder.tokens
    return {'horizon': tilt * compute.sum() / (tilt * compute).sum()}


ERRORS = {  # name: (sizes from no error to the largest tried, function of a ladder and a size that gives the arguments of `deltas`)
    'gamma_below': (np.linspace(1, 0, 41), wrong_gamma),
    'gamma_above': (np.linspace(1, 3, 41), wrong_gamma),
    'horizon_below': (np.geomspace(1, 0.25, 5), lambda ladder, factor: {'horizon': factor}),
    'horizon_above': (np.geomspace(1, 4, 5), lambda ladder, factor: {'horizon': factor}),
    'excess': (np.linspace(0, 0.7, 41) ** 2, lambda ladder, exponent: {'excess': (ladder.p / ladder.p[0]) ** exponent}),
    'noise': (np.linspace(0, 1, 41) ** 2, lambda ladder, exponent: {'noise': (ladder.p / ladder.p[0]) ** exponent}),
}


def deltas(ladder, refit=False, horizon=1.0, excess=1.0, noise=1.0, draws=None, seed=0):
    """Δ [draws, K-1] at x < 1 of simulated ladders. `horizon` multiplies the tokens, `excess` F(1), by a constant added along the
    whole run, and `noise` N: each [M] or a number. L0 is the ladder's, or with `refit` fitted to the final losses. The scale of the
    seeds' noise is drawn too, because its variance is estimated with `dof` degrees of freedom."""
    draws = draws or (DRAWS // 4 if refit else DRAWS)
    rng, model = np.random.default_rng(seed), np.repeat(np.arange(len(ladder.p)), ladder.seeds)
    horizon, excess, noise = (np.broadcast_to(one, len(ladder.p))[:, None] for one in (horizon, excess, noise))
    forcing, fall, compute = ladder.curve - ladder.sgd, horizon ** -ladder.mu, 6 * ladder.p * ladder.tokens
    end = forcing[:, -1:]
    relative = (forcing - end) * fall + end * (ladder.share * fall + 1 - ladder.share) * excess + ladder.sgd * noise
    reducible = relative * (scaling_law.predict(ladder.law, compute) - ladder.law.L0)[:, None]
    scale = np.sqrt(ladder.dof / rng.chisquare(ladder.dof, (draws, 1, 1)))
    of_seeds = np.exp(scale * (rng.normal(size=(draws, len(model), len(ladder.deviations))) @ ladder.deviations))
    curves = collapse.Curves(ladder.x, ladder.law.L0 + reducible[model] * of_seeds, model, ladder.p, [], None, None)
    L0 = np.full(draws, ladder.law.L0)
    if refit:
        final = (collapse.model_average(curves) @ curves.loss)[..., -1]
        fitted = scaling_law.fit_batch(compute * horizon[:, 0], final, ladder.law)['L0']
        L0 = collapse.held_below(fitted, curves)
    return collapse.spread(curves, L0).delta[:, :-1]


def threshold(ladder, refit=False):
    """[K-1] the Δ that FALSE_ALARMS of such ladders without an error exceed."""
    return np.quantile(deltas(ladder, refit, draws=DRAWS if refit else 3 * DRAWS, seed=1), 1 - FALSE_ALARMS, axis=0)


def power(ladder, name, size, limit, refit=False):
    """[K-1] share of ladders with the error `name` of ERRORS whose Δ exceeds `limit`."""
    return (deltas(ladder, refit, **ERRORS[name][1](ladder, size)) > limit).mean(0)


def smallest(ladder, name, refit=False):
    """[K-1] size of the error `name` that Δ shows with probability POWER, between two sizes tried; NaN if no size is shown."""
    sizes, limit = ERRORS[name][0][::4 if refit else 1], threshold(ladder, refit)
    found = np.maximum.accumulate([power(ladder, name, size, limit, refit) for size in sizes])
    normal = ndtri(np.clip(found, 1 / DRAWS, 1 - 1 / DRAWS))  # nearly a straight line in the size
    return np.array([np.interp(ndtri(POWER), own, sizes) if own[-1] >= ndtri(POWER) else np.nan for own in normal.T])


def first(ladders, name, size):
    """[K-1] value of the first of the pairs (value, Ladder) whose Δ shows the error with probability POWER; NaN if none does."""
    shown = np.array([power(ladder, name, size, threshold(ladder)) >= POWER for _, ladder in ladders])
    return np.where(shown.any(0), np.array([value for value, _ in ladders])[shown.argmax(0)], np.nan)


def predicted(ladder, horizon):
    """Median Δ [K-1] of ladders with `horizon` times the tokens: with the ladder's L0 (`delta`), with L0 refitted (`delta_refit`),
    and with the ladder's L0 where N follows the law as well (`delta_law`, eq. 7 alone)."""
    return {name: np.median(deltas(one, refit, horizon), 0) for name, one, refit in (
        ('delta', ladder, False), ('delta_refit', ladder, True), ('delta_law', ladder._replace(sgd=0 * ladder.sgd), False))}


def compare(ladder, table):
    """What `predicted` gives for the horizons and seeds of another log with models of the ladder, and its own Δ: `measured` and
    `measured_refit`. `p_value` is the share of predicted Δ, with L0 held, above the measured one."""
    curves, points = collapse.curves(table, ladder.x), scaling_law.optimal_points(table)
    at = np.abs(np.log(ladder.p[:, None] / curves.p)).argmin(0)
    if len(at) < 2 or not np.allclose(ladder.p[at], curves.p, rtol=0.01):
        raise LogError(f'a log to compare with needs two models or more of the ladder, and no other; it has p = {curves.p}')
    good = ladder._replace(p=curves.p, tokens=ladder.tokens[at], seeds=points.seeds, curve=ladder.curve[at], sgd=ladder.sgd[at])
    times = points.compute / (6 * curves.p) / good.tokens
    floors = [ladder.law.L0, scaling_law.fit(points.compute, points.loss).L0]
    held, refit = collapse.spread(curves, collapse.held_below(floors, curves)).delta[:, :-1]
    return predicted(good, times) | {'measured': held, 'measured_refit': refit, 'num_params': curves.p,
                                     'p_value': (deltas(good, False, times) >= held).mean(0)}


def analyse(table, L0=None, constant=None, factor=0.8, seeds=None, more=0):
    """(result, Ladder, notes): the smallest errors that a ladder shows, and what would show `factor` times its γ. With `seeds` or
    `more` it is one that is planned: see `collapsed`."""
    ladder, notes = read(table, L0, constant)
    exact = collapsed(ladder, seeds, more)
    good = exact if seeds or more else ladder
    names, error = [name for name in ERRORS if name != 'noise' or ladder.sgd.any()], 'gamma_below' if factor < 1 else 'gamma_above'
    longer = [collapsed(exact, more=number) for number in range(MOST_MODELS + 1)]
    return {
        'x': ladder.x[:-1], 'delta': collapse.spread(collapse.curves(table, ladder.x), ladder.law.L0).delta[:-1],
        'threshold': threshold(exact), 'threshold_refit': threshold(exact, True),
        'smallest': {name: smallest(exact, name) for name in names},
        'smallest_refit': {name: smallest(exact, name, True) for name in names if name.startswith('gamma')},
        'factor': factor, 'needed': {'seeds': first([(number, collapsed(exact, number)) for number in SEEDS], error, factor),
                                     'p': first([(one.p[-1], one) for one in longer], error, factor)},
        'predicted': [{'factor': one} | predicted(good, **wrong_gamma(good, one)) for one in FACTORS],
        'noise': ladder.noise[:, :-1] if ladder.noise.any() else None,  # of the models in the log
        'fit': ladder.law._asdict(), 'gamma': ladder.gamma, 'mu': ladder.mu, 'share': ladder.share, 'num_params': exact.p,
        'seeds_per_model': exact.seeds, 'power': POWER, 'false_alarms': FALSE_ALARMS}, ladder, notes
