"""Trains a sharded run on eight virtual devices and prints, as JSON, what test_distributed.py checks.

    JAX_NUM_CPU_DEVICES=8 python tests/eight_devices.py OUT CONFIG [OVERRIDE …]
"""
import json
import signal
import sys
from pathlib import Path

import hydra
import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
import optimizer  # noqa: E402
import train  # noqa: E402
from trainer import checkpoint, config, distributed, dry_run, process, programs, resume  # noqa: E402


def resolve(name, *overrides):
    with hydra.initialize_config_dir(str(config.CONFIGS), version_base=None):
        return config.resolve(hydra.compose(name, list(overrides)))


def train_to(run, step):
    """Trains until `step` updates are done and a signal stops the run, which saves a checkpoint."""
    done = []

    def on_steps(count, metrics):
        done.append(count)
        if sum(done) == step and count:
            signal.raise_signal(signal.SIGTERM)

    train.DISPATCH_SECONDS = 0.0  # one step a dispatch
    try:
        train.train(run, on_steps)
    except process.Interrupted:
        return
    raise AssertionError('the run was not interrupted')


def restored_checkpoint(run):
    """What is true of the newest checkpoint when it is restored."""
    task = data.open_task(run, [run.seed])
    program = programs.build(run, task)
    test = distributed.put_global(task.test, program.test_sharding)
    calls, restore = [], checkpoint.restore

    def recording(folders, step, like):
        calls.append((folders, step, like))
        return restore(folders, step, like)

    checkpoint.restore = recording
    stacked, _ = resume.restore_or_init(run, program, [run.seed], test)
    checkpoint.restore = restore
    (arguments,) = calls
    (state,) = restore(*arguments)
    leaves, wanted = jax.tree.leaves(state), jax.tree.leaves(arguments[-1])
    whole = jax.tree.map(np.asarray, state)
    return {
        'step': int(state.step),
        'shardings kept': all(a.sharding.is_equivalent_to(w.sharding, a.ndim) for a, w in zip(leaves, wanted, strict=True)),
        'shardings of the stacked state': all(jax.tree.leaves(jax.tree.map(
            lambda a, s: a.sharding.is_equivalent_to(s, a.ndim), stacked, program.state_shardings))),
        'bytes': sum(a.nbytes for a in leaves),
        'bytes on a device': [sum(shard.data.nbytes for a in leaves for shard in a.addressable_shards if shard.device == device)
                              for device in jax.devices()],
        'checksum': int(checkpoint.checksum(state)),
        'checksum of whole arrays': int(checkpoint.checksum(jax.tree.map(jnp.asarray, whole))),
        'undetected bit flips': undetected_bit_flips(run, lambda: restore(*arguments), whole),
    }


# With a large eps Adam's first steps are smooth in the gradient; with eps = 0 they are its sign, rounding errors included.
SMOOTH = ('opt.eps=1', 'opt.lr=1', 'opt.embed_lr_mult=1', 'opt.readout_lr_mult=1')
SHARDINGS = {'whole': (), 'split': ('model.fsdp_enabled=true',), 'split, two seeds': ('model.fsdp_enabled=true', 'seeds=[0,1]'),
             'split, a generated language': ('ds_path=bigram', 'model.fsdp_enabled=true'),
             'split, shuffled, in pieces': ('model.fsdp_enabled=true', 'shuffle=true', 'opt.B_max=8')}
MLP = ('mlp', 'model.D=64', 'model.base_D=64', 'opt.B=256', 'T=10240', 'T_eval=2048', 'num_evals=4', *SMOOTH, 'opt.lr=0.01')
SQUARED = {'Bgvar', 'gvar', 'Buvar', 'uvar', 'g2_mean', 'gmean2', 'u2_mean', 'umean2'}  # of them the square roots are compared


def after_ten_steps(run, devices):
    """The weights, what an evaluation measures, as float64, and the largest share of the weights on a device."""
    task = data.open_task(run, run.all_seeds)
    program = programs.build(run, task, devices)
    test, peak_lrs = distributed.put_global(task.test, program.test_sharding), optimizer.peak_lrs(run)
    state = program.init(jnp.stack([jax.random.key(seed) for seed in run.all_seeds]), test)
    raw = distributed.put_global(task.block(0), program.raw_sharding)
    state = program.train(state, peak_lrs, raw, np.ones(task.block_steps, np.float32), np.int32(0), np.int32(10))
    weights = jax.tree.leaves(state.params)
    share = sum(w.addressable_shards[0].data.size for w in weights) / sum(w.size for w in weights)
    params = jax.tree.map(np.float64, state.params)
    _, metrics = program.evaluate(state, peak_lrs, test)
    return params, jax.tree.map(np.float64, metrics), share


def differences(work):
    """{sharding: [largest difference of a weight, largest relative one of a metric, share of the weights that a device holds]}.

    Differences are those between eight devices and one.
    """
    found = {}
    for name, words in ({name: (*work, *SMOOTH, *overrides) for name, overrides in SHARDINGS.items()} | {'MLP': MLP}).items():
        run = resolve(*words)
        (one, metrics, _), (eight, others, share) = (after_ten_steps(run, jax.devices()[:count]) for count in (1, 8))
        weights = max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), one, eight)))
        relative = max(np.abs((others[key] / metrics[key]) ** (0.5 if key in SQUARED else 1) - 1).max() for key in metrics)
        found[name] = [weights, relative, share]
    return found


def undetected_bit_flips(run, restore, whole):
    """The positions in the file of values, of some, where a flipped bit changes the restored state without a warning."""
    path = max((run.folder(run.seed) / 'checkpoints').rglob('d/*'), key=lambda path: path.stat().st_size)
    content, undetected = path.read_bytes(), []
    for position in np.linspace(0.2, 0.8, 8) * len(content):
        changed = bytearray(content)
        changed[int(position)] ^= 1
        path.write_bytes(changed)
        states = restore()
        same = states and all(jax.tree.leaves(jax.tree.map(lambda a, b: np.array_equal(a, b, equal_nan=True), states[0], whole)))
        if states and not same:
            undetected.append(int(position))
    path.write_bytes(content)
    return undetected


def main():
    out, *work = sys.argv[1:]
    process.enable_compilation_cache()
    programs.WHOLE_BYTES = 0  # the weights of these small models are split too
    devices = jax.devices()

    def measure(words, count=8):
        run = resolve(*words)
        return dry_run.measure(run, dry_run.open_stand_in(run), devices[:count])

    sharded = (*work, 'model.fsdp_enabled=true')
    train.train(resolve(*sharded, f'run_dir={out}/sharded'))
    interrupted = resolve(*sharded, f'run_dir={out}/interrupted')
    train_to(interrupted, 20)
    found = {'checkpoint': restored_checkpoint(interrupted)}
    train.train(interrupted)
    found['arguments'] = measure([*sharded, 'model.D=256', 'model.base_D=256', 'model.dh=64'])['arguments']
    found['differences'] = differences(work)
    found['step_flops'] = [[measure(words, count)['flops'] for count in (1, 8)] for words in ([*work, 'opt.B_max=8'], MLP)]
    print(json.dumps(found))


if __name__ == '__main__':
    main()
