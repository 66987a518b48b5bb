"""The notebooks are thin, hold the outputs of a fresh run on the shipped logs, and run on other logs."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest

import figures
from analysis import table as logs
from tests.logs_of import power_law_table
from tests.test_schedules import planted as planted_schedules

FOLDER = Path(figures.__file__).parent
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob('*.ipynb'))


def cells(name):
    """The code cells of a notebook."""
    return [cell for cell in json.loads((FOLDER / f'{name}.ipynb').read_text())['cells'] if cell['cell_type'] == 'code']


def source(cell):
    return ''.join(cell['source'])


def saved_text(cell):
    """What a cell printed, and the text form of its last line, as saved in the notebook."""
    return ''.join(''.join(output.get('text') or output['data']['text/plain']) for output in cell['outputs'])


@pytest.fixture
def run(monkeypatch, capsys):
    """run(name, folder) -> the text of each cell. The cells run in this process, with `folder` as the repository.

    A kernel for each notebook would import the same packages again. `make figures` starts kernels, and has a test below.
    """
    def texts(name, folder):
        monkeypatch.chdir(folder)
        namespace, found = {}, []
        for cell in cells(name):
            lines = ast.parse(source(cell)).body
            last = ast.Expression(lines.pop().value) if isinstance(lines[-1], ast.Expr) else ast.parse('None', mode='eval')
            exec(compile(ast.Module(lines, []), name, 'exec'), namespace)
            value = eval(compile(last, name, 'eval'), namespace)
            found.append(capsys.readouterr().out + ('' if value is None else repr(value)))
        return found

    monkeypatch.delenv('LOG', raising=False)
    monkeypatch.setattr(sys, 'path', list(sys.path))
    matplotlib.use('Agg')
    with matplotlib.rc_context(), pd.option_context('display.max_columns', 20):  # as pandas sets it in a kernel
        yield texts


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
def test_notebooks_hold_what_a_run_on_the_shipped_logs_gives(run, tmp_path):
    """Figures are compared by name and size: their bytes depend on the version of FreeType."""
    (tmp_path / 'logs').symlink_to(FOLDER.parent / 'logs')
    for name in NOTEBOOKS:
        saved = [saved_text(cell) for cell in cells(name)]
        assert run(name, tmp_path) == saved, f'{name}.ipynb is out of date: run `make figures`'
    by_command = set(re.findall(r'png/(\w+\.png)', (FOLDER.parent / 'Makefile').read_text()))
    drawn, committed = ({path.name for path in (folder / 'png').glob('*.png')} for folder in (tmp_path / 'figures', FOLDER))
    assert drawn | by_command == committed


@pytest.fixture(scope='module')
def other_logs(tmp_path_factory):
    """A folder with planted logs: a ladder `mine` with the logs that belong to it, and a ladder `alone` in a .csv."""
    place = tmp_path_factory.mktemp('other')
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
def test_notebooks_find_the_log_of_their_kind_beside_the_ladder(run, other_logs, monkeypatch, name, figure):
    monkeypatch.setenv('LOG', 'logs/mine.parquet')
    run(name, other_logs)
    assert (other_logs / f'runs/figures/{figure}.png').exists()
    assert not (other_logs / 'figures/png').exists(), 'the pictures of the shipped logs stay as they are'


def test_logs_that_are_missing_are_skipped_with_one_line(run, other_logs, monkeypatch):
    monkeypatch.setenv('LOG', 'logs/alone.csv')
    said = '\n'.join(run('collapse', other_logs)).splitlines()
    missing = [line for line in said if line.startswith('skipped: there is no ')]
    endings = ('const', 'no_mup', 'low_exponent', 'high_exponent', 'fixed_tokens')
    assert missing == [f'skipped: there is no logs/alone_{ending}.csv' for ending in endings]
    assert (other_logs / 'runs/figures/alone_collapse.png').exists()


@pytest.mark.slow
def test_make_figures_goes_on_after_a_notebook_that_cannot_use_the_log(tmp_path):
    """`make figures` in a copy of the code, on a ladder without a constant-rate run."""
    for folder in ('figures', 'analysis'):
        shutil.copytree(FOLDER.parent / folder, tmp_path / folder, ignore=shutil.ignore_patterns('__pycache__', 'png'))
    shutil.copy(FOLDER.parent / 'Makefile', tmp_path)
    logs.write_parquet(power_law_table(np.random.default_rng(0), models=4, seeds=1, evals=40), tmp_path / 'logs/mine.parquet',
                       source='planted')
    names = ('fit_optimal_horizon', 'exact_power_laws')
    done = subprocess.run(['make', '--old-file=.venv/complete', f'RUN={sys.executable}', 'figures', 'LOG=logs/mine.parquet',
                           'NOTEBOOKS=' + ' '.join(f'figures/{name}.ipynb' for name in names)],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    said = [line for line in done.stdout.splitlines() if line.startswith('figures/')]  # make adds lines of its own
    assert said == ['figures/fit_optimal_horizon.ipynb: stopped: the horizon fit needs constant-rate runs, and the log has none '
                    '(schedules: linear)']
    assert [path.name for path in (tmp_path / 'runs/figures').glob('*.ipynb')] == ['exact_power_laws.ipynb']
    written, committed = (json.loads((folder / 'exact_power_laws.ipynb').read_text())
                          for folder in (tmp_path / 'runs/figures', FOLDER))
    for cell in written['cells'] + committed['cells']:
        for output in cell.get('outputs', []):
            output.get('data', {}).pop('image/png', None)
    assert written == committed, 'a run changes nothing but the bytes of the figures'
