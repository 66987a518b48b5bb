"""Normalisation, Δ and σ obey the paper's identities; exact laws collapse; the verdict follows from the noise of the seeds."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from analysis import collapse
from analysis import table as logs
from tests.logs_of import paper_log, power_law_table


def planted(seed=0, **options):
    return power_law_table(np.random.default_rng(seed), **options)


def test_exact_power_laws_collapse_and_at_another_exponent_do_not():
    exact = collapse.curves(planted(offset=0, jitter=0, seeds=1))
    assert collapse.spread(exact, 0.1).delta[9:].max() < 1e-5    # x >= 0.1: what interpolation between evaluations leaves
    wrong = collapse.curves(planted(offset=0, jitter=0, seeds=1, gamma=0.9))
    assert collapse.spread(wrong, 0.1).delta[9:].max() > 1e-2


def test_a_wrong_L0_breaks_the_collapse():
    exact = collapse.curves(planted(offset=0, jitter=0, seeds=1))
    for floor in (0.0, 0.05, 0.11):
        assert collapse.spread(exact, floor).delta[20:].max() > 1e-3


def test_both_ends():
    curves = collapse.curves(planted())
    result = collapse.spread(curves, 0.1)
    assert result.delta[-1] == 0 and result.mean[-1] == 1                       # every run is normalised by its own end
    assert collapse.spread(curves, 0.1, by='expected').delta[-1] > 1e-3           # the control


def test_variance_splits_between_and_within_models():
    """Eq. 4, an identity: Δ² = between² + within², against numpy's own variances."""
    curves = collapse.curves(planted(jitter=3e-3))
    result = collapse.spread(curves, 0.1)
    ell = collapse.normalise(curves, 0.1)
    np.testing.assert_allclose(result.delta, ell.std(0) / ell.mean(0), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(result.delta ** 2, result.between ** 2 + result.within ** 2, rtol=1e-9, atol=1e-15)
    reducible = curves.loss[curves.model == 2] - 0.1
    for ddof in (0, 1):
        sigma = collapse.spread(curves, 0.1, ddof).sigma[2]
        np.testing.assert_allclose(sigma, reducible.std(0, ddof=ddof) / reducible.mean(0), rtol=1e-6)


def test_every_model_has_the_same_weight_whatever_its_number_of_seeds():
    table = planted(models=4, seeds=4)
    fewer = table[~table['run'].isin(['D32-s1', 'D32-s2', 'D32-s3'])]
    curves = collapse.curves(fewer)
    ell = collapse.normalise(curves, 0.1)
    means = [ell[curves.model == m].mean(0) for m in range(4)]
    np.testing.assert_allclose(collapse.spread(curves, 0.1).mean, np.mean(means, 0), rtol=1e-12)


def test_noise_shared_along_a_run_gives_supercollapse_and_independent_noise_does_not():
    """§3.3: a constant factor of a seed cancels in ℓ. Fluctuations that are independent from one evaluation to the next do not."""
    shared, _ = collapse.analyse(planted(offset=5e-3, jitter=2e-4, seeds=5), draws=20)
    assert shared['supercollapse_from'] < 0.5
    independent = collapse.curves(planted(offset=0, jitter=5e-3, seeds=5))
    result = collapse.spread(independent, 0.1)
    assert (result.delta[:-1] > result.sigma.mean(0)[:-1]).mean() > 0.9           # √2 larger, by the end's own noise


def test_onset():
    x = np.array([0.2, 0.4, 0.6, 0.8, 1.0])
    sigma = np.full(5, 2.0)
    assert collapse.onset(x, np.array([1, 3, 1, 1, 0.0]), sigma) == 0.6
    assert np.isnan(collapse.onset(x, np.array([1, 1, 1, 3, 0.0]), sigma))        # Δ(1) = 0 alone is no evidence
    assert np.isnan(collapse.onset(x, np.ones(5), np.full(5, np.nan)))            # one seed: cannot be told


def test_L0_and_seeds_both_reach_the_intervals():
    table = planted(models=6, seeds=4, offset=4e-3)
    free, _ = collapse.analyse(table, draws=60)
    fixed, _ = collapse.analyse(table, L0=free['fit']['L0'], draws=60)
    middle = 40
    width = [np.diff(np.array(r['delta_ci'])[:, middle])[0] for r in (free, fixed)]
    assert width[0] > 1.5 * width[1] > 0
    low, high = np.array(free['delta_ci'])[:, middle]
    assert low <= free['delta'][middle] <= high


def test_sigma_interval_covers_the_planted_noise():
    """100 planted ladders: the 90% interval of σ, averaged over models, contains the truth in 80 to 97% of them."""
    rng, hits = np.random.default_rng(0), []
    for seed in range(100):
        loss = 1 + 5e-3 * rng.normal(size=(40, 2))                              # 8 models of 5 seeds, L0 0, no decay
        curves = collapse.Curves(np.array([0.5, 1]), loss, np.repeat(np.arange(8), 5), np.geomspace(1, 10, 8), [''] * 40,
                                 np.ones(2), np.ones(2))
        low, high = np.array(collapse.uncertainty(curves, np.zeros(80), ddof=1, seed=seed)['sigma_ci'])[:, -1]
        hits.append(low <= 5e-3 * 0.940 <= high)  # 0.940: what the standard deviation of five normals is on average
    assert 0.80 <= np.mean(hits) <= 0.97, np.mean(hits)


def test_predicted_quality_follows_the_schedule():
    curves = collapse.curves(planted(schedule='linear'))
    shape, k = collapse.predicted_quality(curves, np.maximum(1 - curves.x, 0) ** 1.5)
    # linear decay: η = 1 - x, 1 - τ̂ = (1 - x)², so √(η(1 - τ̂)) = (1 - x)^1.5; τ is interpolated between evaluations
    assert k == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(shape, (1 - curves.x) ** 1.5, atol=1e-3)
    with pytest.raises(logs.LogError, match='lr .* and tau'):
        collapse.predicted_quality(collapse.curves(planted().drop(columns='tau')), curves.x)


# ---- limits -----------------------------------------------------------------------------------------------------------


def test_one_model_one_seed_and_mixed_ladders():
    with pytest.raises(logs.LogError, match='at least three models'):
        collapse.analyse(planted(models=1))
    one, notes = collapse.analyse(planted(models=1), L0=0.1)
    assert np.isnan(one['supercollapse_from']) and 'one model' in notes[0]
    single, notes = collapse.analyse(planted(seeds=1))
    assert np.isnan(single['sigma']).all() and np.isnan(single['supercollapse_from']) and 'one seed' in ' '.join(notes)
    mixed = planted()
    mixed.loc[mixed['seed'] == 1, 'schedule'] = 'cosine'
    with pytest.raises(logs.LogError, match='schedule cosine, linear'):
        collapse.analyse(mixed)
    rates = planted()
    rates.loc[rates['seed'] == 1, 'peak_lr'] *= 2
    with pytest.raises(logs.LogError, match='peak_lr 0.001, 0.002'):     # a sweep of rates is no group of seeds
        collapse.analyse(rates)
    longer = planted()
    with pytest.raises(logs.LogError, match='has horizon .* FLOPs; choose one'):  # one seed ends at half the horizon of the others
        collapse.analyse(longer[(longer['run'] != 'D64-s1') | (longer['step'] <= longer['step'].max() / 60)])
    scaled = planted()
    collapse.analyse(scaled.assign(peak_lr=1e3 / scaled['num_params']))  # a rate that falls with size is
    with pytest.raises(logs.LogError, match='below'):
        collapse.analyse(planted(), L0=5.0)


def test_the_four_verdicts():
    words = collapse.verdict_in_words
    found, _ = collapse.analyse(planted(offset=5e-3, jitter=2e-4, seeds=5), draws=20)
    assert words(found) == f'supercollapse: Δ < σ from x = {found["supercollapse_from"]:.2f} on, averaged over models'
    assert (found['verdict'], found['verdict_reason']) == collapse.verdict(found)
    unsure = words({**found, 'supercollapse_from_ci': [0.5, np.nan]})
    assert unsure.startswith('not decidable: Δ < σ from x = ') and unsure.endswith('the 90% interval of that x includes never')
    # Seeds that agree to 1e-5 leave the 2.8% of a data exponent 10% off, and the 6.3% of one 20% off, far above σ.
    near, far = (collapse.analyse(planted(offset=1e-5, jitter=1e-5, gamma=gamma), L0=0.1, draws=20)[0] for gamma in (0.9, 1.2))
    assert words(near).startswith('collapse: Δ(0.5) = 0.0') and words(far).startswith('no collapse: Δ(0.5) = 0.0')
    loud, _ = collapse.analyse(planted(offset=3e-2, jitter=2e-4, gamma=1.3, seeds=5), L0=0.1, draws=20)
    assert loud['supercollapse_from'] < 0.9 and loud['verdict'] == 'no collapse'  # Δ < σ at the end is no collapse
    late = planted(offset=5e-3, jitter=2e-4, seeds=5)
    late = collapse.analyse(late[late['compute'] > 0.8 * late.groupby('run')['compute'].transform('max')], L0=0.1, draws=20)[0]
    assert late['supercollapse_from'] > 0.8 and words(late).startswith('not decidable')  # nothing to compare before the end
    assert words(collapse.analyse(planted(seeds=1))[0]).startswith('not decidable: one seed per model, no noise floor σ; Δ(0.5) = ')
    assert words(collapse.analyse(planted(models=1), L0=0.1)[0]) == 'not decidable: one model'
    fewer = planted()
    fewer = fewer[~fewer['run'].isin(['D32-s1', 'D32-s2', 'D32-s3'])]
    assert 'a model with one seed' in words(collapse.analyse(fewer)[0])


def test_every_L0_of_the_interval_counts():
    """Spreads and onsets are of the law's L0, the best L0 within its interval, and the ends. The words are those of the table."""
    def said(spreads, onsets):
        rows = [{'name': name, 'L0': L0, 'L0_ci': [0.1, 0.4] if name == 'law' else None, 'delta': 0.01, 'drop_spread': drop,
                 'verdict': 'no collapse' if drop > 0.05 else 'collapse' if np.isnan(x) else 'supercollapse',
                 'supercollapse_from': x}
                for name, L0, drop, x in zip(('zero', 'law', 'best', 'law_low', 'law_high'), (0, 0.3, 0.2, 0.1, 0.4),
                                             (0.01, *spreads), (0.1, *onsets), strict=True)]
        return collapse.verdict_in_words({'seeds_per_model': [2, 2, 2], 'L0_choices': rows, 'L0_conflict': None,
                                          'supercollapse_from': onsets[0], 'supercollapse_from_ci': [0.1, 0.9]})

    never = np.nan
    assert said((0.08, 0.03, 0.06, 0.3), (0.5, 0.4, 0.4, 0.9)).startswith('supercollapse: Δ < σ from x = 0.50')
    assert said((0.08, 0.07, 0.06, 0.3), (0.5, 0.4, 0.4, 0.9)).startswith('no collapse: ')
    decides = 'not decidable: L0 decides: no collapse with L0 = 0.3, collapse with L0 = 0.2'
    assert said((0.08, 0.03, 0.06, 0.3), (never, never, never, never)) == decides
    assert said((0.08, 0.03, 0.06, 0.3), (0.9, never, never, 0.9)) == decides
    assert said((0.03, 0.02, 0.04, 0.05), (0.9, never, never, 0.9)) == (
        'not decidable: L0 decides: supercollapse with L0 = 0.3, collapse with L0 = 0.2')
    assert said((0.03, 0.02, 0.04, 0.05), (never, never, never, never)).startswith('collapse: ')


def test_the_verdict_is_not_decidable_where_L0_decides():
    """The law's interval has a collapse at one end and none at the other; the verdicts with a given L0 say which."""
    table = olmo_like(models=5)
    result, notes = collapse.analyse(table, draws=20)
    assert result['verdict'] == 'not decidable' and result['verdict_reason'].startswith('L0 decides: ')
    found = {one['name']: one for one in result['L0_choices']}
    for name in ('zero', 'law', 'best'):
        held, _ = collapse.analyse(table, found[name]['L0'], draws=20)
        assert held['verdict'] == found[name]['verdict'], name
    assert {found['law']['verdict'], found['best']['verdict']} == {'no collapse', 'collapse'}


def olmo_like(models):
    """A ladder whose final losses have L0 = 0.1 and whose curves collapse with 0.085: the drop is proportional to L(1) - 0.085."""
    table = planted(models=models, seeds=2, offset=0, jitter=0)
    end = table.groupby('run')['test_loss'].transform('last')
    share = table['tokens'] / table.groupby('run')['tokens'].transform('last')
    noise = 1 + 1e-4 * np.random.default_rng(1).normal(size=len(table))
    return table.assign(test_loss=(end + (end - 0.085) * (np.maximum(share, 1e-3) ** -0.3 - 1)) * noise)


# ---- which L0? --------------------------------------------------------------------------------------------------------


def test_the_spread_of_the_drop_does_not_depend_on_what_all_models_share():
    """It is the same for losses in other units. Less subtracted lowers Δ without limit, and the spread not."""
    curves = collapse.curves(planted(gamma=0.9, offset=0, jitter=0, seeds=1))
    scaled = curves._replace(loss=7 * curves.loss)
    assert collapse.drop_spread(scaled, 0.7) == pytest.approx(collapse.drop_spread(curves, 0.1), rel=1e-12)
    assert collapse.spread(curves, 0.0).delta[49] > 500 * collapse.spread(curves, -100.0).delta[49]
    drops = curves.loss[:, 49] - curves.loss[:, -1]      # with much less subtracted: the spread of the drops themselves
    assert collapse.drop_spread(curves, -100.0) > 0.9 * drops.std() / drops.mean() > 0.1


def test_the_L0_that_collapses_best_is_the_planted_one():
    """Over 60 planted ladders its 90% interval holds the true 0.1 in 85% or more (90% of 60 less two standard errors is 82%)."""
    hits = []
    for seed in range(60):
        best, (low, high) = collapse.best_L0(collapse.curves(planted(seed, evals=60, seeds=2)))
        hits.append(low <= 0.1 <= high)
        assert abs(best - 0.1) < 0.004 and high - low < 0.01   # 0 and the smallest loss, 0.111, are far outside
    assert np.mean(hits) >= 0.85


@pytest.mark.parametrize('gamma, word', [(0.9, 'slowly'), (1.1, 'fast')])
def test_horizons_off_the_optimum_bring_the_two_L0_in_conflict(gamma, word):
    """With horizons p^0.9 where p^1 is optimal, the larger models are trained too short."""
    result, notes = collapse.analyse(planted(gamma=gamma, offset=0, jitter=1e-6), draws=20)
    assert f'horizons grow too {word} with size' in result['L0_conflict'] and result['L0_conflict'] in notes
    assert collapse.analyse(planted(), draws=20)[0]['L0_conflict'] is None


def test_a_run_with_the_seed_of_another_is_a_rerun():
    table = planted(models=4, seeds=2)
    same, notes = collapse.without_reruns(table.assign(seed=0.0))
    assert set(same['run']) == {'D32-s0', 'D64-s0', 'D128-s0', 'D256-s0'} and notes[0].startswith('4 runs ')
    for unknown in (table, table.assign(seed=np.nan), table.drop(columns='seed')):
        kept, notes = collapse.without_reruns(unknown)
        assert len(kept) == len(table) and not notes


def olmo(published, horizon='1xC'):
    """The c4 curves of the OLMo ladder with this horizon; the rerun of 1xC has seed 1."""
    raw = pd.read_csv(published / 'olmo/cosine.csv')
    raw = raw[raw['horizon'] == horizon].drop(columns='horizon')
    return logs.tidy(raw.rename(columns={'p': 'num_params', 'loss': 'test_loss', 'batch': 'B'}).assign(B=np.nan))


def test_on_the_OLMo_ladder_L0_decides(published):
    result, _ = collapse.analyse(olmo(published))
    found = {one['name']: one for one in result['L0_choices']}
    assert found['zero']['delta'] == pytest.approx(0.0010, abs=1e-4) and found['law']['delta'] == pytest.approx(0.0062, abs=1e-4)
    assert found['law']['L0'] == pytest.approx(1.73, abs=0.01) and found['best']['delta'] < 0.0006
    assert result['verdict_reason'].startswith('L0 decides: no collapse with L0 = 1.7')
    assert 'too slowly with size' in result['L0_conflict']
    assert 1e-4 < np.nanmedian(result['sigma']) < 5e-4                          # two runs of a size
    assert collapse.analyse(olmo(published), L0=0)[0]['verdict'] == 'collapse'
    rerun = olmo(published).query('seed == 1')                                  # evaluated twice as often
    alone, _ = collapse.analyse(rerun)
    assert alone['L0_choices'][0]['delta'] == pytest.approx(0.0009, abs=5e-5) and alone['verdict'] == 'not decidable'


def command(*arguments, module='collapse'):
    return subprocess.run([sys.executable, '-m', 'figures', module, *map(str, arguments)], capture_output=True, text=True)


def test_command(tmp_path):
    logs.write_parquet(planted(), tmp_path / 'log.parquet', source='planted')
    done = command(tmp_path / 'log.parquet', '--json', '--out', tmp_path / 'figure.png', '--min-width', 40)
    result = json.loads(done.stdout)                                            # JSON, and nothing else
    assert {'fit', 'x', 'delta', 'sigma', 'supercollapse_from', 'supercollapse_from_ci', 'supercollapse_from_every_model',
            'ddof', 'seeds_per_model', 'duplicates_dropped', 'widths', 'verdict', 'verdict_reason', 'L0_choices',
            'L0_conflict'} <= set(result)
    assert [one['name'] for one in result['L0_choices']] == ['zero', 'law', 'best', 'law_low', 'law_high']
    assert {'a', 'b', 'L0', 'r2', 'a_ci', 'b_ci', 'L0_ci'} <= set(result['fit'])
    assert min(result['widths']) == 64 and (tmp_path / 'figure.png').stat().st_size > 10_000
    assert 'Δ < σ from x = ' in command(tmp_path / 'log.parquet').stdout.splitlines()[0]
    assert 'Empty' not in command(tmp_path / 'log.parquet', '--max-width', 32, '--L0', 0).stdout   # one model has no choice
    logs.write_parquet(planted().assign(seed=0.0), tmp_path / 'reruns.parquet')
    by_seed, by_run = (command(tmp_path / 'reruns.parquet', *more) for more in ((), ('--seeds-by', 'run')))
    assert 'one seed per model' in by_seed.stdout.splitlines()[0] and '--seeds-by run' in by_seed.stderr
    assert by_run.stdout == command(tmp_path / 'log.parquet').stdout
    wrong = command(tmp_path / 'log.parquet', '--max-width', 1)
    assert wrong.returncode == 2 and wrong.stderr.count('\n') == 1 and 'no model with a width' in wrong.stderr


def test_published_spread():
    """mlp.pkl, D >= 384, every row, ddof 0, as published: Δ and σ at x = 0.5 and 0.9, to 5%."""
    table = logs.load(paper_log('mlp'))
    result, _ = collapse.analyse(logs.between_widths(table, 384))
    at = [49, 89]
    np.testing.assert_allclose(result['delta'][at], [0.0038, 0.0017], rtol=0.05)
    np.testing.assert_allclose(result['sigma'][at], [0.0022, 0.0031], rtol=0.05)
    assert 0.7 <= result['supercollapse_from'] <= 0.8


def test_constant_rate_does_not_close_in():
    """chess_const.pkl up to each C*: Δ about 0.0016, 0.0017, 0.0014 at x = 0.5, 0.9, 0.98, to one unit of the last digit."""
    result, _ = collapse.analyse(logs.clean(logs.load(paper_log('chess_const')))[0])
    np.testing.assert_allclose(result['delta'][[49, 89, 97]], [0.0016, 0.0017, 0.0014], atol=1e-4)
