"""A run of ours beside the published runs of the same model: does it lie where another of their seeds would?

    python -m figures reproduced logs/mlp_384.parquet logs/paper/mlp.pkl

Losses are compared at equal compute, as they are and normalised (eq. 1, with the L0 of the whole published ladder).
"""

import numpy as np

from analysis import collapse, scaling_law
from analysis.table import LogError, runs, select

AT = np.arange(1, 11) / 10


def same_model(table, published):
    """The published runs of the one model and schedule of the table. LogError if there are none, or of another horizon."""
    ends = runs(table)
    if ends['num_params'].nunique() > 1:
        raise LogError(f'one model is compared at a time, and the log has D = {sorted(ends["D"].astype(int).unique())}; choose one '
                       'with --where D=…')
    wanted = {column: ends[column].iloc[0] for column in ('num_params', 'schedule', 'peak_lr', 'B')
              if column in ends and column in published and ends[column].notna().all()}
    same = select(published, **wanted)
    C, theirs = (scaling_law.horizon_of(one).mean() for one in (table, same))
    if abs(C / theirs - 1) > 0.01:
        raise LogError(f'the horizons differ: C* = {C:.4g} FLOPs here, {theirs:.4g} in the published log')
    return same


def compare(table, same, L0, x=AT):
    """{name: [K]} at normalised compute x: our loss (mean over seeds), the published mean and standard deviation over seeds
    (ddof 1), our distance in those; the same of ℓ (eq. 1), its distance relative to the published mean. `each_seed` and
    `each_distance` [S, K] are those of the S published seeds. Raises LogError if a log begins after the first x."""
    ours, theirs = collapse.curves(table, x), collapse.curves(same, x)
    if len(ours.x) < len(x) or len(theirs.x) < len(x):
        raise LogError(f'both logs must begin by x = {min(x):g}')
    seeds, own = collapse.normalise(theirs, L0), collapse.normalise(ours, L0).mean(0)
    loss, mean, sd = ours.loss.mean(0), theirs.loss.mean(0), theirs.loss.std(0, ddof=1)
    return {'x': ours.x, 'loss': loss, 'published': mean, 'sd': sd, 'off': (loss - mean) / sd,
            'each_seed': theirs.loss / mean - 1, 'normalised': own, 'normalised_published': seeds.mean(0),
            'distance': own / seeds.mean(0) - 1, 'each_distance': seeds / seeds.mean(0) - 1,
            'noise': seeds.std(0, ddof=1) / seeds.mean(0)}


def evaluations(table, from_x=0.01):
    """x of the first run's own evaluations from `from_x` on; its end is 1."""
    C = table[table['run'] == table['run'].iloc[0]]['compute'].to_numpy()
    x = C / C[-1]
    return x[x >= from_x]
