"""Evaluates an MLP at D = 384 and B = 4096 on one device and on two, and prints the two results as JSON.

    JAX_NUM_CPU_DEVICES=2 python tests/wide_evaluation.py
"""
import json
import sys
from pathlib import Path

import hydra
import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
import optimizer  # noqa: E402
from trainer import config, process, programs  # noqa: E402

BATCHES = 24


def evaluate(run, task, devices):
    """{name: value} of an evaluation after two steps."""
    program = programs.build(run, task, devices)
    test = jax.device_put(task.test, program.test_sharding)
    state = program.init(jax.random.key(0)[None], test)
    raw = jax.device_put(task.block(0), program.raw_sharding)
    peak_lrs, lr_scales = optimizer.peak_lrs(run), np.ones(task.block_steps, np.float32)
    state = program.train(state, peak_lrs, raw, lr_scales, jnp.int32(0), jnp.int32(2))
    return {name: float(value[0]) for name, value in program.evaluate(state, peak_lrs, test)[1].items()}


def main():
    process.enable_compilation_cache()
    overrides = ['model.N=5', 'model.D=384', 'opt.B=4096', f'T_eval={BATCHES * 4096}', 'T=1e6', 'wandb_mode=disabled']
    with hydra.initialize_config_dir(str(config.CONFIGS), version_base=None):
        run = config.resolve(hydra.compose('mlp', overrides))
    task = data.open_task(run, run.all_seeds)
    print(json.dumps([evaluate(run, task, jax.devices()[:n]) for n in (1, 2)]))


if __name__ == '__main__':
    main()
