"""The notebooks are thin, were run in order from a fresh kernel, and draw any log of the right kind."""

import json
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
NOTEBOOKS = ['collapse', 'exact_power_laws', 'fit_optimal_horizon', 'forecast', 'lr_schedules', 'schedule_laws']


def cells(name, kind='code'):
    return [cell for cell in json.loads((FOLDER / f'{name}.ipynb').read_text())['cells'] if cell['cell_type'] == kind]


def source(cell):
    return ''.join(cell['source'])


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_notebooks_are_thin_and_rendered_in_order(name):
    code = cells(name)
    assert source(code[0]).startswith('# Parameters')
    assert all('def ' not in source(cell) and source(cell).count('\n') < 20 for cell in code)
    ran = [cell['execution_count'] for cell in code]
    assert ran == list(range(1, len(code) + 1)), 'run `make figures`: the committed notebooks carry their outputs'
    shown = sum('image/png' in output.get('data', {}) for cell in code for output in cell['outputs'])
    assert shown == sum('style.save_png' in source(cell) for cell in code)
    assert not any(output['output_type'] == 'error' for cell in code for output in cell['outputs'])


def rates(table, values, width=None):
    """The table with its runs (of one width, if given) at these peak rates in turn."""
    table = table[table['D'] == width] if width else table
    order = {run: i for i, run in enumerate(table['run'].unique())}
    return table.assign(peak_lr=[values[order[run] % len(values)] for run in table['run']], seed=0.0 if width else table['seed'])


@pytest.fixture(scope='module')
def workplace(tmp_path_factory):
    """A copy of figures/ beside planted logs under the names of our own."""
    place = tmp_path_factory.mktemp('notebooks')
    (place / 'figures').mkdir()
    for file in [*FOLDER.glob('*.py'), *FOLDER.glob('*.ipynb')]:
        shutil.copy(file, place / 'figures')
    rng = np.random.default_rng(0)
    linear = {'models': 5, 'seeds': 3, 'evals': 60}
    for name, table in {
        'laptop_mlp': power_law_table(rng, **linear),
        'laptop_mlp_no_mup': power_law_table(rng, gamma=0.9, **linear),
        'laptop_mlp_low_exponent': power_law_table(rng, gamma=0.9, **linear),
        'laptop_mlp_high_exponent': power_law_table(rng, gamma=1.1, **linear),
        'laptop_text': power_law_table(rng, **linear),
        'laptop_text_const': power_law_table(rng, past=10.0, schedule='const', models=6, seeds=3, evals=60),
        'laptop_mlp_const': power_law_table(rng, past=10.0, schedule='const', models=6, seeds=3, evals=60),
        'laptop_mlp_schedules': planted_schedules(rng, evals=60),
        'laptop_fault_horizon': power_law_table(rng, **linear).assign(T=lambda t: t.groupby('run')['tokens'].transform('max')),
        'laptop_fault_lr': rates(power_law_table(rng, **linear), (5e-4, 2e-3)),
        'laptop_lr': rates(power_law_table(rng, models=3, seeds=8, evals=60), 1e-3 * 2.0 ** np.arange(-4, 4), width=64),
    }.items():
        logs.write_parquet(table, place / f'logs/{name}.parquet', source='planted')
    return place


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_notebooks_run_on_planted_logs(workplace, name):
    """Top to bottom in a new interpreter; `make figures` does it in a kernel."""
    script = 'import matplotlib\nmatplotlib.use("Agg")\n' + '\n'.join(source(cell) for cell in cells(name))
    done = subprocess.run([sys.executable, '-c', script], cwd=workplace / 'figures', capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    drawn = {path.name for path in (workplace / 'figures/png').glob('*.png')}
    assert len(drawn) >= sum('style.save_png' in source(cell) for cell in cells(name))
