"""Foresee a run before it is trained: a larger model's whole loss curve from a ladder of smaller ones, with intervals.

    python -m figures forecast LOG --target D=2048 [--max-width 1024] [--seen 0.3]
    python -m figures forecast LOG --target each [--seen 0.3]            every larger model from every set of smaller ones
    python -m figures forecast CONSTANT --target D=2048 --schedule linear --pairs LOG [--horizon TOKENS]

The model is ladder_field.py's; here are targets, budgets, baselines and errors. Errors are relative to the reducible loss L - L0 of
the truth, with the L0 of the law fitted to the *whole* log, target included: a forecast's own L0 does not flatter it.
"""

from typing import NamedTuple

import numpy as np

from analysis import scaling_law, schedules
from analysis.beyond import ladder_field
from analysis.table import LogError, require, runs

FROM = 0.1                        # errors are taken over FROM <= x <= 1
BUDGETS = (1, 2, 5, 10, 30, 100)  # times the largest compute of the ladder


class Target(NamedTuple):
    p: float
    compute: float     # FLOPs, C*
    seeds: int         # runs that the bands are for the mean of: those in the log, else one
    truth: np.ndarray  # [G] seed mean at Ladder.fine, or None
    seen: np.ndarray   # [K] the same at the knots, NaN after the part that may be used, or None


def optimal_compute(ladder, p):
    """C* of models with p parameters: the ladder's own rule, a line in log-log (exact where a rule set the horizons)."""
    line = np.polyfit(np.log(ladder.p), np.log(ladder.compute), 1)
    return np.exp(np.polyval(line, np.log(p)))


def optimal_params(ladder, compute):
    """The inverse of optimal_compute."""
    slope, level = np.polyfit(np.log(ladder.p), np.log(ladder.compute), 1)
    return np.exp((np.log(compute) - level) / slope)


def params_of(table, wanted):
    """Parameters of a target 'p=…' or 'D=…'. A width that is not in the log: p = c·D² + d·D + e through those that are."""
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
    known = runs(table)[['D', 'num_params']].drop_duplicates().to_numpy()
    if value in known[:, 0]:
        return float(known[known[:, 0] == value, 1][0])
    if len(known) < 3:
        raise LogError('--target D=… needs three widths in the log to derive the parameters from; give p=… instead')
    return float(np.polyval(np.polyfit(*known.T, 2), value))


def split(ladder, p, most=np.inf, seen=0.0, tokens=None):
    """(Ladder of the models below the target and with p <= most, Target): the target's own curve is its truth, if it is there."""
    below = (ladder.p < p * 0.999) & (ladder.p <= most)
    if below.sum() < 3:
        raise LogError(f'{below.sum()} models are smaller than the target with {p:.4g} parameters; a forecast needs at least three')
    small = ladder_field.choose(ladder, below)
    at = np.flatnonzero(np.isclose(ladder.p, p, rtol=1e-3))
    if not len(at):
        if seen:
            raise LogError(f'--seen {seen:g}: the log holds no run of the target with {p:.4g} parameters')
        return small, Target(p, float(6 * p * tokens if tokens else optimal_compute(small, p)), 1, None, None)
    if tokens:
        raise LogError(f'--horizon: the log holds the target with {p:.4g} parameters, and its horizon')
    runs_there = ladder.losses[at[0]]
    early = np.where(ladder.x <= seen + 1e-9, runs_there.mean(0), np.nan) if seen else None
    return small, Target(p, float(ladder.compute[at[0]]), len(runs_there), ladder.mean[at[0]], early)


def forecast(ladder, target, seed=0):
    """Posterior curves of the target, mean of target.seeds runs, as ladder_field.Draws with T = 1."""
    early = None if target.seen is None else target.seen[None]
    return posterior(ladder, [target.compute], early, target.seeds, seed)


def posterior(ladder, compute, losses=None, seeds=1, seed=0, scales=None):
    """Draws for targets at compute [T] FLOPs, see ladder_field.field; `scales` [S, 6] if they have been sampled already."""
    rng = np.random.default_rng(seed)
    field = ladder_field.field(ladder, np.asarray(compute, float), losses, seeds)
    return ladder_field.draw(field, rng, ladder_field.sample(field, rng) if scales is None else scales)


def bands(loss):
    """Median and the 50% and 90% intervals of draws [S, ...]."""
    lo90, lo50, mean, hi50, hi90 = np.quantile(loss, [0.05, 0.25, 0.5, 0.75, 0.95], axis=0)
    return {'mean': mean, 'lo50': lo50, 'hi50': hi50, 'lo90': lo90, 'hi90': hi90}


def baselines(ladder, compute):
    """Curves [G] that need no model of the ladder: law times mean ℓ of the two largest, and the largest one's curve shifted.

    Both follow the power law fitted to final losses: the first ends on it, the second moves the largest model down by what
    the law gains.
    """
    finals = np.array([L[:, -1].mean() for L in ladder.losses])
    law = scaling_law.fit(ladder.compute, finals)
    reducible = ladder.mean[-2:] - law.L0
    end = scaling_law.predict(law, compute) - law.L0
    ell = (reducible / reducible[:, -1:]).mean(0)
    gain = end / (scaling_law.predict(law, ladder.compute[-1]) - law.L0)
    return {'power law': law.L0 + end * ell, 'largest shifted': law.L0 + gain * reducible[-1]}


def error(x, curve, truth, L0):
    """Median, worst and final error of a curve [G], relative to the truth's reducible loss, over FROM <= x <= 1."""
    away = np.abs(curve - truth)[x >= FROM - 1e-9] / (truth - L0)[x >= FROM - 1e-9]
    return {'reducible_median': float(np.median(away)), 'reducible_worst': float(away.max()), 'final': float(away[-1])}


def whole_L0(ladder):
    """L0 of the law through every model of the log: the convention of all errors here."""
    return scaling_law.fit(ladder.compute, [L[:, -1].mean() for L in ladder.losses]).L0


def judge(x, band, curves, truth, L0, seen=0.0):
    """The error of a forecast (its bands), beside those of the baselines; coverage is of what was not seen."""
    inside = ((truth >= band['lo90']) & (truth <= band['hi90']))[(x >= FROM - 1e-9) & (x > seen + 1e-9)]
    others = {name: error(x, curve, truth, L0) for name, curve in curves.items()}
    return error(x, band['mean'], truth, L0) | {
        'baseline_final': others['power law']['final'], 'covered90': float(inside.mean()),
        'final_covered90': bool(inside[-1]), 'L0': L0, 'baselines': others}


def leave_out(table, seens=(0.0,), fewest=4):
    """Every split of a log: the widths up to each, from the `fewest` smallest on, forecast every larger one. A dict each."""
    ladder, rows = ladder_field.gather(table, [x for x in seens if x]), []
    L0 = whole_L0(ladder)
    for n in range(fewest, len(ladder.p)):
        for p in ladder.p[n:]:
            for seen in seens:
                small, target = split(ladder, p, ladder.p[n - 1], seen)
                band = bands(forecast(small, target).loss[:, 0])
                found = judge(ladder.fine, band, baselines(small, target.compute), target.truth, L0, seen)
                rows.append({'models': n, 'p': p, 'times_compute': target.compute / small.compute[-1], 'seen': seen, **found})
    return rows


def budgets(ladder, times=BUDGETS):
    """Final losses at multiples of the largest compute of the ladder: what would it buy?"""
    compute = ladder.compute[-1] * np.array(times, float)
    final = bands(posterior(ladder, compute).loss[:, :, -1])
    return [{'times': k, 'compute': C, 'p': p, **{name: float(v[i]) for name, v in final.items()}}
            for i, (k, C, p) in enumerate(zip(times, compute, optimal_params(ladder, compute), strict=True))]


def reschedule(table, target, draws, fine, name, alpha, spread, times=1.0):
    """Draws of a target at a constant rate as they are under the schedule `name`; see schedules.apply_schedule.

    α is drawn with its spread from run to run (see schedules.alpha_of_reference), the schedule law's own error; NaN counts as none.
    """
    alpha = alpha + np.nan_to_num(spread) * np.random.default_rng(0).normal(size=len(draws.L0))
    share = schedules.noise_share(table, target.p, draws.L0)
    reducible = schedules.apply_schedule(name, fine, draws.loss[:, 0] - draws.L0[:, None], share, alpha, times)
    return draws._replace(loss=(draws.L0[:, None] + reducible)[:, None])


def analyse(table, wanted, max_width=None, seen=0.0, tokens=None, rate=None, schedule=None, pairs=None):
    """The forecast of one target as a dict, and notes; see --help for the meaning of the arguments."""
    p = params_of(table, wanted)
    ladder = ladder_field.gather(table, [seen] if seen else [])
    most = np.inf
    if max_width is not None:
        require(table, ['D'], '--max-width')
        most = table.loc[table['D'] <= max_width, 'num_params'].max()
        if not most > 0:
            raise LogError(f'--max-width {max_width:g}: no model in the log is that narrow')
    small, target = split(ladder, p, most, seen, None if schedule else tokens)
    draws, curves, notes = forecast(small, target), baselines(small, target.compute), []
    if schedule:
        times = 6 * p * tokens / target.compute if tokens else 1.0
        alpha, spread = schedules.alpha_of_reference(pairs)
        draws = reschedule(table[table['num_params'].isin(small.p)], target, draws, small.fine, schedule, alpha, spread, times)
        target, curves = target._replace(truth=None, compute=target.compute * times), {}
        held = 'hold the spread of α over the runs' if np.isfinite(spread) else 'lack the spread of α, there being one run'
        notes.append(f'under the {schedule} schedule, from the constant-rate curves: the bands {held} of --pairs, and the budgets '
                     'are for the constant rate')
    band = bands(draws.loss[:, 0])
    rule = optimal_compute(small, p)
    if not schedule and abs(target.compute / rule - 1) > 0.05:
        notes.append(f'the target\'s {target.compute:.4g} FLOPs are {target.compute / rule:.3g} times what the ladder\'s rule '
                     'gives its size; the forecast is for a compute-optimal run of that compute')
    if all(len(L) == 1 for L in small.losses):
        notes.append('one seed a model: the size of the noise is inferred from the scatter among models')
    if not np.isclose(ladder.x[0], ladder_field.KNOTS[0]):
        notes.append(f'the curves have no data below x = {ladder.x[0]:g}; the forecast starts there')
    result = {'x': small.fine, **band, 'final': float(band['mean'][-1]),
              'final_90': [float(band['lo90'][-1]), float(band['hi90'][-1])], 'num_params': p, 'compute': target.compute,
              'tokens': target.compute / (6 * p), 'hours': target.compute / rate / 3600 if rate else None,
              'times_compute': target.compute / small.compute[-1], 'ladder': small.p, 'seen': seen, 'seeds': target.seeds,
              'L0': float(np.median(draws.L0)), 'L0_90': scaling_law.interval(draws.L0), 'budgets': budgets(small),
              'baselines': {name: {'final': float(curve[-1]), 'curve': curve} for name, curve in curves.items()},
              'truth': target.truth, 'error': None}
    if target.truth is not None:
        result['error'] = judge(small.fine, band, curves, target.truth, whole_L0(ladder), seen)
    return result, notes
