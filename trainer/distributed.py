"""Devices and processes: starting them, choosing the devices of a batch, and exchanging small values between processes.

Each process drives the devices of its own machine and reads its rows of every batch. All of them compute on one mesh. The main
process alone writes records.
"""
import functools
import importlib.util
import os
from contextlib import contextmanager

import jax
import numpy as np
from jax.experimental import multihost_utils

MESSAGE_BYTES = 400  # of an error message that is sent to the other processes


def initialize(num_processes=None, process_id=None, coordinator=None, automatic=True):
    """Joins the processes of one run. Call it before JAX is used. Raises ValueError if they cannot be joined.

    With num_processes=None the processes are those of a Slurm step of several tasks or of a TPU pod, if `automatic`; otherwise this
    process trains alone.
    """
    slurm = int(os.environ.get('SLURM_NTASKS', 1)) > 1 and 'SLURM_STEP_NODELIST' in os.environ
    found = automatic and (slurm or importlib.util.find_spec('libtpu') is not None)
    if num_processes == 1 or (num_processes is None and not found):
        return
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except ValueError as error:
        if num_processes is not None or slurm:  # otherwise libtpu is installed, and this is no pod
            raise ValueError(f'num_processes={num_processes}: {error} Set coordinator=HOST:PORT, num_processes and process_id=0 …, '
                             'or num_processes=1') from error


def use_every_core():
    """Makes every CPU core a device, unless $JAX_NUM_CPU_DEVICES or $XLA_FLAGS say otherwise. Call it before JAX is used.

    Cores that hold their own rows of a batch wait for each other once a step instead of at each operation.
    """
    if 'JAX_NUM_CPU_DEVICES' not in os.environ and 'xla_force_host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
        jax.config.update('jax_num_cpu_devices', cores)


def devices_for(B, microbatches=1) -> list:
    """The devices that a batch of B examples, taken in `microbatches` pieces, is split over.

    All devices; of a single process's CPU cores, the largest number that divides a piece. Raises ValueError if B does not divide.
    """
    devices = jax.devices()
    piece = B // microbatches
    if devices[0].platform == 'cpu' and jax.process_count() == 1:
        return devices[:max(n for n in range(1, len(devices) + 1) if piece % n == 0)]
    if piece % len(devices):
        raise ValueError(f'opt.B={B} in {microbatches} piece(s) cannot be split evenly over {len(devices)} devices; set opt.B to a '
                         f'multiple of {len(devices) * microbatches}')
    return devices


def compiler_options(devices) -> dict:
    """XLA options of a program on these devices: CPU cores that are devices of their own compute with one thread each.

    Of XLA's YNNPACK fusions the matrix products alone stay on, where the installed jaxlib has that option; docs/performance.md
    compares this with all fusions, which are slower, and with none, which once computed wrongly.
    """
    if len(devices) == 1 or devices[0].platform != 'cpu':
        return {}
    products_alone = accepted('xla_cpu_experimental_ynn_fusion_type', 'LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT')
    return {'xla_cpu_multi_thread_eigen': False} | products_alone


@functools.cache
def accepted(option, value) -> dict:
    """{option: value} if the installed jaxlib knows this compiler option and value, otherwise {}."""
    try:
        jax.jit(lambda: 0, compiler_options={option: value}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return {option: value}


def is_main_process() -> bool:
    return jax.process_index() == 0


def local_rows(B) -> slice:
    """The rows of a batch of B examples that this process reads."""
    share = B // jax.process_count()
    return slice(jax.process_index() * share, (jax.process_index() + 1) * share)


def any_process(value) -> int:
    """The largest of the processes' integers (True is 1): the same in all of them."""
    return int(_gather(value).max())


def broadcast(*values) -> list[int]:
    """The main process's integers, in all processes."""
    return [int(v) for v in _gather(*values)[0]]


def _gather(*values):  # [processes, len(values)]
    if jax.process_count() == 1:
        return np.array([values], np.int64)
    return multihost_utils.process_allgather(np.array(values, np.int32))


@contextmanager
def shared_errors():
    """An error of one process in this block is raised in all of them, so that none waits for a process that has ended.

    Covers ValueError and OSError, which a user can correct. The other processes raise a ValueError with the same message.
    """
    error = None
    try:
        yield
    except (ValueError, OSError) as own:
        error = own
    if jax.process_count() > 1:
        message = np.frombuffer(str(error or '').encode()[:MESSAGE_BYTES].ljust(MESSAGE_BYTES, b'\0'), np.uint8)
        for process, received in enumerate(multihost_utils.process_allgather(message)):
            if text := bytes(received).rstrip(b'\0').decode(errors='ignore'):
                raise error or ValueError(f'process {process}: {text}')
    if error:
        raise error


def put_global(tree, sharding):
    """The arrays of a tree, which every process holds whole, placed on the devices of all processes."""
    return jax.tree.map(lambda a: jax.make_array_from_callback(a.shape, sharding, np.asarray(a).__getitem__), tree)
