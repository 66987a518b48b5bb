"""Figures of the paper's analysis. Each public function draws one result of analysis/ and returns the Matplotlib figure."""

import numpy as np
from matplotlib import pyplot as plt

from analysis import collapse as collapsing
from analysis import horizon as horizons
from analysis import power_laws
from analysis import reproduced as reproducing
from analysis import schedules as scheduling
from analysis.columns import PETA
from figures import style
from figures.tables import onset_text

SEED_BAND = (5, 95)  # percentiles of the band over seeds; with five seeds this is close to their full range
NORMALISED_COMPUTE = 'normalised compute x = C/C*'
LOSS_OF_COMPUTE = {'xscale': 'log', 'yscale': 'log', 'xlabel': 'compute C (PFLOPs)', 'ylabel': 'test loss'}


def _draw_law(axis, table, result):
    """Seed-mean loss curves, compute-optimal points and the fitted law L0 + a·C^(-b) (fig. 1a)."""
    fit, C, curves = result['fit'], result['compute'] / PETA, collapsing.curves(table, np.geomspace(1e-3, 1, 200))
    for i, colour in enumerate(style.colours(curves.p)):
        axis.plot(C[i] * curves.x, curves.loss[curves.model == i].mean(0), color=colour, lw=1)
    axis.plot(C, result['final_loss'], 'o', ms=4, color='black', zorder=5, label='horizon C*')
    if np.isfinite(fit['b']):
        C = np.geomspace(C.min() / 3, C.max() * 3)
        axis.plot(C, fit['L0'] + fit['a'] * C ** -fit['b'], '--', color='black', lw=1,
                  label=rf'${fit["L0"]:.3g} + {fit["a"]:.3g}\,C^{{-{fit["b"]:.3f}}}$')
    axis.set(**LOSS_OF_COMPUTE, title='scaling law')
    style.plain_log(axis.yaxis)
    axis.legend(loc='lower left', fontsize=7)


def _draw_collapse(axis, curves, L0):
    """Normalised loss curves by model, with a band for the seeds (figs. 1b, 3 left)."""
    ell, band = collapsing.normalise(curves, L0), None
    for i, colour in enumerate(style.colours(curves.p)):
        own = ell[curves.model == i]
        axis.plot(curves.x, own.mean(0), color=colour, lw=1)
        if len(own) > 1:
            band = axis.fill_between(curves.x, *np.percentile(own, SEED_BAND, axis=0), color=colour, alpha=0.25, lw=0)
    top = ell[:, curves.x >= 0.1].max()
    axis.set(xlabel=NORMALISED_COMPUTE, ylabel=r'normalised loss $\ell$', xlim=(0, 1), ylim=(1 - 0.04 * (top - 1), top))
    if band:
        axis.legend([band], [f'{SEED_BAND[0]}-{SEED_BAND[1]}% of the seeds'])


def _draw_deviations(axis, x, lines, title):
    """Relative deviations against x. `lines` is a list of (label, values [K], line style, colour); NaN values are left out."""
    for label, values, line, colour in lines:
        if np.isfinite(values).any():
            axis.plot(x[:-1], values[:-1], line, color=colour, label=label)  # Δ is 0 at x = 1
    lowest = np.nanmin([values[(x > 0.1) & (x < 0.95)] for _, values, _, _ in lines])
    axis.set(xlabel=NORMALISED_COMPUTE, ylabel='relative deviation', xlim=(0, 1), yscale='log', title=title)
    axis.set_ylim(bottom=0.15 * lowest)
    axis.legend(loc='lower left', fontsize=7, ncols=2, columnspacing=1, handlelength=1.6)


def _draw_tolerance(axis, result):
    """Collapse tolerance Δ and noise floor σ, with 90% bands over resampled seeds and L0 (figs. 1c, 3 right)."""
    lines = [(r'tolerance $\Delta$', result['delta'], '-', style.BLUE)]
    title = rf'$\Delta$(0.5) = {result["delta"][np.argmin(np.abs(result["x"] - 0.5))]:.4f}'
    if np.isfinite(result['sigma']).any():
        lines += [('within models', result['within'], ':', style.BLUE), ('between models', result['between'], '--', style.BLUE),
                  (r'noise floor $\sigma$', result['sigma'], '-', style.RED)]
        onset, ci = result['supercollapse_from'], result['supercollapse_from_ci']
        title = rf'$\Delta < \sigma$ from x = {onset_text(onset, ci)}' + (' (90%)' if ci else '')
        axis.axvline(onset, color=style.GREY, lw=0.8)
    for band, colour in ((result['delta_ci'], style.BLUE), (result['sigma_ci'], style.RED)):
        if band is not None:
            axis.fill_between(result['x'][:-1], *np.array(band)[:, :-1], color=colour, alpha=0.18, lw=0)
    _draw_deviations(axis, result['x'], lines, title)


def _draw_L0_choices(axis, curves, choices):
    """Spread of the drop against L0, with the values of L0 that are compared and their 90% intervals."""
    floors = np.linspace(0, 0.98 * curves.loss[:, -1].min(), 200)
    axis.plot(floors, 100 * collapsing.drop_spread(curves, floors), color='black', lw=1)
    axis.axhline(100 * collapsing.TIGHT, color=style.GREY, lw=0.8, ls=':', label=f'a collapse has at most {collapsing.TIGHT:.0%}')
    for one, colour, marker in zip(choices[:3], (style.GREY, style.BLUE, style.RED), 'soD', strict=False):  # zero, law, best
        axis.plot(one['L0_ci'] or [one['L0']] * 2, [100 * one['drop_spread']] * 2, '|-', color=colour)
        label = f'{one["name"]}: Δ(0.5) = {one["delta"]:.4f}'
        axis.plot(one['L0'], 100 * one['drop_spread'], marker, ms=5, color=colour, label=label)
    axis.set(xlabel='subtracted $L_0$ (90% intervals)', ylabel='spread of the drop (%)', yscale='log', title='which $L_0$?')
    style.plain_log(axis.yaxis, (1, 2, 5))
    axis.legend(fontsize=6.5)


def collapse(results):
    """Figs. 1a-c and the choice of L0, one ladder {name: (table, result)} a row, under its name and verdict."""
    figure = plt.figure(figsize=(12.6, 3.2 * len(results)))
    for part, (name, (table, result)) in zip(np.ravel(figure.subfigures(len(results), 1)), results.items(), strict=True):
        axes, curves = part.subplots(1, 4), collapsing.curves(table)
        _draw_law(axes[0], table, result)
        _draw_collapse(axes[1], curves, result['fit']['L0'])
        axes[1].set_title(f'normalised with $L_0$ = {result["fit"]["L0"]:.3g}')
        _draw_tolerance(axes[2], result)
        _draw_L0_choices(axes[3], curves, result['L0_choices'])
        style.parameter_bar(axes, curves.p)
        part.suptitle((f'{name} – ' if name else '') + collapsing.verdict_in_words(result), fontsize=10, fontweight='bold')
    return figure


def wrong_floor(curves, L0):
    """Collapse with other values than L0 subtracted: none, half, L0 and halfway to the smallest final loss (fig. 2)."""
    halfway = L0 + 0.5 * (curves.loss[:, -1].min() - L0)
    floors = {0.0: 'none', L0 / 2: 'half of $L_0$', L0: '$L_0$', halfway: 'too much'}  # with L0 = 0 the first three are one
    figure, axes = plt.subplots(1, len(floors), figsize=(3 * len(floors), 2.9))
    for axis, (floor, name) in zip(axes, floors.items(), strict=True):
        _draw_collapse(axis, curves, floor)
        delta = collapsing.spread(curves, floor).delta[np.argmin(np.abs(curves.x - 0.5))]
        axis.set_title(f'subtracted: {name} ({floor:.3g})\nΔ(0.5) = {delta:.4f}')
    style.parameter_bar(axes, curves.p)
    return figure


def quality(cases):
    """Measured Δ, the shape k·√(η(1-τ̂)) of eq. 24, and Δ with the expected final loss (figs. 1f, 8).

    `cases` is {title: (curves, result)}, one column each. k is fitted to the part of Δ within models, which eq. 24 describes.
    """
    figure, axes = plt.subplots(1, len(cases), figsize=(4.6 * len(cases), 3.5), squeeze=False)
    for axis, (title, (curves, result)) in zip(axes[0], cases.items(), strict=True):
        predicted, k = collapsing.predicted_quality(curves, result['within'])
        _draw_deviations(axis, curves.x, [
            (r'$\Delta$, own final loss', result['delta'], '-', style.BLUE),
            ('its part within models', result['within'], ':', style.BLUE),
            (rf'{k:.2g}·$\sqrt{{\eta(1-\hat\tau)}}$ (eq. 24)', predicted, '--', 'black'),
            (r'$\Delta$, expected final loss', result['delta_expected_final'], '-', style.ORANGE),
            (r'$\sigma$', result['sigma'], '-.', style.RED)], title)
    return figure


def horizon(curves, result):
    """Constant-rate curves with their frontier and each model's C*, and C* against p with the paper's own kind of fit (fig. 10)."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.7))
    C, found = curves.compute / PETA, result.compute / PETA
    for p, loss, colour in zip(curves.p, curves.mean, style.colours(curves.p), strict=True):
        left.plot(C, loss, color=colour, lw=1)
        for own in found[result.p == p]:
            left.plot(own, np.interp(own, C[np.isfinite(loss)], loss[np.isfinite(loss)]), 'o', ms=4, color=colour)
    frontier, _ = horizons.envelope(curves)
    left.plot(C, frontier, color='black', lw=2.2, alpha=0.35, label='compute-optimal frontier')
    start = found.min() / 30
    shown = frontier[np.isfinite(frontier) & (C > start)]
    left.set(**LOSS_OF_COMPUTE, title='constant learning rate, seed means', xlim=(start, C[-1]),
             ylim=(shown.min() * 0.95, shown.max() * 1.5))
    style.plain_log(left.yaxis)
    ends, steps, ci = curves.p[[0, -1]], result.staircase, result.exponent_ci
    right.plot(ends, horizons.optimal_compute(ends, result.scale, result.exponent) / PETA, color=style.BLUE,
               label=f'(p / {result.scale:.4g})$^{{{result.exponent:.3f}}}$')
    right.plot(result.p, found, 'o', ms=4, color=style.BLUE, label='models trained past C*')
    if steps:
        right.plot(ends, horizons.optimal_compute(ends, steps['scale'], steps['exponent']) / PETA, ':', color=style.RED,
                   label=f'staircase fit: (p / {steps["scale"]:.4g})$^{{{steps["exponent"]:.3f}}}$')
    right.set(xscale='log', yscale='log', xlabel='parameters p', ylabel='optimal compute C* (PFLOPs)',
              title=f'exponent 1+γ = {result.exponent:.3f}' + (f' (90%: {ci[0]:.3f} to {ci[1]:.3f})' if ci else ''))
    style.plain_log(right.xaxis, (1, 2, 5), style.count)
    for axis in (left, right):
        axis.legend()
    style.parameter_bar(left, curves.p)
    return figure


def joint(t, p, loss, fit):
    """Seed-mean constant-rate curves and the joint fit L0 + A·t^(-µ) + B·p^(-ν) (fig. 5a)."""
    figure, axis = plt.subplots(figsize=(6, 3.8))
    models = np.unique(p)
    for one, colour in zip(models, style.colours(models), strict=True):
        own = p == one
        measured, = axis.plot(t[own], loss[own], color=colour)
        fitted, = axis.plot(t[own], fit.L0 + fit.A * t[own] ** -fit.mu + fit.B * one ** -fit.nu, '--', color='black', lw=0.8)
    axis.set(xscale='log', yscale='log', xlabel='tokens t', ylabel='test loss',
             title=rf'$L_0 + A\,t^{{-\mu}} + B\,p^{{-\nu}}$: $L_0$ = {fit.L0:.3g}, µ = {fit.mu:.3f}, ν = {fit.nu:.3f}; '
                   f'rms error {fit.error:.1%}')
    style.plain_log(axis.yaxis)
    axis.legend([measured, fitted], ['measured (seed mean)', 'joint fit'])
    style.parameter_bar(axis, models)
    return figure


def power_law_grid(alpha, beta):
    """Exact power laws: the law, then the normalised curves at 0.9γ*, γ* and 1.1γ*; two terms above, phase II below (fig. 5b)."""
    rows = {'two terms': (power_laws.TWO_TERMS, 1.0),
            f'phase II, α={alpha:g}, β={beta:g}': power_laws.phase_two(alpha, beta)}
    p, x = power_laws.MODELS, np.linspace(0.01, 1, 200)
    figure, axes = plt.subplots(2, 4, figsize=(10.5, 5.2))
    for axis in axes.flat:
        axis.set_prop_cycle(color=style.colours(p))
    for (left, *others), (name, (terms, gamma)) in zip(axes, rows.items(), strict=True):
        t = np.geomspace(1e-4, 1, 100)[:, None] * p ** gamma
        loss = power_laws.loss(terms, t, p)
        left.plot(6 * t * p, loss, lw=1)
        left.plot(6 * t[-1] * p, loss[-1], 'o', ms=3, color='black')
        left.set(xscale='log', yscale='log', xlabel='compute 6·t·p', ylabel=r'$L - L_0$', title=f'{name}: γ* = {gamma:.3f}')
        for axis, factor in zip(others, (0.9, 1.0, 1.1), strict=True):
            axis.plot(x, power_laws.normalised(terms, factor * gamma, p, x).T, lw=1)
            spread = power_laws.deviation(terms, factor * gamma)
            axis.set(xlabel='normalised compute x', ylabel=r'$\ell$', xlim=(0, 1), ylim=(0.9, 4),
                     title=f'γ = {factor:g}γ*: largest Δ ' + ('below 1e-14' if spread < 1e-14 else f'{spread:.2g}'))
    style.parameter_bar(axes, p)
    return figure


def schedules(aligned, alpha, across=None):
    """Observed and predicted loss, one schedule a panel (figs. 6, 12), or None if the log has nothing to compare `across`.

    The runs are those at the model p and horizon T with the most schedules. across='p' adds the other models at that horizon, and
    across='T' the other horizons of that model.
    """
    aligned = aligned.assign(predicted=scheduling.predict(aligned, alpha))
    found = aligned.drop_duplicates(['num_params', 'tokens_total', 'schedule', 'decay_frac'])
    p, T = found.groupby(['num_params', 'tokens_total']).size().idxmax()
    at_p, at_T, size = aligned['num_params'] == p, aligned['tokens_total'] == T, 'tokens_total' if across == 'T' else 'num_params'
    shown = aligned[at_T if across == 'p' else at_p if across == 'T' else at_p & at_T]
    if across:
        shown = shown[shown.groupby(['schedule', 'decay_frac'])[size].transform('nunique') > 1]
    if shown.empty:
        return None
    sizes, panels = sorted(shown[size].unique()), shown.groupby(['decay_frac', 'schedule'])
    colours = dict(zip(sizes, style.colours(sizes) if across else [style.BLUE], strict=True))
    columns = min(4, -(-len(panels) // 2))
    figure, axes = plt.subplots(-(-len(panels) // columns), columns, figsize=(9.5, 5.5), squeeze=False, sharex=True, sharey=True)
    for axis, ((decay, schedule), rows) in zip(axes.flat, sorted(panels, key=lambda panel: -panel[0][0]), strict=False):
        for value, same in rows.groupby(size):
            axis.plot(*_seed_mean(same, 'loss'), color=colours[value], lw=1.6,
                      label=f'observed, {across} = {style.count(value)}' if across else 'observed')
            axis.plot(*_seed_mean(same, 'predicted'), '--', color='black', lw=1, label='predicted' if value == sizes[-1] else None)
        if not across:
            axis.plot(*_seed_mean(rows, 'reference'), ':', color=style.GREY, label='constant rate at equal τ')
        first, error = rows[rows['run'] == rows['run'].iloc[0]], scheduling.relative_errors(rows, alpha).mean()
        axis.fill_between(first['x'], 0, 0.15 * first['eta'], color=style.GREY, alpha=0.25, lw=0,
                          transform=axis.get_xaxis_transform(), label='learning rate')
        title = schedule if decay == 1 else f'{schedule}, last {decay:.0%}'
        axis.set(xlabel='share of training t/T', ylabel='test loss (smoothed)',
                 title=f'{title}: error {error:.1%}' if np.isfinite(error) else title)
        axis.label_outer()
    low, high = shown.loc[shown['x'] > 0.1, 'loss'].quantile((0, 0.97))
    axes[0, 0].set(xlim=(0, 1), xticks=(0.2, 0.4, 0.6, 0.8), ylim=(low - 0.3 * (high - low), high))  # the rate is below the losses
    for axis in axes.flat[len(panels):]:
        axis.set_axis_off()
    place = f'p = {style.count(p)}' * (across != 'p') + ', ' * (not across) + f'T = {style.count(T)} tokens' * (across != 'T')
    figure.suptitle(f'{place}; α = {alpha:.3f}\nerror: mean absolute error in the decay phase, relative to the drop it causes',
                    fontsize=9)
    handles = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc='outside lower center', ncols=len(handles))
    return figure


def _seed_mean(rows, column):
    """(x, mean over the runs of the smoothed column) on the evaluations of the first run."""
    runs = [own for _, own in rows.groupby('run', sort=False)]
    x = runs[0]['x'][runs[0]['x'] > 0.02]
    return x, np.mean([np.interp(x, own['x'], scheduling.smooth(own['x'], own[column])) for own in runs], 0)


def reproduced(table, same, L0):
    """A run and the published seeds of its model: losses, and relative distances from the published mean, raw and normalised."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9.8, 3.1))
    for log, colour in ((same, style.GREY), (table, style.RED)):
        for _, rows in log.groupby('run'):
            left.plot(rows['compute'] / PETA, rows['test_loss'], color=colour, lw=1)
    result = reproducing.compare(table, same, L0, reproducing.evaluations(table))
    left.set(**LOSS_OF_COMPUTE, title=f'p = {style.count(same["num_params"].iloc[0])}, final loss {result["loss"][-1]:.5f}:\n'
                                      f'{result["off"][-1]:+.1f} sd from the published mean')
    style.plain_log(left.yaxis)
    for axis, own, seeds, name in ((middle, result['loss'] / result['published'] - 1, result['each_seed'], 'loss'),
                                   (right, result['distance'], result['each_distance'], r'normalised loss $\ell$')):
        published = axis.plot(result['x'], 100 * seeds.T, color=style.GREY, lw=0.8)
        again, = axis.plot(result['x'], 100 * own, 'o-', ms=2.5, color=style.RED)
        axis.set(xlabel=NORMALISED_COMPUTE, ylabel='from the published mean (%)', title=name, xlim=(0, 1.01))
        axis.legend([published[0], again], ['published seeds', 'trained again'])
    return figure
