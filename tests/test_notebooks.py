"""The notebooks are thin, hold the outputs of a fresh run on the shipped logs, and run on other logs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import figures
from analysis import table as logs
from tests.logs_of import power_law_table
from tests.test_schedules import planted as planted_schedules

FOLDER = Path(figures.__file__).parent
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob('*.ipynb'))


def cells(name, folder=FOLDER):
    """The code cells of a notebook."""
    return [cell for cell in json.loads((folder / f'{name}.ipynb').read_text())['cells'] if cell['cell_type'] == 'code']


def source(cell):
    return ''.join(cell['source'])


def texts(cells):
    """The text of every output of the cells, in order."""
    found = []
    for cell in cells:
        for output in cell['outputs']:
            text = output['text'] if output['output_type'] == 'stream' else output.get('data', {}).get('text/plain', '')
            found.append(''.join(text))
    return found


def copy_of_the_code(place):
    """figures/ and analysis/ copied below `place`, so that a run of a notebook does not write into the repository."""
    for folder in ('figures', 'analysis'):
        shutil.copytree(FOLDER.parent / folder, place / folder, ignore=shutil.ignore_patterns('__pycache__', 'png'))
    return place


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_notebooks_are_thin_and_were_run_in_order(name):
    code = cells(name)
    assert source(code[0]).startswith('# Parameters')
    assert all('def ' not in source(cell) and source(cell).count('\n') < 20 for cell in code)
    assert [cell['execution_count'] for cell in code] == list(range(1, len(code) + 1)), 'run `make figures`'
    shown = sum('image/png' in output.get('data', {}) for cell in code for output in cell['outputs'])
    assert shown == sum(source(cell).count('notebook.save(') for cell in code)
    assert not any(output['output_type'] == 'error' for cell in code for output in cell['outputs'])


@pytest.mark.slow
def test_make_figures_gives_the_committed_outputs(tmp_path):
    """`make figures` in a copy of the repository. Figures are compared by name: their bytes depend on the version of FreeType."""
    place = copy_of_the_code(tmp_path)
    shutil.copy(FOLDER.parent / 'Makefile', place)
    (place / 'logs').symlink_to(FOLDER.parent / 'logs')
    environment = {name: value for name, value in os.environ.items() if name != 'LOG'}
    done = subprocess.run(['make', '--old-file=.venv/complete', f'RUN={sys.executable}', 'figures'], cwd=place, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in NOTEBOOKS:
        assert texts(cells(name, place / 'figures')) == texts(cells(name)), f'{name}.ipynb is out of date: run `make figures`'
    drawn, committed = ({path.name for path in (folder / 'png').glob('*.png')} for folder in (place / 'figures', FOLDER))
    assert drawn - {'mlp_384.png'} == committed - {'mlp_384.png'}  # this one needs the authors' log


def run_on(place, name, log):
    """What the notebook prints when LOG names `log`, in a plain interpreter, which starts faster than a kernel."""
    script = 'import matplotlib\nmatplotlib.use("Agg")\n' + '\n'.join(source(cell) for cell in cells(name))
    done = subprocess.run([sys.executable, '-c', script], cwd=place / 'figures', env=os.environ | {'LOG': log}, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope='module')
def other_logs(tmp_path_factory):
    """The code, and planted logs: a ladder `mine` with the logs that belong to it, and a ladder `alone` in a .csv."""
    place = copy_of_the_code(tmp_path_factory.mktemp('other'))
    rng = np.random.default_rng(0)
    for name, table in {'mine': power_law_table(rng, models=5, seeds=2, evals=60),
                        'mine_const': power_law_table(rng, models=6, seeds=2, evals=60, past=10.0, schedule='const'),
                        'mine_schedules': planted_schedules(rng, evals=60)}.items():
        logs.write_parquet(table, place / f'logs/{name}.parquet', source='planted')
    alone = power_law_table(rng, models=4, seeds=2, evals=40)
    alone[['run', 'num_params', 'compute', 'lr', 'tau', 'test_loss']].to_csv(place / 'logs/alone.csv', index=False)
    return place


@pytest.mark.parametrize(('name', 'figure'), [
    ('fit_optimal_horizon', 'mine_const_horizon'), ('schedule_laws', 'mine_schedules_schedule_laws'),
    ('lr_schedules', 'mine_schedules_by_schedule')])
def test_notebooks_find_the_log_of_their_kind_beside_the_ladder(other_logs, name, figure):
    run_on(other_logs, name, 'logs/mine.parquet')
    assert (other_logs / f'runs/figures/{figure}.png').exists()
    assert not (other_logs / 'figures/png').exists(), 'the pictures of the shipped logs stay as they are'


def test_logs_that_are_missing_are_skipped_with_one_line(other_logs):
    said = run_on(other_logs, 'collapse', 'logs/alone.csv').splitlines()
    missing = [line for line in said if line.startswith('skipped: there is no ')]
    endings = ('const', 'no_mup', 'low_exponent', 'high_exponent')
    assert missing == [f'skipped: there is no logs/alone_{ending}.csv' for ending in endings]
    assert (other_logs / 'runs/figures/alone_collapse.png').exists()
