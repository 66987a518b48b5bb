"""A run's folder: config.yaml, history.jsonl, summary.json and a lock. It is the original record of the run.

checkpoint.py writes the states, wandb_logger.py the copy in W&B. analysis/table.py reads folders back.
"""
import fcntl
import importlib.metadata
import json
import math
import os
import platform
import secrets
import shutil
import subprocess
from contextlib import ExitStack, contextmanager
from pathlib import Path

import jax
import yaml

import data
from token_files import files as token_files
from token_files.atomic import atomic_write
from trainer import config, distributed, programs
from trainer.checkpoint import Checkpoints
from trainer.process import warn
from trainer.wandb_logger import WandbLogger, agent_environment

ENDED = ('finished', 'diverged', 'stopped')  # states of a run that is not trained further
SUMMED = ('wall_seconds', 'compile_seconds', 'train_seconds', 'eval_seconds')  # over all sessions of a run


class RunFolderError(ValueError):
    """The folder of a run cannot be used; the message is one line that says what to change."""


class RunFolder:
    """Writes the record of one seed while it trains.

    It resumes at `step` with the rows of the folder up to the step `evaluated`. Later rows and checkpoints are removed,
    because their steps are trained again. Only the main process writes the record; all processes save checkpoints.
    """

    def __init__(self, run, seed, step=0, evaluated=-1, stops=()):
        self.seed, self.name, self.folder = seed, run.name(seed), run.folder(seed)
        self.is_writer = distributed.is_main_process()
        self.checkpoints = Checkpoints(self.folder)
        self.rows = [row for row in read_history(self.folder) if row['step'] <= evaluated]
        earlier = read_summary(self.folder)
        self.earlier = {k: v for k, v in earlier.items() if k in SUMMED}
        self.wandb_id = earlier.get('wandb_id') or secrets.token_hex(4)
        self.history = self.wandb = None
        if not self.is_writer:
            return
        make_folder(self.folder)
        self.write_summary('running')
        origin = environment() | {'attention': programs.attention_of(run, jax.devices()[0])}
        settings = {**config.settings(run, seed), 'data': data_files(run), 'environment': origin}
        atomic_write(self.folder / 'config.yaml', yaml.safe_dump(settings, sort_keys=False))
        for path in self.folder.glob('checkpoints/*'):  # removed before the rows that lead up to them
            if path.name.isdigit() and int(path.name) > step:
                shutil.rmtree(path)
        self._rewrite_history()
        if run.wandb_mode != 'disabled':
            self.wandb = WandbLogger(run, seed, self.write_summary('running'), self.rows, origin, stops)

    def log(self, row):
        """Appends one evaluation, {name: number}. A value that is not finite is missing, and is left out."""
        self.rows.append({k: v for k, v in row.items() if math.isfinite(v)})
        if not self.is_writer:
            return
        try:
            if self.history:
                self.history.write(json.dumps(self.rows[-1]) + '\n')
                self.history.flush()
            else:
                self._rewrite_history()
        except OSError as error:  # e.g. a full disk
            self.history = None
            warn(f'{self.folder}/history.jsonl cannot be written ({error.strerror}); its rows are kept for the next evaluation')
        if self.wandb:
            self.wandb.log(len(self.rows) - 1, self.rows[-1])

    def _rewrite_history(self):
        atomic_write(self.folder / 'history.jsonl', ''.join(json.dumps(row) + '\n' for row in self.rows))
        self.history = open(self.folder / 'history.jsonl', 'a')

    def save(self, step, state, **numbers):
        """Begins to save the state of this seed. The rows that lead up to it and the numbers so far are written first."""
        try:
            if self.history:
                os.fsync(self.history.fileno())
            self.write_summary('running', **numbers)
        except OSError as error:
            warn(f'{self.folder}/summary.json cannot be written ({error.strerror})')
        self.checkpoints.save(step, state)

    def write_summary(self, state, **numbers) -> dict:
        """Writes summary.json and returns it. Seconds are summed over sessions, a killed one up to its last checkpoint."""
        seconds = {k: self.earlier.get(k, 0) + numbers.get(k, 0) for k in SUMMED if k in self.earlier or k in numbers}
        summary = {'state': state, 'name': self.name, 'seed': self.seed, 'folder': str(self.folder), **numbers, **seconds,
                   'wandb_id': self.wandb_id}
        if self.is_writer:
            atomic_write(self.folder / 'summary.json', json.dumps(summary, indent=2) + '\n')
        return summary

    def close(self, state, **numbers) -> dict:
        """Ends the record in `state` ('finished', 'diverged', 'stopped', 'interrupted' or 'failed') and returns the summary.

        The checkpoints of a run that has ENDED are removed, by the main process after its summary says so.
        """
        self.checkpoints.close()
        if self.rows:
            numbers |= {'test_loss': self.rows[-1]['test_loss']} if 'test_loss' in self.rows[-1] else {}
            numbers |= final_train_loss(self.rows)
        if self.is_writer:
            if not self.history:
                self._rewrite_history()
            self.history.close()
        summary = self.write_summary(state, **numbers)
        if state in ENDED and self.is_writer:
            shutil.rmtree(self.checkpoints.folder, ignore_errors=True)
        return finish_copy(self.wandb, summary) if self.wandb else summary


def final_train_loss(rows) -> dict:
    """{train_loss: mean over the batches of at least the last hundredth of the steps}, {} where no training loss was logged.

    The last row alone covers a single batch, since the last two evaluations are one step apart.
    """
    total, steps = 0.0, 0
    for before, row in zip(rows[-2::-1], rows[:0:-1], strict=False):
        if 'train_loss' not in row or steps >= 0.01 * rows[-1]['step']:
            break
        total += row['train_loss'] * (row['step'] - before['step'])
        steps += row['step'] - before['step']
    return {'train_loss': total / steps} if steps else {}


def finish_copy(wandb_logger, summary) -> dict:
    """Ends a run's copy in W&B, notes in its summary whether W&B has all of it, and returns the summary."""
    summary['wandb'] = 'complete' if wandb_logger.finish(summary) else 'incomplete'
    atomic_write(Path(summary['folder']) / 'summary.json', json.dumps(summary, indent=2) + '\n')
    return summary


def send_to_wandb_again(run, summary) -> dict:
    """Sends W&B a run that has ended, if it lacks some of it or hands the run out again. Returns the summary."""
    incomplete = summary.get('wandb') != 'complete' or agent_environment()
    if not (run.wandb_mode == 'online' and incomplete and distributed.is_main_process()):
        return summary
    copy = WandbLogger(run, summary['seed'], summary, read_history(summary['folder']), environment())
    return finish_copy(copy, summary)


@contextmanager
def closed_on_failure(records):
    """Closes the records {key: RunFolder} that are still open when an exception leaves the block, and says why in each."""
    try:
        yield records
    except BaseException as error:
        for record in records.values():
            state = 'failed' if isinstance(error, Exception) else 'interrupted'
            record.close(state, error=f'{type(error).__name__}: {error}'[:500])
        raise


@contextmanager
def locked(folders):
    """Makes the folders and locks them until the block or the process ends. Raises RunFolderError, in all processes."""
    with ExitStack() as locks:
        with distributed.shared_errors():
            for folder in folders if distributed.is_main_process() else ():
                make_folder(folder)
                file = locks.enter_context(open(folder / 'lock', 'a'))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise RunFolderError(f'{folder} is being trained by another process; wait for it, or set run_dir to another '
                                         'folder') from error
        yield


def make_folder(folder):
    """Makes a run's folder. Raises RunFolderError if it cannot be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f'{folder} cannot be made ({error.strerror}); set run_dir to a folder that can be written') from error
    if not os.access(folder, os.W_OK):
        raise RunFolderError(f'{folder} cannot be written to; set run_dir to another folder')


def ended(run, seed) -> dict | None:
    """The summary of a seed that has finished, diverged or been stopped by its forecast; None if it is still to be trained.

    Raises RunFolderError if the folder holds a run of another configuration, naming the keys that differ, or of other data.
    """
    folder = run.folder(seed)
    if not (folder / 'config.yaml').exists():
        return None
    there = yaml.safe_load((folder / 'config.yaml').read_text())
    if differ := config.differences(there, run, seed):
        raise RunFolderError(f'{folder} holds another run ({"; ".join(differ[:4])}); set run_dir to another folder')
    summary = read_summary(folder)
    if summary.get('state') in ENDED:
        return summary
    before, now = there.get('data') or {}, data_files(run)
    if changed := sorted(name for name in before.keys() | now.keys() if before and before.get(name) != now.get(name)):
        raise RunFolderError(f'{folder} was trained on other data: {", ".join(changed)} of {run.ds_path} changed since; put the '
                             'old data back, or set run_dir to another folder')
    return None


def data_files(run) -> dict:
    """{file name: size and digest} of the data set; {} for data that are made on the device."""
    return {} if run.ds_path in data.GENERATED else token_files.fingerprints(run.ds_path)


def read_summary(folder) -> dict:
    """The summary of a run folder, {} if there is none yet. Raises RunFolderError if it is damaged."""
    path = Path(folder) / 'summary.json'
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise RunFolderError(f'{path} is damaged ({error}); delete it, and the run resumes from its checkpoint') from error


def read_history(folder) -> list[dict]:
    """The rows of history.jsonl up to the first line that is not JSON, which a kill or a disk error has cut short."""
    path = Path(folder) / 'history.jsonl'
    rows = []
    for line in path.read_text(errors='replace').split('\n')[:-1] if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def environment() -> dict:
    """What a run runs on: source revision, package versions, device."""
    try:
        git = subprocess.run(['git', 'describe', '--always', '--dirty'], cwd=Path(__file__).parent, capture_output=True, text=True)
        revision = git.stdout.strip() or None
    except FileNotFoundError:  # no git on this machine
        revision = None
    packages = ('jax', 'jaxlib', 'flax', 'optax', 'numpy', 'hydra-core', 'wandb')
    return {'revision': revision, 'python': platform.python_version(), 'device': jax.devices()[0].device_kind,
            'platform': jax.devices()[0].platform, 'device_count': jax.device_count(),
            'versions': {p: importlib.metadata.version(p) for p in packages}}
