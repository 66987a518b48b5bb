"""A run that is interrupted and resumed gives the same record, bit for bit, as one without interruption."""
import pytest

import data
import train
from analysis import table
from trainer import process, run_folder

OVERRIDES = ('opt.B=64', 'T=3840', 'num_evals=8', 'T_eval=128', 'seeds=[0,1]')


@pytest.fixture(scope='module')
def straight(small_mlp, tmp_path_factory):
    """The folder of a run of 60 steps without interruption."""
    folder = tmp_path_factory.mktemp('straight')
    run = small_mlp(*OVERRIDES, f'run_dir={folder}')
    assert run.derived.steps == 60
    train.train(run)
    return folder


@pytest.mark.parametrize('stop', [1, 17, 60])  # 60: after the last update, before the last evaluation
def test_interrupted_run_resumes_bit_for_bit(small_mlp, straight, tmp_path, stop_at, stop):
    run = small_mlp(*OVERRIDES, f'run_dir={tmp_path}')
    with pytest.raises(process.Interrupted):
        train.train(run, stop_at(stop))
    assert run_folder.read_summary(tmp_path / 'seed1')['state'] == 'interrupted'
    before = (tmp_path / 'seed1' / 'history.jsonl').read_text()
    whole = (straight / 'seed1' / 'history.jsonl').read_text()
    assert before != whole and whole.startswith(before)  # the control: rows are missing

    train.train(run)
    for seed in ('seed0', 'seed1'):
        assert (tmp_path / seed / 'history.jsonl').read_text() == (straight / seed / 'history.jsonl').read_text()
    assert not (tmp_path / 'seed1' / 'checkpoints').exists()


def test_run_on_a_generated_language_resumes_bit_for_bit_and_records_its_entropy(resolve, tmp_path, stop_at):
    small = ('bigram', 'model.V=32', 'model.D=16', 'model.L=8', 'opt.B=16', 'T=3840', 'num_evals=6', 'T_eval=1024',
             'wandb_mode=disabled')
    for stops in ((), (13,)):
        run = resolve(*small, f'run_dir={tmp_path / str(len(stops))}')
        if stops:
            with pytest.raises(process.Interrupted):
                train.train(run, stop_at(*stops))
        train.train(run)
    straight, resumed = (run_folder.read_history(tmp_path / name) for name in '01')
    assert len(straight) > 5 and resumed == straight
    assert table.load(tmp_path / '1')['entropy'].unique() == pytest.approx([data.open_task(run, [0]).entropy])


def test_run_that_starts_over_deletes_its_later_checkpoints(small_mlp, straight, tmp_path, stop_at):
    """Seeds 0 and 1 stop at step 40. With a third seed they start over and stop at step 10. Resumed, they miss no evaluation."""
    with pytest.raises(process.Interrupted):
        train.train(small_mlp(*OVERRIDES, f'run_dir={tmp_path}'), stop_at(40))
    with pytest.raises(process.Interrupted):  # no checkpoint is shared by all three
        train.train(small_mlp(*OVERRIDES, 'seeds=[0,1,2]', f'run_dir={tmp_path}'), stop_at(10))
    train.train(small_mlp(*OVERRIDES, f'run_dir={tmp_path}'))
    for seed in ('seed0', 'seed1'):
        steps = [[row['step'] for row in run_folder.read_history(folder / seed)] for folder in (tmp_path, straight)]
        assert steps[0] == steps[1]


def test_line_cut_off_by_a_kill_is_dropped(tmp_path):
    (tmp_path / 'history.jsonl').write_text('{"step": 0}\n{"step": 1}\n{"ste')
    assert [row['step'] for row in run_folder.read_history(tmp_path)] == [0, 1]
