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
        ci = values.get(f'{key}_profile_ci') or values.get(f'{key}_ci') or values.get(f'{key}_90')
        onset = key.startswith('supercollapse')  # without seeds it has no interval and cannot be decided
        if isinstance(values.get(key), (int, float)) and (ci or not onset):
            text = onset_text if onset else number
            rows.append((quantity, text(values[key]), f'[{text(ci[0])}, {text(ci[1])}]' if ci else ''))
    return pd.DataFrame(rows, columns=['quantity', 'value', '90% interval'])


def number(value, ci=None, digits=4):
    """'0.17 [0.16, 0.18]'; large counts in the form 1.234e+15."""
    return f'{round(value, 12):.{digits}g}' + (f' [{ci[0]:.{digits}g}, {ci[1]:.{digits}g}]' if ci else '')


def onset_text(x, ci=None):
    """'0.75 [0.74, 0.84]', the x from which Δ < σ; 'never' for NaN."""
    one, *both = (f'{value:.2f}' if np.isfinite(value) else 'never' for value in (x, *(ci or ())))
    return one + (f' [{", ".join(both)}]' if ci else '')


def value_range(values):
    """'5', or '1 to 5' if the values differ."""
    return ' to '.join(f'{value:g}' for value in sorted({min(values), max(values)}))


def sizes(table):
    """Two cells: the widths '32 … 128 (5)', and the seeds per model."""
    ends = runs(table)
    widths, seeds = ends.get('D', pd.Series()).dropna().astype(int), ends.groupby('num_params').size()
    text = f'{widths.min()} … {widths.max()} ({widths.nunique()})' if len(widths) else f'{len(seeds)} sizes'
    return {'widths': text, 'seeds': value_range(seeds)}


# A row of a table: {column: text}. The order of these functions is that of the tables.


def horizon_row(name, table):
    found = horizon.fit(horizon.smooth_curves(table))
    return {'log': name, **sizes(table), 'κ': number(found.scale, found.scale_ci),
            '1+γ': number(found.exponent, found.exponent_ci, 3), 'trained past C*': f'{len(found.p)}'}


def ladder_row(name, table):
    if 'schedule' in table and set(table['schedule']) == {'const'}:  # up to the fitted horizon
        table, _, _ = clean(horizon.at_horizon(table))
    result, _ = collapse.analyse(table)
    fit, ci = result['fit'], result['supercollapse_from_ci']
    decidable = np.isfinite(result['sigma']).all()  # with one seed a model there is no σ, and no verdict
    cells = {'log': name, **sizes(table), 'a': number(fit['a'], fit['a_ci'], 3), 'b': number(fit['b'], fit['b_ci'], 3),
             'L0': number(fit['L0'], fit['L0_profile_ci'] or fit['L0_ci'], 2)}
    for x in (0.25, 0.5, 0.75, 0.9):
        i = np.abs(result['x'] - x).argmin()
        sigma = f'{result["sigma"][i]:.4f}' if decidable else '–'
        cells[f'Δ / σ at {x:g}'] = f'{result["delta"][i]:.4f} / {sigma}'
    spread = next((f'{one["drop_spread"]:.1%}' for one in result['L0_choices'] if one['name'] == 'law'), '–')
    return cells | {'Δ < σ from x =': onset_text(result['supercollapse_from'], ci) if decidable else '–',
                    'spread of the drop': spread, 'verdict': result['verdict']}


def schedule_row(name, table):
    found, _ = schedules.analyse(table)
    rows = pd.DataFrame(found['leave_one_schedule_out'], columns=['schedule', 'error'])
    return {'log': name, 'schedules': ', '.join(sorted(set(rows['schedule']))),
            'α': number(found['alpha'], found['alpha_ci'], 3),
            'α with the trace as logged': number(found['alpha_published'], found['alpha_published_ci'], 3),
            'error of a schedule left out, of the drop':
                f'{rows["error"].min():.0%} to {rows["error"].max():.0%}' if rows['error'].notna().any() else '',
            'rms error, of the loss range': f'{found["rmse_relative"]:.1%}'}


def tables(paths):
    """({row function: rows}, reasons for the rows that are missing) of the logs at `paths`."""
    found, reasons = {horizon_row: [], ladder_row: [], schedule_row: []}, []
    for path in paths:
        name, (table, _, _) = Path(path).stem, clean(load(path))
        kinds = set(table['schedule'].dropna()) if 'schedule' in table else set()
        if kinds == {'const'}:
            wanted = [(horizon_row, name, table), (ladder_row, f'{name}, to the horizon', table)]
        elif len(kinds) > 1:
            wanted = [(schedule_row, name, table)]
        else:
            wanted = [(ladder_row, name, table)]
            if table['num_params'].nunique() > 4:
                wanted += [(ladder_row, f'{name}, without the narrowest', table[table['num_params'] > table['num_params'].min()])]
        for row, label, rows in wanted:
            try:
                found[row].append(row(label, rows))
            except LogError as error:
                reasons.append(f'{label}: {error}')
    return found, reasons


def markdown(rows):
    lines = [rows[0], ['---'] * len(rows[0]), *(row.values() for row in rows)]
    return '\n'.join(f'| {" | ".join(cells)} |' for cells in lines)


def main(argv):
    if not argv or argv[0].startswith('-'):
        sys.exit(__doc__)
    found, reasons = tables(argv)
    print('\n\n'.join(markdown(rows) for rows in found.values() if rows))
    for reason in reasons:
        print(f'note: {reason}', file=sys.stderr)
