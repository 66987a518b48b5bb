"""One run on 1, 2, 4 and 8 devices, and on 2 and 4 processes of this machine: do the losses agree; does it go on after a signal?

    python tests/measure_distributed.py DIR            # some five minutes
"""
import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
import checkpoint  # noqa: E402
from test_distributed import ROOT, losses, start  # noqa: E402

from trainer import run_folder  # noqa: E402


def run(count, *overrides, stop=None, devices=1):
    """Exit codes; `stop` is a process that gets a SIGTERM once a state is saved."""
    processes = start(count, *overrides, devices=devices)
    if stop is not None:
        folder = Path(next(word.split('=')[1] for word in map(str, overrides) if word.startswith('run_dir=')))
        while not checkpoint.steps([folder]) and all(p.poll() is None for p in processes):
            pass
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
    kinds = {'in file order': [], 'shuffled-sharded-two-seeds': ['shuffle=true', 'model.fsdp_enabled=true', 'seeds=[0,1]']}
    for name, more in kinds.items():
        found = {}
        for count in (1, 2, 4):
            out = folder / f'{name}-{count}'
            run(count, *work, *more, f'run_dir={out}')
            found[count] = np.array([losses(path.parent) for path in sorted(out.rglob('history.jsonl'))])
        for count in (2, 4, 8):
            out = folder / f'{name}-devices-{count}'
            run(1, *work, *more, f'run_dir={out}', devices=count)
            found[f'{count} devices'] = np.array([losses(path.parent) for path in sorted(out.rglob('history.jsonl'))])
        far = {count: float(np.abs(found[count] / found[1] - 1).max()) for count in found}
        print(f'{name}: largest relative difference of a test loss from one process with one device, by processes: '
              f'{ {count: f"{x:.1e}" for count, x in far.items()} }', flush=True)
    wide = ['-cn', 'mlp', 'model.N=5', 'model.D=384', 'opt.lr=0.001', 'opt.readout_lr_mult=1', 'T=81920',
            'num_evals=8', 'wandb_mode=disabled']
    for devices in (1, 2):  # 20 steps of a published run
        subprocess.run([sys.executable, ROOT / 'train.py', *wide, f'run_dir={folder}/wide-{devices}'], check=True,
                       capture_output=True, env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': str(devices)})
    one, two = (np.array(losses(folder / f'wide-{devices}')) for devices in (1, 2))
    print('MLP, D = 384, B = 4096: largest relative difference of a test loss, two devices from one: '
          f'{np.abs(two / one - 1).max():.1e}', flush=True)
    out = folder / 'stopped'
    codes = run(2, *work, f'run_dir={out}', 'checkpoint_minutes=0.001', stop=1)
    before = run_folder.read_summary(out)
    run(2, *work, f'run_dir={out}')
    same = losses(out) == losses(folder / 'in file order-2')
    print(f'SIGTERM to the second of two: exit codes {codes}, {before["state"]} at step {before["steps"]} of 400; gone on to the '
          f'end, history {"the same, bit for bit" if same else "ANOTHER"}', flush=True)


if __name__ == '__main__':
    main()
