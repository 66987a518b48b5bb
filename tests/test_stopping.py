"""Stopping a sweep: every method finds the best of runs that never cross, at the cost that its algorithm has."""

import numpy as np
import pytest

from figures import stopping

X = np.array([0.02, 0.04, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.55, 0.7, 0.85, 1.0])


def parallel(n):
    """n runs that keep their order from the first evaluation on, the best first."""
    return {f'r{i:02}': (1 + i) * X ** -0.3 for i in range(n)}


def test_halving_spends_what_its_rungs_cost():
    """Nine runs, η = 3 from 1/9: six stop there, two at 1/3, one is trained."""
    losses = parallel(9)
    spent = stopping.halving(losses, X, 3, 1 / 9)
    assert sorted(spent.values()) == pytest.approx([1 / 9] * 6 + [1 / 3] * 2 + [1])
    assert stopping.outcome(spent, {run: loss[-1] for run, loss in losses.items()}) == pytest.approx(((6 / 9 + 2 / 3 + 1) / 9, 0))


def test_hyperband_deals_its_brackets():
    """27 runs, η = 3 from 1/9: brackets of 9/3 : 3/2 : 1, or 15, 7 and 5; the last stops nothing, the others as halving does."""
    losses = parallel(27)
    spent = stopping.hyperband(losses, X, 3, 1 / 9, list(losses))
    first, second, last = list(losses)[:15], list(losses)[15:22], list(losses)[22:]
    assert set(spent) == set(losses) and all(spent[run] == 1 for run in last)
    assert [run for run in first if spent[run] == 1] == first[:2] and [run for run in second if spent[run] == 1] == second[:3]
    assert min(spent[run] for run in first) == pytest.approx(1 / 9) and min(spent[run] for run in second) == pytest.approx(1 / 3)


def test_asha_promotes_early_and_sometimes_wrongly():
    """Nine runs, η = 3 from 1/9. Started best first, the third of each rung goes on, as in halving; started worst first, each
    newcomer leads, and more runs are promoted. The best is found both ways."""
    losses = parallel(9)
    finals = {run: loss[-1] for run, loss in losses.items()}
    best_first = stopping.asha(losses, X, 3, 1 / 9, list(losses))
    worst_first = stopping.asha(losses, X, 3, 1 / 9, list(losses)[::-1])
    assert sorted(best_first.values()) == pytest.approx([1 / 9] * 6 + [1 / 3] * 2 + [1])
    assert stopping.outcome(best_first, finals)[1] == stopping.outcome(worst_first, finals)[1] == 0
    assert sum(worst_first.values()) > 1.2 * sum(best_first.values())


def test_a_forecast_sees_a_crossing_that_halving_does_not():
    """The run that is behind until x = 0.7 ends best. Halving stops it; ends that know it and tell runs apart do not."""
    losses = {'steady': X ** -0.3, 'late': np.where(X < 0.7, 1.5, 0.8) * X ** -0.3, 'bad': 3 * X ** -0.3}
    finals = {run: loss[-1] for run, loss in losses.items()}

    def ends(x, loss):
        k = next(run for run, whole in losses.items() if np.array_equal(whole[:len(loss)], loss))
        return finals[k], 0.05, 0.05

    assert stopping.outcome(stopping.halving(losses, X, 3, 0.1), finals)[1] == pytest.approx(0.25)
    spent = stopping.by_forecast(losses, X, ends)
    assert stopping.outcome(spent, finals)[1] == 0 and spent['bad'] == stopping.RUNGS[0] and spent['steady'] < 1


def test_rivals_stay_within_the_budget():
    rows = [('forecast', '', 0.4, 0.0), ('halving', 'a', 0.39, 0.02), ('halving', 'b', 0.5, 0.0), ('Hyperband', 'a', 0.6, 0.0),
            ('Hyperband', 'b', 0.5, 0.1), ('ASHA', 'a', 0.3, 0.01), ('ASHA', 'b', 0.4, 0.0)]
    assert [row[:2] for row in stopping.at_equal_budget(rows)] == [
        ('forecast', ''), ('halving', 'a'), ('Hyperband', 'b'), ('ASHA', 'b')]
