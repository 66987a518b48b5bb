"""The curves that schedule laws are fitted to: one run's (step, lr, loss), from .csv files or from a log.

Between evaluations the learning rate is divided into cells of constant rate, so that sums over all steps become sums over cells.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from analysis import table as logs
from analysis.table import LogError, require, runs

MAX_CELLS_PER_EVALUATION = 8
CELLS_PER_CURVE = 1600   # roughly, if the evaluations allow it
WARMUP_CELLS = 200       # with much coarser cells the published fit of the Multi-Power Law stops at another iteration
MIN_EVALUATIONS = 10


class Curve(NamedTuple):
    """One run: n evaluations, and K cells of constant learning rate."""
    name: str
    step: np.ndarray  # [n] updates done
    lr: np.ndarray    # [n] rate at the evaluation
    loss: np.ndarray  # [n] nats
    rate: np.ndarray  # [K] of each cell
    edge: np.ndarray  # [K+1] gradient-flow time τ at the cells' ends, from 0 at the start of the warm-up
    row: np.ndarray   # [n] index of the edge at which each evaluation lies

    @property
    def tau(self):    # [n]
        return self.edge[self.row]


def make_curve(name, step, lr, loss, warmup=0):
    """The Curve of evaluations [n] at increasing steps.

    During the first `warmup` steps the rate rises linearly from 0, then it has the value of the first evaluation until there.
    Between two evaluations it is linear. But a change between two stretches of constant rate is a jump, at the later evaluation.
    Raises LogError if fewer than ten evaluations follow the warm-up or a number is out of range.
    """
    step, lr, loss = (np.asarray(values, float) for values in (step, lr, loss))
    kept = step >= max(warmup, 1)
    step, lr, loss = step[kept], lr[kept], loss[kept]
    if len(step) < MIN_EVALUATIONS:
        raise LogError(f'{name}: {len(step)} evaluations after the warm-up of {warmup:g} steps; a schedule law needs ten or more')
    if not (np.diff(step) > 0).all() or not (loss > 0).all() or not (lr >= 0).all() or not lr[0] > 0:
        raise LogError(f'{name}: steps must increase, losses be positive and rates not negative, the first above 0')
    flat = np.abs(np.diff(lr)) <= 1e-6 * lr.max()
    jump = ~flat & np.append(True, flat[:-1]) & np.append(flat[1:], True)
    pieces = int(np.clip(CELLS_PER_CURVE // len(step), 1, MAX_CELLS_PER_EVALUATION))
    middle = (np.arange(pieces) + 0.5) / pieces   # of each cell, as a share of the way to the next evaluation
    before, change = np.append(lr[0], lr[:-1]), np.append(0, np.where(jump, 0, np.diff(lr)))
    rate, width = before[:, None] + change[:, None] * middle, np.diff(step, prepend=warmup)
    some = width > 0                              # the first evaluation may lie at the end of the warm-up
    rise = lr[0] * (np.arange(WARMUP_CELLS) + 0.5) / WARMUP_CELLS if warmup else np.zeros(0)
    rate = np.append(rise, rate[some])
    width = np.append(np.full(len(rise), warmup / WARMUP_CELLS), np.repeat(width[some] / pieces, pieces))
    return Curve(name, step, lr, loss, rate, np.append(0, np.cumsum(rate * width)), len(rise) + pieces * np.cumsum(some))


def read_csv(path, warmup=None, without=None):
    """{name: Curve} of a folder of .csv files (step, lr, loss), a curve each, or of one .csv file with a column `run` besides.

    Without `warmup`, everything before the first evaluation of any curve is taken to be a linear warm-up. The evaluation at step
    `without` is left out (24,000 in the published protocol for the curves of Luo et al.).
    """
    path = Path(path)
    tables = {file.stem: logs.load(file) for file in sorted(path.glob('*.csv'))}
    tables = tables or dict(list(logs.load(path).groupby('run', sort=False)))
    for name, rows in tables.items():
        require(rows, ['step', 'lr', 'test_loss'], f'the schedule curve {name}')
    warmup = min(rows['step'].min() for rows in tables.values()) if warmup is None else warmup
    tables = {name: rows[rows['step'] != without] for name, rows in tables.items()}
    return {name: make_curve(name, rows['step'], rows['lr'], rows['test_loss'], warmup) for name, rows in tables.items()}


def from_table(table, p=None):
    """({name: Curve}, notes) of one model in a log: a curve for each schedule, decay and horizon, the mean over its runs.

    Of several models, the one with the most curves is used unless p is given. A curve is named by its schedule and, if it decays
    over a part of the run only, that share: `linear`, `linear_0.2`. If there are several horizons, those other than the one with
    the most curves have their number of steps appended: `linear_1660`. The first 5% of the shortest run's steps are left out, as
    no power law holds there yet. A run with a `parent` branches off that run at its first evaluation: its rates up to there are
    those of the parent, and its losses begin there. Raises LogError if columns are missing or the model was trained with several
    batch sizes or peak rates.
    """
    require(table, ['step', 'lr', 'test_loss', 'schedule', 'num_params'], 'a schedule law')
    ends, notes = runs(table), []
    ends = ends.assign(parent=ends.get('parent'), decay=ends.get('decay_frac', pd.Series(1.0, ends.index)))
    ends['decay'] = ends['decay'].where(ends['schedule'] != 'const').fillna(1)
    kinds = ends[['num_params', 'schedule', 'decay', 'step']].drop_duplicates()
    if p is None and kinds['num_params'].nunique() > 1:
        p = kinds['num_params'].mode().max()
        others = ', '.join(f'{one:.0f}' for one in sorted(set(kinds['num_params']) - {p}))
        notes.append(f'the curves are of the model with {p:.0f} parameters, which has the most; for another, give --where '
                     f'num_params=… ({others})')
    ends = ends[ends['num_params'] == (p or ends['num_params'].iloc[0])]
    for column in ('B', 'peak_lr'):
        found = sorted(ends.loc[ends['parent'].isna(), column].dropna().unique()) if column in ends else []
        if len(found) > 1:
            raise LogError(f'a schedule law compares runs that differ in their schedule alone; the log has {column} '
                           f'{", ".join(f"{value:g}" for value in found)}: choose one with --where {column}=…')
    ends['several'] = ends.groupby(['schedule', 'decay'])['step'].transform('nunique') > 1
    horizon = ends[['schedule', 'decay', 'step']].drop_duplicates()['step'].mode().max()
    groups = ends.groupby([ends['several'] & (ends['step'] != horizon), ends['decay'] < 1, 'schedule', 'decay', 'step'], sort=False)
    curves, first_step, size = {}, 0.05 * ends['step'].min(), groups.size()
    for (other_horizon, partial, schedule, decay, steps), group in sorted(groups, key=lambda one: one[0][:2]):
        name = schedule + (f'_{decay:g}' if partial else '') + (f'_{steps:.0f}' if other_horizon else '')
        rows, branch = _mean(table, group.index, first_step), 0
        if group['parent'].notna().any():
            before = _mean(table, group['parent'].unique(), first_step)
            before = before[before['step'] < rows['step'].min()]
            rows, branch = pd.concat([before, rows]), len(before)
        one = make_curve(name, rows['step'], rows['lr'], rows['test_loss'])
        curves[name] = one._replace(**{field: getattr(one, field)[branch:] for field in ('step', 'lr', 'loss', 'row')})
    if size.max() > 1:
        notes.append(f'curves are means over the runs of a schedule ({size.min()} to {size.max()})')
    if ends['several'].any():
        notes.append(f'names without a number of steps are of runs with {horizon:.0f} steps, or the only ones of their schedule')
    return curves, notes


def _mean(table, names, first_step):
    """step, lr and test_loss, means over the runs `names`, at the steps from first_step on at which all of them were evaluated."""
    by_step = table[table['run'].isin(names) & (table['step'] >= first_step)].groupby('step')[['lr', 'test_loss']]
    return by_step.mean()[by_step.size() == len(names)].reset_index()
