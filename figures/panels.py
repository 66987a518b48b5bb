"""The panels of the figures: each function draws one result of the analysis and returns the figure; nothing is computed
here that the other modules give."""

import numpy as np
from matplotlib import pyplot as plt

from analysis import collapse as collapsing
from analysis import horizon as horizons
from analysis import power_laws, scaling_law
from analysis import reproduced as reproducing
from analysis import schedules as scheduling
from analysis.columns import PETA
from figures import style

BAND = (5, 95)  # percentiles of the seeds' band; with few seeds they lie near the extremes


def _band_label(seeds):
    return f'{BAND[0]}-{BAND[1]}% of the seeds' if seeds > 1 else None


# ---- scaling law and collapse (figs. 1a-c, 2, 3, 4) ----------------------------------------------------------------


def law(axis, table, result):
    """Loss curves by model (seed means), their compute-optimal points and the fitted L0 + a·C^(-b) (fig. 1a)."""
    fit, p = result['fit'], result['num_params']
    curves = collapsing.curves(table, np.geomspace(1e-3, 1, 200) if _starts_early(table) else collapsing.GRID)
    for i, colour in enumerate(style.colours(p)):
        own = curves.model == i
        axis.plot(result['compute'][i] * curves.x / PETA, curves.loss[own].mean(0), color=colour, lw=1)
    axis.plot(result['compute'] / PETA, result['final_loss'], 'o', ms=4, color='black', zorder=5, label='compute-optimal')
    if np.isfinite(fit['b']):
        C = np.geomspace(result['compute'].min() / 3, result['compute'].max() * 3, 100)
        predicted = scaling_law.predict(scaling_law.Law(fit['a'], fit['b'], fit['L0']), C)
        axis.plot(C / PETA, predicted, '--', color='black', lw=1,
                  label=rf'${fit["L0"]:.3g} + {fit["a"]:.3g}\,C^{{-{fit["b"]:.3f}}}$')
    early = curves.loss[:, np.searchsorted(curves.x, 0.01 if curves.x[0] < 0.01 else 0.02)].max()
    axis.set(xscale='log', yscale='log', xlabel='compute C (PFLOPs)', ylabel='test loss')
    axis.set_ylim(result['final_loss'].min() * 0.93, early)
    axis.set_xlim(result['compute'].min() / PETA * 5e-3, result['compute'].max() / PETA * 3)
    style.plain_log(axis.yaxis)
    axis.legend()
    axis.set_title('scaling law')


def _starts_early(table):
    horizon = scaling_law.horizon_of(table)
    first = table[table['compute'] > 0].groupby('run')['compute'].first()
    return (first / horizon).max() <= 1e-3


def collapsed(axis, curves, L0, by='own'):
    """Normalised loss curves with a band for the seeds (figs. 1b, 3 left)."""
    ell = collapsing.normalise(curves, L0, by)
    seeds = int(np.bincount(curves.model).max())
    for i, colour in enumerate(style.colours(curves.p)):
        own = ell[curves.model == i]
        axis.plot(curves.x, own.mean(0), color=colour, lw=1)
        if len(own) > 1:
            axis.fill_between(curves.x, *np.percentile(own, BAND, axis=0), color=colour, alpha=0.25, lw=0,
                              label=_band_label(seeds) if i == 0 else None)
    top = ell[:, np.argmin(np.abs(curves.x - 0.1))].max()
    axis.set(xlabel='normalised compute x = C/C*', ylabel=r'normalised loss $\ell$', xlim=(0, 1))
    axis.set_ylim(1 - 0.04 * (top - 1), top)
    if seeds > 1:
        axis.legend()


def tolerance(axis, result):
    """Collapse tolerance Δ beside the noise floor σ, with 90% bands over seeds and L0 (figs. 1c, 3 right)."""
    x = result['x']
    axis.plot(x[:-1], result['delta'][:-1], color=style.BLUE, label=r'tolerance $\Delta$')
    if np.isfinite(result['sigma']).any():
        axis.plot(x[:-1], result['within'][:-1], ':', color=style.BLUE, lw=1, label=r'$\Delta$ within models')
        axis.plot(x[:-1], result['between'][:-1], '--', color=style.BLUE, lw=1, label=r'$\Delta$ between models')
        axis.plot(x, result['sigma'], color=style.RED, label=r'noise floor $\sigma$ (mean over models)')
    for name, colour in (('delta_ci', style.BLUE), ('sigma_ci', style.RED)):
        if result[name] is not None:
            axis.fill_between(x[:-1], *np.array(result[name])[:, :-1], color=colour, alpha=0.18, lw=0)
    onset, title = result['supercollapse_from'], 'one seed: no noise floor'
    if np.isfinite(result['sigma']).any():
        title = rf'$\Delta < \sigma$ from x = {onset:.2f}' if np.isfinite(onset) else r'$\Delta$ is not below $\sigma$'
    if np.isfinite(onset):
        axis.axvline(onset, color=style.GREY, lw=0.8)
    axis.set_title(title + (' (bands: 90%)' if result['delta_ci'] is not None else ''))
    axis.set(xlabel='normalised compute x = C/C*', ylabel='relative deviation', xlim=(0, 1), yscale='log')
    shown = np.concatenate([result['delta'][(x > 0.1) & (x < 0.985)], result['sigma'][np.isfinite(result['sigma'])]])
    axis.set_ylim(shown.min() * 0.5, np.nanmax(shown) * 2)
    axis.legend(fontsize=7)


def collapse(table, result):
    """Figs. 1a-c of one ladder: the law, the collapse, Δ against σ."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.3))
    law(axes[0], table, result)
    curves = collapsing.curves(table)
    collapsed(axes[1], curves, result['fit']['L0'])
    axes[1].set_title(rf'collapse with $L_0$ = {result["fit"]["L0"]:.4g}')
    tolerance(axes[2], result)
    style.parameter_bar(axes, curves.p)
    return figure


def wrong_floor(curves, L0):
    """Subtracting another L̂ than L0 breaks the collapse (fig. 2): none, too low, right, too high."""
    ceiling = curves.loss[:, -1].min()
    floors = {0.0: r'$\hat L$ = 0', L0 / 2: r'$\hat L$ too low', L0: r'$\hat L = L_0$',      # an L0 of 0 leaves two of them
              L0 + 0.5 * (ceiling - L0): r'$\hat L$ too high'}
    figure, axes = plt.subplots(1, len(floors), figsize=(3 * len(floors), 2.9))
    for axis, (floor, name) in zip(axes, floors.items(), strict=True):
        collapsed(axis, curves, floor)
        result = collapsing.spread(curves, floor)
        middle = np.argmin(np.abs(curves.x - 0.5))
        axis.set_title(f'{name} ({floor:.3g}): Δ(0.5) = {result.delta[middle]:.4f}')
        if axis.get_legend() and axis is not axes[0]:
            axis.get_legend().remove()
        if axis is not axes[0]:
            axis.set_ylabel('')
    style.parameter_bar(axes, curves.p)
    return figure


def ladders(results):
    """Collapse and Δ, σ of several ladders, a row each (figs. 3, 4): results is {title: (table, analysis)}."""
    figure, axes = plt.subplots(len(results), 3, figsize=(11, 3 * len(results)), squeeze=False)
    for row, (title, (table, result)) in zip(axes, results.items(), strict=True):
        law(row[0], table, result)
        row[0].set_title(title)
        curves = collapsing.curves(table)
        collapsed(row[1], curves, result['fit']['L0'])
        tolerance(row[2], result)
        style.parameter_bar(row, curves.p)
    return figure


def quality(cases):
    """Measured Δ beside k·√(η(1-τ̂)) of eq. 24, and Δ with the expected instead of the own final loss (figs. 1f, 8).

    cases is {title: (curves, analysis)}; a column each. k is fitted to the part within models, which eq. 24 is about.
    """
    figure, axes = plt.subplots(1, len(cases), figsize=(4.2 * len(cases), 3.3), squeeze=False)
    for axis, (title, (curves, result)) in zip(axes[0], cases.items(), strict=True):
        x, inner = curves.x, slice(0, -1)
        predicted, k = collapsing.predicted_quality(curves, result['within'])
        axis.plot(x[inner], result['delta'][inner], color=style.BLUE, label=r'$\Delta$, own final loss')
        axis.plot(x[inner], result['within'][inner], ':', color=style.BLUE, label='its part within models')
        axis.plot(x[inner], predicted[inner], '--', color='black', label=rf'{k:.2g}·$\sqrt{{\eta(1-\hat\tau)}}$ (eq. 24)')
        axis.plot(x, result['delta_expected_final'], color=style.ORANGE, label=r'$\Delta$, expected final loss')
        if np.isfinite(result['sigma']).any():
            axis.plot(x, result['sigma'], '-.', color=style.RED, label=r'$\sigma$')
        axis.set(xlabel='normalised compute x = C/C*', ylabel='relative deviation', yscale='log', title=title, xlim=(0, 1))
        shown = np.concatenate([result['within'][(x > 0.1) & (x < 0.96)], result['delta_expected_final']])
        axis.set_ylim(shown[shown > 0].min() * 0.4, shown.max() * 2)
        axis.legend(fontsize=7)
    return figure


# ---- horizon (fig. 10), joint fit (5a), exact power laws (5b) -------------------------------------------------------


def horizon(curves, result):
    """Constant-rate curves, their envelope and tangent points; C* against p with the fitted line (fig. 10)."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5))
    compute = curves.compute / PETA
    for loss, colour in zip(curves.loss, style.colours(curves.p), strict=True):
        left.plot(compute, loss.mean(0), color=colour, lw=1)
    frontier, best = horizons.envelope(curves)
    left.plot(compute, frontier, color='black', lw=2.2, alpha=0.35, label='compute-optimal frontier')
    at = [np.interp(np.log(C), np.log(curves.compute), curves.loss[list(curves.p).index(p)].mean(0))
          for p, C in zip(result.p, result.compute, strict=True)]
    left.plot(result.compute / PETA, at, 'o', ms=4, color='black', label='tangent points')
    seen = np.isfinite(frontier) & (best >= 0)
    left.set(xscale='log', yscale='log', xlabel='compute C (PFLOPs)', ylabel='test loss (seed means)',
             title='constant learning rate')
    start = result.compute.min() / PETA / 30
    window = seen & (compute > start)
    left.set_xlim(start, compute[-1])
    left.set_ylim(np.nanmin(frontier[window]) * 0.95, np.nanmax(frontier[window]) * 1.5)
    left.legend()
    style.plain_log(left.yaxis)
    p = np.geomspace(curves.p.min(), curves.p.max(), 50)
    right.errorbar(result.p, result.compute / PETA, yerr=_log_error(result), fmt='o', ms=4, color='black', capsize=2,
                   label='tangent points (± s.e. over seeds)' if result.seeds > 1 else 'tangent points')
    right.plot(p, horizons.optimal_compute(p, result.scale, result.exponent) / PETA, color=style.BLUE,
               label=f'(p / {result.scale:.4g})$^{{{result.exponent:.3f}}}$')
    if result.staircase:
        steps = result.staircase
        right.plot(p, horizons.optimal_compute(p, steps['scale'], steps['exponent']) / PETA, ':', color=style.RED,
                   label=f'staircase fit: (p / {steps["scale"]:.4g})$^{{{steps["exponent"]:.3f}}}$')
    ci = result.exponent_ci
    right.set(xscale='log', yscale='log', xlabel='parameters p', ylabel='optimal compute C* (PFLOPs)',
              title=f'exponent 1+γ = {result.exponent:.3f}' + (f'  [{ci[0]:.3f}, {ci[1]:.3f}]' if ci else ''))
    right.legend()
    right.xaxis.set_major_locator(plt.LogLocator(subs=(1, 2, 5)))
    right.xaxis.set_major_formatter(plt.FuncFormatter(lambda p, _: style.count(p)))
    right.xaxis.set_minor_formatter(plt.NullFormatter())
    style.parameter_bar([left], curves.p)
    return figure


def _log_error(result):
    if not np.isfinite(result.spread).any():
        return None
    C = result.compute / PETA
    return np.stack([C - C * np.exp(-result.spread), C * np.exp(result.spread) - C])


def joint(t, p, loss, fit):
    """Constant-rate seed-mean curves and the joint fit L0 + A·t^(-µ) + B·p^(-ν) (fig. 5a)."""
    figure, axis = plt.subplots(figsize=(5, 3.6))
    models = np.unique(p)
    for i, (one, colour) in enumerate(zip(models, style.colours(models), strict=True)):
        own = p == one
        axis.plot(t[own], loss[own], color=colour, lw=1.2, label='measured (seed mean)' if i == 0 else None)
        fitted = fit.L0 + fit.A * t[own] ** -fit.mu + fit.B * one ** -fit.nu
        axis.plot(t[own], fitted, '--', color='black', lw=0.8, label='fit' if i == 0 else None)
    axis.set(xscale='log', yscale='log', xlabel='tokens t', ylabel='test loss',
             title=rf'$L_0 + t^{{-\mu}} + p^{{-\nu}}$: $L_0$={fit.L0:.3g}, µ={fit.mu:.3f}, ν={fit.nu:.3f}, '
                   f'rms error {fit.error:.2%}')
    style.plain_log(axis.yaxis)
    axis.legend()
    style.parameter_bar([axis], models)
    return figure


def power_law_grid(alpha=0.6, beta=0.52):
    """Exact power laws: the law, then the collapse at 0.9γ*, γ* and 1.1γ* (fig. 5b); two terms above, phase II below."""
    rows = {'two terms': (power_laws.TWO_TERMS, 1.0),
            f'phase II, α={alpha:g}, β={beta:g}': (power_laws.phase_terms(alpha, beta),
                                                   power_laws.data_exponent(alpha, beta))}
    p = power_laws.MODELS
    figure, axes = plt.subplots(2, 4, figsize=(12, 5.6))
    x = np.linspace(0.01, 1, 200)
    for row, (name, (terms, gamma)) in zip(axes, rows.items(), strict=True):
        for one, colour in zip(p, style.colours(p), strict=True):
            t = np.geomspace(1e-4, 1, 100) * one ** gamma
            row[0].plot(6 * t * one, power_laws.loss(terms, t, one), color=colour, lw=1)
        end = p ** gamma
        row[0].plot(6 * end * p, power_laws.loss(terms, end, p), 'o', ms=3, color='black')
        row[0].set(xscale='log', yscale='log', xlabel='compute 6·t·p', ylabel=r'$L - L_0$', title=f'{name}: γ* = {gamma:.3f}')
        for axis, factor in zip(row[1:], (0.9, 1.0, 1.1), strict=True):
            ell = power_laws.normalised(terms, factor * gamma, p, x)
            for values, colour in zip(ell, style.colours(p), strict=True):
                axis.plot(x, values, color=colour, lw=1)
            spread = power_laws.deviation(terms, factor * gamma)
            label = 'γ*' if factor == 1 else f'{factor:g}γ*'
            axis.set(xlabel='normalised compute x', ylabel=r'$\ell$', xlim=(0, 1), ylim=(0.9, 4),
                     title=f'γ = {label}: largest Δ {_small(spread)}')
    style.parameter_bar(axes, p)
    return figure


def _small(value):
    return 'below 1e-14' if value < 1e-14 else f'{value:.2g}'


# ---- schedules (figs. 6, 12) ---------------------------------------------------------------------------------------


def schedules(aligned, alpha):
    """Observed and predicted curves in three panels: schedules at one model and horizon, across models, across horizons."""
    groups = _schedule_groups(aligned)
    largest = max(one.tokens_total for one in aligned)
    unit, name = (1e9, 'tokens (billions)') if largest >= 1e9 else (1e6, 'tokens (millions)')
    figure, axes = plt.subplots(1, len(groups), figsize=(4.2 * len(groups), 3.8), squeeze=False)
    for axis, (title, chosen) in zip(axes[0], groups.items(), strict=True):
        values = []
        for one in sorted(chosen, key=lambda o: (o.p, o.tokens_total, o.schedule, o.decay_frac)):
            colour = style.SCHEDULES.get(one.schedule, 'black')
            alike = 1.0 if one.decay_frac == 1 else 0.6
            kept = one.x > 0.02
            observed, predicted = (scheduling.smooth(one.x[kept], y[kept])
                                   for y in (one.loss, scheduling.predict(one, alpha)))
            tokens = one.x[kept] * one.tokens_total / unit
            label = f'{one.schedule}, last {one.decay_frac:.0%}'
            known = axis.get_legend_handles_labels()[1]
            axis.plot(tokens, observed, color=colour, alpha=alike, lw=1.1, label=None if label in known else label)
            finite = np.isfinite(predicted)
            axis.plot(tokens[finite], predicted[finite], '--', color='black', lw=0.7)
            values += [observed[one.x[kept] > 0.1]]
        values = np.concatenate(values)
        axis.plot([], [], '--', color='black', lw=0.7, label=f'predicted, α = {alpha:.3f}')
        horizontal = len({one.tokens_total for one in chosen}) > 1
        axis.set(xlabel=name, ylabel='test loss (smoothed)', title=title)
        spread = np.quantile(values, 0.97) - values.min()
        axis.set_ylim(values.min() - 0.05 * spread, values.min() + 1.1 * spread)
        if horizontal:
            axis.set_xscale('log')
            style.plain_log(axis.xaxis)
            axis.set_xlim(0.1 * min(one.tokens_total for one in chosen) / unit)
        axis.legend(fontsize=6.5)
    return figure


def _schedule_groups(aligned):
    """{title: runs}: at the model and horizon with the most schedules; then all models there; then all its horizons."""
    places = {}
    for one in aligned:
        places.setdefault((one.p, one.tokens_total), []).append(one)
    p, T = max(places, key=lambda place: len(places[place]))
    groups = {f'p = {style.count(p)}, T = {style.count(T)}': places[p, T]}
    across_p = [one for (q, S), runs in places.items() if S == T for one in runs]
    across_T = [one for (q, S), runs in places.items() if q == p for one in runs]
    shared = {(one.schedule, one.decay_frac) for one in across_p + across_T if (one.p, one.tokens_total) != (p, T)}
    if len({one.p for one in across_p}) > 1:
        groups['across model sizes'] = [one for one in across_p if (one.schedule, one.decay_frac) in shared]
    if len({one.tokens_total for one in across_T}) > 1:
        groups['across horizons'] = [one for one in across_T if (one.schedule, one.decay_frac) in shared]
    return groups


# ---- a published curve trained again ---------------------------------------------------------------------------------


def reproduced(table, same, L0):
    """A run beside the published seeds of its model: losses, and both distances from the published mean at its evaluations."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.3))
    for one, style_of in ((same, {'color': style.GREY, 'lw': 0.8}), (table, {'color': style.RED, 'lw': 1.2})):
        for _, rows in one.groupby('run', sort=False):
            left.plot(rows['compute'] / PETA, rows['test_loss'], **style_of)
    left.set(xscale='log', yscale='log', xlabel='compute C (PFLOPs)', ylabel='test loss')
    style.plain_log(left.yaxis)
    result = reproducing.compare(table, same, L0, reproducing.evaluations(table))
    x = result['x']
    for axis, own, seeds, name in ((middle, result['loss'] / result['published'] - 1, result['each_seed'], 'loss'),
                                   (right, result['distance'], result['each_distance'], r'normalised loss $\ell$')):
        for i, seed in enumerate(seeds):
            axis.plot(x, 100 * seed, color=style.GREY, lw=0.8, label='published seeds' if i == 0 else None)
        axis.plot(x, 100 * own, 'o-', ms=2.5, color=style.RED, label='trained again')
        axis.set(xlabel='normalised compute x = C/C*', ylabel='from the published mean (%)', title=name, xlim=(0, 1.01))
        axis.legend()
    left.set_title(f'p = {style.count(same["num_params"].iloc[0])}, final loss {result["loss"][-1]:.5f}, '
                   f'{result["off"][-1]:+.1f} sd')
    return figure
