"""α is recovered where it was planted, without the bias of the logged trace; runs are aligned at equal τ."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import schedules
from analysis import table as logs
from tests.logs_of import paper_log
from tests.test_collapse import command

SHAPES = {'const': lambda u: np.ones_like(u), 'linear': lambda u: 1 - u, 'cosine': lambda u: (1 + np.cos(np.pi * u)) / 2,
          'quadratic': lambda u: 1 - u ** 2}


def population_trace(covariance, n):
    """The trace [rows] that a log holds, where n test batches have deviations from the true mean gradient as large as expected."""
    return covariance * (n - 1) / n


def planted(rng, alpha=0.27, noise=1e-4, sizes=(1e6, 1e7), evals=150, warmup=0, n=21, logged=population_trace):
    """L(τ) = F(τ) + α·η·Tr Σ + measurement noise, under four schedules over the last all or fifth of 20,000 steps after a warm-up.

    Tr Σ depends on τ only, so that eq. 16 is exact. The log holds logged(Tr Σ, n), the trace over n test batches.
    """
    frames = []
    for p in sizes:
        for schedule in SHAPES:
            for decay in (1.0, 0.2) if schedule != 'const' else (1.0,):
                steps = np.arange(20001)
                share = (steps - warmup) / (20000 - warmup)
                eta = np.where(share < 0, steps / max(warmup, 1), SHAPES[schedule](np.clip((share - (1 - decay)) / decay, 0, 1)))
                tau = 1e-3 * np.concatenate([[0], np.cumsum(eta)[:-1]])
                at = np.unique(np.linspace(0, 20000, evals).astype(int))
                covariance = 0.02 * (1 + tau[at]) ** -0.1 * (1e6 / p) ** 0.1
                forcing = 0.02 + 0.3 * (1 + tau[at]) ** -0.8
                loss = forcing + alpha * eta[at] * covariance + noise * rng.normal(size=len(at))
                frames.append(pd.DataFrame({
                    'run': f'{p:g}-{schedule}-{decay}', 'num_params': p, 'schedule': schedule, 'decay_frac': decay, 'seed': 0,
                    'B': 1, 'peak_lr': 1e-3, 'T': 20000.0, 'step': at, 'tokens': at, 'lr': 1e-3 * eta[at], 'tau': tau[at],
                    'test_loss': loss, 'num_test_batches': n, 'Buvar': logged(covariance, n)}))
    return logs.tidy(pd.concat(frames, ignore_index=True))


def test_alpha_does_not_depend_on_the_number_of_test_batches():
    """The log's trace is measured on n Gaussian gradients of 400 components. α is 0.27 for every n once it is made unbiased.

    With the trace as logged it is n/(n - 1) times as large, 35% too large for n = 4.
    """
    rng = np.random.default_rng(0)

    def measured(covariance, n):
        gradients = np.sqrt(covariance / 400)[:, None, None] * rng.normal(size=(len(covariance), n, 400))
        return gradients.var(1).sum(-1)  # numpy's variance divides by n, as the log's does

    for n in (4, 24):
        aligned, notes = schedules.align(planted(rng, noise=0, evals=400, n=n, logged=measured))
        assert not notes
        # The noise of a trace, √(2/400/(n - 1)) relative, biases a least-squares slope by its square, 0.2% at most.
        assert schedules.fit(aligned).alpha == pytest.approx(0.27, rel=0.01)
        assert schedules.fit(schedules.as_logged(aligned)).alpha == pytest.approx(0.27 * n / (n - 1), rel=0.01)


def test_an_unknown_number_of_test_batches_is_noted_and_the_trace_used_as_logged():
    table = planted(np.random.default_rng(0), noise=0, evals=2000)
    known, _ = schedules.analyse(table)
    unknown, notes = schedules.analyse(table.drop(columns='num_test_batches'))
    assert 'num_test_batches' in notes[0] and 'as logged' in notes[0]
    assert unknown['alpha'] == unknown['alpha_published'] == pytest.approx(known['alpha_published'], rel=1e-12)
    assert known['alpha_published'] == pytest.approx(known['alpha'] * 21 / 20, rel=1e-12)  # one n in all runs
    with pytest.raises(logs.LogError, match='cannot be fitted'):  # one batch has no deviation from its own mean
        schedules.analyse(table.assign(num_test_batches=1.0))


def test_planted_alpha_without_noise():
    aligned, notes = schedules.align(planted(np.random.default_rng(0), noise=0, evals=2000))
    assert aligned['run'].nunique() == 12 and not notes
    found = schedules.fit(aligned)
    assert found.alpha == pytest.approx(0.27, rel=2e-3)                # interpolation of the reference between evaluations
    assert schedules.rmse_relative(aligned, found.alpha) < 2e-3


def test_a_warm_up_is_no_decay():
    """Runs and their reference have the same warm-up. If it counted as a decay without effect, α would be several % too small."""
    aligned, _ = schedules.align(planted(np.random.default_rng(0), noise=0, evals=2000, warmup=400))
    assert schedules.decay_phase(aligned)['x'].min() >= 0.02
    assert schedules.fit(aligned).alpha == pytest.approx(0.27, rel=2e-3)


def test_coverage_of_the_90_percent_interval():
    """200 planted logs: the interval contains the truth in 80 to 97%.

    A run has an offset beside the noise of its evaluations. The runs paired with one reference share the offset of the reference.
    """
    rng, hits = np.random.default_rng(0), []
    exact = schedules.align(planted(rng, noise=0, sizes=np.geomspace(1e6, 1e7, 6), evals=40))[0]
    for _ in range(200):
        offset = {run: 2e-4 * rng.normal() for run in pd.concat([exact['run'], exact['reference_run']]).unique()}
        noisy = exact.assign(loss=exact['loss'] + exact['run'].map(offset) + 2e-4 * rng.normal(size=len(exact)),
                             reference=exact['reference'] + exact['reference_run'].map(offset))
        low, high = schedules.fit(noisy).alpha_ci
        hits.append(low <= schedules.fit(exact).alpha <= high)  # 0.27 up to the interpolation of coarse evaluations
    assert 0.80 <= np.mean(hits) <= 0.97, np.mean(hits)


def test_spread_of_alpha_from_run_to_run():
    """Six runs with α = 0.25 and six with 0.35: their mean, however weighted, is between, and the deviation 0.05·√(12/11)."""
    table = pd.concat([planted(np.random.default_rng(0), alpha, noise=0, sizes=(p,), evals=1000)
                       for alpha, p in ((0.25, 1e6), (0.35, 1e7))])
    alpha, spread = schedules.alpha_of_reference(table)
    assert 0.25 < alpha < 0.35 and spread == pytest.approx(0.05 * np.sqrt(12 / 11), rel=0.02)
    one = table['run'].isin(['1e+06-linear-1.0', '1e+06-const-1.0'])
    assert np.isnan(schedules.alpha_of_reference(table[one])[1])


def test_prediction_is_tested_on_schedules_left_out():
    rows = schedules.leave_one_out(schedules.align(planted(np.random.default_rng(1)))[0])
    assert {(row['schedule'], row['decay_frac']) for row in rows} == {(s, d) for s in SHAPES if s != 'const' for d in (1, 0.2)}
    for row in rows:
        assert row['runs'] == 2 and row['error'] < 0.06 < 0.2 < row['no_noise_term']  # control: no noise term
    aligned, _ = schedules.align(planted(np.random.default_rng(1)))
    half = aligned['reference'] + (aligned['loss'] - aligned['reference']) / 2  # the cosine runs lose half as much
    rows = schedules.leave_one_out(aligned.assign(loss=half.where(aligned['schedule'] == 'cosine', aligned['loss'])))
    for row in rows:  # only where the cosine runs are left out, the α is the planted one
        assert (abs(row['alpha_without'] - 0.27) < 0.005) == (row['schedule'] == 'cosine')


def test_alignment_is_at_equal_tau():
    table = planted(np.random.default_rng(2), noise=0, evals=2000)
    aligned, _ = schedules.align(table)
    forcing = aligned['reference'] - 0.27 * aligned['reference_noise']          # what both runs share at equal τ
    np.testing.assert_allclose(forcing, 0.02 + 0.3 * (1 + aligned['tau']) ** -0.8, rtol=1e-4)
    assert (schedules.decay_phase(aligned)['delta_eta'] < 0).all()


def test_smoothing_has_its_half_life():
    x = np.linspace(0, 1, 1001)
    smoothed = schedules.smooth(x, (x >= 0.5).astype(float), half_life=0.01)
    assert smoothed[np.searchsorted(x, 0.51)] == pytest.approx(0.5, abs=0.04)     # one step of the grid
    np.testing.assert_allclose(schedules.smooth(x, np.full_like(x, 3.0)), 3.0)


def test_what_is_missing_is_an_error_or_a_note():
    table = planted(np.random.default_rng(3))
    with pytest.raises(logs.LogError, match='needs Buvar'):
        schedules.align(table.drop(columns='Buvar'))
    with pytest.raises(logs.LogError, match='needs Tr Σ under Adam, and the log has runs of muon; use --where optimizer=adam'):
        schedules.align(table.assign(optimizer=np.where(table['run'] == table['run'][0], 'muon', 'adam')))
    schedules.align(table.assign(optimizer='adam'))
    with pytest.raises(logs.LogError, match='no run with a decaying rate has a constant-rate run'):
        schedules.align(table[table['schedule'] != 'const'])
    aligned, notes = schedules.align(table[(table['schedule'] != 'const') | (table['num_params'] == 1e6)])
    assert aligned['run'].nunique() == 6 and '6 runs have no constant-rate run' in notes[0]
    single = schedules.fit(aligned[aligned['run'] == aligned['run'][0]])
    assert single.runs == 1 and np.isnan(single.alpha_se) and single.alpha_ci is None
    with pytest.raises(logs.LogError, match='cannot be fitted'):
        schedules.fit(aligned.assign(noise=np.nan))


def test_command(tmp_path):
    logs.write_parquet(planted(np.random.default_rng(4)), tmp_path / 'log.parquet', source='planted')
    done = command(tmp_path / 'log.parquet', '--json', '--out', tmp_path / 'figure.png', module='schedules')
    result = json.loads(done.stdout)
    assert {'alpha', 'alpha_se', 'alpha_published', 'rmse', 'rmse_relative', 'runs'} <= set(result) and result['runs'] == 12
    assert abs(result['alpha'] - 0.27) < 4 * result['alpha_se'] + 1e-3
    assert (tmp_path / 'figure.png').stat().st_size > 10_000


def test_published_runs():
    """mlp_schedules.pkl, 24 decaying runs: α about 0.266 with the trace as logged, 0.256 with the unbiased one (24 test batches).

    The errors on schedules left out are 2 to 6% of the drop.
    """
    table, _, _ = logs.clean(logs.load(paper_log('mlp_schedules')))
    assert set(table['num_test_batches']) == {24}
    found, _ = schedules.analyse(table)
    assert found['runs'] == 24 and found['alpha_published'] == pytest.approx(0.266, abs=0.002)
    assert found['alpha'] == pytest.approx(0.256, abs=0.002)
    rows = found['leave_one_schedule_out']
    assert all(row['error'] < 0.06 for row in rows) and np.mean([r['no_noise_term'] / r['error'] for r in rows]) > 10


def test_shipped_log():
    """α of the laptop runs, whose trace is measured on 20 test batches."""
    table, _, _ = logs.clean(logs.load(Path(logs.__file__).parent.parent / 'logs/laptop_mlp_schedules.parquet'))
    found, _ = schedules.analyse(table)
    assert found['alpha_published'] == pytest.approx(0.254, abs=0.001)
    assert found['alpha'] == pytest.approx(0.241, abs=0.001) and found['alpha_ci'][0] < 0.241 < found['alpha_ci'][1] < 0.25


def test_another_schedule_from_constant_rate_curves_alone():
    """Tr Σ is 0.5·p^0.2 times the reducible loss τ^(-½), and the ratio is extrapolated in p.

    A linear run has 1 - α·(1 - η)·share times the constant-rate loss at τ = x - x²/2, or at half of that τ for half the horizon.
    Controls: without noise only τ counts, and a run that is too long is refused.
    """
    x = np.arange(1, 101) / 100
    rows = [pd.DataFrame({'run': f'p{p}', 'schedule': 'const', 'num_params': p, 'compute': x * p, 'test_loss': 1 + x ** -0.5,
                          'Buvar': 0.5 * p ** 0.2 * x ** -0.5}) for p in (1.0, 2.0, 4.0)]
    share = schedules.noise_share(pd.concat(rows), 16.0, np.array([1.0, 1.0]))
    np.testing.assert_allclose(share, 0.5 * 16 ** 0.2, rtol=1e-9)
    tau = x - x ** 2 / 2
    for times in (1.0, 0.5):
        found = schedules.apply_schedule('linear', x, x[None] ** -0.5, share[:1], 0.3, times)
        truth = (times * tau) ** -0.5 * (1 - 0.3 * x * share[0])
        np.testing.assert_allclose(found[0, 5:], truth[5:], rtol=1e-3)  # log-log interpolation of a power law; τ by trapezes
        plain = schedules.apply_schedule('linear', x, x[None] ** -0.5, 0 * share[:1], 0.3, times)
        np.testing.assert_allclose(plain[0, 5:], ((times * tau) ** -0.5)[5:], rtol=1e-3)
    with pytest.raises(logs.LogError, match='beyond their end'):
        schedules.apply_schedule('linear', x, x[None] ** -0.5, share[:1], 0.3, 3.0)
    with pytest.raises(logs.LogError, match='constant-rate runs; the log has linear'):
        schedules.noise_share(pd.concat(rows).assign(schedule='linear'), 16.0, np.array([1.0]))
