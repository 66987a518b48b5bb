"""Planted logs for the tests of the analysis: tables whose truth is known, and where the authors' logs are, if anywhere."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from figures import table as logs


def paper_log(name):
    """Path of one of the authors' logs, or skip: they are not ours to ship."""
    shared = os.environ.get('SUPERCOLLAPSE_SHARED')
    if not shared:
        pytest.skip(f'needs the authors\' {name}.pkl: set SUPERCOLLAPSE_SHARED to a folder with paper_logs/{name}.pkl')
    return Path(shared) / 'paper_logs' / f'{name}.pkl'


def power_law_table(rng, models=6, seeds=4, offset=2e-3, jitter=1e-3, L0=0.1, exponent=0.5, past=1.0, evals=150,
                    schedule='linear', gamma=1.0):
    """L = L0 + 30·t^(-½) + 30·p^(-½), each seed off by `offset` (relative, a whole run) and `jitter` (an evaluation).

    t* = p^gamma; runs end at `past`·t*. With gamma 1 both terms balance: compute-optimal C* = 6p², exact collapse.
    """
    rows = []
    for D, p in zip(2 ** np.arange(5, 5 + models), np.geomspace(1e6, 3e7, models), strict=True):
        end = past * 1e6 * (p / 1e6) ** gamma
        t = np.unique(np.concatenate([[0], np.linspace(end / evals, end, evals), np.geomspace(end / 1e3, end, evals)]))
        with np.errstate(divide='ignore'):
            clean = L0 + 30 * np.maximum(t, 10) ** -exponent + 30 * p ** -0.5
        for seed in range(seeds):
            eta = np.ones_like(t) if schedule == 'const' else 1 - t / end
            noise = 1 + offset * rng.normal() + jitter * rng.normal(size=len(t))
            rows.append(pd.DataFrame({
                'run': f'D{D}-s{seed}', 'tag': 'planted', 'state': 'finished', 'D': D, 'num_params': p, 'seed': seed, 'B': 1,
                'L': 1, 'peak_lr': 1e-3, 'schedule': schedule, 'decay_frac': 1.0, 'step': t, 'tokens': t, 'compute': 6 * t * p,
                'lr': 1e-3 * eta, 'tau': 1e-3 * (t if schedule == 'const' else t - t ** 2 / (2 * end)),
                'test_loss': clean * noise}))
    return logs.tidy(pd.concat(rows, ignore_index=True))


def law_points(rng, a=0.04, b=0.16, L0=0.0013, models=8, seeds=5, noise=3e-3, L0_share=None):
    """Compute-optimal points of the law L0 + a·(C/1e15)^(-b) with relative seed noise, as scaling_law.Points."""
    from figures.scaling_law import Points
    compute = np.geomspace(1e15, 1e18, models)
    loss = L0 + a * (compute / 1e15) ** -b
    return Points(np.geomspace(1e6, 4e7, models), compute,
                  [value * (1 + noise * rng.normal(size=seeds)) for value in loss])
