"""Each kind of log gives its row, and a result becomes a short data frame. The analyses themselves have tests of their own."""

import subprocess
import sys
from pathlib import Path

import numpy as np

from analysis import collapse, horizon, scaling_law, schedules
from analysis import table as logs
from figures import tables
from tests.logs_of import power_law_table
from tests.test_schedules import planted as planted_schedules


def test_each_kind_of_log_has_its_row(tmp_path, capsys):
    rng = np.random.default_rng(0)
    planted = {'ladder': power_law_table(rng, evals=60), 'schedules': planted_schedules(rng, evals=60),
               'constant': power_law_table(rng, past=10.0, schedule='const', seeds=3, evals=60)}
    for name, table in planted.items():
        logs.write_parquet(table, tmp_path / f'{name}.parquet', source='planted')
    tables.main([str(tmp_path / f'{name}.parquet') for name in planted])
    horizons, ladders, of_schedules = ([[cell.strip() for cell in line.split('|')[1:-1]] for line in block.splitlines()]
                                       for block in capsys.readouterr().out.strip().split('\n\n'))
    assert [row[0] for row in horizons[2:]] == ['constant']
    assert abs(float(horizons[2][4].split()[0]) - 2) < 0.05  # C* = 6p² is planted
    assert [row[0] for row in ladders[2:]] == ['ladder', 'ladder, without the narrowest', 'constant, to the horizon']
    assert [row[0] for row in of_schedules[2:]] == ['schedules']
    assert all(len(row) == len(block[0]) for block in (horizons, ladders, of_schedules) for row in block)
    result, _ = collapse.analyse(logs.clean(planted['ladder'])[0])
    delta, sigma = (float(value) for value in ladders[2][7].split(' / '))  # at x = 0.5
    at = np.argmin(np.abs(result['x'] - 0.5))
    np.testing.assert_allclose([delta, sigma], [result['delta'][at], result['sigma'][at]], atol=6e-5)  # four decimals


def test_the_reason_for_a_missing_row_is_printed(tmp_path, capsys):
    """Two models have no horizon."""
    table = power_law_table(np.random.default_rng(0), models=2, past=10.0, schedule='const', evals=60)
    logs.write_parquet(table, tmp_path / 'two.parquet', source='planted')
    tables.main([str(tmp_path / 'two.parquet')])
    printed = capsys.readouterr()
    assert printed.out.strip() == '' and 'two: the horizon needs' in printed.err


def test_a_summary_has_the_rounded_numbers_and_their_intervals():
    rng = np.random.default_rng(0)
    ladder, _ = collapse.analyse(power_law_table(rng, evals=60))
    constant = horizon.fit(horizon.smooth_curves(power_law_table(rng, past=10.0, schedule='const', seeds=3, evals=60)))
    alpha = schedules.fit(schedules.align(planted_schedules(rng, evals=60))[0])
    for result, quantity, value, ci in ((ladder, 'b (exponent of compute)', ladder['fit']['b'], ladder['fit']['b_ci']),
                                        (constant, 'exponent 1 + γ', constant.exponent, constant.exponent_ci),
                                        (alpha, 'α', alpha.alpha, alpha.alpha_ci),
                                        (scaling_law.Law(0.04, 0.16, 0.0), 'b (exponent of compute)', 0.16, None)):
        frame = tables.summary(result)
        assert list(frame.columns) == ['quantity', 'value', '90% interval']
        row = frame.set_index('quantity').loc[quantity]
        np.testing.assert_allclose(float(row['value']), value, rtol=5e-4)  # four digits
        low_high = [float(number) for number in row['90% interval'].strip('[]').split(', ')] if ci else None
        assert ci is None and row['90% interval'] == '' or np.allclose(low_high, ci, rtol=5e-4)


def test_the_folder_run_as_a_program_says_how_to_run_it():
    """Its imports would fail, as it is not the folder above that Python then searches."""
    root = Path(__file__).parent.parent
    found = subprocess.run([sys.executable, 'figures', 'collapse'], cwd=root, capture_output=True, text=True)
    assert found.returncode == 1 and found.stderr == 'error: wanted  python -m figures COMMAND LOG …\n'
