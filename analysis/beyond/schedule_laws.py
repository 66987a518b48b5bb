"""Predicting loss curves under unseen schedules from (step, lr, loss) of two or three runs: two schedule laws side by side.

Both are linear in (L0, A, c) and see nothing but the rates: loss = L0 + A·τ^(-α) + c·(noise that the rates have left behind), τ
the sum of the rates. They differ in that memory.

`noise_law`, ours, is the noise model of Qiu et al. (2025) §3.2 under Adam, with Tr Σ modelled from the curve. Equation 11 gives the
excess loss ½ ∫ η Tr(H e^(-2H(τ-s)) Σ) ds, where H and Σ are preconditioned by P = 1/√v. Two things close it:
- v is the gradients' mean square, which noise dominates, and eq. 17 makes that proportional to the reducible loss: √v ∝ τ^(-α/2).
  So Adam's steps are as noisy late as early (P^½ΣP^½ ∝ √v), and curvature is felt in the time dθ = dτ/√v, θ ∝ τ^(1+α/2).
- The curvatures are spread evenly over the decades, up to the largest, which relaxes within n0 steps (a fixed number: at the edge
  of stability it is the step that bounds the curvature). A sum of exponentials over such a spectrum is 1/(θ - θ').
      excess(t) = c ∫ η dτ' / (θ - θ' + n0·dθ/dstep)
Five parameters: the floor L0; A and α of the noiseless descent; the noise strength c; the shortest memory n0, in steps. The ½ is
not fitted: √v constant, or ∝ τ^(-α), misses unseen curves of 25M and 100M language models by 1.5 to 2 times as much.

`multi_power_law` is the baseline (Luo et al. 2025, arXiv:2503.12811), seven parameters, with its published fit: early stopped Adam.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import least_squares, nnls

from analysis import table as logs
from analysis.scaling_law import DELTA
from analysis.table import LogError, require, runs

PIECES = 8          # at most: cells of constant rate between two evaluations
CELLS = 1600        # of them in a curve, or so
WARMUP_CELLS = 200  # the published fit stops at another iteration if these are much coarser


class Curve(NamedTuple):
    """One run: its evaluations [n], and its rates as cells [K] within which the rate is constant."""
    name: str
    step: np.ndarray  # [n] updates done
    lr: np.ndarray    # [n] rate at the evaluation
    loss: np.ndarray  # [n] nats
    rate: np.ndarray  # [K] of each cell
    edge: np.ndarray  # [K+1] gradient-flow time τ at the cells' ends, from 0 at the start of the warm-up
    row: np.ndarray   # [n] the edge at which each evaluation lies

    @property
    def tau(self):    # [n]
        return self.edge[self.row]


class Law(NamedTuple):  # loss = columns(curve, *shape) @ (L0, A, c), everything positive
    name: str
    columns: object  # (curve, *shape) -> [n, 3]
    names: tuple     # of (L0, A, c, *shape)
    starts: list     # shapes to start a fit from


class Fit(NamedTuple):
    law: Law
    values: np.ndarray  # of law.names
    objective: float    # summed Huber loss, log-loss residuals


def make_curve(name, step, lr, loss, warmup=0):
    """A Curve from evaluations [n] at increasing steps; before the first the rate is as there, after `warmup` steps rising from 0.

    Between two evaluations the rate is taken to be linear, but a change between two stretches of constant rate is a jump,
    at the later evaluation. Raises LogError if fewer than ten evaluations follow the warm-up or a number is out of range.
    """
    step, lr, loss = (np.asarray(v, float) for v in (step, lr, loss))
    kept = step >= max(warmup, 1)
    step, lr, loss = step[kept], lr[kept], loss[kept]
    if len(step) < 10:
        raise LogError(f'{name}: {len(step)} evaluations after the warm-up of {warmup:g} steps; a schedule law needs ten or more')
    if not (np.diff(step) > 0).all() or not (loss > 0).all() or not (lr >= 0).all() or not lr[0] > 0:
        raise LogError(f'{name}: steps must increase, losses be positive and rates not negative, the first above 0')
    flat = np.abs(np.diff(lr)) <= 1e-6 * lr.max()
    jump = ~flat & np.append(True, flat[:-1]) & np.append(flat[1:], True)
    pieces = int(np.clip(CELLS // len(step), 1, PIECES))
    u, cells = (np.arange(pieces) + 0.5) / pieces, WARMUP_CELLS if warmup else 0
    rate, width, row = [lr[0] * (i + 0.5) / cells for i in range(cells)], [warmup / cells for _ in range(cells)], []
    for i, start in enumerate(np.append(warmup, step[:-1])):
        if step[i] > start:
            first = lr[max(i - 1, 0)]
            rate += list(first + (lr[i] - first) * u * (i > 0 and not jump[i - 1]))
            width += [(step[i] - start) / pieces] * pieces
        row.append(len(rate))
    rate = np.array(rate)
    return Curve(name, step, lr, loss, rate, np.append(0, np.cumsum(rate * width)), np.array(row))


def noise_columns(curve, alpha, n0):
    """Columns [n, 3] of our law, derived at the top of this file."""
    k = alpha / 2  # 1/√v ∝ τ^k
    theta = curve.edge ** (1 + k) / (1 + k)                                                   # [K+1]
    last = np.maximum(curve.rate[curve.row - 1], 1e-6 * curve.rate.max())                     # the rate of the last update
    shortest = n0 * last * curve.tau ** k                                                     # [n] θ of the last n0 steps
    memory = np.log1p(np.maximum(theta[curve.row][:, None] - theta, 0) / shortest[:, None])   # [n, K+1], ∫ dθ'/(θ-θ'+shortest)
    noise = curve.rate * np.diff(curve.edge) / np.maximum(np.diff(theta), 1e-300)             # [K] η·dτ/dθ
    return np.stack([np.ones_like(curve.tau), curve.tau ** -alpha, (memory[:, :-1] - memory[:, 1:]) @ noise], 1)


def multi_power_columns(curve, alpha, C, beta, gamma, slopes=False):
    """Columns [n, 3] of the Multi-Power Law: 1, (S_1 + S_W)^(-α), -Σ_k (η_{k-1} - η_k)·G(η_k^(-γ) S_k), G(x) = 1 - (Cx + 1)^(-β).

    The sum runs over the changes of rate, the warm-up's rise from 0 among them, as in the published numbers. With slopes=True also
    the derivatives [n, 4] of the two last columns' sum by (α, C, β, γ) as a pair: that of τ^(-α) [n], and those of the sum [n, 3].
    """
    before = np.append(0, curve.rate[:-1])
    changed = (curve.rate != before) & (curve.rate > 0)
    rise, rate = (curve.rate - before)[changed], curve.rate[changed]                          # [k]
    since = np.maximum(curve.tau[:, None] - curve.edge[:-1][changed], 0)                      # [n, k] S_k
    x = C * rate ** -gamma * since
    log = np.log1p(x)
    left = np.exp(-beta * log)                                                                # 1 - G
    power = curve.tau ** -alpha
    columns = np.stack([np.ones_like(power), power, (1 - left) @ rise], 1)
    if not slopes:
        return columns
    by_x = beta * left / (1 + x) * x
    return columns, -power * np.log(curve.tau), np.stack([by_x @ rise / C, (left * log) @ rise, -by_x @ (rise * np.log(rate))], 1)


def settled_columns(curve, alpha):
    """Columns [n, 3] of a law without memory, L0 + A·τ^(-α) + c·η: eq. 14 with Tr Σ constant; phase one of the published fit."""
    return np.stack([np.ones_like(curve.tau), curve.tau ** -alpha, curve.lr], 1)


noise_law = Law('noise law', noise_columns, ('L0', 'A', 'c', 'alpha', 'n0'),
                [(alpha, n0) for alpha in (0.2, 0.35, 0.5, 0.7, 1.0) for n0 in (0.1, 1, 10)])
multi_power_law = Law('multi-power law', multi_power_columns, ('L0', 'A', 'B', 'alpha', 'C', 'beta', 'gamma'),
                      [(alpha, 1, beta, gamma) for alpha in (0.3, 0.5, 0.8) for beta in (0.2, 0.6) for gamma in (0.3, 0.7)])
settled_law = Law('no memory', settled_columns, ('L0', 'A', 'c', 'alpha'), [(alpha,) for alpha in (0.2, 0.35, 0.5, 0.7, 1.0)])


def predict(fit, curve):
    """Loss [n] of a fitted law under the rates of `curve`."""
    return fit.law.columns(curve, *fit.values[3:]) @ fit.values[:3]


# ---- fits -----------------------------------------------------------------------------------------------------------


def fit(law, curves, polish=2):
    """The law of least summed Huber loss (δ = 1e-3) on the log-loss residuals of all curves' evaluations.

    Every start is solved for (L0, A, c), which is linear, and the `polish` best are refined: by least squares before Huber, whose
    flat sides hold a far start back.
    """
    target = np.log(np.concatenate([curve.loss for curve in curves]))

    def columns(shape):
        return np.concatenate([law.columns(curve, *shape) for curve in curves])

    def residual(logs_of):
        value = np.exp(np.clip(logs_of, -80, 80))
        with np.errstate(over='ignore', invalid='ignore'):  # a trial step may go far out, and is then refused
            return np.log(np.maximum(columns(value[3:]) @ value[:3], 1e-10)) - target

    starts = []
    for shape in law.starts:
        design = columns(shape) / np.exp(target)[:, None]  # relative residuals
        size = np.abs(design).max(0)
        linear, misfit = nnls(design / size, np.ones(len(target)))
        starts.append((misfit, [*np.maximum(linear, 1e-6) / size, *shape]))
    ends = []
    for _, start in sorted(starts)[:polish]:
        near = least_squares(residual, np.log(start), x_scale='jac', max_nfev=30)
        ends.append(least_squares(residual, near.x, loss='huber', f_scale=DELTA, x_scale='jac', max_nfev=100))
    best = min(ends, key=lambda end: end.cost)
    return Fit(law, np.exp(best.x), float(best.cost))


def fit_as_published(curves, steps=200, patience=20):
    """The Multi-Power Law as Luo et al. fitted it (their released settings), which is not the minimum of its objective.

    (L0, A, α, B) from the law without memory; then C = 1, β = γ = ½ and AdamW, rate 0.05 for L0, A, B, C and 0.005 for the
    exponents, decay 0.01, until the objective has not fallen for 20 of at most 200 steps. What is kept is the state one step
    after the lowest objective. The stop matters: at the true minimum (`fit`) the exponents drift and unseen schedules suffer.
    """
    first = fit(settled_law, curves)
    L0, A, c, alpha = first.values
    peak = max(curve.lr.max() for curve in curves)
    value = np.array([L0 + c * peak, A, c, alpha, 1, 0.5, 0.5])  # L0 there counts the peak's noise in
    rate = np.array([0.05, 0.05, 0.05, 0.005, 0.05, 0.005, 0.005])
    mean, square, best, kept, taken = np.zeros(7), np.zeros(7), np.inf, None, 0
    target = np.log(np.concatenate([curve.loss for curve in curves]))
    for t in range(1, steps + 1):
        parts = [multi_power_columns(curve, *value[3:], slopes=True) for curve in curves]
        columns, by_alpha, by_rest = (np.concatenate(part) for part in zip(*parts, strict=True))
        predicted = np.maximum(columns @ value[:3], 1e-10)
        residual = np.log(predicted) - target
        objective = np.where(np.abs(residual) <= DELTA, residual ** 2 / 2, DELTA * (np.abs(residual) - DELTA / 2)).sum()
        slope = np.column_stack([columns, value[1] * by_alpha, value[2] * by_rest])
        gradient = (np.clip(residual, -DELTA, DELTA) / predicted) @ slope
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient ** 2
        value = (1 - 0.01 * rate) * value - rate * mean / (1 - 0.9 ** t) / (np.sqrt(square / (1 - 0.999 ** t)) + 1e-8)
        if objective < best:
            best, kept, taken = objective, value, t
        elif t > patience and t - taken >= patience:
            break
    return Fit(multi_power_law._replace(name='multi-power law, as published'), kept, float(best))


def errors(fit, curve):
    """R², MAE, RMSE (nats) and the worst relative error of the fitted law on one curve, each evaluation counting alike."""
    miss = predict(fit, curve) - curve.loss
    return {'r2': float(1 - np.mean(miss ** 2) / curve.loss.var()), 'mae': float(np.abs(miss).mean()),
            'rmse': float(np.sqrt(np.mean(miss ** 2))), 'worst': float(np.abs(miss / curve.loss).max())}


def compare(curves, names):
    """Fit the laws on the curves named and predict the others: (fits, one dict an unseen curve and law, their means).

    Raises LogError for a name that is not there, and if there is no curve left to predict.
    """
    for name in names:
        if name not in curves:
            raise LogError(f'--fit {name}: no such curve; there are {", ".join(curves)}')
    unseen = [name for name in curves if name not in names]
    if not unseen:
        raise LogError(f'all {len(curves)} curves are fitted; leave one out of --fit to be predicted')
    chosen = [curves[name] for name in names]
    fits = [fit(noise_law, chosen), fit_as_published(chosen), fit(multi_power_law, chosen)]
    rows = [{'curve': name, 'law': one.law.name, **errors(one, curves[name])} for one in fits for name in unseen]
    return fits, rows, pd.DataFrame(rows).drop(columns='curve').groupby('law', sort=False).mean()


def read_csv(path, warmup=None, without=None):
    """{name: Curve} of a .csv with columns run, step, lr, loss, or of a folder of .csv files (step, lr, loss), a curve each.

    Without `warmup`, what precedes the first evaluation of any curve is taken to be a linear warm-up. The
    evaluation at step `without` is left out (24,000 in the published protocol for the curves of Luo et al.).
    """
    path = Path(path)
    tables = {one.stem: logs.load(one) for one in sorted(path.glob('*.csv'))}
    tables = tables or dict(list(logs.load(path).groupby('run', sort=False)))
    for name, rows in tables.items():
        require(rows, ['step', 'lr', 'test_loss'], f'the schedule curve {name}')
    warmup = min(rows['step'].min() for rows in tables.values()) if warmup is None else warmup
    tables = {name: rows[rows['step'] != without] for name, rows in tables.items()}
    return {name: make_curve(name, rows['step'], rows['lr'], rows['test_loss'], warmup) for name, rows in tables.items()}


def from_table(table, skip=0.05):
    """{name: Curve} of a log of one model, named by schedule, decay and horizon, e.g. `linear_0.2`, `const_244k`.

    The first `skip` of the shortest run's steps, where no power law holds yet, is left out. Raises LogError if columns are
    missing, or if there are several models, batches, rates or seeds.
    """
    require(table, ['step', 'lr', 'test_loss', 'schedule'], 'a schedule law')
    ends = runs(table)
    for column in ('num_params', 'B', 'peak_lr', 'seed'):
        if column in ends and ends[column].nunique() > 1:
            found = ', '.join(f'{value:g}' for value in sorted(ends[column].unique()))
            raise LogError(f'a schedule law is of one model; the log has {column} {found}: choose one with --where {column}=…')
    shortest = ends['step'].min()
    curves = {}
    for run, end in ends.iterrows():
        share = f'_{end["decay_frac"]:g}' if end['schedule'] != 'const' and end.get('decay_frac', 1) < 1 else ''
        horizon = f'_{end["step"] / 1000:.3g}k' if ends['step'].nunique() > 1 else ''
        rows = table[(table['run'] == run) & (table['step'] >= skip * shortest)]
        name = end['schedule'] + share + horizon
        curves[name] = make_curve(name, rows['step'], rows['lr'], rows['test_loss'])
    return curves
