"""The fit finds the smallest Huber loss, its intervals cover planted laws, and it says where L0 is not identified."""


import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize

from analysis import scaling_law as law
from analysis import table as logs
from tests.logs_of import law_points, paper_log


def many_starts(compute, loss, starts, seed=0):
    """The smallest objective of L-BFGS on (log a, b, log L0) from many random starts, as is usual for scaling laws."""
    u, y = np.log(compute / 1e15), np.log(loss)

    def objective(t):
        power = t[0] - t[1] * u
        r = np.logaddexp(power, t[2]) - y
        share = np.exp(power - np.logaddexp(power, t[2]))
        psi = np.clip(r, -1e-3, 1e-3)
        value = np.where(np.abs(r) < 1e-3, r ** 2 / 2, 1e-3 * (np.abs(r) - 5e-4)).sum()
        return 1e6 * value, 1e6 * np.array([psi @ share, -psi @ (u * share), psi @ (1 - share)])
    rng = np.random.default_rng(seed)
    box = [(-12, 3), (0, 3), (-30, np.log(loss.min()))]
    best = min((minimize(objective, [rng.uniform(-6, 2), rng.uniform(0, 1.5), rng.uniform(-12, box[2][1])], jac=True,
                         method='L-BFGS-B', bounds=box, options={'maxiter': 2000, 'ftol': 1e-14, 'gtol': 1e-10})
                for _ in range(starts)), key=lambda r: r.fun)
    return best.fun / 1e6


def test_exact_law_is_recovered():
    points = law_points(np.random.default_rng(0), noise=0)
    found = law.fit(points.compute, points.loss)
    # Exact data: limited by float64 in an objective of order 1e-20 beside losses of order 1.
    np.testing.assert_allclose([found.a, found.b, found.L0], [0.04, 0.16, 0.0013], rtol=1e-5)


@pytest.mark.parametrize('noise', [1e-4, 3e-3, 3e-2])
def test_objective_is_no_higher_than_many_starts(noise):
    points = law_points(np.random.default_rng(0), noise=noise, seeds=1)
    ours = law.fit(points.compute, points.loss).objective
    assert ours <= many_starts(points.compute, points.loss, 12) * (1 + 1e-6)  # L-BFGS's own tolerance


@pytest.mark.parametrize('name', ['mlp', 'chess_const'])
def test_objective_is_no_higher_than_many_starts_on_the_authors_logs(name):
    points = law.optimal_points(logs.clean(logs.load(paper_log(name)))[0])
    assert law.fit(points.compute, points.loss).objective <= many_starts(points.compute, points.loss, 30) * (1 + 1e-6)


def test_published_fit():
    """mlp.pkl with every row, as published: a 0.0427, b 0.160, L0 0.0013."""
    points = law.optimal_points(logs.load(paper_log('mlp')))
    found = law.fit(points.compute, points.loss)
    np.testing.assert_allclose([found.a, found.b], [0.0427, 0.160], rtol=3e-3)  # to the digits given
    assert abs(found.L0 - 0.0013) < 1e-4


def test_unit_of_compute_does_not_matter():
    points = law_points(np.random.default_rng(1))
    one, other = law.fit(points.compute, points.loss), law.fit(points.compute * 1e-9, points.loss)
    assert other.b == pytest.approx(one.b, rel=1e-6) and other.L0 == pytest.approx(one.L0, rel=1e-6)  # where Newton stops
    assert other.a == pytest.approx(one.a * 1e-9 ** one.b, rel=1e-5)


def test_coverage_of_the_90_percent_interval():
    """200 planted data sets: the bootstrap intervals of a, b and L0 contain the truth in 80 to 97% of them."""
    truth = {'a': 0.3, 'b': 0.12, 'L0': 0.5}
    sets = [law_points(np.random.default_rng(seed), **truth, noise=1e-3) for seed in range(200)]
    start = law.fit(sets[0].compute, sets[0].loss)  # where the refits start, as `bootstrap` starts them from the data's fit
    losses = [law.resampled_losses(points, start, 100, np.random.default_rng(seed)) for seed, points in enumerate(sets)]
    assert all(origin == 'seeds' for _, origin in losses)
    draws = law.fit_batch(sets[0].compute, np.concatenate([drawn for drawn, _ in losses]), start)
    hits = [[low <= value <= high for low, high in map(law.interval, draws[k].reshape(200, 100))] for k, value in truth.items()]
    coverage = np.mean(hits, 1)
    assert ((coverage >= 0.80) & (coverage <= 0.97)).all(), coverage


def test_L0_profile():
    """Precise data identify L0, and the profile covers it. Noisy data over a short range do not."""
    (low, high), identified = law.profile(law_points(np.random.default_rng(3), a=0.3, b=0.12, L0=0.5, noise=1e-4))
    assert identified and low <= 0.5 <= high
    assert not law.profile(law_points(np.random.default_rng(3), L0=0.0, noise=1e-2))[1]


def test_resampled_means_vary_by_the_standard_error():
    """The deviation of the drawn means is s/√n with the unbiased s, up to 3%. Without √(n/(n-1)) it is 13% less."""
    points = law_points(np.random.default_rng(0), seeds=4)
    losses, _ = law.resampled_losses(points, None, 20000, np.random.default_rng(1))
    np.testing.assert_allclose(losses.std(0), [L.std(ddof=1) / 2 for L in points.losses], rtol=0.03)


def test_one_seed_takes_its_noise_from_the_residuals():
    points = law_points(np.random.default_rng(4), seeds=1)
    draws, origin = law.bootstrap(points, law.fit(points.compute, points.loss), draws=50)
    assert origin == 'residuals' and np.ptp(draws['b']) > 0


def test_too_little_is_refused():
    with pytest.raises(logs.LogError, match='at least three models'):
        law.fit(np.array([1e15, 1e16]), np.array([0.2, 0.1]))
    with pytest.raises(logs.LogError, match='does not fall'):
        law.fit(np.array([1e15, 1e16, 1e17, 1e18]), np.array([0.1, 0.2, 0.3, 0.5]))
    with pytest.raises(logs.LogError, match='below the smallest final loss'):
        law.fit(np.array([1e15, 1e16]), np.array([0.2, 0.1]), L0=0.15)


def test_a_run_that_ends_on_the_last_whole_step_before_its_horizon_has_reached_it():
    """C* = 1e15·(p/scale)^exponent is seldom a whole number of steps; a run cut short by more is named, not fitted."""
    rows = [{'run': f'{D}', 'num_params': 100.0 * D, 'opt_compute': 1e9 * D**2, 'compute': share * end * 1e9 * D**2,
             'test_loss': 0.1 + (share * end * D**2) ** -0.2}
            for D, end in ((1, 0.998), (2, 0.9995), (4, 1.0), (8, 1.3)) for share in (0.5, 1.0)]
    points = law.optimal_points(pd.DataFrame(rows))
    assert np.isfinite(points.loss).all()
    rows[1]['compute'] = 0.9e9
    with pytest.raises(logs.LogError, match='run 1 ends before'):
        law.optimal_points(pd.DataFrame(rows))
