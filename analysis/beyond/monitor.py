"""A run compared with its ladder of smaller models while it trains: collapse residual, p-value, alarm and updated forecast.

The ladder's forecast of the run's curve is L̂(x). The collapse residual is (L(x) - L̂(x)) / (L̂(x) - L0). Its covariance over x is
that of the forecast, so the p-value of all residuals so far combines two tests: one of their common height, one of their shape. A
residual that stays inside a wide band but has the wrong shape is detected, too. Two low p-values in a row raise the alarm.
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
    freedom: int            # degrees of freedom of the noise estimate: differences between runs


class Reading(NamedTuple):
    """A run so far, at the k knots that it has passed, and the forecast of its final loss from that part."""
    x: np.ndarray
    residual: np.ndarray
    p_value: np.ndarray     # [k] probability that the residuals of a healthy run up to x deviate this much
    alarm: float            # x from which the p-value stayed below the alarm level, NaN if it did not
    forecast: float         # median
    forecast_lo90: float
    forecast_hi90: float


def expect(ladder, p, scales=None):
    """Expected curve of one run with p parameters. The ladder may, but need not, hold runs of that size.

    scales: see ladder_field.posterior_curves.
    """
    draws = ladder_field.posterior_curves(ladder, [forecast.optimal_compute(ladder, p)], scales=scales)
    loss = np.stack([np.interp(np.log(ladder.x), np.log(ladder.grid), one) for one in draws.loss[:, 0]])
    median = np.median(loss, 0)
    reducible = median - np.median(draws.L0)
    residual = (loss - median) / reducible
    low, high = np.quantile(residual, [0.05, 0.95], axis=0)
    freedom = max(len(ladder.p), sum(len(L) - 1 for L in ladder.losses))
    return Expected(ladder.x, median, reducible, low, high, np.cov(residual.T), freedom)


def read(expected, x, loss, alarm_level=DEFAULT_ALARM_LEVEL):
    """Reading of a run from its evaluations loss [n] at x [n], increasing shares of its horizon.

    The noise is estimated from `freedom` differences between runs, so both tests are F tests and not χ² tests. The forecast is the
    final residual conditional on those observed; the run does not update the scales of the ladder's model.
    """
    k = np.flatnonzero((expected.x >= x[0]) & (expected.x <= x[-1] * (1 + 1e-9)))
    at_knots = np.exp(np.interp(np.log(expected.x[k]), np.log(x), np.log(loss)))
    residual = (at_knots - expected.loss[k]) / expected.reducible[k]
    covariance, with_final = expected.covariance[np.ix_(k, k)], expected.covariance[k, -1]

    whitened, level = np.linalg.solve(np.linalg.cholesky(covariance), np.stack([residual, np.ones(len(k))], -1)).T
    count = np.arange(1, len(k) + 1)
    shape = fdtrc(count, expected.freedom, np.cumsum(whitened ** 2) / count)
    height = fdtrc(1, expected.freedom, np.cumsum(whitened * level) ** 2 / np.cumsum(level ** 2))
    p_value = np.minimum(1, 2 * np.minimum(shape, height))   # Bonferroni, for two tests
    low_to_the_end = np.logical_and.accumulate((p_value < alarm_level)[::-1])[::-1]
    alarm = float(expected.x[k][np.argmax(low_to_the_end)]) if low_to_the_end.sum() > 1 else np.nan

    gain = np.linalg.solve(covariance, with_final)
    final = float(expected.loss[-1] + expected.reducible[-1] * (gain @ residual))
    variance = expected.covariance[-1, -1] - gain @ with_final
    half = NORMAL_90 * float(expected.reducible[-1] * np.sqrt(max(variance, 0)))
    return Reading(expected.x[k], residual, p_value, alarm, final, final - half, final + half)


def follow(ladder_log, p, compute):
    """Returns columns(rows) for a run with p parameters that ends at `compute` FLOPs, against the ladder in a log file.

    rows are the {'compute', 'test_loss'} so far. columns returns residual, p_value and forecast when the last row has passed a new
    knot, else {}.
    """
    expected = expect(ladder_field.read_ladder(logs.clean(logs.load(ladder_log))[0]), p)

    def columns(rows):
        x, loss = np.array([(row['compute'] / compute, row['test_loss']) for row in rows if row['compute'] > 0]).reshape(-1, 2).T
        knots_passed = np.searchsorted(expected.x, x * (1 + 1e-9), 'right')
        if len(x) < 2 or knots_passed[-1] == knots_passed[-2]:
            return {}
        reading = read(expected, x, loss)
        return {'residual': float(reading.residual[-1]), 'p_value': float(reading.p_value[-1]),
                **{name: value for name, value in reading._asdict().items() if name.startswith('forecast')}}
    return columns


def analyse(table, ladder_table, tokens=None, level=None):
    """The state of a run so far as a dict. tokens: its horizon, if it does not say. level: from `alarm_level`, if known.

    Raises LogError if the end of the run is not known.
    """
    logs.require(table, ['num_params', 'compute', 'test_loss'], 'watching a run')
    p = float(table['num_params'].iloc[-1])
    expected = expect(ladder_field.read_ladder(ladder_table), p)
    level = alarm_level(ladder_table) if level is None else level
    rows = table[(table['compute'] > 0) & np.isfinite(table['test_loss'])]
    end = table.reindex(columns=['opt_compute', 'T']).iloc[-1].astype(float)
    horizon = 6 * p * tokens if tokens else end.fillna({'opt_compute': 6 * p * end['T']})['opt_compute']
    if not np.isfinite(horizon):
        raise LogError('the run has neither opt_compute nor T, so its end is unknown; give --horizon TOKENS')
    x = (rows['compute'] / horizon).to_numpy()
    if len(x) < 2 or x[-1] < expected.x[0]:
        return {'x': [], 'now': float(x[-1]) if len(x) else 0.0, 'alarm': None, 'expected': expected}
    reading = read(expected, x, rows['test_loss'].to_numpy(), level)
    k = np.searchsorted(expected.x, reading.x)
    return reading._asdict() | {'lo90': expected.lo90[k], 'hi90': expected.hi90[k], 'level': level, 'now': float(min(x[-1], 1)),
                                'loss': float(rows['test_loss'].iloc[-1]), 'expected': expected}


def read_finished(table, ladder_table):
    """Readings of every finished run of a table against a ladder. A run that is in the ladder is first taken out of it.

    The scales are sampled once, from the whole ladder: leaving out one run hardly changes them, and sampling is the slow part. Half
    of the sample suffices. A run is skipped if fewer than three models are left without it.
    """
    ladder, readings, horizons = ladder_field.read_ladder(ladder_table), [], scaling_law.horizon_of(table)
    field = ladder_field.build_field(ladder, ladder.compute[-1:])
    scales = ladder_field.sample_scales(field, np.random.default_rng(0))[::2]
    for run, rows in table[table['compute'] > 0].groupby('run', sort=False):
        others = ladder_table[ladder_table['run'] != run]
        if others['num_params'].nunique() < 3:
            continue
        expected = expect(ladder_field.read_ladder(others), rows['num_params'].iloc[0], scales)
        end = min(horizons[run], rows['compute'].iloc[-1])   # runs at a constant rate go on after C*
        readings.append(read(expected, (rows['compute'] / end).to_numpy(), rows['test_loss'].to_numpy()))
    return readings


def alarm_level(table):
    """The p-value below which to alarm, so that at most FALSE_ALARM_RATE of the healthy runs of a ladder do.

    Each of the ladder's n runs is compared with the others. A further healthy run falls below the k-th smallest of their lowest
    p-values with probability k/(n + 1), whatever the distribution (conformal prediction; Vovk et al. 2005). With fewer than 19 runs
    that gives no level, and it is DEFAULT_ALARM_LEVEL. As an alarm needs two low p-values in a row, the larger of each two counts.
    """
    k = int(FALSE_ALARM_RATE * (table['run'].nunique() + 1))
    if not k:
        return DEFAULT_ALARM_LEVEL
    p_values = [one.p_value for one in read_finished(table, table)]
    lowest = sorted(float(np.maximum(one[1:], one[:-1]).min(initial=1)) for one in p_values)
    return min(FALSE_ALARM_RATE, lowest[k - 1])
