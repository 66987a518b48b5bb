"""Trains one configuration, all its seeds at once, to its horizon:  python train.py -cn mlp opt.lr=0.001 …

The Hydra entry and the one loop that holds state. Functions are written for one seed; `fused` is the one place that maps them over
several. What is jitted is a pure function of pytrees; between two evaluations the device runs stretches of steps on its own.
"""
import functools
import os
import re
import signal
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from hydra.errors import HydraException
from jax.sharding import NamedSharding, PartitionSpec
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

import data
import model as models
import optimizer
from trainer import checkpoint, config, dry_run
from trainer import distributed as hosts
from trainer import run_folder as record
from trainer import wandb_logger as mirror

STRETCH_SECONDS = 1.0  # the device runs alone this long: host costs vanish, the bar moves and a signal is answered
PROBE_ENTRIES = 1 << 24  # features (or logits) kept between evaluations, for their change: 64 MB at most

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)

# What has no value before the first update: no second moment, no training loss, nothing to have changed since.
UNDEFINED_AT_START = ('Buvar', 'uvar', 'u2_mean', 'umean2', 'train_loss', 'dh', 'df')


class State(NamedTuple):
    """All that a run needs to go on, for one seed (fused: every leaf has the seeds in front)."""
    params: Any
    moments: Any          # the optimiser's
    step: jax.Array       # updates done
    loss_sum: jax.Array   # of the training batches since the last evaluation
    loss_count: jax.Array
    probe: tuple          # features and logits of the first test batch at the last evaluation


class Programs(NamedTuple):
    """The three jitted programs of a run, over all its seeds, and where their data lives."""
    init: Any      # (keys [S, …], test) -> State
    train: Any     # (state, peak_lrs, raw data [M, …], s [M], first, count) -> State, `count` steps on from the block's `first`
    evaluate: Any  # (state, peak_lrs, test) -> State, {name: [S]}
    raw_sharding: Any   # of the raw data and of the test batches: examples are split over all devices
    test_sharding: Any
    state_homes: Any


def programs(run, task, devices=None) -> Programs:
    graphdef, _, _ = models.structure(run.arch, run.model)
    adam = optimizer.adam(run)
    probe_rows = max(1, min(run.opt.B // run.derived.microbatches, PROBE_ENTRIES // (run.model.L * max(run.model.D, run.model.V))))

    def loss_sum(params, batch):
        f, _ = nnx.merge(graphdef, params)(batch.x)
        return data.weighted_sum(task.loss(f, batch.y), batch.weight)

    def gradient(params, batch):
        """((loss sum, weight), gradient of the mean loss), the batch taken in run.derived.microbatches pieces."""
        def piece(batch):
            (total, weight), g = jax.value_and_grad(loss_sum, has_aux=True)(params, batch)
            return total, weight, g

        n = run.derived.microbatches
        if n == 1:
            total, weight, g = piece(batch)
        else:
            # Every n-th example, not B/n in a row, so that each device has its share of each piece and no other's.
            pieces = jax.tree.map(lambda a: a.reshape(-1, n, *a.shape[1:]).swapaxes(0, 1), batch)
            zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(piece, jax.tree.map(lambda a: a[0], pieces)))
            (total, weight, g), _ = jax.lax.scan(lambda acc, b: (jax.tree.map(jnp.add, acc, piece(b)), None), zero, pieces)
        return (total, weight), jax.tree.map(lambda g: g / jnp.maximum(weight, 1), g)  # weight 0: nothing counts, the gradient is 0

    def probe(params, test):
        f, h = nnx.merge(graphdef, params)(test.x[0, :probe_rows])
        return h.astype(jnp.float32), f

    def init(key, test):
        params = models.init(run.arch, run.model, key)
        empty = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(probe, params, test))
        return State(params, adam.init(params), jnp.int32(0), jnp.float32(0), jnp.int32(0), empty)

    def train_step(state, peak_lrs, batch, s):
        (total, weight), g = gradient(state.params, batch)
        updates, moments = adam.update(g, state.moments, state.params)
        params = optimizer.descend(state.params, updates, peak_lrs, s)
        return state._replace(params=params, moments=moments, step=state.step + 1,
                              loss_sum=state.loss_sum + total / jnp.maximum(weight, 1), loss_count=state.loss_count + 1)

    def train(state, peak_lrs, raw, s, first, count):
        def one_step(i, state):
            batch = jax.lax.with_sharding_constraint(task.batch(jax.tree.map(lambda a: a[i], raw)), over_devices(per_seed))
            step = fused(train_step, state=0, peak_lrs=None, batch=0 if task.per_seed else None, s=None)
            return step(state, peak_lrs, batch, s[i])

        return jax.lax.fori_loop(first, first + count, one_step, state)

    def evaluate(state, peak_lrs, test):
        P = optimizer.preconditioner(state.moments, peak_lrs, run)
        (totals, weights), trace = optimizer.gradient_trace(lambda b: gradient(state.params, b), test, P, run.opt.B)
        h, f = probe(state.params, test)
        metrics = {'test_loss': jnp.sum(totals) / jnp.sum(weights), 'train_loss': state.loss_sum / state.loss_count, **trace,
                   'h': rms(h), 'f': rms(f), 'dh': rms(h - state.probe[0]), 'df': rms(f - state.probe[1])}
        return state._replace(loss_sum=jnp.float32(0), loss_count=jnp.int32(0), probe=(h, f)), metrics

    devices = devices or hosts.devices(run.opt.B, run.derived.microbatches)
    mesh = jax.sharding.Mesh(devices, ('data',))
    per_seed = [None] * task.per_seed  # axes in front of a batch's examples

    def over_devices(axes_before):
        return NamedSharding(mesh, PartitionSpec(*axes_before, 'data'))

    def home(a):  # of a state's leaf [S, …]: whole on every device, or with FSDP split along its longest axis that divides
        axes = [i for i in range(1, a.ndim) if a.shape[i] % mesh.size == 0] if run.model.fsdp_enabled else []
        longest = max(axes, key=lambda i: a.shape[i], default=None)
        return NamedSharding(mesh, PartitionSpec(*['data' if i == longest else None for i in range(a.ndim)]))

    everywhere = NamedSharding(mesh, PartitionSpec())
    init = fused(init, key=0, test=None)
    state_homes = jax.tree.map(home, jax.eval_shape(init, jax.random.split(jax.random.key(0), 2), task.test))
    options = hosts.compiler_options(mesh.size)
    return Programs(
        init=jax.jit(init, out_shardings=state_homes, compiler_options=hosts.compile_quickly()),
        train=jax.jit(train, donate_argnums=0, out_shardings=state_homes, compiler_options=options),
        evaluate=jax.jit(fused(evaluate, state=0, peak_lrs=None, test=None), donate_argnums=0,
                         out_shardings=(state_homes, everywhere), compiler_options=options),
        raw_sharding=over_devices([None, *per_seed]) if task.in_rows else everywhere,
        test_sharding=over_devices([None]),
        state_homes=state_homes)


def fused(function, **axes):
    """The function over all seeds at once: each named argument has the seeds in front (0) or is shared (None)."""
    return jax.vmap(function, in_axes=tuple(axes.values()))


def rms(a):
    return jnp.sqrt(jnp.mean(a * a))


def evaluation_points(num_evals, steps):
    """Steps before whose update the run is evaluated: half spaced linearly, half geometrically, both ends, and `steps` itself,
    the state after the last update."""
    half = num_evals // 2
    linear, geometric = np.linspace(0, steps - 1, half), np.geomspace(1, max(steps - 1, 1), half)
    return sorted({0, steps - 1, steps, *map(int, linear), *map(int, geometric)})


@functools.cache
def matmul_rate(dtype='float32'):
    """FLOP/s of the matrix product [2048, 2048]·[2048, 2048] of all devices together (all cores of a CPU), best of three: the limit
    that speeds are a share of."""
    a = jnp.ones((2048, 2048), dtype)
    multiply = jax.jit(jnp.matmul)
    multiply(a, a).block_until_ready()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        multiply(a, a).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(seconds) * (jax.process_count() if jax.default_backend() == 'cpu' else jax.device_count())


@contextmanager
def interrupts():
    """Yields a list that the signals SIGINT, SIGTERM and SIGUSR2 (the warning of a Slurm job whose time is nearly up) are put into,
    for the loop to stop at its next meeting with the device."""
    caught = []
    before = {s: signal.signal(s, lambda number, _: caught.append(number)) for s in STOPPING}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Interrupted(Exception):
    """A signal stopped the run; the record says so. args: (signal number,)."""


def train(run, on_steps=lambda steps, shown: None) -> list[dict]:
    """Trains every seed of a run that has not ended yet, from its newest checkpoint on, and returns the summaries of all.

    on_steps is called with the steps just done and the numbers to show. Raises Interrupted after a signal, the state saved;
    ValueError and OSError, before a folder is made, for data or a folder that cannot be used. With several processes all of them
    call it, and all take the same way through it.
    """
    ended = {seed: record.ended(run, seed) for seed in run.all_seeds}
    summaries = [record.mirror_again(run, summary) for summary in ended.values() if summary]
    if seeds := [seed for seed, summary in ended.items() if not summary]:
        jax.config.update('jax_default_matmul_precision', run.matmul_precision)
        task = data.open_task(run, seeds, hosts.rows(run.opt.B))
        look = follow_ladder(run)
        mirror.log_in(run)
        with record.locked([record.folder_of(run, seed) for seed in seeds]):
            summaries += train_together(run, task, seeds, on_steps, look)
    return summaries


def follow_ladder(run):
    """look(rows) -> what figures/watch.py says of a run so far, to be recorded; {} of a run that does not watch itself."""
    if not run.watch:
        return lambda rows: {}

    return monitor.follow(run.watch, run.derived.num_params, run.derived.compute)


def train_together(run, task, seeds, on_steps, look):
    """Trains these seeds of a run, fused, in folders that are theirs."""
    begin = time.monotonic()
    summaries = []
    program = programs(run, task)
    test = hosts.place_whole(task.test, program.test_sharding)
    state, evaluated = newest_state(run, program, seeds, test)
    step = start = int(state.step[0])
    on_steps(step, {})

    peak_lrs = peak_rates(run)
    s = optimizer.schedule(run.opt.schedule, run.opt.decay_frac, run.derived.warmup_steps, run.derived.steps)
    lrs = run.opt.lr * s
    tau = optimizer.gradient_flow_time(lrs)
    M = task.block_steps
    s_padded = np.pad(s, (0, M), 'edge').astype(np.float32)

    clock = Counter()
    place = functools.partial(jax.make_array_from_process_local_data, program.raw_sharding)
    with interrupts() as caught, closing(data.read_ahead(task, step, place)) as blocks, record.closed_on_failure({}) as records:
        first, raw = next(blocks)
        with timed(clock, 'compile_seconds'):
            lowered = (program.train.lower(state, peak_lrs, raw, s_padded[:M], np.int32(0), np.int32(1)),
                       program.evaluate.lower(state, peak_lrs, test))
            with ThreadPoolExecutor(2) as compilers:
                run_stretch, run_evaluation = compilers.map(lambda one: one.compile(), lowered)
        for i, seed in enumerate(seeds):
            records[i] = record.Record(run, seed, start, evaluated)  # of the seeds still in training

        def so_far():
            return {'steps': step, 'tokens': step * run.derived.tokens_per_step, **clock, 'wall_seconds': time.monotonic() - begin,
                    'seeds_fused': len(seeds)}

        def close(i, outcome):
            of_session = speed(run, (step - start) * len(seeds), clock['train_seconds'])
            summaries.append(records.pop(i).close(outcome, **so_far(), **of_session))

        def save():
            checkpoint.keep_common([one.checkpoints for one in records.values()])
            for i, one in records.items():
                one.save(step, jax.tree.map(lambda a, i=i: a[i], state), **so_far())

        stop, budget, saved = 0, 1, time.monotonic()
        for point in evaluation_points(run.num_evals, run.derived.steps):
            if point <= evaluated:
                continue
            while step < point and records and not stop:
                if step == first + M:
                    first, raw = next(blocks)
                count = min(point, first + M, step + budget) - step
                before = clock['train_seconds']
                with timed(clock, 'train_seconds'):
                    state = run_stretch(state, peak_lrs, raw, s_padded[first:first + M], np.int32(step - first), np.int32(count))
                    train_loss = np.asarray(state.loss_sum / state.loss_count)  # waits for the device
                step += count
                budget = max(1, int(STRETCH_SECONDS * count / (clock['train_seconds'] - before)))
                for i in [i for i in records if not np.isfinite(train_loss[i])]:
                    close(i, 'diverged')
                on_steps(count, {'train_loss': np.mean(train_loss[list(records)])} if records else {})
                due = time.monotonic() - saved > 60 * run.checkpoint_minutes
                stop, budget, due = hosts.agree(caught[0] if caught else 0, budget, due)
                if due:
                    save()
                    saved = time.monotonic()
            if stop or not records:
                break

            with timed(clock, 'eval_seconds'):
                state, metrics = run_evaluation(state, peak_lrs, test)
                metrics = jax.device_get(metrics)  # {name: [S]}
            if step == 0:
                metrics = {k: v for k, v in metrics.items() if k not in UNDEFINED_AT_START}
            tokens = step * run.derived.tokens_per_step
            for i in list(records):
                if not np.isfinite(metrics['test_loss'][i]):
                    close(i, 'diverged')
                    continue
                row = {'step': step, 'tokens': tokens, 'compute': 6.0 * tokens * run.derived.num_params, 'tau': tau[step],
                       'lr': lrs[step], **{k: float(v[i]) for k, v in metrics.items()}}
                row |= look([*records[i].rows, row])
                records[i].log(row)
                if run.stop_above is not None and step < run.derived.steps:
                    [hopeless] = hosts.agree(int(row.get('forecast_lo90', -np.inf) > run.stop_above))
                    if hopeless:
                        close(i, 'stopped')
            on_steps(0, {'test_loss': np.mean(metrics['test_loss'][list(records)])} if records else {})

        if stop:
            save()
        for i in list(records):
            close(i, 'interrupted' if stop else 'finished')
    stop = stop or next(iter(caught), 0)  # one that came too late for the loop still ends a sweep
    if stop:
        if stop == signal.SIGUSR2 and callable(signal.getsignal(stop)):  # submitit's handler, which queues the job again
            signal.raise_signal(stop)
        raise Interrupted(stop)
    return summaries


def peak_rates(run):
    """The peak learning rate of every weight, like the parameters."""
    _, _, roles = models.structure(run.arch, run.model)
    return jax.tree.map(lambda role: np.float32(optimizer.peak_lr(role, run)), roles)


def newest_state(run, program, seeds, test):
    """The state to go on from, [S, …], and the last step already evaluated: those of the newest good checkpoint that all the seeds
    have, with the rows that lead up to it, or else the initial state and -1."""
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    folders = [record.folder_of(run, seed) for seed in seeds]
    one_seed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), jax.eval_shape(program.init, keys, test))
    steps = [*checkpoint.steps(folders), -1, -1, -1][:3]  # the newest, and one that a kill left beside them
    for step in [step for step in hosts.agree(0, *steps)[1:] if step >= 0]:
        saved = checkpoint.restore(folders, step, one_seed)
        if saved is not None:
            evaluated = step if saved.loss_count[0] == 0 else step - 1  # saved after the evaluation at its step, or before
            points = [point for point in evaluation_points(run.num_evals, run.derived.steps) if point <= evaluated]
            if any([row['step'] for row in record.read_history(folder)][:len(points)] != points for folder in folders):
                checkpoint.warn(f'{folders[0].parent}: lines of history.jsonl are lost; going on from the checkpoint before')
                saved = None
        [lost] = hosts.agree(int(saved is None))  # to any of the processes
        if not lost:
            return jax.tree.map(hosts.place_whole, saved, program.state_homes), evaluated
    return program.init(keys, test), -1


@contextmanager
def timed(clock, name):
    start = time.perf_counter()
    yield
    clock[name] += time.perf_counter() - start


def speed(run, steps, seconds):
    """Throughput over all seeds of a group: training tokens a second, and the share of the machine's matmul rate it comes to."""
    if not steps:
        return {}
    tokens_per_second = steps * run.derived.tokens_per_step / seconds
    return {'tokens_per_second': tokens_per_second,
            'matmul_share': tokens_per_second * run.derived.flops_per_token / matmul_rate(run.model.dtype or 'float32')}


def enable_compilation_cache():
    """Keeps compiled programs in ~/.cache/supercollapse (or $XDG_CACHE_HOME), so that a second start compiles nothing."""
    cache = Path(os.environ.get('XDG_CACHE_HOME', Path.home() / '.cache')) / 'supercollapse' / 'xla'
    jax.config.update('jax_compilation_cache_dir', str(cache))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
    jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


@contextmanager
def one_line_errors():
    """What a user can mend ends the program with one line, a signal with its own exit code."""
    try:
        yield
    except Interrupted as stop:
        print('interrupted, the state is saved; the same command goes on from there', file=sys.stderr)
        sys.exit(128 + stop.args[0])
    except KeyboardInterrupt:  # before or after the loop that saves
        sys.exit(128 + signal.SIGINT)
    except (ValueError, OSError, HydraException, OmegaConfBaseException) as error:
        text = re.sub(r'To append to your config use.*', 'configs/default.yaml lists the keys there are', str(error))
        sys.exit('error: ' + ' '.join(text.split()))


@hydra.main(version_base=None, config_path=str(Path(__file__).parent / 'configs'))
def main(cfg):
    with one_line_errors():
        run_config(cfg)


def run_config(cfg):
    """Checks and trains one composed configuration, with a bar, and prints what became of each seed."""
    enable_compilation_cache()
    vocab_size = data.vocab_size(cfg.ds_path, data_needed=not cfg.dry_run)
    run = config.resolve(cfg, vocab_size)
    if run.dry_run:
        jax.config.update('jax_num_cpu_devices', 8)
    else:
        hosts.each_core_a_device()
        hosts.join(run.num_processes, run.process_id, run.coordinator, alone=bool(mirror.agents_run()))
        hosts.devices(run.opt.B, run.derived.microbatches)
    d = run.derived
    print(f'p = {d.num_params:,} parameters, {d.steps:,} steps, {d.steps * d.tokens_per_step:,} tokens, '
          f'C = {d.compute:.4g} FLOPs, seeds {run.all_seeds}')
    if run.dry_run:
        print(dry_run.report(run, programs, peak_rates))
        return
    shown, first = {}, iter([True])
    with tqdm(total=d.steps, unit='step', desc=config.run_name(run, run.all_seeds[0]), smoothing=0.05,
              disable=not hosts.first()) as bar:
        def on_steps(steps, numbers):
            if next(first, False):  # done in an earlier session: no part of this one's rate
                bar.initial = bar.last_print_n = bar.n = steps
                steps = 0
            shown.update(numbers)
            bar.set_postfix({k: f'{v:.4f}' for k, v in shown.items()}, refresh=False)
            bar.update(steps)

        summaries = train(run, on_steps)
    for summary in summaries:
        print(f"seed {summary['seed']}: {summary['state']}, test_loss {summary.get('test_loss', float('nan')):.5f}, "
              f"{summary['wall_seconds']:.0f} s at {summary.get('matmul_share', 0):.0%} of the matmul rate, in {summary['folder']}")
    if any(summary['state'] == 'diverged' for summary in summaries) and not mirror.agents_run():  # W&B's agent gives up on errors
        sys.exit(1)


def command_line():
    os.environ.setdefault('HYDRA_FULL_ERROR', '1')  # errors in the overrides come to us instead of being printed by Hydra
    if not any(a.startswith(('-cn', '--config-name', '-h', '--help', '--hydra-help')) for a in sys.argv[1:]):
        names = ', '.join(sorted(path.stem for path in (Path(__file__).parent / 'configs').glob('*.yaml')))
        sys.exit(f'error: no config named; choose one of {names}, e.g. python train.py -cn mlp model.D=64')
    sys.argv[1:] = map(config.as_override, sys.argv[1:])
    with one_line_errors():
        main()


if __name__ == '__main__':
    import train as under_its_own_name  # where the job that a launcher starts finds `main`

    under_its_own_name.command_line()
