"""Checkpoints of one seed's state in a run's folder, by Orbax: written in the background, atomically, and verified when read.

programs.py defines the state, and train.py decides when to save it. Several processes save and restore together, in one folder that
all of them see. Each writes and reads the shards of its own devices.
"""
import logging
import math
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from trainer import distributed
from trainer.process import brief, warn

WRITE_ERRORS = (ValueError, OSError)  # what Orbax raises for a full disk


def _orbax():
    import orbax.checkpoint  # takes a second, which a short run does without

    logging.getLogger('absl').setLevel(logging.CRITICAL + 1)  # it would log, with a traceback each, the errors that it also raises
    return orbax.checkpoint


def _manager(folder, **options):
    options = _orbax().CheckpointManagerOptions(max_to_keep=2, **options)
    return _orbax().CheckpointManager((Path(folder) / 'checkpoints').absolute(), options=options)


class Checkpoints:
    """Writes the checkpoints in a run's folder. The two newest are kept."""

    def __init__(self, folder):
        self.folder, self.manager = Path(folder) / 'checkpoints', None

    def save(self, step, state):
        """Waits for the previous checkpoint, then starts to save the state after `step` updates. A failure is a warning."""
        self.wait()
        if self.manager is None:
            self.manager = _manager(self.folder.parent, cleanup_tmp_directories=True)
        size = sum(a.nbytes for a in jax.tree.leaves(state))
        if jax.process_count() == 1 and shutil.disk_usage(self.folder).free < 1.1 * size + 1e5:
            return self._warn(f'the disk has no room for {size / 1e6:.1f} MB')
        try:
            self.manager.save(step, args=_orbax().args.StandardSave({'state': state, 'sum': checksum(state)}))
        except WRITE_ERRORS as error:
            self._warn(error)

    def wait(self):
        """Waits until the checkpoint that is being written is on disk."""
        try:
            if self.manager is not None:
                self.manager.wait_until_finished()
        except WRITE_ERRORS as error:
            self._warn(error)

    def _warn(self, error):
        for _ in range(100):  # Orbax's other writers may put files back
            for path in (unfinished := list(self.folder.glob('*-tmp'))):
                shutil.rmtree(path, ignore_errors=True)  # its space may be what the disk lacks
            if not unfinished:
                break
            time.sleep(0.01)
        warn(f'no checkpoint could be saved in {self.folder} ({brief(error)}); training continues, older checkpoints are kept')

    def close(self):
        self.wait()
        if self.manager is not None:
            self.manager.close()


def delete_unshared(group):
    """Deletes every checkpoint whose step is missing for another seed of the group, which consists of Checkpoints.

    The group cannot resume from them, and they would push out older ones that all have. Waits until all are written. Does nothing
    with several processes, which may see different folders.
    """
    if len(group) < 2 or jax.process_count() > 1:
        return
    for one in group:
        one.wait()
    shared = steps([one.folder.parent for one in group])
    for one in group:
        for step in steps([one.folder.parent]):
            if one.manager is not None and step not in shared:
                one.manager.delete(step)


def steps(folders) -> list[int]:
    """The steps that every one of the run folders holds a checkpoint of, newest first."""
    found = [{int(path.name) for path in folder.glob('checkpoints/*') if path.name.isdigit()} for folder in folders]
    return sorted(set.intersection(*found), reverse=True)


def restore(folders, step, like):
    """The states saved at `step` in these run folders, one a seed; None, with a warning, if any process finds one damaged.

    like: the abstract state of one seed with its shardings. Each process reads its own shards.
    """
    wanted = _orbax().args.StandardRestore({'state': like, 'sum': np.empty((), np.uint32)})
    states = []
    for folder in folders:
        found, error = None, None
        try:
            found = _manager(folder).restore(step, args=wanted)
        except Exception as raised:  # Orbax raises Exception itself for an array that cannot be read
            error = brief(raised)
        if not distributed.any_process(error is not None) and int(checksum(found['state'])) != found['sum']:
            error = 'the checksum does not match'
        if distributed.any_process(error is not None):
            warn(f'{folder}/checkpoints/{step} is damaged ({error or "in another process"}); the one before is used')
            return None
        states.append(found['state'])
    return states


@jax.jit
def checksum(state):
    """uint32: the sum of all 32-bit words of a state, each times its own odd number, so that any single change shows.

    Orbax has no checksum for what it stores uncompressed. Computed where the shards are: only scalars are exchanged.
    """
    def of_array(a):
        words = jax.lax.bitcast_convert_type(a, jnp.uint32)
        index = jnp.uint32(0)  # of a word in row-major order
        for axis in range(a.ndim):
            index += jax.lax.broadcasted_iota(jnp.uint32, a.shape, axis) * np.uint32(math.prod(a.shape[axis + 1:]) % 2**32)
        return jnp.sum(words * (2 * index + 1))

    return sum(of_array(a) * np.uint32(2 * i + 1) for i, a in enumerate(jax.tree.leaves(state)))
