"""Faults of long trainings: damaged files, full disks, locks, NaN, bugs. Each gives one clear line; the record stays correct."""
import json
import os
import re
import resource
import shutil
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import model as models
import optimizer
import train
from trainer import checkpoint, process, run_folder

# When Orbax meets a damaged file or a full disk, it abandons its other reads and writes, and Python warns of each.
pytestmark = pytest.mark.filterwarnings('ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning')

OVERRIDES = ('opt.B=64', 'T=3840', 'num_evals=8', 'T_eval=128')  # 60 steps


@pytest.fixture(scope='module', autouse=True)
def step_by_step():
    """Dispatches single steps, so that a signal stops the run at the step that a test names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, 'DISPATCH_SECONDS', 0.0)
        yield


@pytest.fixture(scope='module')
def straight(small_mlp, tmp_path_factory):
    """history.jsonl of a run without interruption."""
    folder = tmp_path_factory.mktemp('straight')
    train.train(small_mlp(*OVERRIDES, f'run_dir={folder}'))
    return (folder / 'history.jsonl').read_text()


@pytest.fixture(scope='module')
def stopped_once(small_mlp, tmp_path_factory, stop_at):
    folder = tmp_path_factory.mktemp('stopped')
    for step in (20, 40):
        with pytest.raises(process.Interrupted):
            train.train(small_mlp(*OVERRIDES, f'run_dir={folder}'), stop_at(step))
    return folder


@pytest.fixture
def stopped(small_mlp, stopped_once, tmp_path):
    """(run, its folder): interrupted at step 40, with checkpoints at steps 20 and 40."""
    folder = shutil.copytree(stopped_once, tmp_path / 'run')
    assert checkpoint.steps([folder]) == [40, 20]
    return small_mlp(*OVERRIDES, f'run_dir={folder}'), folder


def resume(run):
    """Trains the run to its end and returns the step that it resumed from."""
    counts = []
    train.train(run, lambda steps, metrics: counts.append(steps))
    return counts[0]


def values_file(folder):
    """The file of a checkpoint that holds the values: the largest."""
    return max(folder.rglob('d/*'), key=lambda path: path.stat().st_size)


def flip_bits(path):
    """Flips a bit in one of every hundred bytes, some of which hold values."""
    content = bytearray(path.read_bytes())
    for i in range(0, len(content), 100):
        content[i] ^= 1
    path.write_bytes(content)


def warnings(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith('warning: ')]


def test_resuming_is_announced(stopped, straight, capsys):
    run, folder = stopped
    assert resume(run) == 40 and (folder / 'history.jsonl').read_text() == straight
    assert re.search(r'^resuming from step 40 of 60 \(checkpoint \d+ minutes old\)$', capsys.readouterr().err, re.MULTILINE)


@pytest.mark.parametrize('damage', [flip_bits, lambda path: os.truncate(path, 100), Path.unlink])
def test_damaged_checkpoint_is_replaced_by_the_one_before(stopped, straight, damage, capsys):
    run, folder = stopped
    damage(values_file(folder / 'checkpoints' / '40'))
    assert resume(run) == 20
    assert (folder / 'history.jsonl').read_text() == straight
    (warning,) = warnings(capsys)
    assert f'{folder}/checkpoints/40 is damaged' in warning


def test_flipped_bit_in_the_name_of_a_field_is_damage(stopped, straight):
    run, folder = stopped
    (metadata,) = (folder / 'checkpoints' / '40').rglob('_METADATA')
    metadata.write_text(metadata.read_text().replace('"key_metadata"', '"kez_metadata"', 1))
    assert resume(run) == 20
    assert (folder / 'history.jsonl').read_text() == straight


def test_run_without_an_undamaged_checkpoint_starts_over(stopped, straight):
    run, folder = stopped
    for step in ('20', '40'):
        flip_bits(values_file(folder / 'checkpoints' / step))
    assert resume(run) == 0
    assert (folder / 'history.jsonl').read_text() == straight


def test_lost_rows_of_the_history_are_computed_again(stopped, straight, capsys):
    """history.jsonl is cut inside a line after step 20. The checkpoint at step 40 needs the rows up to 40."""
    run, folder = stopped
    lines = (folder / 'history.jsonl').read_text().splitlines(keepends=True)
    steps = [json.loads(line)['step'] for line in lines]
    kept = sum(step <= 20 for step in steps)
    (folder / 'history.jsonl').write_text(''.join(lines[:kept]) + lines[kept][:30])
    assert kept < len(lines) and resume(run) == 20
    assert (folder / 'history.jsonl').read_text() == straight
    assert 'lines of history.jsonl are lost' in warnings(capsys)[0]


@contextmanager
def file_size_limit(size):
    """The kernel refuses to write files beyond `size` bytes, as a full disk would."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_training_continues_when_no_checkpoint_can_be_saved(stopped, small_mlp, straight, capsys, monkeypatch):
    """Files over 5 kB are refused. The file with the values has 12 kB."""
    run, folder = stopped
    monkeypatch.setattr(run_folder, 'ENDED', ())  # keeps what is left at the end
    calls = []
    with ExitStack() as stack:
        def limit_files(steps, metrics):
            calls.append(steps)
            if len(calls) == 2:  # after the compiled programs are in the cache
                stack.enter_context(file_size_limit(5_000))

        (summary,) = train.train(small_mlp(*OVERRIDES, f'run_dir={folder}', 'checkpoint_minutes=1e-9'), limit_files)
    assert summary['state'] == 'finished' and (folder / 'history.jsonl').read_text() == straight
    assert checkpoint.steps([folder]) == [40, 20] and not list(folder.glob('checkpoints/*tmp*'))  # older ones kept, no partial one
    given = warnings(capsys)
    assert len(given) > 3 and all('no checkpoint could be saved' in line for line in given)


def test_group_keeps_its_last_shared_checkpoint_when_one_seed_cannot_save(small_mlp, tmp_path, monkeypatch, stop_at):
    """Two checkpoints of each seed are kept. Those of seed 0 alone must not replace the last one that both seeds have."""
    run = small_mlp(*OVERRIDES, 'seeds=[0,1]', f'run_dir={tmp_path}', 'checkpoint_minutes=1e-9')
    save = checkpoint.Checkpoints.save

    def no_room_for_seed_1(self, step, state):
        if step > 20 and 'seed1' in str(self.folder):
            return self._warn('the disk has no room')
        save(self, step, state)

    monkeypatch.setattr(checkpoint.Checkpoints, 'save', no_room_for_seed_1)
    with pytest.raises(process.Interrupted):
        train.train(run, stop_at(40))
    assert checkpoint.steps([tmp_path / 'seed0'])[0] == 40  # the control: seed 0 had room
    monkeypatch.undo()
    assert resume(run) == 20


def test_rows_refused_by_a_full_disk_are_written_with_a_later_row(small_mlp, tmp_path, capsys):
    record = run_folder.RunFolder(small_mlp(f'run_dir={tmp_path}/run'), 0)
    record.log({'step': 0})
    with file_size_limit(20):
        record.log({'step': 1})
        record.log({'step': 2})
    record.log({'step': 3})
    record.close('finished')
    assert [row['step'] for row in run_folder.read_history(tmp_path / 'run')] == [0, 1, 2, 3]
    assert 'history.jsonl cannot be written' in warnings(capsys)[0]


def test_damaged_summary_is_an_error_that_says_what_to_do(stopped, straight):
    run, folder = stopped
    (folder / 'summary.json').write_text('')
    with pytest.raises(run_folder.RunFolderError, match='summary.json is damaged .* delete it') as refused:
        train.train(run)
    assert '\n' not in str(refused.value)
    (folder / 'summary.json').unlink()
    assert resume(run) == 40 and (folder / 'history.jsonl').read_text() == straight


def test_locked_folder_is_refused_until_its_process_ends(small_mlp, tmp_path, lock_holder):
    run = small_mlp(f'run_dir={tmp_path}')
    with lock_holder(tmp_path):
        with pytest.raises(run_folder.RunFolderError, match='is being trained by another process') as refused:
            train.train(run)
        assert '\n' not in str(refused.value) and [p.name for p in tmp_path.iterdir()] == ['lock']
    with run_folder.locked([tmp_path]):  # its process was killed
        with pytest.raises(run_folder.RunFolderError), run_folder.locked([tmp_path]):  # nor can one process lock it twice
            pass


def test_run_does_not_resume_on_changed_data(small_transformer, write_tokens, tmp_path):
    tokens = write_tokens()
    run = small_transformer(tokens, f'run_dir={tmp_path}/run')
    run_folder.RunFolder(run, 0).close('interrupted')
    assert run_folder.ended(run, 0) is None
    content = (tokens / 'train.bin').read_bytes()
    (tokens / 'train.bin').write_bytes(content[:-1] + b'\1')  # of the same size
    with pytest.raises(run_folder.RunFolderError, match='was trained on other data: train.bin of .* changed since') as refused:
        train.train(run)
    assert '\n' not in str(refused.value)
    (tokens / 'train.bin').write_bytes(content)
    assert run_folder.ended(run, 0) is None
    run_folder.RunFolder(run, 0).close('finished')
    (tokens / 'train.bin').unlink()
    assert run_folder.ended(run, 0)['state'] == 'finished'  # a finished run needs no data


def test_system_clock_that_goes_backwards_changes_nothing(small_mlp, straight, tmp_path, monkeypatch):
    now = iter(np.linspace(2e9, 0, 1_000_000))
    monkeypatch.setattr(time, 'time', lambda: float(next(now)))
    (summary,) = train.train(small_mlp(*OVERRIDES, f'run_dir={tmp_path}/run', 'checkpoint_minutes=0.005'))
    assert (tmp_path / 'run' / 'history.jsonl').read_text() == straight and 0 < summary['wall_seconds'] < 600


def test_exception_closes_the_record_as_failed(small_mlp, tmp_path):
    run = small_mlp(*OVERRIDES, f'run_dir={tmp_path}')

    def on_steps(steps, metrics):
        if steps:
            raise ZeroDivisionError('a bug')

    with pytest.raises(ZeroDivisionError):
        train.train(run, on_steps)
    summary = run_folder.read_summary(tmp_path)
    assert summary['state'] == 'failed' and summary['error'] == 'ZeroDivisionError: a bug'
    assert run_folder.ended(run, 0) is None  # it can be trained again


def test_nan_ends_its_seed_alone(small_mlp, tmp_path, monkeypatch, stop_at):
    """Seed 1 of two gets a NaN in the update of step 25. The group was interrupted at step 20 and resumed."""
    words = (*OVERRIDES, 'seeds=[0,1]', 'opt.embed_lr_mult=0', 'opt.schedule=linear')
    train.train(small_mlp(*words, f'run_dir={tmp_path}/whole'))
    run = small_mlp(*words, f'run_dir={tmp_path}/run')
    mark = models.init('mlp', run.model, jax.random.key(1))['embed'][0, 0]  # constant at learning rate 0; it tells the seeds apart
    lr_scale_25 = np.float32(1 - 25 / 60)  # of the linear schedule at step 25
    apply_updates = optimizer.apply_updates

    def with_nan(params, updates, peak_lrs, lr_scale):
        bad = (abs(params['embed'][0, 0] - mark) < 1e-5) & (abs(lr_scale - lr_scale_25) < 1e-4)
        return jax.tree.map(lambda w: jnp.where(bad, np.nan, w), apply_updates(params, updates, peak_lrs, lr_scale))

    monkeypatch.setattr(optimizer, 'apply_updates', with_nan)
    with pytest.raises(process.Interrupted):
        train.train(run, stop_at(20))
    assert resume(run) == 20
    kept, lost = (run_folder.read_summary(tmp_path / 'run' / f'seed{seed}') for seed in (0, 1))
    assert kept['state'] == 'finished' and lost['state'] == 'diverged' and lost['steps'] in (26, 27)
    last = run_folder.read_history(tmp_path / 'run' / 'seed1')[-1]
    assert 0 < last['step'] <= 25 and np.isfinite(last['test_loss'])  # its finite evaluations are kept
    resumed, whole = (run_folder.read_history(tmp_path / name / 'seed0') for name in ('run', 'whole'))
    for a, b in zip(resumed, whole, strict=True):
        assert a == pytest.approx(b, rel=1e-4)  # the patched program is compiled anew: float32 sums in another order


def test_diverged_seed_is_not_trained_with_its_group_again(small_mlp, tmp_path):
    run = small_mlp(*OVERRIDES, 'seeds=[0,1]', f'run_dir={tmp_path}')
    run_folder.RunFolder(run, 0).close('diverged', steps=3)
    assert resume(run) == 0
    assert [run_folder.read_summary(tmp_path / seed)['state'] for seed in ('seed0', 'seed1')] == ['diverged', 'finished']


def test_analysis_leaves_out_diverged_runs_and_names_them(small_mlp, tmp_path):
    from analysis import table

    for seed, state in ((0, 'finished'), (1, 'diverged')):
        record = run_folder.RunFolder(small_mlp(*OVERRIDES, f'seed={seed}', f'run_dir={tmp_path}/seed{seed}'), seed)
        for step in range(0, 61, 10):
            record.log({'step': step, 'tokens': 64 * step, 'test_loss': 1 / (1 + step)})
        record.close(state)
    clean, notes, *_ = table.clean(table.load(tmp_path))
    assert set(clean['seed']) == {0} and any('1 diverged' in note and 'seed1' in note for note in notes)
