"""Reads a log into one table with a row an evaluation, and cleans it for the analysis.

A log is a parquet file of ours, a folder of runs, one of the authors' pickles or a CSV file. columns.py has the columns and units.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.authors_pickle import read_pickle
from analysis.columns import ROW_COLUMNS, RUN_COLUMNS, TEXT_COLUMNS, LogError
from analysis.mapping import read_curves, read_frame

METADATA_KEY = b'supercollapse'  # of what `write_parquet` says about the origin of a log
CONFIGURATION = [c for c in RUN_COLUMNS if c not in ('run', 'tag', 'state', 'revision', 'device', 'seconds')]


def load(path):
    """The table of a log: a .parquet, a folder of runs, an authors' pickle (.pkl), or loss curves in a .csv.

    All runs are kept, also unfinished and repeated ones; `clean` removes them. Raises LogError.
    """
    path = Path(path)
    if not path.exists():
        raise LogError(f'{path}: no such file or folder; give a .parquet, .pkl or .csv log, or a folder of runs')
    readers = {'.parquet': read_frame, '.pkl': read_pickle, '.pickle': read_pickle, '.csv': read_curves}
    read = read_runs if path.is_dir() else readers.get(path.suffix)
    if read is None:
        raise LogError(f'{path}: unknown kind of log {path.suffix!r}; wanted .parquet, .pkl, .csv or a folder of runs')
    table = read(path)
    if not len(table):
        raise LogError(f'{path}: the log holds no evaluations')
    return tidy(table)


def tidy(table):
    """The table with known columns first, numbers as float64 and text as str or None.

    compute = 6·tokens·num_params (Kaplan et al. 2020; Qiu et al. 2025 §2.2), so tokens or compute is filled in from the other.
    """
    table = table.reset_index(drop=True)
    if missing := [column for column in ('run', 'test_loss') if column not in table]:
        raise LogError(f'the log has no column {" and no column ".join(missing)}; it has {", ".join(map(str, table.columns))}')
    known = [c for c in RUN_COLUMNS + ROW_COLUMNS if c in table]
    for column in known:
        if column in TEXT_COLUMNS:
            table[column] = table[column].astype(object).where(table[column].notna(), None)
        else:
            try:
                table[column] = pd.to_numeric(table[column]).astype(float)
            except (ValueError, TypeError) as error:
                raise LogError(f'column {column!r} should hold numbers: {error}') from None
    known = table.dropna(subset='num_params') if 'num_params' in table else table[:0].assign(num_params=0.0)
    for run, sizes in known.groupby('run')['num_params'].unique().items():
        if len(sizes) > 1:
            raise LogError(f'run {run!r} has {len(sizes)} values of p ({sizes[0]:g}, {sizes[1]:g}, …), so it is more than one run; '
                           'give a column run that tells them apart, or save a log with  python save_logs.py … --map run=COLUMN')
    flops_per_token = 6 * table.get('num_params', np.nan)
    if 'tokens' in table:
        compute = flops_per_token * table['tokens']
        table['compute'] = table['compute'].fillna(compute) if 'compute' in table else compute
    if 'compute' in table:
        tokens = table['compute'] / flops_per_token
        table['tokens'] = table['tokens'].fillna(tokens) if 'tokens' in table else tokens
    known = [c for c in RUN_COLUMNS + ROW_COLUMNS if c in table]
    return table[known + [c for c in table.columns if c not in known]]


def write_whole(path, write):
    """Write a file by write(temporary path), then give it its name, so that no reader sees a part of it. Folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.stem}.tmp{path.suffix}')  # its ending says in which format a figure is saved
    write(temporary)
    temporary.replace(path)


def write_parquet(table, path, **origin):
    """Write the table, with `origin` (source, tags, …) in the file's metadata. The same table gives the same bytes."""
    import pyarrow
    import pyarrow.parquet as pq
    arrow = pyarrow.Table.from_pandas(table, preserve_index=False)
    arrow = arrow.replace_schema_metadata({METADATA_KEY: json.dumps(origin, sort_keys=True).encode()})
    write_whole(path, lambda temporary: pq.write_table(arrow, temporary, compression='zstd'))


def from_run(run, config, rows, summary):
    """The table of one run. `config` is nested or has dotted keys; `rows` is a list of {name: value}, one an evaluation.

    `opt_compute` is set where the configuration gave the horizon by scale and exponent or by token_per_param: such a run ends at
    its C*. The C* of a run that was given T is not known.
    """
    settings = pd.json_normalize(config).iloc[0].to_dict() if config else {}
    known = {key.split('.')[-1]: value for key, value in settings.items() if value is not None}  # model.D is the column D
    known |= {column: known[key] for column, key in (('tag', 'wandb_tag'), ('peak_lr', 'lr')) if key in known}
    known['optimizer'] = settings.get('opt.name')
    known = {key: summary[key] for key in ('revision', 'device') if key in summary} | known  # W&B has them in the summary
    values = {column: known.get(column) for column in RUN_COLUMNS}
    values |= {'run': run, 'state': summary.get('state', 'unfinished')}
    if summary.get('wall_seconds') is not None:
        values['seconds'] = summary['wall_seconds'] / summary.get('seeds_together', 1)
    horizon_set = 'token_per_param' in known or {'scale', 'exponent'} <= set(known)
    if horizon_set and values['T'] and values['num_params']:  # `compute` counts whole steps; older runs do not have it
        values['opt_compute'] = known.get('compute') or 6.0 * float(values['num_params']) * float(values['T'])
    history = pd.DataFrame(rows)
    return history[[c for c in ROW_COLUMNS if c in history]].assign(**values)


def read_runs(folder):
    """The table of every run below `folder`. A run is a folder with config.yaml, history.jsonl and, at its end, summary.json."""
    import yaml
    frames = []
    for history in sorted(folder.rglob('history.jsonl')):
        rows = []
        lines = history.read_text().splitlines()
        for number, line in enumerate(lines, 1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                if number < len(lines):  # a kill can cut the last line only
                    raise LogError(f'{history}:{number}: not a line of JSON ({error})') from None
        config, summary = history.with_name('config.yaml'), history.with_name('summary.json')
        if not config.exists():
            raise LogError(f'{config}: missing; a run is a folder with config.yaml and history.jsonl')
        if rows:
            name = str(history.parent.relative_to(folder)) if history.parent != folder else folder.name
            frames.append(from_run(name, yaml.safe_load(config.read_text()), rows,
                                   json.loads(summary.read_text()) if summary.exists() else {}))
    if not frames:
        raise LogError(f'{folder}: no run with an evaluation below this folder (looked for history.jsonl)')
    return pd.concat(frames)


def require(table, columns, purpose):
    """Raises LogError if the table lacks a column that `purpose` needs, or has no value in it."""
    missing = [c for c in columns if c not in table or table[c].isna().all()]
    if missing:
        missing = ['p (column num_params)' if column == 'num_params' else column for column in missing]
        raise LogError(f'{purpose} needs {", ".join(missing)}, which the log does not have; '
                       f'it has {", ".join(c for c in table.columns if table[c].notna().any())}')


def runs(table):
    """One row a run, indexed by run: the columns of the run and those of its last evaluation."""
    return table.groupby('run', sort=False).tail(1).set_index('run')


def where(table, *conditions):
    """The rows that meet every condition 'COLUMN=VALUE'. LogError if one has another form or no row meets it."""
    for condition in conditions:
        column, equals, value = condition.partition('=')
        if not equals or column not in table:
            raise LogError(f'{condition!r}: wanted COLUMN=VALUE with a column of {", ".join(table.columns)}')
        try:
            value = float(value) if pd.api.types.is_numeric_dtype(table[column]) else value
        except ValueError:
            raise LogError(f'{condition!r}: {column} is a number') from None
        found = sorted(table[column].dropna().unique())
        if value not in found:
            raise LogError(f'no run with {condition}; the log has {column} {", ".join(map(str, found))}')
        table = table[table[column] == value]
    return table


def between_widths(table, lowest=None, highest=None):
    """Rows of the models with lowest <= D <= highest (None: no bound). LogError if there are none."""
    if lowest is None and highest is None:
        return table
    require(table, ['D'], 'choosing by width')
    kept = table[table['D'].between(lowest or 0, highest or np.inf)]
    if not len(kept):
        raise LogError(f'no model with a width from {lowest or 0} to {highest or "any"}; the log has '
                       f'{sorted(table["D"].dropna().astype(int).unique().tolist())}')
    return kept


def drop_duplicates(table):
    """(table without repeated runs, number of runs removed).

    A repeated run has the same configuration and exactly the same losses. The authors' mlp.pkl holds 16 of them.
    """
    losses = table.groupby('run', sort=False)['test_loss'].agg(lambda loss: loss.to_numpy().tobytes())
    copies = runs(table).assign(losses=losses).duplicated(['losses', *(c for c in CONFIGURATION if c in table)])
    return table[~table['run'].isin(copies.index[copies])], int(copies.sum())


def clean(table):
    """(table fit for the analysis, notes on what was left out, number of duplicates removed).

    A run is left out if it is not finished, becomes non-finite before its end, ends above its first loss, or ends more than 1%
    before its horizon. The horizon is C* where it is known, else 6·p·T, else the longest run of the same configuration.
    Of the other runs, evaluations without a finite positive loss are left out. Raises LogError if nothing is left.
    """
    notes = []
    if 'state' in table:
        ended = table['state'].isna() | (table['state'] == 'finished')
        notes += [f'{rows["run"].nunique()} {state} runs left out: {_names(rows["run"])}'
                  for state, rows in table[~ended].groupby('state')]
        table = table[ended]
        if not len(table):
            raise LogError(f'no finished run in the log: {"; ".join(notes)}')
    if 'step' in table:
        table = table.iloc[np.lexsort([table['step'], pd.factorize(table['run'])[0]])]  # by step, in the order of the runs
        again = table.duplicated(['run', 'step'], keep='last') & table['step'].notna()
        if again.any():
            notes.append(f'{again.sum()} evaluations were logged twice at one step; the last one is kept')
        table = table[~again]
    short = table['run'].isin(_cut_short(table))
    if short.any():
        names = table['run'][short]
        notes.append(f'{names.nunique()} runs end before their horizon or diverged, left out: {_names(names)}')
    table = table[~short]
    finite = np.isfinite(table['test_loss']) & (table['test_loss'] > 0)
    if {'compute', 'num_params'} <= set(table):
        finite &= np.isfinite(table['compute']) | table['num_params'].isna()
    if not finite.all():
        notes.append(f'{(~finite).sum()} evaluations without a finite positive loss left out, in {_names(table["run"][~finite])}')
    table = table[finite]
    table, copies = drop_duplicates(table)
    if copies:
        notes.append(f'{copies} runs are in the log twice with the same losses; kept once')
    if 'seed' in table:
        twins = runs(table).dropna(subset=['seed']).duplicated([c for c in CONFIGURATION if c in table]).sum()
        if twins:
            notes.append(f'{twins} runs have the configuration and seed of another run but other losses; all are kept')
    if not len(table):
        raise LogError('no finished run with a finite loss is left in the log' + (f' ({"; ".join(notes)})' if notes else ''))
    return table, notes, copies


def _names(names):
    names = sorted(set(names))
    return ', '.join(names[:3]) + (f' and {len(names) - 3} more' if len(names) > 3 else '')


def _cut_short(table):
    """Names of the runs that do not reach their horizon with a finite loss, or end above their first loss."""
    axis = next((c for c in ('compute', 'tokens', 'step') if c in table and table[c].notna().any()), None)
    if axis is None:
        raise LogError('the log has none of compute, tokens and step')
    finite = table[np.isfinite(table['test_loss'])].groupby('run')
    ends = runs(table).assign(
        end=table.groupby('run')[axis].max(), evaluations=table.groupby('run').size(),
        finite_end=finite[axis].max(), first=finite['test_loss'].first(), last=finite['test_loss'].last())
    same = [c for c in CONFIGURATION if c in ends and c != 'seed']
    horizon = ends.groupby(same, dropna=False)['end'].transform('max') if same else ends['end']
    if axis == 'compute':
        known = ends.reindex(columns=['num_params', 'T', 'B', 'L', 'opt_compute'])  # NaN where the log has no such column
        tokens = known['T'] - known['T'] % (known['B'] * known['L']).fillna(1)      # of whole steps
        horizon = np.fmin(known['opt_compute'], (6 * known['num_params'] * tokens).fillna(horizon))  # fmin ignores NaN
    short = (ends['finite_end'] < 0.99 * horizon) | ends['finite_end'].isna()
    return ends.index[short | (ends['last'] > ends['first']) & (ends['evaluations'] > 2)]
