"""The Gaussian field of a ladder: its density, its noise and its sampler agree with what can be computed by hand."""

import numpy as np
import pytest
from scipy.special import ndtri

from analysis.beyond import forecast, ladder_field
from analysis.table import LogError

X = np.array([0.05, 0.1, 0.2, 0.4, 0.7, 1.0])


def ladder_of(rng, covariance, models=4, seeds=3, plateau=np.inf, shared=0.0):
    """L = 1 + 2·p^-0.3·x^-0.3 at the knots X, noise of that covariance [K, K]; seeds share `shared` times what each has alone."""
    p, factor = 4.0 ** np.arange(models), np.linalg.cholesky(covariance)
    losses = [1 + 2 * size ** -0.3 * X ** -0.3 * np.exp(
        (rng.normal(size=(seeds, len(X))) + shared * rng.normal(size=len(X))) @ factor.T) for size in p]
    return ladder_field.Ladder(X, p, 6 * p ** 2, losses, X, np.stack([L.mean(0) for L in losses]), plateau)


def covariance_of(whole=0.0, remembered=0.0, white=0.0, tilt=0.0):
    return np.tensordot([whole, remembered, white], ladder_field.along(X), 1) * np.outer(X, X) ** tilt


def scales_of(field, L0=1.0, shared=0.1):
    """Scales [1, 6] with that floor and shared noise, and hardly any departure from a power law and one curve."""
    return np.array([[np.arcsin((L0 / field.top) ** 0.25), 0.3, -7, -7, -9, np.log(shared)]])


@pytest.mark.parametrize('kappa', [0.05, 0.5, 1.0])
def test_the_slope_of_the_link_is_its_derivative(kappa):
    """By central differences, up to the plateau of 5 above the floor; and unlink undoes link."""
    reducible = np.geomspace(0.01, 4.7, 40)[None]
    L0, kappa = np.array([1.0]), np.array([kappa])
    z, slope = ladder_field.link(1 + reducible, L0, 6.0, kappa)
    up, down = (ladder_field.link(1 + reducible * np.exp(step), L0, 6.0, kappa)[0] for step in (1e-5, -1e-5))
    np.testing.assert_allclose(slope, (up - down) / 2e-5, rtol=1e-5)     # 1e-10/step of rounding, step² of curvature
    np.testing.assert_allclose(ladder_field.unlink(z, L0, 6.0, kappa), reducible, rtol=1e-9)


def test_the_evidence_is_a_density_of_losses():
    """In a unit of loss c times smaller every residual is as it was, and the density falls by c for each loss but the one a knot
    that goes into the free curve. Near the plateau it is the link's derivative that counts."""
    ladder, c = ladder_of(np.random.default_rng(0), covariance_of(white=1e-5), plateau=6.5), 7.0
    scaled = ladder._replace(losses=[c * L for L in ladder.losses], mean=c * ladder.mean, plateau=c * ladder.plateau)
    field, other = (ladder_field.field(one, one.compute[-1:] * 4) for one in (ladder, scaled))
    scales = scales_of(field)
    change = ladder_field.evidence(other, scales) - ladder_field.evidence(field, scales)
    np.testing.assert_allclose(change, -(len(field.seen) - len(X)) * np.log(c), rtol=1e-6)
    up, down = (ladder_field.link(field.loss[None, :-1] + step, np.ones(1), 6.5, scales[:, 1])[0] for step in (1e-6, -1e-6))
    jacobian = ladder_field._values(field, np.ones(1), scales[:, 1], np.zeros(1))[2]
    np.testing.assert_allclose(jacobian, 3 * np.log((up - down) / 2e-6).mean(1).sum(), rtol=1e-6)  # three of four models a knot


def test_noise_is_found_where_it_was_planted():
    """200 seeds of three models: a covariance to 20%, the tilt to 0.05, some three standard errors of each."""
    planted = covariance_of(whole=1e-4, remembered=3e-4, white=2e-4, tilt=-0.4)
    ladder = ladder_of(np.random.default_rng(0), planted, models=3, seeds=200)
    np.testing.assert_allclose(ladder_field.noise_covariance(ladder, 1.0, X), planted, rtol=0.2)
    assert ladder_field.noise(ladder, 1.0, X)[3] == pytest.approx(-0.4, abs=0.05)
    single = ladder_of(np.random.default_rng(0), planted, seeds=1)
    copied = single._replace(losses=[np.repeat(L, 2, 0) for L in single.losses])
    assert ladder_field.noise(single, 1.0, X) is None and ladder_field.noise(copied, 1.0, X) is None


@pytest.mark.parametrize('shared', [0.0, 2.0])
def test_noise_that_seeds_share_is_told_from_their_own(shared):
    """Seeds that share nothing, or twice what they have alone: the evidence says which, over ten ladders, by more than e^10."""
    favour = 0
    for seed in range(10):
        ladder = ladder_of(np.random.default_rng(seed), covariance_of(white=1e-4), models=6, shared=shared)
        field = ladder_field.field(ladder, ladder.compute[-1:] * 4)
        favour += (ladder_field.evidence(field, scales_of(field, shared=2.0)) - ladder_field.evidence(field, scales_of(field))).item()
    assert favour > 10 if shared else favour < -10, favour


def test_a_further_run_of_a_size_shares_its_noise():
    """Where seeds share nearly all their noise, a further run of the largest model is known almost as its mean is, and still is if
    its horizon was rounded by three in ten thousand; a model twice as large in compute is not."""
    ladder = ladder_of(np.random.default_rng(0), covariance_of(remembered=1e-4), shared=3.0)
    fields = (ladder_field.field(ladder, ladder.compute[-1:] * times) for times in (1, 1.0003, 2))
    exact, rounded, larger = (ladder_field.conditional(one, scales_of(one, shared=3.0))[3][0, -1, -1] ** 0.5 for one in fields)
    assert rounded == pytest.approx(exact, rel=0.01) and larger > 2 * exact


def test_one_run_scatters_and_counts_by_its_noise():
    """White noise n = 1% at x = 1 and 4.5% at 0.05, forecast of one run to ± s: it is drawn to ± √(s² + n²), and once it is seen at
    a knot it is known there to 1/√(1/s² + 1/n²). Four means of 100 runs know it to 0.12·n, by a line through them, and what the law
    may depart from it. Tolerances: 2,000 draws make 1.6% by chance, and n is that of 500 runs, 2%."""
    ladder = ladder_of(np.random.default_rng(0), covariance_of(white=1e-4, tilt=-0.5), models=5, seeds=100)
    small, target = forecast.split(ladder, ladder.p[-1])
    n, unseen = 0.01 * X ** -0.5, np.full((1, len(X)), np.nan)
    field = ladder_field.field(small, [target.compute], unseen)
    scales = scales_of(field, shared=0.01)
    s = np.sqrt(np.diagonal(ladder_field.conditional(field, scales)[3][0]))
    assert (s < 0.3 * n).all()
    drawn = ladder_field.draw(field, np.random.default_rng(0), scales, each=2000).loss[:, 0] - 1
    np.testing.assert_allclose(np.log(drawn).std(0), np.hypot(s, n), rtol=0.08)
    for k in (0, len(X) - 1):
        seen = np.where(np.arange(len(X)) == k, target.truth, unseen)
        field = ladder_field.field(small, [target.compute], seen)
        known = ladder_field.conditional(field, scales_of(field, shared=0.01))[3][0, k, k]
        np.testing.assert_allclose(known, 1 / (1 / s[k] ** 2 + 1 / n[k] ** 2), rtol=0.05)


def test_the_sampler_finds_a_posterior_that_is_known(monkeypatch):
    """Normal in the coordinates whose prior is standard normal, correlated to 0.9 and ten times narrower: its moments, to 0.2 of a
    deviation (400 even weights: 0.05). A needle in a haystack is not passed off as sampled."""
    low, high = np.concatenate([[0.0, 0.02], ladder_field.SCALES[:, 0]]), np.concatenate([[1.5, 1.0], ladder_field.SCALES[:, 1]])
    truth, covariance = np.array([0.8, -1.0, 0.5, 0, 0.3, 1.5]), 0.01 * (0.1 * np.eye(6) + 0.9)

    def evidence(_, scales, sharpness=1.0):
        z = ndtri(np.clip((scales - low) / (high - low), 1e-12, 1 - 1e-12))
        away = (z - truth) * sharpness
        return -0.5 * np.einsum('hi,ij,hj->h', away, np.linalg.inv(covariance), away) + 0.5 * (z ** 2).sum(1)

    monkeypatch.setattr(ladder_field, 'evidence', evidence)
    found = ndtri((ladder_field.sample(None, np.random.default_rng(0)) - low) / (high - low))
    np.testing.assert_allclose(found.mean(0), truth, atol=0.02)
    np.testing.assert_allclose(np.cov(found.T), covariance, rtol=0.3)
    monkeypatch.setattr(ladder_field, 'evidence', lambda _, scales: evidence(_, scales, 1e4))
    with pytest.raises(LogError, match='could not be sampled'):
        ladder_field.sample(None, np.random.default_rng(0), rounds=2)
