"""Speed of the training step as a share of this machine's matmul rate:  python -m benchmarks.run [--only TEXT] [--json FILE]

Each row runs the project's own training program on one configuration. The program makes its data. Evaluation is timed apart. The
FLOPs of a step are model.train_flops_per_token times the tokens: 6 for each weight in a matrix product, and 12·N·L·D a token for
attention, which counts all L² scores, also those that the causal mask drops. The matmul rate is measured beside each row. Times are
medians of five repeats.
"""
import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import hydra
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

import data
import model as models
import optimizer
import train
from trainer import config, distributed, process, programs, speed

REPEATS = 5
SECONDS = 1.5  # of device time a repeat

MLP = ['model.N=5', 'opt.lr=0.001', 'opt.readout_lr_mult=1', 'T=1e9']
TESTS = 'T_eval=32768'  # few test batches: an evaluation is compared with the passes over as many training batches
LM = ['model.N=3', 'opt.warmup_tokens=0', 'T=1e9', TESTS]
SHORT, LONG = ('chess', 128, 64), ('cifar5m', 1024, 8)  # (config, L, B) of the transformers: 8,192 tokens a step


def grid():
    """Yields the rows: (config name, number of seeds trained together, overrides)."""
    for D in (32, 64, 128, 256, 512, 1024):
        yield 'mlp', 1, [*MLP, TESTS, f'model.D={D}']
    for D in (32, 64, 128):
        yield 'mlp', 5, [*MLP, TESTS, f'model.D={D}']
    for name, L, B in (SHORT, LONG):
        for D in (64, 128, 256, 512):
            yield name, 1, [*LM, f'model.L={L}', f'opt.B={B}', f'model.D={D}']
    yield 'chess', 5, [*LM, 'model.L=128', 'opt.B=64', 'model.D=64']


def measure(name, seeds, overrides):
    """One row, {name: number} with times in seconds, of a configuration with this many seeds trained together."""
    with resolved(name, seeds, overrides) as run:
        return measure_run(run) | {'config': name, 'seeds': seeds}


@contextlib.contextmanager
def resolved(name, seeds, overrides):
    """The resolved run of a row. Its data are there while the context is open."""
    with hydra.initialize(version_base=None, config_path='../configs'), random_tokens() as folder:
        ds_path = [] if name == 'mlp' else [f'ds_path={folder}']
        yield config.resolve(hydra.compose(name, [*overrides, *ds_path, f'seeds={list(range(seeds))}', 'wandb_mode=disabled']))


def chosen(pattern):
    """The rows of the grid whose description matches."""
    return [row for row in grid() if re.search(pattern, f"{row[0]} ×{row[1]} {' '.join(row[2])}")]


@contextlib.contextmanager
def random_tokens():
    """The folder of a data set of uniform random tokens."""
    with tempfile.TemporaryDirectory() as folder:
        for split, n in (('train', 1 << 22), ('test', 1 << 17)):
            np.random.default_rng(0).integers(0, 54, n, np.uint8).tofile(Path(folder) / f'{split}.bin')
        yield folder


def measure_run(run):
    """measure() of a resolved run."""
    task = data.open_task(run, run.all_seeds)
    program = programs.build(run, task)
    mesh = program.test_sharding.mesh
    peak_lrs = optimizer.peak_lrs(run)
    test = jax.device_put(task.test, program.test_sharding)
    state = program.init(jnp.stack([jax.random.key(seed) for seed in run.all_seeds]), test)
    raw = jax.device_put(task.block(0), program.raw_sharding)
    lr_scales = np.ones(task.block_steps, np.float32)

    start = time.perf_counter()
    compiled = program.train.lower(state, peak_lrs, raw, lr_scales, np.int32(0), np.int32(1)).compile()
    evaluate = program.evaluate.lower(state, peak_lrs, test).compile()
    compile_seconds = time.perf_counter() - start

    def run_steps(state, count):
        return compiled(state, peak_lrs, raw, lr_scales, np.int32(0), np.int32(count))

    compile_part = partial(jax.jit, compiler_options=distributed.compiler_options(list(mesh.devices.flat)))
    draw = compile_part(partial(draw_batches, task, NamedSharding(mesh, PartitionSpec('data'))))
    update = compile_part(partial(update_weights, run, peak_lrs))
    multiply = compile_part(multiply_weights)
    weights = product_weights(run)
    inputs = {w.shape[1]: jnp.ones((len(run.all_seeds), run.opt.B * run.model.L, w.shape[1])) for w in weights}
    inputs = jax.device_put(inputs, NamedSharding(mesh, PartitionSpec(None, 'data')))
    weights = jax.device_put(weights, NamedSharding(mesh, PartitionSpec()))

    state = jax.block_until_ready(run_steps(state, 2))
    state, seconds = timed(run_steps, state, 3)
    n = int(np.clip(3 * SECONDS / seconds, 1, task.block_steps))
    jax.block_until_ready((draw(raw, 1), update(state, 1), multiply(weights, inputs, 1)))  # compiles them
    times = {name: [] for name in ('rate', 'step', 'data', 'optimiser', 'products', 'host', 'evaluation')}
    for _ in range(REPEATS):
        speed.matmul_rate.cache_clear()
        times['rate'].append(speed.matmul_rate())
        state, seconds = timed(run_steps, state, n)
        times['step'].append(seconds / n)
        times['data'].append(timed(draw, raw, n)[1] / n)
        times['optimiser'].append(timed(update, state, n)[1] / n)
        times['products'].append(timed(multiply, weights, inputs, n)[1] / n)
        state, seconds = timed(run_steps, state, 0)  # a dispatch without steps: what the host adds to each dispatch
        times['host'].append(seconds * times['step'][-1] / train.DISPATCH_SECONDS)
        (state, _), seconds = timed(evaluate, state, peak_lrs, test)
        times['evaluation'].append(seconds)
    median = {k: statistics.median(v) for k, v in times.items()}
    flops = run.derived.flops_per_token * run.derived.tokens_per_step * len(run.all_seeds)
    pass_seconds = median['step'] - median['data'] - median['optimiser']  # forward and backward: the least that a test batch takes
    memory = compiled.memory_analysis()
    return {'D': run.model.D, 'L': run.model.L, 'B': run.opt.B, 'p': run.derived.num_params,
            'flops_per_step': flops, 'matmul_rate': median['rate'], 'step_seconds': median['step'],
            'step_share': flops / median['step'] / median['rate'], 'data_seconds': median['data'],
            'optimiser_seconds': median['optimiser'], 'products_seconds': median['products'], 'host_seconds': median['host'],
            'evaluation_seconds': median['evaluation'], 'test_batches': run.derived.num_test_batches,
            'evaluation_over_passes': median['evaluation'] / run.derived.num_test_batches / pass_seconds,
            'bytes': memory.argument_size_in_bytes + memory.temp_size_in_bytes, 'compile_seconds': compile_seconds}


# Parts of a step, each timed alone for n steps

def draw_batches(task, sharding, raw, n):
    """Makes n training batches. Each is summed to a number, so that the compiler cannot leave it out."""
    def add(i, total):
        batch = jax.lax.with_sharding_constraint(task.batch(jax.tree.map(lambda a: a[i], raw)), sharding)
        return total + sum(jnp.sum(leaf, dtype=jnp.float32) for leaf in jax.tree.leaves(batch))

    return jax.lax.fori_loop(0, n, add, jnp.float32(0))


def update_weights(run, peak_lrs, state, n):
    """n updates by the optimiser, with the weights in place of a gradient."""
    def one_seed(state):
        updates, moments = optimizer.transformation(run).update(state.params, state.moments, state.params)
        return state._replace(params=optimizer.apply_updates(state.params, updates, peak_lrs, 1e-9), moments=moments)

    return jax.lax.fori_loop(0, n, lambda _, state: jax.vmap(one_seed)(state), state)


def multiply_weights(weights, inputs, n):
    """The three matrix products of training with each weight, n times. They are chained, so that none can be left out."""
    def one(w):
        x = inputs[w.shape[1]]
        y = jnp.einsum('sta,sab->stb', x, w)
        g = jnp.einsum('stb,sab->sta', y, w)
        w = jnp.einsum('sta,stb->sab', g, y)
        return w / (1e-6 + jnp.max(jnp.abs(w)))

    return jax.lax.fori_loop(0, n, lambda _, weights: list(map(one, weights)), weights)


def product_weights(run):
    """Random weights [S, a, b] of the shapes that the model multiplies by. A transformer's embeddings are looked up instead."""
    _, params, roles = models.structure(run.arch, run.model)
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(roles), strict=True)
    found = [w for w, role in pairs if run.arch == 'mlp' or role != 'input']
    rows = [w.shape[0] if w.shape[0] == run.model.D else w.size // w.shape[-1] for w in found]
    return [jax.random.normal(jax.random.key(i), (len(run.all_seeds), a, w.size // a))
            for i, (w, a) in enumerate(zip(found, rows, strict=True))]


def timed(function, *arguments):
    """(result, seconds) of a call."""
    start = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    return result, time.perf_counter() - start


# Whole processes

def time_process(overrides, cache):
    """(seconds to the first step, seconds to the end) of a `python train.py` with this folder as compilation cache."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, 'train.py', '-cn', 'mlp', *MLP, *overrides, 'wandb_mode=disabled', f'run_dir={folder}/run']
        start = time.time()
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, 'XDG_CACHE_HOME': cache})
        end = time.time()
        return (Path(folder) / 'run' / 'config.yaml').stat().st_mtime - start, end - start  # written once all is compiled


def processes():
    """{name: seconds}: to the first step with an empty and with a filled cache, and of a whole run with a filled one.

    The run has 500 steps and 4 evaluations at D = 128.
    """
    with tempfile.TemporaryDirectory() as cache:
        one_step = ['model.D=128', 'T=4096', 'num_evals=2']
        cold, warm = (time_process(one_step, cache)[0] for _ in range(2))
        whole = time_process(['model.D=128', f'T={500 * 4096}', 'num_evals=2'], cache)[1]
    return {'start_cold': cold, 'start_warm': warm, 'whole_process': whole}


def table(rows):
    """The rows as text. `share` is the step's FLOPs over its time at the matmul rate.

    The columns after it are shares of the step's time: making the data, the update, the host, the products with the weights (each
    timed alone), and the rest (elementwise operations, attention, loss).
    """
    lines = [f"{'work':<26}{'p':>12}{'step ms':>10}{'GFLOP/s':>9}{'share':>8} |{'data':>7}{'update':>8}"
             f"{'host':>6}{'products':>10}{'rest':>7} |{'eval s':>8}{'eval/passes':>13}{'MB':>7}{'compile s':>11}"]
    for r in rows:
        work = f"{r['config']} D={r['D']} L={r['L']} B={r['B']} ×{r['seeds']}"
        shares = [r[f'{part}_seconds'] / r['step_seconds'] for part in ('data', 'optimiser', 'host', 'products')]
        made, update, host, products, rest = *shares, 1 - sum(shares)
        lines.append(f"{work:<26}{r['p']:>12,}{1e3 * r['step_seconds']:>10.2f}{r['flops_per_step'] / r['step_seconds'] / 1e9:>9.1f}"
                     f"{r['step_share']:>8.1%} |{made:>7.1%}{update:>8.1%}{host:>6.1%}{products:>10.1%}{rest:>7.1%}"
                     f" |{r['evaluation_seconds']:>8.2f}{r['evaluation_over_passes']:>13.2f}{r['bytes'] / 1e6:>7.0f}"
                     f"{r['compile_seconds']:>11.1f}")
    return '\n'.join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--only', default='', help='rows whose description matches this pattern, e.g. "mlp.*D=64$"')
    parser.add_argument('--json', help='write the rows to this file')
    args = parser.parse_args()
    distributed.use_every_core()
    process.enable_compilation_cache()
    rows = [measure(*row) for row in tqdm(chosen(args.only), desc='bench', file=sys.stderr)]
    device = jax.devices()[0].device_kind
    if rows:
        print(f'{device}, matmul rate {statistics.median(r["matmul_rate"] for r in rows) / 1e9:.0f} GFLOP/s (float32, [2048]³, '
              f'measured beside each row); medians of {REPEATS}')
        print(table(rows))
    whole = {} if args.only else processes()
    if whole:
        print('start-up to the first step {start_cold:.1f} s cold, {start_warm:.1f} s warm; mlp D=128, 500 steps and 4 '
              'evaluations, whole process {whole_process:.1f} s'.format(**whole))
    if args.json:
        revision = subprocess.run(['git', 'describe', '--always', '--dirty'], capture_output=True, text=True).stdout.strip()
        Path(args.json).write_text(json.dumps({'device': device, 'revision': revision, 'rows': rows, 'processes': whole}, indent=1))


if __name__ == '__main__':
    main()
