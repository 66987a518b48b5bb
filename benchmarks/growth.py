"""Time of a training step against width and batch size, in benchmarks/growth.json and growth.png:  python -m benchmarks.growth"""
import json
import os
import sys
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from tqdm import tqdm

from benchmarks import run
from figures import style
from trainer import distributed, process

WIDTHS = (16, 32, 64, 128, 256, 512, 1024)         # at B = 4096
BATCHES = (128, 256, 512, 1024, 2048, 4096, 8192)  # at D = 128
PARTS = {'data': 'data_seconds', 'update': 'optimiser_seconds'}


def draw_panel(axis, x, rows, label):
    """Milliseconds a step against x [n], the parts of a step, and the time that its FLOPs take at the measured matmul rate.

    The grey line is at the first x where matmuls at that rate would take more than half of the step.
    """
    step = np.array([row['step_seconds'] for row in rows])
    matmul = np.array([row['flops_per_step'] / row['matmul_rate'] for row in rows])
    axis.plot(x, 1e3 * step, '.-', color='black', label='step')
    for name, key in PARTS.items():
        axis.plot(x, [1e3 * row[key] for row in rows], '.-', label=name)
    axis.plot(x, 1e3 * matmul, ':', color='black', label='FLOPs at the matmul rate')
    axis.set(xscale='log', yscale='log', xlabel=label, ylabel='milliseconds')
    dominated = np.flatnonzero(matmul > step / 2)
    if len(dominated):
        axis.axvline(x[dominated[0]], color=style.GREY, lw=1)
        axis.annotate('over half', (x[dominated[0]], 0.02), xycoords=('data', 'axes fraction'), xytext=(-3, 0),
                      textcoords='offset points', rotation=90, va='bottom', ha='right', color=style.GREY)


def draw(rows):
    """The figure of the rows of WIDTHS and then of BATCHES."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    draw_panel(axes[0], np.array(WIDTHS), rows[:len(WIDTHS)], 'width D, at B = 4096')
    draw_panel(axes[1], np.array(BATCHES), rows[len(WIDTHS):], 'batch size B, at D = 128')
    axes[0].legend()
    figure.suptitle(f'MLP, N = 5, float32, {os.cpu_count()} cores', fontsize=10)
    return figure


def main():
    distributed.use_every_core()
    process.enable_compilation_cache()
    work = [[f'model.D={D}', 'opt.B=4096'] for D in WIDTHS] + [['model.D=128', f'opt.B={B}'] for B in BATCHES]
    rows = [run.measure('mlp', 1, [*run.MLP, run.TESTS, *overrides]) for overrides in tqdm(work, desc='growth', file=sys.stderr)]
    Path('benchmarks/growth.json').write_text(json.dumps(rows, indent=1))
    style.use_theme()
    style.save(draw(rows), 'benchmarks/growth.png')


if __name__ == '__main__':
    main()
