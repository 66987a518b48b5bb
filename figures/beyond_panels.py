"""Figures of what is not in the paper: a forecast, a monitored run, schedule laws."""

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt

from analysis.beyond import ladder_field
from analysis.beyond import schedule_laws as laws
from analysis.columns import PETA
from figures import style


def schedule_laws(curves, fits, fitted):
    """Figure of at most six unseen curves: above, measured and predicted by two fitted laws; below, the errors and the rate."""
    unseen = [name for name in curves if name not in fitted][:6]
    figure, axes = plt.subplots(2, len(unseen), figsize=(2.6 * len(unseen), 4.6), squeeze=False, height_ratios=(3, 2),
                                sharex='col', sharey='row')
    errors = {name: [laws.predict(fit, curves[name]) - curves[name].loss for fit in fits] for name in unseen}
    reach = 1.3 * max(np.quantile(np.abs(values), 0.98) for values in errors.values())
    for upper, lower, name in zip(*axes, unseen, strict=True):
        one = curves[name]
        step = one.step / 1e3
        upper.plot(step, one.loss, color='black', lw=2.2, alpha=0.3, label='measured')
        for fit, miss, colour, line in zip(fits, errors[name], (style.BLUE, style.RED), ('-', '--'), strict=True):
            upper.plot(step, one.loss + miss, line, color=colour, lw=1, label=fit.law.name)
            lower.plot(step, miss, line, color=colour, lw=1, label=f'MAE {np.abs(miss).mean():.2g}')
        lower.fill_between(step, -reach, (one.lr / one.lr.max() / 2 - 1) * reach, color=style.GREY, alpha=0.25, lw=0)
        lower.set(xlabel='step (thousands)', ylim=(-reach, reach))
        lower.legend(fontsize=6.5, loc='upper right')
        upper.set_title(name)
    late = np.concatenate([curves[name].loss[len(curves[name].loss) // 20:] for name in unseen])
    axes[0, 0].set(ylabel='loss', ylim=(late.min() - reach, late.max()))
    axes[1, 0].set_ylabel('predicted − measured\n(grey: learning rate)')
    axes[0, 0].legend(fontsize=6.5)
    return figure


def forecast(table, result):
    """Figure of a forecast: the ladder and the forecast curve; its bands and the measured curve relative to it; larger budgets."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10, 3.3))
    ladder, x = ladder_field.read_ladder(table), result['x']
    ladder = ladder_field.select(ladder, np.isin(ladder.p, result['ladder']))
    for C, loss, colour in zip(ladder.compute, ladder.mean, style.colours([*ladder.p, result['num_params']]), strict=False):
        left.plot(C * ladder.grid / PETA, loss, color=colour, lw=1)
    left.plot(result['compute'] * x / PETA, result['mean'], color=style.BLUE,
              label=f'forecast, p = {style.count(result["num_params"])}')
    left.set(xscale='log', yscale='log', xlabel='compute C (PFLOPs)', ylabel='test loss',
             title=f'{len(ladder.p)} smaller models; {result["times_compute"]:.3g} times the compute')
    left.set_ylim(result['mean'].min() * 0.97, ladder.mean[:, ladder.grid >= 0.05].max())

    def relative(loss):
        return 100 * (loss - result['mean']) / (result['mean'] - result['L0'])

    _draw_bands(middle, x, {name: relative(result[name]) for name in ('mean', 'lo50', 'hi50', 'lo90', 'hi90')})
    if result['baselines']:
        middle.plot(x, relative(result['baselines']['power law']['curve']), ':', color=style.RED, label='power law × mean ℓ')
    if result['truth'] is not None:
        measured = {'ls': '--', 'color': 'black', 'lw': 0.9, 'label': 'measured (seed mean)'}
        left.plot(result['compute'] * x / PETA, result['truth'], **measured)
        middle.plot(x, relative(result['truth']), **measured)
    middle.set(xlabel='x = C/C*', ylabel='% of the reducible loss', xlim=(0, 1), title='relative to the forecast')

    budgets = pd.DataFrame(result['budgets'])
    _draw_bands(right, budgets['compute'] / PETA, budgets, marker='o', ms=3)
    right.set(xscale='log', yscale='log', xlabel='compute C (PFLOPs)', title='final loss of larger models')
    for axis in (left, middle, right):
        axis.legend(fontsize=7)
    for axis in (left, right):
        style.plain_log(axis.yaxis)
    return figure


def _draw_bands(axis, x, bands, **line):
    """The median of a forecast and its 50% and 90% intervals."""
    for level, alpha in (('90', 0.18), ('50', 0.3)):
        axis.fill_between(x, bands[f'lo{level}'], bands[f'hi{level}'], color=style.BLUE, alpha=alpha, lw=0, label=f'{level}%')
    axis.plot(x, bands['mean'], color=style.BLUE, label='median', **line)


def watch(result):
    """Figure of a run so far beside its ladder's forecast: the loss, and the collapse residual, each with its 90% band."""
    expected, off = result['expected'], np.isfinite(result['alarm'])
    residual = np.full(len(expected.x), np.nan)
    residual[np.searchsorted(expected.x, result['x'])] = result['residual']
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.5))
    for axis, zero, unit in ((left, expected.loss, expected.reducible), (right, 0 * expected.loss, 100)):
        axis.fill_between(expected.x, zero + unit * expected.lo90, zero + unit * expected.hi90, color=style.BLUE, alpha=0.2, lw=0,
                          label='forecast from the ladder, 90%')
        axis.plot(expected.x, zero, color=style.BLUE)
        axis.plot(expected.x, zero + unit * residual, '.-', ms=4, color='black', label='this run')
        axis.set_xlabel('normalised compute x = C/C*')
    left.errorbar([1], [result['forecast']], yerr=result['forecast_hi90'] - result['forecast'], fmt='o', ms=4, color=style.RED,
                  capsize=3, label=f'forecast of its end at x = {result["now"]:.2f} (90%)')
    left.set(yscale='log', ylabel='test loss')
    left.legend()
    style.plain_log(left.yaxis)
    if off:
        right.axvline(result['alarm'], color=style.RED, lw=1)
    right.set(ylabel='collapse residual\n(% of the reducible loss)',
              title=f'off its ladder from x = {result["alarm"]:.2g}' if off else 'on track')
    return figure
