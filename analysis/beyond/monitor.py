"""Watch a run against its ladder while it trains: the collapse residual and its band, an alarm and its likely cause, the end.

    python -m figures watch runs/tag/name --against logs/laptop_mlp.parquet          (or a W&B run: entity/project/id)

The residual is (L(x) - L̂(x)) / (L̂(x) - L0), with L̂ the ladder's forecast of this run's curve. Its covariance over x, of one run,
is the forecast's own: so the p_value of a whole residual so far is a χ² test of its height and one of its shape, and a residual
that stays in a wide band but has the wrong shape is found out too. The forecasts are forecast.py's; benchmarks/watch_faults.py
measures what is caught.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.special import fdtrc

from analysis import scaling_law
from analysis import table as logs
from analysis.beyond import forecast, ladder_field
from analysis.table import LogError

ALARM = 0.01  # p_value below which two points in a row alarm, where the ladder has too few runs to say (see `level`)
FALSE = 0.05  # healthy runs that may be alarmed; also the largest level
HABITS = ('schedule', 'decay_frac', 'peak_lr', 'B', 'N', 'L', 'match_mup_at_D')  # what a run shares with its ladder


class Expected(NamedTuple):
    """What the ladder says of one run of a model."""
    x: np.ndarray           # [K]
    loss: np.ndarray        # [K] median
    reducible: np.ndarray   # [K] its distance to L0
    lo90: np.ndarray        # [K] band of the residual
    hi90: np.ndarray
    covariance: np.ndarray  # [K, K] of the residual
    own: np.ndarray         # [K, K] its part that is a run's own noise
    compute: float          # FLOPs at x = 1 by the ladder's rule
    freedom: int            # differences between runs that the noise is known from


class Reading(NamedTuple):
    """A run so far."""
    x: np.ndarray
    residual: np.ndarray
    p_value: np.ndarray    # [k] probability that a healthy run's residual up to x is this far out
    alarm: float            # x from which the p_value stayed `below`, NaN if it did not
    looks_like: list        # (name, share of the p_value explained, amplitude), the best first


def expect(ladder, p, seed=0, scales=None):
    """Expected of a run with p parameters; sound runs of its own size are the best there is, but the ladder need not have any."""
    if len(ladder.p) < 3:
        raise LogError(f'{len(ladder.p)} models in the ladder; watching a run needs at least three')
    compute = float(forecast.optimal_compute(ladder, p))
    draws = forecast.posterior(ladder, [compute], seed=seed, scales=scales)
    x = ladder.x
    loss = np.stack([np.interp(np.log(x), np.log(ladder.fine), one) for one in draws.loss[:, 0]])
    median = np.median(loss, 0)
    reducible = median - np.median(draws.L0)
    away = (loss - median) / reducible
    low, high = np.quantile(away, [0.05, 0.95], axis=0)
    own = ladder_field.noise_covariance(ladder, np.median(draws.L0), x)
    freedom = max(len(ladder.p), sum(len(L) - 1 for L in ladder.losses))
    return Expected(x, median, reducible, low, high, np.cov(away.T), own, compute, freedom)


def read(expected, x, loss, below=ALARM):
    """Reading of a run's evaluations at x [n] (increasing, of its own horizon) with loss [n].

    The noise is known from `freedom` differences between seeds only: the two tests are Fisher's F, not χ².
    """
    at = expected.x[(expected.x >= x[0]) & (expected.x <= x[-1] * (1 + 1e-9))]
    k = np.searchsorted(expected.x, at)
    if not len(k):
        return Reading(at, at, at, np.nan, [])
    own = np.exp(np.interp(np.log(at), np.log(x), np.log(loss)))
    residual = (own - expected.loss[k]) / expected.reducible[k]
    covariance = expected.covariance[np.ix_(k, k)]
    factor = np.linalg.cholesky(covariance)
    whitened, level = np.linalg.solve(factor, np.stack([residual, np.ones(len(k))], -1)).T
    count = np.arange(1, len(k) + 1)
    shape = fdtrc(count, expected.freedom, np.cumsum(whitened ** 2) / count)
    height = fdtrc(1, expected.freedom, np.cumsum(whitened * level) ** 2 / np.cumsum(level ** 2))
    p_value = np.minimum(1, 2 * np.minimum(shape, height))
    out = np.logical_and.accumulate((p_value < below)[::-1])[::-1]
    alarm = float(at[np.argmax(out)]) if out.sum() > 1 else np.nan
    return Reading(at, residual, p_value, alarm, likeness(expected, k, residual, covariance))


def likeness(expected, k, residual, covariance):
    """How much of the χ² of a residual each kind of fault explains, its size fitted: [(name, share, amplitude)], best first."""
    x, weight = expected.x[k], np.linalg.inv(covariance)
    total = residual @ weight @ residual
    slope = np.gradient(np.log(expected.reducible), np.log(expected.x))[k]
    shapes = {
        'horizon: the run is ahead of or behind its ladder by a factor': -slope,
        'learning rate or width multipliers: off all along': np.ones(len(k)),
        'learning rate: noise that decay will take off': 1 - x,
        'early: initialisation, warm-up or first rate': 1 / x,
    }
    for start in x[1:-1:max(1, len(x) // 8)]:
        shapes[f'from x = {start:.2f} on: data repeated or changed, divergence beginning'] = np.maximum(np.log(x / start), 0)
    found = []
    for name, shape in shapes.items():
        square = shape @ weight @ shape
        if square > 0 and total > 0:
            size = shape @ weight @ residual / square
            found.append((name, float(size ** 2 * square / total), float(size)))
    return sorted(found, key=lambda one: -one[1])


def end(expected, x, loss):
    """Mean and standard deviation of the run's final loss given its evaluations at x [n], and the deviation for comparing runs.

    Its own curve so far and the ladder's forecast count in the proportion of their covariances (forecast.py's --seen lets the run
    have its say on the scales of the model as well). Two runs of one size share what the ladder got wrong: only their own noise,
    the third number, tells their ends apart.
    """
    k = np.flatnonzero((expected.x >= x[0]) & (expected.x <= x[-1] * (1 + 1e-9)))
    residual = np.exp(np.interp(np.log(expected.x[k]), np.log(x), np.log(loss))) / expected.reducible[k] \
        - expected.loss[k] / expected.reducible[k]
    gain = np.linalg.solve(expected.covariance[np.ix_(k, k)], expected.covariance[k, -1])
    shared = expected.covariance[-1, -1] - gain @ expected.covariance[k, -1]
    own = expected.own[-1, -1] - 2 * gain @ expected.own[k, -1] + gain @ expected.own[np.ix_(k, k)] @ gain
    final = expected.loss[-1] + expected.reducible[-1] * (gain @ residual)
    return float(final), *(float(expected.reducible[-1] * np.sqrt(max(variance, 0))) for variance in (shared, own))


def band(mean, deviation, _):
    """The forecast of an end as it is recorded and shown: mean and 90% interval."""
    return {'forecast': mean, 'forecast_lo90': mean - 1.645 * deviation, 'forecast_hi90': mean + 1.645 * deviation}


# ---- a run that grows ----------------------------------------------------------------------------------------------


def read_run(source):
    """Rows of one run so far: a run folder, a file that figures/ reads, or a W&B run entity/project/id."""
    if Path(source).exists():
        table = logs.load(source)
    elif len(str(source).split('/')) == 3:
        import save_logs
        table = logs.tidy(save_logs.one_from_wandb(str(source)))
    else:
        raise LogError(f'{source}: neither a folder or file here nor a W&B run (entity/project/id)')
    names = table['run'].unique()
    if len(names) > 1:
        raise LogError(f'{source} holds {len(names)} runs ({", ".join(map(str, names[:3]))} …); name one of them')
    return table


def horizon(table):
    """FLOPs at the end of the run, as its configuration has it."""
    last = table.iloc[-1]
    for column, factor in (('opt_compute', 1.0), ('T', 6 * last.get('num_params', np.nan))):
        if np.isfinite(last.get(column, np.nan)):
            return float(last[column] * factor)
    raise LogError('the run does not say how long it will be: neither opt_compute nor T; give --horizon TOKENS')


def differences(table, ladder_table, compute, expected):
    """What in the run's configuration departs from its ladder's, in words."""
    last, found = table.iloc[-1], []
    for column in HABITS:
        there = ladder_table[column].dropna().unique() if column in ladder_table else []
        here = last.get(column)
        if here is None or here != here or len(there) > 1:
            continue
        if column == 'match_mup_at_D' and not len(there):
            found.append(f'{column} is {here:g}, the ladder\'s log names none')
        elif len(there) and here != there[0]:
            found.append(f'{column} is {here}, the ladder\'s {there[0]}')
    ratio = compute / expected.compute
    if abs(np.log(ratio)) > 0.05:
        found.append(f'the horizon is {ratio:.3g} times what the ladder\'s rule gives this size')
    return found


def follow(log, p, compute):
    """look(rows) for a run with p parameters that ends at `compute` FLOPs, against the ladder in `log`: what train.py calls.

    rows are {'compute', 'test_loss'} so far; look returns the numbers to record when the last row has passed a point where
    residuals are judged, else {}.
    """
    expected = expect(ladder_field.gather(logs.clean(logs.load(log))[0]), p)

    def look(rows):
        x = np.array([row['compute'] for row in rows]) / compute
        loss = np.array([row['test_loss'] for row in rows])[x > 0]
        x = x[x > 0]
        passed = np.searchsorted(expected.x, x * (1 + 1e-9), 'right')
        if len(x) < 2 or passed[-1] == passed[-2]:
            return {}
        reading = read(expected, x, loss)
        return {'residual': float(reading.residual[-1]), 'p_value': float(reading.p_value[-1]), **band(*end(expected, x, loss))}
    return look


def analyse(table, ladder_table, tokens=None, alarm=None):
    """Everything about a run so far as a dict; `alarm` is the level of an alarm if it is known already."""
    logs.require(table, ['num_params', 'compute', 'test_loss'], 'watching a run')
    p = float(table['num_params'].iloc[-1])
    ladder = ladder_field.gather(ladder_table)
    expected = expect(ladder, p)
    alarm = level(ladder_table, ladder) if alarm is None else alarm
    compute = 6 * p * tokens if tokens else horizon(table)
    own = table[(table['compute'] > 0) & np.isfinite(table['test_loss'])]
    x, loss = (own['compute'] / compute).to_numpy(), own['test_loss'].to_numpy()
    if len(x) < 2 or x[-1] < expected.x[0]:
        return {'x': [], 'now': float(x[-1]) if len(x) else 0.0, 'alarm': None, 'expected': expected}
    reading = read(expected, x, loss, alarm)
    k = np.searchsorted(expected.x, reading.x)
    return {'x': reading.x, 'residual': reading.residual, 'lo90': expected.lo90[k], 'hi90': expected.hi90[k],
            'p_value': reading.p_value, 'level': alarm, 'alarm': reading.alarm, 'looks_like': reading.looks_like[:3],
            'differences': differences(table, ladder_table, compute, expected), 'now': float(min(x[-1], 1)),
            'loss': float(loss[-1]), **band(*end(expected, x, loss)), 'expected': expected}


# ---- how well it works ---------------------------------------------------------------------------------------------


def readings(table, ladder):
    """The Reading of every finished run of a table against a ladder; a run that is in the ladder is taken out of it first.

    The scales are sampled once, from the whole ladder: one run more or less hardly moves them, and it is most of the time (half of
    the sample will do). A run without which fewer than three models are left has no Reading.
    """
    found, expected, ends = [], {}, scaling_law.horizon_of(table)
    scales = ladder_field.sample(ladder_field.field(ladder, ladder.compute[-1:]), np.random.default_rng(0))[::2]
    for run, rows in table[table['compute'] > 0].groupby('run', sort=False):
        p = rows['num_params'].iloc[0]
        among = next(iter(np.flatnonzero(ladder.p == p)), None)
        end = min(ends[run], rows['compute'].iloc[-1])   # runs at a constant rate go on after C*
        last = scaling_law.loss_at(rows, end)
        twin = among is not None and np.isclose(ladder.losses[among][:, -1], last, rtol=1e-9, atol=0)
        key, rest = (run, without(ladder, among, twin)) if np.any(twin) else (p, ladder)
        if len(rest.p) < 3:
            continue
        if key not in expected:
            expected[key] = expect(rest, p, scales=scales)
        found.append(read(expected[key], (rows['compute'] / end).to_numpy(), rows['test_loss'].to_numpy()))
    return found


def without(ladder, model, runs):
    """The ladder without these runs [seeds] of one of its models, or without the model if none is left.

    Ladder.mean, which only leads between the knots, keeps them.
    """
    rest = ladder.losses[model][~runs]
    if not len(rest):
        return ladder_field.choose(ladder, np.arange(len(ladder.p)) != model)
    return ladder._replace(losses=[*ladder.losses[:model], rest, *ladder.losses[model + 1:]])


def lowest(reading, by=1.0):
    """The least p_value that two points in a row up to x = by held, 1 if there are no two."""
    low = reading.p_value[reading.x <= by + 1e-9]
    return float(np.maximum(low[1:], low[:-1]).min(initial=1.0))


def first_alarm(reading, by=1.0, level=ALARM):
    """x at which whoever watched the run up to `by` was first alarmed (two points in a row), or NaN."""
    low = (reading.p_value < level) & (reading.x <= by + 1e-9)
    twice = np.flatnonzero(low[1:] & low[:-1])
    return float(reading.x[twice[0] + 1]) if len(twice) else np.nan


def level(table, ladder):
    """The p_value below which to alarm: at most FALSE of healthy runs like the ladder's own fall there.

    Each of the ladder's n runs is held against the others; for the k-th smallest of n lowest p_values, a further healthy run is
    below it with probability k/(n + 1), whatever their distribution (conformal prediction; Vovk et al. 2005). ALARM if n < 19.
    """
    enough = FALSE * (table['run'].nunique() + 1) >= 1
    found = sorted(lowest(one) for one in readings(table, ladder)) if enough else []
    k = int(FALSE * (len(found) + 1))
    return min(FALSE, found[k - 1]) if k else ALARM


def caught(ladder_log, faults):
    """The share of runs alarmed, healthy ones first; faults {name: (log, 'COLUMN=VALUE' or None)}, sizes as in the ladder.

    The healthy runs are those that set the alarm's level, so that theirs is no more than FALSE by construction.
    """
    healthy = logs.clean(logs.load(ladder_log))[0]
    ladder, rows = ladder_field.gather(healthy), []
    alarm = level(healthy, ladder)
    for name, (log, condition) in {'healthy': (ladder_log, None), **faults}.items():
        table = logs.load(log)
        table = logs.clean(logs.where(table, condition) if condition else table)[0]
        table = table[table['num_params'].isin(ladder.p)]
        if 'match_mup_at_D' in table:  # the width whose multipliers are kept is as in the ladder
            table = table[table['match_mup_at_D'] != table['D']]
        found = readings(table, ladder)
        early, ever = (np.array([first_alarm(one, by, alarm) for one in found]) for by in (0.3, 1.0))
        likely = [one.looks_like[0][0] for one in found]
        rows.append({'runs': name, 'count': len(found), 'by 0.3': float(np.isfinite(early).mean()),
                     'by the end': float(np.isfinite(ever).mean()),
                     'median x': float(np.nanmedian(ever)) if np.isfinite(ever).any() else np.nan,
                     'looks like': max(set(likely), key=likely.count)})
    return rows
