"""Speed of the training step as a share of this machine's matmul rate:  python -m benchmarks.run [--quick] [--json FILE]

Every row is the project's own training program on its own configuration, data made inside, evaluation timed apart. FLOPs of a step
are model.train_flops_per_token times the tokens; the matmul rate is measured beside each row. Medians of five repeats.
"""
import argparse
import json
import statistics
import subprocess
import sys
import time

import hydra
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import config
import data
import train

MLP = ['arch=mlp', 'model.N=5', 'opt.lr=0.001', 'opt.readout_lr_mult=1', 'T=1e9', 'wandb_mode=disabled']
WORK = [
    *(('mlp', 1, [*MLP, f'model.D={D}']) for D in (64, 128, 256, 512)),
    *(('mlp', 5, [*MLP, f'model.D={D}']) for D in (32, 64)),
]
REPEATS = 5
SECONDS = 2.0  # of device time a repeat


def measure(name, seeds, overrides):
    """One row: {name: number}, times in seconds, for one configuration trained with this many fused seeds."""
    with hydra.initialize(version_base=None, config_path='../configs'):
        run = config.resolve(hydra.compose(name, [*overrides, f'seeds={list(range(seeds))}']))
    task = data.open_task(run, run.all_seeds)
    program = train.programs(run, task)
    peak_lrs = train.peak_rates(run)
    state = program.init(jnp.stack([jax.random.key(seed) for seed in run.all_seeds]), task.test)
    raw = jax.device_put(task.block(0), program.raw_sharding)
    s = np.ones(task.block_steps, np.float32)

    start = time.perf_counter()
    step = program.train.lower(state, peak_lrs, raw, s, np.int32(0), np.int32(1)).compile()
    evaluate = program.evaluate.lower(state, peak_lrs, task.test).compile()
    compile_seconds = time.perf_counter() - start
    make_data = jax.jit(lambda raw, n: jax.lax.fori_loop(
        0, n, lambda i, sums: jax.tree.map(lambda a, b: a + b.sum(), sums, task.batch(jax.tree.map(lambda a: a[i], raw))),
        data.Batch(0.0, 0.0, 0)))

    state = jax.block_until_ready(step(state, peak_lrs, raw, s, np.int32(0), np.int32(2)))
    state, seconds = timed(lambda: step(state, peak_lrs, raw, s, np.int32(0), np.int32(3)))
    n = int(np.clip(3 * SECONDS / seconds, 1, task.block_steps))
    times = {'step': [], 'data': [], 'rate': [], 'evaluation': []}
    jax.block_until_ready(make_data(raw, 1))
    for _ in range(REPEATS):
        train.matmul_rate.cache_clear()
        times['rate'].append(train.matmul_rate())
        state, seconds = timed(lambda state=state: step(state, peak_lrs, raw, s, np.int32(0), np.int32(n)))
        times['step'].append(seconds / n)
        times['data'].append(timed(lambda: make_data(raw, n))[1] / n)
        (state, _), seconds = timed(lambda state=state: evaluate(state, peak_lrs, task.test))
        times['evaluation'].append(seconds)
    median = {k: statistics.median(v) for k, v in times.items()}
    flops = run.derived.flops_per_token * run.derived.tokens_per_step * seeds
    return {'config': name, 'D': run.model.D, 'L': run.model.L, 'B': run.opt.B, 'seeds': seeds, 'p': run.derived.num_params,
            'flops_per_step': flops, 'matmul_rate': median['rate'], 'step_seconds': median['step'],
            'step_share': flops / median['step'] / median['rate'], 'data_seconds': median['data'],
            'evaluation_seconds': median['evaluation'], 'test_batches': run.derived.num_test_batches,
            # forward and backward passes over the same batches are the floor: a step's time less its data
            'evaluation_over_passes': median['evaluation'] / run.derived.num_test_batches / (median['step'] - median['data']),
            'compile_seconds': compile_seconds}


def timed(call):
    start = time.perf_counter()
    result = jax.block_until_ready(call())
    return result, time.perf_counter() - start


def table(rows):
    heads = (('p', 11), ('step ms', 10), ('GFLOP/s', 9), ('share', 8), ('data', 7), ('eval s', 8), ('eval/passes', 12),
             ('compile s', 11))
    lines = [f"{'work':<22}" + ''.join(f'{name:>{width}}' for name, width in heads)]
    for r in rows:
        work = f"{r['config']} D={r['D']} L={r['L']} ×{r['seeds']}"
        lines.append(f"{work:<22}{r['p']:>11,}{1e3 * r['step_seconds']:>10.2f}{r['flops_per_step'] / r['step_seconds'] / 1e9:>9.1f}"
                     f"{r['step_share']:>8.1%}{r['data_seconds'] / r['step_seconds']:>7.1%}{r['evaluation_seconds']:>8.2f}"
                     f"{r['evaluation_over_passes']:>12.2f}{r['compile_seconds']:>11.1f}")
    return '\n'.join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--only', help='rows whose description holds this text, e.g. D=64')
    parser.add_argument('--json', help='write the rows to this file')
    args = parser.parse_args()
    train.enable_compilation_cache()
    work = [w for w in WORK if not args.only or args.only in ' '.join(w[2])]
    rows = [measure(*w) for w in tqdm(work, desc='bench', file=sys.stderr)]
    device = jax.devices()[0].device_kind
    print(f'{device}, matmul rate {statistics.median(r["matmul_rate"] for r in rows) / 1e9:.0f} GFLOP/s (float32, [2048]³, '
          f'measured beside each row); medians of {REPEATS}; data is inside the step, as a share of it')
    print(table(rows))
    if args.json:
        revision = subprocess.run(['git', 'describe', '--always', '--dirty'], capture_output=True, text=True).stdout.strip()
        with open(args.json, 'w') as f:
            json.dump({'device': device, 'revision': revision, 'rows': rows}, f, indent=1)


if __name__ == '__main__':
    main()
