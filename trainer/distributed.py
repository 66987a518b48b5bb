"""The devices that train a run, and the processes that hold them: cores, joining through jax.distributed, agreeing on what is next.

Each process has the devices of its own machine, reads its rows of every batch, and computes on the mesh of all; only the first
writes records. What they compute is train.py's.
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


def each_core_a_device():
    """Makes every core of a CPU a device, as $JAX_NUM_CPU_DEVICES does: alone on its rows of a batch, a core waits for the others
    once a step and not at each operation. To be called before JAX is used."""
    if 'JAX_NUM_CPU_DEVICES' not in os.environ and 'xla_force_host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
        jax.config.update('jax_num_cpu_devices', cores)


def devices(B, pieces=1) -> list:
    """The devices that a batch of B examples, taken in so many pieces, is spread over: all there are, or of the cores of a CPU as
    many as it divides among. Raises ValueError."""
    found = jax.devices()
    if jax.default_backend() == 'cpu' and jax.process_count() == 1:
        return found[:max(n for n in range(1, len(found) + 1) if B // pieces % n == 0)]
    if B // pieces % len(found):
        raise ValueError(f'opt.B={B} in {pieces} piece(s) cannot be spread evenly over {len(found)} devices; set opt.B to a '
                         f'multiple of {len(found) * pieces}')
    return found


def compiler_options(count) -> dict:
    """For a program on so many devices: where they are the cores of a CPU, each computes with one thread.

    Not also without XLA's YNNPACK fusions, though that would be a twentieth faster: jaxlib 0.10.2 then gets 96 examples of each
    device wrong in an evaluation at D = 384 and B = 4096 (tests/measure_hosts.py).
    """
    return {'xla_cpu_multi_thread_eigen': False} if count > 1 and jax.default_backend() == 'cpu' else {}


def compile_quickly() -> dict:
    """For a program that runs once: random draws take a CPU's compiler seconds to optimise."""
    return {'xla_backend_optimization_level': 0} if jax.default_backend() == 'cpu' else {}


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
