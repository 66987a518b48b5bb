"""Scaling collapse: normalised loss curves, their collapse tolerance Δ, the noise floor σ, and the onset of supercollapse.

Qiu et al. (2025) §2.3-2.5, eqs. 1-4, and §3.3, eq. 24 for the predicted quality. The irreducible loss L0 comes from scaling_law.py,
and its uncertainty enters Δ, σ and the onset. Beside it stand the two usual choices of what to subtract: nothing, and the L0 with
which the curves collapse best.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.special import fdtri

from analysis import scaling_law
from analysis.scaling_law import LEVEL, interval
from analysis.table import LogError, require, runs

GRID = np.arange(1, 101) / 100  # normalised compute x
# The largest spread of the drop that is called a collapse. An exact two-term law with a data exponent 20% off has 5 to 6% over a
# factor of 30 in parameters. With the L0 that collapses best, the authors' MLPs and chess models have 1%, the OLMo ladder 1 to 3%,
# our MLPs 4%, and 25% without µP.
TIGHT = 0.05


class Curves(NamedTuple):
    """The loss curves of a scaling ladder at common normalised compute, ordered by model."""
    x: np.ndarray        # [K] C/C*, increasing, the last is 1
    loss: np.ndarray     # [R, K] one row for each run
    model: np.ndarray    # [R] index into p
    p: np.ndarray        # [M] parameters, increasing
    run: list            # R run names
    lr: np.ndarray       # [K] rate over peak rate, mean over runs; NaN if the log has none
    tau: np.ndarray      # [K] τ/τ*, mean over runs; NaN if the log has none


class Spread(NamedTuple):
    """Variation of the normalised curves at each x."""
    mean: np.ndarray     # [K] normalised curve, with the same weight for every model
    delta: np.ndarray    # [K] collapse tolerance Δ, eq. 2
    between: np.ndarray  # [K] share of Δ between models: V_p E_ω of eq. 4, as a relative deviation
    within: np.ndarray   # [K] share of Δ within a model: E_p V_ω of eq. 4; between² + within² = delta² for ddof 0
    sigma: np.ndarray    # [M, K] noise floor σ(x, p), eq. 3; NaN for a model with one seed


def ladder(table):
    """The table, if it is one scaling ladder: one schedule, one tag, one horizon per model. Raises LogError otherwise."""
    require(table, ['num_params', 'compute', 'test_loss'], 'a collapse')
    ends = runs(table).assign(horizon=scaling_law.horizon_of(table))
    groups = [('the log', ends, ('schedule', 'decay_frac', 'tag', 'optimizer', 'match_mup_at_D'))]
    groups += [(f'the model with {p:.4g} parameters', own, ('peak_lr', 'B', 'N', 'L', 'horizon'))
               for p, own in ends.groupby('num_params')]
    for name, own, columns in groups:
        for column in columns:
            found = sorted(own[column].dropna().unique()) if column in own else []
            tolerance = 1.1 if column == 'peak_lr' else 1.02  # it may come from the column lr; horizons differ by an evaluation
            if len(found) > 1 and (isinstance(found[0], str) or found[-1] > tolerance * found[0]):
                values = ', '.join(one if isinstance(one, str) else f'{one:.4g}' for one in found)
                choose = f'{column}=…'
                if column == 'horizon':
                    choose = 'T=…' if 'T' in table and table['T'].notna().any() else 'and a column that tells them apart'
                    values += ' FLOPs'
                raise LogError(f'a collapse compares runs that differ in size and seed only, and {name} has {column} {values}; '
                               f'choose one with --where {choose}')
    return table


def curves(table, x=GRID):
    """Curves with the loss of every run at x·C*, interpolated in (log C, log L), for the x at which every run has data."""
    ends, horizon = runs(ladder(table)).sort_values('num_params', kind='stable'), scaling_law.horizon_of(table)
    rate = table.get('lr', np.nan) / table.get('peak_lr', np.nan)
    table = table.assign(rate=rate, tau=table.get('tau', np.nan))[table['compute'] > 0]
    rows = dict(list(table.groupby('run', sort=False)))
    x = np.asarray(x, float)
    x = x[x >= max(own['compute'].iloc[0] / horizon[run] for run, own in rows.items())]
    if not len(x):
        raise LogError('a run has its first evaluation after its horizon C*')
    p, model = np.unique(ends['num_params'], return_inverse=True)
    loss = np.array([scaling_law.loss_at(rows[run], x * horizon[run]) for run in ends.index])
    lr, tau = (np.array([np.interp(x * horizon[run], rows[run]['compute'], rows[run][column]) for run in ends.index])
               for column in ('rate', 'tau'))
    return Curves(x, loss, model, p, list(ends.index), lr.mean(0), (tau / tau[:, -1:]).mean(0))


def normalise(curves, L0, by='own'):
    """ℓ [R, K] = (L(x) - L0)/(L(1) - L0), eq. 1.

    L(1) is the run's own with by='own'. With by='expected' it is the mean over the seeds of the model; the noise that a run shares
    with its own end then does not cancel (§3.3). L0 may have leading axes. Raises LogError unless L0 is below every final loss.
    """
    L0, least = np.asarray(L0, float), curves.loss[..., -1].min(-1)
    if not (L0 < least).all():
        raise LogError(f'L0={L0.max():g} is not below every final loss (the smallest is {least.min():.6g})')
    reducible = curves.loss - L0[..., None, None]
    final = reducible[..., -1:]
    if by == 'expected':
        final = (model_average(curves) @ final)[..., curves.model, :]
    return reducible / final


def held_below(L0, curves):
    """L0 [...], lowered where it is not below every final loss of the curves [..., R, K]: a fit to mean losses may be above one."""
    return np.minimum(L0, curves.loss[..., -1].min(-1) * (1 - 1e-6))


def model_average(curves, weight=None):
    """Matrix [..., M, R] from values [R, K] of the runs to means over those of each model. `weight` [..., R] counts each run."""
    weight = np.ones(len(curves.model)) if weight is None else weight
    member = (curves.model == np.arange(len(curves.p))[:, None]) * weight[..., None, :]
    return member / member.sum(-1, keepdims=True)


def spread(curves, L0, ddof=0, by='own', weight=None):
    """The Spread of the curves: Δ, σ and the parts of Δ² between and within models (eqs. 2-4).

    ddof 0 divides by the number of runs, as published. ddof 1 estimates the variance of the population; with five seeds it raises σ
    by 12%. `weight` [R] counts each run so many times (a bootstrap draw). Leading axes of L0 and weight broadcast.
    """
    average = model_average(curves, weight)

    def mean_and_variance(values):  # over the seeds of each model [..., M, K], ddof 0
        mean = average @ values
        return mean, np.maximum(average @ values ** 2 - mean ** 2, 0)

    model_mean, inner = mean_and_variance(normalise(curves, L0, by))
    mean, between, within = model_mean.mean(-2), model_mean.var(-2), inner.mean(-2)     # V_p E_ω and E_p V_ω
    level, variance = mean_and_variance(curves.loss - np.asarray(L0, float)[..., None, None])
    R, seeds = len(curves.model), np.bincount(curves.model)[:, None]
    pooled = R / max(R - ddof, 1)                                                       # one run has Δ = 0
    bessel = np.where(seeds > 1, seeds / np.maximum(seeds - ddof, 1), np.nan)           # one seed has no noise floor
    return Spread(mean, np.sqrt((between + within) * pooled) / mean, np.sqrt(between) / mean, np.sqrt(within) / mean,
                  np.sqrt(variance * bessel) / level)


def onset(x, delta, sigma):
    """The smallest x from which on Δ < σ at every x < 1, or NaN. delta and sigma [..., K].

    x = 1 does not count, because Δ(1) = 0 by construction. NaN in sigma (one seed) gives NaN.
    """
    below = (delta < sigma)[..., :-1]
    from_here = np.flip(np.logical_and.accumulate(np.flip(below, -1), -1), -1)
    return np.where(from_here.any(-1), x[np.argmax(from_here, -1)], np.nan)


def farthest(curves, L0):
    """{'worst_model', 'worst_run'}: the model farthest from the mean curve, and the run farthest from its own model.

    The distance is the root mean square over 0.1 <= x < 1 of the relative difference of the normalised curves.
    """
    ell, late = normalise(curves, L0), (curves.x >= 0.1) & (curves.x < 1)
    model_mean = model_average(curves) @ ell
    of_model, of_run = (np.sqrt(((own / mean - 1)[:, late] ** 2).mean(-1))
                        for own, mean in ((model_mean, model_mean.mean(0)), (ell, model_mean[curves.model])))
    model, run = of_model.argmax(), of_run.argmax()
    return {'worst_model': {'num_params': curves.p[model], 'departure': of_model[model]},
            'worst_run': {'run': curves.run[run], 'num_params': curves.p[curves.model[run]], 'departure': of_run[run]}}


def without_reruns(table):
    """(table with the first run of each model and seed, notes on the others). A run whose seed is not known is kept."""
    ends = runs(ladder(table))
    again = ends.index[ends.duplicated(['num_params', 'seed']) & ends['seed'].notna()] if 'seed' in ends else []
    notes = [f'{len(again)} runs have the model and seed of another and are left out; with --seeds-by run each counts as a seed']
    return table[~table['run'].isin(again)], notes if len(again) else []


def drop_spread(curves, L0):
    """[...] relative standard deviation over models of the drop (L(x) - L(1)) / (L(1) - L0), rms over 0.25 <= x <= 0.75.

    Δ cannot choose L0, because it falls whenever less is subtracted: to 0 as L0 -> -∞. This spread has no such trend. Losses are
    means over the runs of a model. L0 [...] is below every final loss.
    """
    loss, use = model_average(curves) @ curves.loss, (curves.x >= 0.25) & (curves.x <= 0.75)  # past warm-up, before noise prevails
    drop = (loss - loss[:, -1:])[:, use] / (loss[:, -1:] - np.asarray(L0, float)[..., None, None])  # [..., M, K]
    with np.errstate(invalid='ignore'):  # a log without an evaluation there has no spread: NaN
        return np.sqrt(drop.var(-2).sum(-1) / (drop.mean(-2) ** 2).sum(-1))


def best_L0(curves):
    """(the L0 >= 0 with the smallest drop_spread, its interval [low, high]), or (NaN, None) for fewer than three models.

    The squared spread is a residual variance of M models around one curve, fitted by its height and L0, and counts once however
    many x it has. So its rise over the minimum that bounds the interval is a quantile of F with 1 and M-2 degrees of freedom.
    """
    M, floors = len(curves.p), np.linspace(0, curves.loss[:, -1].min(), 1000, endpoint=False)
    squared = drop_spread(curves, floors) ** 2
    if M < 3 or np.isnan(squared).any():
        return np.nan, None
    inside = floors[squared <= squared.min() * (1 + fdtri(1, M - 2, LEVEL) / (M - 2))]
    return float(floors[squared.argmin()]), [float(inside[0]), float(inside[-1])]


def L0_choices(curves, law, law_ci, ddof):
    """One record for each L0: `zero`, `law`, `best` (see best_L0), `law_low` and `law_high` (the ends of the law's interval).

    Its keys: name, L0, L0_ci, delta and sigma at x = 0.5, drop_spread, supercollapse_from, and the verdict with this L0 held.
    """
    best, best_ci = best_L0(curves)
    values = {'zero': 0.0, 'law': law, 'best': best, **dict(zip(('law_low', 'law_high'), law_ci or (), strict=False))}
    values = {name: min(L0, 0.999 * curves.loss[:, -1].min()) for name, L0 in values.items() if np.isfinite(L0)}
    L0, half = np.array(list(values.values())), np.abs(curves.x - 0.5).argmin()
    each = spread(curves, L0, ddof)
    found = pd.DataFrame({
        'name': list(values), 'L0': L0, 'L0_ci': [{'law': law_ci, 'best': best_ci}.get(name) for name in values],
        'delta': each.delta[:, half], 'sigma': each.sigma[:, :, half].mean(1), 'drop_spread': drop_spread(curves, L0),
        'supercollapse_from': onset(curves.x, each.delta, each.sigma.mean(1))})
    cases = [found[['sigma', 'drop_spread']].isna().any(axis=1), found['drop_spread'] > TIGHT, found['supercollapse_from'].notna()]
    return found.assign(verdict=np.select(cases, ['not decidable', 'no collapse', 'supercollapse'], 'collapse')).to_dict('records')


def L0_conflict(choices):
    """One line if the law's L0 and the best L0 differ by more than their intervals, added in quadrature, explain. Else None."""
    law, best = ({one['name']: one for one in choices}.get(name) for name in ('law', 'best'))
    if not (law and best and law['L0_ci']):
        return None
    below = best['L0'] < law['L0']
    if abs(best['L0'] - law['L0']) <= np.hypot(law['L0_ci'][not below] - law['L0'], best['L0_ci'][below] - best['L0']):
        return None
    return (f'the law has L0 = {law["L0"]:.4g}, but the curves collapse best with {best["L0"]:.4g}, beyond both intervals. Either '
            'the law is not identified: the final losses do not follow one power law. Or the ladder is not at its optimum: if the '
            f'law holds, horizons grow too {"slowly" if below else "fast"} with size')


def verdict(result):
    """(word, reason) on the result of `analyse`: supercollapse, collapse, no collapse or not decidable.

    Judged are the law's L0, the ends of its interval, and the best L0 if it lies in that interval or the two are in conflict. The
    word must hold for each of them. A collapse is a spread of the drop of at most TIGHT. Supercollapse is Δ < σ from some x on for
    each, with a 90% interval of that x, and a collapse for one: Δ(1) = 0 by construction, so Δ < σ near the end proves little.
    """
    seeds = result['seeds_per_model']
    if len(seeds) < 2:
        return 'not decidable', 'one model'
    law = result['L0_choices'][1]
    low, high = law['L0_ci'] or (law['L0'], law['L0'])
    judged = [one for one in result['L0_choices'][1:] if one['name'] != 'best' or result['L0_conflict'] or low <= one['L0'] <= high]
    tight = 'Δ(0.5) = {delta:.4f}, spread of the drop {drop_spread:.1%}'.format(**law)
    if min(seeds) < 2:
        return 'not decidable', f'{"one seed per model" if max(seeds) < 2 else "a model with one seed"}, no noise floor σ; {tight}'
    words = {one['verdict']: one['L0'] for one in judged[::-1]}
    if 'supercollapse' in words and not any(np.isnan(one['supercollapse_from']) for one in judged):
        seen = f'Δ < σ from x = {result["supercollapse_from"]:.2f} on, averaged over models'
        if np.isnan(result['supercollapse_from_ci'][1]):
            return 'not decidable', f'{seen}, but the 90% interval of that x includes never'
        return 'supercollapse', seen
    if len(words) > 1:
        return 'not decidable', 'L0 decides: ' + ', '.join(f'{word} with L0 = {L0:.4g}' for word, L0 in words.items())
    return next(iter(words)), tight


def verdict_in_words(result):
    """One line on the result of `analyse`: the verdict and its reason."""
    return ': '.join(verdict(result))


def uncertainty(curves, L0, ddof, seed=0):
    """90% intervals of Δ, σ and both onsets, and the share of draws without an onset (`never`), by their keys in `analyse`.

    L0 [S] has a value for each draw. A draw resamples the seeds within each model. Drawing n seeds with replacement lowers their
    variance to (n-1)/n and adds noise to the mean of the model. Both parts of Δ are corrected for this, and the draws of σ are
    scaled to the σ of the log. Every model needs two seeds.
    """
    rng, draws, seeds, R = np.random.default_rng(seed), len(L0), np.bincount(curves.model), len(curves.model)
    weight = np.array([np.concatenate([np.bincount(rng.integers(n, size=n), minlength=n) for n in seeds]) for _ in range(draws)])
    drawn = spread(curves, L0, ddof, weight=weight)
    within = drawn.within ** 2 / (1 - 1 / seeds).mean()
    between = np.maximum(drawn.between ** 2 - within / seeds.mean(), 0)
    delta = np.sqrt((between + within) * R / (R - ddof))                             # [S, K]
    sigma = drawn.sigma * spread(curves, L0.mean(), ddof).sigma / drawn.sigma.mean(0)  # [S, M, K]
    mean, every_model = onset(curves.x, delta, sigma.mean(1)), onset(curves.x, delta, sigma.min(1))
    at = [round(share * (draws - 1)) for share in ((1 - LEVEL) / 2, (1 + LEVEL) / 2)]  # NaN, no onset, is sorted behind all x
    return {'delta_ci': interval(delta), 'sigma_ci': interval(sigma.mean(1)), 'supercollapse_from_ci': np.sort(mean)[at].tolist(),
            'supercollapse_from_every_model_ci': np.sort(every_model)[at].tolist(), 'never': np.isnan(mean).mean()}


def predicted_quality(curves, delta):
    """(k·√(η(1-τ̂)) [K], k): Δ as predicted by eq. 24, with k by least squares over 0.5 <= x < 1.

    η is the rate over its peak and τ̂ the gradient-flow time over its end. Raises LogError if the log has no lr and tau.
    """
    if not (np.isfinite(curves.lr).all() and np.isfinite(curves.tau).all()):
        raise LogError('the predicted quality of a collapse needs lr (with its peak) and tau, which the log does not have')
    shape = np.sqrt(np.maximum(curves.lr * (1 - curves.tau), 0))
    use = (curves.x >= 0.5) & (curves.x < 1)
    k = (delta[use] @ shape[use]) / (shape[use] @ shape[use])
    return k * shape, float(k)


def analyse(table, L0=None, ddof=0, draws=200):
    """(result, notes): the scaling law, Δ, σ and the onset of supercollapse of one ladder with intervals.

    A given L0 (in units of the loss) is held. Otherwise L0 is fitted, and its uncertainty is part of the other intervals.
    """
    here, points, notes = curves(table), scaling_law.optimal_points(table), []
    seeds, one_model = np.bincount(here.model), len(here.p) == 1
    law, profile = scaling_law.fit(points.compute, points.loss, L0), None
    refits, origin = (None, None) if one_model else scaling_law.bootstrap(points, law, L0=L0)
    if origin == 'residuals':
        notes.append('one seed per model: the intervals of the fit come from its residuals, not from seeds')
    if L0 is None:
        profile = scaling_law.profile(points)
        if profile is None:
            notes.append('three models: the fit is exact, so L0 has no profile interval')
        elif not profile[1]:
            notes.append('L0 is not identified: values from {:.4g} to {:.4g} fit about as well'.format(*profile[0]))
    if one_model:
        notes.append('one model: Δ is the variation over its seeds, and says nothing on a collapse across sizes')
    if seeds.min() == 1:
        notes.append(f'{(seeds == 1).sum()} of {len(seeds)} models have one seed, and so no noise floor σ')
    found = spread(here, law.L0, ddof)
    floor = np.full_like(found.sigma, np.nan) if one_model else found.sigma  # one model cannot show a collapse across models
    fit_ci = {f'{key}_ci': interval(refits[key]) if refits and (key != 'L0' or L0 is None) else None for key in ('a', 'b', 'L0')}
    L0_ci = profile[0] if profile else fit_ci['L0_ci']
    choices = [] if one_model else L0_choices(here, law.L0, L0_ci, ddof)
    notes += [conflict] if (conflict := L0_conflict(choices)) else []
    intervals = dict.fromkeys(('delta_ci', 'sigma_ci', 'supercollapse_from_ci', 'supercollapse_from_every_model_ci', 'never'))
    if seeds.min() > 1 and not one_model:
        floors = scaling_law.bootstrap(points, law, draws, L0)[0]['L0']
        intervals = uncertainty(here, held_below(floors, here), ddof)
    result = {
        'fit': {**law._asdict(), **fit_ci, 'L0_profile_ci': profile and profile[0], 'L0_identifiable': profile and profile[1],
                'L0_fixed': L0 is not None},
        'x': here.x, 'delta': found.delta, 'sigma': found.sigma.mean(0), 'sigma_by_model': found.sigma,
        'between': found.between, 'within': found.within, 'mean': found.mean,
        'delta_expected_final': spread(here, law.L0, ddof, by='expected').delta,
        'supercollapse_from': float(onset(here.x, found.delta, floor.mean(0))),
        'supercollapse_from_every_model': float(onset(here.x, found.delta, floor.min(0))),
        **intervals, 'L0_choices': choices, 'L0_conflict': conflict, **farthest(here, law.L0),
        'num_params': here.p, 'compute': points.compute, 'final_loss': points.loss,
        'ddof': ddof, 'seeds_per_model': seeds.tolist(), 'level': LEVEL,
    }
    return result | dict(zip(('verdict', 'verdict_reason'), verdict(result), strict=True)), notes
