"""The monitor leaves healthy runs alone, finds planted faults, and follows a folder or a W&B run that grows."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

import train
from analysis import collapse
from analysis import table as logs
from analysis.beyond import ladder_field, monitor
from benchmarks import watch_faults
from figures import beyond_commands
from tests.logs_of import power_law_table, random_ladder
from trainer import config, run_folder


@pytest.fixture(scope='module')
def planted():
    """(Expected of the largest of six models, losses of its runs [4, K]): no faults, noise 0.1% of the reducible loss."""
    table = power_law_table(np.random.default_rng(0), offset=3e-4, jitter=1e-4)
    ladder = ladder_field.read_ladder(table)
    return monitor.expect(ladder, ladder.p[-1]), ladder.losses[-1]


@pytest.fixture
def few_runs(tmp_path):
    """(path of a ladder's log, its table): 18 runs, too few to calibrate the alarm level."""
    table = power_law_table(np.random.default_rng(0), offset=3e-4, jitter=1e-4, evals=60, seeds=3)
    logs.write_parquet(table, tmp_path / 'ladder.parquet', source='planted')
    return str(tmp_path / 'ladder.parquet'), table


def alarms(expected, losses):
    return np.array([monitor.read(expected, expected.x, loss).alarm for loss in losses])


def test_healthy_runs_are_left_alone():
    """30 runs of the largest models of 10 random ladders, which the forecast has not seen: under 10% raise an alarm.

    Control: with half the reducible loss added, over 80% do. The runs of one ladder rise and fall together: these are ten events.
    """
    found = {'healthy': [], 'half worse': []}
    for seed in range(10):
        table, _ = random_ladder(np.random.default_rng(100 + seed), models=6, seeds=3)
        ladder = ladder_field.read_ladder(table)
        expected = monitor.expect(ladder_field.select(ladder, slice(5)), ladder.p[-1])
        for added, alarms_at in zip((0, 0.5), found.values(), strict=True):
            alarms_at += [watch_faults.first_alarm(monitor.read(expected, expected.x, loss + added * expected.reducible))
                          for loss in ladder.losses[-1]]
    assert np.isfinite(found['healthy']).mean() < 0.1
    assert np.isfinite(found['half worse']).mean() > 0.8


def test_faults_are_found_by_a_third_of_the_run(planted):
    expected, losses = planted
    assert np.isnan(alarms(expected, losses)).all()
    x, reducible = expected.x, losses - 0.1
    ahead = 0.1 + np.exp([np.interp(np.log(1.5 * x), np.log(x), np.log(one)) for one in reducible])  # a horizon 1.5 times too long
    faults = {'horizon': ahead, 'learning rate': 0.1 + reducible * (1 + 0.15 * (1 - x))}
    for name, faulty in faults.items():
        assert (alarms(expected, faulty) <= 0.3).mean() >= 0.75, name


def test_the_alarm_gives_the_onset_of_a_late_fault(planted):
    """A loss that rises from x = 0.3 on: no p-value is low before, and the alarm starts after."""
    expected, losses = planted
    late = 0.1 + (losses - 0.1) * (1 + 0.2 * np.maximum(np.log(expected.x / 0.3), 0))
    for loss in late:
        reading = monitor.read(expected, expected.x, loss)
        assert 0.3 < reading.alarm <= 0.85 and (reading.p_value[reading.x <= 0.3] > monitor.DEFAULT_ALARM_LEVEL).all()


def test_residual_is_the_distance_to_the_ladder(planted):
    expected, _ = planted
    reading = monitor.read(expected, expected.x, expected.loss + 0.02 * expected.reducible)
    np.testing.assert_allclose(reading.residual, 0.02, rtol=1e-9)
    np.testing.assert_allclose(monitor.read(expected, expected.x, expected.loss).p_value, 1)


def test_p_values_are_as_rare_as_they_say():
    """Healthy residuals, noise estimated from six differences: p < 1% in 0.3 to 1.5% of 2,000 (standard error 0.2%).

    The Bonferroni correction of two correlated tests makes it a little less than 1%. With χ² tests it would be a tenth of them.
    """
    rng, x = np.random.default_rng(0), ladder_field.KNOTS
    ones, covariance = np.ones(len(x)), 1e-6 * (np.eye(len(x)) + 3 * ladder_field.noise_correlations(x)[1])
    factor, p_values = np.linalg.cholesky(covariance), []
    for _ in range(2000):
        estimate = covariance * rng.chisquare(6) / 6
        expected = monitor.Expected(x, ones, ones, ones, ones, estimate, freedom=6)
        p_values.append(monitor.read(expected, x, 1 + factor @ rng.normal(size=len(x))).p_value[[2, -1]])
    for share in (np.array(p_values) < 0.01).mean(0):
        assert 0.003 <= share <= 0.015, share


def test_alarm_level_keeps_the_false_alarm_rate(monkeypatch):
    """39 runs whose lowest p-value is u³, u uniform, far from that of a correct test: one further run in twenty is alarmed.

    2,000 repetitions give the rate to 0.015. Tests that are too conservative do not raise the level above the rate itself.
    """
    rng, two = np.random.default_rng(0), np.array([0.5, 1.0])

    def readings(power):
        return lambda table, ladder_table: [monitor.Reading(two, two, np.full(2, rng.random() ** power), *[np.nan] * 4)
                                            for _ in table['run']]

    table = pd.DataFrame({'run': np.arange(39)})
    monkeypatch.setattr(monitor, 'read_finished', readings(3))
    alarmed = [rng.random() ** 3 < monitor.alarm_level(table) for _ in range(2000)]
    assert np.mean(alarmed) == pytest.approx(monitor.FALSE_ALARM_RATE, abs=0.015)
    assert monitor.alarm_level(table[:10]) == monitor.DEFAULT_ALARM_LEVEL   # ten runs cannot say
    monkeypatch.setattr(monitor, 'read_finished', readings(0.2))
    assert monitor.alarm_level(table) == monitor.FALSE_ALARM_RATE


def test_a_run_of_the_ladder_is_compared_with_the_others():
    """Of a ladder's 12 runs, one has 20% more reducible loss than the others of its size. Only that one is alarmed."""
    table = power_law_table(np.random.default_rng(0), models=4, seeds=3, offset=1e-3, jitter=3e-4, evals=40)
    bad = table['run'] == 'D128-s0'
    table.loc[bad, 'test_loss'] += 0.2 * (table.loc[bad, 'test_loss'] - 0.1)
    found = [watch_faults.first_alarm(one) for one in monitor.read_finished(table, table)]
    assert [run for run, x in zip(table['run'].unique(), found, strict=True) if np.isfinite(x)] == ['D128-s0']


def test_a_ladder_of_three_runs_has_the_default_alarm_level():
    """Without any one of them two models are left, which is too few for a forecast."""
    three = power_law_table(np.random.default_rng(0), models=3, seeds=1, evals=40)
    assert monitor.read_finished(three, three) == []
    assert monitor.alarm_level(three) == monitor.DEFAULT_ALARM_LEVEL


def test_detection_rates_of_the_shipped_faults():
    """As docs/forecasts.md says: a wrong horizon is found early, half the learning rate is not, healthy runs are left alone."""
    table = logs.clean(logs.load(watch_faults.LADDER))[0]
    rates = {row['fault']: row for row in watch_faults.detection_rates(table, watch_faults.faulty_runs())}
    counts = {fault: round(row['by 0.3'] * row['runs']) for fault, row in rates.items()}
    assert counts == {'none (healthy)': 0, 'learning rate × 2': 4, 'learning rate ÷ 2': 0, 'horizon × 1.5': 6, 'no µP': 6}
    assert rates['none (healthy)']['by the end'] <= monitor.FALSE_ALARM_RATE


def run_folder_of(folder, run):
    """Writes the config.yaml of a planted run; returns the lines of its history."""
    folder.mkdir()
    (folder / 'config.yaml').write_text(yaml.safe_dump({
        'T': float(run['tokens'].iloc[-1]), 'num_params': float(run['num_params'].iloc[0]),
        'opt': {'schedule': 'linear', 'lr': 1e-3}}))
    return history_lines(run)


def history_lines(run):
    return [json.dumps({k: float(row[k]) for k in ('step', 'tokens', 'compute', 'test_loss')}) for _, row in run.iterrows()]


def test_a_folder_that_grows(few_runs, tmp_path, capsys):
    """A third of a run, its last line cut short, is on track. The rest is 5% worse: an alarm, and --every ends with the run."""
    path, table = few_runs
    run = table[table['run'] == 'D1024-s0']
    folder = tmp_path / 'run'
    lines = run_folder_of(folder, run)
    third = int(np.searchsorted(run['tokens'] / run['tokens'].iloc[-1], 0.3))
    (folder / 'history.jsonl').write_text('\n'.join(lines[:third]) + '\n' + lines[third][:30])
    beyond_commands.watch([str(folder), '--against', path, '--json'])
    result = json.loads(capsys.readouterr().out)
    assert result['alarm'] is None and 0.2 < result['now'] < 0.3 and len(result['residual']) == len(result['x'])
    assert result['forecast_lo90'] < run['test_loss'].iloc[-1] < result['forecast_hi90']

    worse = run.assign(test_loss=run['test_loss'] * np.where(run['tokens'] > 0.3 * run['tokens'].max(), 1.05, 1))
    (folder / 'history.jsonl').write_text('\n'.join(history_lines(worse)) + '\n')
    beyond_commands.watch([str(folder), '--against', path, '--out', str(tmp_path / 'watch.png'), '--every', '1'])
    assert 'ALARM: off its ladder from x = ' in capsys.readouterr().out and (tmp_path / 'watch.png').stat().st_size > 10_000


def test_a_source_that_does_not_exist_is_refused_in_one_line(few_runs, tmp_path):
    path, table = few_runs
    with pytest.raises(logs.LogError, match='neither a file or folder nor a W&B run'):
        beyond_commands.watch([str(tmp_path / 'nothing'), '--against', path])
    with pytest.raises(logs.LogError, match='holds 18 runs'):
        beyond_commands.watch([path, '--against', path])


def test_a_run_that_does_not_say_its_horizon_needs_the_option(few_runs):
    _, table = few_runs
    run = table[table['run'] == 'D1024-s0']
    with pytest.raises(logs.LogError, match='--horizon TOKENS'):
        monitor.analyse(run, table)
    assert monitor.analyse(run, table, tokens=run['tokens'].max())['now'] == 1


TRAIN = """
import json, os, sys, time, wandb
config, rows, half, go = json.load(sys.stdin), json.load(open(sys.argv[1])), int(sys.argv[2]), sys.argv[3]
run = wandb.init(project='p', entity='e', id='grows', config=config, settings=wandb.Settings(silent=True, console='off'))
for i, row in enumerate(rows):
    while i == half and not os.path.exists(go):
        time.sleep(0.1)
    run.log(row)
run.finish()
"""


def test_a_wandb_run_that_grows(loopback, few_runs, tmp_path):
    """The real client logs a third of a run. Once `watch` has called that on track, it logs a rest that is 5% worse."""
    path, table = few_runs
    run = table[table['run'] == 'D1024-s0']
    late = run['tokens'] > 0.3 * run['tokens'].max()
    rows = run.assign(test_loss=run['test_loss'] * np.where(late, 1.05, 1))
    rows = rows[['step', 'tokens', 'compute', 'test_loss']].to_dict('records')
    (tmp_path / 'rows.json').write_text(json.dumps(rows))
    (tmp_path / 'config.json').write_text(json.dumps({
        'T': float(run['tokens'].max()), 'num_params': float(run['num_params'].iloc[0]), 'opt.schedule': 'linear', 'opt.lr': 1e-3}))
    with loopback.WandbLoopback() as server:
        environment = server.env(WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL='1', WANDB_DIR=str(tmp_path))
        started = {'env': environment, 'text': True}
        training = subprocess.Popen([sys.executable, '-c', TRAIN, 'rows.json', str((~late).sum()), 'go'], cwd=tmp_path,
                                    stdin=(tmp_path / 'config.json').open(), **started)
        wait_for(lambda: server.runs and len(server.runs['e/p/grows'].history) >= (~late).sum(), training)
        watching = subprocess.Popen([sys.executable, '-m', 'figures', 'watch', 'e/p/grows', '--against', path,
                                     '--every', '1'], cwd=Path(monitor.__file__).parents[2], stdout=subprocess.PIPE, **started)
        shown = [next(line for line in watching.stdout if line in ('on track\n', 'ALARM'))]
        (tmp_path / 'go').touch()
        rest = watching.communicate(timeout=120)[0]
        assert training.wait(60) == 0
    assert shown == ['on track\n'] and watching.returncode == 0
    onset = float(re.findall(r'ALARM: off its ladder from x = ([\d.]+)', rest)[-1])
    assert 0.3 <= onset <= 0.5 and rest.splitlines()[-1].startswith('x = 1.000')


def wait_for(condition, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)


def test_the_figure_shows_the_run_where_it_was_evaluated(few_runs):
    """A run exactly on its ladder, evaluated only from x = 0.1 on: its line lies on the ladder's."""
    import matplotlib
    matplotlib.use('Agg')
    from figures import beyond_panels
    _, table = few_runs
    expected = monitor.expect(ladder_field.read_ladder(table), table['num_params'].max())
    late = expected.x >= 0.1
    reading = monitor.read(expected, expected.x[late], expected.loss[late])
    figure = beyond_panels.watch({'expected': expected, 'x': reading.x, 'residual': reading.residual, 'now': 1.0, 'forecast': 0.2,
                                  'forecast_hi90': 0.21, 'alarm': np.nan})
    own, = [line for line in figure.axes[0].lines if line.get_label() == 'this run']
    np.testing.assert_allclose(own.get_ydata(), np.where(late, expected.loss, np.nan), rtol=1e-9)


def test_training_records_what_the_command_prints(tmp_path):
    table = power_law_table(np.random.default_rng(1), evals=60)
    logs.write_parquet(table, tmp_path / 'ladder.parquet', source='planted')
    run = table[table['run'] == 'D1024-s0']
    share = (run['compute'] / run['compute'].max()).to_numpy()
    part = run[:np.searchsorted(share, 0.4) + 1]                    # up to the first evaluation at or after the knot 0.4
    look = monitor.follow(tmp_path / 'ladder.parquet', run['num_params'].iloc[0], float(run['compute'].iloc[-1]))
    rows = part[['compute', 'test_loss']].to_dict('records')
    numbers = look(rows)
    assert look(rows[:-1]) == {}                                    # no new knot since x = 0.3
    printed = monitor.analyse(part.assign(T=run['tokens'].max()), logs.clean(table)[0])
    assert numbers['residual'] == printed['residual'][-1] and numbers['p_value'] == printed['p_value'][-1]
    assert numbers['forecast'] == printed['forecast']
    curves = collapse.curves(table)
    assert abs(numbers['forecast'] / curves.loss[curves.model == 5, -1].mean() - 1) < 0.02


def test_a_training_run_records_its_residual_and_stops_itself(small_mlp, tmp_path, monkeypatch):
    """`watch` adds columns to the record and changes no loss. With `stop_above` under every loss the run ends early."""
    monkeypatch.chdir(tmp_path)
    ladder, _ = random_ladder(np.random.default_rng(0), models=4, seeds=2)
    shrink = small_mlp().derived.num_params / ladder['num_params'].median()          # the run is in the middle of the ladder
    ladder = ladder.assign(num_params=shrink * ladder['num_params'], compute=shrink * ladder['compute'])
    logs.write_parquet(ladder, tmp_path / 'ladder.parquet', source='planted')
    overrides = ('num_evals=12', 'watch=ladder.parquet')
    train.train(small_mlp('num_evals=12', 'run_dir=plain'))
    summary, = train.train(small_mlp(*overrides, 'run_dir=watched'))
    rows, plain = run_folder.read_history('watched'), run_folder.read_history('plain')
    assert summary['state'] == 'finished' and [row['test_loss'] for row in rows] == [row['test_loss'] for row in plain]
    assert any({'residual', 'p_value', 'forecast'} <= row.keys() for row in rows)
    assert not any('residual' in row for row in plain)
    summary, = train.train(small_mlp(*overrides, 'stop_above=1e-9', 'run_dir=stopped'))
    assert summary['state'] == 'stopped' and len(run_folder.read_history('stopped')) < len(rows)


def test_stop_above_needs_a_ladder(small_mlp):
    with pytest.raises(config.ConfigError, match='stop_above=.* needs a forecast'):
        small_mlp('stop_above=1')
