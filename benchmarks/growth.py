"""How the cost of a step grows with width and with batch size:  python -m benchmarks.growth  draws benchmarks/growth.png."""
import json
import os
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

import train
from benchmarks import run
from figures import style
from trainer import distributed as hosts

WIDTHS = (16, 32, 64, 128, 256, 512, 1024)     # at B = 4096
BATCHES = (128, 256, 512, 1024, 2048, 4096, 8192)  # at D = 128
PARTS = (('data', 'data_seconds'), ('update', 'optimiser_seconds'))


def panel(ax, x, rows, label):
    """Milliseconds a step against x, [n], with its parts and the time at the full matmul rate, and where that is over half."""
    step = np.array([r['step_seconds'] for r in rows])
    ideal = np.array([r['flops_per_step'] / r['matmul_rate'] for r in rows])
    ax.loglog(x, 1e3 * step, 'k.-', label='step')
    for name, key in PARTS:
        ax.loglog(x, [1e3 * r[key] for r in rows], '.-', label=name)
    ax.loglog(x, 1e3 * ideal, 'k:', label='FLOPs at the matmul rate')
    over = np.flatnonzero(ideal > step / 2)
    if len(over):
        ax.axvline(x[over[0]], color='grey', lw=1)
        ax.text(x[over[0]], ax.get_ylim()[0], ' over half', rotation=90, va='bottom', ha='right', color='grey', fontsize=8)
    ax.set(xlabel=label, ylabel='milliseconds')


def main():
    hosts.each_core_a_device()
    train.enable_compilation_cache()
    work = [[f'model.D={D}', 'opt.B=4096'] for D in WIDTHS] + [['model.D=128', f'opt.B={B}'] for B in BATCHES]
    rows = [run.measure('mlp', 1, [*run.MLP, 'T_eval=32768', *w]) for w in tqdm(work, desc='growth', file=sys.stderr)]
    Path('benchmarks/growth.json').write_text(json.dumps(rows, indent=1))
    style.use()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout='constrained')
    panel(axes[0], np.array(WIDTHS), rows[:len(WIDTHS)], 'width D, at B = 4096')
    panel(axes[1], np.array(BATCHES), rows[len(WIDTHS):], 'batch size B, at D = 128')
    axes[0].legend(fontsize=8)
    figure.suptitle(f'MLP, N = 5, float32, {os.cpu_count()} cores', fontsize=10)
    style.save(figure, 'benchmarks/growth.png')


if __name__ == '__main__':
    main()
