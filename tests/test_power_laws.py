"""Exact power laws collapse at γ* and at no other exponent."""

import numpy as np
import pytest

from analysis import horizon, power_laws
from analysis import table as logs
from tests.logs_of import power_law_table


def test_two_terms_collapse_exactly_at_the_optimal_exponent_alone():
    assert power_laws.deviation(power_laws.TWO_TERMS, 1.0) < 1e-6
    for factor in (0.9, 1.1):
        assert power_laws.deviation(power_laws.TWO_TERMS, factor) > 0.05
    assert power_laws.deviation(power_laws.Terms((0.3, 0), (0, 0.4), (2.0, 5.0)), 4 / 3) < 1e-6  # γ* = ν/µ, any multipliers


def test_optimal_exponent_minimises_the_loss_at_fixed_compute():
    """The p that is best at compute c follows p ∝ c^(1/(1+γ*)): brute force on a fine grid of p."""
    p = np.geomspace(1, 1e12, 200001)
    best = [p[power_laws.loss(power_laws.TWO_TERMS, c / (6 * p), p).argmin()] for c in (1e8, 1e16)]
    assert np.log(best[1] / best[0]) / np.log(1e8) == pytest.approx(1 / 2, abs=1e-4)  # the grid's spacing


def test_phase_two_is_asymptotically_optimal_and_collapses():
    terms, gamma = power_laws.phase_two(0.6, 0.52)
    total = [mu * gamma + nu for mu, nu in zip(terms.mu, terms.nu, strict=True)]
    assert total[1] == pytest.approx(total[2], rel=1e-12) and total[0] > total[1]     # the two that lead tie (theorem F.1)
    spread = [power_laws.deviation(terms, factor * gamma) for factor in (0.9, 1.0, 1.1)]
    assert spread[1] < 0.02 < 0.2 < min(spread[0], spread[2])
    large = power_laws.deviation(terms, gamma, p=np.geomspace(1e100, 1e110, 5))
    assert large < 0.5 * spread[1]                                # and better with size, though as slowly as p^(-0.008)


@pytest.mark.parametrize(('alpha', 'beta'), [(0.6, 0.4), (0.6, 0.7), (0.5, 0.5)])
def test_other_phases_are_refused(alpha, beta):
    with pytest.raises(ValueError, match='not in phase II'):
        power_laws.phase_two(alpha, beta)


def test_joint_fit_recovers_the_planted_law():
    rng = np.random.default_rng(0)
    p, x = np.repeat(np.geomspace(1e6, 1e8, 6), 40), np.tile(np.geomspace(0.02, 1, 40), 6)
    t = x * 20 * p
    truth = 0.5 + 30 * t ** -0.4 + 10 * p ** -0.35
    exact = power_laws.fit_joint(t, p, truth)
    np.testing.assert_allclose([exact.L0, exact.A, exact.mu, exact.B, exact.nu], [0.5, 30, 0.4, 10, 0.35], rtol=5e-3)
    noisy = power_laws.fit_joint(t, p, truth * (1 + 1e-3 * rng.normal(size=len(t))))
    assert noisy.error == pytest.approx(1e-3, rel=0.2)
    held = power_laws.fit_joint(t, p, truth, ratio=0.35 / 0.4)
    np.testing.assert_allclose([held.mu, held.nu], [0.4, 0.35], rtol=5e-3)
    off = power_laws.fit_joint(t, p, truth, ratio=1.5)
    assert off.nu / off.mu == pytest.approx(1.5) and off.error > 10 * exact.error
    with pytest.raises(logs.LogError, match='at least three models'):
        power_laws.fit_joint(t[:80], p[:80], truth[:80])


def test_notes_say_why_the_exponents_of_the_two_fits_differ():
    """There is no note where two power laws describe the curves. A transient at the start moves ν/µ, and the note says how far."""
    exact = power_law_table(np.random.default_rng(0), past=10.0, schedule='const', seeds=2, offset=1e-3, jitter=1e-4, evals=400)
    found = horizon.fit(horizon.smooth_curves(exact))
    assert power_laws.notes(horizon.at_horizon(exact), found) == []
    compute = horizon.optimal_compute(exact['num_params'], found.scale, found.exponent)
    transient = exact.assign(test_loss=exact['test_loss'] * (1 + 0.3 * np.exp(-exact['compute'] / compute / 0.05)))
    notes = power_laws.notes(transient.assign(opt_compute=compute), found)
    assert len(notes) == 2 and 'times the noise of the seed means' in notes[0] and 'from x = 0.3 on' in notes[1]
    whole, late = (float(note.split('ν/µ ')[1].split()[1]) for note in notes)
    assert abs(late - 1) < abs(whole - 1) / 2                                     # γ = 1 is planted
