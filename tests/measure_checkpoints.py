"""What checkpoints cost: the MLP of D=512 trained with and without them, seconds that the loop loses to one.

    python tests/measure_checkpoints.py DIR          # some two minutes
"""
import argparse
import sys
import time
from pathlib import Path

import hydra
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import checkpoint  # noqa: E402
import config  # noqa: E402

import train  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('dir', type=Path)
    folder = parser.parse_args().dir.absolute()
    process.enable_compilation_cache()
    with hydra.initialize_config_dir(str(Path(config.__file__).parent / 'configs'), version_base=None):
        run = config.resolve(hydra.compose('mlp', [
            'model.N=5', 'model.D=512', 'opt.lr=0.001', 'opt.readout_lr_mult=1', 'T=1e6', 'num_evals=2', 'T_eval=4096',
            'wandb_mode=disabled', 'checkpoint_minutes=1e-9', f'run_dir={folder}']))
    calls, waits, ends = [], [], []
    save, wait = checkpoint.Checkpoints.save, checkpoint.Checkpoints.wait

    def timed_save(self, step, state):
        begin = time.perf_counter()
        wait(self)
        waits.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        save(self, step, state)
        calls.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        wait(self)
        ends.append(time.perf_counter() - begin)

    checkpoint.Checkpoints.save = timed_save
    train.DISPATCH_SECONDS = 0.0
    train.train(run, lambda steps, shown: None)
    size = 12 * run.derived.num_params / 1e6
    held, written = np.median(calls), np.median(ends)
    print(f'D=512, p={run.derived.num_params:,}, {size:.0f} MB of parameters and moments, {len(calls)} checkpoints: the loop '
          f'stands still {held:.3f} s (median; {max(calls):.2f} s the first, with the import of Orbax), the disk takes '
          f'{written:.3f} s more in the background: {held / 600:.3%} of the wall time at the default of 10 minutes, '
          f'{(sum(calls) + sum(ends)) / len(calls) / 600:.3%} if nothing were in the background')


if __name__ == '__main__':
    main()
