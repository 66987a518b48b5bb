"""A run's record: the folder runs/<wandb_tag>/<name>/ with config.yaml, history.jsonl and summary.json, mirrored to W&B.

The only file of the training that knows W&B. What the rows mean is train.py's; reading folders back is figures/table.py's.
"""
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
from pathlib import Path

import jax
import numpy as np
import yaml

import config

# The short names of the published logs, for W&B's config: each is the last part of one dotted key and of no other that matters.
SHORT_NAMES = {
    'D': 'model.D', 'N': 'model.N', 'L': 'model.L', 'V': 'model.V', 'dh': 'model.dh', 'mlp_expansion': 'model.mlp_expansion',
    'B': 'opt.B', 'lr': 'opt.lr', 'schedule': 'opt.schedule', 'decay_frac': 'opt.decay_frac', 'warmup_tokens': 'opt.warmup_tokens',
    'num_params': 'derived.num_params', 'steps': 'derived.steps'}


class RunFolderError(ValueError):
    """The run's folder cannot be used; the message is one line that says what to change."""


class Record:
    """Writes one run as it happens. It goes on at `step` from the rows in the folder up to the step `evaluated`; what is later
    there, of an attempt that this one starts over, is removed."""

    def __init__(self, run, seed, step=0, evaluated=-1):
        self.seed, self.name, self.folder = seed, config.run_name(run, seed), folder_of(run, seed)
        values = settings(run, seed)
        make_folder(self.folder)
        (self.folder / 'summary.json').unlink(missing_ok=True)
        write_whole(self.folder / 'config.yaml', yaml.safe_dump({**values, 'environment': environment()}, sort_keys=False))
        for path in self.folder.glob('checkpoints/*'):  # before the rows that lead up to them
            if path.name.isdigit() and int(path.name) > step:
                shutil.rmtree(path)
        rows = [row for row in read_history(self.folder) if row['step'] <= evaluated]
        write_whole(self.folder / 'history.jsonl', ''.join(json.dumps(row) + '\n' for row in rows))
        self.history = open(self.folder / 'history.jsonl', 'a')
        self.wandb = _open_wandb(run, self.name, self.folder, values) if run.wandb_mode != 'disabled' else None
        for row in rows if self.wandb else ():  # W&B sees a resumed run as a new one: give it the whole curve
            self.wandb.log(row)

    def log(self, row):
        """Appends one evaluation, {name: number}; a value that is not finite is missing, and what is missing is left out."""
        row = {k: v for k, v in row.items() if math.isfinite(v)}
        self.history.write(json.dumps(row) + '\n')
        self.history.flush()
        if self.wandb:
            self.wandb.log(row)

    def save(self, state):
        """Saves one seed's state under its step, complete or not at all; the two newest are kept."""
        checkpoints = open_checkpoints(self.folder)
        checkpoints.save(int(state.step), args=_orbax().args.StandardSave(state))
        checkpoints.close()

    def close(self, state, **numbers):
        """Ends the record in `state` ('finished', 'diverged' or 'interrupted') with the run's last numbers and its last losses.

        Returns the summary. The checkpoints of a run that has ended are removed.
        """
        self.history.close()
        last = {k: v for row in read_history(self.folder)[-1:] for k, v in row.items() if k in ('test_loss', 'train_loss')}
        summary = {'state': state, 'name': self.name, 'seed': self.seed, 'folder': str(self.folder), **last, **numbers}
        write_whole(self.folder / 'summary.json', json.dumps(summary, indent=2) + '\n')
        if state != 'interrupted':
            shutil.rmtree(self.folder / 'checkpoints', ignore_errors=True)
        if self.wandb:
            self.wandb.summary.update(summary)
            self.wandb.finish(exit_code=0 if state == 'finished' else 1)
        return summary


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


def log_in(run):
    """Makes sure that W&B has a key where a run is to be mirrored online. Raises ConfigError."""
    if run.wandb_mode != 'online':
        return
    import wandb

    try:
        wandb.login()
    except wandb.Error as error:
        raise config.ConfigError(f'wandb_mode=online: {str(error).rstrip(".")}; or set wandb_mode=offline') from error


def settings(run, seed) -> dict:
    """The configuration as config.yaml and W&B hold it: resolved, with what is derived from it and the run's name."""
    values = config.as_dict(run, seed)
    values['derived']['name'] = config.run_name(run, seed)
    return values


def is_finished(run, seed) -> bool:
    """Whether the run's folder holds it, finished. Raises RunFolderError, with the keys that differ, if another run is there."""
    folder = folder_of(run, seed)
    if not (folder / 'config.yaml').exists():
        return False
    there = config.flatten(yaml.safe_load((folder / 'config.yaml').read_text()))
    differ = [f'{k}={there.get(k)} there, {v} asked' for k, v in config.flatten(settings(run, seed)).items()
              if k not in config.BOOKKEEPING and there.get(k) != v]
    if differ:
        raise RunFolderError(f'{folder} holds another run ({"; ".join(differ[:4])}); set run_dir to another folder')
    return read_summary(folder).get('state') == 'finished'


def read_summary(folder) -> dict:
    """The summary of a run folder, {} where there is none yet."""
    path = Path(folder) / 'summary.json'
    return json.loads(path.read_text()) if path.exists() else {}


def read_history(folder) -> list[dict]:
    """The rows of history.jsonl, without a last line that a kill cut short."""
    path = Path(folder) / 'history.jsonl'
    lines = path.read_text().split('\n')[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def _orbax():
    import orbax.checkpoint  # a second of start-up that a short run does without

    return orbax.checkpoint


def open_checkpoints(folder):
    """Orbax's manager of the checkpoints in a run's folder."""
    options = _orbax().CheckpointManagerOptions(max_to_keep=2)
    return _orbax().CheckpointManager((Path(folder) / 'checkpoints').absolute(), options=options)


def newest_checkpoint(folders) -> int | None:
    """The newest step that every one of the folders holds a checkpoint of, None if there is none."""
    steps = [set(open_checkpoints(f).all_steps()) if (f / 'checkpoints').exists() else set() for f in folders]
    return max(set.intersection(*steps), default=None)


def restore(folders, step, like):
    """The states saved at `step` in each folder, stacked: NumPy leaves [S, …]. like: the abstract state of one seed."""
    wanted = _orbax().args.StandardRestore(jax.tree.map(lambda a: np.empty(a.shape, a.dtype), like))
    states = [open_checkpoints(f).restore(step, args=wanted) for f in folders]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *states)


def write_whole(path, text):
    """Writes a file under a temporary name and renames it, so that no reader ever meets half of it."""
    temporary = path.with_name(path.name + '.part')
    temporary.write_text(text)
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


def _open_wandb(run, name, folder, values):
    import wandb  # a second of start-up that a run with wandb_mode=disabled does without

    flat = config.flatten(values)
    try:
        mirror = wandb.init(
            project=run.wandb_project, name=name, tags=[run.wandb_tag], mode=run.wandb_mode, dir=folder, reinit='create_new',
            config={**flat, **{short: flat[key] for short, key in SHORT_NAMES.items()}},
            settings=wandb.Settings(silent=True, console='off', x_disable_stats=True))
    except wandb.Error as error:
        raise RunFolderError(f'W&B does not answer ({error}); wandb_mode=offline records the run here, for wandb sync') from error
    mirror.define_metric('*', step_metric='step')
    return mirror
