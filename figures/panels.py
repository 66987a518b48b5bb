"""Figures of the paper's analysis. Each public function draws one result of analysis/ and returns the Matplotlib figure."""

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib import ticker

from analysis import collapse as collapsing
from analysis import horizon as horizons
from analysis import power_laws, scaling_law
from analysis import reproduced as reproducing
from analysis import schedules as scheduling
from analysis.columns import PETA
from figures import style

SEED_BAND = (5, 95)  # percentiles of the band over seeds; with five seeds this is close to their full range
NORMALISED_COMPUTE = 'normalised compute x = C/C*'


# ---- scaling law and collapse (figs. 1-4, 8) -------------------------------------------------------------------------


def _draw_law(axis, table, result):
    """Seed-mean loss curves, compute-optimal points and the fitted law L0 + a·C^(-b) (fig. 1a)."""
    fit, p = result['fit'], result['num_params']
    horizon = scaling_law.horizon_of(table)
    first = (table[table['compute'] > 0].groupby('run')['compute'].first() / horizon).max()
    curves = collapsing.curves(table, np.geomspace(1e-3, 1, 200) if first <= 1e-3 else collapsing.GRID)
    for i, colour in enumerate(style.colours(p)):
        axis.plot(result['compute'][i] * curves.x / PETA, curves.loss[curves.model == i].mean(0), color=colour, lw=1)
    axis.plot(result['compute'] / PETA, result['final_loss'], 'o', ms=4, color='black', zorder=5, label='horizon C*')
    if np.isfinite(fit['b']):
        C = np.geomspace(result['compute'].min() / 3, result['compute'].max() * 3, 100)
        axis.plot(C / PETA, scaling_law.predict(scaling_law.Law(fit['a'], fit['b'], fit['L0']), C), '--', color='black', lw=1,
                  label=rf'${fit["L0"]:.3g} + {fit["a"]:.3g}\,C^{{-{fit["b"]:.3f}}}$')
    axis.set(xscale='log', yscale='log', xlabel='compute C (PFLOPs)', ylabel='test loss', title='scaling law')
    least, early = result['final_loss'].min(), curves.loss[:, np.searchsorted(curves.x, max(0.01, 2 * curves.x[0]))].max()
    axis.set_ylim(least * (least / early) ** 0.35, early)  # room for the legend below the curves
    axis.set_xlim(result['compute'].min() / PETA * 5e-3, result['compute'].max() / PETA * 3)
    style.plain_log(axis.yaxis)
    axis.legend(loc='lower left', fontsize=7)


def _draw_collapse(axis, curves, L0):
    """Normalised loss curves by model, with a band for the seeds (figs. 1b, 3 left)."""
    ell = collapsing.normalise(curves, L0)
    labelled = False
    for i, colour in enumerate(style.colours(curves.p)):
        own = ell[curves.model == i]
        axis.plot(curves.x, own.mean(0), color=colour, lw=1)
        if len(own) > 1:
            axis.fill_between(curves.x, *np.percentile(own, SEED_BAND, axis=0), color=colour, alpha=0.25, lw=0,
                              label=None if labelled else f'{SEED_BAND[0]}-{SEED_BAND[1]}% of the seeds')
            labelled = True
    top = ell[:, np.argmin(np.abs(curves.x - 0.1))].max()
    axis.set(xlabel=NORMALISED_COMPUTE, ylabel=r'normalised loss $\ell$', xlim=(0, 1), ylim=(1 - 0.04 * (top - 1), top))
    if labelled:
        axis.legend()


def _draw_tolerance(axis, result):
    """Collapse tolerance Δ and noise floor σ, with 90% bands over resampled seeds and L0 (figs. 1c, 3 right)."""
    x, has_seeds = result['x'], np.isfinite(result['sigma']).any()
    axis.plot(x[:-1], result['delta'][:-1], color=style.BLUE, label=r'tolerance $\Delta$')
    if has_seeds:
        axis.plot(x[:-1], result['within'][:-1], ':', color=style.BLUE, lw=1, label='within models')
        axis.plot(x[:-1], result['between'][:-1], '--', color=style.BLUE, lw=1, label='between models')
        axis.plot(x, result['sigma'], color=style.RED, label=r'noise floor $\sigma$')
    for name, colour in (('delta_ci', style.BLUE), ('sigma_ci', style.RED)):
        if result[name] is not None:
            axis.fill_between(x[:-1], *np.array(result[name])[:, :-1], color=colour, alpha=0.18, lw=0)
    onset = result['supercollapse_from']
    if has_seeds:
        ci = [f'{value:.2f}' if np.isfinite(value) else 'never' for value in result['supercollapse_from_ci'] or ()]
        title = (f'from x = {onset:.2f}' if np.isfinite(onset) else 'never') + (f' (90%: {ci[0]} to {ci[1]})' if ci else '')
        title = r'$\Delta < \sigma$ ' + title
    else:
        title = rf'$\Delta$(0.5) = {result["delta"][np.argmin(np.abs(x - 0.5))]:.4f}, no $\sigma$ with one seed'
    if np.isfinite(onset):
        axis.axvline(onset, color=style.GREY, lw=0.8)
    axis.set(xlabel=NORMALISED_COMPUTE, ylabel='relative deviation', xlim=(0, 1), yscale='log', title=title)
    shown = np.concatenate([result['delta'][(x > 0.1) & (x < 0.985)], result['sigma'][np.isfinite(result['sigma'])]])
    axis.set_ylim(shown.min() * 0.15, shown.max() * 2)
    axis.legend(fontsize=7, loc='lower left', ncols=2 if has_seeds else 1, columnspacing=1, handlelength=1.6)


def _ladder_row(axes, table, result):
    """The three panels of one ladder: law, collapse, Δ and σ."""
    curves = collapsing.curves(table)
    _draw_law(axes[0], table, result)
    _draw_collapse(axes[1], curves, result['fit']['L0'])
    axes[1].set_title(f'normalised with $L_0$ = {result["fit"]["L0"]:.3g}')
    _draw_tolerance(axes[2], result)
    style.parameter_bar(list(axes), curves.p)


def collapse(table, result):
    """Figs. 1a-c of one ladder, under the verdict in words."""
    figure, axes = plt.subplots(1, 3, figsize=(9.8, 3.3))
    _ladder_row(axes, table, result)
    figure.suptitle(collapsing.verdict_in_words(result), fontsize=10, fontweight='bold')
    return figure


def ladders(results):
    """Figs. 1a-c of several ladders, one row each, each under its name and verdict. `results` is {name: (table, result)}."""
    figure = plt.figure(figsize=(9.8, 3.2 * len(results)))
    for part, (name, (table, result)) in zip(np.ravel(figure.subfigures(len(results), 1)), results.items(), strict=True):
        _ladder_row(part.subplots(1, 3), table, result)
        part.suptitle(f'{name} – {collapsing.verdict_in_words(result)}', fontsize=10, fontweight='bold')
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
        if axis is not axes[0]:
            axis.set_ylabel('')
            if axis.get_legend():
                axis.get_legend().remove()
    style.parameter_bar(axes, curves.p)
    return figure


def quality(cases):
    """Measured Δ, the shape k·√(η(1-τ̂)) of eq. 24, and Δ with the expected final loss (figs. 1f, 8).

    `cases` is {title: (curves, result)}, one column each. k is fitted to the part of Δ within models, which eq. 24 describes.
    """
    figure, axes = plt.subplots(1, len(cases), figsize=(4.6 * len(cases), 3.5), squeeze=False)
    for axis, (title, (curves, result)) in zip(axes[0], cases.items(), strict=True):
        x, inner = curves.x, slice(0, -1)
        predicted, k = collapsing.predicted_quality(curves, result['within'])
        axis.plot(x[inner], result['delta'][inner], color=style.BLUE, label=r'$\Delta$, own final loss')
        axis.plot(x[inner], result['within'][inner], ':', color=style.BLUE, label='its part within models')
        axis.plot(x[inner], predicted[inner], '--', color='black', label=rf'{k:.2g}·$\sqrt{{\eta(1-\hat\tau)}}$ (eq. 24)')
        axis.plot(x, result['delta_expected_final'], color=style.ORANGE, label=r'$\Delta$, expected final loss')
        if np.isfinite(result['sigma']).any():
            axis.plot(x, result['sigma'], '-.', color=style.RED, label=r'$\sigma$')
        axis.set(xlabel=NORMALISED_COMPUTE, ylabel='relative deviation', yscale='log', title=title, xlim=(0, 1))
        shown = np.concatenate([result['within'][(x > 0.1) & (x < 0.96)], result['delta_expected_final']])
        axis.set_ylim(shown[shown > 0].min() * 0.12, shown.max() * 2)
        axis.legend(fontsize=7, loc='lower left')
    return figure


# ---- horizon (fig. 10), joint fit (fig. 5a), exact power laws (fig. 5b) ----------------------------------------------


def horizon(curves, result):
    """Constant-rate curves with their frontier and tangent points, and C* against p with the fitted line (fig. 10)."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.7))
    compute = curves.compute / PETA
    for loss, colour in zip(curves.loss, style.colours(curves.p), strict=True):
        left.plot(compute, loss.mean(0), color=colour, lw=1)
    frontier, _ = horizons.envelope(curves)
    left.plot(compute, frontier, color='black', lw=2.2, alpha=0.35, label='compute-optimal frontier')
    tangent_loss = [np.interp(np.log(C), np.log(curves.compute), curves.loss[list(curves.p).index(p)].mean(0))
                    for p, C in zip(result.p, result.compute, strict=True)]
    left.plot(result.compute / PETA, tangent_loss, 'o', ms=4, color='black', label='tangent points')
    left.set(xscale='log', yscale='log', xlabel='compute C (PFLOPs)', ylabel='test loss (seed means)',
             title='constant learning rate')
    start = result.compute.min() / PETA / 30
    shown = frontier[np.isfinite(frontier) & (compute > start)]
    left.set(xlim=(start, compute[-1]), ylim=(shown.min() * 0.95, shown.max() * 1.5))
    left.legend()
    style.plain_log(left.yaxis)
    p = np.geomspace(curves.p.min(), curves.p.max(), 50)
    right.errorbar(result.p, result.compute / PETA, yerr=_error_bars(result), fmt='o', ms=4, color='black', capsize=2,
                   label='tangent points (± s.e. over seeds)' if result.seeds > 1 else 'tangent points')
    right.plot(p, horizons.optimal_compute(p, result.scale, result.exponent) / PETA, color=style.BLUE,
               label=f'(p / {result.scale:.4g})$^{{{result.exponent:.3f}}}$')
    if result.staircase:
        steps = result.staircase
        right.plot(p, horizons.optimal_compute(p, steps['scale'], steps['exponent']) / PETA, ':', color=style.RED,
                   label=f'staircase fit: (p / {steps["scale"]:.4g})$^{{{steps["exponent"]:.3f}}}$')
    ci = result.exponent_ci
    right.set(xscale='log', yscale='log', xlabel='parameters p', ylabel='optimal compute C* (PFLOPs)',
              title=f'exponent 1+γ = {result.exponent:.3f}' + (f' (90%: {ci[0]:.3f} to {ci[1]:.3f})' if ci else ''))
    right.legend()
    right.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    right.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: style.count(value)))
    right.xaxis.set_minor_formatter(ticker.NullFormatter())
    style.parameter_bar([left], curves.p)
    return figure


def _error_bars(result):
    """Distances [2, K] of C* from its lower and upper end in PFLOPs, or None without seeds."""
    if not np.isfinite(result.spread).any():
        return None
    C = result.compute / PETA
    return np.stack([C - C * np.exp(-result.spread), C * np.exp(result.spread) - C])


def joint(t, p, loss, fit):
    """Seed-mean constant-rate curves and the joint fit L0 + A·t^(-µ) + B·p^(-ν) (fig. 5a)."""
    figure, axis = plt.subplots(figsize=(6, 3.8))
    models = np.unique(p)
    for i, (one, colour) in enumerate(zip(models, style.colours(models), strict=True)):
        own = p == one
        fitted = fit.L0 + fit.A * t[own] ** -fit.mu + fit.B * one ** -fit.nu
        axis.plot(t[own], loss[own], color=colour, lw=1.2, label='measured (seed mean)' if i == 0 else None)
        axis.plot(t[own], fitted, '--', color='black', lw=0.8, label='joint fit' if i == 0 else None)
    axis.set(xscale='log', yscale='log', xlabel='tokens t', ylabel='test loss',
             title=rf'$L_0 + A\,t^{{-\mu}} + B\,p^{{-\nu}}$: $L_0$ = {fit.L0:.3g}, µ = {fit.mu:.3f}, ν = {fit.nu:.3f}; '
                   f'rms error {fit.error:.1%}')
    style.plain_log(axis.yaxis)
    axis.legend()
    style.parameter_bar([axis], models)
    return figure


def power_law_grid(alpha=0.6, beta=0.52):
    """Exact power laws: the law, then the normalised curves at 0.9γ*, γ* and 1.1γ*; two terms above, phase II below (fig. 5b)."""
    rows = {'two terms': (power_laws.TWO_TERMS, 1.0),
            f'phase II, α={alpha:g}, β={beta:g}': (power_laws.phase_terms(alpha, beta), power_laws.data_exponent(alpha, beta))}
    p = power_laws.MODELS
    figure, axes = plt.subplots(2, 4, figsize=(10.5, 5.2))
    x = np.linspace(0.01, 1, 200)
    for row, (name, (terms, gamma)) in zip(axes, rows.items(), strict=True):
        for one, colour in zip(p, style.colours(p), strict=True):
            t = np.geomspace(1e-4, 1, 100) * one ** gamma
            row[0].plot(6 * t * one, power_laws.loss(terms, t, one), color=colour, lw=1)
        end = p ** gamma
        row[0].plot(6 * end * p, power_laws.loss(terms, end, p), 'o', ms=3, color='black')
        row[0].set(xscale='log', yscale='log', xlabel='compute 6·t·p', ylabel=r'$L - L_0$', title=f'{name}: γ* = {gamma:.3f}')
        for axis, factor in zip(row[1:], (0.9, 1.0, 1.1), strict=True):
            for values, colour in zip(power_laws.normalised(terms, factor * gamma, p, x), style.colours(p), strict=True):
                axis.plot(x, values, color=colour, lw=1)
            spread = power_laws.deviation(terms, factor * gamma)
            size = 'below 1e-14' if spread < 1e-14 else f'{spread:.2g}'
            axis.set(xlabel='normalised compute x', ylabel=r'$\ell$', xlim=(0, 1), ylim=(0.9, 4),
                     title=f'γ = {"" if factor == 1 else f"{factor:g}"}γ*: largest Δ {size}')
    style.parameter_bar(axes, p)
    return figure


# ---- schedules (figs. 6, 12) ------------------------------------------------------------------------------------------


def schedules(aligned, alpha, across=None):
    """Observed and predicted loss, one schedule a panel (figs. 6, 12), or None if the log has nothing to compare `across`.

    The runs are those at the model and horizon with the most schedules. across='models' adds the other models at that
    horizon, across='horizons' the other horizons of that model. Columns are shapes, rows the share of training that decays.
    """
    shown, place = _places(aligned, across)
    key, letter = ('tokens_total', 'T') if across == 'horizons' else ('num_params', 'p')
    values = sorted(shown[key].unique())
    if across and len(values) < 2:
        return None
    shapes, decays = sorted(shown['schedule'].unique()), sorted(shown['decay_frac'].unique(), reverse=True)
    figure, axes = plt.subplots(len(decays), len(shapes), figsize=(max(3.1 * len(shapes), 6), 2.5 * len(decays) + 0.6),
                                squeeze=False, sharex=True, sharey=True)
    colours = style.colours(values) if across else [style.BLUE]
    names = [f'observed, {letter} = {style.count(value)}' if across else 'observed' for value in values]
    for (i, j), axis in np.ndenumerate(axes):
        own = shown[(shown['schedule'] == shapes[j]) & (shown['decay_frac'] == decays[i])]
        drawn = [(own[own[key] == value], colour, name) for value, colour, name in zip(values, colours, names, strict=True)]
        _draw_schedule(axis, [part for part in drawn if len(part[0])], alpha)
    late = shown['loss'][shown['x'] > 0.1]
    height = np.quantile(late, 0.97) - late.min()
    axes[0, 0].set(xlim=(0, 1), xticks=(0, 0.5, 1), xticklabels=('0', '0.5', '1'),
                   ylim=(late.min() - 0.3 * height, late.min() + 1.15 * height))  # the learning rate is drawn below the losses
    for axis in axes[-1]:
        axis.set_xlabel('share of training t/T')
    for axis in axes[:, 0]:
        axis.set_ylabel('test loss (smoothed)')
    figure.suptitle(f'{place}; α = {alpha:.3f}\nerror: mean absolute error in the decay phase, relative to the drop it causes',
                    fontsize=9)
    handles = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    labels = sorted(handles, key=lambda label: not label.startswith('observed'))
    figure.legend([handles[label] for label in labels], labels, loc='outside lower center', ncols=3 if across else len(labels))
    return figure


def _places(aligned, across):
    """(the rows that `schedules` shows, what they have in common in words)."""
    aligned = aligned.assign(kind=aligned['schedule'] + aligned['decay_frac'].astype(str))
    p, T = aligned.groupby(['num_params', 'tokens_total'])['kind'].nunique().idxmax()
    same_p, same_T = aligned['num_params'] == p, aligned['tokens_total'] == T
    if across is None:
        return aligned[same_p & same_T], f'p = {style.count(p)}, T = {style.count(T)} tokens'
    shown = aligned[same_T if across == 'models' else same_p]
    common = set.intersection(*shown.groupby(['num_params', 'tokens_total'])['kind'].agg(set))
    return shown[shown['kind'].isin(common)], f'T = {style.count(T)} tokens' if across == 'models' else f'p = {style.count(p)}'


def _draw_schedule(axis, drawn, alpha):
    """One schedule in one panel; `drawn` is a list of (rows of runs that differ in seed alone, colour, label).

    The mean over seeds is thick, its prediction dashed. The learning rate is the grey area along the bottom. With a single
    entry, the seeds are drawn thin and the constant-rate loss at equal τ dotted.
    """
    axis.set_visible(bool(drawn))
    for rows, colour, label in drawn:
        seeds = [own for _, own in rows.assign(predicted=scheduling.predict(rows, alpha)).groupby('run', sort=False)]
        x = seeds[0]['x'][seeds[0]['x'] > 0.02]
        observed, predicted, constant = (
            [np.interp(x, own['x'], scheduling.smooth(own['x'], own[column])) for own in seeds]
            for column in ('loss', 'predicted', 'reference'))
        axis.plot(x, np.mean(observed, 0), color=colour, lw=1.6, label=label)
        if len(drawn) == 1:  # with several models or horizons in a panel these lines would hide the others
            if len(seeds) > 1:
                axis.plot(x, np.transpose(observed), color=colour, lw=0.6, alpha=0.5, label=['seeds'] + [None] * (len(seeds) - 1))
            axis.plot(x, np.mean(constant, 0), ':', color=style.GREY, lw=1, label='constant rate at equal τ')
        axis.plot(x, np.mean(predicted, 0), '--', color='black', lw=1, label='predicted')
    if drawn:
        rows = pd.concat([rows for rows, _, _ in drawn])
        first, errors = rows[rows['run'] == rows['run'].iloc[0]], scheduling.relative_errors(rows, alpha)
        axis.fill_between(first['x'], 0, 0.15 * first['eta'], color=style.GREY, alpha=0.25, lw=0,
                          transform=axis.get_xaxis_transform(), label='learning rate')
        schedule, decay = first[['schedule', 'decay_frac']].iloc[0]
        share = f', last {decay:.0%}' if decay < 1 else ''
        axis.set_title(schedule + share + (f': error {errors.mean():.1%}' if len(errors) else ''))


# ---- a published curve trained again ----------------------------------------------------------------------------------


def reproduced(table, same, L0):
    """A run and the published seeds of its model: losses, and relative distances from the published mean, raw and normalised."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9.8, 3.1))
    for one, look in ((same, {'color': style.GREY, 'lw': 0.8}), (table, {'color': style.RED, 'lw': 1.2})):
        for _, rows in one.groupby('run', sort=False):
            left.plot(rows['compute'] / PETA, rows['test_loss'], **look)
    result = reproducing.compare(table, same, L0, reproducing.evaluations(table))
    off = result['off'][-1]
    left.set(xscale='log', yscale='log', xlabel='compute C (PFLOPs)', ylabel='test loss',
             title=f'p = {style.count(same["num_params"].iloc[0])}, final loss {result["loss"][-1]:.5f}:\n{abs(off):.1f} sd '
                   f'{"above" if off > 0 else "below"} the published mean')
    style.plain_log(left.yaxis)
    for axis, own, seeds, name in ((middle, result['loss'] / result['published'] - 1, result['each_seed'], 'loss'),
                                   (right, result['distance'], result['each_distance'], r'normalised loss $\ell$')):
        for i, seed in enumerate(seeds):
            axis.plot(result['x'], 100 * seed, color=style.GREY, lw=0.8, label='published seeds' if i == 0 else None)
        axis.plot(result['x'], 100 * own, 'o-', ms=2.5, color=style.RED, label='trained again')
        axis.set(xlabel=NORMALISED_COMPUTE, ylabel='from the published mean (%)', title=name, xlim=(0, 1.01))
        axis.legend()
    return figure
