"""A run's folder, what stands in it after each way a run can end, and its mirror in W&B."""
import json
import math
import shutil
import time

import numpy as np
import pytest
import yaml

from trainer import config, run_folder


@pytest.fixture
def run_in(small_mlp, tmp_path):
    """run_in(*overrides) -> a small run recorded in tmp_path/run."""
    return lambda *overrides: small_mlp(f'run_dir={tmp_path}/run', *overrides)


def rows(folder):
    def refuse(name):
        raise ValueError(f'{name} in a log')

    return [json.loads(line, parse_constant=refuse) for line in (folder / 'history.jsonl').read_text().splitlines()]


def test_rows_are_on_disk_as_they_happen_and_missing_is_absent(run_in, tmp_path):
    one = run_folder.RunFolder(run_in(), 0)
    one.log({'step': 0, 'test_loss': 0.5, 'Buvar': math.nan})
    one.log({'step': 1, 'test_loss': 0.25, 'Buvar': math.inf, 'lr': 1e-9})
    assert rows(tmp_path / 'run') == [{'step': 0, 'test_loss': 0.5}, {'step': 1, 'test_loss': 0.25, 'lr': 1e-9}]  # before close
    assert run_folder.read_summary(tmp_path / 'run')['state'] == 'running'
    one.close('finished', steps=1)
    assert not list((tmp_path / 'run').glob('*.part'))


def test_config_yaml_holds_what_ran(run_in, tmp_path):
    run = run_in('model.D=32')
    run_folder.RunFolder(run, 0).close('finished')
    values = yaml.safe_load((tmp_path / 'run' / 'config.yaml').read_text())
    assert values['model']['D'] == 32 and values['T'] == 640 and values['seed'] == 0
    d = values['derived']
    assert (d['num_params'], d['steps'], d['name']) == (8 * 32 + 2 * 32**2 + 32, 20, run.name(0))
    assert set(values['environment']['versions']) >= {'jax', 'flax', 'optax', 'numpy'}
    assert values['environment']['device'] and values['environment']['python']


@pytest.mark.parametrize('state', ['finished', 'diverged', 'interrupted'])
def test_summary_says_how_it_ended(run_in, tmp_path, state):
    run = run_in()
    returned = run_folder.RunFolder(run, 0).close(state, steps=3, wall_seconds=1.5)
    summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
    assert summary == returned == run_folder.read_summary(tmp_path / 'run')
    assert (summary['state'], summary['seed'], summary['steps'], summary['wall_seconds']) == (state, 0, 3, 1.5)
    assert run_folder.ended(run, 0) == (None if state == 'interrupted' else summary)


def test_seconds_are_summed_over_sessions(run_in, tmp_path):
    run_folder.RunFolder(run_in(), 0).close('interrupted', wall_seconds=3.0, steps=4)
    killed = run_folder.RunFolder(run_in(), 0)
    assert run_folder.read_summary(tmp_path / 'run')['state'] == 'running' and run_folder.ended(run_in(), 0) is None
    killed.save(7, {'loss': np.float32(0.5)}, wall_seconds=2.0, steps=7)
    killed.checkpoints.close()
    summary = run_folder.RunFolder(run_in(), 0).close('finished', wall_seconds=1.0, steps=9)
    assert (summary['wall_seconds'], summary['steps'], summary['state']) == (6.0, 9, 'finished')


@pytest.mark.parametrize('first', [True, False])
def test_only_the_process_that_says_so_removes_the_checkpoints_of_what_has_ended(run_in, tmp_path, monkeypatch, first):
    monkeypatch.setattr('distributed.is_main_process', lambda: first)
    one = run_folder.RunFolder(run_in(), 0)
    one.save(7, {'loss': np.float32(0.5)})
    one.close('finished')
    assert (tmp_path / 'run' / 'checkpoints' / '7').exists() != first


def test_another_configuration_in_the_folder_is_refused_by_its_keys(run_in):
    run = run_in()
    assert run_folder.ended(run, 0) is None
    run_folder.RunFolder(run, 0).close('finished')
    assert run_folder.ended(run, 0)
    assert run_folder.ended(run_in('wandb_tag=elsewhere', 'wandb_project=p'), 0)  # where it is recorded is not what it computes
    with pytest.raises(run_folder.RunFolderError, match=r'opt\.b1=0\.9 there, 0\.8 asked.*set run_dir') as refused:
        run_folder.ended(run_in('opt.b1=0.8'), 0)
    assert '\n' not in str(refused.value) and 'model.D' not in str(refused.value)


def test_folders(small_mlp, tmp_path):
    alone, fused = small_mlp('wandb_tag=tag'), small_mlp('seeds=[0,1]', 'wandb_tag=tag')
    assert alone.folder(0) == fused.folder(0)
    assert alone.folder(0).parts[:2] == ('runs', 'tag') and fused.folder(1) != fused.folder(0)
    chosen = small_mlp('seeds=[0,1]', f'run_dir={tmp_path}')
    assert {chosen.folder(s) for s in (0, 1)} == {tmp_path / 'seed0', tmp_path / 'seed1'}


# W&B

class FakeWandb:
    """Takes the place of wandb.init and of the run it gives."""

    def __init__(self):
        self.rows, self.summary, self.ended, self.metrics = [], {}, None, []

    def __call__(self, **settings):
        self.settings = settings
        return self

    def define_metric(self, *args, **kwargs):
        self.metrics.append((args, kwargs))

    def log(self, row, step):
        assert step == len(self.rows)
        self.rows.append(row)

    def finish(self, exit_code):
        self.ended = exit_code


@pytest.mark.parametrize('state, exit_code', [('finished', 0), ('diverged', 1), ('interrupted', 1)])
def test_wandb_mirrors_the_record(run_in, tmp_path, monkeypatch, state, exit_code):
    fake = FakeWandb()
    monkeypatch.setattr('wandb.init', fake)
    run = run_in('wandb_mode=online', 'wandb_project=p', 'wandb_tag=t', 'opt.B=64', 'opt.schedule=linear', 'seeds=[0,5]')
    one = run_folder.RunFolder(run, 5)
    one.log({'step': 0, 'test_loss': 0.5, 'Buvar': math.nan})
    summary = one.close(state)
    assert (fake.settings['project'], fake.settings['tags'], fake.settings['mode']) == ('p', ['t'], 'online')
    assert fake.settings['name'] == run.name(5)
    assert fake.rows == rows(tmp_path / 'run' / 'seed5') and fake.ended == exit_code
    origin = {key: fake.summary.pop(key) for key in ('revision', 'device')}
    assert origin['device'] == 'cpu' and {**fake.summary, 'wandb': 'complete'} == summary
    assert fake.metrics == [(('*',), {'step_metric': 'step'})]

    logged = fake.settings['config']
    assert not any(isinstance(v, dict) for v in logged.values())
    want = {'opt.B': 64, 'B': 64, 'model.D': 16, 'D': 16, 'model.N': 1, 'N': 1, 'L': 1, 'V': 8, 'lr': 0.003, 'opt.lr': 0.003,
            'schedule': 'linear', 'decay_frac': 1, 'num_params': 8 * 16 + 2 * 16**2 + 16, 'seed': 5, 'T': 640, 'wandb_tag': 't'}
    assert {k: logged.get(k) for k in want} == want
    flat = config.flatten(config.settings(run, 5))
    for short in set(logged) - set(flat):  # a short name stands for one key alone
        assert [k for k in flat if k.split('.')[-1] == short] == [config.SHORT_NAMES[short]]


def test_what_wandb_did_not_get_it_gets_from_the_same_command(run_in, monkeypatch, capsys):
    """It was gone at the end, or was not asked for; a third time there is nothing left to give."""
    def gone(exit_code):
        raise TimeoutError('no answer')

    monkeypatch.setattr('wandb_logger.log_in', lambda run: None)
    for mode in ('online', 'offline'):
        run = run_in(f'wandb_mode={mode}', f'seed={len(mode)}')
        first, again, third = FakeWandb(), FakeWandb(), FakeWandb()
        monkeypatch.setattr('wandb.init', first)
        if mode == 'online':
            first.finish = gone
        one = run_folder.RunFolder(run, run.seed)
        one.log({'step': 0, 'test_loss': 0.5})
        assert one.close('finished')['wandb'] == 'incomplete'
        run = run_in('wandb_mode=online', f'seed={len(mode)}')
        for fake, rows_given in ((again, 1), (third, 0)):
            monkeypatch.setattr('wandb.init', fake)
            summary = run_folder.send_to_wandb_again(run, run_folder.ended(run, run.seed))
            assert summary['wandb'] == 'complete' and len(fake.rows) == rows_given
        shutil.rmtree(summary['folder'])
    assert 'W&B did not take all of it (no answer)' in capsys.readouterr().err


def test_wandb_offline_needs_no_account_and_writes_into_the_run(run_in, tmp_path, monkeypatch):
    for name in ('WANDB_API_KEY', 'WANDB_MODE', 'WANDB_DIR'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('NETRC', str(tmp_path / 'no_netrc'))
    monkeypatch.chdir(tmp_path)
    run = run_in('wandb_mode=offline')
    one = run_folder.RunFolder(run, 0)
    one.log({'step': 0, 'test_loss': 0.123456})
    one.close('finished')
    (offline,) = (tmp_path / 'run' / 'wandb').glob('offline-run-*')
    (log,) = offline.glob('*.wandb')
    wanted = (b'opt.B', b'num_params', run.name(0).encode(), b'0.123456')
    deadline = time.monotonic() + 30  # W&B's own process writes the file, a moment after finish
    while not all(text in log.read_bytes() for text in wanted) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [text for text in wanted if text not in log.read_bytes()] == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ['run']  # nothing beside it


def test_wandb_disabled_is_never_imported(run_in, monkeypatch):
    monkeypatch.setattr('wandb.init', lambda **settings: pytest.fail('wandb.init was called'))
    run_folder.RunFolder(run_in('wandb_mode=disabled'), 0).close('finished')
