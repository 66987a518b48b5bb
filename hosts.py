"""Several processes that train one run together, through jax.distributed: joining them, and agreeing on what their loops do next.

Each has the devices of its own machine, reads its rows of every batch, and computes on the mesh of all; only the first writes
records. What they compute is train.py's.
"""
import importlib.util
import os

import jax
import numpy as np
from jax.experimental import multihost_utils


def join(num_processes=None, process_id=None, coordinator=None, alone=False):
    """Joins the processes that are named; with None, those of a TPU pod or a Slurm step of several tasks, if it is one of them.
    alone: only if they are named. To be called before JAX is used. Raises ValueError.
    """
    slurm = int(os.environ.get('SLURM_NTASKS', 1)) > 1 and 'SLURM_STEP_NODELIST' in os.environ
    if num_processes == 1 or num_processes is None and (alone or not (slurm or importlib.util.find_spec('libtpu'))):
        return
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except ValueError as error:  # with None: a TPU of one host
        if num_processes is not None or slurm:
            raise ValueError(f'num_processes={num_processes}: {error} Set coordinator=HOST:PORT, num_processes and process_id=0 …, '
                             'or num_processes=1') from error


def first() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


def rows(B) -> slice:
    """The rows of a batch of B that this process reads."""
    share = B // jax.process_count()
    return slice(jax.process_index() * share, (jax.process_index() + 1) * share)


def agree(stop, *numbers):
    """(the largest of the processes' stop, the first process's numbers), integers: the same in all of them."""
    if jax.process_count() == 1:
        return stop, *numbers
    everyones = multihost_utils.process_allgather(np.array([stop, *numbers], np.int32))  # [processes, n]
    return int(everyones[:, 0].max()), *map(int, everyones[0, 1:])


def place_whole(tree, sharding):
    """Arrays that every process has whole, on the devices of all."""
    return jax.tree.map(lambda a: jax.make_array_from_callback(a.shape, sharding, np.asarray(a).__getitem__), tree)
