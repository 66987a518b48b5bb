"""Reads a log into one table with a row an evaluation, and cleans it for the analysis.

A log is a parquet file of ours, a folder of runs, one of the authors' pickles or a CSV file. columns.py has the columns and units.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.authors_pickle import read_pickle
from analysis.columns import ROW_COLUMNS, RUN_COLUMNS, TEXT_COLUMNS, LogError

METADATA_KEY = b'supercollapse'  # of what `write_parquet` says about the origin of a log


# ---- reading --------------------------------------------------------------------------------------------------------


def load(path):
    """The table of a log: a .parquet, a folder of runs, an authors' pickle (.pkl), or loss curves in a .csv.

    All runs are kept, also unfinished and repeated ones; `clean` removes them. `table.attrs['source']` says where the rows came
    from. Raises LogError.
    """
    path = Path(path)
    if not path.exists():
        raise LogError(f'{path}: no such file or folder; give a .parquet, .pkl or .csv log, or a folder of runs')
    if path.is_dir():
        table, source = read_runs(path), 'runs'
    elif path.suffix == '.parquet':
        table, source = read_parquet(path)
    elif path.suffix in ('.pkl', '.pickle'):
        table, source = read_pickle(path), 'authors'
    elif path.suffix == '.csv':
        table, source = read_csv(path), 'csv'
    else:
        raise LogError(f'{path}: unknown kind of log {path.suffix!r}; wanted .parquet, .pkl, .csv or a folder of runs')
    if not len(table):
        raise LogError(f'{path}: the log holds no evaluations')
    table = tidy(table)
    table.attrs = {'source': source, 'path': str(path)}
    return table


def tidy(table):
    """The table with known columns first, numbers as float64 and text as str or None.

    compute = 6·tokens·num_params (Kaplan et al. 2020; Qiu et al. 2025 §2.2), so tokens or compute is filled in from the other.
    """
    table = table.copy()
    for column in ('run', 'test_loss'):
        if column not in table:
            raise LogError(f'the log has no column {column!r}; it has {", ".join(map(str, table.columns))}')
    for column in table.columns:
        if column in TEXT_COLUMNS:
            table[column] = table[column].astype(object).where(table[column].notna(), None)
        elif column in RUN_COLUMNS + ROW_COLUMNS:
            try:
                table[column] = pd.to_numeric(table[column]).astype(float)
            except (ValueError, TypeError) as error:
                raise LogError(f'column {column!r} should hold numbers: {error}') from None
    p = table['num_params'] if 'num_params' in table else pd.Series(np.nan, table.index)
    for column, value in (('compute', lambda: 6 * p * table['tokens']), ('tokens', lambda: table['compute'] / (6 * p))):
        other = 'tokens' if column == 'compute' else 'compute'
        if column not in table and other in table:
            table[column] = value()
        elif column in table and other in table:
            table[column] = table[column].fillna(value())
    known = [c for c in RUN_COLUMNS + ROW_COLUMNS if c in table]
    return table[known + [c for c in table.columns if c not in known]].reset_index(drop=True)


def read_parquet(path):
    """(table, its source) of a file written by `write_parquet`."""
    import pyarrow
    import pyarrow.parquet as pq
    try:
        arrow = pq.read_table(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise LogError(f'{path}: not a readable parquet file ({str(error).splitlines()[0]})') from None
    metadata = json.loads((arrow.schema.metadata or {}).get(METADATA_KEY, b'{}'))
    return arrow.to_pandas(), metadata.get('source', 'parquet')


def write_parquet(table, path, **origin):
    """Write the table, with `origin` (source, tags, …) in the file's metadata.

    The file is written under a temporary name and renamed. The same table gives the same bytes.
    """
    import pyarrow
    import pyarrow.parquet as pq
    path = Path(path)
    arrow = pyarrow.Table.from_pandas(table, preserve_index=False)
    arrow = arrow.replace_schema_metadata({METADATA_KEY: json.dumps(origin, sort_keys=True).encode()})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + '.tmp')
    pq.write_table(arrow, temporary, compression='zstd')
    temporary.replace(path)


# Keys of a run's configuration that may hold each column. The first that is there counts: dotted keys, then W&B's short names.
CONFIG_KEYS = {
    'tag': ('wandb_tag', 'tag'), 'D': ('model.D', 'D'), 'N': ('model.N', 'N'), 'L': ('model.L', 'L'),
    'V': ('model.V', 'V'), 'B': ('opt.B', 'B'), 'peak_lr': ('opt.lr', 'lr'), 'schedule': ('opt.schedule', 'schedule'),
    'decay_frac': ('opt.decay_frac', 'decay_frac'), 'seed': ('seed',), 'T': ('T',),
    'num_params': ('derived.num_params', 'num_params'), 'scale': ('scale',), 'exponent': ('exponent',),
    'match_mup_at_D': ('model.match_mup_at_D', 'match_mup_at_D'), 'num_test_batches': ('derived.num_test_batches',),
    'revision': ('environment.revision',), 'device': ('environment.device',),
}


def from_run(run, config, rows, summary):
    """The table of one run. `config` is nested or has dotted keys; `rows` is a list of {name: value}, one an evaluation.

    `opt_compute` is set where the configuration gave the horizon by scale and exponent or by token_per_param: such a run ends at
    its C*. The C* of a run that was given T is not known.
    """
    config = pd.json_normalize(config).iloc[0].to_dict() if config else {}
    history = pd.DataFrame(rows)
    history = history[[c for c in ROW_COLUMNS if c in history]]
    values = {'run': run, 'state': summary.get('state', 'unfinished')}
    if summary.get('wall_seconds') is not None:
        values['seconds'] = summary['wall_seconds'] / summary.get('seeds_together', 1)
    for column, keys in CONFIG_KEYS.items():
        values[column] = next((config[key] for key in keys if config.get(key) is not None), None)
    for column in ('revision', 'device'):  # W&B has them in the summary
        values[column] = values[column] or summary.get(column)
    horizon_set = config.get('token_per_param') is not None or (
        config.get('scale') is not None and config.get('exponent') is not None)
    if horizon_set and values['T'] and values['num_params']:  # derived.compute counts whole steps; older runs do not have it
        values['opt_compute'] = config.get('derived.compute') or 6.0 * float(values['num_params']) * float(values['T'])
    return history.assign(**values)


def read_runs(folder):
    """The table of every run below `folder`. A run is a folder with config.yaml, history.jsonl and, at its end, summary.json."""
    import yaml
    frames = []
    for history in sorted(Path(folder).rglob('history.jsonl')):
        rows = []
        lines = history.read_text().splitlines()
        for number, line in enumerate(lines, 1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                if number < len(lines):  # a kill can cut the last line only
                    raise LogError(f'{history}:{number}: not a line of JSON ({error})') from None
        config = history.with_name('config.yaml')
        if not config.exists():
            raise LogError(f'{config}: missing; a run is a folder with config.yaml and history.jsonl')
        summary = history.with_name('summary.json')
        summary = json.loads(summary.read_text()) if summary.exists() else {}
        if rows:
            name = str(history.parent.relative_to(folder)) if history.parent != Path(folder) else history.parent.name
            frames.append(from_run(name, yaml.safe_load(config.read_text()), rows, summary))
    if not frames:
        raise LogError(f'{folder}: no run with an evaluation below this folder (looked for history.jsonl)')
    return pd.concat(frames, ignore_index=True)


CSV_NAMES = {'p': 'num_params', 'params': 'num_params', 'loss': 'test_loss', 'flops': 'compute', 'width': 'D'}


def read_csv(path):
    """The table of loss curves from elsewhere, with the columns run, p, tokens or compute, and loss.

    Any other column of a log may be there too. Without `run` the file is one run. Without `peak_lr` it is the largest `lr`.
    """
    try:
        table = pd.read_csv(path)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise LogError(f'{path}: not a readable CSV file ({str(error).splitlines()[0]})') from None
    table = table.rename(columns={old: new for old, new in CSV_NAMES.items() if old in table and new not in table})
    missing = [name for name, found in {
        'loss': 'test_loss' in table, 'tokens (or compute, or step)': {'tokens', 'compute', 'step'} & set(table.columns),
    }.items() if not found]
    if missing:
        raise LogError(f'{path}: no column {" and no ".join(missing)}; it has {", ".join(table.columns)}; '
                       'wanted run, p, tokens or compute, loss and optionally lr, seed')
    if 'run' not in table:
        table['run'] = Path(path).stem
    table['run'] = table['run'].astype(str)
    if 'lr' in table and 'peak_lr' not in table:
        table['peak_lr'] = table.groupby('run')['lr'].transform('max')
    return table


# ---- choosing runs --------------------------------------------------------------------------------------------------


def require(table, columns, purpose):
    """Raises LogError if the table lacks a column that `purpose` needs, or has no value in it."""
    missing = [c for c in columns if c not in table or table[c].isna().all()]
    if missing:
        raise LogError(f'{purpose} needs {", ".join(missing)}, which the log does not have; '
                       f'it has {", ".join(c for c in table.columns if table[c].notna().any())}')


def runs(table):
    """One row a run, indexed by run: the columns of the run and those of its last evaluation."""
    return table.groupby('run', sort=False).tail(1).set_index('run')


def select(table, **wanted):
    """Rows in which every named column has the value, e.g. select(t, schedule='const', D=512). LogError if there are none."""
    kept = table
    for column, value in wanted.items():
        require(table, [column], f'selecting {column}={value}')
        match = kept[column] == value
        if not match.any():
            found = sorted(kept[column].dropna().unique().tolist())
            raise LogError(f'no run with {column}={value}; the log has {column} {", ".join(map(str, found))}')
        kept = kept[match]
    return kept


def where(table, condition):
    """`select` for a condition 'COLUMN=VALUE' from the command line. LogError if it has another form."""
    column, equals, value = condition.partition('=')
    if not equals or column not in table:
        raise LogError(f'{condition!r}: wanted COLUMN=VALUE with a column of {", ".join(table.columns)}')
    if column not in TEXT_COLUMNS:
        try:
            value = float(value)
        except ValueError:
            raise LogError(f'{condition!r}: {column} is a number') from None
    return select(table, **{column: value})


def between_widths(table, lowest=None, highest=None):
    """Rows of the models with lowest <= D <= highest (None: no bound). LogError if there are none."""
    if lowest is None and highest is None:
        return table
    require(table, ['D'], 'choosing by width')
    kept = table[(table['D'] >= (lowest or 0)) & (table['D'] <= (highest or np.inf))]
    if not len(kept):
        widths = sorted(int(D) for D in table['D'].dropna().unique())
        raise LogError(f'no model with a width from {lowest or 0} to {highest or "any"}; the log has {widths}')
    return kept


# ---- cleaning -------------------------------------------------------------------------------------------------------


def drop_duplicates(table):
    """(table without repeated runs, number of runs removed).

    A repeated run has the same configuration and exactly the same losses. The authors' mlp.pkl holds 16 of them.
    """
    columns = [c for c in RUN_COLUMNS if c in table and c not in ('run', 'tag', 'state', 'revision', 'device', 'seconds')]
    seen, copies = set(), []
    for run, rows in table.groupby('run', sort=False):
        key = (repr(rows[columns].iloc[0].tolist()), rows['test_loss'].to_numpy().tobytes())
        copies += [run] if key in seen else []
        seen.add(key)
    return table[~table['run'].isin(copies)], len(copies)


def clean(table, keep_duplicates=False):
    """(table fit for the analysis, notes on what was left out, number of duplicates removed).

    A run is left out if it is not finished, becomes non-finite before its end, ends above its first loss, or ends more than 1%
    before its horizon. The horizon is C* where it is known, else 6·p·T, else the longest run of the same model and schedule.
    Of the other runs, evaluations without a finite positive loss are left out. Raises LogError if nothing is left.
    """
    notes = []
    source = dict(table.attrs)
    if 'state' in table:
        ended = table['state'].isna() | (table['state'] == 'finished')
        for state, rows in table[~ended].groupby('state'):
            notes.append(f'{rows["run"].nunique()} {state} runs left out: {_names(rows["run"])}')
        table = table[ended]
        if not len(table):
            raise LogError(f'no finished run in the log: {"; ".join(notes)}')
    if 'step' in table:
        table = table.sort_values(['run', 'step'], kind='stable') if not _increasing(table, 'step') else table
        again = table.duplicated(['run', 'step'], keep='last') & table['step'].notna()
        if again.any():
            notes.append(f'{again.sum()} evaluations were logged twice at one step; the last one is kept')
            table = table[~again]
    short = _cut_short(table)
    finite = np.isfinite(table['test_loss']) & (table['test_loss'] > 0)
    if 'compute' in table:
        finite &= np.isfinite(table['compute']) | ~np.isfinite(table.get('num_params', np.nan))
    lost = table[~finite & ~table['run'].isin(short)]
    if len(lost):
        notes.append(f'{len(lost)} evaluations without a finite positive loss left out, in {_names(lost["run"])}')
    if short:
        notes.append(f'{len(short)} runs end before their horizon or diverged, left out: {_names(short)}')
    table = table[finite & ~table['run'].isin(short)]
    copies = 0
    if not keep_duplicates:
        table, copies = drop_duplicates(table)
        if copies:
            notes.append(f'{copies} runs are in the log twice with the same losses; kept once')
    if not len(table):
        raise LogError('no finished run with a finite loss is left in the log' + (f' ({"; ".join(notes)})' if notes else ''))
    same = [c for c in ('num_params', 'D', 'schedule', 'decay_frac', 'T', 'peak_lr', 'B', 'seed', 'match_mup_at_D', 'tag')
            if c in table]
    if 'seed' in table and not keep_duplicates:
        twins = runs(table).dropna(subset=['seed']).duplicated(same).sum()
        if twins:
            notes.append(f'{twins} runs have the configuration and seed of another run but other losses; all are kept')
    table = table.copy()
    table.attrs = source
    return table, notes, copies


def _names(names, most=3):
    names = sorted(set(names))
    return ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')


def _increasing(table, column):
    """True if the column does not decrease within any run and the rows of each run are together."""
    same = (table['run'] == table['run'].shift()).to_numpy()
    contiguous = (~same).sum() == table['run'].nunique()
    return contiguous and bool((table[column].diff().to_numpy()[same] >= 0).all())


def _cut_short(table):
    """Names of the runs that do not reach their horizon with a finite loss, or end above their first loss."""
    axis = next((c for c in ('compute', 'tokens', 'step') if c in table and table[c].notna().any()), None)
    if axis is None:
        raise LogError('the log has none of compute, tokens and step')
    by_run = table.groupby('run', sort=False)
    ends = runs(table)
    reach = by_run[axis].max()
    finite = table[np.isfinite(table['test_loss'])].groupby('run', sort=False)
    reached = finite[axis].max().reindex(reach.index)
    key = [c for c in ('num_params', 'D', 'schedule', 'decay_frac', 'T', 'B', 'peak_lr', 'tag') if c in ends]
    wanted = reach.groupby([ends[c] for c in key], dropna=False).transform('max') if key else reach
    if axis == 'compute':
        if {'T', 'num_params'} <= set(ends):
            step = ends['B'] * ends['L'] if {'B', 'L'} <= set(ends) else pd.Series(1.0, ends.index)  # tokens in a step
            planned = 6 * ends['num_params'] * (ends['T'] - ends['T'] % step.fillna(1))
            wanted = planned.where(planned.notna(), wanted)
        if 'opt_compute' in ends:
            wanted = np.fmin(ends['opt_compute'], wanted)  # fmin ignores NaN; C* is seldom a whole number of steps
    diverged = finite['test_loss'].last().reindex(reach.index) > finite['test_loss'].first().reindex(reach.index)
    return sorted(reach.index[(reached < 0.99 * wanted) | reached.isna() | (diverged & (by_run.size() > 2))])
