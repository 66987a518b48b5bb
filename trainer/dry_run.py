"""What a run would take, from its compiled programs, which are never run: FLOPs, hours on common chips, bytes on each device.

    python train.py -cn chess model.D=2048 scale=855499.217040 exponent=2.026780 model.fsdp_enabled=true dry_run=true

Memory is XLA's own analysis for this platform; on a CPU, which stands in for eight devices, another chip's compiler may need more
or less for temporaries, not for parameters and moments. The programs are train.py's.
"""
import dataclasses
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import data

UTILISATION = 0.4  # of a chip's peak, assumed: what well-fed matrix products of this size reach
# Memory in bytes; peak FLOP/s of matrix products of float32 as they go by default (TF32, or one bfloat16 pass, where there are
# such), and of bfloat16 (float16 on the T4 and the V100). From the makers' data sheets, dense.
CHIPS = {'T4': (16e9, 8.1e12, 65e12), 'V100': (16e9, 15.7e12, 125e12), 'A100 40 GB': (40e9, 156e12, 312e12),
         'H100 80 GB': (80e9, 494e12, 989e12), 'TPU v5e': (16e9, 197e12, 197e12)}


def stand_in(run) -> data.Task:
    """The run's task with a single test batch, over data of zeros if there are none yet."""
    run = dataclasses.replace(run, derived=dataclasses.replace(run.derived, num_test_batches=1))
    if run.ds_path == 'fourier' or Path(run.ds_path).is_dir():
        return data.open_task(run, run.all_seeds)
    with tempfile.TemporaryDirectory() as folder:
        for split in ('train', 'test'):
            with open(f'{folder}/{split}.bin', 'wb') as file:
                file.truncate(run.opt.B * run.model.L)
        return data.open_task(dataclasses.replace(run, ds_path=folder), run.all_seeds)


def measure(run, task, programs, peak_rates, devices) -> dict:
    """Bytes on each of these devices: of parameters, moments, everything else that is held, temporaries (the larger of a training
    step's and an evaluation's), and their sum; and XLA's count of a training step's FLOPs on each."""
    test = jax.tree.map(lambda a: jax.ShapeDtypeStruct((run.derived.num_test_batches, *a.shape[1:]), a.dtype), task.test)
    program = programs(run, task._replace(test=test), devices)
    raw = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, task.block(0)))
    keys = jax.eval_shape(lambda: jnp.stack([jax.random.key(seed) for seed in run.all_seeds]))

    def placed(tree, sharding):
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)

    test, raw = placed(test, program.test_sharding), placed(raw, program.raw_sharding)
    init = program.init.lower(keys, test)
    state = jax.tree.map(lambda a, home: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=home), init.out_info, program.state_homes)
    s, lrs = np.zeros(task.block_steps, np.float32), peak_rates(run)
    train = program.train.lower(state, lrs, raw, s, np.int32(0), np.int32(1)).compile()
    evaluate = program.evaluate.lower(state, lrs, test).compile()

    def held(tree):
        return sum(int(np.prod(a.sharding.shard_shape(a.shape))) * a.dtype.itemsize for a in jax.tree.leaves(tree))

    parameters, moments = held(state.params), held(state.moments)
    other = held(state) - parameters - moments + held(test) + 2 * held(raw)  # one block in use, the next on its way
    temporary = max(a.temp_size_in_bytes for a in (train.memory_analysis(), evaluate.memory_analysis()))
    return {'parameters': parameters, 'moments': moments, 'other': other, 'temporary': temporary,
            'sum': parameters + moments + other + temporary, 'step_flops': train.cost_analysis()['flops'],
            'arguments': train.memory_analysis().argument_size_in_bytes}


def report(run, programs, peak_rates) -> str:
    """The report on a run, as text."""
    task, d = stand_in(run), run.derived
    pieces = d.microbatches
    counts = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= jax.device_count() and run.opt.B // pieces % n == 0]
    found = {n: measure(run, task, programs, peak_rates, jax.devices()[:n])
             for n in tqdm(counts, desc=f'compiling for {", ".join(map(str, counts))} devices', leave=False)}
    lines = ['GB on each device, from XLA: ' + ('parameters and moments sharded (model.fsdp_enabled)' if run.model.fsdp_enabled
                                                else 'parameters and moments whole on each (model.fsdp_enabled=true shards them)'),
             f'{"devices":>8}{"parameters":>12}{"moments":>10}{"data, probe":>13}{"activations, temporaries":>26}{"sum":>9}']
    for n, m in found.items():
        lines.append(f'{n:>8}{m["parameters"] / 1e9:>12.3f}{m["moments"] / 1e9:>10.3f}{m["other"] / 1e9:>13.3f}'
                     f'{m["temporary"] / 1e9:>26.3f}{m["sum"] / 1e9:>9.3f}')
    seeds = len(run.all_seeds)
    flops = d.flops_per_token * d.tokens_per_step * seeds
    of = ', of one of its pieces' if pieces > 1 else ''
    lines += [f'FLOPs of a step: {flops:.3e} in matrix products and attention; XLA counts {found[1]["step_flops"]:.3e}, '
              f'elementwise work included{of}', f'hours, training alone, at {UTILISATION:.0%} of a chip\'s peak (assumed):']
    for name, (memory, single, half) in CHIPS.items():
        fits = [n for n, m in found.items() if m['sum'] <= memory]
        peak = half if run.model.dtype in ('bfloat16', 'float16') else single
        hours = flops * d.steps / (UTILISATION * peak) / 3600
        lines.append(f'  {name:<11} ' + (
            f'fits on {fits[0]}: {hours / fits[0]:.3g} h; {hours / max(found):.3g} h on {max(found)}' if fits else
            f'{memory / 1e9:.0f} GB are too few on up to {max(found)}; shard (model.fsdp_enabled=true), take smaller pieces '
            '(opt.B_max), or recompute (model.remat=true)'))
    return '\n'.join(lines)
