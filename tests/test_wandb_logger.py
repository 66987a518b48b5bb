"""The copy of a run in W&B: the same rows as on disk, and nothing that W&B does can stop or lose a training."""
import math
import os
import shutil
import signal
import threading
import time
from types import SimpleNamespace

import pytest

from trainer import config, process, run_folder, wandb_logger


@pytest.fixture
def run_in(small_mlp, tmp_path):
    """run_in(*overrides) -> a small run with the folder tmp_path/run, to be copied online."""
    return lambda *overrides: small_mlp(f'run_dir={tmp_path}/run', 'wandb_mode=online', *overrides)


class FakeWandb:
    """Replaces wandb.init and the run that it returns."""

    def __init__(self):
        self.rows, self.summary, self.exit_code, self.metrics = {}, {}, None, []

    def __call__(self, **settings):
        self.settings = settings
        return self

    def define_metric(self, *args, **kwargs):
        self.metrics.append((args, kwargs))

    def log(self, row, step):
        assert step not in self.rows
        self.rows[step] = row

    def finish(self, exit_code):
        self.exit_code = exit_code


@pytest.fixture
def fake(monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setattr('wandb.init', wandb)
    return wandb


@pytest.mark.parametrize('state, exit_code', [('finished', 0), ('diverged', 1), ('interrupted', 1)])
def test_wandb_gets_the_rows_the_configuration_and_the_summary(run_in, tmp_path, fake, state, exit_code):
    run = run_in('wandb_project=p', 'wandb_tag=t', 'opt.B=64', 'opt.schedule=linear', 'seeds=[0,5]')
    record = run_folder.RunFolder(run, 5)
    record.log({'step': 0, 'test_loss': 0.5, 'Buvar': math.nan})
    summary = record.close(state)
    assert (fake.settings['project'], fake.settings['tags'], fake.settings['mode']) == ('p', ['t'], 'online')
    assert fake.settings['name'] == run.name(5)
    assert list(fake.rows.values()) == run_folder.read_history(tmp_path / 'run' / 'seed5') == [{'step': 0, 'test_loss': 0.5}]
    assert fake.exit_code == exit_code
    origin = {key: fake.summary.pop(key) for key in ('revision', 'device')}
    assert origin['device'] == 'cpu' and {**fake.summary, 'wandb': 'complete'} == summary
    assert fake.metrics == [(('*',), {'step_metric': 'step'})]

    logged = fake.settings['config']
    assert not any(isinstance(v, dict) for v in logged.values())
    want = {'opt.B': 64, 'B': 64, 'model.D': 16, 'D': 16, 'model.N': 1, 'N': 1, 'L': 1, 'V': 8, 'lr': 0.003, 'opt.lr': 0.003,
            'schedule': 'linear', 'decay_frac': 1, 'num_params': 8 * 16 + 2 * 16**2 + 16, 'seed': 5, 'T': 640, 'wandb_tag': 't'}
    assert {k: logged.get(k) for k in want} == want
    flat = config.flatten(config.settings(run, 5))
    for short in set(logged) - set(flat):  # a short name is the last part of one key only
        assert [k for k in flat if k.split('.')[-1] == short] == [config.SHORT_NAMES[short]]


def test_failed_call_makes_the_copy_incomplete_and_later_rows_are_sent(run_in, fake, tmp_path, capsys):
    log = fake.log

    def refuse_row_1(row, step):
        if step == 1:
            raise RuntimeError('row refused')
        log(row, step)

    fake.log = refuse_row_1
    record = run_folder.RunFolder(run_in(), 0)
    for step in (0, 10, 20):
        record.log({'step': step})
    assert record.close('finished')['wandb'] == 'incomplete'
    assert run_folder.read_summary(tmp_path / 'run')['wandb'] == 'incomplete'
    assert fake.rows == {0: {'step': 0}, 2: {'step': 20}} and fake.exit_code == 0
    assert 'warning: W&B did not receive all of the run (row refused); repeat the command' in capsys.readouterr().err


def test_repeated_command_sends_what_wandb_lacks_and_then_nothing(run_in, monkeypatch, capsys):
    """The first copy is incomplete because the server failed at its end, or because it was offline."""
    def fail(exit_code):
        raise TimeoutError('no answer')

    for mode in ('online', 'offline'):
        first, second, third = FakeWandb(), FakeWandb(), FakeWandb()
        if mode == 'online':
            first.finish = fail
        monkeypatch.setattr('wandb.init', first)
        run = run_in(f'wandb_mode={mode}')
        record = run_folder.RunFolder(run, 0)
        record.log({'step': 0, 'test_loss': 0.5})
        assert record.close('finished')['wandb'] == 'incomplete'
        run = run_in('wandb_mode=online')
        for fake, rows in ((second, 1), (third, 0)):
            monkeypatch.setattr('wandb.init', fake)
            summary = run_folder.send_to_wandb_again(run, run_folder.ended(run, 0))
            assert summary['wandb'] == 'complete' and len(fake.rows) == rows
        shutil.rmtree(summary['folder'])
    assert 'W&B did not receive all of the run (no answer)' in capsys.readouterr().err


# A server that does not answer

@pytest.fixture
def silent_wandb(monkeypatch):
    """W&B's client waits for its server as long as the test runs. Yields the exit codes that the program would end with."""
    answer, exit_codes = threading.Event(), []
    monkeypatch.setattr('wandb.init', lambda **settings: answer.wait(60))
    monkeypatch.setattr(wandb_logger, 'atexit', SimpleNamespace(register=lambda function, code: exit_codes.append(code)))
    yield exit_codes
    answer.set()


def test_signal_ends_the_waiting_for_wandb(run_in, silent_wandb, capsys):
    with process.stop_signals() as stops:
        record = run_folder.RunFolder(run_in(), 0, stops=stops)
        record.log({'step': 0})
        after = 2.5  # seconds: the note comes after 2
        threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT)).start()
        begun = time.monotonic()
        summary = record.close('finished')
        assert after < time.monotonic() - begun < after + 2
    assert (summary['state'], summary['wandb']) == ('finished', 'incomplete')
    told = capsys.readouterr().err
    assert f'waiting up to {wandb_logger.TIMEOUT} s for W&B; the record in ' in told and 'warning: W&B does not answer' in told
    assert silent_wandb == [128 + signal.SIGINT]  # without waiting for the client as Python exits


def test_interrupted_run_waits_a_shorter_time_for_wandb(run_in, silent_wandb, monkeypatch):
    assert wandb_logger.TIMEOUT_INTERRUPTED < wandb_logger.TIMEOUT / 3
    monkeypatch.setattr(wandb_logger, 'TIMEOUT_INTERRUPTED', 0.5)
    record = run_folder.RunFolder(run_in(), 0, stops=[signal.SIGTERM])
    begun = time.monotonic()
    assert record.close('interrupted')['wandb'] == 'incomplete'
    assert 0.5 < time.monotonic() - begun < 2.5
    assert silent_wandb == [128 + signal.SIGTERM]


# Other modes

def test_offline_copy_needs_no_account_and_is_in_the_run_folder(run_in, tmp_path, monkeypatch):
    for name in ('WANDB_API_KEY', 'WANDB_MODE', 'WANDB_DIR'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('NETRC', str(tmp_path / 'no_netrc'))
    monkeypatch.chdir(tmp_path)
    run = run_in('wandb_mode=offline')
    record = run_folder.RunFolder(run, 0)
    record.log({'step': 0, 'test_loss': 0.123456})
    record.close('finished')
    (offline,) = (tmp_path / 'run' / 'wandb').glob('offline-run-*')
    (log,) = offline.glob('*.wandb')
    wanted = (b'opt.B', b'num_params', run.name(0).encode(), b'0.123456')
    deadline = time.monotonic() + 30  # W&B's own process writes the file shortly after finish
    while not all(text in log.read_bytes() for text in wanted) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [text for text in wanted if text not in log.read_bytes()] == []
    assert [path.name for path in tmp_path.iterdir()] == ['run']  # nothing is written elsewhere


def test_disabled_wandb_is_not_called(run_in, monkeypatch):
    monkeypatch.setattr('wandb.init', lambda **settings: pytest.fail('wandb.init was called'))
    run_folder.RunFolder(run_in('wandb_mode=disabled'), 0).close('finished')
