"""The cost of a run from its compiled programs, which are not executed: FLOPs, bytes on each device, hours on common chips.

    python train.py -cn chess model.D=2048 scale=855499.217040 exponent=2.026780 model.fsdp_enabled=true dry_run=true

XLA compiles for this machine's platform. On a CPU, which stands in for eight devices, the bytes of parameters and moments are those
of any chip. Temporaries are not, since each chip's compiler chooses its own.
"""
import dataclasses
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import data
import optimizer
from trainer import programs

UTILISATION = 0.4  # share of a chip's peak that is assumed for the hours


class Chip(NamedTuple):
    """Memory in bytes, and peak FLOP/s of dense matrix products by precision, from the makers' data sheets."""
    memory: float
    bfloat16: float     # float16 on the T4 and the V100
    tensorfloat32: float
    float32: float


# TPUs multiply bfloat16; a product of float32 takes three or six such passes.
CHIPS = {'T4': Chip(16e9, 65e12, 8.1e12, 8.1e12), 'V100': Chip(16e9, 125e12, 15.7e12, 15.7e12),
         'A100 40 GB': Chip(40e9, 312e12, 156e12, 19.5e12), 'H100 80 GB': Chip(80e9, 989e12, 494e12, 67e12),
         'TPU v5e': Chip(16e9, 197e12, 197e12 / 3, 197e12 / 6)}


def peak_flops(name, run) -> float:
    """Peak FLOP/s of a chip at the precision of the run's matrix products (model.dtype, matmul_precision)."""
    chip = CHIPS[name]
    if run.model.dtype == 'bfloat16':
        return chip.bfloat16
    default = 'bfloat16' if name.startswith('TPU') else 'tensorfloat32'
    return getattr(chip, run.matmul_precision or default)


def open_stand_in(run) -> data.Task:
    """The run's task with a single test batch, over files of zeros if the data are not there."""
    run = dataclasses.replace(run, derived=dataclasses.replace(run.derived, num_test_batches=1))
    if run.ds_path == 'fourier' or Path(run.ds_path).is_dir():
        return data.open_task(run, run.all_seeds)
    with tempfile.TemporaryDirectory() as folder:
        for split in ('train', 'test'):
            with open(f'{folder}/{split}.bin', 'wb') as file:
                file.truncate(run.opt.B * run.model.L)
        return data.open_task(dataclasses.replace(run, ds_path=folder), run.all_seeds)


def measure(run, task, devices) -> dict:
    """Bytes on each of these devices, by what holds them, and XLA's count of a training step's FLOPs on each device.

    'temporary' is the larger of a training step's and an evaluation's; 'sum' is all of it.
    """
    test = jax.tree.map(lambda a: jax.ShapeDtypeStruct((run.derived.num_test_batches, *a.shape[1:]), a.dtype), task.test)
    program = programs.build(run, task._replace(test=test), devices)
    keys = jax.eval_shape(lambda: jnp.stack([jax.random.key(seed) for seed in run.all_seeds]))

    def placed(tree, sharding):
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)

    test, raw = placed(test, program.test_sharding), placed(task.block(0), program.raw_sharding)
    init = program.init.lower(keys, test)
    state = jax.tree.map(placed, init.out_info, program.state_shardings)
    lr_scales, peak_lrs = np.zeros(task.block_steps, np.float32), optimizer.peak_lrs(run)
    train = program.train.lower(state, peak_lrs, raw, lr_scales, np.int32(0), np.int32(1)).compile()
    evaluate = program.evaluate.lower(state, peak_lrs, test).compile()

    def held(tree):
        return sum(int(np.prod(a.sharding.shard_shape(a.shape))) * a.dtype.itemsize for a in jax.tree.leaves(tree))

    parameters, moments = held(state.params), held(state.moments)
    other = held(state) - parameters - moments + held(test) + 2 * held(raw)  # a second block of data is read ahead
    temporary = max(a.temp_size_in_bytes for a in (train.memory_analysis(), evaluate.memory_analysis()))
    return {'parameters': parameters, 'moments': moments, 'other': other, 'temporary': temporary,
            'sum': parameters + moments + other + temporary, 'step_flops': train.cost_analysis()['flops'],
            'arguments': train.memory_analysis().argument_size_in_bytes}


def report(run) -> str:
    """The report on a run, as text."""
    jax.config.update('jax_default_matmul_precision', run.matmul_precision)
    task, derived = open_stand_in(run), run.derived
    pieces = derived.microbatches
    counts = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= jax.device_count() and run.opt.B // pieces % n == 0]
    found = {n: measure(run, task, jax.devices()[:n])
             for n in tqdm(counts, desc=f'compiling for {", ".join(map(str, counts))} devices', leave=False)}
    lines = [f'compiled for {jax.devices()[0].platform}; temporaries differ on other platforms',
             'GB on each device: parameters and moments ' + ('sharded (model.fsdp_enabled)' if run.model.fsdp_enabled else
                                                             'whole on each (model.fsdp_enabled=true shards them)'),
             f'{"devices":>8}{"parameters":>12}{"moments":>10}{"data, probe":>13}{"activations, temporaries":>26}{"sum":>9}']
    for n, m in found.items():
        lines.append(f'{n:>8}{m["parameters"] / 1e9:>12.3f}{m["moments"] / 1e9:>10.3f}{m["other"] / 1e9:>13.3f}'
                     f'{m["temporary"] / 1e9:>26.3f}{m["sum"] / 1e9:>9.3f}')
    flops = derived.flops_per_token * derived.tokens_per_step * len(run.all_seeds)
    of_a_piece = ', for one of its pieces' if pieces > 1 else ''
    lines += [f'FLOPs of a step: {flops:.3e} in matrix products and attention; XLA counts {found[1]["step_flops"]:.3e}, with '
              f'elementwise work{of_a_piece}',
              f"hours of training, without evaluations, at {UTILISATION:.0%} of a chip's peak (assumed):"]
    for name, chip in CHIPS.items():
        fits = [n for n, m in found.items() if m['sum'] <= chip.memory]
        hours = flops * derived.steps / (UTILISATION * peak_flops(name, run)) / 3600
        lines.append(f'  {name:<11} ' + (
            f'fits on {fits[0]}: {hours / fits[0]:.3g} h; {hours / max(found):.3g} h on {max(found)}' if fits else
            f'does not fit in {chip.memory / 1e9:.0f} GB on up to {max(found)}; shard (model.fsdp_enabled=true), use '
            'smaller pieces (opt.B_max), or recompute (model.remat=true)'))
    return '\n'.join(lines)
