"""The look of every figure: seaborn's white grid, plasma colours by log p, files that are the same bytes for the same figure."""

from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
import numpy as np
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib import ticker

_COLOURS = sns.color_palette('colorblind')
BLUE, ORANGE, RED, GREY = _COLOURS[0], _COLOURS[1], _COLOURS[3], '0.4'
PLASMA = sns.color_palette('plasma', as_cmap=True)
DARKEST, LIGHTEST = 0.0, 0.88  # range of plasma in use; its last, yellow part is hard to see on white

RC = {
    'font.size': 9, 'axes.titlesize': 9, 'axes.labelsize': 9, 'xtick.labelsize': 8, 'ytick.labelsize': 8, 'legend.fontsize': 8,
    'lines.linewidth': 1.2, 'axes.linewidth': 0.8, 'grid.linewidth': 0.6, 'grid.color': '0.88', 'axes.edgecolor': '0.3',
    'legend.framealpha': 0.9, 'axes.formatter.useoffset': False, 'figure.dpi': 110, 'savefig.dpi': 160, 'savefig.bbox': 'tight',
    'figure.constrained_layout.use': True,
}


def use_theme():
    """Set the look of all figures drawn from now on. The font is Matplotlib's own, so that it is the same on every machine."""
    sns.set_theme(context='paper', style='whitegrid', palette='colorblind', font='DejaVu Sans', rc=RC)


@contextmanager
def theme():
    """Set the look of the figures drawn inside, and restore the previous settings at the end."""
    with mpl.rc_context():
        use_theme()
        yield


def colours(p):
    """One colour for each parameter count in p [M]: plasma, dark to light in log p."""
    log_p = np.log(np.asarray(p, float))
    span = np.ptp(log_p)
    share = (log_p - log_p.min()) / span if span else np.full(len(log_p), 0.4)
    return [PLASMA(DARKEST + (LIGHTEST - DARKEST) * one) for one in share]


def parameter_bar(axes, p, label='parameters p'):
    """The colour bar of `colours(p)` beside one axis or a list of axes, or None if there is a single model."""
    p = np.asarray(p, float)
    if len(np.unique(p)) < 2:
        return None
    in_use = mpl.colors.ListedColormap(PLASMA(np.linspace(DARKEST, LIGHTEST, 256)))
    mappable = mpl.cm.ScalarMappable(mpl.colors.LogNorm(p.min(), p.max()), in_use)
    bar = np.ravel(axes)[0].figure.colorbar(mappable, ax=axes, label=label, pad=0.02)
    bar.ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if p.max() < 1000 * p.min() else (1,)))
    bar.ax.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: count(value)))
    bar.ax.yaxis.set_minor_formatter(ticker.NullFormatter())
    return bar


def count(number):
    """A count in short form: 1478016 -> '1.48M', 999993344 -> '1B'."""
    number = float(f'{number:.3g}')
    for size, letter in ((1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
        if number >= size:
            return f'{number / size:.3g}{letter}'
    return f'{number:.3g}'


def plain_log(axis):
    """Label a log axis that spans less than two decades with plain numbers."""
    axis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f'{value:.3g}'))
    axis.set_minor_formatter(ticker.NullFormatter())


def save(figure, path):
    """Write the figure to .png or .pdf, close it, and return it. No date and no software version goes into the file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.stem}.tmp{path.suffix}')
    figure.savefig(temporary, metadata={'.png': {'Software': None}, '.pdf': {'CreationDate': None}}.get(path.suffix))
    temporary.replace(path)
    plt.close(figure)
    return figure
