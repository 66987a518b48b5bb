"""Loss curves under foreign names come in with the right numbers, and every mistake in a map is one clear line."""

import json

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml

from analysis import mapping
from analysis import table as logs
from analysis.columns import ROW_COLUMNS, RUN_COLUMNS
from tests.test_save_logs import program

OPTIONS = {'model': {'n_params': 1000.0, 'dim': 8}, 'optim': {'lr': 0.1}, 'batch': 64}


def history(rows=10):
    step = np.arange(rows)
    return pd.DataFrame({'_step': step, 'tokens_b': step * 1e-3, 'eval/c4/CE loss': 4.0 - 0.1 * step,
                         'eval/pile/CE loss': 3.0 - 0.1 * step, 'train/loss': 4.1 - 0.1 * step,
                         'optim/LR (group 0)': 0.1 - 0.01 * step})


def mapped(*arguments, rows=None, window=None):
    return mapping.apply(mapping.parse(arguments, window), 'a', history() if rows is None else rows, OPTIONS, {'params': 1000})


LOSS = 'loss=history:eval/c4/CE loss'
WHOLE = ('num_params=config:model.n_params', 'tokens=history:tokens_b*1e9', LOSS)


def test_sources_factors_and_constants():
    table = mapped(*WHOLE, 'lr=history:optim/LR (group 0)', 'weight_decay=0.1', 'schedule=constant:linear', 'D=config:model.dim*4')
    np.testing.assert_allclose(table['tokens'], np.arange(10) * 1e6)
    np.testing.assert_allclose(table['test_loss'], 4.0 - 0.1 * np.arange(10))
    assert table['peak_lr'][0] == 0.1 and set(table['weight_decay']) == {0.1} and set(table['schedule']) == {'linear'}
    assert set(table['D']) == {32} and set(table['num_params']) == {1000} and set(table['run']) == {'a'}
    assert set(table) <= {*RUN_COLUMNS, *ROW_COLUMNS}                          # nothing else of the W&B history is kept


def test_a_quotient_and_a_value_for_each_run(tmp_path):
    rows = history().assign(multiple=history()['tokens_b'] * 1e9 / (20 * 777))
    table = mapped(LOSS, 'tokens=tokens_b * 1e9', 'num_params=tokens_b / multiple * 5e7', rows=rows[1:])
    np.testing.assert_allclose(table['num_params'], 777)
    (tmp_path / 'mine.yaml').write_text(yaml.safe_dump({'num_params': {'a': 5.0, 'b': 6.0}, 'loss': 'eval/c4/CE loss'}))
    assert set(mapped(str(tmp_path / 'mine.yaml'), 'tokens=tokens_b*1e9')['num_params']) == {5}
    (tmp_path / 'mine.yaml').write_text(yaml.safe_dump({'num_params': {'a-1': 5.0, 'b': 6.0}}))
    with pytest.raises(logs.LogError, match="run a has no map key 'a'; did you mean a-1"):
        mapped(*WHOLE, str(tmp_path / 'mine.yaml'))


def test_batch_times_step_where_tokens_are_missing():
    by_product = mapped(WHOLE[0], LOSS, 'step=history:_step', 'tokens=history:_step*config:batch')
    by_columns = mapped(WHOLE[0], LOSS, 'step=history:_step', 'B=config:batch')
    np.testing.assert_allclose(by_product['tokens'], 64 * np.arange(10))
    np.testing.assert_allclose(by_columns['tokens'], by_product['tokens'])


def test_several_losses_the_first_is_analysed_unless_another_is_named():
    both = ('loss.c4=eval/c4/CE loss', 'loss.pile=eval/pile/CE loss')
    first, other = mapped(*WHOLE[:2], *both), mapped(*WHOLE[:2], *both, 'loss=eval/pile/CE loss')
    np.testing.assert_allclose(first['test_loss'], first['loss.c4'])
    np.testing.assert_allclose(other['test_loss'], other['loss.pile'])
    assert not np.allclose(other['test_loss'], other['loss.c4'])


def test_values_logged_at_other_steps_are_interpolated_and_not_extrapolated():
    """As nanochat logs: losses at steps 0, 4, 8, the rest at steps 2 and 6, in rows of their own."""
    rows = pd.DataFrame({'step': [0, 2, 4, 6, 8], 'loss': [3, np.nan, 2, np.nan, 1.0], 'rate': [np.nan, 0.2, np.nan, 0.4, np.nan]})
    table = mapped('num_params=7', 'step=step', 'tokens=step*10', 'loss=loss', 'lr=rate', rows=rows)
    np.testing.assert_allclose(table['tokens'], [0, 40, 80])
    np.testing.assert_allclose(table['lr'], [np.nan, 0.3, np.nan])


def test_a_run_that_goes_on_without_a_loss_is_known_to_be_longer(tmp_path):
    """So `clean` leaves out a run that diverged, or whose last evaluation is not at its end."""
    step = np.arange(1.0, 101)
    frame = pd.DataFrame({'run': 'a', 'p': 10, 'tokens': step, 'loss': np.where(step % 10 == 0, 2 - step / 100, np.nan)})
    for last, runs in ((100, ['a', 'b']), (90, ['a'])):
        short = frame.assign(run='b', p=20, loss=frame['loss'].where(step <= last) + 0.1)
        pd.concat([frame, short]).to_csv(tmp_path / 'c.csv', index=False)
        assert list(logs.clean(logs.load(tmp_path / 'c.csv'))[0]['run'].unique()) == runs


def test_a_training_loss_is_smoothed_without_bias_at_its_end():
    rng, step = np.random.default_rng(0), np.arange(1, 2001)
    clean = 2 + 3 * step ** -0.3
    rows = pd.DataFrame({'tokens_b': step * 1e-3, 'train/loss': clean + 0.1 * rng.normal(size=2000)})
    maps = ('num_params=7', 'tokens=tokens_b*1e9', 'train_loss=train/loss')
    table = mapped(*maps, rows=rows, window=0.05)
    error = table['test_loss'] - np.interp(table['tokens'], step * 1e6, clean)
    assert len(table) == 2000 - 101 and table['tokens'].iloc[-1] == 2e9
    assert error.std() < 0.015                  # a mean of 101 points: 0.1/√101 = 0.010, up to twice that in the last window
    assert abs(error[-200:].mean()) < 0.02      # no lag: the loss falls by 0.02 in the last 200 steps, the mean's error is 0.007
    np.testing.assert_allclose(mapped(*maps, rows=rows, window=1e8)['test_loss'], table['test_loss'])   # 100 steps of 1e6 tokens
    with pytest.raises(logs.LogError, match='--smooth'):
        mapped(*maps, rows=rows)
    with pytest.raises(logs.LogError, match='1 of 2000 logged training losses'):
        mapped(*maps, rows=rows, window=10)


@pytest.mark.parametrize('arguments, words', [
    (('num_param=config:model.n_params',), '--map num_param: a log has no such column; did you mean num_params'),
    (('num_params=config:model.n_prams',), "no config key 'model.n_prams'; did you mean model.n_params"),
    (('num_params=config:n_params',), 'did you mean model.n_params'),
    (('tokens=history:tokens*1e9',), "no history key 'tokens'; did you mean tokens_b"),
    (('loss=history:eval/c4/CrossEntropyLoss',), "no history key 'eval/c4/CrossEntropyLoss'; did you mean eval/"),
    (('num_params=summary:model',), "no summary key 'model'; there are params"),
    (('num_params=config:optim.lr*x',), "no history key 'x'; there are _step"),
    (('num_params=constant:big', 'peak_lr=config:optim'), "no config key 'optim'; did you mean optim.lr"),
    (('levanta',), '--map levanta: no such map; did you mean levanter'), (('none.yaml',), 'none.yaml: no such map'),
    (('step=_step', 'tokens=_step*-1'), 'tokens=_step*-1: run a has -9')])
def test_a_mistake_is_one_line_with_a_suggestion(arguments, words):
    with pytest.raises(logs.LogError) as error:
        mapped(*WHOLE, *arguments)
    assert words in str(error.value) and '\n' not in str(error.value)


def test_what_is_missing_is_named():
    for left_out in range(3):
        with pytest.raises(logs.LogError, match='give --map ' + ('p=KEY', 'tokens=KEY', 'loss=KEY')[left_out]):
            mapped(*(one for i, one in enumerate(WHOLE) if i != left_out))


@pytest.mark.parametrize('name', mapping.PRESETS)
def test_a_preset_names_columns_and_a_run_may_lack_what_is_not_needed(name):
    how = mapping.parse([name])
    assert 'test_loss' in how.expressions and how.optional == set(how.expressions)
    needed = {'num_params': '7', 'tokens': 'when', 'test_loss': 'quality', 'step': 'when'}
    table = mapping.apply(mapping.parse([name, *(f'{column}={key}' for column, key in needed.items())]), 'a',
                          pd.DataFrame({'when': [1.0, 2.0], 'quality': [3.0, 2.0]}), {}, {})
    assert len(table) == 2 and table['tokens'].tolist() == [1, 2]


# ---- the command ------------------------------------------------------------------------------------------------------


def test_csv_and_parquet_give_one_log_and_the_map_is_in_its_record(tmp_path):
    frame = pd.DataFrame({'name': ['s', 's', 'l', 'l'], 'size': [1e6, 1e6, 2e6, 2e6], 'Btok': [0.1, 0.2, 0.2, 0.4],
                          'ce': [3, 2, 2.5, 1.5], 'group': ['x', 'x', 'y', 'y']})
    frame.to_csv(tmp_path / 'c.csv', index=False)
    frame.to_parquet(tmp_path / 'c.parquet')
    maps = [part for one in ('run=name', 'p=size', 'tokens=Btok*1e9', 'loss=ce') for part in ('--map', one)]
    for kind in ('csv', 'parquet'):
        done = program('--files', tmp_path / f'c.{kind}', *maps, '--out', tmp_path / f'{kind}.log.parquet')
        assert done.returncode == 0 and '2 runs, 4 evaluations' in done.stdout, done.stderr
    csv, parquet = (logs.load(tmp_path / f'{kind}.log.parquet') for kind in ('csv', 'parquet'))
    pd.testing.assert_frame_equal(csv, parquet)
    assert list(csv['run']) == ['s', 's', 'l', 'l'] and list(csv['num_params']) == [1e6, 1e6, 2e6, 2e6]
    assert list(csv['tokens']) == [1e8, 2e8, 2e8, 4e8]
    origin = json.loads(pq.read_schema(tmp_path / 'csv.log.parquet').metadata[logs.METADATA_KEY])
    assert origin['map']['tokens'] == 'Btok*1e9' and origin['smooth'] is None
    done = program('--files', tmp_path / 'c.csv', *maps, '--where', 'group=y', '--out', tmp_path / 'y.parquet')
    assert '1 runs, 2 evaluations' in done.stdout                                 # a column of text of one's own


def test_files_as_the_olmo_ladder_publishes_them(tmp_path):
    """One file a run, with the keys of W&B, 100 other columns, and no number of parameters."""
    keys = {'_step': [200, 400], 'throughput/total_tokens': [1e8, 2e8], 'eval/c4_en-validation/CrossEntropyLoss': [5.0, 4.0],
            'optim/learning_rate_group0': [2e-3, 1e-3], **{f'eval/downstream/{i}': [0.5, 0.6] for i in range(100)}}
    for name in ('190M', '370M'):
        pd.DataFrame(keys).to_csv(tmp_path / f'{name}.csv', index=False)
    (tmp_path / 'sizes.yaml').write_text(yaml.safe_dump({'num_params': {'190M': 1.9e8, '370M': 3.7e8}}))
    command = ('--files', tmp_path / '190M.csv', tmp_path / '370M.csv', '--out', tmp_path / 'log.parquet', '--map', 'olmo')
    done, without = program(*command, '--map', tmp_path / 'sizes.yaml'), program(*command)
    assert done.returncode == 0 and '2 runs, 4 evaluations' in done.stdout and done.stderr == '', done.stderr
    assert logs.load(tmp_path / 'log.parquet')['num_params'].tolist() == [1.9e8, 1.9e8, 3.7e8, 3.7e8]
    assert without.returncode == 2 and 'run 190M: no p; wanted p' in without.stderr and 'give --map p=KEY' in without.stderr


def test_a_text_log(tmp_path):
    (tmp_path / 'one.txt').write_text('model.step:7 val_loss:9.9 code\nstep:0/20 val_loss:10.8 train_time:5ms step_avg:nanms\n'
                                      'step:1/20 train_time:6ms\nstep:20/20 val_loss:3.5 train_time:99ms step_avg:5ms\n')
    done = program('--files', tmp_path / 'one.txt', '--map', 'modded-nanogpt', '--map', 'tokens=step*64', '--map', 'num_params=1e6',
                   '--out', tmp_path / 'log.parquet')
    assert done.returncode == 0, done.stderr
    table = logs.load(tmp_path / 'log.parquet')
    assert list(table['test_loss']) == [10.8, 3.5] and list(table['tokens']) == [0, 1280] and set(table['run']) == {'one'}


@pytest.mark.parametrize('arguments, words', [
    (['--files', 'x.csv', '--runs', 'runs'], 'give either'), (['--runs', 'runs', '--map', 'p=size', '--tag', 'x'], 'give either'),
    (['--files', 'nowhere.csv', '--out', 'x.parquet'], 'nowhere.csv: not a readable csv'), (['--files', 'x.csv'], 'give --tag')])
def test_a_mistake_on_the_command_line_is_one_line(arguments, words):
    done = program(*arguments)
    assert done.returncode == 2 and words in done.stderr.splitlines()[-1] and 'Traceback' not in done.stderr


def test_the_olmo_ladder_comes_in_with_one_command(published, tmp_path):
    out = tmp_path / 'olmo.parquet'
    done = program('--files', published / 'olmo/cosine.csv', '--map', 'weight_decay=0.1', '--out', out)
    assert '20 runs, 2271 evaluations' in done.stdout, done.stderr
    table, notes, _ = logs.clean(logs.where(logs.load(out), 'horizon=1xC'))
    assert not notes and table['run'].nunique() == 10
    ends = logs.runs(table)
    np.testing.assert_allclose(ends['tokens'] / ends['num_params'], 20, rtol=2e-3)   # whole batches
    other = program('--files', out, '--map', 'loss=pile', '--out', out)               # another loss of a saved log
    assert other.returncode == 0, other.stderr
    np.testing.assert_array_equal(logs.load(out)['test_loss'], logs.load(out)['pile'])
