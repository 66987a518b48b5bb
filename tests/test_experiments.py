"""The sweep files hold the grids of the paper with true headers, and the runner trains a grid to its end if a point fails."""
import functools
import json
import re
from pathlib import Path

import hydra
import numpy as np
import pandas as pd
import pytest
import yaml

import train
from experiments import run as runner
from trainer import config, process, speed

FOLDER = Path(runner.__file__).parent

# The grids, written a second time from the paper (section 2, appendices A and C) and its published logs.
MLP_WIDTHS = [384, 512, 645, 812, 1024, 1290, 1625, 2048]
WIDTHS = [768, 896, 1024, 1152, 1280, 1536, 1792, 2048]
SEEDS = {'seed': [0, 1, 2, 3, 4]}
MLP = {'model.N': [5], 'opt.lr': [0.001], 'opt.B': [4096], 'opt.readout_lr_mult': [1], 'opt.warmup_tokens': [0]}
MLP_HORIZON = {'scale': [1346251.612836], 'exponent': [2.040882]}
TRANSFORMER = {'model.N': [3], 'opt.lr': [0.01], 'opt.b1': [0.9], 'opt.b2': [0.95], 'model.embed_init_std': [0.1],
               'opt.embed_lr_mult': [10], 'opt.readout_lr_mult': [1]}
CHESS = {**TRANSFORMER, 'model.L': [128], 'opt.B': [512], 'opt.warmup_tokens': [10e6]}
CIFAR = {**TRANSFORMER, 'model.L': [1024], 'opt.B': [64], 'opt.warmup_tokens': [50e6]}
CIFAR_SCHEDULES = {**CIFAR, 'opt.warmup_tokens': [10e6]}
FOUR = {'opt.schedule': ['const', 'linear', 'cosine', 'multicosine'], 'opt.decay_frac': [1.0, 0.2]}
THREE = {'opt.schedule': ['const', 'linear', 'multicosine'], 'opt.decay_frac': [1.0, 0.2]}
CONST, LINEAR = {'opt.schedule': ['const']}, {'opt.schedule': ['linear']}
GRIDS = {  # file: (config, wandb_tag, runs, the rest)
    'mlp_fit': ('mlp', 'mlp_fit', 10, {**MLP, **CONST, 'T': [15e9], 'model.D': [256, *MLP_WIDTHS, 2580]}),
    'mlp': ('mlp', 'mlp', 8, {**MLP, **LINEAR, **MLP_HORIZON, 'model.D': MLP_WIDTHS}),
    'mlp_no_mup': ('mlp', 'mlp_no_mup', 8, {**MLP, **LINEAR, **MLP_HORIZON, 'model.D': MLP_WIDTHS, 'model.match_mup_at_D': [384]}),
    'mlp_schedules_a': ('mlp', 'mlp_schedules', 8, {**MLP, **FOUR, 'model.D': [1024], 'T': [1e9]}),
    'mlp_schedules_b': ('mlp', 'mlp_schedules_across_D', 18, {**MLP, **THREE, 'model.D': [512, 1024, 2048], 'T': [1e9]}),
    'mlp_schedules_c': ('mlp', 'mlp_schedules_across_T', 54,
                        {**MLP, **THREE, 'model.D': [512, 1024, 2048], 'T': [0.5e9, 1e9, 2e9]}),
    'chess_fit': ('chess', 'chess_fit', 45, {**CHESS, **CONST, **SEEDS, 'T': [25e9], 'model.D': [640, *WIDTHS]}),
    'chess': ('chess', 'chess', 40,
              {**CHESS, **LINEAR, **SEEDS, 'model.D': WIDTHS, 'scale': [855499.217040], 'exponent': [2.026780]}),
    'cifar5m_fit': ('cifar5m', 'c5m_fit', 40, {**CIFAR, **CONST, **SEEDS, 'T': [50e9], 'model.D': WIDTHS}),
    'cifar5m': ('cifar5m', 'c5m', 40,
                {**CIFAR, **LINEAR, **SEEDS, 'model.D': WIDTHS, 'scale': [540003.747913], 'exponent': [2.045867]}),
    'cifar5m_schedules_a': ('cifar5m', 'c5m_schedules', 8, {**CIFAR_SCHEDULES, **FOUR, 'model.D': [1024], 'T': [10e9]}),
    'cifar5m_schedules_b': ('cifar5m', 'c5m_schedules_across_D', 18,
                            {**CIFAR_SCHEDULES, **THREE, 'model.D': [768, 1280, 2048], 'T': [10e9]}),
    'cifar5m_schedules_c': ('cifar5m', 'c5m_schedules_across_T', 24,
                            {**CIFAR_SCHEDULES, **THREE, 'model.D': [1024], 'T': [2.5e9, 5e9, 10e9, 20e9]}),
}
FILES = sorted(path.stem for path in FOLDER.glob('*.yaml'))


@functools.cache
def points_of(name):
    return runner.expand(*runner.read_sweep(FOLDER / f'{name}.yaml'), data_needed=False)


@pytest.mark.parametrize('name', GRIDS)
def test_grids_are_the_papers(name):
    config_name, tag, _, grid = GRIDS[name]
    found_config, axes = runner.read_sweep(FOLDER / f'{name}.yaml')
    assert found_config == config_name
    assert axes == {**grid, 'wandb_tag': [tag], 'wandb_project': ['supercollapse'], 'wandb_mode': ['offline']}


def test_there_are_thirteen_sweeps_of_the_paper_and_the_demo():
    assert len(GRIDS) == 13 and {*GRIDS, 'demo'} <= set(FILES)


def closed_form(run):
    """(p, steps) by the formulas of the paper (appendices A and C)."""
    m = run.model
    p = 8 * m.D + 2 * m.N * m.D**2 + m.D if run.arch == 'mlp' else (2 * m.V + m.L) * m.D + m.N * (4 + 2 * m.mlp_expansion) * m.D**2
    T = run.T if run.scale is None else 1e15 * (p / run.scale) ** run.exponent / (6 * p)
    return p, int(T / (run.opt.B * m.L))


@pytest.mark.parametrize('name', FILES)
def test_every_grid_point_is_a_valid_run_and_the_header_is_true(name):
    points = points_of(name)
    for point in points:
        assert (point.run.derived.num_params, point.run.derived.steps) == closed_form(point.run), point.label
    runs = sum(len(point.run.all_seeds) for point in points)
    assert name not in GRIDS or runs == GRIDS[name][2]

    header = ' '.join(line.lstrip('# ') for line in (FOLDER / f'{name}.yaml').read_text().splitlines() if line.startswith('#'))
    pattern = r'Runs: (\S+) Cost: (\S+) FLOPs .*?, (\S+) (hours|minutes) at (\S+) FLOP/s .*?evaluation \+(\d+)%'
    said_runs, said_flops, time, unit, rate, said_evaluation = re.search(pattern, header).groups()
    assert f'Command: python -m experiments.run experiments/{name}.yaml' in header and 'Expected: ' in header
    assert int(said_runs) == runs
    flops = evaluation = 0
    for point in points:
        run, seeds = point.run, len(point.run.all_seeds)
        of_batch = 6 * run.derived.num_params * run.opt.B * run.model.L * seeds  # forward and backward
        flops += of_batch * run.derived.steps
        evaluations = len(run.derived.eval_points)
        evaluation += of_batch * evaluations * run.derived.num_test_batches
    assert float(said_flops) == pytest.approx(flops, rel=5e-4)  # four digits are stated
    seconds = flops / float(rate)
    assert float(time.replace(',', '')) == pytest.approx(seconds / {'hours': 3600, 'minutes': 60}[unit], rel=0.006)  # three, or two
    assert int(said_evaluation) == round(100 * evaluation / flops)


@pytest.mark.parametrize('name', [name for name in FILES if name.startswith('laptop')])
def test_expected_losses_are_those_of_the_saved_logs(name):
    """Means over seeds of the final test losses, for every point, or the ends of their range."""
    header = ' '.join(line.lstrip('# ') for line in (FOLDER / f'{name}.yaml').read_text().splitlines() if line.startswith('#'))
    expected, log = re.search(r'Expected: test loss (.*) Saved in (logs/\S+\.parquet)\.', header).groups()
    stated = set(re.findall(r'(?<![=\d.])\d\.\d{3}(?!\d)', expected))
    rows = pd.read_parquet(FOLDER.parent / log)
    final = rows[rows.groupby('run').step.transform('max') == rows.step]
    means = {}
    for point in points_of(name):
        run = point.run
        same = final[(final.D == run.model.D) & (final.schedule == run.opt.schedule) & (final.decay_frac == run.opt.decay_frac) &
                     np.isclose(final.peak_lr, run.opt.lr) & np.isclose(final['T'], run.T)]
        assert sorted(same.seed) == sorted(run.all_seeds), point.label
        means[point.label] = f'{same.test_loss.mean():.3f}'
    assert stated <= set(means.values()), (stated, means)
    assert stated == set(means.values()) or ' to ' in expected


def test_published_sizes_and_lengths():
    """p as the paper counts it, and one step more than the last logged one of the published runs, which stop an update early."""
    mlp = {point.run.model.D: point.run.derived for point in points_of('mlp')}
    assert mlp[384].num_params == 1_478_016
    assert [mlp[D].steps for D in MLP_WIDTHS] == [33_309, 60_590, 97_953, 158_145, 256_258, 414_358, 669_941, 1_084_310]
    chess = {point.run.model.D: point.run.derived for point in points_of('chess_fit')}
    assert (chess[768].num_params, chess[768].steps) == (10_813_440, 381_469)


@pytest.mark.parametrize('name', FILES)
def test_wandb_agent_can_run_it(name):
    """Numbers are numbers (YAML reads 15e9 and 1e-3 as text), and the arguments an agent makes of them compose to the same run."""
    sweep = yaml.safe_load((FOLDER / f'{name}.yaml').read_text())
    assert (sweep['program'], sweep['method']) == ('train.py', 'grid')
    assert sweep['command'][:3] == ['${env}', 'python', '${program}'] and sweep['command'][-1] == '${args_no_hyphens}'
    assert sweep['project'] == sweep['parameters']['wandb_project']['value']  # an agent's project wins over the configuration's
    for key, given in sweep['parameters'].items():
        for value in given.get('values', [given.get('value')]):
            if isinstance(value, str):
                with pytest.raises(ValueError):
                    float(value)
                    pytest.fail(f'{key}: {value} is text')
    config_name, axes = runner.read_sweep(FOLDER / f'{name}.yaml')
    with hydra.initialize_config_dir(str(config.CONFIGS), version_base=None):
        cfg = hydra.compose(config_name, [f'{key}={values[0]}' for key, values in axes.items()])
    alone = config.resolve(cfg)
    assert any(alone.name(alone.seed) == point.run.name(seed)
               for point in points_of(name) for seed in point.run.all_seeds)


TINY = """
program: train.py
method: grid
command: ['${env}', python, '${program}', -cn, mlp, wandb_mode=online, '${args_no_hyphens}']
parameters:
  wandb_tag: {value: tiny}
  model.N: {value: 1}
  model.D: {values: [16, 8]}
  seed: {values: [0, 1]}
  opt.B: {value: 64}
  opt.lr: {value: 0.001}
  T: {value: 640}
  T_eval: {value: 64}
  num_evals: {value: 2}
"""


@pytest.fixture
def tiny(tmp_path, tmp_path_factory, monkeypatch):
    """A sweep file of 2 widths × 2 seeds × 10 steps, in the folder that its runs are written to."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.getbasetemp()))
    monkeypatch.setattr(speed, 'matmul_rate', lambda dtype: 1e11)
    (tmp_path / 'tiny.yaml').write_text(TINY)
    return 'tiny.yaml'


def run(*arguments):
    """The runner's exit code, 0 if it returns."""
    try:
        runner.main(list(arguments))
    except SystemExit as stop:
        return stop.code or 0
    return 0


def test_runner_trains_a_grid_once(tiny, capsys):
    assert run(tiny, 'wandb_mode=disabled') == 0
    table = capsys.readouterr().out
    summaries = [json.loads(path.read_text()) for path in sorted(Path('runs/tiny').glob('*/summary.json'))]
    assert [summary['state'] for summary in summaries] == ['finished'] * 4
    for D in (8, 16):
        losses = [summary['test_loss'] for summary in summaries if f'_D{D}_' in summary['name']]
        row = next(line for line in table.splitlines() if line.split()[:1] == [str(D)])
        assert f'{np.mean(losses):.5f} ± {np.std(losses, ddof=1):.5f}' in row and 'finished' in row
    assert table.index('model.D=8:') < table.index('model.D=16:'), 'the smallest compute comes first'

    written = {path: path.stat().st_mtime_ns for path in Path('runs').rglob('*')}
    assert run(tiny, 'wandb_mode=disabled') == 0
    assert {path: path.stat().st_mtime_ns for path in Path('runs').rglob('*')} == written, 'the second call trains nothing'
    assert capsys.readouterr().out.splitlines()[-4:] == table.splitlines()[-4:], 'and shows the same table'

    summary = sorted(Path('runs/tiny').glob('*/summary.json'))[0]
    summary.write_text(json.dumps(summaries[0] | {'state': 'stopped'}))
    assert run(tiny, 'wandb_mode=disabled') == 0, 'a run stopped by its forecast has ended well'
    summary.write_text(json.dumps(summaries[0] | {'state': 'diverged'}))
    assert run(tiny, 'wandb_mode=disabled') == 1


def test_one_failure_does_not_stop_the_rest(tiny, capsys, write_tokens):
    """A data set is too short, a learning rate takes the weights past float32; the good pair trains, and the exit code tells."""
    write_tokens(name='good')
    write_tokens(name='short', test=np.zeros(8, np.uint8))
    overrides = ['ds_path=short,good', 'opt.lr=1e37,0.01', 'seed=0', 'arch=transformer', 'model.V=64', 'model.L=16', 'model.dh=8',
                  'model.D=8', 'opt.B=4', 'wandb_mode=disabled']
    assert run(tiny, *overrides) == 1
    out = capsys.readouterr().out
    for lr in ('1e37', '0.01'):
        assert re.search(rf'^opt.lr={lr} ds_path=short: failed, ValueError: short/test.bin: 8 test tokens are fewer', out, re.M)
        assert re.search(rf'^ +{lr} +short .* failed', out, re.M)
    assert re.search(r'^ +1e37 +good .* diverged', out, re.M)
    assert re.search(r'^ +0.01 +good .* finished', out, re.M)


@pytest.mark.parametrize('overrides, message', [
    (['model.Q=3'], "unknown key 'model.Q'; configs/default.yaml lists all keys; did you mean model."),
    (['T=700', 'token_per_param=1'], 'model.D=16: the horizon is ambiguous: T=700'),
    (['model.D=8,abc'], 'model.D=abc: model.D'),
    (['opt.schedule=linear,line'], 'opt.schedule=line: opt.schedule=line is unknown'),
    (['model.D'], 'model.D is not an override'),
    (['model.D=8,8'], 'two points of the grid write the folder'),
    (['run_dir=here'], 'two points of the grid write the folder'),
])
def test_bad_grids_are_refused_before_the_first_run(tiny, overrides, message):
    line = run(tiny, *overrides)
    assert message in line and '\n' not in line
    assert not Path('runs').exists()


@pytest.mark.parametrize('text, message', [
    ('a: [', 'is not YAML'),
    ('method: bayes', 'is not a grid sweep'),
    ('{method: grid, parameters: {}}', 'names no configuration'),
    ('{method: grid, parameters: {}, command: [-cn, chesss]}', 'did you mean chess?'),
    ('{method: grid, parameters: {T: 3}, command: [-cn, mlp]}', 'parameter T has no values'),
])
def test_bad_files_are_refused(tmp_path, text, message):
    (tmp_path / 'bad.yaml').write_text(text)
    line = run(str(tmp_path / 'bad.yaml'))
    assert message in line and '\n' not in line


def test_a_missing_file_gets_a_line_with_the_files_that_exist(tmp_path):
    message = run(str(tmp_path / 'mpl.yaml'))
    assert 'there is no sweep file' in message and 'mlp_fit' in message and message.endswith('did you mean mlp?')
    assert '\n' not in message and 'Errno' not in message


def test_the_paper_authors_key_for_the_optimizer_is_accepted(tiny):
    """Sweep files of the paper's authors set opt.name, which does not change the runs."""
    name, axes = runner.read_sweep(tiny)
    points = [runner.expand(name, axes | more) for more in ({}, {'opt.name': ['adam']})]
    assert [point.run for point in points[0]] == [point.run for point in points[1]]
    with pytest.raises(config.ConfigError, match='opt.name=adan is unknown; choose one of adam, muon; did you mean adam'):
        runner.expand(name, axes | {'opt.name': ['adan']})


def test_overrides_and_seeds(tiny):
    name, axes = runner.read_sweep(tiny)
    assert axes['wandb_mode'] == ['offline'], 'online in the file is not online here'
    over = axes | dict(map(runner.read_override, ['model.D=32,64', 'opt.lr=1e-2', 'wandb_mode=online']))
    points = runner.expand(name, over)
    assert [(point.swept, point.run.opt.lr, point.run.wandb_mode, point.run.seeds) for point in points] == [
        ({'model.D': 32}, 0.01, 'online', [0, 1]), ({'model.D': 64}, 0.01, 'online', [0, 1])]
    grouped = runner.expand(name, axes)[0].run
    alone = runner.expand(name, axes | {'seed': [1]})[0].run
    assert alone.name(1) == grouped.name(1), 'a seed is the same run whether trained alone or with others'
    assert alone.seeds is None


def test_dry_run_trains_nothing(tiny, capsys):
    assert run(tiny, '--dry-run') == 0
    assert re.search(r'^ *8 +200 +7.680e\+05 +10 +6.400e\+02 +2 +not trained', capsys.readouterr().out, re.M)
    assert not Path('runs').exists()


def test_evaluations_that_cost_more_than_training_are_warned_of(tiny, capsys):
    """10 steps and 4 evaluations of one batch each: cheap. Of 4 batches each: 1.6 times the training."""
    assert run(tiny, '--dry-run') == 0 and 'warning' not in capsys.readouterr().out
    assert run(tiny, '--dry-run', 'T_eval=64,256') == 0
    out = capsys.readouterr().out
    assert 'evaluation +100%' in out
    assert 'warning, 2 of 4 points: evaluations cost 1.6 times the FLOPs of training; lower num_evals=2 or T_eval=256 (' in out


def test_the_rate_counts_neither_start_up_nor_compilation(tiny, monkeypatch):
    """Each run takes 60 s to start and compile, then 1 s a batch. An earlier session has done 4 steps of the second run."""
    now = 1000.0
    monkeypatch.setattr(runner.time, 'time', lambda: now)
    points = runner.expand(*runner.read_sweep(tiny))  # evaluated at 0, 1, 9 and 10 of 10 steps, on one batch
    first, second = (2 * point.run.derived.compute / 10 for point in points)  # FLOPs of a batch of both seeds
    with open('bar.txt', 'w') as file, runner.SweepBar(points, file=file) as bar:
        bar._time, bar.start_t = lambda: now, now  # tqdm's own clock

        def rate():
            shown = bar.format_dict
            return (shown['n'] - shown['initial']) / shown['elapsed'] if shown['elapsed'] else None

        assert bar.total == pytest.approx(14 * (first + second))
        bar.start(points[0])
        for seconds, steps, metrics in ((59, 0, {}), (1, 0, {'test_loss': 1.0}), (1, 1, {}), (2, 2, {})):
            now += seconds
            bar.on_steps(steps, metrics)
        assert rate() == pytest.approx(first)
        bar.start(points[1])
        for seconds, steps in ((59, 4), (1, 1)):
            now += seconds
            bar.on_steps(steps, {})
            assert rate() == pytest.approx(first), 'neither the earlier session nor the start-up counts'
        now += 1
        bar.on_steps(1, {})
        assert rate() == pytest.approx((3 * first + second) / 4)
        assert bar.n == pytest.approx(4 * first + 8 * second)  # of the second run, 6 steps and the evaluations at 0 and 1


@pytest.mark.parametrize('stop, code', [(process.Interrupted(15), 128 + 15), (KeyboardInterrupt(), 128 + 2)])
def test_an_interrupt_stops_with_its_own_exit_code(tiny, capsys, monkeypatch, stop, code):
    def interrupted(run, on_steps):
        raise stop

    monkeypatch.setattr(train, 'train', interrupted)
    assert run(tiny) == code
    assert capsys.readouterr().out.count('not trained') == 2, 'the second point is not begun, and the table is shown'
