"""The cost of a run from its compiled programs, which are not executed: memory, FLOPs, bytes, collectives and hours.

The compiler is that of the chip, if its package is installed, otherwise that of this machine, which stands in for eight devices.
"""
import dataclasses
import json
import re
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import data
import optimizer
from token_files.atomic import atomic_write
from trainer import chips, programs

ROW = '{:>8}{:>12}{:>10}{:>13}{:>26}{:>9}{:>9}  {}'
COLUMNS = ('parameters', 'moments', 'other', 'temporary', 'sum', 'peak_bytes')
UTILISATION = 0.4  # share of a chip's peak that is assumed for the hours


def open_stand_in(run) -> data.Task:
    """The run's task with a single test batch, over files of zeros if the data are not there."""
    run = dataclasses.replace(run, derived=dataclasses.replace(run.derived, num_test_batches=1))
    if run.ds_path in data.GENERATED or Path(run.ds_path).is_dir():
        return data.open_task(run, run.all_seeds)
    with tempfile.TemporaryDirectory() as folder:
        for split in ('train', 'test'):
            with open(f'{folder}/{split}.bin', 'wb') as file:
                file.truncate(run.opt.B * run.model.L)
        return data.open_task(dataclasses.replace(run, ds_path=folder), run.all_seeds)


def measure(run, task, devices) -> dict:
    """What the training step and the evaluation need on each of these devices.

    Bytes by what holds them: 'temporary' is the larger of a training step's and an evaluation's, 'sum' is all of it, and
    'peak_bytes' the most in use at once. 'flops', 'bytes' to and from memory, and the bytes of 'collectives' by kind, are a
    training step's. If a compiler refuses a program for its size, there are the first three and 'peak_bytes', what it asked for.
    """
    test = jax.tree.map(lambda a: jax.ShapeDtypeStruct((run.derived.num_test_batches, *a.shape[1:]), a.dtype), task.test)
    program = programs.build(run, task._replace(test=test), devices)
    keys = jax.eval_shape(lambda: jnp.stack([jax.random.key(seed) for seed in run.all_seeds]))

    def placed(tree, sharding):
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)

    def held(tree):
        return sum(int(np.prod(a.sharding.shard_shape(a.shape))) * a.dtype.itemsize for a in jax.tree.leaves(tree))

    test, raw = placed(test, program.test_sharding), placed(task.block(0), program.raw_sharding)
    state = jax.tree.map(placed, program.init.lower(keys, test).out_info, program.state_shardings)
    lr_scales, peak_lrs = np.zeros(task.block_steps, np.float32), optimizer.peak_lrs(run)
    train = program.train.lower(state, peak_lrs, raw, lr_scales, np.int32(0), np.int32(1))
    evaluate = program.evaluate.lower(state, peak_lrs, test)
    found = {'parameters': held(state.params), 'moments': held(state.moments)}
    found['other'] = held(state) - sum(found.values()) + held(test) + 2 * held(raw)  # a second block of data is read ahead
    try:
        train, evaluate = train.compile(), evaluate.compile()
    except jax.errors.JaxRuntimeError as error:
        if (asked := re.search(r'Used ([\d.]+)([GM]) of', str(error))) is None:
            raise
        return found | {'peak_bytes': float(asked[1]) * 2**{'G': 30, 'M': 20}[asked[2]]}
    memory = [train.memory_analysis(), evaluate.memory_analysis()]
    besides = [held(test) + held(raw), 2 * held(raw)]  # what each program is not given stays where it is
    found['temporary'] = max(m.temp_size_in_bytes for m in memory)
    collectives = {}
    for kind, _, size in chips.collectives(train.as_text()):
        collectives[kind] = collectives.get(kind, 0) + size
    return found | {'sum': sum(found.values()), 'arguments': memory[0].argument_size_in_bytes, **chips.costs(train),
                    'peak_bytes': max(max(m.peak_memory_in_bytes, m.argument_size_in_bytes) + size
                                      for m, size in zip(memory, besides, strict=True)),
                    'collectives': collectives, 'programs': (train, evaluate)}


def step_flops(run) -> float:
    """FLOPs of the matrix products and the attention of a step, all seeds together."""
    return run.derived.flops_per_token * run.derived.tokens_per_step * len(run.all_seeds)


def estimate(run, name, found, n, exact) -> dict:
    """Whether a run fits on n chips, from what `measure` found, and its hours. exact: the chip's own compiler was asked.

    bound is the share of the chip's peak that a training step can reach at most, given its FLOPs and bytes (the roofline). The
    hours of training, without evaluations, are those at UTILISATION of the peak, or at the bound where that is lower.
    """
    chip, peak, flops, bound = chips.CHIPS[name], chips.peak_flops(name, run), step_flops(run) / n, None
    if exact and 'sum' in found:  # XLA counts a loop over the pieces of a batch once
        seconds = run.derived.microbatches * max(found['flops'] / peak, found['bytes'] / chip['bandwidth'])
        bound = min(1.0, flops / peak / seconds)
    return {'fits': 'sum' in found and found['peak_bytes' if exact else 'sum'] <= chip['memory'], 'bound': bound,
            'hours': flops * run.derived.steps / (min(UTILISATION, bound or 1) * peak) / 3600}


def report(run) -> str:
    """The report on a run, as text. Writes run.dry_run_json, if given: bytes, a step's FLOPs on each device, hours."""
    jax.config.update('jax_default_matmul_precision', run.matmul_precision)
    if run.dry_run_chip:
        jax.config.update('jax_platforms', 'cpu')  # libtpu is installed, and this machine has no TPU
    task, chip, pieces = open_stand_in(run), run.dry_run_chip, run.derived.microbatches
    own = chips.devices(chip) if chip else None
    devices, exact = own or jax.devices(), own is not None
    counts = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= len(devices) and run.opt.B // pieces % n == 0]
    found = {n: measure(run, task, list(devices[:n]))
             for n in tqdm(counts, desc=f'compiling for {", ".join(map(str, counts))} devices', leave=False)}
    estimates = {name: {n: estimate(run, name, m, n, exact) for n, m in found.items()}
                 for name in ([chip] if chip else chips.CHIPS)}
    attention = programs.attention_of(run, devices[0])
    if run.dry_run_json:
        figures = {n: {k: v for k, v in m.items() if k != 'programs'} | estimates.get(chip, {}).get(n, {})
                   for n, m in found.items()}
        atomic_write(run.dry_run_json, json.dumps({'chip': chip, 'compiled_for': devices[0].device_kind, 'own_compiler': exact,
                                                   'attention': attention, 'devices': figures}, indent=2) + '\n')
    stand_in = f"; these figures are a stand-in's: {chips.missing(chip)}" if chip and not exact else ''
    lines = [f'compiled for {chips.CHIPS[chip]["label"]} by its own compiler' if exact else
             f'compiled for {devices[0].platform}; temporaries differ on other platforms{stand_in}',
             f'attention: {attention or "none"}',
             'GB on each device: parameters and moments ' + ('sharded (model.fsdp_enabled)' if run.model.fsdp_enabled else
                                                             'whole on each (model.fsdp_enabled=true shards them)'),
             ROW.format('devices', 'parameters', 'moments', 'data, probe', 'activations, temporaries', 'sum', 'peak',
                        'collectives')]
    for n, m in found.items():
        shown = [k for k in COLUMNS if k in m and (exact or k != 'peak_bytes')]  # that of XLA on CPUs leaves out temporaries
        sizes = (f'{m[k] / 1e9:.3f}' if k in shown else '' for k in COLUMNS)
        lines.append(ROW.format(n, *sizes, ', '.join(f'{k} {v / 1e9:.3f}' for k, v in m.get('collectives', {}).items())))
    counted = ', '.join(f'{m["flops"]:.3e}' for m in found.values() if 'sum' in m)
    lines += [f'FLOPs of a step: {step_flops(run):.3e} in matrix products and attention; XLA counts {counted or "none"} on each '
              f'device, with elementwise work{", for one of its pieces" if pieces > 1 else ""}',
              f"hours of training, without evaluations, at {UTILISATION:.0%} of a chip's peak (assumed)"
              f'{", or at the bound of its memory bandwidth if that is lower" if exact else ""}:']
    for name, by_count in estimates.items():
        fits, last = [n for n, e in by_count.items() if e['fits']], max(by_count)
        hours = [f'{by_count[n]["hours"]:.3g} h' + (f' (at most {by_count[n]["bound"]:.0%} of peak)' if exact else '') + f' on {n}'
                 for n in (fits[1:] if exact else [last])]
        lines.append(f'  {chips.CHIPS[name]["label"]:<11} ' + (
            '; '.join([f'fits on {fits[0]}: {by_count[fits[0]]["hours"]:.3g} h', *hours]) if fits else
            f'does not fit in {chips.CHIPS[name]["memory"] / 1e9:.0f} GB on up to {last}; shard (model.fsdp_enabled=true), use '
            'smaller pieces (opt.B_max), compute in bfloat16 (model.dtype), or recompute (model.remat=true)'))
    return '\n'.join(lines)
