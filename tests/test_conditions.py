"""A ladder with one broken condition has that one named, and no other; a clean ladder has none; what the log lacks is unknown."""

import json

import numpy as np
import pandas as pd
import pytest

from analysis import mapping
from analysis import table as logs
from analysis.conditions import conditions
from figures import paper_commands

P = 1e6 * 2.0 ** np.arange(5)
SHAPES = {'cosine': lambda u: 0.55 + 0.45 * np.cos(np.pi * u), 'to zero': lambda u: 0.5 + 0.5 * np.cos(np.pi * u),
          'linear': lambda u: 1 - u, 'wsd': lambda u: np.minimum(1, (1 - u) / 0.1 + 0.05)}


def ladder(gamma=1.0, seeds=2, evals=60, drop=(), odd=None, shape='cosine', **changes):
    """A ladder with t = 20·p for p = 1e6, t ∝ p^gamma, batches of 256 tokens, a warm-up of 5%, and one AdamW timescale of 1.4.

    `changes` holds what the model P[odd] has instead: tokens, batch or timescale (factors), warm_up, decay (a shape).
    """
    rows = []
    for m, p in enumerate(P):
        own = changes if m == odd else {}
        tokens = 20e6 * (p / 1e6) ** gamma * own.get('tokens', 1)
        batch, warm_up, lr = 256 * own.get('batch', 1), own.get('warm_up', 0.05), 1e-3 * (p / 1e6) ** -0.3
        t = batch * np.round(tokens / batch * np.linspace(0, 1, evals + m)[1:])
        u = np.clip((t / tokens - warm_up) / (1 - warm_up), 0, 1)
        rate = np.where(t < warm_up * tokens, t / max(warm_up * tokens, 1), SHAPES[own.get('decay', shape)](u))
        for seed in range(seeds):
            rows.append(pd.DataFrame({
                'run': f'{m}-{seed}', 'num_params': p, 'seed': seed, 'step': t / batch, 'tokens': t, 'lr': lr * rate, 'peak_lr': lr,
                'weight_decay': batch / (lr * tokens * 1.4 * own.get('timescale', 1)), 'test_loss': 1 + t ** -0.3 + p ** -0.3}))
    return logs.tidy(pd.concat(rows).drop(columns=list(drop)))


def verdicts(table):
    return {one.name: one.verdict for one in conditions(table)}


def differing(table):
    return [name for name, verdict in verdicts(table).items() if verdict != 'met']


@pytest.mark.parametrize('gamma', [0.7, 1.0, 1.2])
@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('evals', [25, 200])
def test_none_is_named_on_a_clean_ladder(gamma, shape, evals):
    found = verdicts(ladder(gamma, evals=evals, shape=shape))
    assert [name for name, verdict in found.items() if verdict == 'differs'] == []
    if evals == 200:
        assert set(found.values()) == {'met'}


@pytest.mark.parametrize('odd', range(5))
@pytest.mark.parametrize('name, change', [
    ('tokens per parameter', {'tokens': 1.3}), ('tokens per parameter', {'tokens': 0.8}), ('schedule', {'decay': 'to zero'}),
    ('schedule', {'decay': 'wsd'}), ('warm-up', {'warm_up': 0.02}), ('warm-up', {'warm_up': 0.15}), ('batch size', {'batch': 2}),
    ('AdamW timescale', {'timescale': 1.5}), ('AdamW timescale', {'timescale': 0.3})])
def test_one_broken_condition_is_named_and_no_other(name, change, odd):
    table = ladder(odd=odd, evals=100, **change)
    assert differing(table) == [name]
    found = next(one for one in conditions(table) if one.name == name)
    assert f'{P[odd]:.4g} parameters' in found.advice and found.spread > found.limit


def test_a_difference_within_the_limit_is_not_named_and_is_still_measured():
    found = {one.name: one for one in conditions(ladder(odd=2, evals=100, timescale=1.1, tokens=1.02, warm_up=0.055))}
    assert {one.verdict for one in found.values()} == {'met'}
    np.testing.assert_allclose(found['AdamW timescale'].spread, 1.1, rtol=0.01)           # whole batches
    np.testing.assert_allclose(found['tokens per parameter'].spread, 1.02, rtol=0.01)
    np.testing.assert_allclose(found['warm-up'].spread, 0.005, atol=1e-4)


def test_warm_up_over_a_number_of_tokens_is_named():
    table = ladder(evals=300)
    peak, horizon = table['peak_lr'], table.groupby('run')['tokens'].transform('max')
    short = table.assign(lr=peak * np.minimum(table['tokens'] / 2e6, 1 - table['tokens'] / horizon * 0.9))   # 2e6 tokens for all
    assert 'warm-up' in differing(short)


def test_the_same_tokens_for_every_model_are_no_horizon():
    assert differing(ladder(gamma=0.0)) == ['tokens per parameter']


def test_two_models_lie_on_every_power_law():
    two = ladder(gamma=1.2)
    two = two[two['num_params'] <= P[1]]
    assert verdicts(two)['tokens per parameter'] == 'unknown'
    same = ladder()
    assert set(verdicts(same[same['num_params'] <= P[1]]).values()) == {'met'}
    with pytest.raises(logs.LogError, match='the log has one'):
        conditions(same[same['num_params'] == P[0]])


@pytest.mark.parametrize('drop, unknown', [
    (['lr'], ['schedule', 'warm-up']), (['weight_decay'], ['AdamW timescale']), (['step'], ['batch size', 'AdamW timescale']),
    (['lr', 'weight_decay', 'step', 'peak_lr'], ['schedule', 'warm-up', 'batch size', 'AdamW timescale'])])
def test_what_the_log_lacks_is_unknown(drop, unknown):
    found = conditions(ladder(drop=drop, evals=100))
    assert [one.name for one in found if one.verdict == 'unknown'] == unknown
    assert all('the log lacks' in one.advice for one in found if one.name in unknown)
    assert not [one.name for one in found if one.verdict == 'differs']
    wanted = [column for column in ('weight_decay', 'peak_lr', 'step') if column in drop]
    assert not wanted or found[-1].advice == f'the log lacks {" and ".join(wanted)}'


def test_the_timescale_is_that_of_hidden_weights_where_their_decay_is_known():
    """Under µP one weight decay and one base rate decay wider models less; only decay_per_step knows it."""
    table = ladder(evals=100)
    width = np.sqrt(table['num_params'] / P[0])
    share = table['peak_lr'] * table['weight_decay']
    assert verdicts(table.assign(decay_per_step=share))['AdamW timescale'] == 'met'
    assert verdicts(table.assign(decay_per_step=share / width))['AdamW timescale'] == 'differs'
    assert verdicts(table.assign(decay_per_step=share, weight_decay=0.0))['AdamW timescale'] == 'met'


def test_one_model_without_a_weight_decay_is_unknown_and_none_at_all_is_met():
    table = ladder(evals=100)
    larger = table['num_params'] > P[0]
    for decay, verdict in ((table['weight_decay'].where(larger), 'unknown'), (0.0, 'met'), (np.where(larger, 0.1, 0), 'differs'),
                           (np.where(larger, 0, 0.1), 'differs')):
        assert verdicts(table.assign(weight_decay=decay))['AdamW timescale'] == verdict


def test_of_few_evaluations_nothing_is_concluded():
    assert verdicts(ladder(evals=5))['schedule'] == 'unknown'
    assert verdicts(ladder(evals=12, shape='wsd')) == verdicts(ladder(evals=12)) == {
        'tokens per parameter': 'met', 'schedule': 'met', 'warm-up': 'unknown', 'batch size': 'met', 'AdamW timescale': 'met'}


def test_the_shipped_ladders():
    """The text ladder warms up over 20,000 tokens at every size, 2.1% of its smallest run and 0.2% of its largest."""
    mlp, text = (logs.clean(logs.load(f'logs/{name}.parquet'))[0] for name in ('laptop_mlp', 'laptop_text'))
    assert set(verdicts(mlp).values()) == {'met'} and verdicts(text)['warm-up'] == 'differs'
    share = next(one.values for one in conditions(text) if one.name == 'warm-up')
    np.testing.assert_allclose(share[[0, -1]], [20000 / 9.4e5, 20000 / 9.6e6], rtol=0.05)


@pytest.mark.parametrize('horizon', ['0.5xC', '1xC', '5xC'])
def test_the_olmo_ladder_differs_in_its_batch_alone(published, horizon):
    whole = logs.tidy(mapping.read_curves(published / 'olmo/cosine.csv', mapping.parse(['weight_decay=0.1'])))
    found = {one.name: one for one in conditions(logs.clean(logs.where(whole, f'horizon={horizon}'))[0])}
    assert [name for name, one in found.items() if one.verdict == 'differs'] == ['batch size']
    np.testing.assert_allclose(found['batch size'].spread, 6)
    assert found['warm-up'].verdict == ('unknown' if horizon == '5xC' else 'met')
    np.testing.assert_allclose(found['AdamW timescale'].spread, 1.19, atol=0.005)


def test_the_command(tmp_path, capsys):
    logs.write_parquet(ladder(odd=4, batch=2, evals=100), tmp_path / 'log.parquet', source='planted')
    paper_commands.conditions([str(tmp_path / 'log.parquet')])
    printed = capsys.readouterr().out
    assert 'batch size differs' in printed and 'batch size: 1.6e+07 parameters: use one batch size' in printed
    paper_commands.conditions([str(tmp_path / 'log.parquet'), '--json'])
    found = json.loads(capsys.readouterr().out)['conditions']
    assert [one['verdict'] for one in found] == ['met', 'met', 'met', 'differs', 'met'] and len(found[0]['values']) == 5
