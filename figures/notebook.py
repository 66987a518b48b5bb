"""What the notebooks share, and the command that runs them:  python -m figures.notebook NOTEBOOK …"""

import os
import sys
from pathlib import Path

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
    """Path of the log that belongs to `log`: logs/mlp_const.pkl for logs/mlp.pkl and 'const', or `log` if it has that ending.

    None, with a line, if there is no such file.
    """
    path = Path(log)
    found = path if path.stem.endswith(f'_{ending}') else path.with_name(f'{path.stem}_{ending}{path.suffix}')
    if found.exists():
        return str(found)
    print(f'skipped: there is no {found}')
    return None


def save(figure, log, name):
    """The figure, saved as PNG under the name of the log; the last line of a cell displays it. None gives None, and a line.

    Figures of the shipped logs are in figures/png. Those of a LOG from the environment go to runs/figures, which is not tracked.
    """
    if figure is None:
        print(f'skipped: the log has no runs for the figure {name}')
        return None
    folder = Path('runs/figures' if 'LOG' in os.environ else 'figures/png')
    return style.save(figure, folder / f'{Path(log).stem}_{name}.png')


def run(path):
    """Run a notebook and write it with its outputs in place, or into runs/figures if the environment has a LOG.

    If that LOG cannot be analysed, the reason is printed in one line, and nothing is written.
    """
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError
    book = nbformat.read(path, 4)
    try:
        NotebookClient(book, resources={'metadata': {'path': path.parent}}, coalesce_streams=True, record_timing=False,
                       extra_arguments=['--log-level=ERROR']).execute()
    except CellExecutionError as error:
        if error.ename != 'LogError' or 'LOG' not in os.environ:
            raise
        return print(f'{path}: stopped: {error.evalue}')
    book.metadata = {'kernelspec': book.metadata['kernelspec']}
    nbformat.write(book, Path('runs/figures') / path.name if 'LOG' in os.environ else path)


if __name__ == '__main__':
    for one in sys.argv[1:]:
        run(Path(one))
