"""Loss curves under foreign names, from W&B or a file, as tables with the columns of a log.

A map is {column: expression}, and an expression a product of factors such as `a * b / c`. A factor is a number, config:KEY,
summary:KEY, history:KEY or constant:TEXT. A plain KEY is a column of the history. {run: number} gives each run its own.
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import yaml
from scipy.signal import savgol_filter

from analysis.columns import ROW_COLUMNS, RUN_COLUMNS, TEXT_COLUMNS, LogError, hint

PRESETS = {path.stem: path for path in (Path(__file__).parent.parent / 'configs/log_maps').glob('*.yaml')}
ALIASES = {'p': 'num_params', 'params': 'num_params', 'loss': 'test_loss', 'flops': 'compute', 'width': 'D'}
USER_NAMES = {'num_params': 'p', 'test_loss': 'loss'}  # in messages


class MapError(LogError):
    """A run does not have what a map asks for."""


class Map(NamedTuple):
    expressions: dict         # {column: expression}
    optional: set             # the columns that only presets ask for: a run may lack them
    window: float = None      # tokens, or below 1 a share of the run: test_loss is the training loss averaged over it


def parse(arguments, window=None):
    """The Map of COLUMN=EXPRESSION, FILE.yaml and names of presets. Later ones replace earlier ones. Raises LogError."""
    found = Map({}, set(), window)
    for argument in arguments:
        name, single, text = argument.partition('=')
        path = PRESETS.get(argument, Path(argument))
        if not single and not path.exists():
            raise LogError(f'--map {argument}: no such map{hint(argument, PRESETS)}')
        given = {name: text} if single else yaml.safe_load(path.read_text())
        if not isinstance(given, dict):
            raise LogError(f'--map {argument}: wanted lines `column: expression`')
        for name, expression in given.items():
            column = ALIASES.get(name, name)
            if column not in RUN_COLUMNS + ROW_COLUMNS and not str(name).startswith('loss.'):
                known = (*ALIASES, *RUN_COLUMNS, *ROW_COLUMNS, 'loss.NAME')
                raise LogError(f'--map {name}: a log has no such column{hint(name, known)}')
            found.expressions[column] = expression
            (found.optional.add if argument in PRESETS else found.optional.discard)(column)
    return found


def value(column, expression, run, sources):
    """A number, a text, or a Series over the history: the value of an expression for one run.

    sources has the 'config' and 'summary' of the run as dicts, and its 'history' as a DataFrame. Raises KeyError, with a line for
    the user, if the run lacks a key, and MapError for a text where a number is wanted.
    """
    if isinstance(expression, dict):
        sources, expression = {'map': expression}, f'map:{run}'
    result, parts = 1.0, ['*', *re.split(r'\s*(\*|(?<=\s)/(?=\s))\s*', str(expression).strip())]  # a key may hold a plain slash
    for operator, text in zip(parts[::2], parts[1::2], strict=True):
        source, _, key = text.partition(':')
        if source == 'constant':
            return key
        try:
            factor = float(text)
        except ValueError:
            source, key = (source, key) if source in sources and key else ('history', text)
            if key not in sources[source]:
                name = USER_NAMES.get(column, column)
                raise KeyError(f'--map {name}: run {run} has no {source} key {key!r}{hint(key, sources[source])}') from None
            factor = sources[source][key]
        if column in TEXT_COLUMNS:
            return factor
        try:
            factor = pd.to_numeric(factor)
            result = result * factor if operator == '*' else result / factor
        except (ValueError, TypeError):
            raise MapError(f'--map {column}: run {run} has {factor!r} for {text}; wanted a number') from None
    return result


def apply(how, run, history, config=None, summary=None):
    """The table of one run: a row for each evaluation, with the columns of the Map `how` in the units of columns.py.

    history is a DataFrame with a row for each logged step; config and summary are those of a W&B run. Without a config the history
    comes from a file, and its other columns are kept. Tokens that are not mapped are step·B·L. Raises MapError.
    """
    loss = 'train_loss' if how.window else 'test_loss'
    table, lacking = _mapped(how, run, history, config, summary)
    if not {'tokens', 'compute'} & set(table) and {'step', 'B'} <= set(table):
        table['tokens'] = table['step'] * table['B'] * table.get('L', 1)
    named = [column for column in table if str(column).startswith('loss.')]
    if named and 'test_loss' not in table:
        table['test_loss'] = table[named[0]]
    _check_complete(how, run, table, loss, lacking, history)
    table = _interpolate(table)
    if 'tokens' in how.expressions and (table.get('tokens', 0) < 0).any():
        raise MapError(f'--map tokens={how.expressions["tokens"]}: run {run} has {table["tokens"].min():g}; give other keys')
    if 'lr' in table and 'peak_lr' not in table:
        table['peak_lr'] = table['lr'].max()
    rows, axis = table[table[loss].notna()], next(column for column in ('tokens', 'compute', 'step') if column in table)
    if how.window:
        rows = smooth(rows, how.window)
    if len(rows) and table[axis].max() > 1.01 * rows[axis].max():  # diverged or not evaluated to its end: `clean` leaves it out
        rows = pd.concat([rows, table.iloc[[table[axis].argmax()]].assign(test_loss=np.nan)])
    return rows.assign(run=str(run)).reset_index(drop=True)


def _mapped(how, run, history, config, summary):
    """(table with a row for each logged step and the mapped columns, {column: why the run lacks it}).

    A column of the run has its last value everywhere.
    """
    if config is None:
        table = history.rename(columns={old: new for old, new in ALIASES.items() if new not in history}).copy()
    else:
        table = pd.DataFrame(index=history.index)
    flat = pd.json_normalize(config).iloc[0].to_dict() if config else {}
    sources, lacking = {'config': flat, 'summary': summary or {}, 'history': history}, {}
    for column, expression in how.expressions.items():
        try:
            table[column] = value(column, expression, run, sources)
        except KeyError as error:
            lacking[column] = error.args[0]
            continue
        known = table[column].dropna()
        if column in RUN_COLUMNS and len(known) and (column != 'num_params' or known.nunique() == 1):  # tidy refuses several p
            table[column] = known.iloc[-1]
    return table, lacking


def _check_complete(how, run, table, loss, lacking, history):
    """Raises MapError with all the columns that the map asks for or the analysis needs, and the table does not have."""
    needed = [loss] + ['num_params'] * bool(how.expressions)
    if (how.window or 0) >= 1 or not {'tokens', 'compute', 'step'} & set(table):
        needed.append('tokens')
    absent = [column for column in needed if column not in table]
    reasons = [reason for column, reason in lacking.items() if column not in how.optional or column in absent]
    if unmapped := [USER_NAMES.get(column, column) for column in absent if column not in lacking]:
        how_to = 'give' if how.expressions else 'for other names save a log with  python save_logs.py --files FILE'
        reasons.append(f'run {run}: no {" and no ".join(unmapped)}; wanted p, tokens (or compute, or step) and loss; {how_to} '
                       + ' '.join(f'--map {name}=KEY' for name in unmapped) + hint(unmapped[0], history))
    if reasons:
        smoothed = '; for the training loss add --smooth, e.g. 0.02' if 'test_loss' in absent and 'train_loss' in table else ''
        raise MapError('; '.join(reasons) + smoothed)


def _interpolate(table):
    """The table, indexed by step, with tokens, compute, lr and tau also where they were logged at other steps than the loss."""
    if 'step' in table and table['step'].notna().all():
        table = table.set_index('step', drop=False)
    for column in {'tokens', 'compute', 'lr', 'tau'} & set(table):
        known = table[column].dropna().sort_index()
        if 0 < len(known) < len(table):
            table[column] = np.interp(table.index, known.index, known, np.nan, np.nan)
    return table


def smooth(rows, window):
    """The rows with test_loss: the mean of the evenly logged training loss over `window` tokens, or below 1 a share of the run.

    In the last half window it is a straight line fitted to one window, so that the final loss does not lag. The rows before one
    whole window are left out, because the loss falls fast there.
    """
    points = round(window * len(rows) if window < 1 else window / rows['tokens'].diff().median()) // 2 * 2 + 1
    if not 3 <= points < len(rows):
        raise MapError(f'--smooth {window:g}: these are {points} of {len(rows)} logged training losses; wanted 3 or more, not all')
    return rows.assign(test_loss=savgol_filter(rows['train_loss'], points, 1))[points:]


def read_frame(path):
    """The columns of a .csv or .parquet, or of the lines `step:1/100 val_loss:2.3` of a .txt. Raises LogError."""
    try:
        if path.suffix == '.txt':
            lines = [re.findall(r'(\w+):([\d.]+)', line) for line in path.read_text().splitlines() if line.startswith('step:')]
            return pd.DataFrame([dict(line) for line in lines]).apply(pd.to_numeric)
        return (pd.read_parquet if path.suffix == '.parquet' else pd.read_csv)(path)
    except (ValueError, OSError) as error:  # the errors of pandas' parsers are ValueErrors
        raise LogError(f'{path}: not a readable {path.suffix[1:]} file ({str(error).splitlines()[0]})') from None


def read_curves(path, how=None):
    """The table of the loss curves in a file. Its column `run` tells the runs apart; without it the file is one run."""
    how, raw = how or Map({}, set()), read_frame(path)
    name = str(how.expressions.get('run', 'run')).removeprefix('history:')
    runs = raw.groupby(raw[name].astype(str) if name in raw else np.full(len(raw), path.stem), sort=False)
    # A file without rows has no run; `load` then says so.
    return pd.concat([apply(how, run, rows) for run, rows in runs] or [raw.assign(run=None, test_loss=None)])
