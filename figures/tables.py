"""Results as tables: Markdown with one row a log, and a data frame of one result for the notebooks.

    python -m figures tables logs/*.parquet

A log of constant-rate runs gives the fitted horizon and the collapse of its runs up to that horizon. A log of several schedules
gives α. Any other log is taken as a scaling ladder. A row that cannot be computed is left out, and stderr says why.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd

from analysis import collapse, horizon, schedules
from analysis.table import LogError, clean, load, runs

X_SHOWN = (0.25, 0.5, 0.75, 0.9)  # normalised compute at which Δ and σ are given
LADDER_COLUMNS = ('log', 'widths', 'seeds', 'a', 'b', 'L0', *(f'Δ / σ at {x:g}' for x in X_SHOWN), 'Δ < σ from x =')
HORIZON_COLUMNS = ('log', 'widths', 'seeds', 'κ', '1+γ', 'tangent points')
SCHEDULE_COLUMNS = ('log', 'schedules', 'α', 'α with the trace as logged', 'error of a schedule left out, of the drop',
                    'rms error, of the loss range')

# What `summary` shows of a result, in this order, by the names of fields and JSON keys.
QUANTITIES = {
    'a': 'a (loss at 1e15 FLOPs above L0)', 'b': 'b (exponent of compute)', 'L0': 'L0 (irreducible loss)', 'r2': 'R²',
    'A': 'A', 'mu': 'µ (exponent of tokens)', 'B': 'B', 'nu': 'ν (exponent of parameters)', 'error': 'rms relative residual',
    'scale': 'scale κ (parameters)', 'exponent': 'exponent 1 + γ',
    'alpha': 'α', 'alpha_published': 'α with the trace as logged', 'rmse': 'rms error (loss)',
    'rmse_relative': 'rms error, of the loss range', 'runs': 'runs',
    'supercollapse_from': 'Δ < σ averaged over models from x =', 'supercollapse_from_every_model': 'Δ < σ of every model from x =',
    'final': 'final loss', 'num_params': 'parameters', 'compute': 'compute (FLOPs)', 'tokens': 'tokens',
}


def summary(result):
    """pandas.DataFrame with the columns quantity, value and 90% interval: the numbers of one result, rounded, as text.

    `result` is a named tuple (Horizon, Fit, Law, JointFit) or the dict of an `analyse` function. Arrays are left out.
    """
    values = dict(result._asdict() if hasattr(result, '_asdict') else result)
    values = values | values.pop('fit', {})
    rows = []
    for key, quantity in QUANTITIES.items():
        if not isinstance(values.get(key), (int, float)):
            continue
        ci = values.get(f'{key}_profile_ci') or values.get(f'{key}_ci') or values.get(f'{key}_90')
        text = onset_text if key.startswith('supercollapse') else _rounded
        rows.append((quantity, text(values[key]), f'[{text(ci[0])}, {text(ci[1])}]' if ci else ''))
    return pd.DataFrame(rows, columns=['quantity', 'value', '90% interval'])


def _rounded(value):
    """Four significant digits; large counts in the form 1.234e+15."""
    return f'{round(value, 12):.4g}'


def onset_text(x, decidable=True):
    """The x from which Δ < σ, 'never', or '–' where there is no σ to compare with."""
    return f'{x:.2f}' if np.isfinite(x) else 'never' if decidable else '–'


def sizes(table):
    """The widths and the seeds per model as text: '32 … 128 (5)', '5'."""
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
    fit, at = result['fit'], [int(np.argmin(np.abs(result['x'] - x))) for x in X_SHOWN]
    onset, ci = result['supercollapse_from'], result['supercollapse_from_ci']
    decidable = np.isfinite(result['sigma']).all()  # with one seed a model there is no σ, and no verdict
    return (name, *sizes(table), number(fit['a'], fit['a_ci']), number(fit['b'], fit['b_ci']),
            number(fit['L0'], fit['L0_profile_ci'] or fit['L0_ci'], 2),
            *(f'{result["delta"][i]:.4f} / ' + (f'{result["sigma"][i]:.4f}' if decidable else '–') for i in at),
            onset_text(onset, decidable) + (f' [{onset_text(ci[0])}, {onset_text(ci[1])}]' if ci else ''))


def horizon_row(name, table):
    found = horizon.fit(horizon.smooth_curves(table))
    return (name, *sizes(table), number(found.scale, found.scale_ci, 4), number(found.exponent, found.exponent_ci),
            str(len(found.p)))


def constant_rate_row(name, table):
    """The collapse of constant-rate runs up to their fitted horizon."""
    return ladder_row(name, clean(horizon.at_horizon(table))[0])


def schedule_row(name, table):
    found, _ = schedules.analyse(table)
    rows = found['leave_one_schedule_out']
    errors = [row['error'] for row in rows if np.isfinite(row['error'])]
    return (name, ', '.join(sorted({row['schedule'] for row in rows})),
            *(f'{found[key]:.3f} ± {found[f"{key}_se"]:.3f}' for key in ('alpha', 'alpha_published')),
            f'{min(errors):.0%} to {max(errors):.0%}' if errors else '', f'{found["rmse_relative"]:.1%}')


def tables(paths):
    """({columns: rows}, reasons for the rows that are missing) of the logs at `paths`."""
    found, reasons = {HORIZON_COLUMNS: [], LADDER_COLUMNS: [], SCHEDULE_COLUMNS: []}, []

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
            constant, _ = horizon.constant_rate(table)
            add(HORIZON_COLUMNS, horizon_row, name, constant)
            add(LADDER_COLUMNS, constant_rate_row, f'{name}, to the horizon', constant)
        elif len(kinds) > 1:
            add(SCHEDULE_COLUMNS, schedule_row, name, table)
        else:
            add(LADDER_COLUMNS, ladder_row, name, table)
            if table['num_params'].nunique() > 4:
                wider = table[table['num_params'] > table['num_params'].min()]
                add(LADDER_COLUMNS, ladder_row, f'{name}, without the narrowest', wider)
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
