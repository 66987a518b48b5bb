"""What several logs say, one row a log, as the Markdown tables of README's "What we measured".

    python -m figures tables logs/*.parquet

A log of constant-rate runs gives the horizon, and the collapse of its runs up to it; one of several schedules gives α; any other
is a ladder. What an analysis cannot tell of a log is left empty, with the reason on stderr.
"""

import sys
from pathlib import Path

import numpy as np

from analysis import collapse, horizon, schedules
from analysis.table import LogError, clean, load, runs

AT = (0.25, 0.5, 0.75, 0.9)  # x at which Δ and σ are given
LADDERS = ('log', 'widths', 'seeds', 'a', 'b', 'L0', *(f'Δ / σ at {x:g}' for x in AT), 'Δ < σ from x =')
HORIZONS = ('log', 'widths', 'seeds', 'κ', '1+γ', 'tangent points')
SCHEDULES = ('log', 'schedules', 'α', 'error of a schedule left out, of the drop', 'rms error, of the loss range')


def sizes(table):
    """'widths 36 … 144', '5 seeds' of a table."""
    each = runs(table)
    widths = sorted(each['D'].dropna().astype(int).unique()) if 'D' in each else []
    seeds = each.groupby('num_params').size()
    return (f'{widths[0]} … {widths[-1]} ({len(widths)})' if widths else f'{len(seeds)} sizes',
            str(seeds.min()) if seeds.min() == seeds.max() else f'{seeds.min()} to {seeds.max()}')


def number(value, ci, digits=3):
    """'0.17 [0.16, 0.18]'."""
    return f'{round(value, 12):.{digits}g}' + (f' [{ci[0]:.{digits}g}, {ci[1]:.{digits}g}]' if ci else '')


def ladder_row(name, table):
    result, _ = collapse.analyse(table)
    fit, at = result['fit'], [int(np.argmin(np.abs(result['x'] - x))) for x in AT]
    onset, ci = result['supercollapse_from'], result['supercollapse_from_ci']
    told = np.isfinite(result['sigma']).all()  # with one seed a model there is no σ, and no verdict
    said = [f'{x:.2f}' if np.isfinite(x) else 'never' if told else '–' for x in (onset, *(ci or ()))]
    return (name, *sizes(table), number(fit['a'], fit['a_ci']), number(fit['b'], fit['b_ci']),
            number(fit['L0'], fit['L0_profile_ci'] or fit['L0_ci'], 2),
            *(f'{result["delta"][i]:.4f} / ' + (f'{result["sigma"][i]:.4f}' if told else '–') for i in at),
            said[0] + (f' [{said[1]}, {said[2]}]' if ci else ''))


def horizon_row(name, table):
    found = horizon.fit(horizon.smooth_curves(table))
    return (name, *sizes(table), number(found.scale, found.scale_ci, 4), number(found.exponent, found.exponent_ci),
            str(len(found.p)))


def steady_row(name, table):
    return ladder_row(name, clean(horizon.at_horizon(table))[0])


def schedule_row(name, table):
    aligned, _ = schedules.align(table)
    found, errors = schedules.fit(aligned), schedules.leave_one_out(aligned)
    share = [row['error'] for row in errors if np.isfinite(row['error'])]
    return (name, ', '.join(sorted({row['schedule'] for row in errors})), f'{found.alpha:.3f} ± {found.alpha_se:.3f}',
            f'{min(share):.0%} to {max(share):.0%}' if share else '', f'{schedules.rmse_relative(aligned, found.alpha):.1%}')


def tables(paths):
    """{columns: rows} of the logs at `paths`, and the reasons for what is missing."""
    found, reasons = {HORIZONS: [], LADDERS: [], SCHEDULES: []}, []

    def add(columns, row, name, table):
        try:
            found[columns].append(row(name, table))
        except LogError as error:
            reasons.append(f'{name}: {error}')

    for path in paths:
        name, table = Path(path).stem, load(path)
        table = table[table['test_loss'].notna()] if 'test_loss' in table else table
        kinds = set(table['schedule'].dropna()) if 'schedule' in table else set()
        table, _, _ = clean(table)
        if kinds == {'const'}:
            steady, _ = horizon.constant_rate(table)
            add(HORIZONS, horizon_row, name, steady)
            add(LADDERS, steady_row, f'{name}, to the horizon', steady)
        elif len(kinds) > 1:
            add(SCHEDULES, schedule_row, name, table)
        else:
            add(LADDERS, ladder_row, name, table)
            if table['num_params'].nunique() > 4:
                add(LADDERS, ladder_row, f'{name}, without the narrowest', table[table['num_params'] > table['num_params'].min()])
    return found, reasons


def markdown(columns, rows):
    return '\n'.join(['| ' + ' | '.join(row) + ' |' for row in (columns, ['---'] * len(columns), *rows)])


def main(argv):
    if not argv or argv[0].startswith('-'):
        sys.exit(__doc__)
    found, reasons = tables(argv)
    print('\n\n'.join(markdown(columns, rows) for columns, rows in found.items() if rows))
    for reason in reasons:
        print(f'note: {reason}', file=sys.stderr)
