"""The watch leaves healthy runs alone, finds planted faults and names them, and follows a folder or a W&B run that grows."""

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
from tests.logs_of import power_law_table, random_ladder
from tests.test_collapse import command
from trainer import config
from trainer import run_folder as record


@pytest.fixture(scope='module')
def planted():
    """(Expected of the largest of six models, its runs [4, K]): a ladder without faults, noise 0.1% of the loss."""
    table = power_law_table(np.random.default_rng(0), offset=3e-4, jitter=1e-4)
    ladder = ladder_field.gather(table)
    return monitor.expect(ladder, ladder.p[-1]), ladder.losses[-1]


def alarms(expected, losses):
    return np.array([monitor.read(expected, expected.x, loss).alarm for loss in losses])


def test_healthy_runs_are_left_alone():
    """30 runs of the largest models of 10 random ladders, never in the fit: hardly one alarmed. Control: a loss half worse is."""
    found = {'healthy': [], 'half worse': []}
    for seed in range(10):
        table, _ = random_ladder(np.random.default_rng(100 + seed), models=6, seeds=3)
        ladder = ladder_field.gather(table)
        expected = monitor.expect(ladder_field.choose(ladder, slice(5)), ladder.p[-1])
        for loss in ladder.losses[-1]:
            found['healthy'].append(monitor.first_alarm(monitor.read(expected, expected.x, loss)))
            found['half worse'].append(monitor.first_alarm(monitor.read(expected, expected.x, loss + 0.5 * expected.reducible)))
    assert np.isfinite(found['healthy']).mean() < 0.1       # runs of one ladder fall together: ten events
    assert np.isfinite(found['half worse']).mean() > 0.8


def test_faults_are_found_by_a_third_of_the_run(planted):
    expected, losses = planted
    assert np.isnan(alarms(expected, losses)).all()
    x, clean = expected.x, losses - 0.1
    ahead = 0.1 + np.exp([np.interp(np.log(1.5 * x), np.log(x), np.log(one)) for one in clean])     # a horizon 1.5 times too long
    faults = {'horizon': ahead, 'learning rate': 0.1 + clean * (1 + 0.15 * (1 - x))}
    for name, faulty in faults.items():
        assert (alarms(expected, faulty) <= 0.3).mean() >= 0.75, name


def test_a_late_fault_is_named_by_its_onset(planted):
    expected, losses = planted
    late = 0.1 + (losses - 0.1) * (1 + 0.2 * np.maximum(np.log(expected.x / 0.3), 0))
    for loss in late:
        reading = monitor.read(expected, expected.x, loss)
        assert 0.3 < reading.alarm <= 0.85 and (reading.p_value[reading.x <= 0.3] > monitor.ALARM).all()
        assert reading.looks_like[0][0].startswith('from x =') and reading.looks_like[0][1] > 0.5


def test_the_residual_is_the_distance_to_the_ladder(planted):
    expected, _ = planted
    reading = monitor.read(expected, expected.x, expected.loss + 0.02 * expected.reducible)
    np.testing.assert_allclose(reading.residual, 0.02, rtol=1e-9)
    np.testing.assert_allclose(monitor.read(expected, expected.x, expected.loss).p_value, 1)


def test_p_values_are_as_rare_as_they_say():
    """Healthy residuals whose noise is known from six differences: a p_value of 1% in 0.3 to 1.5% of 2,000 (two tests at half the
    level, correlated; the standard error is 0.2%). With χ² tests it would be a tenth of them."""
    rng, x = np.random.default_rng(0), ladder_field.KNOTS
    ones, covariance = np.ones(len(x)), 1e-6 * (np.eye(len(x)) + 3 * ladder_field.along(x)[1])
    factor, p_value = np.linalg.cholesky(covariance), []
    for _ in range(2000):
        estimate = covariance * rng.chisquare(6) / 6
        expected = monitor.Expected(x, ones, ones, ones, ones, estimate, estimate, 1.0, freedom=6)
        p_value.append(monitor.read(expected, x, 1 + factor @ rng.normal(size=len(x))).p_value[[2, -1]])
    for rare in (np.array(p_value) < 0.01).mean(0):
        assert 0.003 <= rare <= 0.015, rare


def test_the_level_keeps_its_promise(monkeypatch):
    """39 runs whose lowest p_value is u³, far from what a sound test has: one further run in twenty is alarmed (2,000 times, so to
    0.015). Tests that are too shy do not raise the level above that, and ten runs cannot say."""
    rng, two = np.random.default_rng(0), np.array([0.5, 1.0])

    def readings(power):
        return lambda table, ladder: [monitor.Reading(two, two, np.full(2, rng.random() ** power), np.nan, []) for _ in table['run']]

    table = pd.DataFrame({'run': np.arange(39)})
    monkeypatch.setattr(monitor, 'readings', readings(3))
    alarmed = [rng.random() ** 3 < monitor.level(table, None) for _ in range(2000)]
    assert np.mean(alarmed) == pytest.approx(monitor.FALSE, abs=0.015)
    assert monitor.level(table[:10], None) == monitor.ALARM
    monkeypatch.setattr(monitor, 'readings', readings(0.2))
    assert monitor.level(table, None) == monitor.FALSE


def test_a_run_of_the_ladder_does_not_vouch_for_itself():
    """Of a ladder's 12 runs, one 20% (of its reducible loss) above the others of its size is alarmed, the others are not. A ladder
    of three single runs has none to spare, and is left to the level that needs none."""
    table = power_law_table(np.random.default_rng(0), models=4, seeds=3, offset=1e-3, jitter=3e-4, evals=40)
    bad = table['run'] == 'D128-s0'
    table.loc[bad, 'test_loss'] += 0.2 * (table.loc[bad, 'test_loss'] - 0.1)
    found = [monitor.first_alarm(one) for one in monitor.readings(table, ladder_field.gather(table))]
    assert [run for run, x in zip(table['run'].unique(), found, strict=True) if np.isfinite(x)] == ['D128-s0']
    three = power_law_table(np.random.default_rng(0), models=3, seeds=1, evals=40)
    assert monitor.level(three, ladder_field.gather(three)) == monitor.ALARM


def test_a_folder_that_grows(tmp_path):
    """Half of a run, its last line cut short, then a diverging rest: on track, then an alarm; with --every until its end."""
    table = power_law_table(np.random.default_rng(0), offset=3e-4, jitter=1e-4, evals=60, seeds=3)  # too few to set the level
    logs.write_parquet(table, tmp_path / 'ladder.parquet', source='planted')
    run = table[table['run'] == 'D1024-s0']
    folder = tmp_path / 'run'
    folder.mkdir()
    (folder / 'config.yaml').write_text(yaml.safe_dump({
        'T': float(run['tokens'].iloc[-1]), 'num_params': float(run['num_params'].iloc[0]),
        'opt': {'schedule': 'cosine', 'lr': 1e-3}}))
    rows = [json.dumps({k: float(row[k]) for k in ('step', 'tokens', 'compute', 'test_loss')}) for _, row in run.iterrows()]
    half = int(np.searchsorted(run['tokens'] / run['tokens'].iloc[-1], 0.3))
    (folder / 'history.jsonl').write_text('\n'.join(rows[:half]) + '\n' + rows[half][:30])
    look = ('--against', tmp_path / 'ladder.parquet')
    done = command(folder, *look, '--json', module='watch')
    result = json.loads(done.stdout)
    assert result['alarm'] is None and 0.2 < result['now'] < 0.3 and len(result['residual']) == len(result['x'])
    assert result['differences'] == ["schedule is cosine, the ladder's linear"]
    final = run['test_loss'].iloc[-1]
    assert result['forecast_lo90'] < final < result['forecast_hi90']
    worse = run.assign(test_loss=run['test_loss'] * np.where(run['tokens'] > 0.3 * run['tokens'].max(), 1.05, 1))
    rows = [json.dumps({k: float(row[k]) for k in ('step', 'tokens', 'compute', 'test_loss')}) for _, row in worse.iterrows()]
    (folder / 'history.jsonl').write_text('\n'.join(rows) + '\n')
    done = command(folder, *look, '--out', tmp_path / 'monitor.png', '--every', 1, module='watch')
    assert 'ALARM' in done.stdout and 'from x' in done.stdout and (tmp_path / 'monitor.png').stat().st_size > 10_000
    missing = command(tmp_path / 'nothing', *look, module='watch')
    assert missing.returncode == 2 and missing.stderr.count('\n') == 1 and 'neither' in missing.stderr


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


def test_a_wandb_run_that_grows(loopback, tmp_path):
    """The real client logs a third of a run, and, once the watch has called that on track, a rest that has gone wrong."""
    table = power_law_table(np.random.default_rng(0), offset=3e-4, jitter=1e-4, evals=60, seeds=3)
    logs.write_parquet(table, tmp_path / 'ladder.parquet', source='planted')
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
        watching = subprocess.Popen([sys.executable, '-m', 'figures', 'watch', 'e/p/grows', '--against', tmp_path / 'ladder.parquet',
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


def test_a_curve_is_drawn_where_it_was_evaluated(tmp_path):
    """A run on its ladder exactly, evaluated from x = 0.1 on only: the line of the picture lies on the ladder's."""
    import matplotlib
    matplotlib.use('Agg')
    table = power_law_table(np.random.default_rng(0), seeds=3)
    expected = monitor.expect(ladder_field.gather(table), table['num_params'].max())
    late = expected.x >= 0.1
    reading = monitor.read(expected, expected.x[late], expected.loss[late])
    figure = beyond_panels.watch({'expected': expected, 'x': reading.x, 'residual': reading.residual, 'now': 1.0, 'forecast': 0.2,
                         'forecast_hi90': 0.21, 'alarm': np.nan, 'looks_like': []})
    own, = [line for line in figure.axes[0].lines if line.get_label() == 'this run']
    np.testing.assert_allclose(own.get_ydata(), expected.loss[late], rtol=1e-9)


def test_what_in_the_configuration_differs_is_said():
    table = power_law_table(np.random.default_rng(0), seeds=1)
    expected = monitor.expect(ladder_field.gather(table), table['num_params'].max())
    run = table[table['num_params'] == table['num_params'].max()]
    own = run.assign(match_mup_at_D=32.0, peak_lr=2e-3)
    found = monitor.differences(own, table, run['compute'].max(), expected)
    assert found == ["peak_lr is 0.002, the ladder's 0.001", "match_mup_at_D is 32, the ladder's log names none"]
    assert not monitor.differences(run, table, run['compute'].max(), expected)


def test_what_train_records_is_what_the_command_shows(tmp_path):
    table = power_law_table(np.random.default_rng(1), evals=60)
    logs.write_parquet(table, tmp_path / 'ladder.parquet', source='planted')
    run = table[table['run'] == 'D1024-s0']
    share = (run['compute'] / run['compute'].max()).to_numpy()
    part = run[:np.searchsorted(share, 0.4) + 1]                    # up to the first evaluation at or after x = 0.4
    end = float(run['compute'].iloc[-1])
    look = monitor.follow(tmp_path / 'ladder.parquet', run['num_params'].iloc[0], end)
    rows = part[['compute', 'test_loss']].to_dict('records')
    numbers = look(rows)
    assert look(rows[:-1]) == {}                                    # nothing new to judge since x = 0.3
    shown = monitor.analyse(part.assign(T=run['tokens'].max()), logs.clean(table)[0])
    assert numbers['residual'] == shown['residual'][-1] and numbers['forecast'] == shown['forecast']
    curves = collapse.curves(table)
    assert abs(numbers['forecast'] / curves.loss[curves.model == 5, -1].mean() - 1) < 0.02


def test_a_training_run_records_its_residual_and_stops_itself(small_mlp, tmp_path, monkeypatch):
    """`watch` adds the residual to the record and changes nothing else; with `stop_above` under any loss the run ends early."""
    monkeypatch.chdir(tmp_path)
    ladder, _ = random_ladder(np.random.default_rng(0), models=4, seeds=2)
    shrink = small_mlp().derived.num_params / ladder['num_params'].median()          # the run is in the middle of the ladder
    ladder = ladder.assign(num_params=shrink * ladder['num_params'], compute=shrink * ladder['compute'])
    logs.write_parquet(ladder, tmp_path / 'ladder.parquet', source='planted')
    overrides = ('num_evals=12', 'watch=ladder.parquet')
    train.train(small_mlp('num_evals=12', 'run_dir=plain'))
    summary, = train.train(small_mlp(*overrides, 'run_dir=watched'))
    rows, plain = record.read_history('watched'), record.read_history('plain')
    assert summary['state'] == 'finished' and [row['test_loss'] for row in rows] == [row['test_loss'] for row in plain]
    assert any('residual' in row and 'forecast' in row for row in rows) and not any('residual' in row for row in plain)
    summary, = train.train(small_mlp(*overrides, 'stop_above=1e-9', 'run_dir=stopped'))
    assert summary['state'] == 'stopped' and len(record.read_history('stopped')) < len(rows)
    with pytest.raises(config.ConfigError, match='stop_above=1 needs a forecast'):
        small_mlp('stop_above=1')
