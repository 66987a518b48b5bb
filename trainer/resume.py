"""Where a run begins: at its newest usable checkpoint, or at its initial state."""
import time

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from trainer import checkpoint, distributed, run_folder
from trainer.process import note, warn


def restore_or_init(run, program, seeds, test):
    """(State [S, …], last step evaluated): of the newest undamaged checkpoint that all the seeds have with the rows that lead up to
    it, otherwise the initial state and -1."""
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    folders = [run.folder(seed) for seed in seeds]
    one_seed = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape[1:], a.dtype, sharding=NamedSharding(
        s.mesh, PartitionSpec(*s.spec[1:]))), jax.eval_shape(program.init, keys, test), program.state_shardings)
    steps = [*checkpoint.steps(folders), -1, -1, -1][:3]  # two are kept, and a kill may leave a third
    for step in [step for step in distributed.broadcast(*steps) if step >= 0]:
        states = checkpoint.restore(folders, step, one_seed)
        if states is None:
            continue
        evaluated = step if states[0].loss_count == 0 else step - 1  # saved after the evaluation at its step, or before it
        points = [point for point in run.derived.eval_points if point <= evaluated]
        lost = any([row['step'] for row in run_folder.read_history(folder)][:len(points)] != points for folder in folders)
        if distributed.any_process(lost):
            warn(f'{folders[0].parent}: lines of history.jsonl are lost; resuming from the checkpoint before')
            continue
        note(f'resuming from step {step:,} of {run.derived.steps:,} ({age(folders[0] / "checkpoints" / str(step))})')
        stack = jax.jit(lambda *states: jax.tree.map(lambda *leaves: jnp.stack(leaves), *states),
                        out_shardings=program.state_shardings)
        return stack(*states), evaluated
    return program.init(keys, test), -1


def age(path):
    minutes = (time.time() - path.stat().st_mtime) / 60
    return f'checkpoint {minutes:.0f} minutes old' if 0 <= minutes < 120 else 'checkpoint of an earlier day'
