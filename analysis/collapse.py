"""Scaling collapse: normalised loss curves, their collapse tolerance Δ, the noise floor σ, and the onset of supercollapse.

Qiu et al. (2025) §2.3-2.5, eqs. 1-4, and §3.3, eq. 24 for the predicted quality. A curve is normalised by its own compute C* and
its own final reducible loss. The irreducible loss L0 comes from scaling_law.py, and its uncertainty enters Δ, σ and the onset.
"""

from typing import NamedTuple

import numpy as np

from analysis import scaling_law
from analysis.scaling_law import interval
from analysis.table import LogError, require, runs

GRID = np.arange(1, 101) / 100  # normalised compute x


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
    ends = runs(table)
    for column in ('schedule', 'decay_frac', 'tag', 'match_mup_at_D'):
        values = ends[column].dropna().unique() if column in ends else []
        if len(values) > 1:
            raise LogError(f'a collapse compares runs that differ in size and seed only, and the log has {column} '
                           f'{", ".join(map(str, sorted(values)))}; choose one with --where {column}=…')
    for column in ('peak_lr', 'B', 'N', 'L'):  # they may depend on the size; a peak rate taken from the column lr is approximate
        by_model = ends.groupby('num_params')[column] if column in ends else None
        if by_model is not None and (by_model.max() / by_model.min()).max() > 1.1:
            p = (by_model.max() / by_model.min()).idxmax()
            values = ends.loc[ends['num_params'] == p, column].dropna().unique()
            raise LogError(f'a collapse compares runs that differ in size and seed only, and the model with {p:.4g} parameters '
                           f'has {column} {", ".join(f"{one:g}" for one in sorted(values))}; choose one with --where {column}=…')
    horizon = scaling_law.horizon_of(table)
    by_model = horizon.groupby(ends['num_params'])
    wide = by_model.max() / by_model.min() > 1.02
    if wide.any():
        p = wide.idxmax()
        raise LogError(f'the runs of the model with {p:.4g} parameters have horizons from {by_model.min()[p]:.4g} to '
                       f'{by_model.max()[p]:.4g} FLOPs; choose one ladder, e.g. with --where T=…')
    return table


def curves(table, x=GRID):
    """Curves with the loss of every run at x·C*, interpolated in (log C, log L), for the x at which every run has data."""
    table = ladder(table)
    ends, horizon = runs(table), scaling_law.horizon_of(table)
    positive = table[table['compute'] > 0]
    first = (positive.groupby('run')['compute'].first() / horizon).max()
    x = np.asarray(x, float)
    x = x[x >= first]
    if not len(x) or x[-1] != 1:
        raise LogError('the grid of normalised compute must end at 1 and begin where the runs do')
    p = np.unique(ends['num_params'])
    names, model, loss, lr, tau = [], [], [], [], []
    for run, rows in positive.groupby('run', sort=False):
        at = x * horizon[run]
        C = rows['compute'].to_numpy()
        at[-1] = min(at[-1], C[-1])  # a run may end on the last whole step before C*
        names.append(run)
        model.append(np.searchsorted(p, ends.at[run, 'num_params']))
        loss.append(scaling_law.loss_at(rows, at))
        lr.append(np.interp(at, C, rows['lr'] / ends.at[run, 'peak_lr']) if {'lr', 'peak_lr'} <= set(rows) else at * np.nan)
        tau.append(np.interp(at, C, rows['tau']) if 'tau' in rows else at * np.nan)
    order = np.argsort(model, kind='stable')
    tau = np.array(tau)
    return Curves(x, np.array(loss)[order], np.array(model)[order], p, [names[i] for i in order],
                  np.mean(lr, 0), np.mean(tau / tau[:, -1:], 0))


def normalise(curves, L0, by='own'):
    """ℓ [R, K] = (L(x) - L0)/(L(1) - L0), eq. 1.

    L(1) is the run's own with by='own'. With by='expected' it is the mean over the seeds of the model; the noise that a run shares
    with its own end then does not cancel (§3.3). L0 may have leading axes. Raises LogError unless L0 is below every final loss.
    """
    L0 = np.asarray(L0, float)
    if not (L0 < curves.loss[:, -1].min()).all():
        raise LogError(f'L0={L0.max():g} is not below every final loss (the smallest is {curves.loss[:, -1].min():.6g})')
    reducible = curves.loss - L0[..., None, None]
    final = reducible[..., -1:]
    if by == 'expected':
        final = (_weights(curves.model)[1] @ final)[..., curves.model, :]
    return reducible / final


def _weights(model):
    """(weight of each run [R] that gives every model the same weight, matrix [M, R] that averages over the seeds of a model)."""
    count = np.bincount(model)
    average = (model[None] == np.arange(len(count))[:, None]) / count[:, None]
    return average.sum(0) / len(count), average


def spread(curves, L0, ddof=0, by='own', weight=None):
    """The Spread of the curves: Δ, σ and the parts of Δ² between and within models (eqs. 2-4).

    ddof 0 divides by the number of runs, as published. ddof 1 estimates the variance of the population; with five seeds it raises σ
    by 12%. `weight` [R] counts each run so many times (a bootstrap draw). Leading axes of L0 and weight broadcast.
    """
    ell = normalise(curves, L0, by)                                            # [..., R, K]
    count = np.ones(len(curves.model)) if weight is None else np.asarray(weight, float)
    member = (curves.model[None] == np.arange(len(curves.p))[:, None]) * count[..., None, :]   # [..., M, R]
    seeds = member.sum(-1, keepdims=True)
    average = member / seeds
    model_mean = average @ ell                                                 # [..., M, K]
    model_square = average @ ell ** 2
    R = len(curves.model)
    mean = model_mean.mean(-2)
    inner = np.maximum(model_square - model_mean ** 2, 0)                      # V_ω, ddof 0
    between = np.maximum((model_mean ** 2).mean(-2) - mean ** 2, 0)            # V_p E_ω
    within = inner.mean(-2)                                                    # E_p V_ω
    total = between + within
    reducible = curves.loss - np.asarray(L0, float)[..., None, None]
    level, square = average @ reducible, average @ reducible ** 2
    with np.errstate(invalid='ignore', divide='ignore'):
        bessel = np.where(seeds > 1, seeds / (seeds - ddof), np.nan)           # NaN: one seed gives no noise floor
        sigma = np.sqrt(np.maximum(square - level ** 2, 0) * bessel) / level
        return Spread(mean, np.sqrt(total) * _pooled(ddof, R) / mean, np.sqrt(between) / mean, np.sqrt(within) / mean, sigma)


def onset(x, delta, sigma):
    """The smallest x from which on Δ < σ at every x < 1, or NaN. delta and sigma [..., K].

    x = 1 does not count, because Δ(1) = 0 by construction. NaN in sigma (one seed) gives NaN.
    """
    below = (delta < sigma)[..., :-1]
    from_here = np.flip(np.logical_and.accumulate(np.flip(below, -1), -1), -1)
    found = from_here.any(-1)
    return np.where(found, x[np.argmax(from_here, -1)], np.nan)


class Verdict(NamedTuple):
    mean: float            # x from which Δ < σ averaged over models, NaN if never
    every_model: float     # x from which Δ < σ of every model, NaN if never
    worst_model: dict      # the model whose mean normalised curve is farthest from the mean of all, and how far
    worst_run: dict        # the run that is farthest from its own model, and how far


def verdict(curves, result, L0):
    """The Verdict: the onset of supercollapse by both readings of the paper (§2.5), and the model and run farthest from the mean.

    A distance is the root mean square over 0.1 <= x < 1 of the relative difference to the mean normalised curve.
    """
    average_floor, lowest_floor = result.sigma.mean(0), result.sigma.min(0)
    if len(curves.p) < 2:  # one model cannot show a collapse across models
        average_floor = lowest_floor = np.full_like(result.delta, np.nan)
    late = (curves.x >= 0.1) & (curves.x < 1)
    ell = normalise(curves, L0)
    model_mean = _weights(curves.model)[1] @ ell
    apart = np.sqrt((((model_mean / result.mean - 1)[:, late]) ** 2).mean(-1))
    alone = np.sqrt((((ell / model_mean[curves.model] - 1)[:, late]) ** 2).mean(-1))
    worst, odd = int(apart.argmax()), int(alone.argmax())
    return Verdict(float(onset(curves.x, result.delta, average_floor)), float(onset(curves.x, result.delta, lowest_floor)),
                   {'num_params': float(curves.p[worst]), 'departure': float(apart[worst])},
                   {'run': curves.run[odd], 'num_params': float(curves.p[curves.model[odd]]), 'departure': float(alone[odd])})


def verdict_in_words(result):
    """One line on the result of `analyse`: whether there is supercollapse, and from which x on."""
    if len(result['num_params']) < 2:
        return 'supercollapse cannot be decided: one model'
    if min(result['seeds_per_model']) < 2:
        return 'supercollapse cannot be decided: ' + (
            'one seed per model' if max(result['seeds_per_model']) < 2 else 'a model with one seed has no noise floor σ')
    x = result['supercollapse_from']
    if np.isnan(x):
        return 'no supercollapse: averaged over models, Δ is not below σ up to the end of training'
    return f'supercollapse: Δ < σ from x = {x:.2f} on, averaged over models'


class Uncertainty(NamedTuple):
    """Bootstrap draws of seeds and L0."""
    L0: np.ndarray         # [S]
    delta: np.ndarray      # [S, K]
    sigma: np.ndarray      # [S, K] mean over models
    mean: np.ndarray       # [S] onset, σ averaged over models
    every_model: np.ndarray  # [S] onset, the smallest σ of any model


def uncertainty(curves, points, law, draws=200, seed=0, fixed_L0=None, ddof=0):
    """Draws of Δ, σ and the onset: seeds are resampled within each model, and L0 is fitted again to resampled final losses.

    Resampling n seeds lowers their variance to (n-1)/n. The part of Δ within models is corrected for this, and the draws of σ are
    scaled to the σ of the log. None if every model has one seed and L0 is fixed, because then nothing varies.
    """
    rng = np.random.default_rng(seed)
    seeds = np.bincount(curves.model)
    if fixed_L0 is None:
        losses, _ = scaling_law.resampled_losses(points, law, draws, np.random.default_rng(seed))
        L0 = np.full(draws, law.L0) if losses is None else scaling_law.fit_batch(points.compute, losses, law)['L0']
        L0 = np.minimum(L0, curves.loss[:, -1].min() * (1 - 1e-6))
    elif seeds.max() == 1:
        return None
    else:
        L0 = np.full(draws, fixed_L0)
    draw = [spread(curves, value, ddof, weight=np.concatenate(
        [np.bincount(rng.integers(n, size=n), minlength=n) for n in seeds])) for value in L0]
    # Drawing with replacement lowers the variance within models and adds noise to their means; both are corrected.
    shrink = np.where(seeds > 1, 1 - 1 / seeds, 1).mean()
    within = np.array([one.within for one in draw]) ** 2 / shrink
    between = np.maximum(np.array([one.between for one in draw]) ** 2 - within / seeds.mean() * (seeds.max() > 1), 0)
    delta = np.sqrt(between + within) * _pooled(ddof, len(curves.model))
    sigma = np.array([one.sigma for one in draw])                                # [S, M, K]
    with np.errstate(invalid='ignore', divide='ignore'):
        sigma = sigma * spread(curves, L0.mean(), ddof).sigma / sigma.mean(0)
    mean = onset(curves.x, delta, sigma.mean(1))
    every = onset(curves.x, delta, sigma.min(1))
    sigma = sigma.mean(1)
    return Uncertainty(L0, delta, sigma, mean, every)


def _pooled(ddof, R):
    """Factor from the standard deviation of R runs with ddof 0 to that with `ddof`."""
    return np.sqrt(R / (R - ddof)) if R > ddof else np.nan


def predicted_quality(curves, delta, from_x=0.5):
    """(k·√(η(1-τ̂)) [K], k): Δ as predicted by eq. 24, with k by least squares over from_x <= x < 1.

    η is the rate over its peak and τ̂ the gradient-flow time over its end. Raises LogError if the log has no lr and tau.
    """
    if not (np.isfinite(curves.lr).all() and np.isfinite(curves.tau).all()):
        raise LogError('the predicted quality of a collapse needs lr (with its peak) and tau, which the log does not have')
    shape = np.sqrt(np.maximum(curves.lr * (1 - curves.tau), 0))
    use = (curves.x >= from_x) & (curves.x < 1)
    k = (delta[use] @ shape[use]) / (shape[use] @ shape[use])
    return k * shape, float(k)


def analyse(table, L0=None, ddof=0, draws=200):
    """(result, notes): the scaling law, Δ, σ and the onset of supercollapse of one ladder with intervals.

    A given L0 (in units of the loss) is held. Otherwise L0 is fitted, and its uncertainty is part of the other intervals.
    """
    here = curves(table)
    points = scaling_law.optimal_points(table)
    notes = []
    fixed = L0 is not None
    if fixed:
        one_model = len(points.p) < 2
        law = scaling_law.Law(np.nan, np.nan, L0) if one_model else scaling_law.fit_given_L0(points.compute, points.loss, L0)
        draws_law, origin, profile = None, 'none', None
    else:
        law = scaling_law.fit(points.compute, points.loss)
        draws_law, origin = scaling_law.bootstrap(points, law)
        profile = scaling_law.profile(points)
        if origin == 'residuals':
            notes.append('one seed per model: the intervals of the fit come from its residuals, not from seeds')
        if profile is None:
            notes.append('three models: the fit is exact, so L0 has no profile interval')
        elif not profile.identifiable:
            notes.append(f'L0 is not identified: values from {profile.ci[0]:.4g} to {profile.ci[1]:.4g} fit about as well')
    if len(points.p) == 1:
        notes.append('one model: Δ is the variation over its seeds, and says nothing on a collapse across sizes')
    seeds = np.bincount(here.model)
    if seeds.min() == 1:
        notes.append(f'{(seeds == 1).sum()} of {len(seeds)} models have one seed: they have no noise floor σ, so supercollapse '
                     'cannot be decided')
    result = spread(here, law.L0, ddof)
    found = verdict(here, result, law.L0)
    random = None
    if seeds.min() > 1 and len(seeds) > 1:
        random = uncertainty(here, points, law, draws, fixed_L0=L0, ddof=ddof)
    sensitivity = None
    if profile is not None and seeds.min() > 1:
        floors = [min(L, 0.999 * here.loss[:, -1].min()) for L in (profile.ci[0], law.L0, profile.ci[1])]
        each = [spread(here, L, ddof) for L in floors]
        sensitivity = {'L0': floors, 'supercollapse_from': [float(onset(here.x, s.delta, s.sigma.mean(0))) for s in each]}
    return {
        'fit': {'a': law.a, 'b': law.b, 'L0': law.L0, 'r2': law.r2, 'objective': law.objective,
                **{f'{k}_ci': interval(draws_law[k]) if draws_law else None for k in ('a', 'b', 'L0')},
                'L0_profile_ci': profile.ci if profile else None,
                'L0_identifiable': profile.identifiable if profile else None, 'L0_fixed': fixed},
        'x': here.x, 'delta': result.delta, 'sigma': result.sigma.mean(0), 'sigma_by_model': result.sigma,
        'between': result.between, 'within': result.within, 'mean': result.mean,
        'delta_ci': _band(random.delta) if random else None, 'sigma_ci': _band(random.sigma) if random else None,
        'delta_expected_final': spread(here, law.L0, ddof, by='expected').delta,
        'supercollapse_from': found.mean, 'supercollapse_from_ci': _onset_interval(random.mean) if random else None,
        'supercollapse_from_every_model': found.every_model,
        'supercollapse_from_every_model_ci': _onset_interval(random.every_model) if random else None,
        'never': float(np.isnan(random.mean).mean()) if random else None,
        'L0_sensitivity': sensitivity, 'worst_model': found.worst_model, 'worst_run': found.worst_run,
        'num_params': here.p, 'compute': points.compute, 'final_loss': points.loss,
        'ddof': ddof, 'seeds_per_model': [int(n) for n in seeds], 'level': scaling_law.LEVEL,
    }, notes


def _band(draws):
    return np.nanquantile(draws, [(1 - scaling_law.LEVEL) / 2, (1 + scaling_law.LEVEL) / 2], axis=0)


def _onset_interval(draws):
    """Percentile interval of the onsets. A draw without an onset counts as later than any x, infinity (null in JSON)."""
    ordered = np.sort(np.where(np.isnan(draws), np.inf, draws))
    return [float(ordered[int(round(q * (len(ordered) - 1)))]) for q in ((1 - scaling_law.LEVEL) / 2,
                                                                         (1 + scaling_law.LEVEL) / 2)]
