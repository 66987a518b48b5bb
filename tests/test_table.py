"""Every kind of log gives the same table. Damaged, foreign and dangerous files are refused with one line."""

import json
import os
import pickle

import numpy as np
import pandas as pd
import pytest
import yaml

from analysis import mapping, scaling_law
from analysis import table as logs
from tests.logs_of import paper_log, power_law_table


def small(**changes):
    return power_law_table(np.random.default_rng(0), models=2, seeds=2, evals=20).assign(**changes)


def authors_frame(kind, runs=2):
    """A frame as the authors saved them: 'mlp', 'schedules' (with T, tokens and Buvar) or 'c5m' (the older code base)."""
    rows = []
    for i in range(runs):
        steps = np.arange(1, 30.0)
        p, tokens = 1000 * (i + 1), steps * 64
        history = {'step': steps, 'compute': 6 * tokens * p / 1e15, 'test_loss': 1 / steps, 'lr': 0.01 - 0 * steps,
                   'tau': 0.01 * steps}
        row = {'N': 3, 'V': 256, 'L': 1024, 'D': 128 * (i + 1), 'B': 64, 'lr': 0.01, 'seed': 0, 'decay_frac': 1}
        if kind == 'c5m':
            history |= {'p_ntk_trace': steps, 'p_grad_norm2': steps}
            row |= {'P': p, 'num_params': -1, 'schedule': '$1-x$'}
        elif kind == 'schedules':
            history |= {'tokens': tokens, 'Buvar': 1 / steps}
            row |= {'P': -1, 'num_params': p, 'schedule': 'linear', 'T': int(tokens[-1])}
        else:
            row |= {'P': p, 'num_params': p, 'schedule': 'linear', 'opt_C': history['compute'][-1], 'opt_L': 1 / steps[-1],
                    'color': 0.1, 'alpha': -1}
        rows.append(row | {'history': pd.DataFrame(history)})
    return pd.DataFrame(rows)


def write(frame, path):
    with open(path, 'wb') as file:
        pickle.dump(frame, file)
    return path


# ---- the authors' pickles ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', ['mlp', 'schedules', 'c5m'])
def test_the_variants_of_the_authors_logs(tmp_path, kind):
    table = logs.load(write(authors_frame(kind), tmp_path / 'log.pkl'))
    assert table['run'].nunique() == 2 and set(table['schedule']) == {'linear'}
    assert sorted(table['num_params'].unique()) == [1000, 2000]
    np.testing.assert_allclose(table['tokens'], 64 * table['step'])             # given or derived from compute
    np.testing.assert_allclose(table['compute'], 6 * table['tokens'] * table['num_params'])
    assert ('Buvar' in table) == ('num_test_batches' in table) == (kind == 'schedules')
    if kind == 'schedules':                                                     # T_eval 2,048,000 in batches of 64 times 1,024
        assert set(table['num_test_batches']) == {31}
    assert ('opt_compute' in table) == (kind == 'mlp')
    assert not (table.select_dtypes('number') == -1).any().any()                # missing is missing


@pytest.mark.parametrize('name, runs, rows', [('mlp', 56, 49427), ('chess_const', 40, 35760), ('mlp_schedules', 29, None)])
def test_the_authors_files(name, runs, rows):
    table = logs.load(paper_log(name))
    assert table['run'].nunique() == runs and table['num_params'].notna().all()
    assert logs.clean(table)[2] == (16 if name == 'mlp' else 0)


class Attack:
    def __reduce__(self):
        return os.mkdir, (os.environ['ATTACKED'],)


def test_a_crafted_pickle_is_refused_by_name_and_nothing_runs(tmp_path, monkeypatch):
    monkeypatch.setenv('ATTACKED', str(tmp_path / 'attacked'))
    frame = authors_frame('mlp')
    frame['history'] = [Attack(), Attack()]
    with pytest.raises(logs.LogError, match='posix.mkdir.*nothing was executed'):
        logs.load(write(frame, tmp_path / 'log.pkl'))
    assert not (tmp_path / 'attacked').exists()
    pickle.loads(pickle.dumps(Attack()))                                        # control: pickle does run it
    assert (tmp_path / 'attacked').exists()


@pytest.mark.parametrize('module, name', [('builtins', 'eval'), ('pandas', 'read_pickle'), ('pandas', 'DataFrame.eval'),
                                          ('numpy', 'load'), ('pandas.core.frame', 'DataFrame.to_pickle')])
def test_no_other_constructor_is_admitted(tmp_path, module, name):
    code = b'\x80\x04' + b''.join(b'\x8c' + bytes([len(s)]) + s.encode() for s in (module, name)) + b'\x93.'
    (tmp_path / 'log.pkl').write_bytes(code)
    with pytest.raises(logs.LogError, match=f'{module}.{name}'):
        logs.load(tmp_path / 'log.pkl')


@pytest.mark.parametrize('content, words', [
    (b'', 'not a readable pickle'), (b'\x80\x04garbage', 'not a readable pickle'),
    (pickle.dumps([1, 2]), 'wanted a DataFrame'), (pickle.dumps({'a': 1}), 'wanted a DataFrame')])
def test_a_pickle_of_something_else(tmp_path, content, words):
    (tmp_path / 'log.pkl').write_bytes(content)
    with pytest.raises(logs.LogError, match=words):
        logs.load(tmp_path / 'log.pkl')


def test_a_truncated_pickle(tmp_path):
    path = write(authors_frame('mlp'), tmp_path / 'log.pkl')
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(logs.LogError, match='not a readable pickle'):
        logs.load(path)


def test_a_missing_column_of_a_pickle(tmp_path):
    frame = authors_frame('mlp')
    frame['history'] = [h.drop(columns='test_loss') for h in frame['history']]
    with pytest.raises(logs.LogError, match='history of row 0 has the columns .*; wanted .* test_loss'):
        logs.load(write(frame, tmp_path / 'log.pkl'))
    with pytest.raises(logs.LogError, match='neither num_params nor P'):
        logs.load(write(authors_frame('mlp').drop(columns=['P', 'num_params']), tmp_path / 'log.pkl'))


# ---- our own formats --------------------------------------------------------------------------------------------------


def run_folder(folder, losses, state='finished', tail='', seed=0, **opt):
    folder.mkdir(parents=True)
    config = {'model': {'D': 64, 'N': 3, 'L': 1, 'V': 8},
              'opt': {'B': 4, 'lr': 0.01, 'schedule': 'linear', 'decay_frac': 1.0, **opt},
              'seed': seed, 'T': 4 * (len(losses) - 1), 'scale': 1e6, 'exponent': 2.0, 'wandb_tag': 'mine',
              'derived': {'num_params': 100, 'steps': len(losses) - 1, 'num_test_batches': 7},
              'environment': {'revision': 'abc1234', 'device': 'cpu'}}
    (folder / 'config.yaml').write_text(yaml.safe_dump(config))
    rows = [{'step': i, 'tokens': 4 * i, 'compute': 2400 * i, 'lr': 0.01, 'test_loss': loss} for i, loss in enumerate(losses)]
    (folder / 'history.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows) + tail)
    if state:
        (folder / 'summary.json').write_text(json.dumps({'state': state, 'wall_seconds': 720.0, 'seeds_together': 2}))


def test_a_folder_of_runs(tmp_path):
    run_folder(tmp_path / 'mine/a', [3.0, 2.0, 1.0], seed=1)
    run_folder(tmp_path / 'mine/b', [3.0, 2.0], state=None, tail='{"step": 2, "tok')   # killed in the middle of a line
    table = logs.load(tmp_path)
    assert list(table['run'].unique()) == ['mine/a', 'mine/b'] and len(table) == 5
    first = table.iloc[0]
    assert (first['D'], first['B'], first['peak_lr'], first['seed'], first['tag']) == (64, 4, 0.01, 1, 'mine')
    assert first['num_test_batches'] == 7
    assert first['opt_compute'] == 6 * 100 * 8                                          # its horizon was set by scale, exponent
    cleaned, notes, _ = logs.clean(table)
    assert list(cleaned['run'].unique()) == ['mine/a'] and '1 unfinished runs left out: mine/b' in notes[0]


def test_a_run_of_few_steps_ends_at_its_horizon():
    """T = 50.9 tokens is 50 steps of one token. x = 1 is the last step and not 1.8% later."""
    rows = [{'step': i, 'tokens': i, 'compute': 6.0 * 100 * i, 'test_loss': 3 / (1 + i)} for i in range(51)]
    setting = {'scale': 1.0, 'exponent': 2.0, 'T': 50.9, 'model': {'L': 1}, 'opt': {'B': 1},
               'derived': {'num_params': 100, 'compute': 6.0 * 100 * 50}}
    table = logs.clean(logs.tidy(logs.from_run('short', setting, rows, {'state': 'finished'})))[0]
    assert scaling_law.horizon_of(table)['short'] == table['opt_compute'].iloc[0] == 6 * 100 * 50


def test_a_csv_that_knows_T_but_not_p():
    table = pd.DataFrame({'run': 'a', 'compute': np.arange(1.0, 21), 'test_loss': np.geomspace(2, 1, 20), 'T': 5.0})
    assert len(logs.clean(logs.tidy(table))[0]) == 20


def test_a_broken_line_that_is_not_the_last_is_an_error(tmp_path):
    run_folder(tmp_path / 'a', [3.0])
    (tmp_path / 'a/history.jsonl').write_text('{"step": 0, "te\n{"step": 1, "test_loss": 1}\n')
    with pytest.raises(logs.LogError, match='history.jsonl:1'):
        logs.load(tmp_path)


def test_parquet_round_trip_is_exact_and_repeatable(tmp_path):
    table = small(Buvar=np.nan)
    logs.write_parquet(table, tmp_path / 'a.parquet', source='planted')
    logs.write_parquet(table, tmp_path / 'b.parquet', source='planted')
    assert (tmp_path / 'a.parquet').read_bytes() == (tmp_path / 'b.parquet').read_bytes()
    back = logs.load(tmp_path / 'a.parquet')
    pd.testing.assert_frame_equal(back, logs.tidy(table), check_dtype=False)
    assert back['Buvar'].isna().all()


def test_csv_of_loss_curves_from_elsewhere(tmp_path):
    (tmp_path / 'c.csv').write_text('run,p,tokens,loss,lr\n1,1e6,1e7,3.0,0.1\n1,1e6,2e7,2.5,0.05\n')
    table = logs.load(tmp_path / 'c.csv')
    np.testing.assert_allclose(table['compute'], [6e13, 1.2e14])
    assert set(table['peak_lr']) == {0.1} and list(table['run']) == ['1', '1']
    (tmp_path / 'c.csv').write_text('p,tokens,perplexity\n1e6,1e7,3.0\n')
    with pytest.raises(logs.LogError, match='wanted .* loss; .* --files FILE --map loss=KEY; there are p, perplexity, tok'):
        logs.load(tmp_path / 'c.csv')


@pytest.mark.parametrize('name, content, words', [
    ('none.pkl', None, 'no such file'), ('log.npz', b'', 'unknown kind'), ('log.csv', b'', 'not a readable csv'),
    ('log.csv', b'run,p,tokens,loss\n', 'no evaluations'), ('log.parquet', b'PAR1nonsense', 'not a readable parquet'),
    ('log.csv', b'run,p,tokens,loss\na,1,2,three\n', "'test_loss' should hold numbers")])
def test_unreadable_logs(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(logs.LogError, match=words):
        logs.load(tmp_path / name)


def test_an_empty_folder(tmp_path):
    with pytest.raises(logs.LogError, match='no run with an evaluation'):
        logs.load(tmp_path)


# ---- cleaning ---------------------------------------------------------------------------------------------------------


def test_duplicates_are_dropped_and_counted():
    table = small()
    copy = table[table['run'] == 'D32-s0'].assign(run='again')
    cleaned, notes, copies = logs.clean(pd.concat([table, copy], ignore_index=True))
    assert copies == 1 and 'again' not in set(cleaned['run']) and 'twice with the same losses' in ' '.join(notes)
    almost = copy.assign(test_loss=copy['test_loss'] * (1 + 1e-6))
    cleaned, notes, copies = logs.clean(pd.concat([table, almost], ignore_index=True))
    assert copies == 0 and 'configuration and seed of another run' in ' '.join(notes)


def test_runs_cut_short_diverged_or_unfinished_are_left_out_by_name():
    table = small()
    end = table['tokens'].where(table['run'] == 'D32-s0').max()
    short = table[(table['run'] != 'D32-s0') | (table['tokens'] < 0.9 * end)]
    nan = table.assign(test_loss=table['test_loss'].where((table['run'] != 'D32-s0') | (table['tokens'] < 0.9 * end)))
    up = table.assign(test_loss=table['test_loss'].where(
        (table['run'] != 'D32-s0') | (table['tokens'] < 0.9 * end), 50.0))
    crashed = table.assign(state=table['state'].where(table['run'] != 'D32-s0', 'diverged'))
    for broken in (short, nan, up, crashed):
        cleaned, notes, _ = logs.clean(broken)
        assert 'D32-s0' not in set(cleaned['run']) and cleaned['run'].nunique() == 3 and 'D32-s0' in ' '.join(notes)


def test_of_two_evaluations_at_one_step_the_last_is_kept():
    table = small()
    again = table.iloc[[5]].assign(test_loss=0.5 * table['test_loss'][5])
    cleaned, notes, _ = logs.clean(pd.concat([table, again], ignore_index=True))
    assert len(cleaned) == len(table) and 'logged twice' in notes[0]
    assert cleaned['test_loss'].iloc[5] == again['test_loss'].iloc[0]


def test_nan_rows_inside_a_run_are_left_out_and_counted():
    table = small()
    table.loc[[5, 6], 'test_loss'] = [np.nan, np.inf]
    cleaned, notes, _ = logs.clean(table)
    assert len(cleaned) == len(table) - 2 and '2 evaluations without a finite positive loss' in ' '.join(notes)


def test_nothing_left_is_an_error():
    with pytest.raises(logs.LogError, match='no finished run.*4 running runs'):
        logs.clean(small(state='running'))
    with pytest.raises(logs.LogError, match='no run with D=7; the log has D 32'):
        logs.where(small(), 'D=7')
    with pytest.raises(logs.LogError, match='needs Buvar'):
        logs.require(small(), ['Buvar'], 'a test')
    with pytest.raises(logs.LogError, match="'D:32'"):
        logs.where(small(), 'D:32')


def test_several_models_in_one_run_are_refused(tmp_path):
    """Without a column that tells the runs apart, a file's rows would be one run of one size."""
    rows = pd.DataFrame({'p': [1e6, 1e6, 2e6, 2e6], 'tokens': [1e6, 2e6, 1e6, 2e6], 'loss': [4.0, 3.0, 3.5, 2.5]})
    for name, columns in (('one', rows.assign(run='a')), ('none', rows), ('apart', rows.assign(run=list('aabb'))),
                          ('mapped', rows.rename(columns={'p': 'size'}))):
        columns.to_csv(tmp_path / f'{name}.csv', index=False)
    for name in ('one', 'none'):
        with pytest.raises(logs.LogError, match=r'has 2 values of p \(1e\+06, 2e\+06, …\)'):
            logs.load(tmp_path / f'{name}.csv')
    with pytest.raises(logs.LogError, match='has 2 values of p'):
        logs.tidy(mapping.read_curves(tmp_path / 'mapped.csv', mapping.parse(['p=size'])))
    assert logs.load(tmp_path / 'apart.csv')['run'].nunique() == 2
