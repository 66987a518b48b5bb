"""Checkpoints of one seed's state in a run's folder, by Orbax: written in the background, whole or not at all, checked when read.

What a state is, and when it is saved, is train.py's. With several processes all of them save and restore together, into one folder
that they all see.
"""
import logging
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

FAULTS = (ValueError, OSError)  # what Orbax raises for a full disk, a damaged or a missing file
DAMAGE = (*FAULTS, KeyError, TypeError)  # and for a name in its JSON that a flipped bit made another


def _orbax():
    import orbax.checkpoint  # a second of start-up that a short run does without

    logging.getLogger('absl').setLevel(logging.CRITICAL + 1)  # it logs, with a traceback each, the errors that it raises as well
    return orbax.checkpoint


def _manager(folder, **options):
    options = _orbax().CheckpointManagerOptions(max_to_keep=2, **options)
    return _orbax().CheckpointManager((Path(folder) / 'checkpoints').absolute(), options=options)


class Checkpoints:
    """Writes the checkpoints in a run's folder; the two newest are kept."""

    def __init__(self, folder):
        self.folder, self.manager = Path(folder) / 'checkpoints', None

    def save(self, step, state):
        """Begins to save the state after `step` updates, once the one before is written. What fails is told, and costs no other."""
        self.wait()
        if self.manager is None:
            self.manager = _manager(self.folder.parent, cleanup_tmp_directories=True)
        size = sum(a.nbytes for a in jax.tree.leaves(state))
        if jax.process_count() == 1 and shutil.disk_usage(self.folder).free < 1.1 * size + 1e5:
            return self._failed(f'the disk has no room for {size / 1e6:.1f} MB')
        try:
            self.manager.save(step, args=_orbax().args.StandardSave({'state': state, 'sum': _checksum(state)}))
        except FAULTS as error:
            self._failed(error)

    def wait(self):
        """Waits until what was begun is on disk."""
        try:
            if self.manager is not None:
                self.manager.wait_until_finished()
        except FAULTS as error:
            self._failed(error)

    def _failed(self, error):
        for path in self.folder.glob('*-tmp'):
            shutil.rmtree(path, ignore_errors=True)  # its space may be what the disk lacks
        warn(f'no checkpoint could be saved in {self.folder} ({brief(error)}); training goes on, the older ones are kept')

    def close(self):
        self.wait()
        if self.manager is not None:
            self.manager.close()

    def remove(self):
        shutil.rmtree(self.folder, ignore_errors=True)


def keep_common(group):
    """Waits until what these Checkpoints of a group have begun is on disk, and removes each that another could not save: the group
    cannot go on from it, and it would push out one that they all have. Not with several processes, which may see other folders."""
    if len(group) < 2 or jax.process_count() > 1:
        return
    for one in group:
        one.wait()
    common = steps([one.folder.parent for one in group])
    for one in group:
        for step in steps([one.folder.parent]):
            if one.manager is not None and step not in common:
                one.manager.delete(step)


def steps(folders) -> list[int]:
    """The steps that every one of the folders holds a checkpoint of, newest first."""
    found = [{int(path.name) for path in folder.glob('checkpoints/*') if path.name.isdigit()} for folder in folders]
    return sorted(set.intersection(*found), reverse=True)


def restore(folders, step, like):
    """The states saved at `step` in each folder, stacked: NumPy leaves [S, …]; None, and a line that says so, if one is damaged.
    like: the abstract state of one seed."""
    state = jax.tree.map(lambda a: np.empty(a.shape, a.dtype), like)
    wanted = _orbax().args.StandardRestore({'state': state, 'sum': np.empty((), np.uint32)})
    states = []
    for folder in folders:
        try:
            found = _manager(folder).restore(step, args=wanted)
            if _checksum(found['state']) != found['sum']:
                raise ValueError('its checksum is another')
        except DAMAGE as error:
            warn(f'{folder}/checkpoints/{step} is damaged ({brief(error)}); going on from the one before')
            return None
        states.append(found['state'])
    return jax.tree.map(lambda *leaves: np.stack(leaves), *states)


@jax.jit
def _checksum(state):
    """A sum over all 32-bit words, each times an odd number of its own, modulo 2^32: any one word that changes shows. Orbax has no
    checksum of its own for what it stores uncompressed."""
    def one(a):
        words = jax.lax.bitcast_convert_type(a, jnp.uint32).ravel()
        return jnp.sum(words * (2 * jnp.arange(words.size, dtype=jnp.uint32) + 1))

    return sum(one(a) * np.uint32(2 * i + 1) for i, a in enumerate(jax.tree.leaves(state)))


def brief(error):
    """What an error says, short and on one line."""
    return ' '.join(str(error).split())[:120] or type(error).__name__


def warn(text):
    """One line on stderr that does not tear a progress bar."""
    tqdm.write(f'warning: {text}', file=sys.stderr)
