"""A run compared with its ladder of smaller models while it trains: collapse residual, p-value, alarm and updated forecast.

The ladder's forecast of the run's curve is L̂(x). The collapse residual is (L(x) - L̂(x)) / (L̂(x) - L0). Its covariance over x is
that of the forecast, so the p-value of all residuals so far combines two tests: one of their common height, one of their shape. A
residual that stays inside a wide band but has the wrong shape is found as well. Two low p-values in a row raise the alarm.
"""

from typing import NamedTuple

import numpy as np
from scipy.special import fdtrc

from analysis import scaling_law
from analysis import table as logs
from analysis.beyond import forecast, ladder_field
from analysis.table import LogError

FALSE_ALARM_RATE = 0.05      # share of healthy runs that may raise an alarm; the alarm level is at most this
DEFAULT_ALARM_LEVEL = 0.01   # p-value below which to alarm if the ladder has too few runs to calibrate the level
NORMAL_90 = 1.645            # half width of a normal distribution's 90% interval, in standard deviations


class Expected(NamedTuple):
    """The ladder's forecast of one run at the knots."""
    x: np.ndarray           # [K]
    loss: np.ndarray        # [K] median
    reducible: np.ndarray   # [K] its distance to L0
    lo90: np.ndarray        # [K] band of the residual
    hi90: np.ndarray
    covariance: np.ndarray  # [K, K] of the residual
    compute: float          # FLOPs at x = 1, from the ladder's rule
    freedom: int            # degrees of freedom of the noise estimate: differences between runs


class Reading(NamedTuple):
    """A run so far, at the k knots that it has passed."""
    x: np.ndarray
    residual: np.ndarray
    p_value: np.ndarray     # [k] probability that the residuals of a healthy run up to x deviate this much
    alarm: float            # x from which the p-value stayed below the alarm level, NaN if it did not


def expect(ladder, p, rng_seed=0, scales=None):
    """Expected curve of one run with p parameters. The ladder may, but need not, hold runs of that size.

    scales: see forecast.posterior_curves. Raises LogError for fewer than three models.
    """
    if len(ladder.p) < 3:
        raise LogError(f'{len(ladder.p)} models in the ladder; watching a run needs at least three')
    compute = float(forecast.optimal_compute(ladder, p))
    draws = forecast.posterior_curves(ladder, [compute], rng_seed=rng_seed, scales=scales)
    x = ladder.x
    loss = np.stack([np.interp(np.log(x), np.log(ladder.grid), one) for one in draws.loss[:, 0]])
    median = np.median(loss, 0)
    reducible = median - np.median(draws.L0)
    residual = (loss - median) / reducible
    low, high = np.quantile(residual, [0.05, 0.95], axis=0)
    freedom = max(len(ladder.p), sum(len(L) - 1 for L in ladder.losses))
    return Expected(x, median, reducible, low, high, np.cov(residual.T), compute, freedom)


def _residual(expected, x, loss):
    """(indices of the knots within the run, its residuals there) from evaluations at x [n], increasing."""
    k = np.flatnonzero((expected.x >= x[0]) & (expected.x <= x[-1] * (1 + 1e-9)))
    at_knots = np.exp(np.interp(np.log(expected.x[k]), np.log(x), np.log(loss)))
    return k, (at_knots - expected.loss[k]) / expected.reducible[k]


def read(expected, x, loss, alarm_level=DEFAULT_ALARM_LEVEL):
    """Reading of a run from its evaluations loss [n] at x [n], increasing shares of its horizon.

    The noise is estimated from `freedom` differences between runs, so both tests are F tests and not χ² tests.
    """
    k, residual = _residual(expected, x, loss)
    if not len(k):
        return Reading(expected.x[k], residual, residual, np.nan)
    factor = np.linalg.cholesky(expected.covariance[np.ix_(k, k)])
    whitened, level = np.linalg.solve(factor, np.stack([residual, np.ones(len(k))], -1)).T
    count = np.arange(1, len(k) + 1)
    shape = fdtrc(count, expected.freedom, np.cumsum(whitened ** 2) / count)
    height = fdtrc(1, expected.freedom, np.cumsum(whitened * level) ** 2 / np.cumsum(level ** 2))
    p_value = np.minimum(1, 2 * np.minimum(shape, height))   # Bonferroni, for two tests
    low_to_the_end = np.logical_and.accumulate((p_value < alarm_level)[::-1])[::-1]
    alarm = float(expected.x[k][np.argmax(low_to_the_end)]) if low_to_the_end.sum() > 1 else np.nan
    return Reading(expected.x[k], residual, p_value, alarm)


def forecast_end(expected, x, loss):
    """Forecast of the run's final loss from its evaluations so far: median and 90% interval, under the names in the record.

    It is the final residual conditional on those observed. The run does not update the scales of the ladder's model, as
    `forecast --seen` lets it do.
    """
    k, residual = _residual(expected, x, loss)
    gain = np.linalg.solve(expected.covariance[np.ix_(k, k)], expected.covariance[k, -1])
    final = float(expected.loss[-1] + expected.reducible[-1] * (gain @ residual))
    variance = expected.covariance[-1, -1] - gain @ expected.covariance[k, -1]
    half = NORMAL_90 * float(expected.reducible[-1] * np.sqrt(max(variance, 0)))
    return {'forecast': final, 'forecast_lo90': final - half, 'forecast_hi90': final + half}


# ---- a run that is still training ------------------------------------------------------------------------------------


def horizon_compute(table):
    """FLOPs at the end of the run, from its configuration. Raises LogError if that does not say."""
    last = table.iloc[-1]
    for column, factor in (('opt_compute', 1.0), ('T', 6 * last.get('num_params', np.nan))):
        if np.isfinite(last.get(column, np.nan)):
            return float(last[column] * factor)
    raise LogError('the run has neither opt_compute nor T, so its end is unknown; give --horizon TOKENS')


def follow(ladder_log, p, compute):
    """Returns look(rows) for a run with p parameters that ends at `compute` FLOPs, against the ladder in a log file.

    rows are the {'compute', 'test_loss'} so far. look returns residual, p_value and forecast when the last row has passed a new
    knot, else {}.
    """
    expected = expect(ladder_field.read_ladder(logs.clean(logs.load(ladder_log))[0]), p)

    def look(rows):
        x = np.array([row['compute'] for row in rows]) / compute
        loss = np.array([row['test_loss'] for row in rows])[x > 0]
        x = x[x > 0]
        knots_passed = np.searchsorted(expected.x, x * (1 + 1e-9), 'right')
        if len(x) < 2 or knots_passed[-1] == knots_passed[-2]:
            return {}
        reading = read(expected, x, loss)
        return {'residual': float(reading.residual[-1]), 'p_value': float(reading.p_value[-1]), **forecast_end(expected, x, loss)}
    return look


def analyse(table, ladder_table, tokens=None, level=None):
    """The state of a run so far as a dict. tokens: its horizon, if it does not say. level: from `alarm_level`, if known."""
    logs.require(table, ['num_params', 'compute', 'test_loss'], 'watching a run')
    p = float(table['num_params'].iloc[-1])
    ladder = ladder_field.read_ladder(ladder_table)
    expected = expect(ladder, p)
    level = alarm_level(ladder_table, ladder) if level is None else level
    compute = 6 * p * tokens if tokens else horizon_compute(table)
    rows = table[(table['compute'] > 0) & np.isfinite(table['test_loss'])]
    x, loss = (rows['compute'] / compute).to_numpy(), rows['test_loss'].to_numpy()
    if len(x) < 2 or x[-1] < expected.x[0]:
        return {'x': [], 'now': float(x[-1]) if len(x) else 0.0, 'alarm': None, 'expected': expected}
    reading = read(expected, x, loss, level)
    k = np.searchsorted(expected.x, reading.x)
    return {'x': reading.x, 'residual': reading.residual, 'lo90': expected.lo90[k], 'hi90': expected.hi90[k],
            'p_value': reading.p_value, 'level': level, 'alarm': reading.alarm, 'now': float(min(x[-1], 1)),
            'loss': float(loss[-1]), **forecast_end(expected, x, loss), 'expected': expected}


# ---- calibration and detection rates ---------------------------------------------------------------------------------


def read_finished(table, ladder):
    """Readings of every finished run of a table against a ladder. A run that is in the ladder is first taken out of it.

    The scales are sampled once, from the whole ladder: leaving out one run hardly changes them, and sampling is the slow part. Half
    of the sample suffices. A run is skipped if fewer than three models are left without it.
    """
    readings, expected, horizons = [], {}, scaling_law.horizon_of(table)
    field = ladder_field.build_field(ladder, ladder.compute[-1:])
    scales = ladder_field.sample_scales(field, np.random.default_rng(0))[::2]
    for run, rows in table[table['compute'] > 0].groupby('run', sort=False):
        p = rows['num_params'].iloc[0]
        end = min(horizons[run], rows['compute'].iloc[-1])   # runs at a constant rate go on after C*
        rest = without_run(ladder, p, scaling_law.loss_at(rows, end))
        if len(rest.p) < 3:
            continue
        key = p if rest is ladder else run
        if key not in expected:
            expected[key] = expect(rest, p, scales=scales)
        readings.append(read(expected[key], (rows['compute'] / end).to_numpy(), rows['test_loss'].to_numpy()))
    return readings


def without_run(ladder, p, final_loss):
    """The ladder without its run of p parameters that ends at final_loss; the same ladder if it has none.

    Ladder.mean keeps the run: it only guides the interpolation between knots.
    """
    model = next(iter(np.flatnonzero(ladder.p == p)), None)
    if model is None:
        return ladder
    same = np.isclose(ladder.losses[model][:, -1], final_loss, rtol=1e-9, atol=0)
    if not same.any():
        return ladder
    if same.all():
        return ladder_field.select(ladder, np.arange(len(ladder.p)) != model)
    losses = [*ladder.losses]
    losses[model] = losses[model][~same]
    return ladder._replace(losses=losses)


def _low_twice(reading):
    """[k - 1] the larger of each two p-values in a row: an alarm needs two."""
    return np.maximum(reading.p_value[1:], reading.p_value[:-1])


def first_alarm(reading, by=1.0, level=DEFAULT_ALARM_LEVEL):
    """x of the first alarm that somebody watching the run up to x = by would have seen, or NaN."""
    alarms = np.flatnonzero((_low_twice(reading) < level) & (reading.x[1:] <= by + 1e-9))
    return float(reading.x[alarms[0] + 1]) if len(alarms) else np.nan


def alarm_level(table, ladder):
    """The p-value below which to alarm, so that at most FALSE_ALARM_RATE of healthy runs do.

    Each of the ladder's n runs is compared with the others. A further healthy run falls below the k-th smallest of their lowest
    p-values with probability k/(n + 1), whatever the distribution (conformal prediction; Vovk et al. 2005). With fewer than 19 runs
    that gives no level, and it is DEFAULT_ALARM_LEVEL.
    """
    if FALSE_ALARM_RATE * (table['run'].nunique() + 1) < 1:
        return DEFAULT_ALARM_LEVEL
    lowest = sorted(float(_low_twice(one).min(initial=1.0)) for one in read_finished(table, ladder))
    k = int(FALSE_ALARM_RATE * (len(lowest) + 1))
    return min(FALSE_ALARM_RATE, lowest[k - 1]) if k else DEFAULT_ALARM_LEVEL


def detection_rates(ladder_table, faulty):
    """A dict a kind of fault: the share of runs alarmed by x = 0.3 and by the end. faulty is {fault: table}.

    Runs are counted if their size is in the ladder. The first dict is that of the ladder's healthy runs. They also set the alarm
    level, so theirs is at most FALSE_ALARM_RATE by construction.
    """
    ladder, rows = ladder_field.read_ladder(ladder_table), []
    level = alarm_level(ladder_table, ladder)
    for fault, table in {'none (healthy)': ladder_table, **faulty}.items():
        readings = read_finished(table[table['num_params'].isin(ladder.p)], ladder)
        early, ever = (np.array([first_alarm(one, by, level) for one in readings]) for by in (0.3, 1.0))
        rows.append({'fault': fault, 'runs': len(readings), 'by 0.3': float(np.isfinite(early).mean()),
                     'by the end': float(np.isfinite(ever).mean()),
                     'median x': float(np.nanmedian(ever)) if np.isfinite(ever).any() else np.nan})
    return rows
