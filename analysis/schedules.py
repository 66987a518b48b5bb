"""Predicting a loss curve under one learning-rate schedule from the constant-rate run: L(τ) = L_const(τ) + α·δη·Tr Σ.

Qiu et al. (2025) §3.2, eqs. 14-16. Runs are aligned at equal gradient-flow time τ (the sum of the rates); Tr Σ is `Buvar`,
the trace of the mini-batch covariance of the preconditioned gradient, of the predicted run itself; δη the difference of
the schedules, in [-1, 0]. Theory gives α = 1/4; here it is fitted, and judged on schedules left out of the fit.
"""

from typing import NamedTuple

import numpy as np

from analysis.scaling_law import LEVEL
from analysis.table import LogError, require, runs

THEORY = 0.25      # eq. 14
HAND_SET = 0.26    # the authors' value for the MLP (0.21 for CIFAR-5M)
RATES = {  # rate over its peak at x, the share of the run: the shapes of optimizer.py that decay from the first step on
    'linear': lambda x: 1 - x, 'cosine': lambda x: (1 + np.cos(np.pi * x)) / 2, 'quadratic': lambda x: 1 - x ** 2}
HALF_LIFE = 0.01   # of the run, for the smoothing of the pictures


class Aligned(NamedTuple):
    """A run beside its constant-rate reference at equal τ. Arrays [n], one entry an evaluation inside the reference."""
    run: str
    reference_run: str
    schedule: str
    decay_frac: float
    p: float
    tokens_total: float   # T, tokens at the end of the run
    peak_lr: float
    x: np.ndarray         # tokens over tokens_total
    tau: np.ndarray
    eta: np.ndarray       # rate over its peak
    reference_eta: np.ndarray    # that of the constant-rate run at the same τ: 1 but for its warm-up
    loss: np.ndarray
    reference: np.ndarray        # L_const(τ)
    noise: np.ndarray            # Tr Σ of the run, Buvar; NaN where it was not measured
    reference_noise: np.ndarray  # Tr Σ of the constant-rate run at the same τ

    @property
    def delta_eta(self):
        return np.where(self.reference_eta < 1 - 1e-6, 0, self.eta - 1)  # both warm up alike

    @property
    def decaying(self):
        """Evaluations of the decay phase: the rate differs from the reference's, and Tr Σ is known."""
        return (self.delta_eta < -1e-9) & np.isfinite(self.noise)

    @property
    def drop(self):
        """Loss that the decay has taken off by the end, against the constant rate at equal τ."""
        return self.reference[-1] - self.loss[-1]


class Fit(NamedTuple):
    alpha: float
    alpha_se: float     # sandwich over the reference runs, whose noise all their decaying runs share; NaN for a single run
    alpha_ci: list      # 90%, Student's t with groups - 1 degrees of freedom, or None
    rmse: float         # over all evaluations of the decay phases, in units of the loss
    runs: int
    groups: int         # reference runs; with a single one, the decaying runs stand alone and its noise is not in alpha_se


def align(table):
    """(list of Aligned, notes): every run with a decaying rate beside a `const` run of the same model, B and peak rate.

    Of several, the reference with the same T and seed is preferred, then the longest. Raises LogError if the log lacks what
    the prediction needs, or if no run has a reference.
    """
    require(table, ['num_params', 'schedule', 'peak_lr', 'test_loss', 'lr', 'tau', 'tokens', 'Buvar'], 'schedule prediction')
    ends = runs(table)
    rows = dict(list(table.groupby('run', sort=False)))
    same = [c for c in ('num_params', 'D', 'N', 'L', 'B', 'peak_lr') if c in ends]
    constant = ends[ends['schedule'] == 'const']
    aligned, alone = [], []
    for run, end in ends[ends['schedule'] != 'const'].iterrows():
        match = constant
        for column in same:
            match = match[(match[column] == end[column]) | (match[column].isna() & (end[column] != end[column]))]
        if not len(match):
            alone.append(run)
            continue
        rank = [(abs(one['tokens'] - end['tokens']) <= 0.01 * end['tokens'], one.get('seed') == end.get('seed'), one['tokens'])
                for _, one in match.iterrows()]
        name = match.index[max(range(len(rank)), key=rank.__getitem__)]
        reference = rows[name]
        own = rows[run]
        own = own[(own['tau'] >= reference['tau'].iloc[0]) & (own['tau'] <= reference['tau'].iloc[-1])]
        if len(own) < 2:
            alone.append(run)
            continue
        at = own['tau'].to_numpy()
        beside = {column: np.interp(at, reference['tau'], reference[column]) for column in ('lr', 'test_loss', 'Buvar')}
        aligned.append(Aligned(
            run, name, end['schedule'], float(end.get('decay_frac', np.nan)), float(end['num_params']), float(end['tokens']),
            float(end['peak_lr']), (own['tokens'] / end['tokens']).to_numpy(), at, (own['lr'] / end['peak_lr']).to_numpy(),
            beside['lr'] / end['peak_lr'], own['test_loss'].to_numpy(), beside['test_loss'], settled_noise(own), beside['Buvar']))
    if not aligned:
        found = ', '.join(sorted(ends['schedule'].dropna().unique()))
        raise LogError('no run with a decaying rate has a constant-rate run of the same model, batch and peak rate beside it '
                       f'(schedules in the log: {found})')
    notes = [f'{len(alone)} runs have no constant-rate run beside them: {", ".join(sorted(alone)[:3])}'] if alone else []
    return aligned, notes


def settled_noise(rows):
    """Tr Σ of a run's evaluations, NaN in the first 20 steps, the memory of Adam's second moment at b2 = 0.95.

    Until a weight has had a gradient its preconditioner is peak_lr/eps, so the trace of the first steps is up to 1e13: any weight
    of the decay there, however small, would decide the fit.
    """
    noise = rows['Buvar'].to_numpy()
    return np.where(rows['step'] < 20, np.nan, noise) if 'step' in rows else noise


def predict(one, alpha):
    """Predicted loss [n] of an aligned run, eq. 16; the constant-rate loss itself for alpha 0."""
    noise = np.where(one.delta_eta == 0, 0, one.noise) if alpha else np.zeros_like(one.loss)
    return one.reference + alpha * one.delta_eta * noise


def fit(aligned, second_term=False):
    """α by least squares over the decay phases of all runs, every evaluation counting alike.

    second_term=True fits the whole of eq. 15, α·δ(η·Tr Σ), in place of α·δη·Tr Σ; the paper drops the rest (appendix I).
    Raises LogError if there is no decay phase.
    """
    z = [_term(one, second_term)[one.decaying] for one in aligned]
    y = [(one.loss - one.reference)[one.decaying] for one in aligned]
    square = sum(a @ a for a in z)
    if not square > 0:
        raise LogError('no evaluation in a decay phase has a Tr Σ (Buvar); α cannot be fitted')
    alpha = sum(a @ b for a, b in zip(z, y, strict=True)) / square
    residual = [b - alpha * a for a, b in zip(z, y, strict=True)]
    used = [i for i, a in enumerate(z) if len(a)]
    references = {aligned[i].reference_run for i in used}
    group = [aligned[i].reference_run if len(references) > 1 else aligned[i].run for i in used]
    G = len(set(group))
    se, ci = np.nan, None
    if G > 1:
        from scipy.special import stdtrit
        score = {}
        for i, name in zip(used, group, strict=True):
            score[name] = score.get(name, 0) + z[i] @ residual[i]
        se = np.sqrt(sum(value ** 2 for value in score.values()) * G / (G - 1)) / square
        half = stdtrit(G - 1, (1 + LEVEL) / 2) * se
        ci = [float(alpha - half), float(alpha + half)]
    rmse = np.sqrt(np.mean(np.concatenate(residual) ** 2))
    return Fit(float(alpha), float(se), ci, float(rmse), len(used), len(references))


def _term(one, second_term):
    return one.eta * one.noise - one.reference_noise if second_term else one.delta_eta * one.noise


def alpha_of_reference(table):
    """(α, its standard deviation from run to run) where Tr Σ is the constant-rate run's at equal τ, all that is known of a run not
    yet trained: 1.24 times the α of the runs' own Tr Σ in the authors' log, 1.46 times in ours. The deviation is what the law gets
    wrong of a run; NaN if there is one run only."""
    aligned = [one._replace(noise=np.where(one.x < 0.05, np.nan, one.reference_noise)) for one in align(table)[0]]
    each = [fit([one]).alpha for one in aligned if one.decaying.any()]
    return fit(aligned).alpha, float(np.std(each, ddof=1)) if len(each) > 1 else np.nan


def noise_share(table, p, L0, floor=0.1):
    """Tr Σ/(L - L0) [S] of constant-rate runs with p parameters, for floors L0 [S]: a log-log line through a table's models.

    Eq. 17 makes it constant along a run; it is averaged over x >= floor, in the log. Raises LogError without Tr Σ (Buvar).
    """
    require(table, ['Buvar', 'num_params', 'compute', 'test_loss'], 'another schedule')
    found = sorted(set(table['schedule'].dropna())) if 'schedule' in table else []
    if found != ['const']:
        raise LogError(f'another schedule is derived from constant-rate runs; the log has {", ".join(found) or "no schedule"}')
    late = table[(table['compute'] >= floor * table.groupby('run')['compute'].transform('max')) & (table['Buvar'] > 0)]
    if not len(late):
        raise LogError('the log has no Tr Σ (Buvar); another schedule needs it')
    share = np.log(late['Buvar'].to_numpy() / (late['test_loss'].to_numpy() - L0[:, None]))      # [S, n]
    models = np.unique(late['num_params'])
    mean = np.stack([share[:, late['num_params'] == one].mean(1) for one in models])             # [M, S]
    slope, level = np.polyfit(np.log(models / models[-1]), mean, 1)                              # [S] each
    return np.exp(level + slope * np.log(p / models[-1]))


def apply_schedule(name, x, reducible, share, alpha, horizon_ratio=1.0):
    """Reducible loss [S, G] at x under the schedule `name`, predicted from the constant-rate loss `reducible` [S, G] at the same x.

    Eq. 16 with Tr Σ = share [S] × reducible loss (eq. 17), at equal τ: R_const(τ)·(1 - α·(1 - η)·share). α is a number or [S].
    `horizon_ratio` is the run's horizon over the horizon of the constant-rate curves. The loss before their first x is taken to be
    that at their first x. Raises LogError if τ goes beyond the constant-rate curves.
    """
    rate = RATES[name](x)
    fine = np.linspace(0, 1, 2001)
    area = np.concatenate([[0], np.cumsum((RATES[name](fine)[1:] + RATES[name](fine)[:-1]) / 2 * np.diff(fine))])
    tau = horizon_ratio * np.interp(x, fine, area)
    if tau[-1] > x[-1] * (1 + 1e-9):
        raise LogError(f'a {name} run of {horizon_ratio:.3g} times the horizon of the constant-rate curves goes beyond their end; '
                       'shorten --horizon')
    constant = np.exp(np.stack([np.interp(np.log(tau), np.log(x), np.log(one)) for one in reducible]))
    return constant * (1 - (alpha * share)[:, None] * (1 - rate))


def rmse_relative(aligned, alpha):
    """Root mean square of residual / loss range of its run's decay phase, over all evaluations of the decay phases."""
    ratio = [(one.loss - predict(one, alpha))[one.decaying] / np.ptp(one.loss[one.decaying])
             for one in aligned if one.decaying.sum() > 1 and np.ptp(one.loss[one.decaying]) > 0]
    return float(np.sqrt(np.mean(np.concatenate(ratio) ** 2))) if ratio else np.nan


def relative_error(one, alpha):
    """Mean absolute error over the decay phase, as a share of the drop that the decay causes by its end."""
    return float(np.abs(one.loss - predict(one, alpha))[one.decaying].mean() / one.drop)


def leave_one_out(aligned):
    """One dict a schedule: α fitted without any run of that schedule, and the errors of predicting them, averaged over runs.

    Errors are mean absolute over the decay phase, relative to the drop (`relative_error`): `error` with the left-out α,
    `hand_set` and `theory` with those, `no_noise_term` with the constant-rate loss at equal τ alone.
    """
    rows = []
    for key in sorted({(one.schedule, one.decay_frac) for one in aligned}):
        held = [one for one in aligned if (one.schedule, one.decay_frac) == key and one.decaying.any() and one.drop > 0]
        rest = [one for one in aligned if one.schedule != key[0]]
        if not held:
            continue
        alpha = fit(rest).alpha if rest else np.nan
        errors = {name: float(np.mean([relative_error(one, value) for one in held]))
                  for name, value in {'error': alpha, 'hand_set': HAND_SET, 'theory': THEORY, 'no_noise_term': 0}.items()}
        rows.append({'schedule': key[0], 'decay_frac': key[1], 'runs': len(held), 'alpha_without': alpha, **errors})
    return rows


def smooth(x, y, half_life=HALF_LIFE):
    """Exponential moving average of y over x (share of the run), from its first finite value on; for pictures only."""
    smoothed = np.array(y, float)
    keep = 0.5 ** (np.diff(x) / half_life)
    for i in range(1, len(smoothed)):
        if np.isfinite(smoothed[i - 1]):
            smoothed[i] = keep[i - 1] * smoothed[i - 1] + (1 - keep[i - 1]) * y[i]
    return smoothed
