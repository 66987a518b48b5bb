"""A run's record: the folder runs/<wandb_tag>/<name>/ with config.yaml, history.jsonl and summary.json.

Its copy in W&B is mirror.py's, checkpoints are checkpoint.py's. What the rows mean is train.py's; reading folders back is
figures/table.py's.
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
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path

import jax
import yaml

from token_files import files as dataset
from trainer import checkpoint, config
from trainer import distributed as hosts
from trainer import wandb_logger as mirror
from trainer.checkpoint import warn

ENDED = ('finished', 'diverged', 'stopped')  # states of a run that is left alone
SUMMED = ('wall_seconds', 'compile_seconds', 'train_seconds', 'eval_seconds')  # in the summary, over all sessions


class RunFolderError(ValueError):
    """The run's folder cannot be used; the message is one line that says what to change."""


class Record:
    """Writes one run as it happens. It goes on at `step` from the rows in the folder up to the step `evaluated`; what is later
    there, of an attempt that this one starts over, is removed.

    Of several processes the first keeps the record; the others' goes to a folder that vanishes with them. All save checkpoints.
    """

    def __init__(self, run, seed, step=0, evaluated=-1):
        self.seed, self.name, self.folder = seed, config.run_name(run, seed), folder_of(run, seed)
        self.checkpoints = checkpoint.Checkpoints(self.folder)
        rows = [row for row in read_history(self.folder) if row['step'] <= evaluated]
        earlier = read_summary(self.folder)
        if not hosts.first():
            self.scratch = tempfile.TemporaryDirectory()
            self.folder = Path(self.scratch.name)
        make_folder(self.folder)
        self.earlier = {k: v for k, v in earlier.items() if k in SUMMED}
        self.wandb_id = earlier.get('wandb_id') or secrets.token_hex(4)
        self.summarise('running')
        write_whole(self.folder / 'config.yaml', yaml.safe_dump({**config.settings(run, seed), 'data': data_files(run),
                                                                 'environment': environment()}, sort_keys=False))
        for path in self.folder.glob('checkpoints/*'):  # before the rows that lead up to them
            if path.name.isdigit() and int(path.name) > step:
                shutil.rmtree(path)
        self.rows, self.history = rows, None
        self._write_rows()
        mirrored = run.wandb_mode != 'disabled' and hosts.first()
        self.mirror = mirror.Mirror(run, seed, self.summarise('running'), rows) if mirrored else None

    def log(self, row):
        """Appends one evaluation, {name: number}; a value that is not finite is missing, and what is missing is left out."""
        self.rows.append({k: v for k, v in row.items() if math.isfinite(v)})
        try:
            if self.history:
                self.history.write(json.dumps(self.rows[-1]) + '\n')
                self.history.flush()
            else:
                self._write_rows()
        except OSError as error:  # a full disk
            self.history = None
            warn(f'{self.folder}/history.jsonl cannot be written ({error.strerror}); its rows are kept for the next evaluation')
        if self.mirror:
            self.mirror.log(len(self.rows) - 1, self.rows[-1])

    def _write_rows(self):
        write_whole(self.folder / 'history.jsonl', ''.join(json.dumps(row) + '\n' for row in self.rows))
        self.history = open(self.folder / 'history.jsonl', 'a')

    def save(self, step, state, **numbers):
        """Begins to save one seed's state; the rows that lead up to it, and the run's numbers so far, are on disk before it is."""
        try:
            if self.history:
                os.fsync(self.history.fileno())
            self.summarise('running', **numbers)
        except OSError as error:
            warn(f'{self.folder}/summary.json cannot be written ({error.strerror})')
        self.checkpoints.save(step, state)

    def summarise(self, state, **numbers):
        """Writes summary.json and returns it; seconds are summed over the sessions of a run, those of a killed one up to its last
        checkpoint."""
        seconds = {k: self.earlier.get(k, 0) + numbers.get(k, 0) for k in SUMMED if k in self.earlier or k in numbers}
        summary = {'state': state, 'name': self.name, 'seed': self.seed, 'folder': str(self.folder), **numbers, **seconds,
                   'wandb_id': self.wandb_id}
        write_whole(self.folder / 'summary.json', json.dumps(summary, indent=2) + '\n')
        return summary

    def close(self, state, **numbers):
        """Ends the record in `state` ('finished', 'diverged', 'stopped', 'interrupted' or 'failed') with the run's last numbers and
        its last losses, and returns the summary. The checkpoints of a run that has ENDED are removed."""
        self.checkpoints.close()
        if not self.history:
            self._write_rows()
        self.history.close()
        last = {k: v for row in self.rows[-1:] for k, v in row.items() if k in ('test_loss', 'train_loss')}
        summary = self.summarise(state, **last, **numbers)
        if state in ENDED and hosts.first():  # and says so: another process may be ahead of the one that writes it
            self.checkpoints.remove()
        return finish_mirror(self.mirror, summary) if self.mirror else summary


def finish_mirror(copy, summary):
    """Ends a run's copy in W&B and notes in the summary, which it returns, whether W&B has all of it."""
    summary['wandb'] = 'complete' if copy.finish(summary) else 'incomplete'
    write_whole(Path(summary['folder']) / 'summary.json', json.dumps(summary, indent=2) + '\n')
    return summary


def mirror_again(run, summary):
    """Gives W&B a run that has ended, which it lost the end of, or which it hands out again. Returns the summary."""
    if not hosts.first() or run.wandb_mode != 'online' or summary.get('wandb') == 'complete' and not mirror.agents_run():
        return summary
    mirror.log_in(run)
    return finish_mirror(mirror.Mirror(run, summary['seed'], summary, read_history(summary['folder'])), summary)


@contextmanager
def closed_on_failure(records):
    """Ends the records {key: Record} that are still open when an exception leaves the block, as what it is."""
    try:
        yield records
    except BaseException as error:
        for one in records.values():
            one.close('failed' if isinstance(error, Exception) else 'interrupted', error=f'{type(error).__name__}: {error}'[:500])
        raise


@contextmanager
def locked(folders):
    """Makes the folders and holds them for this process; the lock ends with the process, however it ends. Raises RunFolderError."""
    with ExitStack() as locks:
        for folder in folders if hosts.first() else ():
            make_folder(folder)
            file = locks.enter_context(open(folder / 'lock', 'a'))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RunFolderError(f'{folder} is being trained by another process; wait for it, or set run_dir to another '
                                     'folder') from error
        yield


def folder_of(run, seed) -> Path:
    """Where a seed's record lies: run_dir if given (run_dir/seed<s> in a group), else runs/<wandb_tag>/<name>."""
    if run.run_dir is None:
        return Path('runs') / run.wandb_tag / config.run_name(run, seed)
    return Path(run.run_dir) if run.seeds is None else Path(run.run_dir) / f'seed{seed}'


def make_folder(folder):
    """Makes a run's folder where there is none. Raises RunFolderError if it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f'{folder} cannot be made ({error.strerror}); set run_dir to a folder that can be written') from error
    if not os.access(folder, os.W_OK):
        raise RunFolderError(f'{folder} cannot be written to; set run_dir to another folder')


def ended(run, seed) -> dict | None:
    """The summary of a seed that has finished, diverged or been stopped by its forecast, None of one that is still to be trained.

    A seed that diverged would do the same again. Raises RunFolderError if the folder holds another run, with the keys that differ
    of those that a user sets, or was trained on other data.
    """
    folder = folder_of(run, seed)
    if not (folder / 'config.yaml').exists():
        return None
    there = yaml.safe_load((folder / 'config.yaml').read_text())
    flat = config.flatten(there)
    differ = [f'{k}={flat.get(k)} there, {v} asked' for k, v in config.flatten(config.asked(run, seed)).items() if flat.get(k) != v]
    if differ:
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
    """{file name: size and fingerprint} of the data set, {} for one that is made on the device."""
    return {} if run.ds_path == 'fourier' else dataset.fingerprints(run.ds_path)


def read_summary(folder) -> dict:
    """The summary of a run folder, {} where there is none yet. Raises RunFolderError for one that is damaged."""
    path = Path(folder) / 'summary.json'
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise RunFolderError(f'{path} is damaged ({error}); delete it, and the run goes on from its checkpoint') from error


def read_history(folder) -> list[dict]:
    """The rows of history.jsonl up to the first line that is none: a kill or a fault of the disk cut it short."""
    path = Path(folder) / 'history.jsonl'
    rows = []
    for line in path.read_text(errors='replace').split('\n')[:-1] if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def write_whole(path, text):
    """Writes a file under a temporary name and renames it, so that no reader ever meets half of it, also after a power cut."""
    temporary = path.with_name(path.name + '.part')
    with open(temporary, 'w') as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def environment() -> dict:
    """What the run ran on: source revision, package versions, device."""
    try:
        git = subprocess.run(['git', 'describe', '--always', '--dirty'], cwd=Path(__file__).parent, capture_output=True, text=True)
        revision = git.stdout.strip() or None
    except FileNotFoundError:  # no git on this machine
        revision = None
    packages = ('jax', 'jaxlib', 'flax', 'optax', 'numpy', 'hydra-core', 'wandb')
    return {'revision': revision, 'python': platform.python_version(), 'device': jax.devices()[0].device_kind,
            'platform': jax.default_backend(), 'device_count': jax.device_count(),
            'versions': {p: importlib.metadata.version(p) for p in packages}}
