"""The look of every figure: seaborn's white grid, plasma colours by log p, and a file that is written whole."""

import matplotlib as mpl
import numpy as np
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap, LogNorm

from analysis.table import write_whole

BLUE, ORANGE, _, RED, *_ = sns.color_palette('colorblind').as_hex()
GREY = '0.4'
PLASMA = ListedColormap(sns.color_palette('plasma', as_cmap=True)(np.linspace(0, 0.88, 256)))  # without its yellow, faint on white

RC = {
    'font.size': 9, 'axes.titlesize': 9, 'axes.labelsize': 9, 'xtick.labelsize': 8, 'ytick.labelsize': 8, 'legend.fontsize': 8,
    'lines.linewidth': 1.2, 'axes.linewidth': 0.8, 'grid.linewidth': 0.6, 'grid.color': '0.88',
    'axes.edgecolor': '0.3', 'legend.framealpha': 0.9, 'axes.formatter.useoffset': False, 'figure.dpi': 110, 'savefig.dpi': 160,
    'savefig.bbox': 'tight', 'figure.constrained_layout.use': True,
}


def use_theme():
    """Set the look of all figures drawn from now on. The font is Matplotlib's own, so that it is the same on every machine."""
    sns.set_theme(context='paper', style='whitegrid', font='DejaVu Sans', rc=RC)


def colours(p):
    """[M, 4] one colour for each parameter count in p [M]: plasma, dark to light in log p."""
    return PLASMA(LogNorm(np.min(p), np.max(p))(p))


def parameter_bar(axes, p):
    """Draw the colour bar of `colours(p)` beside one axis or an array of axes, if there are several models."""
    if len(p) > 1:
        mappable = mpl.cm.ScalarMappable(LogNorm(np.min(p), np.max(p)), PLASMA)
        bar = np.ravel(axes)[0].figure.colorbar(mappable, ax=axes, label='parameters p', pad=0.02)
        plain_log(bar.ax.yaxis, (1, 2, 5) if np.max(p) < 1000 * np.min(p) else (1,), count)


def count(number, _=None):
    """A count in short form: 1478016 -> '1.48M', 999993344 -> '1B'. The second argument is the position of a tick."""
    return mpl.ticker.EngFormatter(sep='')(float(f'{number:.3g}')).replace('G', 'B')


def plain_log(axis, digits=(1, 1.5, 2, 3, 5, 7), text='{x:.3g}'):
    """Label a log axis at these digits, by default with plain numbers for an axis that spans less than two decades."""
    axis.set_major_locator(mpl.ticker.LogLocator(subs=digits))
    axis.set_major_formatter(text)
    axis.set_minor_formatter('')


def save(figure, path):
    """Write the figure to .png or .pdf, close it, and return it."""
    write_whole(path, figure.savefig)
    plt.close(figure)
    return figure
