"""How every figure looks: one theme, colours by log p, labels with units. No data and no analysis here."""

from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
import matplotlib.ticker  # noqa: F401  used as mpl.ticker
import numpy as np
from matplotlib import pyplot as plt

# Okabe and Ito's palette: told apart under every common form of colour blindness.
BLUE, ORANGE, GREEN, RED, GREY = '#0072B2', '#E69F00', '#009E73', '#D55E00', '#666666'
SCHEDULES = {'const': GREY, 'linear': BLUE, 'cosine': ORANGE, 'multicosine': RED, 'quadratic': GREEN, 'power': '#CC79A7',
             'exp': '#56B4E9'}
PARAMETERS = mpl.colormaps['plasma']  # lightness falls evenly, so it reads in grey too

RC = {
    'axes.grid': True, 'grid.color': '#dddddd', 'grid.linewidth': 0.6, 'axes.axisbelow': True, 'axes.edgecolor': '#333333',
    'axes.spines.top': True, 'axes.spines.right': True, 'axes.titlesize': 'medium', 'axes.linewidth': 0.8,
    'font.size': 9, 'legend.fontsize': 8, 'legend.framealpha': 0.9, 'legend.edgecolor': '#cccccc', 'lines.linewidth': 1.2,
    'figure.dpi': 110, 'savefig.dpi': 160, 'savefig.bbox': 'tight', 'figure.constrained_layout.use': True,
    'svg.hashsalt': 'supercollapse', 'axes.formatter.useoffset': False,
}


@contextmanager
def theme():
    """Everything drawn inside looks alike."""
    with mpl.rc_context(RC):
        yield


def use():
    """The theme for the rest of a notebook."""
    mpl.rcParams.update(RC)


def colours(p):
    """One colour for each p [M], by log p; the palest end of the map is left out as it vanishes on white."""
    u = np.log(np.asarray(p, float))
    span = np.ptp(u)
    return [PARAMETERS(0.88 * (v - u.min()) / span) if span else PARAMETERS(0.4) for v in u]


def parameter_bar(axes, p, label='parameters p'):
    """A colour bar for `colours(p)` beside the axes (one or a list); none for a single model."""
    p = np.asarray(p, float)
    if len(np.unique(p)) < 2:
        return None
    truncated = mpl.colors.ListedColormap(PARAMETERS(np.linspace(0, 0.88, 256)))
    scale = mpl.cm.ScalarMappable(mpl.colors.LogNorm(p.min(), p.max()), truncated)
    figure = np.ravel(axes)[0].figure
    return figure.colorbar(scale, ax=axes, label=label, pad=0.02)


def count(number):
    """1478016 -> '1.48M', 999993344 -> '1B'."""
    number = float(f'{number:.3g}')
    for size, letter in ((1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
        if number >= size:
            return f'{number / size:.3g}{letter}'
    return f'{number:.3g}'


def plain_log(axis):
    """Ticks of a log axis that spans less than two decades, as plain numbers."""
    axis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.set_major_formatter(mpl.ticker.FuncFormatter(lambda v, _: f'{v:.3g}'))
    axis.set_minor_formatter(mpl.ticker.NullFormatter())


def save(figure, path):
    """Write a figure and close it; the file carries no date, so that the same figure gives the same bytes."""
    kind = str(path).rsplit('.', 1)[-1]
    figure.savefig(path, metadata={'CreationDate': None} if kind == 'pdf' else {'Software': None} if kind == 'png' else None)
    plt.close(figure)


def save_png(figure, path):
    """Write a notebook's figure beside it, and return it for display."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={'Software': None})
    plt.close(figure)  # displayed once, as the cell's value
    return figure
