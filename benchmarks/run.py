"""Speed of the training step as a share of this machine's matmul rate:  python -m benchmarks.run [--only TEXT] [--json FILE]

Every row is the project's own training program on its own configuration, data made inside, evaluation timed apart. FLOPs of a step
are model.train_flops_per_token times the tokens: 6 a weight used in a matrix product, and 12·N·L·D a token for attention (all L²
of its scores, also those that the causal mask drops). The matmul rate is measured beside each row. Medians of five repeats.
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
TESTS = 'T_eval=32768'  # an evaluation is compared with its passes, of which a few will do
LM = ['model.N=3', 'opt.warmup_tokens=0', 'T=1e9', TESTS]
SHORT, LONG = ('chess', 128, 64), ('cifar5m', 1024, 8)  # (config, L, B) of the transformers: 8,192 tokens a step


def grid():
    """The rows: (config name, number of fused seeds, overrides)."""
    for D in (32, 64, 128, 256, 512, 1024):
        yield 'mlp', 1, [*MLP, TESTS, f'model.D={D}']
    for D in (32, 64, 128):
        yield 'mlp', 5, [*MLP, TESTS, f'model.D={D}']
    for name, L, B in (SHORT, LONG):
        for D in (64, 128, 256, 512):
            yield name, 1, [*LM, f'model.L={L}', f'opt.B={B}', f'model.D={D}']
    yield 'chess', 5, [*LM, 'model.L=128', 'opt.B=64', 'model.D=64']


def measure(name, seeds, overrides):
    """One row: {name: number}, times in seconds, for one configuration trained with this many fused seeds."""
    with hydra.initialize(version_base=None, config_path='../configs'), random_tokens() as folder:
        where = [] if name == 'mlp' else [f'ds_path={folder}']
        run = config.resolve(hydra.compose(name, [*overrides, *where, f'seeds={list(range(seeds))}', 'wandb_mode=disabled']))
        return measure_run(run) | {'config': name, 'seeds': seeds}


@contextlib.contextmanager
def random_tokens():
    """A data set of uniform tokens: speed does not depend on what they say."""
    with tempfile.TemporaryDirectory() as folder:
        for split, n in (('train', 1 << 22), ('test', 1 << 17)):
            np.random.default_rng(0).integers(0, 54, n, np.uint8).tofile(Path(folder) / f'{split}.bin')
        yield folder


def measure_run(run):
    S = len(run.all_seeds)
    task = data.open_task(run, run.all_seeds)
    program = programs.build(run, task)
    peak_lrs = optimizer.peak_lrs(run)
    test = jax.device_put(task.test, program.test_sharding)
    state = program.init(jnp.stack([jax.random.key(seed) for seed in run.all_seeds]), test)
    raw = jax.device_put(task.block(0), program.raw_sharding)
    s = np.ones(task.block_steps, np.float32)

    start = time.perf_counter()
    step = program.train.lower(state, peak_lrs, raw, s, np.int32(0), np.int32(1)).compile()
    evaluate = program.evaluate.lower(state, peak_lrs, test).compile()
    compile_seconds = time.perf_counter() - start

    mesh = program.test_sharding.mesh
    share = NamedSharding(mesh, PartitionSpec('data'))

    def batches(raw, n):  # the training batches alone, each reduced to a number so that it is really made
        def add(i, total):
            batch = jax.lax.with_sharding_constraint(task.batch(jax.tree.map(lambda a: a[i], raw)), share)
            return total + sum(jnp.sum(leaf, dtype=jnp.float32) for leaf in jax.tree.leaves(batch))
        return jax.lax.fori_loop(0, n, add, jnp.float32(0))

    def updates(state, n):  # the optimiser alone, the weights standing for a gradient
        def one(state):
            u, moments = optimizer.adam(run).update(state.params, state.moments, state.params)
            return state._replace(params=optimizer.apply_updates(state.params, u, peak_lrs, 1e-9), moments=moments)
        return jax.lax.fori_loop(0, n, lambda _, state: jax.vmap(one)(state), state)

    def chains(weights, x, n):  # for each weight the three products of its training, chained so that none can be left out
        def one(w):
            h = x[w.shape[1]]
            y = jnp.einsum('sta,sab->stb', h, w)
            g = jnp.einsum('stb,sab->sta', y, w)
            w = jnp.einsum('sta,stb->sab', g, y)
            return w / (1e-6 + jnp.max(jnp.abs(w)))
        return jax.lax.fori_loop(0, n, lambda _, weights: list(map(one, weights)), weights)

    options = distributed.compiler_options(list(mesh.devices.flat))
    make, update, multiply = (jax.jit(part, compiler_options=options) for part in (batches, updates, chains))
    weights = product_weights(run, S)
    x = {w.shape[1]: jnp.ones((S, run.opt.B * run.model.L, w.shape[1])) for w in weights}
    x = jax.device_put(x, NamedSharding(mesh, PartitionSpec(None, 'data')))
    weights = jax.device_put(weights, NamedSharding(mesh, PartitionSpec()))
    state = jax.block_until_ready(step(state, peak_lrs, raw, s, np.int32(0), np.int32(2)))
    state, seconds = timed(lambda: step(state, peak_lrs, raw, s, np.int32(0), np.int32(3)))
    n = int(np.clip(3 * SECONDS / seconds, 1, task.block_steps))
    for warm in (lambda: make(raw, 1), lambda: update(state, 1), lambda: multiply(weights, x, 1)):
        jax.block_until_ready(warm())
    times = {name: [] for name in ('rate', 'step', 'data', 'optimiser', 'products', 'host', 'evaluation')}
    for _ in range(REPEATS):
        speed.matmul_rate.cache_clear()
        times['rate'].append(speed.matmul_rate())
        state, seconds = timed(lambda state=state: step(state, peak_lrs, raw, s, np.int32(0), np.int32(n)))
        times['step'].append(seconds / n)
        times['data'].append(timed(lambda: make(raw, n))[1] / n)
        times['optimiser'].append(timed(lambda state=state: update(state, n))[1] / n)
        times['products'].append(timed(lambda: multiply(weights, x, n))[1] / n)
        state, seconds = timed(lambda state=state: step(state, peak_lrs, raw, s, np.int32(0), np.int32(0)))  # no step at all
        times['host'].append(seconds / train.DISPATCH_SECONDS * times['step'][-1])  # once a stretch: its share of a step
        (state, _), seconds = timed(lambda state=state: evaluate(state, peak_lrs, test))
        times['evaluation'].append(seconds)
    median = {k: statistics.median(v) for k, v in times.items()}
    flops = run.derived.flops_per_token * run.derived.tokens_per_step * S
    memory = step.memory_analysis()
    return {'D': run.model.D, 'L': run.model.L, 'B': run.opt.B, 'p': run.derived.num_params,
            'flops_per_step': flops, 'matmul_rate': median['rate'], 'step_seconds': median['step'],
            'step_share': flops / median['step'] / median['rate'], 'data_seconds': median['data'],
            'optimiser_seconds': median['optimiser'], 'products_seconds': median['products'], 'host_seconds': median['host'],
            'evaluation_seconds': median['evaluation'], 'test_batches': run.derived.num_test_batches,
            # forward and backward passes over the same batches are the floor: a step's time less its data and its update
            'evaluation_over_passes': median['evaluation'] / run.derived.num_test_batches
            / (median['step'] - median['data'] - median['optimiser']),
            'bytes': memory.argument_size_in_bytes + memory.temp_size_in_bytes, 'compile_seconds': compile_seconds}


def product_weights(run, S):
    """Weights of the shapes [S, a, b] that the model multiplies by, random; a transformer's embeddings are looked up."""
    _, params, roles = models.structure(run.arch, run.model)
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(roles), strict=True)
    found = [w for w, role in pairs if run.arch == 'mlp' or role != 'input']
    rows = [w.shape[0] if w.shape[0] == run.model.D else w.size // w.shape[-1] for w in found]
    return [jax.random.normal(jax.random.key(i), (S, a, w.size // a)) for i, (w, a) in enumerate(zip(found, rows, strict=True))]


def timed(call):
    start = time.perf_counter()
    result = jax.block_until_ready(call())
    return result, time.perf_counter() - start


def time_process(overrides, cache):
    """(seconds from the start of a `python train.py` to its first step, wall seconds of all of it) with this compilation cache."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, 'train.py', '-cn', 'mlp', *MLP, *overrides, 'wandb_mode=disabled', f'run_dir={folder}/run']
        start = time.time()
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, 'XDG_CACHE_HOME': cache})
        return (Path(folder) / 'run' / 'config.yaml').stat().st_mtime - start, time.time() - start  # written when all is compiled


def processes():
    """Seconds to the first step with an empty compilation cache and a second time, and the wall time of 500 steps with 4
    evaluations at D = 128, with that cache: {name: seconds}."""
    with tempfile.TemporaryDirectory() as cache:
        one_step = ['model.D=128', 'T=4096', 'num_evals=2']
        cold, warm = (time_process(one_step, cache)[0] for _ in range(2))
        whole = time_process(['model.D=128', f'T={500 * 4096}', 'num_evals=2'], cache)[1]
    return {'start_cold': cold, 'start_warm': warm, 'whole_process': whole}


def table(rows):
    """Text: a line a row; the columns after `share` say where a step's time goes, as shares of it: making the data, the update, the
    host, the products with the weights (timed alone), and the rest (elementwise operations, attention, loss)."""
    lines = [f"{'work':<26}{'p':>12}{'step ms':>10}{'GFLOP/s':>9}{'share':>8} |{'data':>7}{'update':>8}"
             f"{'host':>6}{'products':>10}{'rest':>7} |{'eval s':>8}{'eval/passes':>13}{'MB':>7}{'compile s':>11}"]
    for r in rows:
        work = f"{r['config']} D={r['D']} L={r['L']} B={r['B']} ×{r['seeds']}"
        parts = [r[f'{part}_seconds'] / r['step_seconds'] for part in ('data', 'optimiser', 'host', 'products')]
        made, update, host, products, rest = *parts, 1 - sum(parts)
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
    work = [w for w in grid() if re.search(args.only, f"{w[0]} ×{w[1]} {' '.join(w[2])}")]
    rows = [measure(*w) for w in tqdm(work, desc='bench', file=sys.stderr)]
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
