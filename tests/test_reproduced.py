"""A seed that is left out lies among the other seeds of its model, and a shifted loss does not."""

import json

import numpy as np
import pytest

from analysis import reproduced, table
from figures import paper_commands
from tests.logs_of import paper_log, power_law_table


@pytest.fixture
def planted():
    """(a run left out, the ladder of the others, L0): six models, eight seeds."""
    ladder = power_law_table(np.random.default_rng(0), seeds=8, evals=80)
    left_out = ladder[ladder['run'] == 'D64-s3']
    return left_out, ladder[ladder['run'] != 'D64-s3'], 0.1


def test_a_seed_left_out_lies_among_the_others(planted):
    own, ladder, L0 = planted
    same = reproduced.same_model(own, ladder)
    assert same['run'].nunique() == 7
    result = reproduced.compare(own, same, L0)
    assert np.abs(result['off']).max() < 4.5  # the largest of ten, each a t of 6 degrees of freedom
    assert result['distance'][-1] == 0 and result['noise'][-1] == 0  # ℓ(1) = 1 of every run
    assert np.abs(result['distance'][:-1] / result['noise'][:-1]).max() < 4.5


def test_a_shift_of_the_loss_is_given_in_standard_deviations(planted):
    own, ladder, L0 = planted
    same = reproduced.same_model(own, ladder)
    before = reproduced.compare(own, same, L0)
    shifted = own.assign(test_loss=own['test_loss'] * 1.02)
    after = reproduced.compare(shifted, same, L0)
    np.testing.assert_allclose(after['off'] - before['off'], 0.02 * before['loss'] / before['sd'], rtol=1e-9)


def test_what_cannot_be_compared_is_refused(planted):
    own, ladder, _ = planted
    with pytest.raises(table.LogError, match='one model'):
        reproduced.same_model(ladder, ladder)
    with pytest.raises(table.LogError, match='horizons differ'):
        reproduced.same_model(own[own['compute'] < own['compute'].max() / 2], ladder)
    with pytest.raises(table.LogError):
        reproduced.same_model(own.assign(schedule='cosine'), ladder)


def test_the_command_prints_a_table_and_draws(tmp_path, capsys):
    """One of the authors' seeds is compared with all five."""
    path = paper_log('mlp')
    ladder, _, _ = table.clean(table.load(path))
    name = ladder[ladder['D'] == 384]['run'].iloc[0]
    table.write_parquet(ladder[ladder['run'] == name], tmp_path / 'own.parquet')
    paper_commands.reproduced([str(tmp_path / 'own.parquet'), str(path), '--json', '--out', str(tmp_path / 'own.png')])
    result = json.loads(capsys.readouterr().out)
    assert (tmp_path / 'own.png').stat().st_size > 10_000
    assert abs(result['published'][-1] - 0.0430) < 5e-5 and abs(result['sd'][-1] - 0.00015) < 5e-5  # as published
    assert np.abs(result['off']).max() < 1.79  # (n - 1)/√n, the most that one of five can lie from their mean
