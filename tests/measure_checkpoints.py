"""The cost of a checkpoint of the MLP with D=512: seconds that training waits, and seconds of writing in the background.

    python tests/measure_checkpoints.py DIR          # a minute
"""
import argparse
import sys
import time
from pathlib import Path

import hydra
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import train  # noqa: E402
from trainer import checkpoint, config, process  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('dir', type=Path)
    folder = parser.parse_args().dir.absolute()
    process.enable_compilation_cache()
    with hydra.initialize_config_dir(str(config.CONFIGS), version_base=None):
        run = config.resolve(hydra.compose('mlp', [
            'model.N=5', 'model.D=512', 'opt.lr=0.001', 'opt.readout_lr_mult=1', 'T=4e5', 'num_evals=2', 'T_eval=4096',
            'wandb_mode=disabled', 'checkpoint_minutes=1e-9', f'run_dir={folder}']))
    waiting, writing = [], []
    save = checkpoint.Checkpoints.save

    def timed_save(self, step, state):
        for seconds, call in ((waiting, lambda: save(self, step, state)), (writing, self.wait)):
            begin = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - begin)

    checkpoint.Checkpoints.save = timed_save
    train.DISPATCH_SECONDS = 0.0
    train.train(run)
    size = 12 * run.derived.num_params / 1e6
    waits, writes = np.median(waiting), np.median(writing)
    print(f'D=512, p={run.derived.num_params:,}, {size:.0f} MB of parameters and moments, {len(waiting)} checkpoints\n'
          f'training waits {waits:.3f} s (median; {max(waiting):.2f} s at most, with the import of Orbax)\n'
          f'writing in the background takes {writes:.3f} s more\n'
          f'share of the wall time with a checkpoint every 10 minutes: {waits / 600:.3%}, and '
          f'{(sum(waiting) + sum(writing)) / len(waiting) / 600:.3%} without background writing')


if __name__ == '__main__':
    main()
