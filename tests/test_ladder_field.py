"""The Gaussian process of a ladder: density, noise and conditional distributions agree with independent calculations."""

import numpy as np
import pytest

from analysis.beyond import forecast, importance_sampling, ladder_field
from analysis.table import LogError

X = np.array([0.05, 0.1, 0.2, 0.4, 0.7, 1.0])


def ladder_of(rng, covariance, models=4, seeds=3, initial_loss=np.inf, shared=0.0):
    """L = 1 + 2·p^-0.3·x^-0.3 at the knots X, with noise of that covariance [K, K].

    All seeds of a model share noise with `shared` times the standard deviation of their own.
    """
    p, factor = 4.0 ** np.arange(models), np.linalg.cholesky(covariance)
    losses = [1 + 2 * size ** -0.3 * X ** -0.3 * np.exp(
        (rng.normal(size=(seeds, len(X))) + shared * rng.normal(size=len(X))) @ factor.T) for size in p]
    return ladder_field.Ladder(X, p, 6 * p ** 2, losses, X, np.stack([L.mean(0) for L in losses]), initial_loss)


def covariance_of(constant=0.0, correlated=0.0, white=0.0, tilt=0.0):
    return np.tensordot([constant, correlated, white], ladder_field.noise_correlations(X), 1) * np.outer(X, X) ** tilt


def scales_of(field, L0=1.0, shared=0.1, level=1e-4):
    """Scales [1, 7] with that L0, level and shared noise, and hardly any departure from a power law and a common curve."""
    return np.array([[np.arcsin((L0 / field.least_loss) ** 0.5), 0.3, -9, -9, -9, np.log(level), np.log(shared)]])


@pytest.mark.parametrize('kappa', [0.05, 0.5, 1.0])
def test_slope_of_the_link_is_its_derivative(kappa):
    """Against central differences, up to an initial loss of 5 above L0. inverse_link inverts link."""
    reducible = np.geomspace(0.01, 4.7, 40)[None]
    L0, kappa = np.array([1.0]), np.array([kappa])
    z, slope = ladder_field.link(1 + reducible, L0, 6.0, kappa)
    up, down = (ladder_field.link(1 + reducible * np.exp(step), L0, 6.0, kappa)[0] for step in (1e-5, -1e-5))
    np.testing.assert_allclose(slope, (up - down) / 2e-5, rtol=1e-5)     # rounding 1e-10/step, curvature step²
    np.testing.assert_allclose(ladder_field.inverse_link(z, L0, 6.0, kappa), reducible, rtol=1e-9)


def test_likelihood_is_a_density_of_losses():
    """In a unit of loss that is c times smaller, the density falls by c for each loss, except one a knot that determines g.

    Near the initial loss the Jacobian is the derivative of the link, here by central differences.
    """
    ladder, c = ladder_of(np.random.default_rng(0), covariance_of(white=1e-5), initial_loss=6.5), 7.0
    scaled = ladder._replace(losses=[c * L for L in ladder.losses], mean=c * ladder.mean, initial_loss=c * ladder.initial_loss)
    field, other = (ladder_field.build_field(one, one.compute[-1:] * 4) for one in (ladder, scaled))
    scales = scales_of(field)
    change = ladder_field.log_likelihood(other, scales) - ladder_field.log_likelihood(field, scales)
    np.testing.assert_allclose(change, -(len(field.observed) - len(X)) * np.log(c), rtol=1e-6)
    up, down = (ladder_field.link(field.loss[None, :-1] + step, np.ones(1), 6.5, scales[:, 1])[0] for step in (1e-6, -1e-6))
    jacobian = ladder_field._transform(field, np.ones(1), scales[:, 1], np.zeros(1))[2]
    np.testing.assert_allclose(jacobian, 3 * np.log((up - down) / 2e-6).mean(1).sum(), rtol=1e-6)  # three of four models a knot


def test_fitted_noise_is_the_planted_noise():
    """200 seeds of three models: the covariance to 20% and the tilt to 0.05, about three standard errors of each."""
    planted = covariance_of(constant=1e-4, correlated=3e-4, white=2e-4, tilt=-0.4)
    ladder = ladder_of(np.random.default_rng(0), planted, models=3, seeds=200)
    *variances, tilt = ladder_field.fit_noise(ladder, 1.0)
    np.testing.assert_allclose(covariance_of(*variances, tilt), planted, rtol=0.2)
    assert tilt == pytest.approx(-0.4, abs=0.05)


def test_no_noise_is_fitted_without_two_different_seeds():
    single = ladder_of(np.random.default_rng(0), covariance_of(white=2e-4), seeds=1)
    copied = single._replace(losses=[np.repeat(L, 2, 0) for L in single.losses])
    assert ladder_field.fit_noise(single, 1.0) is None and ladder_field.fit_noise(copied, 1.0) is None


@pytest.mark.parametrize('shared', [0.0, 2.0])
def test_likelihood_tells_shared_noise_from_a_seeds_own(shared):
    """Seeds that share no noise, or twice their own: over ten ladders the likelihood prefers the truth by more than e^10."""
    preference = 0
    for seed in range(10):
        ladder = ladder_of(np.random.default_rng(seed), covariance_of(white=1e-4), models=6, shared=shared)
        field = ladder_field.build_field(ladder, ladder.compute[-1:] * 4)
        with_shared, without = (ladder_field.log_likelihood(field, one) for one in (scales_of(field, shared=2.0), scales_of(field)))
        preference += (with_shared - without).item()
    assert preference > 10 if shared else preference < -10, preference


def test_another_run_of_a_model_shares_its_noise():
    """Where seeds share nearly all noise, another run of the largest model is known as well as its mean.

    That holds also for a horizon that rounding changed by 3 in 10,000, but not for a model with twice the compute.
    """
    ladder = ladder_of(np.random.default_rng(0), covariance_of(correlated=1e-4), shared=3.0)
    fields = (ladder_field.build_field(ladder, ladder.compute[-1:] * times) for times in (1, 1.0003, 2))
    exact, rounded, larger = (
        ladder_field.condition(one, scales_of(one, shared=3.0))[1][0, -1, -1] ** 0.5 for one in fields)
    assert rounded == pytest.approx(exact, rel=0.01) and larger > 2 * exact


def test_one_run_varies_and_counts_by_its_noise():
    """White noise n = 1% at x = 1 and 4.5% at 0.05; the forecast of a run's curve without it has standard deviation s.

    A run is drawn with √(s² + n²). Once it is observed at a knot, the curve is known there to 1/√(1/s² + 1/n²). Tolerances: 2,000
    draws err by 1.6%, and n, known from 500 runs, by 3%.
    """
    ladder = ladder_of(np.random.default_rng(0), covariance_of(white=1e-4, tilt=-0.5), models=5, seeds=100)
    small, target = forecast.split(ladder, ladder.p[-1])
    n, nothing = 0.01 * X ** -0.5, np.full((1, len(X)), np.nan)
    field = ladder_field.build_field(small, [target.compute], nothing)
    scales = scales_of(field, shared=0.01)
    s = np.sqrt(np.diagonal(ladder_field.condition(field, scales)[1][0]))
    assert (s < 0.3 * n).all()
    drawn = ladder_field.draw_curves(field, np.random.default_rng(0), scales, curves_per_scale=2000).loss[:, 0] - 1
    np.testing.assert_allclose(np.log(drawn).std(0), np.hypot(s, n), rtol=0.08)
    for k in (0, len(X) - 1):
        observed = np.where(np.arange(len(X)) == k, target.truth, nothing)
        field = ladder_field.build_field(small, [target.compute], observed)
        variance = ladder_field.condition(field, scales_of(field, shared=0.01))[1][0, k, k]
        np.testing.assert_allclose(variance, 1 / (1 / s[k] ** 2 + 1 / n[k] ** 2), rtol=0.05)


def normal_likelihood(mean, covariance):
    """Log likelihood whose posterior, under a standard normal prior, is this normal distribution."""
    precision = np.linalg.inv(covariance)

    def log_likelihood(z):
        return -0.5 * np.einsum('hi,ij,hj->h', z - mean, precision, z - mean) + 0.5 * (z ** 2).sum(1)
    return log_likelihood


def test_importance_sampling_finds_a_known_posterior():
    """Six dimensions, ten times narrower than the prior, correlated to 0.9.

    400 effective draws have a standard error of 0.05 of a standard deviation in the mean and of 7% in a variance.
    """
    mean, covariance = np.array([0.8, -1.0, 0.5, 0, 0.3, 1.5]), 0.01 * (0.1 * np.eye(6) + 0.9)
    found = importance_sampling.sample(normal_likelihood(mean, covariance), 6, np.random.default_rng(0))
    np.testing.assert_allclose(found.mean(0), mean, atol=0.02)
    np.testing.assert_allclose(np.cov(found.T), covariance, rtol=0.3)


def test_importance_sampling_refuses_a_posterior_that_it_missed():
    """A posterior 100,000 times narrower than the prior cannot be found in two rounds."""
    likelihood = normal_likelihood(np.full(6, 0.5), 1e-10 * np.eye(6))
    with pytest.raises(LogError, match='could not be sampled'):
        importance_sampling.sample(likelihood, 6, np.random.default_rng(0), max_rounds=2)


def test_scales_have_their_priors():
    """With a flat likelihood: two uniform scales, and standard deviations whose quartiles are tan(π/8), 1 and tan(3π/8) sizes.

    500 draws know a quartile to 0.06 of the distribution.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ladder_field, 'log_likelihood', lambda _, scales: np.zeros(len(scales)))
        scales = ladder_field.sample_scales(None, np.random.default_rng(0))
    low, high = ladder_field.ANGLE_AND_KAPPA_BOUNDS.T
    share = np.concatenate([(scales[:, :2] - low) / (high - low),
                            2 / np.pi * np.arctan(np.exp(scales[:, 2:]) / ladder_field.SCALE_SIZES)], 1)
    np.testing.assert_allclose(np.quantile(share, [0.25, 0.5, 0.75], axis=0), np.outer([0.25, 0.5, 0.75], np.ones(7)), atol=0.06)


def test_the_level_of_a_model_is_unknown_until_its_curve_begins():
    """A level of 3% widens the forecast of a larger model to at least 3%. One observed knot tells the level, and the end with it.

    Control: with hardly any level the forecast is that much narrower. Another run of a model of the ladder shares its level.
    """
    ladder = ladder_of(np.random.default_rng(0), covariance_of(white=1e-8), models=6)
    small, target = forecast.split(ladder, ladder.p[-1])
    early = np.where(X <= 0.1, target.truth, np.nan)[None]

    def final_sd(level, compute=target.compute, observed=None):
        field = ladder_field.build_field(small, [compute], observed)
        return ladder_field.condition(field, scales_of(field, level=level))[1][0, -1, -1] ** 0.5

    assert final_sd(0.03) > 0.03 > 3 * final_sd(1e-4)
    assert final_sd(0.03, observed=early) < 0.3 * final_sd(0.03)
    assert final_sd(0.03, small.compute[-1]) < 0.03 / 10
