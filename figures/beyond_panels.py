"""Figures of what is not in the paper: a forecast, a monitored run, schedule laws."""

import numpy as np
from matplotlib import pyplot as plt

from analysis import collapse as collapsing
from analysis import scaling_law
from analysis.beyond import schedule_laws as laws
from analysis.columns import PETA
from figures import style


def schedule_laws(curves, fits, fitted, most=6):
    """Figure of at most `most` unseen curves: above, measured and predicted by two fitted laws; below, the errors and the rate."""
    unseen = [name for name in curves if name not in fitted][:most]
    figure, axes = plt.subplots(2, len(unseen), figsize=(2.6 * len(unseen), 4.6), squeeze=False, height_ratios=(3, 2),
                                sharex='col')
    lines = [(style.BLUE, '-'), (style.RED, '--')]
    errors = {name: [laws.predict(fit, curves[name]) - curves[name].loss for fit in fits] for name in unseen}
    reach = max(np.quantile(np.abs(values), 0.98) for values in errors.values())
    for upper, lower, name in zip(*axes, unseen, strict=True):
        one = curves[name]
        upper.plot(one.step / 1e3, one.loss, color='black', lw=2.2, alpha=0.3, label='measured')
        for fit, miss, (colour, line) in zip(fits, errors[name], lines, strict=True):
            upper.plot(one.step / 1e3, one.loss + miss, line, color=colour, lw=1, label=fit.law.name)
            lower.plot(one.step / 1e3, miss, line, color=colour, lw=1, label=f'MAE {np.abs(miss).mean():.2g}')
        late = one.step > one.step[0] + 0.05 * np.ptp(one.step)
        lowest, highest = np.min([one.loss + miss for miss in (0, *errors[name])]), one.loss[late].max()
        upper.set_ylim(lowest - 0.05 * (highest - lowest), highest)
        height = (0.6 * one.lr / one.lr.max() - 1.3) * reach
        lower.fill_between(one.step / 1e3, -1.3 * reach, height, color=style.GREY, alpha=0.25, lw=0)
        lower.set(xlabel='step (thousands)', ylim=(-1.3 * reach, 1.3 * reach))
        lower.legend(fontsize=6.5, loc='upper right')
        upper.set_title(name)
    axes[0, 0].set_ylabel('loss')
    axes[1, 0].set_ylabel('predicted − measured\n(grey: learning rate)')
    axes[0, 0].legend(fontsize=6.5)
    return figure


def forecast(table, result):
    """Figure of a forecast: the ladder and the forecast curve; its bands and the measured curve relative to it; larger budgets."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10, 3.3))
    curves, horizon, x = collapsing.curves(table), scaling_law.horizon_of(table), result['x']
    ladder = curves.p <= result['ladder'][-1] * 1.001
    for m, colour in enumerate(style.colours([*curves.p[ladder], result['num_params']])[:-1]):
        own = curves.model == m
        C = horizon[[run for run, there in zip(curves.run, own, strict=True) if there]].mean()
        left.plot(C * curves.x / PETA, curves.loss[own].mean(0), color=colour, lw=1)
    left.plot(result['compute'] * x / PETA, result['mean'], color=style.BLUE,
              label=f'forecast, p = {style.count(result["num_params"])}')
    left.set(xscale='log', yscale='log', xlabel='compute C (PFLOPs)', ylabel='test loss',
             title=f'{ladder.sum()} smaller models; {result["times_compute"]:.3g} times the compute')
    left.set_ylim(result['mean'].min() * 0.97, curves.loss[:, curves.x >= 0.05].max())
    style.plain_log(left.yaxis)

    def relative(loss):
        return 100 * (loss - result['mean']) / (result['mean'] - result['L0'])
    for name, alpha in (('90', 0.18), ('50', 0.3)):
        middle.fill_between(x, relative(result[f'lo{name}']), relative(result[f'hi{name}']), color=style.BLUE, alpha=alpha, lw=0,
                            label=f'{name}%')
    middle.plot(x, 0 * x, color=style.BLUE)
    if result['baselines']:
        middle.plot(x, relative(result['baselines']['power law']['curve']), ':', color=style.RED, label='power law × mean ℓ')
    if result['truth'] is not None:
        left.plot(result['compute'] * x / PETA, result['truth'], '--', color='black', lw=0.9, label='measured (seed mean)')
        middle.plot(x, relative(result['truth']), '--', color='black', lw=0.9, label='measured (seed mean)')
    middle.set(xlabel='x = C/C*', ylabel='% of the reducible loss', xlim=(0, 1), title='relative to the forecast')
    rows = result['budgets']
    C = np.array([row['compute'] for row in rows]) / PETA
    for name, alpha in (('90', 0.18), ('50', 0.3)):
        right.fill_between(C, [row[f'lo{name}'] for row in rows], [row[f'hi{name}'] for row in rows], color=style.BLUE,
                           alpha=alpha, lw=0, label=f'{name}%')
    right.plot(C, [row['mean'] for row in rows], 'o-', ms=3, color=style.BLUE, label='final loss')
    right.set(xscale='log', yscale='log', xlabel='compute C (PFLOPs)', title='final loss of larger models')
    style.plain_log(right.yaxis)
    for axis in (left, middle, right):
        axis.legend(fontsize=7)
    return figure


def watch(result):
    """Figure of a run so far beside its ladder's forecast: the loss, and the collapse residual, each with its 90% band."""
    expected, x = result['expected'], result['x']
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.5))
    band = [expected.loss + edge * expected.reducible for edge in (expected.lo90, expected.hi90)]
    left.fill_between(expected.x, *band, color=style.BLUE, alpha=0.2, lw=0, label='forecast from the ladder, 90%')
    left.plot(expected.x, expected.loss, color=style.BLUE)
    k = np.searchsorted(expected.x, x)
    left.plot(x, expected.loss[k] + result['residual'] * expected.reducible[k], color='black', label='this run')
    left.errorbar([1], [result['forecast']], yerr=result['forecast_hi90'] - result['forecast'], fmt='o', ms=4, color=style.RED,
                  capsize=3, label=f'forecast of its end at x = {result["now"]:.2f} (90%)')
    left.set(yscale='log', xlabel='normalised compute x = C/C*', ylabel='test loss')
    style.plain_log(left.yaxis)
    left.legend()
    right.fill_between(expected.x, 100 * expected.lo90, 100 * expected.hi90, color=style.BLUE, alpha=0.2, lw=0, label='90% band')
    right.axhline(0, color=style.BLUE, lw=0.8)
    right.plot(x, 100 * result['residual'], '.-', ms=4, color='black', label='collapse residual')
    title = 'on track'
    if np.isfinite(result['alarm']):
        right.axvline(result['alarm'], color=style.RED, lw=1)
        title = f'off its ladder from x = {result["alarm"]:.2g}'
    right.set(xlabel='normalised compute x = C/C*', ylabel='% of the reducible loss', title=title, xlim=(0, 1))
    right.legend()
    return figure
