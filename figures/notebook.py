"""What the notebooks share: reading a log and the logs that belong to it, showing figures, and tables of several results."""

import os
from pathlib import Path

import numpy as np
import pandas as pd

from analysis import collapse
from analysis import table as logs
from figures import style


def read(path):
    """The clean table of a log. Prints its path and what was left out of it, and why."""
    table, notes, _ = logs.clean(logs.load(path))
    print(f'{path}: {table["run"].nunique()} runs')
    print_notes(notes)
    return table


def print_notes(notes):
    """Print one line for each note."""
    for note in notes:
        print(f'note: {note}')


def beside(log, ending):
    """Path of the log that belongs to `log`: logs/mlp_const.pkl for logs/mlp.pkl and 'const'. None, with a line, if missing."""
    path = Path(log)
    found = path.with_name(f'{path.stem}_{ending}{path.suffix}')
    if found.exists():
        return str(found)
    print(f'skipped: there is no {found}')
    return None


def log_of_kind(log, ending):
    """Path of the log of one kind: `log` itself if it has that ending or no such log belongs to it, else the one beside it."""
    return log if Path(log).stem.endswith(f'_{ending}') else beside(log, ending) or log


def save(figure, log, name):
    """The figure, saved as PNG under the name of the log; the last line of a cell displays it. None gives None, and a line.

    Figures of the shipped logs are in figures/png. Those of a LOG from the environment go to runs/figures, which is not tracked.
    """
    if figure is None:
        print(f'skipped: the log has no runs for the figure {name}')
        return None
    folder = Path('runs/figures' if 'LOG' in os.environ else 'figures/png')
    return style.save(figure, folder / f'{Path(log).stem}_{name}.png')


def compare_ladders(results):
    """Data frame with Δ at half the compute of several ladders, {name: result}, beside that of the first. Prints the verdicts.

    The first ladder's 90% interval is the yardstick: a Δ inside it cannot be told apart from the first ladder's.
    """
    middle = {name: int(np.argmin(np.abs(result['x'] - 0.5))) for name, result in results.items()}
    delta = {name: result['delta'][middle[name]] for name, result in results.items()}
    first, *others = results
    interval = results[first]['delta_ci']
    low, high = np.array(interval)[:, middle[first]] if interval is not None else (np.nan, np.nan)
    apart = {name: '' if interval is None else 'no' if low <= delta[name] <= high else 'yes' for name in others}
    print('\n'.join(f'{name}: {collapse.verdict_in_words(result)}' for name, result in results.items()))
    return pd.DataFrame({'Δ(0.5)': {name: f'{value:.4f}' for name, value in delta.items()},
                         'times the first': {name: f'{delta[name] / delta[first]:.2f}' for name in others},
                         f'outside [{low:.4f}, {high:.4f}]': apart}, index=list(results)).fillna('')
