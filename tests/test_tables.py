"""One row a log, by what its runs are; the values are those of the analyses, which have tests of their own."""

import sys

import numpy as np

from analysis import collapse
from analysis import table as logs
from tests.logs_of import power_law_table
from tests.test_schedules import planted as planted_schedules


def test_each_kind_of_log_has_its_row(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    planted = {'ladder': power_law_table(rng, evals=60), 'schedules': planted_schedules(rng, evals=60),
               'steady': power_law_table(rng, past=10.0, schedule='const', seeds=3, evals=60)}
    for name, table in planted.items():
        logs.write_parquet(table, tmp_path / f'{name}.parquet', source='planted')
    monkeypatch.setattr(sys, 'argv', ['measured', *(str(tmp_path / f'{name}.parquet') for name in planted)])
    tables.main()
    horizon, ladders, schedules = ([[cell.strip() for cell in line.split('|')[1:-1]] for line in block.splitlines()]
                                   for block in capsys.readouterr().out.strip().split('\n\n'))
    assert [row[0] for row in horizon[2:]] == ['steady']
    assert abs(float(horizon[2][4].split()[0]) - 2) < 0.05  # C* = 6p² is planted
    assert [row[0] for row in ladders[2:]] == ['ladder', 'ladder, without the narrowest', 'steady, to the horizon']
    assert [row[0] for row in schedules[2:]] == ['schedules']
    assert all(len(row) == len(block[0]) for block in (horizon, ladders, schedules) for row in block)
    result, _ = collapse.analyse(logs.clean(planted['ladder'])[0])
    delta, sigma = (float(value) for value in ladders[2][7].split(' / '))  # at x = 0.5
    at = np.argmin(np.abs(result['x'] - 0.5))
    np.testing.assert_allclose([delta, sigma], [result['delta'][at], result['sigma'][at]], atol=6e-5)  # four decimals


def test_what_cannot_be_told_is_named(tmp_path, monkeypatch, capsys):
    """Two models have no tangent points: no row, and a reason."""
    table = power_law_table(np.random.default_rng(0), models=2, past=10.0, schedule='const', evals=60)
    logs.write_parquet(table, tmp_path / 'two.parquet', source='planted')
    monkeypatch.setattr(sys, 'argv', ['measured', str(tmp_path / 'two.parquet')])
    tables.main()
    said = capsys.readouterr()
    assert said.out.strip() == '' and 'two: the horizon needs' in said.err
