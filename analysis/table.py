"""The log format: one tidy table, whatever it came from (parquet, a runs/ folder, an authors' pickle, a CSV).

One row an evaluation. Columns that belong to a run are repeated on its rows; a value that is not known is missing
(NaN), never a stand-in. Units are raw: tokens, FLOPs, and the loss as it was trained on (nats, or ½·squared error).
What the curves mean is left to the other modules; they ask this one for a clean table.
"""

import io
import json
import pickle
from pathlib import Path

import numpy as np
import pandas as pd

# Columns of a run, in the order they are written. `peak_lr` is the base learning rate (opt.lr), `lr` below the rate at
# an evaluation; `opt_compute` the compute-optimal FLOPs C* of the run's model, where the log knows it; `seconds` the
# run's share of the wall time of the process that trained it, with the source's `revision` and the `device`.
RUN_COLUMNS = ('run', 'tag', 'state', 'D', 'N', 'L', 'V', 'B', 'peak_lr', 'schedule', 'decay_frac', 'seed', 'T',
               'num_params', 'scale', 'exponent', 'match_mup_at_D', 'opt_compute', 'revision', 'device', 'seconds')
ROW_COLUMNS = ('step', 'tokens', 'compute', 'tau', 'lr', 'test_loss', 'train_loss', 'Bgvar', 'Buvar', 'gvar', 'uvar',
               'g2_mean', 'u2_mean', 'gmean2', 'umean2', 'h', 'f', 'dh', 'df', 'residual', 'p_value', 'forecast',
               'forecast_lo90', 'forecast_hi90')
TEXT_COLUMNS = ('run', 'tag', 'state', 'schedule', 'revision', 'device')
PETA = 1e15  # the authors' logs count compute in units of 1e15 FLOPs

METADATA_KEY = b'supercollapse'


class LogError(ValueError):
    """A log that cannot be read or cannot carry the analysis asked for; the message is one line for the user."""


# ---- reading --------------------------------------------------------------------------------------------------------


def load(path):
    """The tidy table of a log: ours (.parquet), a folder of runs, an authors' pickle (.pkl) or loss curves in a .csv.

    Nothing is dropped here, also not runs that were interrupted or appear twice: `clean` does that and says so.
    `table.attrs['source']` says where the rows came from. Raises LogError with one line that names the file.
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
    """Known columns first and in order, numbers as float64, text as str or None; tokens and compute fill each other in.

    compute = 6·tokens·num_params (Kaplan et al. 2020; Qiu et al. 2025 §2.2), so either gives the other.
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
    """(table, what produced it) of a file written by `write_parquet`."""
    import pyarrow
    import pyarrow.parquet as pq
    try:
        arrow = pq.read_table(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise LogError(f'{path}: not a readable parquet file ({str(error).splitlines()[0]})') from None
    metadata = json.loads((arrow.schema.metadata or {}).get(METADATA_KEY, b'{}'))
    return arrow.to_pandas(), metadata.get('source', 'parquet')


def write_parquet(table, path, **produced_by):
    """Write the table with `produced_by` (what made it: source, tags, …) in the file's metadata.

    Through a temporary name, so that a reader never sees half a file; the same table gives the same bytes.
    """
    import pyarrow
    import pyarrow.parquet as pq
    path = Path(path)
    arrow = pyarrow.Table.from_pandas(table, preserve_index=False)
    arrow = arrow.replace_schema_metadata({METADATA_KEY: json.dumps(produced_by, sort_keys=True).encode()})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + '.tmp')
    pq.write_table(arrow, temporary, compression='zstd')
    temporary.replace(path)


# Names under which a run's configuration may hold each column: dotted keys first, short ones where they are unique.
CONFIG_KEYS = {
    'tag': ('wandb_tag', 'tag'), 'D': ('model.D', 'D'), 'N': ('model.N', 'N'), 'L': ('model.L', 'L'),
    'V': ('model.V', 'V'), 'B': ('opt.B', 'B'), 'peak_lr': ('opt.lr', 'lr'), 'schedule': ('opt.schedule', 'schedule'),
    'decay_frac': ('opt.decay_frac', 'decay_frac'), 'seed': ('seed',), 'T': ('T',),
    'num_params': ('derived.num_params', 'num_params'), 'scale': ('scale',), 'exponent': ('exponent',),
    'match_mup_at_D': ('model.match_mup_at_D', 'match_mup_at_D'), 'revision': ('environment.revision',),
    'device': ('environment.device',),
}


def flatten(config, prefix=''):
    """{'model': {'D': 128}} -> {'model.D': 128}."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f'{prefix}{key}.')
        else:
            flat[f'{prefix}{key}'] = value
    return flat


def from_run(run, config, rows, summary):
    """The tidy rows of one run: `config` nested or dotted, `rows` a list of {name: value}, one an evaluation; see record.py.

    A run whose horizon was set by `scale` and `exponent` (or token_per_param) ends at its C*; one given T does not know it.
    """
    config = flatten(config)
    history = pd.DataFrame(rows)
    history = history[[c for c in ROW_COLUMNS if c in history]]
    values = {'run': run, 'state': summary.get('state', 'unfinished')}
    if summary.get('wall_seconds') is not None:
        values['seconds'] = summary['wall_seconds'] / summary.get('seeds_fused', 1)
    for column, keys in CONFIG_KEYS.items():
        values[column] = next((config[key] for key in keys if config.get(key) is not None), None)
    for column in ('revision', 'device'):  # W&B has them in the summary
        values[column] = values[column] or summary.get(column)
    horizon_set = config.get('token_per_param') is not None or (
        config.get('scale') is not None and config.get('exponent') is not None)
    if horizon_set and values['T'] and values['num_params']:  # of the steps there are, where the run says how many
        values['opt_compute'] = config.get('derived.compute') or 6.0 * float(values['num_params']) * float(values['T'])
    return history.assign(**values)


def read_runs(folder):
    """Rows of every run below `folder`: <run>/config.yaml, history.jsonl and, once it ended, summary.json."""
    import yaml
    frames = []
    for history in sorted(Path(folder).rglob('history.jsonl')):
        rows = []
        lines = history.read_text().splitlines()
        for number, line in enumerate(lines, 1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                if number < len(lines):  # only the last line can have been cut by a kill
                    raise LogError(f'{history}:{number}: not a line of JSON ({error})') from None
        config = history.with_name('config.yaml')
        if not config.exists():
            raise LogError(f'{config}: missing; a run is a folder with config.yaml and history.jsonl')
        summary = history.with_name('summary.json')
        ended = json.loads(summary.read_text()) if summary.exists() else {}
        if rows:
            name = str(history.parent.relative_to(folder)) if history.parent != Path(folder) else history.parent.name
            frames.append(from_run(name, yaml.safe_load(config.read_text()), rows, ended))
    if not frames:
        raise LogError(f'{folder}: no run with an evaluation below this folder (looked for history.jsonl)')
    return pd.concat(frames, ignore_index=True)


CSV_NAMES = {'p': 'num_params', 'params': 'num_params', 'loss': 'test_loss', 'flops': 'compute', 'width': 'D'}


def read_csv(path):
    """Somebody's own loss curves: columns run, p, tokens or compute (FLOPs), loss; optionally lr, seed, step, tau, …

    Any column of the tidy table may be given. Without `run` the file is one run; a peak rate is taken from `lr`.
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


# ---- the authors' pickles -------------------------------------------------------------------------------------------

# All that a pickled DataFrame of numbers and strings is made of, for pandas 1.5 to 3 and numpy 1 and 2. Everything else
# is refused before it is imported: a pickle is a program, and this is the whole of its vocabulary.
ADMITTED = {
    ('builtins', 'slice'),
    ('pandas.core.frame', 'DataFrame'), ('pandas.core.series', 'Series'), ('pandas', 'DataFrame'),
    ('pandas.core.internals.managers', 'BlockManager'), ('pandas.core.internals.managers', 'SingleBlockManager'),
    ('pandas._libs.internals', '_unpickle_block'),
    ('pandas.core.indexes.base', '_new_Index'), ('pandas.core.indexes.base', 'Index'), ('pandas', 'Index'),
    ('pandas.core.indexes.range', 'RangeIndex'), ('pandas', 'RangeIndex'),
    ('pandas.core.indexes.numeric', 'Int64Index'), ('pandas.core.indexes.numeric', 'Float64Index'),
    ('pandas.core.arrays.string_', 'StringDtype'), ('pandas', 'StringDtype'),
    ('pandas.core.arrays.string_', 'StringArray'), ('pandas.core.arrays.string_', 'StringArrayNumpySemantics'),
    ('pandas.arrays', 'StringArray'), ('pandas._libs.arrays', '__pyx_unpickle_NDArrayBacked'),
    ('numpy', 'ndarray'), ('numpy', 'dtype'), ('numpy.dtypes', 'StrDType'),
    ('numpy.core.multiarray', '_reconstruct'), ('numpy._core.multiarray', '_reconstruct'),
    ('numpy.core.multiarray', 'scalar'), ('numpy._core.multiarray', 'scalar'),
    ('numpy.core.numeric', '_frombuffer'), ('numpy._core.numeric', '_frombuffer'),
    # text as pandas 3 keeps it
    ('pandas.arrays', 'ArrowStringArray'), ('pyarrow.lib', '_restore_array'), ('pyarrow.lib', 'type_for_alias'),
    ('pyarrow.lib', 'py_buffer'), ('builtins', 'bytearray'),
}
RENAMED = {('pandas.core.indexes.numeric', 'Int64Index'): ('pandas', 'Index'),  # folded into Index in pandas 2
           ('pandas.core.indexes.numeric', 'Float64Index'): ('pandas', 'Index')}


class FrameUnpickler(pickle.Unpickler):
    """Unpickles data frames of numbers and text, and refuses any other constructor by name, without importing it."""

    def find_class(self, module, name):
        if (module, name) not in ADMITTED:
            raise LogError(f'refused: the pickle asks for {module}.{name}, which no saved log needs; nothing was executed')
        if name == '_restore_array':
            return _restore_checked
        module, name = RENAMED.get((module, name), (module, name))
        return super().find_class(module.replace('numpy.core.', 'numpy._core.'), name)


def _restore_checked(data):
    """An Arrow array from pickled buffers, checked before anyone reads it: offsets are trusted memory addresses."""
    import pyarrow
    array = pyarrow.lib._restore_array(data)
    array.validate(full=True)
    return array


# What the authors call a schedule in their figures' labels, by our names ('$1-x$' is in c5m.pkl).
SCHEDULE_LABELS = {'$1-x$': 'linear', '1-x': 'linear', '$1$': 'const', '1': 'const', 'constant': 'const',
                   '$1-x^2$': 'quadratic', '$(1-x)^2$': 'power'}


def read_pickle(path):
    """Rows of one of the authors' logs: a pickled DataFrame, a row a run, `history` a DataFrame in each.

    Compute there is in 1e15 FLOPs, the parameter count in num_params or P (-1 where unknown), C* in opt_C where known.
    Derived display columns (scaled_*, color) are left behind; -1 in a column of counts means missing.
    """
    path = Path(path)
    try:
        frame = FrameUnpickler(io.BytesIO(path.read_bytes())).load()
    except LogError as error:
        raise LogError(f'{path}: {error}') from None
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError, TypeError, ValueError,
            NotImplementedError, MemoryError, OverflowError) as error:  # what a truncated or foreign pickle raises
        raise LogError(f'{path}: not a readable pickle of a log ({type(error).__name__}: {error})') from None
    if not isinstance(frame, pd.DataFrame) or 'history' not in frame:
        raise LogError(f'{path}: holds {type(frame).__name__}, wanted a DataFrame with a column history, one row a run')
    frames = []
    for number, (_, row) in enumerate(frame.iterrows()):
        history = row['history']
        if not isinstance(history, pd.DataFrame):
            raise LogError(f'{path}: history of row {number} is {type(history).__name__}, wanted a DataFrame')
        missing = [c for c in ('compute', 'test_loss') if c not in history]
        if missing:
            raise LogError(f'{path}: history of row {number} has no {", ".join(missing)}; '
                           f'it has {", ".join(map(str, history.columns))}')
        counts = {c: row[c] for c in ('D', 'N', 'L', 'V', 'B', 'T', 'seed', 'decay_frac', 'num_params', 'P')
                  if c in row and pd.notna(row[c]) and row[c] != -1}
        p = counts.get('num_params', counts.get('P'))
        counts.pop('P', None)
        if p is None and 'tokens' in history:
            last = history.iloc[-1]
            p = round(last['compute'] * PETA / (6 * last['tokens']))
        if p is None:
            raise LogError(f'{path}: row {number} has neither num_params nor P, nor tokens to derive them from')
        known = [c for c in ROW_COLUMNS if c in history]
        rows = history[known].astype(float).assign(compute=history['compute'].astype(float) * PETA)
        values = {'run': f'{path.stem}-{number:03d}', 'tag': path.stem, **counts, 'num_params': p}
        if 'lr' in row:
            values['peak_lr'] = row['lr']
        if 'schedule' in row and isinstance(row['schedule'], str):
            values['schedule'] = SCHEDULE_LABELS.get(row['schedule'], row['schedule'])
        if 'opt_C' in row and row['opt_C'] > 0:
            values['opt_compute'] = row['opt_C'] * PETA
        frames.append(rows.assign(**values))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame({'run': [], 'test_loss': []})


# ---- asking and cleaning --------------------------------------------------------------------------------------------


def require(table, columns, purpose):
    """Raises LogError naming the columns that `purpose` needs and the table lacks (or holds no value of)."""
    missing = [c for c in columns if c not in table or table[c].isna().all()]
    if missing:
        raise LogError(f'{purpose} needs {", ".join(missing)}, which the log does not have; '
                       f'it has {", ".join(c for c in table.columns if table[c].notna().any())}')


def runs(table):
    """One row a run, indexed by run: the run's columns and the last evaluation's."""
    return table.groupby('run', sort=False).tail(1).set_index('run')


def select(table, **wanted):
    """Rows where every named column equals the value, e.g. select(t, schedule='const', D=512); LogError if none is left."""
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
    """`select` for a condition written 'COLUMN=VALUE', as on a command line. LogError if it does not read so."""
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
    """Rows of the models with lowest <= D <= highest (None: no bound)."""
    if lowest is None and highest is None:
        return table
    require(table, ['D'], 'choosing by width')
    kept = table[(table['D'] >= (lowest or 0)) & (table['D'] <= (highest or np.inf))]
    if not len(kept):
        widths = sorted(int(D) for D in table['D'].dropna().unique())
        raise LogError(f'no model with a width from {lowest or 0} to {highest or "any"}; the log has {widths}')
    return kept


def drop_duplicates(table):
    """(table without the second copy of any run, how many copies went).

    A copy has the same configuration and the same losses bit for bit; the authors' mlp.pkl holds 16 of them.
    """
    columns = [c for c in RUN_COLUMNS if c in table and c not in ('run', 'tag', 'state', 'revision', 'device', 'seconds')]
    seen, copies = set(), []
    for run, rows in table.groupby('run', sort=False):
        key = (repr(rows[columns].iloc[0].tolist()), rows['test_loss'].to_numpy().tobytes())
        copies += [run] if key in seen else []
        seen.add(key)
    return table[~table['run'].isin(copies)], len(copies)


def clean(table, keep_duplicates=False):
    """(table fit for analysis, notes: what was left out and why, duplicates dropped).

    Runs that are not finished, that turned non-finite before their end or stop short of it (by over 1% of the FLOPs of
    their C*, else of 6·p·T, else of the longest run of the same model and schedule), or end above the loss they began
    with, are left out whole. Of the rest, evaluations without a finite positive loss are left out.
    Raises LogError if nothing is left.
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
            notes.append(f'{again.sum()} evaluations logged twice at one step; the last one is kept')
            table = table[~again]
    short = _cut_short(table)
    finite = np.isfinite(table['test_loss']) & (table['test_loss'] > 0)
    if 'compute' in table:
        finite &= np.isfinite(table['compute']) | ~np.isfinite(table.get('num_params', np.nan))
    lost = table[~finite & ~table['run'].isin(short)]
    if len(lost):
        notes.append(f'{len(lost)} evaluations without a finite positive loss left out, in {_names(lost["run"])}')
    if short:
        notes.append(f'{len(short)} runs end short of their horizon or diverged, left out: {_names(short)}')
    table = table[finite & ~table['run'].isin(short)]
    copies = 0
    if not keep_duplicates:
        table, copies = drop_duplicates(table)
        if copies:
            notes.append(f'{copies} runs are in the log twice, bit for bit; kept once')
    if not len(table):
        raise LogError('no finished run with a finite loss is left in the log' + (f' ({"; ".join(notes)})' if notes else ''))
    same = [c for c in ('num_params', 'D', 'schedule', 'decay_frac', 'T', 'peak_lr', 'B', 'seed', 'match_mup_at_D', 'tag')
            if c in table]
    if 'seed' in table and not keep_duplicates:
        twins = runs(table).dropna(subset=['seed']).duplicated(same).sum()
        if twins:
            notes.append(f'{twins} runs share configuration and seed with another but not its losses; all are kept')
    table = table.copy()
    table.attrs = source
    return table, notes, copies


def _names(names, most=3):
    names = sorted(set(names))
    return ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')


def _increasing(table, column):
    """True if the column does not decrease within any run and the runs are contiguous."""
    same = (table['run'] == table['run'].shift()).to_numpy()
    contiguous = (~same).sum() == table['run'].nunique()
    return contiguous and bool((table[column].diff().to_numpy()[same] >= 0).all())


def _cut_short(table):
    """Runs that do not reach their horizon with a finite loss, or end above the loss they began with."""
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
            step = ends['B'] * ends['L'] if {'B', 'L'} <= set(ends) else pd.Series(1.0, ends.index)  # tokens an update
            planned = 6 * ends['num_params'] * (ends['T'] - ends['T'] % step.fillna(1))
            wanted = planned.where(planned.notna(), wanted)
        if 'opt_compute' in ends:
            wanted = np.fmin(ends['opt_compute'], wanted)  # NaN where unknown; C* is seldom a whole number of steps
    diverged = finite['test_loss'].last().reindex(reach.index) > finite['test_loss'].first().reindex(reach.index)
    return sorted(reach.index[(reached < 0.99 * wanted) | reached.isna() | (diverged & (by_run.size() > 2))])
