"""Whether the conditions of a collapse hold across the models of a ladder: met, differs, or unknown where the log lacks a quantity.

Curves collapse where the models differ in size alone: Qiu et al. (2025) §2.3, and for tokens per parameter and the AdamW timescale
Bergsma et al. (2025), arXiv:2509.25087. Each limit below moves a normalised curve at x = 0.5 by some 0.001 to 0.005. This is
estimated for L - L0 = A·t^(-α) + B·p^(-β) with α = 0.3 and both terms equal at the end.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.integrate import cumulative_trapezoid
from scipy.stats import theilslopes

from analysis import collapse, scaling_law
from analysis.table import LogError, runs

TOKENS, SCHEDULE, WARM_UP, BATCH, TIMESCALE = 'tokens per parameter', 'schedule', 'warm-up', 'batch size', 'AdamW timescale'
CONDITIONS = {  # name: (largest spread that counts as equal, what to change, what the log lacks where it is unknown)
    # factor off the law; ℓ(0.5) moves by α·ln(1.05)·¼·(2^α - 1) = 0.001
    TOKENS: (1.05, 'train to one law t ∝ p^γ, with the γ of the compute-optimal horizon', 'a third model; two are always on a law'),
    # share of a run at the peak rate, lost or gained; ℓ(0.5) moves by 2·α·0.01 = 0.006 at most, if all is lost before x = 0.5
    SCHEDULE: (0.01, 'decay as one function of x, the share of the run, to one share of the peak rate', 'lr at ten points'),
    # share of a run, of which a warm-up loses half; ℓ(0.5) moves by α·0.005 = 0.0015
    WARM_UP: (0.01, 'warm up over one share of the run', 'lr at an evaluation in the warm-up, or warmup_tokens'),
    # factor; larger than the rounding to whole batches
    BATCH: (1.02, 'use one batch size; where it follows a rule on purpose, expect a residual from it', 'step, or B and L'),
    # factor; a published ladder whose timescale drifts 15-fold has a residual of 0.055, in proportion to the logarithm 0.005
    TIMESCALE: (1.25, 'set the weight decay to λ = 1/(η·T·τ), T in steps, with one τ', 'weight_decay, peak_lr or step')}
GAMMA = 0.5, 2  # horizons are fitted with γ near 1; at γ = 0, the same tokens for all models, at most one is at its optimum


class Condition(NamedTuple):
    name: str
    verdict: str            # met | differs | unknown
    num_params: np.ndarray  # [M] the models, increasing
    values: np.ndarray      # [M] of each model; of the schedule, how far ∫ rate/peak dx is from that of the median schedule
    spread: float           # largest over smallest value, or their difference; of the tokens, after division by the law t ∝ p^γ
    limit: float            # the largest spread that counts as equal: a factor if above 1, else a difference
    advice: str             # which models differ and what to change, or what the log lacks; of the tokens, also their law


def conditions(table):
    """[Condition] of one ladder (see collapse.ladder): tokens per parameter, schedule, warm-up, batch size, AdamW timescale.

    Raises LogError for fewer than two models.
    """
    horizon, model = scaling_law.horizon_of(collapse.ladder(table)), runs(table)['num_params']
    if model.nunique() < 2:
        raise LogError('the conditions of a collapse compare models, and the log has one')
    each = pd.DataFrame({run: of_run(rows, horizon[run]) for run, rows in table.groupby('run', sort=False)}).T
    distance = pd.Series(schedule_distance(*(each.pop(column) for column in ('x', 'rate')), each[WARM_UP]), each.index)
    values = each.astype(float).groupby(model).median().assign(**{SCHEDULE: distance.groupby(model).max()})
    p = values.index.to_numpy()
    # The exponent of t ∝ p^γ is a median over pairs of models, so that one model off the law hardly moves it.
    gamma = theilslopes(np.log(p * values[TOKENS].to_numpy()), np.log(p))[0]
    absent = [column for column in ('weight_decay', 'peak_lr', 'step') if column not in table or table[column].isna().all()]
    return [judge(name, p, values[name].to_numpy(), gamma, absent) for name in CONDITIONS]


def judge(name, p, values, gamma, absent=()):
    """The Condition `name` of a ladder, from its values [M] of the models with p [M] parameters. NaN is not known.

    Tokens per parameter may grow with size. They are compared with the law t ∝ p^gamma of the ladder. `absent` are the columns of
    the timescale that the log lacks.
    """
    limit, change, lacks = CONDITIONS[name]
    if name == TIMESCALE and absent:
        lacks = ' and '.join(absent)
    size, bound = (np.log(values), np.log(limit)) if limit > 1 else (values, limit)  # a limit above 1 is a factor
    if name == TOKENS:
        size = np.log(p * values) - gamma * np.log(p)
    known = ~np.isnan(values)
    middle = np.median(size[known]) if known.any() else np.nan
    if name == SCHEDULE:  # its values are distances already
        middle = 0
    with np.errstate(invalid='ignore'):  # without weight decay, every timescale is infinite
        off = np.where(size == middle, 0, size - middle)
    spread = np.ptp([0, *off[known]]) if known.any() else np.nan

    two_sizes = name == TOKENS and len(p) == 2 and np.ptp(np.log(values)) > bound  # two models are on a law of any exponent
    if spread > bound or name == TOKENS and not GAMMA[0] <= gamma <= GAMMA[1]:
        odd = p[np.abs(off) > bound]
        few = f'{", ".join(f"{one:.4g}" for one in odd)} parameters: ' if 0 < len(odd) < len(p) / 2 else ''
        verdict, advice = 'differs', few + change
    elif two_sizes or not known.all():
        verdict, advice = 'unknown', f'the log lacks {lacks}'
    else:
        verdict, advice = 'met', ''
    if name == TOKENS:
        advice = '; '.join(filter(None, [f't ∝ p^{gamma:.3g}', advice]))
    return Condition(name, verdict, p, values, float(np.exp(spread) if limit > 1 else spread), limit, advice)


def of_run(rows, horizon):
    """{quantity: value} of one run whose C* is `horizon` FLOPs, with its rate over the peak at each x. NaN is not known."""
    known = dict.fromkeys(('step', 'B', 'L', 'peak_lr', 'weight_decay', 'decay_per_step', 'warmup_tokens', 'lr'), np.nan)
    known |= rows.iloc[-1].to_dict()
    tokens = horizon / (6 * known['num_params'])
    batch = known['tokens'] / known['step'] if known['step'] > 0 else known['B'] * known['L']
    decay = np.float64(known['decay_per_step'])  # of a hidden weight, whose rate under µP is not the base rate
    decay = known['peak_lr'] * known['weight_decay'] if np.isnan(decay) else decay
    with np.errstate(divide='ignore'):
        timescale = 1 / np.float64(decay * tokens / batch)
    seen = rows[rows['lr'].notna()] if 'lr' in rows else rows[:0]
    x, rate = (seen['compute'] / horizon).to_numpy(), seen.get('lr', seen['compute']).to_numpy()
    rate = rate / max([known['peak_lr'], *rate], key=np.nan_to_num)  # evaluations may miss the peak, and the log may lack it
    warm_up = known['warmup_tokens'] / tokens if np.isfinite(known['warmup_tokens']) else warm_up_of(x, rate)
    return {TOKENS: tokens / known['num_params'], WARM_UP: warm_up, BATCH: batch, TIMESCALE: timescale, 'x': x, 'rate': rate}


def warm_up_of(x, rate):
    """Share of the run in which the rate rises from 0 to its peak, from evaluations x [n] and rates [n] over the peak.

    The rise is taken to be linear. One evaluation on it gives its end. Without one, its end is halfway between the two evaluations
    around it, or NaN if they are farther apart than the limit of the condition.
    """
    if not len(x):
        return np.nan
    top = int(np.argmax(rate >= 0.995 * rate.max()))
    before = x[top - 1] if top else 0
    if top and rate[top - 1] > 0:
        return np.clip(x[top - 1] / rate[top - 1], before, x[min(top + 1, len(x) - 1)])
    return (before + x[top]) / 2 if x[top] - before <= CONDITIONS[WARM_UP][0] else np.nan


def schedule_distance(xs, rates, warm_ups):
    """[R] largest distance between ∫ rate dx of each run and that of the median schedule, in runs at the peak rate.

    xs and rates are R arrays, one entry an evaluation: shares of the run, and rates over the peak. warm_ups [R] are shares of the
    run, or NaN. The distance is NaN if a run has fewer than ten evaluations. The integral hardly depends on where they lie.

    The warm-up is a condition of its own and left out, in one of two ways: the longest of all runs from every run, or from each run
    its own, with the rest stretched to one length. The way with the smaller distance counts.
    """
    if min(map(len, xs)) < 10:
        return np.nan
    starts = np.where(np.isnan(warm_ups.astype(float)), [x[rate.argmax()] for x, rate in zip(xs, rates, strict=True)], warm_ups)
    last, share, found = min(x[-1] for x in xs), np.linspace(0, 1, 201), []
    for after in (np.full(len(xs), starts.max()), starts):
        tau = np.array([cumulative_trapezoid(np.interp(start + (last - start) * share, x, rate), share, initial=0)
                        for x, rate, start in zip(xs, rates, after, strict=True)])
        found.append(np.abs(tau - np.quantile(tau, 0.5, axis=0, method='lower')).max(1))
    return min(found, key=max)
