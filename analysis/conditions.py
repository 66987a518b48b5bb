"""Whether the conditions of a collapse hold across the models of a ladder: met, differs, or unknown where the log lacks a quantity.

Curves collapse where the models differ in size alone: Qiu et al. (2025) §2.3, and for tokens per parameter and the AdamW timescale
Bergsma et al. (2025), arXiv:2509.25087. Each limit below moves a normalised curve at x = 0.5 by some 0.001 to 0.005. This is
estimated for L - L0 = A·t^(-α) + B·p^(-β) with α = 0.3 and both terms equal at the end.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import theilslopes

from analysis import collapse, scaling_law
from analysis.table import LogError, runs

TOKENS, SCHEDULE = 'tokens per parameter', 'schedule'
CONDITIONS = {  # name: (largest spread that counts as equal, what to change, what the log lacks where it is unknown)
    # factor off the law; ℓ(0.5) moves by α·ln(1.05)·¼·(2^α - 1) = 0.001
    TOKENS: (1.05, 'train to one law t ∝ p^γ, with the γ of the compute-optimal horizon', 'a third model; two are always on a law'),
    # of the peak rate; above the errors of interpolation between evaluations
    SCHEDULE: (0.02, 'decay as one function of x, the share of the run, to one share of the peak rate', 'lr at enough evaluations'),
    # of the run; half of a warm-up is lost, so ℓ(0.5) moves by α·0.005 = 0.0015
    'warm-up': (0.01, 'warm up over one share of the run', 'lr at an evaluation in the warm-up, or warmup_tokens'),
    # factor; larger than the rounding to whole batches
    'batch size': (1.02, 'use one batch size; where it follows a rule on purpose, expect a residual from it', 'step, or B and L'),
    # factor; a published ladder whose timescale drifts 15-fold has a residual of 0.055, in proportion to the logarithm 0.005
    'AdamW timescale': (1.25, 'set the weight decay to λ = 1/(η·T·τ), T in steps, with one τ', 'weight_decay, peak_lr or step')}
GAMMA = 0.5, 2  # horizons are fitted with γ near 1; at γ = 0, the same tokens for all models, at most one is at its optimum


class Condition(NamedTuple):
    name: str
    verdict: str            # met | differs | unknown
    num_params: np.ndarray  # [M] the models, increasing
    values: np.ndarray      # [M] of each model; of the schedule, its distance from the median schedule in units of the peak rate
    spread: float           # largest over smallest value (tokens per parameter: after the law t ∝ p^γ), else largest difference
    limit: float            # the largest spread that counts as equal
    advice: str             # which models differ and what to change, or what the log lacks; of the tokens, also their law


def conditions(table):
    """[Condition] of one ladder (see collapse.ladder): tokens per parameter, schedule, warm-up, batch size, AdamW timescale."""
    horizon, model = scaling_law.horizon_of(collapse.ladder(table)), runs(table)['num_params']
    if model.nunique() < 2:
        raise LogError('the conditions of a collapse compare models, and the log has one')
    each = {run: of_run(rows, horizon[run]) for run, rows in table.groupby('run', sort=False)}
    values = pd.DataFrame({run: one[0] for run, one in each.items()}).T.groupby(model).median()
    distance, gap = schedule_distance([one[1] for one in each.values()])
    values[SCHEDULE] = pd.Series(distance, list(each)).groupby(model).max()
    p = values.index.to_numpy()
    log_p, log_t = np.log(p), np.log(p * values[TOKENS].to_numpy())
    gamma = theilslopes(log_t, log_p)[0]  # a median over pairs: one model off the law hardly moves it
    found = []
    for name, (limit, change, lacks) in CONDITIONS.items():
        own = values[name].to_numpy()
        size, bound = (np.log(own), np.log(limit)) if limit > 1 else (own, limit)
        known = ~np.isnan(own)
        size = log_t - gamma * log_p if name == TOKENS else size
        middle = 0 if name == SCHEDULE else np.median(size[known]) if known.any() else np.nan
        with np.errstate(invalid='ignore'):  # without weight decay, every timescale is infinite
            off = np.where(size == middle, 0, size - middle)
        spread = np.ptp([0, *off[known]]) if known.any() else np.nan
        differs, unknown = spread > bound, not known.all()
        if name == TOKENS:
            differs |= not GAMMA[0] <= gamma <= GAMMA[1]
            unknown |= len(p) == 2 and np.ptp(np.log(own)) > bound
        elif name == SCHEDULE:
            differs, unknown = gap > bound, unknown or spread > bound
        odd = p[np.abs(off) > bound] if differs else []
        who = f'{", ".join(f"{one:.4g}" for one in odd)} parameters: ' if 0 < len(odd) < len(p) / 2 else ''
        verdict = 'differs' if differs else 'unknown' if unknown else 'met'
        advice = {'differs': who + change, 'unknown': f'the log lacks {lacks}'}.get(verdict, '')
        if name == TOKENS:
            advice = f't ∝ p^{gamma:.3g}' + f'; {advice}' * bool(advice)
        found.append(Condition(name, verdict, p, own, float(np.exp(spread) if limit > 1 else spread), limit, advice))
    return found


def in_words(found):
    """One line: which conditions differ, or are not known."""
    differs, unknown = (', '.join(one.name for one in found if one.verdict == verdict) for verdict in ('differs', 'unknown'))
    first = f'the models differ in {differs}; residuals from the collapse can come from that' if differs else 'no condition differs'
    return first + f'; not known: {unknown}' * bool(unknown)


def of_run(rows, horizon):
    """({quantity: value}, (x, rate over its peak, first x at the peak)) of one run with C* = `horizon` FLOPs; NaN is not known."""
    known = dict.fromkeys(('step', 'B', 'L', 'peak_lr', 'weight_decay', 'warmup_tokens', 'lr'), np.nan) | rows.iloc[-1].to_dict()
    tokens = horizon / (6 * known['num_params'])
    batch = known['tokens'] / known['step'] if known['step'] > 0 else known['B'] * known['L']
    with np.errstate(divide='ignore'):
        timescale = 1 / np.float64(known['peak_lr'] * known['weight_decay'] * tokens / batch)
    x, rate = (rows['compute'] / horizon).to_numpy(), rows.get('lr', np.nan * rows['compute']).to_numpy()
    x, rate = x[np.isfinite(rate)], rate[np.isfinite(rate)] / np.fmax(known['peak_lr'], np.fmax.reduce(rate))
    warm_up, end = warm_up_of(x, rate)
    if np.isfinite(known['warmup_tokens']):
        warm_up = known['warmup_tokens'] / tokens
    values = {TOKENS: tokens / known['num_params'], 'warm-up': warm_up, 'batch size': batch, 'AdamW timescale': timescale}
    return values, (x, rate, end)


def warm_up_of(x, rate):
    """(share of the run in which the rate rises linearly from 0, x of the first evaluation at the peak); NaN if not known.

    One evaluation within the warm-up is enough, by proportion. Without it the end lies between two evaluations.
    """
    if not len(x):
        return np.nan, np.nan
    top = int(np.argmax(rate >= 0.995 * rate.max()))
    before = x[top - 1] if top else 0
    if top and rate[top - 1] > 0:
        return float(np.clip(x[top - 1] / rate[top - 1], before, x[min(top + 1, len(x) - 1)])), x[top]
    return (float(before + x[top]) / 2 if x[top] - before <= CONDITIONS['warm-up'][0] else np.nan), x[top]


def schedule_distance(curves):
    """([R] largest distance of each schedule from the median one, smallest possible difference of two), in units of the peak rate.

    curves: R of (x, rate, x after warm-up). Compared is what follows the warm-ups, as a function of x, and of the share of what is
    left after the warm-up. The smaller distance counts, since the warm-up is a condition of its own. Between two evaluations a
    rate may have any value between theirs.
    """
    if not all(len(x) > 1 for x, _, _ in curves):
        return np.full(len(curves), np.nan), np.nan
    ends, found = [end for _, _, end in curves], []
    last = min(x[-1] for x, _, _ in curves)
    for after in ([max(ends)] * len(curves), ends):
        at = [start + (last - start) * np.linspace(0, 1, 101) for start in after]
        right = [np.clip(np.searchsorted(x, grid), 1, len(x) - 1) for (x, _, _), grid in zip(curves, at, strict=True)]
        sides = np.array([[rate[i - 1], rate[i]] for (_, rate, _), i in zip(curves, right, strict=True)])  # [R, 2, K]
        rates = np.array([np.interp(grid, x, rate) for (x, rate, _), grid in zip(curves, at, strict=True)])
        distance = np.abs(rates - np.quantile(rates, 0.5, axis=0, method='lower')).max(1)
        found.append((distance, (sides.min(1).max(0) - sides.max(1).min(0)).max()))
    return min(found, key=lambda one: one[0].max())
