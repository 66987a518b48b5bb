"""Forecasts recover planted laws within their bands, and weigh a run's early part against the ladder as conditioning must."""

import json
import warnings

import numpy as np
import pytest

from analysis import scaling_law
from analysis import table as logs
from analysis.beyond import forecast, ladder_field
from tests.logs_of import paper_log, power_law_table, random_ladder
from tests.test_collapse import command


@pytest.fixture(scope='module')
def ladder():
    """Six models over a factor 30 in p, four seeds, noise 0.1% of the loss; L0 is 0.1 of the largest model's 0.11."""
    return ladder_field.gather(power_law_table(np.random.default_rng(0), offset=1e-3, jitter=3e-4), [0.3])


def forecast_of(ladder, n, seen=0.0, **options):
    small, target = forecast.split(ladder, ladder.p[-1], ladder.p[n - 1], seen)
    draws = forecast.forecast(small, target, **options)
    return small, target, draws, forecast.bands(draws.loss[:, 0])


def test_a_planted_law_is_foreseen(ladder):
    """From four models, 15 times the compute away, where a run's own noise is 1% of the reducible loss: to 6%; L0 is covered."""
    small, target, draws, band = forecast_of(ladder, 4)
    found = forecast.judge(small.fine, band, forecast.baselines(small, target.compute), target.truth, 0.1)
    assert target.compute / small.compute[-1] > 10
    assert found['reducible_median'] < 0.06 and found['covered90'] > 0.8
    low, high = scaling_law.interval(draws.L0)
    assert low <= 0.1 <= high


def test_unit_of_compute_does_not_matter(ladder):
    _, _, draws, _ = forecast_of(ladder, 5)
    scaled = ladder._replace(compute=ladder.compute * 1e-9)
    np.testing.assert_allclose(forecast_of(scaled, 5)[2].loss, draws.loss, rtol=1e-6)  # the same draws, up to rounding


def test_bands_hold_what_they_say():
    """16 random ladders of 4 to 8 widths, all laws and noises drawn: the 90% bands hold 80 to 97% of the curves.

    Within a ladder the points of a curve rise and fall together, so the share is that of some 20 independent events and has a
    standard error of 0.06; control: the 50% bands hold far less.
    """
    inside = {'50': [], '90': []}
    for seed in range(16):
        rng = np.random.default_rng(seed)
        table, _ = random_ladder(rng, models=rng.integers(5, 9))
        ladder = ladder_field.gather(table)
        small, target, _, band = forecast_of(ladder, rng.integers(4, len(ladder.p)))
        for level, hits in inside.items():
            hits.append(((target.truth >= band[f'lo{level}']) & (target.truth <= band[f'hi{level}'])).mean())
    assert 0.80 <= np.mean(inside['90']) <= 0.98, np.mean(inside['90'])
    assert 0.35 <= np.mean(inside['50']) <= 0.75, np.mean(inside['50'])


def test_no_early_data_is_the_forecast_and_the_whole_curve_is_the_truth(ladder):
    """The limits of the posterior: nothing seen leaves the prior as it was, all seen leaves the noise of one evaluation."""
    small, target, draws, _ = forecast_of(ladder, 4)
    nothing = target._replace(seen=np.full(len(ladder.x), np.nan))
    np.testing.assert_array_equal(forecast.forecast(small, nothing).loss, draws.loss)
    everything = target._replace(seen=ladder.losses[-1].mean(0))
    final = forecast.bands(forecast.forecast(small, everything).loss[:, 0, -1])
    assert abs(final['mean'] - target.truth[-1]) < 2e-4 * target.truth[-1]


def test_each_further_part_narrows_the_band(ladder):
    width = [np.ptp([band['lo90'][-1], band['hi90'][-1]]) for band in (forecast_of(ladder, 4, seen)[3] for seen in (0, 0.1, 0.3))]
    assert width[0] > 1.3 * width[1] > 1.1 * width[2], width


def test_a_run_off_the_law_is_followed_as_far_as_the_ladder_lets_it(ladder):
    """A target 3% (of its reducible loss) above where it would be, seen to x = 0.3: the read-out of its end moves up by about as
    much (L0 and b, less well known, move with it), against nothing without the early part."""
    small, target, _, _ = forecast_of(ladder, 4)
    above = ladder.losses[-1].mean(0) + 0.03 * (ladder.losses[-1].mean(0) - 0.1)
    seen = target._replace(seen=np.where(ladder.x <= 0.3, above, np.nan))
    honest = target._replace(seen=np.where(ladder.x <= 0.3, ladder.losses[-1].mean(0), np.nan))
    shift = [forecast.bands(forecast.forecast(small, one).loss[:, 0, -1])['mean'] for one in (honest, seen)]
    moved = (shift[1] - shift[0]) / (0.03 * (target.truth[-1] - 0.1))
    assert 0.3 < moved < 1.5, moved


def test_drift_of_the_curves_is_foreseen():
    """ℓ flattens with size by 2% a nat of p and x: extrapolated, it is nearer than the mean of the two largest models."""
    off = []
    for seed in (0, 1, 3):
        table, floor = random_ladder(np.random.default_rng(seed), models=7, seeds=3, drift=0.0)
        size = np.log(table['num_params'] / table['num_params'].min())
        x = table['compute'] / table.groupby('run')['compute'].transform('max')
        table['test_loss'] = floor + (table['test_loss'] - floor) * np.exp(-0.02 * size * np.log(x))
        full = ladder_field.gather(table)
        small, target = forecast.split(full, full.p[-1], full.p[4])
        at = np.argmin(np.abs(small.fine - 0.15))
        curves = (target.truth, forecast.bands(forecast.forecast(small, target).loss[:, 0])['mean'],
                  forecast.baselines(small, target.compute)['power law'])
        truth, ours, plain = (np.log((curve[at] - floor) / (curve[-1] - floor)) for curve in curves)
        off.append([abs(ours - truth), abs(plain - truth)])
    assert np.mean(off, 0)[0] < 0.5 * np.mean(off, 0)[1], off


def test_bands_under_another_schedule_hold_the_spread_of_alpha(monkeypatch):
    """Draws that all agree, Tr Σ 0.4 of the reducible loss, α = 0.3 ± 0.05 from run to run: at the end, where the rate is off, they
    differ by 0.05·0.4 of it (to 2% by chance), and by nothing if there is one run only to know α from."""
    x, S = np.arange(1, 101) / 100, 2000
    draws = ladder_field.Draws(np.ones(S), np.tile(1 + x ** -0.5, (S, 1, 1)))
    monkeypatch.setattr(forecast.schedules, 'noise_share', lambda table, p, L0: np.full(S, 0.4))
    target = forecast.Target(1.0, 1.0, 1, None, None)
    for spread in (0.05, np.nan):
        found = forecast.reschedule(None, target, draws, x, 'linear', 0.3, spread).loss[:, 0, -1] - 1
        held = 0.5 ** -0.5                                        # of the constant rate at τ = ½, where a linear rate ends
        assert found.mean() == pytest.approx(held * (1 - 0.3 * 0.4), rel=2e-3)
        assert found.std() == pytest.approx(held * np.nan_to_num(spread) * 0.4, rel=0.08, abs=1e-12)


def test_errors_are_relative_to_what_can_be_learned():
    x, truth = np.array([0.05, 0.1, 0.5, 1.0]), np.array([9.0, 3.0, 2.0, 1.5])
    found = forecast.error(x, truth + np.array([5, 0.2, 0.1, -0.1]), truth, L0=1.0)
    assert found == pytest.approx({'reducible_median': 0.1, 'reducible_worst': 0.2, 'final': 0.2})


def test_targets_and_budgets(ladder):
    small = ladder_field.choose(ladder, np.arange(6) < 5)
    assert forecast.optimal_compute(small, ladder.p[-1]) == pytest.approx(ladder.compute[-1], rel=1e-6)  # t* = p exactly
    assert forecast.optimal_params(small, forecast.optimal_compute(small, 1e9)) == pytest.approx(1e9)
    rows = forecast.budgets(small)
    final, band = (np.array(one) for one in ([row['mean'] for row in rows], [row['hi90'] - row['lo90'] for row in rows]))
    assert (np.diff(final) < 0).all() and (band / (final - 0.1))[-1] > 2 * (band / (final - 0.1))[0]
    table = logs.tidy(power_law_table(np.random.default_rng(0), seeds=1).assign(num_params=lambda t: 10 * t['D'] ** 2 + 8 * t['D']))
    assert forecast.params_of(table, 'D=4096') == pytest.approx(10 * 4096 ** 2 + 8 * 4096)
    assert forecast.params_of(table, 'p=1e9') == 1e9
    for wrong in ('p=', 'D=x', 'width=3', 'p=-1'):
        with pytest.raises(logs.LogError, match='wanted p=NUMBER'):
            forecast.params_of(table, wrong)


def test_command_on_a_csv(tmp_path):
    table, _ = random_ladder(np.random.default_rng(3), models=5, seeds=1)
    table = table.rename(columns={'num_params': 'p', 'test_loss': 'loss'})[['run', 'p', 'tokens', 'loss']]
    table.to_csv(tmp_path / 'curves.csv')
    largest = table['p'].max()
    done = command(tmp_path / 'curves.csv', '--target', f'p={largest}', '--json', '--out', tmp_path / 'f.png', module='forecast')
    result = json.loads(done.stdout)
    assert {'x', 'mean', 'lo50', 'hi50', 'lo90', 'hi90', 'final', 'error'} <= set(result)
    assert {'reducible_median', 'reducible_worst', 'final', 'baseline_final', 'covered90'} <= set(result['error'])
    assert len(result['ladder']) == 4 and 'one seed' in ' '.join(result['notes']) and (tmp_path / 'f.png').stat().st_size > 10_000
    few = command(tmp_path / 'curves.csv', '--target', f'p={np.sort(table["p"].unique())[1]}', module='forecast')
    assert few.returncode == 2 and few.stderr.count('\n') == 1 and 'at least three' in few.stderr
    for options, told in ((('--target', 'each', '--out', 'f.png'), 'leave out --out'),
                          (('--target', f'p={largest}', '--horizon', 1e9), 'the log holds the target')):
        refused = command(tmp_path / 'curves.csv', *options, module='forecast')
        assert refused.returncode == 2 and told in refused.stderr


def test_seventeen_times_the_compute_of_the_authors_mlps():
    """mlp.pkl, D <= 1024 forecasting D = 2048: half the error of a plain fit, and within reach from the first third."""
    table = logs.clean(logs.load(paper_log('mlp')))[0]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        result, _ = forecast.analyse(table, 'D=2048', max_width=1024)
        early, _ = forecast.analyse(table, 'D=2048', max_width=1024, seen=0.3)
    assert result['times_compute'] == pytest.approx(16.9, abs=0.1)
    found = result['error']
    assert found['reducible_median'] <= 0.014 and found['reducible_worst'] <= 0.033
    assert found['final'] <= found['baseline_final'] and early['error']['final'] <= found['final']
