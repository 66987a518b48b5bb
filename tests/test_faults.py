"""Faults that days of training meet: each is one clear line, costs no more than it must, and leaves no record that lies."""
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import model as models
import optimizer
import train
from trainer import checkpoint, run_folder

OVERRIDES = ('opt.B=64', 'T=3840', 'num_evals=8', 'T_eval=128')  # 60 steps


def stop_at(*steps):
    """A progress callback that sends the process SIGTERM once so many steps are done."""
    done, steps = [0], list(steps)

    def on_steps(count, shown):
        done[0] += count
        if steps and done[0] >= steps[0]:
            del steps[0]
            signal.raise_signal(signal.SIGTERM)

    return on_steps


@pytest.fixture(scope='module', autouse=True)
def step_by_step():
    """The loop meets the device after every step, so that a signal stops it where the test says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, 'DISPATCH_SECONDS', 0.0)
        yield


@pytest.fixture(scope='module')
def straight(small_mlp, tmp_path_factory):
    """history.jsonl of a run that nothing befell."""
    folder = tmp_path_factory.mktemp('straight')
    train.train(small_mlp(*OVERRIDES, f'run_dir={folder}'))
    return (folder / 'history.jsonl').read_text()


@pytest.fixture(scope='module')
def stopped_once(small_mlp, tmp_path_factory):
    folder = tmp_path_factory.mktemp('stopped')
    for step in (20, 40):
        with pytest.raises(train.Interrupted):
            train.train(small_mlp(*OVERRIDES, f'run_dir={folder}'), stop_at(step))
    return folder


@pytest.fixture
def stopped(small_mlp, stopped_once, tmp_path):
    """A run with checkpoints at 20 and at 40 steps, and its folder."""
    folder = shutil.copytree(stopped_once, tmp_path / 'run')
    assert checkpoint.steps([folder]) == [40, 20]
    return small_mlp(*OVERRIDES, f'run_dir={folder}'), folder


def went_on_from(run):
    """Trains the run to its end; the step that it began at."""
    begun = []
    train.train(run, lambda steps, shown: begun.append(steps))
    return begun[0]


def largest_file(folder):
    """The one that holds the values."""
    return max(folder.rglob('d/*'), key=lambda path: path.stat().st_size)


def flip_bits(path):
    """One in every hundred bytes: some hold values."""
    whole = bytearray(path.read_bytes())
    for at in range(0, len(whole), 100):
        whole[at] ^= 1
    path.write_bytes(whole)


@pytest.mark.parametrize('harm', [flip_bits, lambda path: os.truncate(path, 100), Path.unlink])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(stopped, straight, harm, capsys):
    run, folder = stopped
    harm(largest_file(folder / 'checkpoints' / '40'))
    assert went_on_from(run) == 20
    assert (folder / 'history.jsonl').read_text() == straight
    warning = capsys.readouterr().err.strip()
    assert f'{folder}/checkpoints/40 is damaged' in warning and '\n' not in warning


def test_a_bit_in_the_name_of_a_field_is_damage_too(stopped, straight):
    run, folder = stopped
    (metadata,) = (folder / 'checkpoints' / '40').rglob('_METADATA')
    metadata.write_text(metadata.read_text().replace('"key_metadata"', '"kez_metadata"', 1))
    assert went_on_from(run) == 20
    assert (folder / 'history.jsonl').read_text() == straight


def test_no_good_checkpoint_starts_over(stopped, straight):
    run, folder = stopped
    for step in ('20', '40'):
        flip_bits(largest_file(folder / 'checkpoints' / step))
    assert went_on_from(run) == 0
    assert (folder / 'history.jsonl').read_text() == straight


def test_lost_lines_of_the_history_are_computed_again(stopped, straight, capsys):
    """The lines after step 20 are cut off in the middle of one; the checkpoint at 40 needs them all."""
    run, folder = stopped
    lines = (folder / 'history.jsonl').read_text().splitlines(keepends=True)
    steps = [json.loads(line)['step'] for line in lines]
    kept = sum(step <= 20 for step in steps)
    (folder / 'history.jsonl').write_text(''.join(lines[:kept]) + lines[kept][:30])
    assert kept < len(lines) and went_on_from(run) == 20
    assert (folder / 'history.jsonl').read_text() == straight and 'lines of history.jsonl are lost' in capsys.readouterr().err


def test_a_disk_that_takes_no_checkpoint_does_not_end_the_training(stopped, small_mlp, straight, capsys, monkeypatch):
    """The kernel refuses files over 5 kB, as a full disk would: those with the values, which come to 12 kB."""
    run, folder = stopped
    monkeypatch.setattr(checkpoint.Checkpoints, 'remove', lambda self: None)  # to see what is left at the end
    limit, calls = resource.getrlimit(resource.RLIMIT_FSIZE), []

    def fill(steps, shown):
        calls.append(steps)
        if len(calls) == 2:  # the compiler has kept its programs
            resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limit[1]))

    try:
        (summary,) = train.train(small_mlp(*OVERRIDES, f'run_dir={folder}', 'checkpoint_minutes=1e-9'), fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert summary['state'] == 'finished' and (folder / 'history.jsonl').read_text() == straight
    assert checkpoint.steps([folder]) == [40, 20] and not list(folder.glob('checkpoints/*tmp*'))  # nothing lost, nothing left
    warnings = capsys.readouterr().err.strip().splitlines()
    assert len(warnings) > 3 and all('no checkpoint could be saved' in line for line in warnings)


def test_a_seed_that_cannot_save_does_not_cost_the_group_its_checkpoint(small_mlp, tmp_path, monkeypatch):
    """Two are kept of each seed: those that seed 0 alone saves must not push out the last that both have."""
    run = small_mlp(*OVERRIDES, 'seeds=[0,1]', f'run_dir={tmp_path}', 'checkpoint_minutes=1e-9')
    save = checkpoint.Checkpoints.save

    def no_room_for_seed_1(self, step, state):
        if step > 20 and 'seed1' in str(self.folder):
            return self._failed('the disk has no room')
        save(self, step, state)

    monkeypatch.setattr(checkpoint.Checkpoints, 'save', no_room_for_seed_1)
    with pytest.raises(train.Interrupted):
        train.train(run, stop_at(40))
    assert checkpoint.steps([tmp_path / 'seed0'])[0] == 40  # the control: seed 0 had room
    monkeypatch.undo()
    assert went_on_from(run) == 20


def test_rows_that_a_full_disk_refused_come_with_the_next(small_mlp, tmp_path, capsys):
    one = run_folder.RunFolder(small_mlp(f'run_dir={tmp_path}/run'), 0)
    one.log({'step': 0})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, limit[1]))
        one.log({'step': 1})
        one.log({'step': 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    one.log({'step': 3})
    one.close('finished')
    assert [row['step'] for row in run_folder.read_history(tmp_path / 'run')] == [0, 1, 2, 3]
    assert 'history.jsonl cannot be written' in capsys.readouterr().err


def test_a_damaged_summary_is_one_line_that_says_what_to_do(stopped, straight):
    run, folder = stopped
    (folder / 'summary.json').write_text('')
    with pytest.raises(run_folder.RunFolderError, match='summary.json is damaged .* delete it') as refused:
        train.train(run)
    assert '\n' not in str(refused.value)
    (folder / 'summary.json').unlink()
    assert went_on_from(run) == 40 and (folder / 'history.jsonl').read_text() == straight


def test_a_second_process_gets_one_line_and_a_kill_releases_the_folder(small_mlp, tmp_path):
    run = small_mlp(f'run_dir={tmp_path}')
    program = 'import fcntl, sys, time; f = open(sys.argv[1], "a"); fcntl.flock(f, fcntl.LOCK_EX); '\
              'print("held", flush=True); time.sleep(60)'
    holder = subprocess.Popen([sys.executable, '-c', program, tmp_path / 'lock'], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == 'held\n'
        with pytest.raises(run_folder.RunFolderError, match='is being trained by another process') as refused:
            train.train(run)
        assert '\n' not in str(refused.value) and [p.name for p in tmp_path.iterdir()] == ['lock']
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with run_folder.locked([tmp_path]), pytest.raises(run_folder.RunFolderError), run_folder.locked([tmp_path]):  # ours now, and once only
        pass


def test_changed_data_are_noticed(small_transformer, write_tokens, tmp_path):
    tokens = write_tokens()
    run = small_transformer(tokens, f'run_dir={tmp_path}/run')
    run_folder.RunFolder(run, 0).close('interrupted')
    assert run_folder.ended(run, 0) is None
    whole = (tokens / 'train.bin').read_bytes()
    (tokens / 'train.bin').write_bytes(whole[:-1] + b'\1')  # of the same size
    with pytest.raises(run_folder.RunFolderError, match='was trained on other data: train.bin of .* changed since') as refused:
        train.train(run)
    assert '\n' not in str(refused.value)
    (tokens / 'train.bin').write_bytes(whole)
    assert run_folder.ended(run, 0) is None
    run_folder.RunFolder(run, 0).close('finished')
    (tokens / 'train.bin').unlink()
    assert run_folder.ended(run, 0)['state'] == 'finished'  # what has finished needs no data


def test_a_clock_that_goes_back_harms_nothing(small_mlp, straight, tmp_path, monkeypatch):
    now = iter(np.linspace(2e9, 0, 1_000_000))
    monkeypatch.setattr(time, 'time', lambda: float(next(now)))
    (summary,) = train.train(small_mlp(*OVERRIDES, f'run_dir={tmp_path}/run', 'checkpoint_minutes=0.005'))
    assert (tmp_path / 'run' / 'history.jsonl').read_text() == straight and 0 < summary['wall_seconds'] < 600


def test_an_exception_leaves_the_record_closed_as_failed(small_mlp, tmp_path):
    run = small_mlp(*OVERRIDES, f'run_dir={tmp_path}')

    def on_steps(steps, shown):
        if steps:
            raise ZeroDivisionError('a bug')

    with pytest.raises(ZeroDivisionError):
        train.train(run, on_steps)
    summary = run_folder.read_summary(tmp_path)
    assert summary['state'] == 'failed' and summary['error'] == 'ZeroDivisionError: a bug'
    assert run_folder.ended(run, 0) is None  # it is not over: the bug mended, it is trained


def test_nan_at_step_k_ends_that_seed_alone(small_mlp, tmp_path, monkeypatch):
    """Seed 1 of two gets a NaN with the update of step 25, in a group that a signal stopped at step 20."""
    words = (*OVERRIDES, 'seeds=[0,1]', 'opt.embed_lr_mult=0', 'opt.schedule=linear')
    train.train(small_mlp(*words, f'run_dir={tmp_path}/whole'))
    run = small_mlp(*words, f'run_dir={tmp_path}/run')
    mark = models.init('mlp', run.model, jax.random.key(1))['embed'][0, 0]  # at rate 0 it stays, and tells the seeds apart
    at = np.float32(1 - 25 / 60)  # the schedule's factor at step 25
    descend = optimizer.apply_updates

    def broken(params, updates, peak_lrs, s):
        bad = (abs(params['embed'][0, 0] - mark) < 1e-5) & (abs(s - at) < 1e-4)
        return jax.tree.map(lambda w: jnp.where(bad, np.nan, w), descend(params, updates, peak_lrs, s))

    monkeypatch.setattr(optimizer, 'descend', broken)
    with pytest.raises(train.Interrupted):
        train.train(run, stop_at(20))
    assert went_on_from(run) == 20
    kept, lost = (run_folder.read_summary(tmp_path / 'run' / f'seed{seed}') for seed in (0, 1))
    assert kept['state'] == 'finished' and lost['state'] == 'diverged' and lost['steps'] in (26, 27)
    last = run_folder.read_history(tmp_path / 'run' / 'seed1')[-1]
    assert 0 < last['step'] <= 25 and np.isfinite(last['test_loss'])  # its last finite evaluation is kept
    ours, whole = (run_folder.read_history(tmp_path / name / 'seed0') for name in ('run', 'whole'))
    for a, b in zip(ours, whole, strict=True):
        assert a == pytest.approx(b, rel=1e-4)  # the patched program is another one: float32 sums in another order


def test_a_diverged_seed_stays_out_of_a_group_that_goes_on(small_mlp, tmp_path):
    run = small_mlp(*OVERRIDES, 'seeds=[0,1]', f'run_dir={tmp_path}')
    run_folder.RunFolder(run, 0).close('diverged', steps=3)
    assert went_on_from(run) == 0
    assert {s: run_folder.read_summary(tmp_path / s)['state'] for s in ('seed0', 'seed1')} == {'seed0': 'diverged', 'seed1': 'finished'}


def test_the_analysis_names_what_diverged_and_leaves_it_out(small_mlp, tmp_path):
    """Through the folder that training leaves, the analysis's own reader and its notes."""
    from analysis import table

    for seed, end in ((0, 'finished'), (1, 'diverged')):
        one = run_folder.RunFolder(small_mlp(*OVERRIDES, f'seed={seed}', f'run_dir={tmp_path}/seed{seed}'), seed)
        for step in range(0, 61, 10):
            one.log({'step': step, 'tokens': 64 * step, 'test_loss': 1 / (1 + step)})
        one.close(end)
    clean, notes, *_ = table.clean(table.load(tmp_path))
    assert set(clean['seed']) == {0} and any('1 diverged' in note and 'seed1' in note for note in notes)
