"""Where the time of a training step goes, by kind of operation:  python -m benchmarks.profile 'mlp ×1.*D=128$'

The rows of benchmarks.run whose description matches are trained for ten steps under JAX's profiler. Printed are the shares of the
step's time that the operations of the compiled program take on one device, and its largest operations. What is missing to 100% is
time in which a device waits, or works outside an operation that XLA records.
"""
import argparse
import collections
import gzip
import json
import re
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import data
import optimizer
from benchmarks import run as bench
from trainer import distributed, programs

STEPS = 10
KINDS = {'products': r'dot|ynn', 'exchange between devices': r'all-reduce|all-gather|reduce-scatter|collective',
         'reductions': 'reduce', 'copies': r'copy|transpose|concatenate|pad|slice',
         'elementwise': ''}  # the first pattern found in an operation's name


def compiled_steps(run):
    """(run_steps(state, count), state) of a run after two steps."""
    task = data.open_task(run, run.all_seeds)
    program, peak_lrs = programs.build(run, task), optimizer.peak_lrs(run)
    state = program.init(jax.vmap(jax.random.key)(jnp.array(run.all_seeds)), jax.device_put(task.test, program.test_sharding))
    rest = peak_lrs, jax.device_put(task.block(0), program.raw_sharding), np.ones(task.block_steps, np.float32), np.int32(0)
    compiled = program.train.lower(state, *rest, np.int32(1)).compile()

    def run_steps(state, count):
        return compiled(state, *rest, np.int32(count))

    return run_steps, jax.block_until_ready(run_steps(state, 2))


def operation_times(run_steps, state):
    """(seconds a step, {operation: seconds a step and device}) of a compiled training program."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            _, seconds = bench.timed(run_steps, state, STEPS)
        trace = json.loads(gzip.decompress(next(Path(folder).rglob('*.trace.json.gz')).read_bytes()))
    times = collections.Counter()
    for event in trace['traceEvents']:
        name = event.get('args', {}).get('hlo_op')
        if name and not name.startswith(('while', 'call', 'conditional')):  # these contain others
            times[name] += event['dur'] / 1e6 / STEPS / jax.device_count()
    return seconds / STEPS, times


def kind(operation):
    return next(name for name, pattern in KINDS.items() if re.search(pattern, operation))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0].split(':  ')[0])
    parser.add_argument('only', help='rows whose description matches this pattern')
    parser.add_argument('--operations', type=int, default=5, metavar='N', help='print the N largest operations')
    args = parser.parse_args()
    distributed.use_every_core()
    for work in bench.chosen(args.only):
        with bench.resolved(*work) as run:
            run_steps, state = compiled_steps(run)
        seconds, times = operation_times(run_steps, state)
        shares = collections.Counter()
        for operation, t in times.items():
            shares[kind(operation)] += t / seconds
        print(f"{work[0]} ×{work[1]} {' '.join(work[2])}: {1e3 * seconds:.1f} ms a step")
        for name, share in [*shares.most_common(), *((op, t / seconds) for op, t in times.most_common(args.operations))]:
            print(f'  {share:6.1%}  {name}')


if __name__ == '__main__':
    main()
