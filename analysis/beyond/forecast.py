"""The loss curve of a larger model, forecast from a ladder of smaller ones before it is trained, with intervals.

The statistical model is in ladder_field.py. This file has the targets, two baselines, the errors of a forecast whose target is in
the log, and the check of a ladder on itself. Errors are relative to the target's reducible loss L - L0. L0 is that of the scaling
law through the whole log, target included, so that a forecast is not judged by its own L0.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd

from analysis import scaling_law, schedules
from analysis.beyond import ladder_field
from analysis.table import LogError, between_widths, require, runs

ERRORS_FROM_X = 0.1                        # errors are taken over this x to 1
BUDGET_MULTIPLES = (1, 2, 5, 10, 30, 100)  # of the largest compute of the ladder
SAME_MODEL_TOLERANCE = 0.01                # a p this close to a model's is that model: printed counts have three digits or more
MAX_COMPUTE_RATIO = 100                    # a target beyond this multiple of the ladder's largest compute gets a warning
MIN_CALIBRATED = 0.7                       # and so does a ladder whose own curves are less often than this in the 90% bands


class Target(NamedTuple):
    """The model to forecast."""
    p: float
    compute: float        # FLOPs, C*
    seeds: int            # the bands are for the mean of so many runs: those in the log, else one
    truth: np.ndarray     # [G] mean over seeds at Ladder.grid, None if the target is not in the log
    observed: np.ndarray  # [K] the same at the knots, NaN where the forecast may not use it


def params_of(table, wanted):
    """Parameters of a target 'p=…' or 'D=…'. For a width that is not in the log, a·D² + b·D + c is fitted to those that are."""
    key, _, value = wanted.partition('=')
    try:
        value = float(value)
    except ValueError:
        value = np.nan
    if key not in ('p', 'D') or not value > 0:
        raise LogError(f'--target {wanted}: wanted p=NUMBER (parameters) or D=NUMBER (width)')
    if key == 'p':
        return value
    require(table, ['D', 'num_params'], 'a target given by its width')
    known = runs(table).drop_duplicates('D').set_index('D')['num_params']
    if value in known:
        return float(known[value])
    if len(known) < 3:
        raise LogError('--target D=… needs three widths in the log to derive the parameters from; give p=… instead')
    return float(np.polyval(np.polyfit(known.index, known, 2), value))


def optimal_compute(ladder, p):
    """C* in FLOPs of a model with p parameters: a straight line through the ladder in log C*, log p."""
    slope, level = np.polyfit(np.log(ladder.p), np.log(ladder.compute), 1)
    return np.exp(slope * np.log(p) + level)


def optimal_params(ladder, compute):
    """Parameters of the model whose C* is `compute`: the inverse of optimal_compute."""
    slope, level = np.polyfit(np.log(ladder.p), np.log(ladder.compute), 1)
    return np.exp((np.log(compute) - level) / slope)


def split(ladder, p, largest_p=np.inf, seen=0.0, tokens=None):
    """(Ladder of the models below the target and up to largest_p, Target with p parameters).

    If the log holds the target, its curve is the truth, and its part up to x = seen is observed. Else its horizon is `tokens`, or
    what the ladder gives. Raises LogError for fewer than three smaller models and for options that contradict the log.
    """
    nearest = np.abs(np.log(ladder.p / p)).argmin()
    in_log = abs(ladder.p[nearest] / p - 1) <= SAME_MODEL_TOLERANCE
    p = float(ladder.p[nearest]) if in_log else p
    smaller = (ladder.p < p * 0.999) & (ladder.p <= largest_p)
    if smaller.sum() < 3:
        raise LogError(f'a forecast needs at least three smaller models; {smaller.sum()} have fewer than {p:.6g} parameters')
    small = ladder_field.select(ladder, smaller)
    if in_log:
        if tokens:
            raise LogError(f'--horizon: the log already holds the model with {p:.6g} parameters; leave --horizon out')
        losses = ladder.losses[nearest]
        observed = np.where(ladder.x <= seen, losses.mean(0), np.nan)
        return small, Target(p, float(ladder.compute[nearest]), len(losses), ladder.mean[nearest], observed)
    if seen:
        raise LogError(f'--seen {seen:g}: the log holds no run of a model with {p:.6g} parameters; it has '
                       f'{", ".join(f"{one:.6g}" for one in ladder.p)}')
    compute = 6 * p * tokens if tokens else optimal_compute(small, p)
    return small, Target(p, float(compute), 1, None, np.full(len(ladder.x), np.nan))


def forecast(ladder, target):
    """ladder_field.Draws (T = 1) of the mean curve of target.seeds runs."""
    return ladder_field.posterior_curves(ladder, [target.compute], target.observed[None], target.seeds)


def bands(loss):
    """Median ('mean') and the 50% and 90% intervals of draws [S, ...]."""
    lo90, lo50, median, hi50, hi90 = np.quantile(loss, [0.05, 0.25, 0.5, 0.75, 0.95], axis=0)
    return {'mean': median, 'lo50': lo50, 'hi50': hi50, 'lo90': lo90, 'hi90': hi90}


def budgets(ladder):
    """Final losses of compute-optimal models at multiples of the ladder's largest compute, a dict each."""
    compute = ladder.compute[-1] * np.array(BUDGET_MULTIPLES)
    final = bands(ladder_field.posterior_curves(ladder, compute).loss[:, :, -1])
    rows = {'times': BUDGET_MULTIPLES, 'compute': compute, 'p': optimal_params(ladder, compute), **final}
    return pd.DataFrame(rows).to_dict('records')


def change_schedule(table, target, draws, x, name, alpha, spread, horizon_ratio=1.0):
    """Draws of a target at a constant rate, turned into draws under the schedule `name` (schedules.apply_schedule).

    α varies from run to run with standard deviation `spread` (schedules.alpha_of_reference): the error of the schedule law itself.
    A NaN counts as no variation.
    """
    alpha = alpha + np.nan_to_num(spread) * np.random.default_rng(0).normal(size=len(draws.L0))
    share = schedules.noise_share(table, target.p, draws.L0)
    reducible = schedules.apply_schedule(name, x, draws.loss[:, 0] - draws.L0[:, None], share, alpha, horizon_ratio)
    return draws._replace(loss=(draws.L0[:, None] + reducible)[:, None])


def baselines(ladder, compute):
    """Two curves [G] that need no statistical model. Both start from the scaling law fitted to final losses.

    'power law': the mean normalised curve of the two largest models, scaled to end on the law. 'largest shifted': the curve of the
    largest model, its reducible loss scaled by what the law gains.
    """
    law = scaling_law.fit(ladder.compute, ladder.mean[:, -1])
    reducible = ladder.mean[-2:] - law.L0
    end, largest_end = scaling_law.predict(law, [compute, ladder.compute[-1]]) - law.L0
    normalised = (reducible / reducible[:, -1:]).mean(0)
    return {'power law': law.L0 + end * normalised, 'largest shifted': law.L0 + end / largest_end * reducible[-1]}


def relative_error(x, curve, truth, L0):
    """Median, worst and final error of a curve [G] for x >= ERRORS_FROM_X, relative to the reducible loss of the truth."""
    counted = x >= ERRORS_FROM_X - 1e-9
    error = np.abs(curve - truth)[counted] / (truth - L0)[counted]
    return {'reducible_median': float(np.median(error)), 'reducible_worst': float(error.max()), 'final': float(error[-1])}


def evaluate(x, band, curves, truth, L0, seen=0.0):
    """The error of a forecast's bands beside those of the baselines `curves`. Coverage counts only x after `seen`."""
    counted = (x >= ERRORS_FROM_X - 1e-9) & (x > seen + 1e-9)
    inside = ((truth >= band['lo90']) & (truth <= band['hi90']))[counted]
    others = {name: relative_error(x, curve, truth, L0) for name, curve in curves.items()}
    return relative_error(x, band['mean'], truth, L0) | {
        'baseline_final': others['power law']['final'], 'covered90': float(inside.mean()),
        'final_covered90': bool(inside[-1]), 'L0': L0, 'baselines': others}


def leave_out(table, seen_values, min_models):
    """A dict for every split of a log: the n smallest models, n >= min_models, forecast each larger one."""
    ladder = ladder_field.read_ladder(table, [x for x in seen_values if x])
    M = len(ladder.p)
    return [_judge_split(ladder, n, m, seen) for n in range(min_models, M) for m in range(n, M) for seen in seen_values]


def _judge_split(ladder, n, m, seen):
    """The errors of the forecast of model m from the n smallest models, as a dict."""
    small, target = split(ladder, ladder.p[m], ladder.p[n - 1], seen)
    band, L0 = bands(forecast(small, target).loss[:, 0]), scaling_law.fit(ladder.compute, ladder.mean[:, -1]).L0
    return {'models': n, 'p': ladder.p[m], 'times_compute': target.compute / small.compute[-1], 'seen': seen,
            **evaluate(ladder.grid, band, baselines(small, target.compute), target.truth, L0, seen)}


def calibrate(ladder, seen=0.0):
    """How the bands held on the ladder itself: each model from the fourth on is forecast from all smaller ones.

    A dict of means over the `splits`: shares within the 90% bands and relative final error. None for three models.
    """
    rows = pd.DataFrame([_judge_split(ladder, n, n, seen) for n in range(3, len(ladder.p))])
    return {'splits': len(rows), **rows[['covered90', 'final_covered90', 'final']].mean()} if len(rows) else None


def analyse(table, wanted, max_width=None, seen=0.0, tokens=None, rate=None, schedule=None, pairs=None):
    """(the forecast of one target as a dict, notes). The arguments are the options of the command: see its --help."""
    ladder = ladder_field.read_ladder(table, [seen] if seen else [])
    wanted_p, largest_p = params_of(table, wanted), between_widths(table, highest=max_width)['num_params'].max()
    small, target = split(ladder, wanted_p, largest_p, seen, None if schedule else tokens)
    p, draws, curves, notes = target.p, forecast(small, target), baselines(small, target.compute), []
    if abs(p / wanted_p - 1) > 1e-9:
        notes.append(f'the target with {wanted_p:.6g} parameters is taken to be the model with {p:.10g} in the log')
    if schedule:
        times = 6 * p * tokens / target.compute if tokens else 1.0
        alpha, spread = schedules.alpha_of_reference(pairs)
        draws = change_schedule(table[table['num_params'].isin(small.p)], target, draws, small.grid, schedule, alpha, spread, times)
        target, curves = target._replace(truth=None, compute=target.compute * times), {}
        variation = 'include' if np.isfinite(spread) else 'do not include, as there is one run only,'
        notes.append(f'the forecast is for the {schedule} schedule, from constant-rate curves; its bands {variation} the variation '
                     'of α over the runs of --pairs; the budgets are for the constant rate')
    band, calibration = bands(draws.loss[:, 0]), calibrate(small, seen)
    notes += _warnings(small, target, schedule, calibration)
    result = {'x': small.grid, **band, 'final': float(band['mean'][-1]),
              'final_90': [float(band['lo90'][-1]), float(band['hi90'][-1])], 'num_params': p, 'compute': target.compute,
              'tokens': target.compute / (6 * p), 'hours': target.compute / rate / 3600 if rate else None,
              'times_compute': target.compute / small.compute[-1], 'ladder': small.p, 'seen': seen, 'seeds': target.seeds,
              'L0': float(np.median(draws.L0)), 'L0_90': scaling_law.interval(draws.L0), 'budgets': budgets(small),
              'baselines': {name: {'final': float(curve[-1]), 'curve': curve} for name, curve in curves.items()},
              'truth': target.truth, 'calibration': calibration, 'error': None}
    if target.truth is not None:
        L0 = scaling_law.fit(ladder.compute, ladder.mean[:, -1]).L0
        result['error'] = evaluate(small.grid, band, curves, target.truth, L0, seen)
    return result, notes


def _warnings(ladder, target, schedule, calibration=None):
    """Notes on what the forecast of a target rests on."""
    notes, ratio, span = [], target.compute / ladder.compute[-1], ladder.compute[-1] / ladder.compute[0]
    if ratio > min(span, MAX_COMPUTE_RATIO):  # beyond the ladder by more than its own range in log compute
        notes.append(f'the target has {ratio:.3g} times the compute of the largest model, {np.log(ratio) / np.log(span):.2g} '
                     f'times the ladder\'s own range in log compute: do not trust the bands beyond that or {MAX_COMPUTE_RATIO} ×')
    if calibration and calibration['covered90'] < MIN_CALIBRATED:
        notes.append(f'the 90% bands held {calibration["covered90"]:.0%} of the curves of the ladder itself: do not trust them')
    rule = optimal_compute(ladder, target.p)
    if not schedule and abs(target.compute / rule - 1) > 0.05:
        notes.append(f'the target\'s {target.compute:.4g} FLOPs are {target.compute / rule:.3g} times the horizon that the ladder '
                     'gives its size; the forecast is for a compute-optimal run of that compute')
    if all(len(L) == 1 for L in ladder.losses):
        notes.append('one seed a model: the size of the noise is inferred from the scatter among models')
    if not np.isclose(ladder.x[0], ladder_field.KNOTS[0]):
        notes.append(f'the curves have no data below x = {ladder.x[0]:g}; the forecast starts there')
    return notes
