"""Loss curves under new learning-rate schedules, predicted from (step, lr, loss) of two or three runs by two schedule laws.

Both laws see only the learning rates and have the form

    loss(t) = L0 + A·τ^(-α) + c·N(t),     τ(t) = sum of the learning rates up to t

where N(t) is the noise that past steps have left behind. N forgets old steps, and the laws differ in how it does.

`noise_law` is this project's own. It is the noise model of Qiu et al. (2025) §3.2 under Adam, with Tr Σ modelled from the curve.
Equation 11 gives the excess loss ½ ∫ η Tr(H e^(-2H(τ-s)) Σ) ds, with H and Σ preconditioned by P = 1/√v. It needs two assumptions:

1. v is the mean square of the gradients and mostly noise. By eq. 17 it is proportional to the reducible loss, so √v ∝ τ^(-α/2).
   Then the noise of Adam's steps does not change during training (P^½ΣP^½ ∝ √v), and the curvature acts in the rescaled time
   dθ = dτ/√v, so θ ∝ τ^(1+α/2).
2. The curvatures are spread evenly over the decades up to a largest one. At the edge of stability the step size bounds the largest
   curvature, so it relaxes within a fixed number n0 of steps. The sum of exponentials over this spectrum is 1/(θ - θ').

Together:  N(t) = ∫ η dτ' / (θ - θ' + n0·dθ/dstep).  There are five parameters: L0; A and α of the descent without noise; the noise
strength c; the shortest memory n0 in steps. The exponent ½ of √v is not fitted. With √v constant or √v ∝ τ^(-α) the errors on
unseen curves of 25M and 100M language models are 1.5 to 2 times as large.

`multi_power_law` is the baseline (Luo et al. 2025, arXiv:2503.12811), seven parameters, fitted as published by early-stopped Adam.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import least_squares, nnls
from scipy.special import huber

from analysis import collapse
from analysis.columns import hint
from analysis.scaling_law import DELTA
from analysis.table import LogError

FULL_DECAYS = 'linear', 'cosine', 'quadratic', 'multicosine'  # in the order in which default_fit looks for them


class Law(NamedTuple):
    """A schedule law: loss = columns(curve, *shape) @ (L0, A, c), every parameter positive."""
    name: str
    columns: object  # function (curve, *shape) -> [n, 3]
    names: tuple     # of the parameters (L0, A, c, *shape)
    starts: list     # values of shape to start a fit from


class Fit(NamedTuple):
    """A law fitted to curves."""
    law: Law
    values: np.ndarray  # of law.names
    objective: float    # summed Huber loss of the log-loss residuals


def noise_columns(curve, alpha, n0):
    """Columns [n, 3] of the noise law: 1, τ^(-α) and the noise N, derived at the top of this file."""
    k = alpha / 2                                                                       # 1/√v ∝ τ^k
    theta = curve.edge ** (1 + k) / (1 + k)                                             # [K+1]
    last_rate = np.maximum(curve.rate[curve.row - 1], 1e-6 * curve.rate.max())          # [n] rate of the last update
    shortest = n0 * last_rate * curve.tau ** k                                          # [n] θ of the last n0 steps
    since = np.maximum(theta[curve.row][:, None] - theta, 0)                            # [n, K+1] θ - θ'
    memory = np.log1p(since / shortest[:, None])                                        # integral of dθ' / (θ - θ' + shortest)
    noise = curve.rate * np.diff(curve.edge) / np.maximum(np.diff(theta), 1e-300)       # [K] η·dτ/dθ
    return np.stack([np.ones_like(curve.tau), curve.tau ** -alpha, (memory[:, :-1] - memory[:, 1:]) @ noise], 1)


def multi_power_columns(curve, alpha, C, beta, gamma, slopes=False):
    """Columns [n, 3] of the Multi-Power Law: 1, (S_1 + S_W)^(-α), -Σ_k (η_{k-1} - η_k)·G(η_k^(-γ) S_k), G(x) = 1 - (Cx + 1)^(-β).

    The sum is over the changes of the rate. These include the rise from 0 during the warm-up, as in the published numbers. With
    slopes=True the derivatives follow: that of τ^(-α) by α [n], and those of the sum by (C, β, γ) [n, 3].
    """
    before = np.append(0, curve.rate[:-1])
    changed = (curve.rate != before) & (curve.rate > 0)
    rise, rate = (curve.rate - before)[changed], curve.rate[changed]                    # [k]
    since = np.maximum(curve.tau[:, None] - curve.edge[:-1][changed], 0)                # [n, k] S_k
    x = C * rate ** -gamma * since
    log = np.log1p(x)
    left = np.exp(-beta * log)                                                          # 1 - G
    power = curve.tau ** -alpha
    columns = np.stack([np.ones_like(power), power, (1 - left) @ rise], 1)
    if not slopes:
        return columns
    by_x = beta * left / (1 + x) * x
    return columns, -power * np.log(curve.tau), np.stack([by_x @ rise / C, (left * log) @ rise, -by_x @ (rise * np.log(rate))], 1)


noise_law = Law('noise law', noise_columns, ('L0', 'A', 'c', 'alpha', 'n0'),
                [(alpha, n0) for alpha in (0.2, 0.35, 0.5, 0.7, 1.0) for n0 in (0.1, 1, 10)])
multi_power_law = Law('multi-power law', multi_power_columns, ('L0', 'A', 'B', 'alpha', 'C', 'beta', 'gamma'),
                      [(alpha, 1, beta, gamma) for alpha in (0.3, 0.5, 0.8) for beta in (0.2, 0.6) for gamma in (0.3, 0.7)])
# L0 + A·τ^(-α) + c·η: eq. 14 with constant Tr Σ. It is the first phase of the published fit.
memoryless_law = Law('no memory', lambda curve, alpha: np.stack([np.ones_like(curve.tau), curve.tau ** -alpha, curve.lr], 1),
                     ('L0', 'A', 'c', 'alpha'), [(alpha,) for alpha in (0.2, 0.35, 0.5, 0.7, 1.0)])


def predict(fit, curve):
    """Loss [n] of a fitted law under the learning rates of `curve`."""
    return fit.law.columns(curve, *fit.values[3:]) @ fit.values[:3]


def fit(law, curves):
    """The Fit of least summed Huber loss (δ = 1e-3) on the log-loss residuals of all curves.

    At every start the law is linear in (L0, A, c), which are solved for. The two best starts are then refined, first by least
    squares and then with the Huber loss: its slope is constant far from the data, which would slow a poor start down.
    """
    target = np.log(np.concatenate([curve.loss for curve in curves]))

    def columns(shape):
        return np.concatenate([law.columns(curve, *shape) for curve in curves])

    def residual(log_values):
        value = np.exp(np.clip(log_values, -80, 80))
        with np.errstate(over='ignore', invalid='ignore'):  # a trial step may go far out; the solver then refuses it
            return np.log(np.maximum(columns(value[3:]) @ value[:3], 1e-10)) - target

    starts = []
    for shape in law.starts:
        design = columns(shape) / np.exp(target)[:, None]   # relative residuals
        size = np.abs(design).max(0)
        linear, misfit = nnls(design / size, np.ones(len(target)))
        starts.append((misfit, [*np.maximum(linear, 1e-6) / size, *shape]))
    near = [least_squares(residual, np.log(start), x_scale='jac', max_nfev=30) for _, start in sorted(starts)[:2]]
    ends = [least_squares(residual, one.x, loss='huber', f_scale=DELTA, x_scale='jac', max_nfev=100) for one in near]
    best = min(ends, key=lambda end: end.cost)
    return Fit(law, np.exp(best.x), float(best.cost))


def fit_as_published(curves):
    """The Multi-Power Law as Luo et al. fitted it, with their released settings. It is not the minimum of its objective.

    The law without memory gives (L0, A, α, B). From there, with C = 1 and β = γ = ½, AdamW minimises the objective: rate 0.05 for
    L0, A, B and C, rate 0.005 for the exponents, weight decay 0.01. It stops after 20 steps without a new minimum, at the latest
    after 200, and keeps the state one step after the lowest objective. The early stop matters: at the true minimum (`fit`) the
    exponents drift and predictions of unseen schedules are worse.
    """
    L0, A, c, alpha = fit(memoryless_law, curves).values
    peak = max(curve.lr.max() for curve in curves)
    value = np.array([L0 + c * peak, A, c, alpha, 1, 0.5, 0.5])  # this law's L0 includes the noise at the peak rate
    rate = np.array([0.05, 0.05, 0.05, 0.005, 0.05, 0.005, 0.005])
    mean, square = np.zeros(7), np.zeros(7)                      # Adam's moments
    best, best_step, kept = np.inf, 0, None
    target = np.log(np.concatenate([curve.loss for curve in curves]))
    for step in range(1, 201):
        parts = [multi_power_columns(curve, *value[3:], slopes=True) for curve in curves]
        columns, by_alpha, by_rest = (np.concatenate(part) for part in zip(*parts, strict=True))
        predicted = np.maximum(columns @ value[:3], 1e-10)
        residual = np.log(predicted) - target
        objective = huber(DELTA, residual).sum()
        slope = np.column_stack([columns, value[1] * by_alpha, value[2] * by_rest])  # of the predicted loss
        gradient = (np.clip(residual, -DELTA, DELTA) / predicted) @ slope
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient ** 2
        update = mean / (1 - 0.9 ** step) / (np.sqrt(square / (1 - 0.999 ** step)) + 1e-8)
        value = (1 - 0.01 * rate) * value - rate * update
        if objective < best:
            best, best_step, kept = objective, step, value
        elif step - best_step >= 20:
            break
    return Fit(multi_power_law._replace(name='multi-power law, as published'), kept, float(best))


def errors(predicted, curve):
    """R², MAE, RMSE (nats) and the worst relative error of predicted losses [n]; every evaluation of the curve counts alike."""
    miss = predicted - curve.loss
    return {'r2': float(1 - np.mean(miss ** 2) / curve.loss.var()), 'mae': float(np.abs(miss).mean()),
            'rmse': float(np.sqrt(np.mean(miss ** 2))), 'worst': float(np.abs(miss / curve.loss).max())}


def default_fit(curves):
    """Names of the constant-rate curve and of one that decays over the whole run, or [] if the curves have no such names."""
    decays = [name for name in FULL_DECAYS if name in curves]
    return ['const', decays[0]] if 'const' in curves and decays else []


def compare(curves, names):
    """Fit the laws to the curves named and predict the others: (fits, a dict for each unseen curve and law, their means).

    Raises LogError for fewer than two names, an unknown name, and if no curve is left to predict.
    """
    if len(names) < 2:
        raise LogError(f'--fit: name two or three curves of {", ".join(curves)}')
    for name in names:
        if name not in curves:
            raise LogError(f'--fit {name}: no such curve{hint(name, curves)}')
    unseen = [name for name in curves if name not in names]
    if not unseen:
        raise LogError(f'all {len(curves)} curves are fitted; leave one out of --fit to be predicted')
    fitted = [curves[name] for name in names]
    fits = [fit(noise_law, fitted), fit_as_published(fitted), fit(multi_power_law, fitted)]
    rows = [{'curve': name, 'law': one.law.name, **errors(predict(one, curves[name]), curves[name])}
            for one in fits for name in unseen]
    return fits, rows, pd.DataFrame(rows).drop(columns='curve').groupby('law', sort=False).mean()


def at_share(curve, x):
    """Loss of a curve at the shares x of its steps."""
    return np.interp(x, curve.step / curve.step[-1], curve.loss)


def transfer(small, large, name, L0):
    """Loss [n] of the curve `name` of a larger model, from its constant-rate curve and from a smaller model's curves {name: Curve}.

    It assumes that both sizes follow one normalised curve under every schedule. Then (L - L0) / (L_const - L0) is the same for both
    at equal x, the share of the steps of the constant-rate run. The ratio is measured on the smaller model.
    """
    const, end = small['const'], large['const'].step[-1]
    x, small_x = large[name].step / end, small[name].step / const.step[-1]
    loss, unchanged = (np.interp(x, small_x, values) for values in (small[name].loss, at_share(const, small_x)))
    return L0 + (at_share(large['const'], x) - L0) * (loss - L0) / (unchanged - L0)


def compare_sizes(by_size, names):
    """(rows of `compare` for each model of {p: {name: Curve}}, and of `transfer` from the smallest one; L0 of the transfer).

    L0 is the one with which the constant-rate curves `const` collapse best, or 0 for two models. The rows `constant rate` are the
    errors of the model's own constant-rate curve. Raises LogError if a model has no such curve.
    """
    p, x = sorted(by_size), collapse.GRID
    if any('const' not in curves for curves in by_size.values()):
        raise LogError('a transfer needs runs with schedule const of every model')
    loss = np.array([at_share(by_size[one]['const'], x) for one in p])
    L0 = float(np.nan_to_num(collapse.best_L0(collapse.Curves(x, loss, np.arange(len(p)), np.array(p), p, None, None))[0]))
    rows, small = [], by_size[p[0]]
    for one in p:
        curves = by_size[one]
        rows += [{'num_params': one, **row} for row in compare(curves, names)[1]]
        for name in [name for name in small if name in curves and name not in names]:
            found = {'constant rate': at_share(curves['const'], curves[name].step / curves['const'].step[-1])}
            if one > p[0]:
                found['measured, transferred'] = transfer(small, curves, name, L0)
            rows += [{'num_params': one, 'curve': name, 'law': law, **errors(found[law], curves[name])} for law in found]
    return rows, L0
