"""Kills trainings at random moments, resumes them, and compares states and histories, bit for bit, with an uninterrupted run.

    python tests/measure_kills.py DIR            # everything, some ten minutes; or some of: mlp transformer seeds
    python tests/measure_kills.py DIR mlp --kills 25 --signal SIGTERM

A session is a forked process, so that JAX is imported once. This process itself never starts JAX's runtime.
"""
import argparse
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import hydra
import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import train  # noqa: E402
from trainer import config, distributed, process  # noqa: E402

SESSION_SECONDS = 0.8  # of training, at most, before a session is ended
CHECKPOINT_SECONDS = 0.2  # between checkpoints
DISPATCH_SECONDS = 0.05

COMMON = [f'checkpoint_minutes={CHECKPOINT_SECONDS / 60}', 'wandb_mode=disabled', 'num_evals=100']
MLP = ['mlp', *COMMON, 'model.D=64', 'opt.B=256', 'opt.lr=0.01', 'T_eval=1024']
TRANSFORMER = ['chess', *COMMON, 'ds_path={tokens}', 'shuffle=true', 'model.D=32', 'model.dh=16', 'model.N=1', 'model.L=16',
               'opt.B=16', 'opt.lr=0.01', 'opt.warmup_tokens=0', 'T_eval=1024']
WORK = {'mlp': MLP, 'transformer': TRANSFORMER, 'seeds': [*MLP, 'seeds=[0,1,2]', 'model.D=32']}
TOKENS_PER_STEP = {'mlp': 256, 'transformer': 16 * 16, 'seeds': 256}

fork = multiprocessing.get_context('fork')


def resolve(name, *overrides):
    with hydra.initialize_config_dir(str(config.CONFIGS), version_base=None):
        return config.resolve(hydra.compose(name, list(overrides)))


def session(overrides, stop_at, begun, done):
    """Resumes the run and raises SIGTERM when `stop_at` steps are done.

    begun and done are shared with the parent: the steps at the start of the session, and now. -1: the session is still starting.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    train.DISPATCH_SECONDS = DISPATCH_SECONDS

    def on_steps(steps, metrics):
        if begun.value < 0:
            begun.value = steps
            done.value = steps
        else:
            done.value += steps
        if done.value == stop_at:
            signal.raise_signal(signal.SIGTERM)

    distributed.use_every_core()
    process.enable_compilation_cache()
    try:
        train.train(resolve(*overrides), on_steps)
    except process.Interrupted:
        os._exit(3)
    os._exit(0)


def start(overrides, stop_at=-1):
    begun, done = fork.Value('l', -1), fork.Value('l', -1)
    child = fork.Process(target=session, args=(overrides, stop_at, begun, done))
    child.start()
    return child, begun, done


def end_at_random(overrides, number, kills, steps, rng):
    """[(step that a session reached, step that the next one resumed from)] of `kills` sessions, each ended by the signal `number`.

    One more session stops after the last update and before the last evaluation, with a checkpoint.
    """
    ends, reached = [], None
    while True:
        child, begun, done = start(overrides, steps)
        while done.value <= begun.value and child.is_alive():  # it imports, restores and compiles
            time.sleep(0.001)
        if reached is not None:
            ends.append((reached, begun.value))
        if len(ends) == kills:
            child.join()
            assert child.exitcode == 3, child.exitcode
            return ends
        child.join(rng.uniform(0, SESSION_SECONDS))
        assert child.is_alive(), f'the run ended after {len(ends)} of {kills} kills; raise --steps'
        reached = done.value
        os.kill(child.pid, number)
        child.join()
        reached = max(reached, done.value) if number == signal.SIGTERM else reached


def compare(kinds, steps):
    """Ends this process with exit code 0 if the states after the last update are equal in both runs, bit for bit."""
    distributed.use_every_core()  # Orbax restores onto the devices that it saved from
    found = []
    for overrides in kinds:
        run = resolve(*overrides)
        folders = [run.folder(seed) for seed in run.all_seeds]
        found.append([leaves(folder, steps) for folder in folders])
    same = jax.tree.map(lambda a, b: a.tobytes() == b.tobytes() and a.dtype == b.dtype, *found)
    moved = any(np.asarray(leaf).any() for leaf in jax.tree.leaves(found[0]))
    os._exit(0 if all(jax.tree.leaves(same)) and moved else 1)


def leaves(folder, step):
    import orbax.checkpoint

    with orbax.checkpoint.StandardCheckpointer() as reader:
        return jax.tree.map(np.asarray, reader.restore((folder / 'checkpoints' / str(step) / 'default').absolute()))


def measure(name, folder, kills, number, steps, seed):
    tokens = folder / 'tokens'
    if not tokens.exists():
        tokens.mkdir(parents=True)
        for split, size in (('train', 1 << 20), ('test', 1 << 14)):
            np.random.default_rng(0).integers(0, 54, size, np.uint8).tofile(tokens / f'{split}.bin')
    common = [word.format(tokens=tokens) for word in WORK[name]] + [f'T={steps * TOKENS_PER_STEP[name]}']
    out = {kind: folder / f'{name}-{kind}' for kind in ('straight', 'stopped', 'killed')}
    overrides = {kind: [*common, f'run_dir={path}'] for kind, path in out.items()}
    for path in out.values():
        shutil.rmtree(path, ignore_errors=True)

    begin = time.monotonic()
    child, *_ = start(overrides['straight'])
    child.join()
    assert child.exitcode == 0, child.exitcode
    straight = time.monotonic() - begin
    child, *_ = start(overrides['stopped'], steps)  # for a checkpoint of the last update
    child.join()
    assert child.exitcode == 3, child.exitcode
    ends = end_at_random(overrides['killed'], number, kills, steps, random.Random(seed))
    child = fork.Process(target=compare, args=([overrides['stopped'], overrides['killed']], steps))
    child.start()
    child.join()
    assert child.exitcode == 0, f'{name}: the states at the last update differ'
    for kind in ('stopped', 'killed'):
        child, *_ = start(overrides[kind])
        child.join()
        assert child.exitcode == 0, child.exitcode
    histories = [{path.relative_to(one): path.read_bytes() for path in one.rglob('history.jsonl')} for one in out.values()]
    assert histories[0] and histories[0] == histories[1] == histories[2], f'{name}: the histories differ'
    repeated = [reached - begun for reached, begun in ends]
    print(f'{name}: {kills} × {signal.Signals(number).name} in {steps} steps ({straight:.0f} s without interruption): states and '
          'histories are equal, bit for bit; steps repeated after a signal: '
          f'{max(repeated)} at most, {sum(repeated) / kills:.0f} on average', flush=True)
    return max(repeated)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('dir', type=Path)
    parser.add_argument('what', nargs='*', default=list(WORK))
    parser.add_argument('--kills', type=int, default=25)
    parser.add_argument('--signal', default='SIGKILL')
    parser.add_argument('--steps', type=int, default=8_000)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    for name in args.what:
        repeated = measure(name, args.dir.absolute(), args.kills, signal.Signals[args.signal], args.steps, args.seed)
        assert repeated == 0 or args.signal != 'SIGTERM', f'{name}: {repeated} steps were repeated after SIGTERM'


if __name__ == '__main__':
    main()
