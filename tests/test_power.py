"""The power of Δ: on ladders simulated here, false alarms, power and predicted Δ are as said."""

import json

import numpy as np
import pandas as pd
import pytest

from analysis import collapse, power
from analysis import table as logs
from analysis.columns import LogError
from figures.__main__ import main

P = np.geomspace(1e5, 4e6, 5)
MU, NU, GAMMA = 0.3, 0.36, 1.2      # a law with γ = ν/µ, not 1
T = 5e6 * (P / P[0]) ** GAMMA
A, L0 = 10.0, 0.05
B = GAMMA ** -1 * A * T[0] ** -MU * P[0] ** NU  # µ·A·T^(-µ) = ν·B·p^(-ν) at the horizon: eq. 6
SGD = 0.1                           # N(x) is this share of the good F(1), times 1 - x
EVALUATIONS = np.linspace(0.05, 1, 20)
FEW = 0.03                          # three standard errors of a share near 0.05 from 500 ladders


def ladders(rng, draws, seeds=5, horizon=1.0, excess=1.0, offset=5e-3, drift=4e-3, x=(*power.X, 1), sgd=SGD):
    """Losses [draws, runs, K] of the law with a loss (excess - 1)·F(1), noise of a whole run and a random walk along the run."""
    x, horizon, excess = np.asarray(x), np.broadcast_to(horizon, len(P))[:, None], np.broadcast_to(excess, len(P))[:, None]
    good = (A * T ** -MU + B * P ** -NU)[:, None]
    end = A * (T[:, None] * horizon) ** -MU + B * P[:, None] ** -NU
    clean = A * (x * T[:, None] * horizon) ** -MU + B * P[:, None] ** -NU + (excess - 1) * end + sgd * good * (1 - x)
    shape = draws, len(P) * seeds
    walk = np.cumsum(rng.normal(size=(*shape, len(x))) * np.sqrt(np.diff(x, prepend=0)), -1)
    return L0 + np.repeat(clean, seeds, 0) * (1 + offset * rng.normal(size=(*shape, 1)) + drift * walk)


def table_of(losses, seeds, x, sgd=SGD, horizon=1.0):
    """The log of one such ladder [runs, K] at x, with the trace that makes N, measured on 11 test batches."""
    rows, good = [], A * T ** -MU + B * P ** -NU
    for run, loss in enumerate(losses):
        m = run // seeds
        tokens = x * T[m] * np.broadcast_to(horizon, len(P))[m]
        rows.append(pd.DataFrame({
            'run': f'r{run}', 'num_params': P[m], 'D': 8.0 * (m + 1), 'seed': run % seeds, 'schedule': 'linear', 'peak_lr': 0.01,
            'num_test_batches': 11, 'tokens': tokens, 'test_loss': loss, 'lr': 0.01 * (1 - x), 'tau': x - x ** 2 / 2,
            'Buvar': 4 * sgd * good[m] * 10 / 11}))
    return logs.tidy(pd.concat(rows, ignore_index=True))


def log(rng, seeds=5, x=EVALUATIONS, horizon=1.0, sgd=SGD, **planted):
    return table_of(ladders(rng, 1, seeds, horizon, x=x, sgd=sgd, **planted)[0], seeds, x, sgd, horizon)


def delta(losses, seeds=5):
    model = np.repeat(np.arange(len(P)), seeds)
    return collapse.spread(collapse.Curves(np.array([*power.X, 1]), losses, model, P, [], None, None), L0).delta[:, :-1]


@pytest.fixture(scope='module')
def known():
    """The collapsed Ladder of a log with so many seeds (40 a model) that its noise is known within 5%, for ladders of 5 seeds."""
    found, notes = power.read(log(np.random.default_rng(0), seeds=40), L0)
    assert not notes
    return power.collapsed(found, seeds=5)


def test_the_log_gives_the_law_and_the_noise_of_sgd(known):
    assert known.gamma == pytest.approx(GAMMA) and known.share == pytest.approx(GAMMA / (1 + GAMMA))
    assert known.mu == pytest.approx(MU, rel=0.03)  # b from finals with 0.6% noise: 1% of b
    x = known.x
    assert known.sgd.mean(0) == pytest.approx(SGD * (1 - x), rel=0.02)
    assert (known.curve - known.sgd).mean(0) == pytest.approx(known.share * (x ** -MU - 1) + 1, rel=0.003)


def test_false_alarms_are_5_percent_whatever_the_log():
    """A log of five seeds a model does not know its noise well, and still one good ladder in twenty is above its threshold."""
    rng, alarms = np.random.default_rng(1), []
    for _ in range(50):
        own = power.collapsed(power.read(log(rng), L0)[0])
        good = delta(ladders(rng, 100))
        alarms.append([(good > power.threshold(one)).mean() for one in (own, own._replace(dof=10 ** 6))])
    said, noise_taken_as_known = np.mean(alarms, 0)
    assert said == pytest.approx(power.FALSE_ALARMS, abs=0.02)  # two standard errors of 50 logs
    assert noise_taken_as_known > 1.4 * said                    # the control


@pytest.mark.parametrize('name', ['gamma_below', 'gamma_above', 'excess'])
def test_an_error_of_the_smallest_size_is_seen_in_nine_ladders_of_ten(known, name):
    limit, rng = power.threshold(known), np.random.default_rng(2)
    at = {0.25: 0, 0.5: 1, 0.75: 2, 0.9: 3}[0.5 if name == 'excess' else 0.75]
    size = power.smallest(known, name)[at]
    tilt = P ** ((size - 1) * GAMMA) if name != 'excess' else np.ones_like(P)
    planted = {'horizon': tilt * (P * T).sum() / (P * T * tilt).sum()}
    planted |= {'excess': (P / P[0]) ** size} if name == 'excess' else {}
    seen = [(delta(ladders(rng, 500, **one)) > limit)[:, at].mean() for one in (planted, {})]
    assert seen[0] == pytest.approx(power.POWER, abs=0.05)  # the threshold is known to 5%, and 500 ladders give 1.3%
    assert seen[1] == pytest.approx(power.FALSE_ALARMS, abs=FEW)


def test_a_constant_factor_of_the_horizon_is_never_seen(known):
    for name, factor in (('horizon_below', 0.25), ('horizon_above', 4)):
        assert np.isnan(power.smallest(known, name)).all()
        seen = (delta(ladders(np.random.default_rng(3), 500, horizon=factor)) > power.threshold(known)).mean(0)
        assert (seen < 0.15).all()  # the curve is a little steeper or flatter, the noise along it is not


def test_predicted_delta_is_that_of_the_exact_law_without_noise():
    rng = np.random.default_rng(4)
    found, _ = power.read(log(rng, seeds=2, sgd=1e-12, offset=1e-6, drift=1e-6), L0)
    for factor in (0.6, 1.4):
        times = power.wrong_gamma(found, factor)['horizon']
        assert (P * T * times).sum() == pytest.approx((P * T).sum())
        x = np.array(power.X)
        loss = A * (T[:, None] * times[:, None] * x) ** -MU + B * P[:, None] ** -NU
        ell = loss / (A * (T * times) ** -MU + B * P ** -NU)[:, None]
        said = power.predicted(found, times)
        assert said['delta'] == pytest.approx(ell.std(0) / ell.mean(0), rel=0.01)
        assert said['delta_law'] == pytest.approx(said['delta'], rel=1e-6)
        assert (said['delta'] > 10 * power.predicted(found, 1.0)['delta']).all()


def test_noise_of_sgd_hides_an_error_in_gamma(known):
    """N stays where it is while the final loss falls, so ℓ moves the other way than by F alone."""
    times = power.wrong_gamma(known, 0.6)['horizon']
    said, planted = power.predicted(known, times), np.median(delta(ladders(np.random.default_rng(5), 500, horizon=times)), 0)
    assert said['delta'] == pytest.approx(planted, rel=0.06)  # the noise is known to 5%
    assert (said['delta_law'][:2] > 1.3 * planted[:2]).all()


def test_another_ladder_is_compared_with_the_prediction_for_its_horizons():
    rng = np.random.default_rng(6)
    found, _ = power.read(log(rng, seeds=20), L0)
    times = 0.7 * (P / P[0]) ** 0.5
    as_said = power.compare(found, log(rng, seeds=5, horizon=times))
    assert (as_said['p_value'] > 0.02).all() and as_said['measured'] == pytest.approx(as_said['delta'], rel=0.5)
    off = power.compare(found, log(rng, seeds=5, horizon=times, excess=(P / P[0]) ** 0.15))
    assert (off['p_value'][:3] < 0.02).all()
    with pytest.raises(LogError, match='two models or more of the ladder'):
        power.compare(found, log(rng).assign(num_params=lambda rows: 2 * rows['num_params']))


def test_models_that_differ_by_their_seeds_do_not_depart():
    """The means of three seeds have a third of the variance of a seed: Δ would be counted √(4/3 · 14/15) = 1.12 times too large."""
    rng, good = np.random.default_rng(7), []
    for _ in range(20):
        found, _ = power.read(log(rng, seeds=3), L0)
        good.append([np.median(power.deltas(one), 0) for one in (found, power.collapsed(found))])
    departing, exact = np.mean(good, 0)
    assert (departing < 1.06 * exact).all()
    departs = log(rng, seeds=3, excess=(P / P[0]) ** 0.1)
    found, _ = power.read(departs, L0)
    measured = collapse.spread(collapse.curves(departs, found.x), L0).delta[:2]
    assert np.median(power.deltas(found), 0)[:2] == pytest.approx(measured, rel=0.05)


def test_more_seeds_and_more_models_show_more(known):
    error = 'gamma_below', 0.5
    base, seeds, models = (power.power(one, *error, power.threshold(one))[2] for one in (
        known, power.collapsed(known, seeds=20), power.collapsed(known, more=3)))
    assert min(seeds, models) > base + 0.1
    assert power.first([(n, power.collapsed(known, n)) for n in (1, 5, 20, 50)], *error)[2] == 20


def test_constant_rate_runs_give_the_law():
    x = np.geomspace(0.02, 8, 60)  # far past the optimum
    constant = log(np.random.default_rng(8), seeds=2, x=x, sgd=1e-12, offset=1e-4, drift=0).assign(schedule='const')
    found, _ = power.read(log(np.random.default_rng(9)), L0, constant)
    assert found.mu == pytest.approx(MU, rel=0.02) and found.share == pytest.approx(GAMMA / (1 + GAMMA), rel=0.05)


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(power, 'DRAWS', 200)  # fast, and precise enough for what is asked here
    rng, paths = np.random.default_rng(10), {name: tmp_path / f'{name}.parquet' for name in ('good', 'bad', 'single')}
    logs.write_parquet(log(rng), paths['good'])
    logs.write_parquet(log(rng, seeds=1, horizon=0.5 * (P / P[0]) ** 0.4), paths['bad'])
    logs.write_parquet(log(rng, seeds=1).drop(columns='Buvar'), paths['single'])
    assert main(['power', str(paths['good']), '--beside', str(paths['bad']), '--json']) == 0
    result = json.loads(capsys.readouterr().out)
    assert result['x'] == list(power.X) and set(result['smallest']) == set(power.ERRORS)
    assert result['smallest']['horizon_above'] == [None] * 4 and result['notes'] == []
    np.testing.assert_allclose(result['noise'], [SGD * (1 - np.array(power.X))] * 5, rtol=0.02)  # final losses differ by 0.5%
    assert len(result['beside'][str(paths['bad'])]['p_value']) == 4 and len(result['predicted']) == len(power.FACTORS)
    assert main(['power', str(paths['good']), '--seeds', '3', '--more', '1', '--gamma', '1.3', '--L0', str(L0)]) == 0
    assert '6 models' in (out := capsys.readouterr().out) and 'what would show 1.3·γ' in out and 'part of ℓ that is noise' in out
    for wrong, message in ((['--seeds', '0'], '--seeds 0 must be at least 1'),
                           (['--out', 'a.png'], 'unrecognized arguments: --out'), (['--beside', 'none.csv'], 'no such file')):
        assert main(['power', str(paths['good']), *wrong]) == 2
        assert message in (error := capsys.readouterr().err) and error.count('\n') == 1
    assert main(['power', str(paths['single'])]) == 2
    assert 'two seeds of a model' in capsys.readouterr().err
