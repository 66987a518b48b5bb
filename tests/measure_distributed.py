"""Compares the losses of one run on 1, 2, 4 and 8 devices and on 1, 2 and 4 processes, and resumes it after a signal.

    python tests/measure_distributed.py DIR            # some five minutes
"""
import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
from test_distributed import ROOT, losses, start  # noqa: E402

from trainer import checkpoint, run_folder  # noqa: E402


def run(count, *overrides, stop=None, devices=1):
    """The exit codes of `count` processes. Process number `stop` gets a SIGTERM once there is a checkpoint."""
    processes = start(count, *overrides, devices=devices)
    if stop is not None:
        folder = Path(next(word.split('=')[1] for word in map(str, overrides) if word.startswith('run_dir=')))
        while not checkpoint.steps([folder]) and all(p.poll() is None for p in processes):
            time.sleep(0.01)
        processes[stop].send_signal(signal.SIGTERM)
    ended = [p.communicate(timeout=600) for p in processes]
    codes = [p.returncode for p in processes]
    if set(codes) not in ({0}, {128 + signal.SIGTERM}):
        sys.exit(f'{codes}\n' + '\n'.join(errors[-2000:] for _, errors in ended))
    return codes


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('dir', type=Path)
    folder = parser.parse_args().dir.absolute()
    (folder / 'tokens').mkdir(parents=True)
    for split, size in (('train', 50_000), ('test', 1024)):
        np.random.default_rng(0).integers(0, 54, size, np.uint8).tofile(folder / 'tokens' / f'{split}.bin')
    work = [f'ds_path={folder}/tokens', 'T=102400', 'num_evals=20']  # 400 steps
    kinds = {'file-order': [], 'shuffled-sharded-two-seeds': ['shuffle=true', 'model.fsdp_enabled=true', 'seeds=[0,1]']}
    for name, more in kinds.items():
        found = {}
        for processes, devices in ((1, 1), (2, 1), (4, 1), (1, 2), (1, 4), (1, 8)):
            out = folder / f'{name}-{processes}-{devices}'
            run(processes, *work, *more, f'run_dir={out}', devices=devices)
            found[processes, devices] = np.array([losses(path.parent) for path in sorted(out.rglob('history.jsonl'))])
        print(f'{name}: largest relative difference of a test loss from that on one device')
        for (processes, devices), values in found.items():
            print(f'  {processes} process(es) with {devices} device(s) each: {np.abs(values / found[1, 1] - 1).max():.1e}')
    wide = ['-cn', 'mlp', 'model.N=5', 'model.D=384', 'opt.lr=0.001', 'opt.readout_lr_mult=1', 'T=81920',
            'num_evals=8', 'wandb_mode=disabled']
    for devices in (1, 2):  # 20 steps of a published configuration
        subprocess.run([sys.executable, ROOT / 'train.py', *wide, f'run_dir={folder}/wide-{devices}'], check=True,
                       capture_output=True, env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': str(devices)})
    one, two = (np.array(losses(folder / f'wide-{devices}')) for devices in (1, 2))
    print('MLP with D=384 and B=4096: largest relative difference of a test loss on two devices from that on one: '
          f'{np.abs(two / one - 1).max():.1e}', flush=True)
    out = folder / 'stopped'
    codes = run(2, *work, f'run_dir={out}', 'checkpoint_minutes=0.001', stop=1)
    before = run_folder.read_summary(out)
    run(2, *work, f'run_dir={out}')
    same = losses(out) == losses(folder / 'file-order-2-1')
    print(f'SIGTERM to the second of two processes: exit codes {codes}, {before["state"]} at step {before["steps"]} of 400; '
          f'resumed, the losses are {"equal, bit for bit" if same else "DIFFERENT"}', flush=True)


if __name__ == '__main__':
    main()
