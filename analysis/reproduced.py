"""Compares a run of ours with the published seeds of the same model, at equal compute: the loss, and ℓ of eq. 1."""

import pandas as pd

from analysis import collapse, scaling_law
from analysis.table import LogError, runs, where


def same_model(table, published):
    """The published runs with the model and schedule of the table. Raises LogError if there are none, or if the horizons differ."""
    end = runs(table).iloc[0]
    if table['num_params'].nunique() > 1:
        raise LogError(f'one model is compared at a time, and the log has {table["num_params"].nunique()}; choose one with '
                       '--where D=…')
    same = where(published, *(f'{column}={end[column]}' for column in ('num_params', 'schedule', 'peak_lr', 'B')
                              if column in published and pd.notna(end.get(column))))
    C, theirs = (scaling_law.horizon_of(one).mean() for one in (table, same))
    if abs(C / theirs - 1) > 0.01:
        raise LogError(f'the horizons differ: C* = {C:.4g} FLOPs here, {theirs:.4g} in the published log')
    return same


def compare(table, same, L0, x=collapse.GRID[9::10]):
    """{name: [K]} at normalised compute x. Raises LogError if a log begins after the first x.

    loss, published, sd, off: our mean over seeds, the published mean and standard deviation over seeds (ddof 1), and the difference
    in standard deviations. normalised, normalised_published, distance, noise: the same for ℓ (eq. 1), with the difference and the
    deviation relative to the published mean. each_seed, each_distance [S, K]: relative differences of the published seeds.
    """
    ours, theirs = collapse.curves(table, x), collapse.curves(same, x)
    if min(len(ours.x), len(theirs.x)) < len(x):
        raise LogError(f'both logs must begin by x = {min(x):g}')
    own, seeds = collapse.normalise(ours, L0).mean(0), collapse.normalise(theirs, L0)
    loss, mean, sd = ours.loss.mean(0), theirs.loss.mean(0), theirs.loss.std(0, ddof=1)
    return {'x': ours.x, 'loss': loss, 'published': mean, 'sd': sd, 'off': (loss - mean) / sd,
            'each_seed': theirs.loss / mean - 1, 'normalised': own, 'normalised_published': seeds.mean(0),
            'distance': own / seeds.mean(0) - 1, 'each_distance': seeds / seeds.mean(0) - 1,
            'noise': seeds.std(0, ddof=1) / seeds.mean(0)}


def evaluations(table):
    """Normalised compute of the evaluations of the first run, from 0.01 to 1."""
    C = table[table['run'] == table['run'].iloc[0]]['compute'].to_numpy()
    return C[C >= 0.01 * C[-1]] / C[-1]
