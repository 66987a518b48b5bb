"""Planted logs for the tests of the analysis, whose true parameters are known, and the path of the authors' logs."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import table as logs


def paper_log(name):
    """Path of one of the authors' logs, which are not in this repository. The test is skipped where the file is missing."""
    shared = os.environ.get('SUPERCOLLAPSE_SHARED')
    path = (Path(shared) / 'paper_logs' if shared else Path(logs.__file__).parent.parent / 'logs/paper') / f'{name}.pkl'
    if not path.exists():
        pytest.skip(f'needs the authors\' log:  sh logs/download_paper_logs.sh {name}')
    return path


def power_law_table(rng, models=6, seeds=4, offset=2e-3, jitter=1e-3, L0=0.1, exponent=0.5, past=1.0, evals=150,
                    schedule='linear', gamma=1.0):
    """A log of L = L0 + 30·t^(-½) + 30·p^(-½) with relative noise: `offset` for a whole run, `jitter` for each evaluation.

    The horizon is t* = p^gamma, and runs end at `past`·t*. For gamma = 1 the terms balance, C* = 6p², and the collapse is exact.
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


def law_points(rng, a=0.04, b=0.16, L0=0.0013, models=8, seeds=5, noise=3e-3):
    """The scaling_law.Points of the law L0 + a·(C/1e15)^(-b), with relative noise of the seeds."""
    from analysis.scaling_law import Points
    compute = np.geomspace(1e15, 1e18, models)
    loss = L0 + a * (compute / 1e15) ** -b
    return Points(np.geomspace(1e6, 4e7, models), compute,
                  [value * (1 + noise * rng.normal(size=seeds)) for value in loss])


def random_ladder(rng, models=None, seeds=None, evals=60, drift=0.004, level=0.0):
    """(table, L0) of a ladder with a random law, noise and size.

    L - L0 = (A·t^(-α) + B·p^(-β))·(1 + c·η)·corrections, with t* ∝ p^γ and αγ = β, so that b = αγ/(1 + γ) is 0.07 to 0.27. The
    corrections to scaling vanish with growing p and t. ℓ changes by `drift` (relative, per unit of log compute and of log x). The
    noise of a run has a constant part, a part correlated in log x and a white part; the seeds of a model share some of it. All of a
    model's L - L0 is too high by a normal variable with standard deviation `level` (relative).
    """
    models, seeds = models or rng.integers(4, 9), seeds or rng.integers(1, 6)
    alpha, gamma, step = rng.uniform(0.15, 0.5), rng.uniform(0.8, 1.2), rng.uniform(1.3, 2.2)
    p = 1e6 * step ** np.arange(models)
    end = 1e9 * (p / 1e6) ** gamma
    A = end[0] ** alpha * rng.uniform(0.3, 0.7)
    B = p[0] ** (alpha * gamma) * rng.uniform(0.3, 0.7)
    L0 = rng.choice([0.0, rng.uniform(0, 3)]) * (A * end[-1] ** -alpha + B * p[-1] ** (-alpha * gamma))
    bump, fading, transient, decay = rng.normal(0, 0.01), rng.normal(0, 0.01), rng.uniform(0, 0.003), rng.uniform(0, 0.3)
    slope, shared = rng.normal(0, drift), rng.uniform(0, 1)
    sizes = np.exp(rng.uniform(np.log(3e-4), np.log(1e-2))) * rng.uniform(0.2, 1, 3)
    x = np.unique(np.concatenate([np.linspace(0.005, 1, evals), np.geomspace(0.005, 1, evals // 2)]))
    lag = np.abs(np.log(x)[:, None] - np.log(x))
    factor = np.linalg.cholesky(sizes[0] ** 2 + sizes[1] ** 2 * np.exp(-lag) + sizes[2] ** 2 * np.eye(len(x)))

    def curve(m, x):
        size, t = p[m] / p[0], x * end[m]
        log_compute = (1 + gamma) * np.log(size)
        reducible = (A * t ** -alpha + B * p[m] ** (-alpha * gamma)) * (1 + decay * (1 - x)) * (1 + fading * size ** -0.7)
        reducible *= (1 + transient / x * size ** -gamma)
        reducible *= np.exp((bump * size ** -0.7 - slope * log_compute) * np.log(x))
        return L0 + reducible

    rows = []
    for m in range(models):
        common = shared * factor @ rng.normal(size=len(x)) + (level and level * rng.normal())  # no draw without a level
        for seed in range(seeds):
            loss = L0 + (curve(m, x) - L0) * np.exp(common + factor @ rng.normal(size=len(x)))
            rows.append(pd.DataFrame({
                'run': f'm{m}-s{seed}', 'D': 2 ** (5 + m), 'num_params': p[m], 'seed': seed, 'schedule': 'linear', 'peak_lr': 1e-3,
                'tokens': x * end[m], 'compute': 6 * p[m] * x * end[m], 'lr': 1e-3 * (1 - x), 'test_loss': loss}))
    return logs.tidy(pd.concat(rows, ignore_index=True)), L0
