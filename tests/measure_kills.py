"""Trainings killed at random moments and started again: the same parameters and history, bit for bit, as one that was left alone?

    python tests/measure_kills.py DIR            # everything, some ten minutes; or some of: mlp transformer seeds
    python tests/measure_kills.py DIR mlp --kills 25 --signal SIGTERM

A session is a forked process, so that JAX is imported once; this process itself never starts JAX's runtime.
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
import config  # noqa: E402

import train  # noqa: E402
from trainer import (  # noqa: E402
    distributed,
    process,  # noqa: E402
)

SECONDS = 0.8  # of training, at most, that a session is left before it is ended
INTERVAL = 0.2  # seconds between checkpoints
STRETCH = 0.05  # seconds between meetings with the device

COMMON = [f'checkpoint_minutes={INTERVAL / 60}', 'wandb_mode=disabled', 'num_evals=100']
MLP = ['mlp', *COMMON, 'model.D=64', 'opt.B=256', 'opt.lr=0.01', 'T_eval=1024']
TRANSFORMER = ['chess', *COMMON, 'ds_path={tokens}', 'shuffle=true', 'model.D=32', 'model.dh=16', 'model.N=1', 'model.L=16',
               'opt.B=16', 'opt.lr=0.01', 'opt.warmup_tokens=0', 'T_eval=1024']
WORK = {'mlp': MLP, 'transformer': TRANSFORMER, 'seeds': [*MLP, 'seeds=[0,1,2]', 'model.D=32']}
TOKENS_PER_STEP = {'mlp': 256, 'transformer': 16 * 16, 'seeds': 256}

fork = multiprocessing.get_context('fork')


def resolve(name, *overrides):
    with hydra.initialize_config_dir(str(Path(config.__file__).parent / 'configs'), version_base=None):
        return config.resolve(hydra.compose(name, list(overrides)))


def session(overrides, stop_at, begun, done):
    """Trains from where the folder stands; a SIGTERM comes when `stop_at` steps are done. begun, done: steps, for the parent."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    train.DISPATCH_SECONDS = STRETCH

    def on_steps(steps, shown):
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
    except train.Interrupted:
        os._exit(3)
    os._exit(0)


def start(overrides, stop_at=-1):
    begun, done = fork.Value('l', -1), fork.Value('l', -1)  # -1: not there yet
    child = fork.Process(target=session, args=(overrides, stop_at, begun, done))
    child.start()
    return child, begun, done


def end_at_random(overrides, number, kills, steps, rng):
    """[(steps that a session reached, steps that the next went on from)], once `kills` sessions were ended with the signal `number`
    while they trained. The last one stops after the last update, before the last evaluation, with a checkpoint."""
    ends, reached = [], None
    while True:
        child, begun, done = start(overrides, steps)
        while done.value <= begun.value and child.is_alive():  # it starts, restores and compiles
            time.sleep(0.001)
        if reached is not None:
            ends.append((reached, begun.value))
        if len(ends) == kills:
            child.join()
            assert child.exitcode == 3, child.exitcode
            return ends
        child.join(rng.uniform(0, SECONDS))
        assert child.is_alive(), f'the run ended after {len(ends)} of {kills} kills; raise --steps'
        reached = done.value
        os.kill(child.pid, number)
        child.join()
        reached = max(reached, done.value) if number == signal.SIGTERM else reached


def compare(kinds, steps):
    """Ends this process with 0 if the states at the last update are the same in both folders, bit for bit."""
    distributed.use_every_core()  # Orbax restores onto what it saved from
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
    child, *_ = start(overrides['stopped'], steps)  # only to have a checkpoint of the last update
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
    redone = [reached - begun for reached, begun in ends]
    print(f'{name}: {kills} × {signal.Signals(number).name} over {steps} steps ({straight:.0f} s left alone): states and histories '
          f'are the same, bit for bit; steps redone after one:'
          f' {max(redone)} at most, {sum(redone) / kills:.0f} on average', flush=True)
    return max(redone)


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
        redone = measure(name, args.dir.absolute(), args.kills, signal.Signals[args.signal], args.steps, args.seed)
        assert redone == 0 or args.signal != 'SIGTERM', f'{name}: SIGTERM cost {redone} steps'


if __name__ == '__main__':
    main()
