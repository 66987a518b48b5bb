"""Training steps on GPUs or TPUs as shares of their peak, beside the bound of the dry run:  python -m benchmarks.chip h100

Each row trains one configuration of the paper with the project's own programs, on zeros as tokens. Times are medians of five.
"""
import argparse
import json
import os
import statistics
import time

import hydra
import jax
import jax.numpy as jnp
import numpy as np

import optimizer
from token_files.atomic import atomic_write
from trainer import chips, config, distributed, dry_run, programs

TRANSFORMERS = [('chess', D, 512, 1) for D in (768, 1280, 2048)] + [('cifar5m', 1024, 64, 1)]
MLPS = [('mlp', D, 4096, seeds) for D in (512, 2048) for seeds in (1, 5)]
STEPS = 20


def measure(run, chip):
    """One row, {name: value}: seconds of a step, its share of the chip's peak and the bound, memory by plan and as used."""
    jax.config.update('jax_default_matmul_precision', run.matmul_precision)
    task, devices = dry_run.open_stand_in(run), distributed.devices_for(run.opt.B, run.derived.microbatches)
    found = dry_run.measure(run, task, devices)
    if 'programs' not in found:
        return {'asked_bytes': found['peak_bytes']}  # more than there is
    program, (train, _) = programs.build(run, task, devices), found['programs']
    test = jax.device_put(task.test, program.test_sharding)
    state = program.init(jnp.stack([jax.random.key(seed) for seed in run.all_seeds]), test)
    raw, lr_scales = jax.device_put(task.block(0), program.raw_sharding), np.ones(task.block_steps, np.float32)
    count, seconds = min(STEPS, task.block_steps), []
    for _ in range(6):
        start = time.perf_counter()
        state = train(state, optimizer.peak_lrs(run), raw, lr_scales, np.int32(0), np.int32(count))
        float(state.loss_sum[0])  # waits for the devices
        seconds.append((time.perf_counter() - start) / count)
    step = statistics.median(seconds[1:])
    peak = chips.peak_flops(chip, run) * len(devices)
    used = devices[0].memory_stats() or {}
    return {'step_seconds': step, 'share_of_peak': dry_run.step_flops(run) / step / peak,
            'bound': dry_run.estimate(run, chip, found, len(devices), exact=True)['bound'],
            'tokens_per_second': run.derived.tokens_per_step * len(run.all_seeds) / step, 'peak_bytes': found['peak_bytes'],
            'peak_bytes_in_use': used.get('peak_bytes_in_use'), 'loss': [float(x) for x in state.loss_sum / state.loss_count]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('chip', choices=[name for name, chip in chips.CHIPS.items() if 'compile' in chip])
    parser.add_argument('--json', help='file for the rows')
    parser.add_argument('overrides', nargs='*', help='configuration keys of all rows, e.g. model.D=64 T_eval=65536')
    arguments = parser.parse_args()
    rows = []
    with hydra.initialize_config_dir(os.fspath(config.CONFIGS), version_base=None):
        for name, D, B, seeds in TRANSFORMERS + MLPS:
            for dtype in ('float32', 'bfloat16'):
                words = [f'model.D={D}', f'opt.B={B}', f'seeds={list(range(seeds))}', f'model.dtype={dtype}', *arguments.overrides]
                words += [] if name == 'mlp' else ['ds_path=absent']
                rows.append({'config': name, 'D': D, 'seeds': seeds, 'dtype': dtype, 'device': jax.devices()[0].device_kind,
                             'devices': jax.device_count(), **measure(config.resolve(hydra.compose(name, words)), arguments.chip)})
                print(json.dumps(rows[-1]), flush=True)
    if arguments.json:
        atomic_write(arguments.json, json.dumps(rows, indent=2) + '\n')


if __name__ == '__main__':
    main()
