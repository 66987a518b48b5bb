"""Reads the authors' saved logs, which are pickled data frames, without running code that a pickle may hold.

The files are described in the authors' public repository: one row a run, and the loss curve as a data frame in `history`.
"""

import io
import pickle

import numpy as np
import pandas as pd

from analysis.columns import PETA, ROW_COLUMNS, LogError

# The constructors in a pickled DataFrame of numbers and text, for pandas 1.5 to 3 and numpy 1 and 2. Loading a pickle calls
# the functions that it names, so any other name is refused before it is imported.
ALLOWED = set('''
    builtins.slice builtins.bytearray numpy.ndarray numpy.dtype numpy.dtypes.StrDType
    numpy.core.multiarray._reconstruct numpy.core.multiarray.scalar numpy.core.numeric._frombuffer
    numpy._core.multiarray._reconstruct numpy._core.multiarray.scalar numpy._core.numeric._frombuffer
    pandas.DataFrame pandas.core.frame.DataFrame pandas.core.series.Series pandas._libs.internals._unpickle_block
    pandas.core.internals.managers.BlockManager pandas.core.internals.managers.SingleBlockManager
    pandas.Index pandas.core.indexes.base.Index pandas.core.indexes.base._new_Index
    pandas.RangeIndex pandas.core.indexes.range.RangeIndex
    pandas.core.indexes.numeric.Int64Index pandas.core.indexes.numeric.Float64Index
    pandas.StringDtype pandas.core.arrays.string_.StringDtype pandas._libs.arrays.__pyx_unpickle_NDArrayBacked
    pandas.arrays.StringArray pandas.core.arrays.string_.StringArray pandas.core.arrays.string_.StringArrayNumpySemantics
    pandas.arrays.ArrowStringArray pyarrow.lib._restore_array pyarrow.lib.type_for_alias pyarrow.lib.py_buffer'''.split())
RENAMED = {'Int64Index': ('pandas', 'Index'), 'Float64Index': ('pandas', 'Index')}  # both became Index in pandas 2

# Labels of schedules in the authors' figures (c5m.pkl has '$1-x$'), by our names.
SCHEDULE_LABELS = {'$1-x$': 'linear', '1-x': 'linear', '$1$': 'const', '1': 'const', 'constant': 'const',
                   '$1-x^2$': 'quadratic', '$(1-x)^2$': 'power'}

# T_eval of the authors' task configurations: test tokens of an evaluation, which are read in whole batches of B·L. The logs do
# not hold it. With the published batch sizes it gives 24 test batches for the MLP and 31 for CIFAR-5M and chess.
T_EVAL_MLP, T_EVAL_TRANSFORMER = 100_000, 2_048_000


class FrameUnpickler(pickle.Unpickler):
    """Loads data frames of numbers and text. Any other constructor raises LogError and is not imported."""

    def find_class(self, module, name):
        if f'{module}.{name}' not in ALLOWED:
            raise LogError(f'refused: the pickle asks for {module}.{name}, which no saved log needs; nothing was executed')
        if name == '_restore_array':
            return _restore_checked
        module, name = RENAMED.get(name, (module, name))
        return super().find_class(module.replace('numpy.core.', 'numpy._core.'), name)


def _restore_checked(data):
    """An Arrow array from pickled buffers, validated: Arrow reads memory at the offsets that the buffers hold."""
    import pyarrow
    array = pyarrow.lib._restore_array(data)
    array.validate(full=True)
    return array


def load_frame(path):
    """The pickled DataFrame in the file. Raises LogError if it is anything else, or has no column `history` of DataFrames."""
    try:
        frame = FrameUnpickler(io.BytesIO(path.read_bytes())).load()
    except LogError as error:
        raise LogError(f'{path}: {error}') from None
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError, TypeError, ValueError,
            NotImplementedError, MemoryError, OverflowError) as error:  # raised for a truncated or foreign pickle
        raise LogError(f'{path}: not a readable pickle of a log ({type(error).__name__}: {error})') from None
    if not isinstance(frame, pd.DataFrame) or 'history' not in frame:
        raise LogError(f'{path}: holds {type(frame).__name__}, wanted a DataFrame with a column history, one row a run')
    for number, history in enumerate(frame['history']):
        if not isinstance(history, pd.DataFrame) or not {'compute', 'test_loss'} <= set(history):
            found = f'the columns {", ".join(map(str, history))}' if isinstance(history, pd.DataFrame) else type(history).__name__
            raise LogError(f'{path}: history of row {number} has {found}; wanted a DataFrame with compute and test_loss')
    return frame


def read_pickle(path):
    """Rows of one of the authors' logs, one an evaluation, in our columns and units.

    In the file, compute is in 1e15 FLOPs, the parameters are in num_params or P, C* is in opt_C, and -1 in a column of counts
    means that the value is missing. Columns for display (scaled_*, color) are left out. Raises LogError.
    """
    frame = load_frame(path)
    if not len(frame):
        return frame
    frame.index = [f'{path.stem}-{number:03d}' for number in range(len(frame))]
    rows = pd.concat([history.assign(run=run, compute=history['compute'] * PETA) for run, history in frame['history'].items()])
    rows = rows[['run', *(column for column in ROW_COLUMNS if column in rows)]]

    counts = frame.reindex(columns=['D', 'N', 'L', 'V', 'B', 'T', 'seed', 'decay_frac', 'num_params', 'P', 'opt_C'])
    runs = counts.mask(counts == -1).astype(float).assign(tag=path.stem)
    runs['opt_compute'] = runs.pop('opt_C') * PETA
    if 'lr' in frame:
        runs['peak_lr'] = frame['lr']
    if 'schedule' in frame:
        runs['schedule'] = frame['schedule'].map(lambda label: SCHEDULE_LABELS.get(label, label))
    runs['num_params'] = runs['num_params'].fillna(runs.pop('P'))
    if runs['num_params'].isna().any():
        raise LogError(f'{path}: a row has neither num_params nor P')
    if 'Buvar' in rows:
        T_eval = np.where(runs['L'] == 1, T_EVAL_MLP, T_EVAL_TRANSFORMER)
        runs['num_test_batches'] = T_eval // (runs['B'] * runs['L'])
    return rows.merge(runs.dropna(axis=1, how='all'), left_on='run', right_index=True)
