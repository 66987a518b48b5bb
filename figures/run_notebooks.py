"""Run the notebooks from a fresh kernel:  python -m figures.run_notebooks [NAME …]   (default: all)

The executed notebooks are written in place. With LOG in the environment they go to runs/figures and those in the repository stay
as they are. The same logs give the same files, byte for byte.
"""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from tqdm import tqdm

FOLDER = Path(__file__).parent


def execute(path):
    """The notebook at `path` with the outputs of a fresh run. Raises CellExecutionError where a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=600, kernel_name='python3', record_timing=False, coalesce_streams=True,
                            resources={'metadata': {'path': str(path.parent)}}, extra_arguments=['--log-level=ERROR'])
    client.execute()
    notebook.metadata.pop('language_info', None)  # holds the version of Python
    return notebook


def main(names):
    """The exit status: 0, or 1 if a notebook failed, with one line on stderr for each that did."""
    folder = Path('runs/figures') if 'LOG' in os.environ else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    failed = False
    for path in tqdm(sorted(FOLDER.glob('*.ipynb')), desc='notebooks', file=sys.stderr):
        if names and path.stem not in names:
            continue
        try:
            notebook = execute(path)
        except CellExecutionError as error:
            failed = True
            tqdm.write(f'error: {path.name}: {error.ename}: {error.evalue}', file=sys.stderr)
            continue
        temporary = folder / f'.{path.name}.tmp'
        nbformat.write(notebook, temporary)
        temporary.replace(folder / path.name)
    return int(failed)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
