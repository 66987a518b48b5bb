"""The figures say what the results say, are the same bytes for the same result, and the commands answer mistakes in one line."""

import matplotlib
import numpy as np
import pytest

from analysis import collapse, schedules
from analysis import table as logs
from figures import __main__ as commands_of
from tests.logs_of import power_law_table
from tests.test_schedules import planted as planted_schedules

matplotlib.use('Agg')

from figures import panels, style  # noqa: E402  after the backend is chosen


@pytest.fixture(scope='module')
def ladder():
    table = logs.clean(power_law_table(np.random.default_rng(0), models=4, seeds=3, evals=60))[0]
    return table, collapse.analyse(table)[0]


def test_the_same_figure_is_the_same_bytes(ladder, tmp_path):
    with matplotlib.rc_context():
        style.use_theme()
        for name in ('0.png', '1.png'):
            style.save(panels.collapse({'': ladder}), tmp_path / name)
    assert (tmp_path / '0.png').read_bytes() == (tmp_path / '1.png').read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ['0.png', '1.png'], 'no temporary file is left'


def test_colours_follow_log_p():
    """In plasma the amount of red rises with its position, so equal ratios of p give equal steps of it for nearby colours."""
    dark, middle, light = style.colours([1e6, 1e7, 1e8])
    assert dark[0] < middle[0] < light[0]
    assert tuple(middle) == style.PLASMA(0.5)


@pytest.mark.parametrize(('number', 'text'), [(1478016, '1.48M'), (999993344, '1B'), (12e9, '12B'), (23472, '23.5k'), (5, '5')])
def test_counts_are_short(number, text):
    assert style.count(number) == text


def verdicts(results):
    """The titles of the rows of the figure."""
    return [part.get_suptitle() for part in panels.collapse(results).subfigs]


def test_collapse_figure_has_a_row_with_the_verdict_for_each_ladder(ladder):
    one_seed = ladder[0][ladder[0]['seed'] == 0]
    first, second = verdicts({'': ladder, 'one seed': (one_seed, collapse.analyse(one_seed)[0])})
    assert first == collapse.verdict_in_words(ladder[1])
    assert second.startswith('one seed – ') and second != f'one seed – {first}'


def test_each_schedule_has_a_panel_with_its_error():
    aligned, _ = schedules.align(planted_schedules(np.random.default_rng(0), evals=60))
    figure = panels.schedules(aligned, 0.25)
    titles = [axis.get_title() for axis in figure.axes if axis.axison]
    assert len(titles) == len(aligned.groupby(['schedule', 'decay_frac']))
    assert all('error ' in title for title in titles)
    worse = panels.schedules(aligned, 0.0)
    assert [axis.get_title() for axis in worse.axes if axis.axison] != titles, 'the error is that of the α given'


def test_one_horizon_has_no_figure_across_horizons():
    aligned, _ = schedules.align(planted_schedules(np.random.default_rng(0), evals=60))
    same = aligned[aligned['tokens_total'] == aligned['tokens_total'].iloc[0]]
    assert panels.schedules(same, 0.25, 'T') is None


def test_commands_are_listed_with_one_line_each(capsys):
    assert commands_of.main([]) == commands_of.main(['--help']) == 0
    listed = capsys.readouterr().out.splitlines()
    assert all(sum(line.split()[:1] == [name] for line in listed) == 2 for name in commands_of.COMMANDS)


def test_mistyped_command_is_answered_with_a_suggestion(capsys):
    assert commands_of.main(['colapse', 'x.parquet']) == 2
    said = capsys.readouterr().err
    assert said.count('\n') == 1 and 'did you mean collapse?' in said


def test_log_that_cannot_be_read_is_one_line(capsys, tmp_path):
    assert commands_of.main(['collapse', str(tmp_path / 'none.parquet')]) == 2
    said = capsys.readouterr().err
    assert said.count('\n') == 1 and said.startswith('error: ') and 'none.parquet' in said
