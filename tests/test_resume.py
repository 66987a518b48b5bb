"""A run that is stopped goes on as if nothing had happened."""
import signal

import pytest

import train
from trainer import run_folder


class StopAt:
    """A progress callback that sends the process a signal once `step` steps are done."""

    def __init__(self, step):
        self.step, self.done = step, 0

    def __call__(self, steps, shown):
        self.done += steps
        if self.done >= self.step:
            self.step = float('inf')
            signal.raise_signal(signal.SIGTERM)


OVERRIDES = ('opt.B=64', 'T=3840', 'num_evals=8', 'T_eval=128', 'seeds=[0,1]')


@pytest.fixture(scope='module')
def straight(small_mlp, tmp_path_factory):
    """The folder of a run of 60 steps that nothing stopped."""
    folder = tmp_path_factory.mktemp('straight')
    run = small_mlp(*OVERRIDES, f'run_dir={folder}')
    assert run.derived.steps == 60
    train.train(run)
    return folder


@pytest.mark.parametrize('stop', [1, 17, 60])  # 60: after the last update, before the last evaluation
def test_a_stopped_run_goes_on_bit_for_bit(small_mlp, straight, tmp_path, stop):
    run = small_mlp(*OVERRIDES, f'run_dir={tmp_path}')
    with pytest.raises(train.Interrupted):
        train.train(run, StopAt(stop))
    assert run_folder.read_summary(tmp_path / 'seed1')['state'] == 'interrupted'
    before = (tmp_path / 'seed1' / 'history.jsonl').read_text()
    whole = (straight / 'seed1' / 'history.jsonl').read_text()
    assert before != whole and whole.startswith(before)  # the control: something was left to do

    train.train(run)
    for seed in ('seed0', 'seed1'):
        assert (tmp_path / seed / 'history.jsonl').read_text() == (straight / seed / 'history.jsonl').read_text()
    assert not (tmp_path / 'seed1' / 'checkpoints').exists()


def test_a_run_that_starts_over_forgets_its_later_checkpoints(small_mlp, straight, tmp_path):
    """Seeds 0 and 1 are stopped late, start over beside a third seed and are stopped early, and go on: no evaluation is missing."""
    with pytest.raises(train.Interrupted):
        train.train(small_mlp(*OVERRIDES, f'run_dir={tmp_path}'), StopAt(40))
    with pytest.raises(train.Interrupted):  # no checkpoint that all three have
        train.train(small_mlp(*OVERRIDES, 'seeds=[0,1,2]', f'run_dir={tmp_path}'), StopAt(10))
    train.train(small_mlp(*OVERRIDES, f'run_dir={tmp_path}'))
    for seed in ('seed0', 'seed1'):
        steps = [[row['step'] for row in run_folder.read_history(folder / seed)] for folder in (tmp_path, straight)]
        assert steps[0] == steps[1]


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path):
    (tmp_path / 'history.jsonl').write_text('{"step": 0}\n{"step": 1}\n{"ste')
    assert [row['step'] for row in run_folder.read_history(tmp_path)] == [0, 1]
