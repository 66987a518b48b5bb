"""Predicts a loss curve under one learning-rate schedule from the constant-rate run: L(τ) = L_const(τ) + α·δη·Tr Σ.

Qiu et al. (2025) §3.2, eqs. 14-16. Runs are compared at equal gradient-flow time τ, the sum of the rates. δη is the difference of
the two rates over the peak rate, in [-1, 0]. Tr Σ is the trace of the mini-batch covariance of the preconditioned gradient of the
predicted run, without the bias of the logged one (`trace_share`). α is fitted, and judged on schedules that were left out.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.integrate import cumulative_trapezoid
from scipy.special import stdtrit

from analysis.scaling_law import LEVEL
from analysis.table import LogError, require, runs

THEORY = 0.25      # eq. 14
HAND_SET = 0.26    # the authors' value for the MLP (0.21 for CIFAR-5M), for the trace as logged
RATES = {  # rate over its peak at x, the share of the run: the schedules of optimizer.py that decay from the first step on
    'linear': lambda x: 1 - x, 'cosine': lambda x: (1 + np.cos(np.pi * x)) / 2, 'quadratic': lambda x: 1 - x ** 2}
HALF_LIFE = 0.01   # of the run, for the smoothing in figures
# Steps until Adam's second moment no longer remembers its start, at b2 = 0.95. A weight that has had no gradient yet has the
# preconditioner peak_lr/eps, so the trace reaches 1e13, which would decide the fit. The traces of these steps are left out.
SETTLED = 20


class Fit(NamedTuple):
    alpha: float
    alpha_se: float     # cluster-robust over the reference runs, whose noise their decaying runs share; NaN for a single run
    alpha_ci: list      # 90%, Student's t with groups - 1 degrees of freedom, or None
    rmse: float         # over all evaluations in decay phases, in units of the loss
    runs: int
    groups: int         # reference runs. If there is one, the clusters are the decaying runs and its own noise is not in alpha_se


def trace_share(table):
    """[rows] The logged trace over the unbiased one: (n - 1)/n for n test batches, NaN for n = 1, 1 if n is not known.

    Logged is `Buvar`, the mean over the test batches of the squared deviation from their own mean, as published.
    """
    n = table.get('num_test_batches', pd.Series(np.nan, table.index))
    return ((n - 1) / n).where(n > 1).mask(n.isna(), 1.0)


def require_adam(table):
    """Raises LogError for runs of another optimiser, whose preconditioner is not diagonal. Their logs have no Tr Σ."""
    if others := sorted(set(table.get('optimizer', pd.Series(dtype=str)).dropna()) - {'adam'}):
        raise LogError(f'eq. 16 needs Tr Σ under Adam, and the log has runs of {", ".join(others)}; use --where optimizer=adam')


def align(table):
    """(data frame of the decaying runs beside their constant-rate references, notes).

    A reference is a `const` run of the same model, B and peak rate. Of several, one with the same tokens is preferred, then one
    with the same seed, then the longest. A row is an evaluation inside the reference, with the columns of the log and

    reference_run     name of the reference               tokens_total, x       tokens at the end of the run, tokens over these
    loss, reference   test loss, L_const(τ)               eta, reference_eta    rate over its peak: 1 after the warm-up if constant
    noise             Tr Σ, NaN if unknown or early       reference_noise       Tr Σ of the reference
    delta_eta         δη, 0 during the warm-up            share                 see `trace_share`

    Raises LogError if the log lacks a column, or if no run has a reference.
    """
    require_adam(table)
    require(table, ['num_params', 'schedule', 'peak_lr', 'test_loss', 'lr', 'tau', 'tokens', 'Buvar'], 'schedule prediction')
    table = table.assign(share=trace_share(table), noise=lambda t: t['Buvar'] / t['share'], eta=table['lr'] / table['peak_lr'],
                         loss=table['test_loss'], decay_frac=table['decay_frac'].fillna(1) if 'decay_frac' in table else 1.0)
    ends, rows, notes = runs(table), dict(list(table.groupby('run', sort=False))), []
    unknown = (ends['share'] == 1).sum()
    if unknown:
        notes.append(f'{unknown} runs do not say on how many test batches n their trace was measured (num_test_batches); '
                     'the trace is used as logged, which makes α too large by n/(n - 1)')
    constant, pairs, alone = ends[ends['schedule'] == 'const'], [], []
    for run, end in ends[ends['schedule'] != 'const'].iterrows():
        name, own = _reference(constant, end), rows[run]
        if name is not None:
            own = own[own['tau'].between(rows[name]['tau'].iloc[0], rows[name]['tau'].iloc[-1])]
        if name is None or len(own) < 2:
            alone.append(run)
            continue
        beside = {to: np.interp(own['tau'], rows[name]['tau'], rows[name][column]) for to, column in (
            ('reference', 'loss'), ('reference_eta', 'eta'), ('reference_noise', 'noise'))}
        pairs.append(own.assign(reference_run=name, tokens_total=end['tokens'], x=own['tokens'] / end['tokens'], **beside))
    if not pairs:
        found = ', '.join(sorted(ends['schedule'].dropna().unique()))
        raise LogError('no run with a decaying rate has a constant-rate run of the same model, batch and peak rate beside it '
                       f'(schedules in the log: {found})')
    if alone:
        notes.append(f'{len(alone)} runs have no constant-rate run beside them: {", ".join(sorted(alone)[:3])}')
    aligned = pd.concat(pairs, ignore_index=True)
    if 'step' in aligned:
        aligned['noise'] = aligned['noise'].mask(aligned['step'] < SETTLED)
    return aligned.assign(delta_eta=(aligned['eta'] - 1).mask(aligned['reference_eta'] < 1 - 1e-6, 0)), notes


def _reference(constant, end):
    """Name of the constant-rate run to pair with the run that ends in the row `end`, or None."""
    columns = [c for c in ('num_params', 'D', 'N', 'L', 'B', 'peak_lr') if c in constant]
    same, wanted = constant[columns], end[columns]
    match = constant[((same == wanted) | (same.isna() & wanted.isna())).all(axis=1)]
    rank = [(abs(one['tokens'] - end['tokens']) <= 0.01 * end['tokens'], one.get('seed') == end.get('seed'), one['tokens'])
            for _, one in match.iterrows()]
    return match.index[rank.index(max(rank))] if rank else None


def as_logged(aligned):
    """The same runs with the published, biased trace in place of Tr Σ."""
    share = aligned['share']
    return aligned.assign(noise=aligned['noise'] * share, reference_noise=aligned['reference_noise'] * share, share=1.0)


def decay_phase(aligned):
    """The rows where the rate differs from the reference's, and Tr Σ is known."""
    return aligned[(aligned['delta_eta'] < -1e-9) & np.isfinite(aligned['noise'])]


def predict(aligned, alpha):
    """Predicted loss of every row, eq. 16. With alpha = 0 it is the constant-rate loss."""
    change = alpha * aligned['delta_eta'] * aligned['noise']
    return aligned['reference'] + change.mask((aligned['delta_eta'] == 0) | (alpha == 0), 0)


def fit(aligned):
    """α by least squares over the decay phases of all runs; every evaluation has the same weight.

    Raises LogError if there is no decay phase.
    """
    rows = decay_phase(aligned)
    z, y = rows['delta_eta'] * rows['noise'], rows['loss'] - rows['reference']
    square = z @ z
    if not square > 0:
        raise LogError('no evaluation in a decay phase has a Tr Σ (Buvar); α cannot be fitted')
    alpha = z @ y / square
    residual, groups = y - alpha * z, rows['reference_run'].nunique()
    score = (z * residual).groupby(rows['reference_run' if groups > 1 else 'run']).sum()
    G, se, ci = len(score), np.nan, None
    if G > 1:
        se = np.sqrt(score @ score * G / (G - 1)) / square
        half = stdtrit(G - 1, (1 + LEVEL) / 2) * se
        ci = [alpha - half, alpha + half]
    return Fit(alpha, se, ci, np.sqrt((residual ** 2).mean()), rows['run'].nunique(), groups)


def rmse_relative(aligned, alpha):
    """Root mean square of the residual over the loss range of the run's decay phase, over all evaluations in decay phases."""
    rows = decay_phase(aligned)
    of_run = rows.groupby('run')['loss']
    ratio = (rows['loss'] - predict(rows, alpha)) / (of_run.transform('max') - of_run.transform('min'))
    return np.sqrt((ratio[np.isfinite(ratio)] ** 2).mean())


def relative_errors(aligned, alpha):
    """Mean absolute error of each run over its decay phase, relative to the drop: the loss that the decay removes by its end.

    Runs without a decay phase or without a drop are left out.
    """
    rows, ends = decay_phase(aligned), runs(aligned)
    error = (rows['loss'] - predict(rows, alpha)).abs().groupby(rows['run']).mean()
    return (error / (ends['reference'] - ends['loss']).where(lambda drop: drop > 0)).dropna()


def leave_one_out(aligned):
    """One dict a schedule: `alpha_without`, fitted without any run of that schedule, and the errors of predicting its runs.

    An error is the mean over runs of `relative_errors`: `error` with alpha_without, `theory` with 1/4, `hand_set` with the authors'
    value and the trace as logged, `no_noise_term` with α = 0.
    """
    rows = []
    for (schedule, decay_frac), held in aligned.groupby(['schedule', 'decay_frac']):
        rest = aligned[aligned['schedule'] != schedule]
        alpha = fit(rest).alpha if len(rest) else np.nan
        errors = {'error': relative_errors(held, alpha), 'hand_set': relative_errors(as_logged(held), HAND_SET),
                  'theory': relative_errors(held, THEORY), 'no_noise_term': relative_errors(held, 0)}
        if len(errors['no_noise_term']):
            rows.append({'schedule': schedule, 'decay_frac': decay_frac, 'runs': len(errors['no_noise_term']),
                         'alpha_without': alpha, **{name: each.mean() for name, each in errors.items()}})
    return rows


def analyse(table):
    """(result, notes) of a log of several schedules: α with its interval, the same with the trace as logged, and the errors."""
    aligned, notes = align(table)
    result, published = fit(aligned), fit(as_logged(aligned))
    if result.groups == 1 < result.runs:
        notes.append('one constant-rate run: its own noise is not in the standard error of α')
    if result.runs == 1:
        notes.append('a single run with a decay phase: α has no standard error and no schedule can be left out')
    return result._asdict() | {
        'alpha_published': published.alpha, 'alpha_published_se': published.alpha_se, 'alpha_published_ci': published.alpha_ci,
        'rmse_relative': rmse_relative(aligned, result.alpha), 'leave_one_schedule_out': leave_one_out(aligned)}, notes


def alpha_of_reference(table):
    """(α, its standard deviation over runs) for the Tr Σ of the constant-rate run, which is all that is known before training.

    This α is larger than that for the run's own Tr Σ: by 1.24 in the authors' log, by 1.46 in ours. The standard deviation measures
    the error of the law for one run. It is NaN if there is one run.
    """
    aligned, _ = align(table)
    rows = decay_phase(aligned.assign(noise=aligned['reference_noise'].mask(aligned['x'] < 0.05)))
    return fit(rows).alpha, pd.Series([fit(own).alpha for _, own in rows.groupby('run')]).std()


def noise_share(table, p, L0):
    """Tr Σ/(L - L0) [S] of a constant-rate run with p parameters, for irreducible losses L0 [S].

    By eq. 17 the ratio is constant along a run. Its logarithm is averaged over x >= 0.1, and a line in log p through the models
    of the table extrapolates it. Raises LogError if the log has no trace, or other schedules.
    """
    require_adam(table)
    require(table, ['Buvar', 'num_params', 'compute', 'test_loss'], 'another schedule')
    found = sorted(set(table['schedule'].dropna())) if 'schedule' in table else []
    if found != ['const']:
        raise LogError(f'another schedule is derived from constant-rate runs; the log has {", ".join(found) or "no schedule"}')
    table = table.assign(noise=table['Buvar'] / trace_share(table))
    late = table[(table['compute'] >= 0.1 * table.groupby('run')['compute'].transform('max')) & (table['noise'] > 0)]
    if not len(late):
        raise LogError('the log has no Tr Σ (Buvar); another schedule needs it')
    share = np.log(late['noise'].to_numpy() / (late['test_loss'].to_numpy() - L0[:, None]))      # [S, n]
    mean = pd.DataFrame(share.T).groupby(late['num_params'].to_numpy()).mean()                   # [M, S]
    return np.exp(np.polyfit(np.log(mean.index / p), mean, 1)[1])                                # the line at log p


def apply_schedule(name, x, reducible, share, alpha, horizon_ratio):
    """Reducible loss [S, G] at x under the schedule `name`, predicted from the constant-rate loss `reducible` [S, G] at the same x.

    Eq. 16 with Tr Σ = share [S] × reducible loss (eq. 17), at equal τ: R_const(τ)·(1 - α·(1 - η)·share). α is a number or [S].
    `horizon_ratio` is the run's horizon over the horizon of the constant-rate curves. The loss before their first x is taken to be
    that at their first x. Raises LogError if τ goes beyond the constant-rate curves.
    """
    rate = RATES[name](x)
    fine = np.linspace(0, 1, 2001)
    tau = horizon_ratio * np.interp(x, fine, cumulative_trapezoid(RATES[name](fine), fine, initial=0))
    if tau[-1] > x[-1] * (1 + 1e-9):
        raise LogError(f'a {name} run of {horizon_ratio:.3g} times the horizon of the constant-rate curves goes beyond their end; '
                       'shorten --horizon')
    constant = np.exp(np.stack([np.interp(np.log(tau), np.log(x), np.log(one)) for one in reducible]))
    return constant * (1 - (alpha * share)[:, None] * (1 - rate))


def smooth(x, y, half_life=HALF_LIFE):
    """Exponential moving average of y over x (share of the run), from its first finite value on. For figures only."""
    smoothed = np.array(y, float)
    keep = 0.5 ** (np.diff(x) / half_life)
    for i in range(1, len(smoothed)):
        if np.isfinite(smoothed[i - 1]):
            smoothed[i] = keep[i - 1] * smoothed[i - 1] + (1 - keep[i - 1]) * smoothed[i]
    return smoothed
