"""Reads the authors' saved logs, which are pickled data frames, without running code that a pickle may hold.

The files are described in the authors' public repository: one row a run, and the loss curve as a data frame in `history`.
"""

import io
import pickle

import pandas as pd

from analysis.columns import PETA, ROW_COLUMNS, LogError

# The constructors in a pickled DataFrame of numbers and text, for pandas 1.5 to 3 and numpy 1 and 2. Loading a pickle calls
# the functions that it names, so any other name is refused before it is imported.
ALLOWED = {
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
    # text columns of pandas 3
    ('pandas.arrays', 'ArrowStringArray'), ('pyarrow.lib', '_restore_array'), ('pyarrow.lib', 'type_for_alias'),
    ('pyarrow.lib', 'py_buffer'), ('builtins', 'bytearray'),
}
RENAMED = {('pandas.core.indexes.numeric', 'Int64Index'): ('pandas', 'Index'),  # both became Index in pandas 2
           ('pandas.core.indexes.numeric', 'Float64Index'): ('pandas', 'Index')}

# Labels of schedules in the authors' figures (c5m.pkl has '$1-x$'), by our names.
SCHEDULE_LABELS = {'$1-x$': 'linear', '1-x': 'linear', '$1$': 'const', '1': 'const', 'constant': 'const',
                   '$1-x^2$': 'quadratic', '$(1-x)^2$': 'power'}

# T_eval of the authors' task configurations: test tokens of an evaluation, which are read in whole batches of B·L. The logs do
# not hold it. With the published batch sizes it gives 24 test batches for the MLP and 31 for CIFAR-5M and chess.
T_EVAL_MLP, T_EVAL_TRANSFORMER = 100_000, 2_048_000


class FrameUnpickler(pickle.Unpickler):
    """Loads data frames of numbers and text. Any other constructor raises LogError and is not imported."""

    def find_class(self, module, name):
        if (module, name) not in ALLOWED:
            raise LogError(f'refused: the pickle asks for {module}.{name}, which no saved log needs; nothing was executed')
        if name == '_restore_array':
            return _restore_checked
        module, name = RENAMED.get((module, name), (module, name))
        return super().find_class(module.replace('numpy.core.', 'numpy._core.'), name)


def _restore_checked(data):
    """An Arrow array from pickled buffers, validated: Arrow reads memory at the offsets that the buffers hold."""
    import pyarrow
    array = pyarrow.lib._restore_array(data)
    array.validate(full=True)
    return array


def load_frame(path):
    """The pickled DataFrame in the file. Raises LogError if it is anything else, or has no column `history`."""
    try:
        frame = FrameUnpickler(io.BytesIO(path.read_bytes())).load()
    except LogError as error:
        raise LogError(f'{path}: {error}') from None
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError, TypeError, ValueError,
            NotImplementedError, MemoryError, OverflowError) as error:  # raised for a truncated or foreign pickle
        raise LogError(f'{path}: not a readable pickle of a log ({type(error).__name__}: {error})') from None
    if not isinstance(frame, pd.DataFrame) or 'history' not in frame:
        raise LogError(f'{path}: holds {type(frame).__name__}, wanted a DataFrame with a column history, one row a run')
    return frame


def read_pickle(path):
    """Rows of one of the authors' logs, one an evaluation, in our columns and units.

    In the file, compute is in 1e15 FLOPs, the parameters are in num_params or P, C* is in opt_C, and -1 in a column of counts
    means that the value is missing. Columns for display (scaled_*, color) are left out. Raises LogError.
    """
    frame = load_frame(path)
    frames = []
    for number, (_, row) in enumerate(frame.iterrows()):
        history = row['history']
        if not isinstance(history, pd.DataFrame):
            raise LogError(f'{path}: history of row {number} is {type(history).__name__}, wanted a DataFrame')
        missing = [column for column in ('compute', 'test_loss') if column not in history]
        if missing:
            raise LogError(f'{path}: history of row {number} has no {", ".join(missing)}; '
                           f'it has {", ".join(map(str, history.columns))}')
        values = _run_values(row, history)
        if 'num_params' not in values:
            raise LogError(f'{path}: row {number} has neither num_params nor P, nor tokens to derive them from')
        rows = history[[column for column in ROW_COLUMNS if column in history]].astype(float)
        rows['compute'] *= PETA
        frames.append(rows.assign(run=f'{path.stem}-{number:03d}', tag=path.stem, **values))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame({'run': [], 'test_loss': []})


def _run_values(row, history):
    """{column: value} of one run, without the columns that are missing."""
    counts = ('D', 'N', 'L', 'V', 'B', 'T', 'seed', 'decay_frac', 'num_params', 'P')
    values = {column: row[column] for column in counts if column in row and pd.notna(row[column]) and row[column] != -1}
    p = values.pop('P', None)
    if 'num_params' not in values and p is not None:
        values['num_params'] = p
    if 'num_params' not in values and 'tokens' in history:
        last = history.iloc[-1]
        values['num_params'] = round(last['compute'] * PETA / (6 * last['tokens']))
    if 'lr' in row:
        values['peak_lr'] = row['lr']
    if 'schedule' in row and isinstance(row['schedule'], str):
        values['schedule'] = SCHEDULE_LABELS.get(row['schedule'], row['schedule'])
    if 'opt_C' in row and row['opt_C'] > 0:
        values['opt_compute'] = row['opt_C'] * PETA
    if 'Buvar' in history and {'B', 'L'} <= set(values):
        T_eval = T_EVAL_MLP if values['L'] == 1 else T_EVAL_TRANSFORMER
        values['num_test_batches'] = T_eval // (values['B'] * values['L'])
    return values
