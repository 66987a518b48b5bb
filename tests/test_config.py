"""Configurations: the published keys and horizons, the derived values, names, and one clear line for everything that cannot run."""
import ast
import dataclasses
import os
import pickle
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from trainer import command_line, config

ROOT = config.CONFIGS.parent

# Keys and defaults


def test_published_defaults(compose):
    """Published commands and sweep files name these keys and count on these values."""
    default = config.flatten(OmegaConf.to_container(compose('default')))
    published = {
        'token_per_param': None, 'scale': None, 'exponent': None, 'T': None, 'T_eval': None, 'num_evals': 100, 'ds_path': None,
        'wandb_project': 'test', 'wandb_tag': 'test', 'arch': 'transformer', 'shuffle': False, 'seed': 0, 'model.base_D': 128,
        'model.D': 768, 'model.match_mup_at_D': None, 'model.mlp_expansion': 4, 'model.dh': 64, 'model.L': 768, 'model.N': 3,
        'model.V': 50257, 'model.embed_init_std': 0.1, 'model.init_std_mult': 1, 'model.fsdp_enabled': False, 'model.dtype': None,
        'model.scale_by_depth': True, 'opt.B': 512, 'opt.B_max': 16384, 'opt.lr': 0.4, 'opt.embed_lr_mult': 1,
        'opt.readout_lr_mult': 0.1, 'opt.warmup_tokens': 0, 'opt.schedule': 'const', 'opt.decay_frac': 1, 'opt.b1': 0.9,
        'opt.b2': 0.95, 'opt.eps': 1e-20, 'opt.weight_decay': 0, 'opt.mup': True}
    assert {k: default[k] for k in published} == published
    tasks = {'mlp': ('mlp', 'fourier', 128, 3, 1, 8, 1, 4096, 0.4, 'const', 0, 1e9, 100_000, 1000),
             'chess': ('transformer', 'chess', 128, 3, 128, 64, 1, 512, 0.4, 'linear', 10e6, 1e9, 2_048_000, 1000),
             'cifar5m': ('transformer', 'cifar5m', 128, 3, 1024, 256, 1, 64, 0.4, 'linear', 10e6, 1e9, 2_048_000, 1000)}
    for name, values in tasks.items():
        c = compose(name)
        m, o = c.model, c.opt
        assert values == (c.arch, c.ds_path, m.D, m.N, m.L, m.V, m.mlp_expansion, o.B, o.lr, o.schedule, o.warmup_tokens, c.T,
                          c.T_eval, c.num_evals)


def attributes_read(source):
    """Names read as attributes anywhere in a module, except in the checks of values, which are no use of a key."""
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if getattr(node, 'name', None) != '_check_combinations']
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def test_every_key_is_read_somewhere(compose):
    sources = [*ROOT.glob('*.py'), *ROOT.glob('trainer/*.py')]
    read = set().union(*(attributes_read(path.read_text()) for path in sources))
    keys = {key.split('.')[-1] for key in config.flatten(OmegaConf.to_container(compose('default')))}
    assert keys - read == set()
    assert 'weight_decoy' not in read and attributes_read('def _check_combinations(c): c.x\ndef f(c): c.y') == {'y'}  # the control


def test_the_default_configuration_has_every_key(compose):
    groups = {'': config.Config, 'model.': config.Model, 'opt.': config.Opt}
    keys = {prefix + field.name for prefix, group in groups.items() for field in dataclasses.fields(group)} - {'model', 'opt'}
    assert set(config.flatten(OmegaConf.to_container(compose('default')))) == keys


# Horizons and derived values

def test_the_published_mlp(resolve):
    run = resolve('mlp', 'model.N=5', 'model.D=384', 'scale=1346251.612836', 'exponent=2.040882')
    assert (run.derived.num_params, run.derived.steps) == (1_478_016, 33_309)  # published
    assert 6 * run.T * run.derived.num_params == pytest.approx(1e15 * (1_478_016 / 1346251.612836) ** 2.040882, rel=1e-12)
    assert run.derived.num_test_batches == 24 and run.derived.microbatches == 1


@pytest.mark.parametrize('overrides, T', [
    (('token_per_param=20',), 20 * 99_456),  # p of the mlp at D=128, N=3: 8·128 + 6·128² + 128
    (('T=5e8',), 5e8),
    (('T=5e8', 'scale=1e5', 'exponent=2'), 1e15 * (99_456 / 1e5) ** 2 / (6 * 99_456)),  # a sweep's horizon replaces the config's T
    (('T=null', 'token_per_param=20'), 20 * 99_456),
])
def test_three_ways_to_a_horizon(resolve, overrides, T):
    run = resolve('mlp', *overrides)
    assert run.derived.num_params == sum(run.derived.params_by_role.values()) == 99_456
    assert run.T == pytest.approx(T, rel=1e-12)
    assert run.derived.steps == int(T // 4096)


def test_a_horizon_set_twice_by_hand_is_refused(resolve):
    """A T on the command line or in a sweep is not a default, and is not ignored."""
    for other in (('token_per_param=20',), ('scale=1e5', 'exponent=2')):
        with pytest.raises(config.ConfigError, match=f'ambiguous: T=2e.06 and {other[0][:5]}'):
            resolve('mlp', 'T=2e6', *other, overridden={'T', *other})
        same = resolve('mlp', *other).T
        assert resolve('mlp', f'T={same}', *other, overridden={'T', *other}).T == same  # as a W&B agent restarts a run
        assert resolve('mlp', 'T=null', *other, overridden={'T', *other}).T == same


def test_overridden_keys():
    assert command_line.overridden_keys(['++T=2e6', 'opt.lr=0.1', '+model.D=3', '~seed']) >= {'T', 'opt.lr', 'model.D'}
    words = OmegaConf.create(['++opt.lr=${nothing}'])  # Hydra's list reads a value as a reference
    assert command_line.overridden_keys(words) == {'opt.lr'}


def test_an_absurd_horizon_is_refused_before_anything_is_allocated(resolve):
    for words in (('scale=3', 'exponent=2'), ('token_per_param=1e30',), ('T=1e20',)):
        with pytest.raises(config.ConfigError, match='steps, more than the limit'):
            resolve('mlp', *words)


@pytest.mark.parametrize('num_evals, steps', [(6, 500), (1000, 33_309), (100, 20), (2, 1), (1, 7), (10, 2)])
def test_evaluation_points(num_evals, steps):
    points = config.evaluation_points(num_evals, steps)
    assert list(points) == sorted(set(points)) and points[0] == 0 and points[-2:] == (steps - 1, steps)
    half = num_evals // 2
    for i in range(half):
        fraction = i / max(half - 1, 1)
        if half > 1:
            assert int(fraction * (steps - 1) + 1e-9) in points  # half spaced linearly
            geometric = max(steps - 1, 1) ** fraction
            assert {int(geometric - 1e-9), int(geometric + 1e-9)} & set(points)  # half geometrically
    assert len(points) <= 2 * half + 3


def test_published_evaluation_points(resolve):
    assert config.evaluation_points(6, 500) == (0, 1, 22, 249, 499, 500)
    assert resolve('mlp', 'T=2048000', 'num_evals=6').derived.eval_points == (0, 1, 22, 249, 499, 500)


def test_evaluations_that_cost_more_than_training_give_a_warning(resolve):
    """An evaluation takes the gradient of every test batch, and so costs as much as that many training steps."""
    run = resolve('mlp', 'T=2e6')  # 488 steps, evaluated 24 batches at a time
    points = len(run.derived.eval_points)
    assert run.derived.eval_share == pytest.approx(points * 24 / 488) and run.derived.eval_share > 10
    warning = config.evaluation_warning(run)
    assert f'{run.derived.eval_share:.1f} times' in warning and 'num_evals=1000' in warning and 'T_eval=100000' in warning
    assert config.evaluation_warning(resolve('mlp', 'T=2e6', 'num_evals=20', 'T_eval=20480')) is None


def test_derived_numbers(resolve):
    run = resolve('chess', 'ds_path=x', 'opt.B_max=128')
    d = run.derived
    assert (d.tokens_per_step, d.steps, d.warmup_steps, d.num_test_batches, d.microbatches) == (65_536, 15_258, 152, 31, 4)
    with pytest.raises(AttributeError):
        run.T = 1


def test_none_as_text_is_null(resolve):
    """A sweep agent writes Python's None into the command line."""
    assert resolve('mlp', 'token_per_param=None', 'model.match_mup_at_D=None') == resolve('mlp')


def test_what_wandb_gives_back_is_the_same_run(resolve):
    """A sweep's run that was preempted is started again with all that it had logged: str() of each, dotted and short."""
    run = resolve('mlp', 'model.D=32', 'T=1e7', 'seeds=[0, 3]', 'checkpoint_minutes=0.5')
    logged = config.flatten(config.settings(run, 0)) | {'seeds': run.seeds}
    logged |= {short: logged[key] for short, key in config.SHORT_NAMES.items()}
    logged['derived.flops_per_token'] = int(logged['derived.flops_per_token'])  # JSON turns 3.0 into 3
    words = [f'{key}={value}' for key, value in logged.items()]
    assert {'seeds=[0, 3]', 'run_dir=None', 'D=32', 'opt.mup=True', f'derived.name={run.name(0)}'} < set(words)
    assert resolve('mlp', *map(command_line.as_override, words)) == run


@pytest.mark.parametrize('word, wanted', [
    ('opt.lr=0.1', '++opt.lr=0.1'), ('+opt.name=adam', '++opt.name=adam'), ('D=3', '+expect.D=3'),
    ('derived.steps=3', '+expect.derived.steps=3'), ('hydra/launcher=slurm', 'hydra/launcher=slurm'), ('~seed', '~seed'),
    ('-m', '-m'), ('--config-dir=x', '--config-dir=x'),
])
def test_words_of_the_command_line(word, wanted):
    assert command_line.as_override(word) == wanted


# Names

def test_names_tell_configurations_apart(resolve):
    base = resolve('mlp')
    same = resolve('mlp', 'T=1_000_000_000', 'opt.lr=4e-1', 'run_dir=elsewhere', 'wandb_mode=online', 'wandb_project=p', 'seed=0',
                   'opt.name=adam')
    assert base.name(0) == same.name(0)
    assert resolve('mlp', 'seeds=[0,3]').name(3) == resolve('mlp', 'seed=3').name(3)  # trained together or alone
    other = [('model.D=256',), ('opt.lr=0.40001',), ('opt.b2=0.9',), ('T=1.00001e9',), ('opt.mup=false',), ('seed=1',),
             ('matmul_precision=float32',), ('num_evals=50',)]
    names = {run.name(run.seed) for run in (resolve('mlp', *o) for o in other)}
    assert len(names | {base.name(0)}) == len(other) + 1
    assert all(set(name) <= set('abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-') for name in names)


@pytest.mark.parametrize('words, name', [
    (('mlp',), 'fourier_D128_N3_B4096_lr0.4_const_T1e09_seed0_07f5ef89'),
    (('mlp', 'seeds=[0,3]', 'opt.decay_frac=0.2'), 'fourier_D128_N3_B4096_lr0.4_const0.2_T1e09_seed3_ec3f47f6'),
    (('mlp', 'model.N=5', 'model.D=384', 'scale=1346251.612836', 'exponent=2.040882', 'opt.lr=0.001', 'opt.readout_lr_mult=1',
      'opt.schedule=linear'), 'fourier_D384_N5_B4096_lr0.001_linear_T1.36e08_seed0_10390dd7'),
    (('chess', 'ds_path=/data/my_chess.v2', 'matmul_precision=float32', 'model.dtype=bfloat16', 'seed=4'),
     'data-my_chess.v2_D128_N3_B512_lr0.4_linear_T1e09_seed4_4dedb2db'),
    (('cifar5m', 'model.match_mup_at_D=256'), 'cifar5m_D128_N3_B64_lr0.4_linear_T1e09_seed0_8a45d7f3'),
])
def test_names_do_not_change(resolve, words, name):
    """A run resumes only if its folder is found, so that a new key, or a new way to write an old one, must not change any name."""
    run = resolve(*words)
    assert run.name(run.all_seeds[-1]) == name


def test_folders(resolve, tmp_path):
    alone, together = resolve('mlp', 'wandb_tag=tag'), resolve('mlp', 'seeds=[0,1]', 'wandb_tag=tag')
    assert alone.folder(0) == together.folder(0) == Path('runs/tag') / alone.name(0)
    assert together.folder(1) != together.folder(0)
    assert resolve('mlp', f'run_dir={tmp_path}').folder(0) == tmp_path
    chosen = resolve('mlp', 'seeds=[0,1]', f'run_dir={tmp_path}')
    assert {chosen.folder(seed) for seed in (0, 1)} == {tmp_path / 'seed0', tmp_path / 'seed1'}


def test_a_record_that_lacks_a_later_key_is_the_same_run(resolve):
    run = resolve('mlp')
    recorded = config.settings(run, 0)
    assert config.differences(recorded, run, 0) == []
    assert recorded['opt'].pop('name') == 'adam' and config.differences(recorded, run, 0) == []  # written before the key was added
    recorded['opt']['name'], recorded['model']['D'] = 'other', 64
    assert set(config.differences(recorded, run, 0)) == {'model.D=64 there, 128 here', 'opt.name=other there, adam here'}


# What cannot run: one line that names the key, an exit code other than 0, nothing left behind

BAD = [  # arguments, what the line must name
    (('mlp', 'model.Dee=3'), "unknown key 'model.Dee'; configs/default.yaml lists all keys; did you mean model.D?"),
    (('mlp', 'readout_lr_mult=3'), 'did you mean opt.readout_lr_mult?'),
    (('mlp', 'zzzz=3'), "unknown key 'zzzz'"),
    (('mlp', 'opt.name=adamw'), 'opt.name=adamw is unknown; choose one of adam, muon; did you mean adam?'),
    (('mlp', 'opt.lr=-1', 'opt.b1=2'), 'opt.lr=-1 must be greater than 0; opt.b1=2 must be less than 1'),
    (('mlp', 'D=32'), 'set model.D'),
    (('mlp', 'derived.steps=3'), 'derived.steps=3'),
    (('nothing',), 'nothing'),
    (('mlp', 'model.D'), 'model.D'),
    (('mlp', 'model.D=wide'), 'model.D'),
    (('mlp', 'model.D=64.5'), 'model.D'),
    (('mlp', 'model=3'), 'model'),
    (('mlp', 'opt.lr=[1,2]'), 'opt.lr'),
    (('mlp', 'opt.B=null'), 'opt.B'),
    (('mlp', 'opt.lr=${{nothing}}'), 'opt.lr'),
    (('mlp', '~opt.b1'), 'opt.b1'),
    (('mlp', 'model=null'), 'model'),
    (('mlp', 'opt.mup=maybe'), 'opt.mup'),
    (('mlp', 'seeds=3'), 'seeds'),
    (('mlp', 'seeds=[]'), 'seeds'),
    (('mlp', 'seeds=[1,1]'), 'seeds'),
    (('mlp', 'seed=-1'), 'seed'),
    (('mlp', 'seeds=[0,-1]'), 'seeds[1]=-1'),
    (('mlp', 'seed=2147483648'), 'seed'),
    (('mlp', 'opt.lr=true'), 'opt.lr'),
    (('mlp', 'opt.lr=0'), 'opt.lr'),
    (('mlp', 'opt.lr=nan'), 'opt.lr'),
    (('mlp', 'model.N=0'), 'model.N'),
    (('mlp', 'T=inf'), 'T'),
    (('mlp', 'opt.b2=1'), 'opt.b2'),
    (('mlp', 'opt.decay_frac=1.5'), 'opt.decay_frac'),
    (('mlp', 'opt.decay_frac=0'), 'opt.decay_frac'),
    (('mlp', 'opt.weight_decay=-1'), 'opt.weight_decay'),
    (('mlp', 'opt.weight_decay=0.1', 'opt.decay_timescale=0.1'), 'decay is ambiguous: opt.weight_decay=0.1 and opt.'),
    (('mlp', 'opt.schedule=triangle'), 'opt.schedule'),
    (('mlp', 'opt.schedule=liner'), 'did you mean linear?'),
    (('mlp', 'arch=rnn'), 'arch'),
    (('mlp', 'arch=transformer'), 'arch'),
    (('mlp', 'model.V=16'), 'model.V'),
    (('mlp', 'shuffle=true'), 'shuffle'),
    (('mlp', 'ds_path=bigram'), 'use mlp with fourier, transformer with bigram'),
    (('bigram', 'published_averaging=true'), 'no meaning for ds_path=bigram'),
    (('bigram', 'bigram_std=0'), 'bigram_std=0 must be greater than 0'),
    (('bigram', 'model.V=9000'), 'set model.V to at most 8192'),
    (('mlp', 'wandb_mode=on'), 'wandb_mode'),
    (('mlp', 'model.dtype=float8'), 'model.dtype'),
    (('mlp', 'model.dtype=float16'), 'set model.dtype=bfloat16'),
    (('mlp', 'model.match_mup_at_D=64', 'opt.mup=false'), 'model.match_mup_at_D'),
    (('mlp', 'stop_above=1'), 'set watch'),
    (('mlp', 'matmul_precision=low'), 'matmul_precision'),
    (('mlp', 'opt.B=20000'), 'opt.B_max'),
    (('mlp', 'T=null'), 'token_per_param'),
    (('mlp', 'scale=1e6'), 'exponent'),
    (('mlp', 'exponent=2'), 'scale'),
    (('mlp', 'token_per_param=20', 'exponent=2', 'scale=1e6'), 'token_per_param'),
    (('mlp', 'T=4000'), 'opt.B'),
    (('mlp', 'T=2e6', 'scale=3', 'exponent=2'), 'ambiguous: T=2e+06 and scale=3 exponent=2'),
    (('mlp', 'scale=3', 'exponent=2'), '(scale=3 exponent=2) is 4.5e+14 steps, more than the limit'),
    (('mlp', 'T_eval=4000'), 'T_eval'),
    (('mlp', 'T_eval=null'), 'T_eval'),
    (('mlp', 'opt.warmup_tokens=1e9'), 'opt.warmup_tokens'),
    (('chess', 'ds_path=null'), 'ds_path'),
    (('chess', 'ds_path={tokens}', 'model.D=100'), 'model.dh'),
    # files
    (('chess',), 'ds_path'),
    (('chess', 'ds_path={no_train}'), 'train.bin'),
    (('chess', 'ds_path={no_test}'), 'test.bin'),
    (('chess', 'ds_path={empty}'), 'train.bin'),
    (('chess', 'ds_path={odd}'), 'uint16'),
    (('chess', 'ds_path={short_shard}'), 'x_train_0.bin'),
    (('chess', 'ds_path={no_header}'), 'x_train_0.bin'),
    (('chess', 'ds_path={tokens}', 'T_eval=2048000'), 'T_eval'),
    (('chess', 'ds_path={tokens}', 'T_eval=1024', 'model.L=16', 'opt.B=8', 'model.V=32'), 'model.V'),
    (('chess', 'ds_path={tokens}', 'T_eval=1024', 'model.L=16', 'opt.B=8', 'model.V=32'), 'train.bin'),
    (('chess', 'ds_path={few}', 'T_eval=1024', 'model.L=16', 'opt.B=8'), 'opt.B'),
    (('chess', 'ds_path={meta}'), 'vocab_size'),
    (('chess', 'ds_path={evil}'), 'meta.pkl'),
    # the run's folder
    (('mlp', 'run_dir={taken}'), 'run_dir'),
    (('mlp', 'run_dir={taken}/config.yaml/run'), 'set run_dir to a folder that can be written'),
]


@pytest.fixture(scope='module')
def bad_folders(tmp_path_factory):
    """One folder for each thing that is wrong with a data set."""
    root = tmp_path_factory.mktemp('bad')
    ids = np.random.default_rng(0).integers(0, 54, 2048, np.uint8).tobytes()
    header = np.array([20240520, 1, 500] + [0] * 253, '<i4').tobytes()
    files = {
        'tokens': {'train.bin': ids, 'test.bin': ids}, 'no_train': {'test.bin': ids}, 'no_test': {'train.bin': ids},
        'empty': {'train.bin': b'', 'test.bin': ids}, 'few': {'train.bin': ids[:100], 'test.bin': ids},
        'odd': {'train.bin': ids[:1001], 'test.bin': ids, 'meta.json': b'{"dtype": "uint16"}'},
        'short_shard': {'x_train_0.bin': header + ids[:998], 'x_val_0.bin': header + ids[:1000]},
        'no_header': {'x_train_0.bin': ids, 'x_val_0.bin': ids},
        'meta': {'train.bin': ids, 'test.bin': ids, 'meta.json': b'{"vocab_size": "many"}'},
        'evil': {'train.bin': ids, 'test.bin': ids, 'meta.pkl': pickle.dumps({'vocab_size': Touch(root / 'touched')})},
        'taken': {'config.yaml': b'opt: {lr: 3.0}\n'},
    }
    for folder, content in files.items():
        (root / folder).mkdir()
        for name, data in content.items():
            (root / folder / name).write_bytes(data)
    yield {folder: root / folder for folder in files}
    assert not (root / 'touched').exists()  # the pickle that asks for code to run was never obeyed


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize('arguments, named', BAD, ids=lambda v: ' '.join(v) if isinstance(v, tuple) else v)
def test_what_cannot_run_is_one_line_and_leaves_nothing(arguments, named, bad_folders, tmp_path, monkeypatch):
    """Through the program's own entry point, in this process."""
    name, *overrides = arguments
    before = sorted(path for folder in bad_folders.values() for path in folder.rglob('*'))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HYDRA_FULL_ERROR', '1')  # as the program sets it; here so that it is undone
    monkeypatch.setattr(sys, 'argv', ['train.py', '-cn', name, *(o.format(**bad_folders) for o in overrides)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / 'train.py'), run_name='__main__')
    line = stop.value.code  # a text: Python prints it and exits with 1
    assert isinstance(line, str) and line.startswith('error: ') and '\n' not in line
    assert named in line, line
    assert list(tmp_path.iterdir()) == []
    assert sorted(path for folder in bad_folders.values() for path in folder.rglob('*')) == before


@pytest.mark.parametrize('arguments, named', [((), 'mlp'), (('-cn', 'mlp', 'model.Dee=3'), 'model.Dee'),
                                              (('-cn', 'mlp', 'T_eval=4000'), 'T_eval')])
def test_the_program_prints_that_line_and_exits_with_an_error(arguments, named, tmp_path):
    done = subprocess.run([sys.executable, ROOT / 'train.py', *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ''
    assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1 and named in done.stderr
    assert list(tmp_path.iterdir()) == []
