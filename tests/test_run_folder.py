"""The folder of a run: what it holds while the run trains and after each way that a run can end."""
import json
import math

import numpy as np
import pytest
import yaml

from trainer import distributed, run_folder


@pytest.fixture
def run_in(small_mlp, tmp_path):
    """run_in(*overrides) -> a small run with the folder tmp_path/run."""
    return lambda *overrides: small_mlp(f'run_dir={tmp_path}/run', *overrides)


def rows(folder):
    """The rows of history.jsonl. Raises ValueError for a value that is not finite."""
    def refuse(name):
        raise ValueError(f'{name} in history.jsonl')

    return [json.loads(line, parse_constant=refuse) for line in (folder / 'history.jsonl').read_text().splitlines()]


def test_each_row_is_written_at_once_without_values_that_are_not_finite(run_in, tmp_path):
    record = run_folder.RunFolder(run_in(), 0)
    record.log({'step': 0, 'test_loss': 0.5, 'Buvar': math.nan})
    record.log({'step': 1, 'test_loss': 0.25, 'Buvar': math.inf, 'lr': 1e-9})
    assert rows(tmp_path / 'run') == [{'step': 0, 'test_loss': 0.5}, {'step': 1, 'test_loss': 0.25, 'lr': 1e-9}]  # before close
    assert run_folder.read_summary(tmp_path / 'run')['state'] == 'running'
    record.close('finished', steps=1)
    assert not list((tmp_path / 'run').glob('*.part'))


def test_config_yaml_holds_the_resolved_configuration(run_in, tmp_path):
    run = run_in('model.D=32')
    run_folder.RunFolder(run, 0).close('finished')
    values = yaml.safe_load((tmp_path / 'run' / 'config.yaml').read_text())
    assert values['model']['D'] == 32 and values['T'] == 640 and values['seed'] == 0
    derived = values['derived']
    assert (derived['num_params'], derived['steps'], derived['name']) == (8 * 32 + 2 * 32**2 + 32, 20, run.name(0))
    assert set(values['environment']['versions']) >= {'jax', 'flax', 'optax', 'numpy'}
    assert values['environment']['device'] and values['environment']['python']


@pytest.mark.parametrize('state', ['finished', 'diverged', 'interrupted'])
def test_summary_says_how_the_run_ended(run_in, tmp_path, state):
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


@pytest.mark.parametrize('is_main', [True, False])
def test_only_the_main_process_removes_the_checkpoints_of_a_finished_run(run_in, tmp_path, monkeypatch, is_main):
    monkeypatch.setattr(distributed, 'is_main_process', lambda: is_main)
    record = run_folder.RunFolder(run_in(), 0)
    record.save(7, {'loss': np.float32(0.5)})
    record.close('finished')
    assert (tmp_path / 'run' / 'checkpoints' / '7').exists() != is_main


def test_folder_of_another_configuration_is_refused_with_the_keys_that_differ(run_in):
    run = run_in()
    assert run_folder.ended(run, 0) is None
    run_folder.RunFolder(run, 0).close('finished')
    assert run_folder.ended(run, 0)
    assert run_folder.ended(run_in('wandb_tag=elsewhere', 'wandb_project=p'), 0)  # keys that do not change what is computed
    with pytest.raises(run_folder.RunFolderError, match=r'opt\.b1=0\.9 there, 0\.8 here.*set run_dir') as refused:
        run_folder.ended(run_in('opt.b1=0.8'), 0)
    assert '\n' not in str(refused.value) and 'model.D' not in str(refused.value)


def test_seeds_of_a_group_have_folders_of_their_own(small_mlp, tmp_path):
    alone, group = small_mlp('wandb_tag=tag'), small_mlp('seeds=[0,1]', 'wandb_tag=tag')
    assert alone.folder(0) == group.folder(0)
    assert alone.folder(0).parts[:2] == ('runs', 'tag') and group.folder(1) != group.folder(0)
    chosen = small_mlp('seeds=[0,1]', f'run_dir={tmp_path}')
    assert {chosen.folder(seed) for seed in (0, 1)} == {tmp_path / 'seed0', tmp_path / 'seed1'}
