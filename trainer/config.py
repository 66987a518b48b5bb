"""The configuration of a run: its keys with their types and limits, and all values derived from them.

`resolve` turns what Hydra composed into a frozen `Run`, which every other module is given. configs/default.yaml has the defaults.
"""
import dataclasses
import difflib
import hashlib
import json
import math
import re
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pydantic
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BeforeValidator, Field

import data
import model as models
from optimizer import SCHEDULES, decay_per_step

CONFIGS = Path(__file__).parent.parent / 'configs'
MAX_STEPS = 10**8  # the learning rate of every step is kept in memory: three arrays of 8 bytes a step


class ConfigError(ValueError):
    """A configuration that cannot run. The message is one line that names the key to change."""


# Types and limits of the keys. Numbers that arrive as text are converted, as YAML reads 1e-3 as text.

def _not_a_bool(value):
    if isinstance(value, bool):
        raise ValueError('must be a number')
    return value


def _not_float16(value):
    if value == 'float16':
        raise ValueError('needs loss scaling, which is not implemented; set model.dtype=bfloat16')
    return value


def _distinct(seeds):
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError("must be a list of different numbers, e.g. 'seeds=[0,1,2]', or null")
    return seeds


Int = Annotated[int, BeforeValidator(_not_a_bool)]
PositiveInt = Annotated[Int, Field(gt=0)]
Float = Annotated[float, BeforeValidator(_not_a_bool), Field(allow_inf_nan=False)]
Positive = Annotated[Float, Field(gt=0)]
NotNegative = Annotated[Float, Field(ge=0)]
DecayRate = Annotated[Float, Field(ge=0, lt=1)]
Fraction = Annotated[Float, Field(gt=0, le=1)]
Seed = Annotated[Int, Field(ge=0, lt=2**31)]
DType = Annotated[Literal['float32', 'bfloat16'] | None, BeforeValidator(_not_float16)]
typed = pydantic.dataclasses.dataclass(frozen=True, config=pydantic.ConfigDict(extra='forbid', coerce_numbers_to_str=True))


@typed
class Model:
    base_D: PositiveInt
    D: PositiveInt
    match_mup_at_D: PositiveInt | None
    mlp_expansion: PositiveInt
    dh: PositiveInt
    L: PositiveInt
    N: PositiveInt
    V: PositiveInt
    embed_init_std: NotNegative
    init_std_mult: NotNegative
    fsdp_enabled: bool
    dtype: DType
    scale_by_depth: bool
    remat: bool


@typed
class Opt:
    name: Literal['adam', 'muon']
    B: PositiveInt
    B_max: PositiveInt
    lr: Positive
    embed_lr_mult: NotNegative
    readout_lr_mult: NotNegative
    warmup_tokens: NotNegative
    schedule: Literal[*SCHEDULES]
    decay_frac: Fraction
    b1: DecayRate
    b2: DecayRate
    eps: NotNegative
    momentum: DecayRate
    weight_decay: NotNegative
    independent_decay: NotNegative
    decay_timescale: Positive | None
    mup: bool


@typed
class Config:
    """What a user sets. configs/default.yaml explains each key and holds its default."""
    token_per_param: Positive | None
    scale: Positive | None
    exponent: Positive | None
    T: Positive | None
    T_eval: PositiveInt | None
    num_evals: PositiveInt
    arch: Literal[*models.ARCHS]
    ds_path: str | None
    bigram_zipf: NotNegative
    bigram_exponent: Annotated[Float, Field(gt=0.5)]
    bigram_std: Positive
    shuffle: bool
    published_averaging: bool
    seed: Seed
    seeds: Annotated[list[Seed], pydantic.AfterValidator(_distinct)] | None
    run_dir: str | None
    checkpoint_minutes: Positive
    watch: str | None
    stop_above: Float | None
    dry_run: bool
    dry_run_chip: Literal['v5e', 'v5p', 'v6e', 'a100', 'h100'] | None
    dry_run_json: str | None
    num_processes: Int | None
    process_id: Int | None
    coordinator: str | None
    wandb_mode: Literal['offline', 'online', 'disabled']
    wandb_project: str
    wandb_tag: str
    matmul_precision: Literal['float32', 'tensorfloat32', 'bfloat16'] | None
    model: Model
    opt: Opt


# Keys that say where and how a run is recorded. They do not change what it computes.
BOOKKEEPING = ('run_dir', 'checkpoint_minutes', 'watch', 'stop_above', 'wandb_mode', 'wandb_project', 'wandb_tag', 'dry_run',
               'dry_run_chip', 'dry_run_json', 'num_processes', 'process_id', 'coordinator')

# Keys that older runs do not have, with the value that those runs were trained at. At this value a key is left out of a run's
# identity, so that names of runs, and therefore their folders, stay what they were before the key was added.
ADDED_KEYS = {'opt.name': 'adam', 'opt.momentum': 0.95, 'opt.independent_decay': 0.0, 'opt.decay_timescale': None,
              'bigram_zipf': 0.0, 'bigram_exponent': 0.8, 'bigram_std': 3.0}

# The short names of keys in the published logs. W&B gets both these and the dotted names.
SHORT_NAMES = {key.partition('.')[2]: key for key in (
    'model.D', 'model.N', 'model.L', 'model.V', 'model.dh', 'model.mlp_expansion', 'opt.B', 'opt.lr', 'opt.schedule',
    'opt.decay_frac', 'opt.warmup_tokens', 'derived.num_params', 'derived.steps')}


@dataclasses.dataclass(frozen=True)
class Derived:
    """What follows from a Config. p counts every trainable scalar."""
    num_params: int
    params_by_role: dict[str, int]
    tokens_per_step: int             # B·L
    steps: int                       # T // (B·L)
    compute: float                   # C = 6·p·steps·B·L FLOPs
    warmup_steps: int
    num_test_batches: int
    microbatches: int                # pieces in which the gradient of a batch is accumulated
    flops_per_token: float           # of matrix products and attention, to compute speeds
    eval_points: tuple[int, ...]     # numbers of updates after which the run is evaluated, increasing
    entropy: float | None = None     # loss of the true distribution on the test batches, nats; None: unknown

    @property
    def eval_share(self) -> float:
        """FLOPs of all evaluations over the FLOPs of training: an evaluation takes the gradient of every test batch."""
        return len(self.eval_points) * self.num_test_batches / self.steps


@typed
class Run(Config):
    """A checked Config, with T resolved to tokens, V to the data set's vocabulary, and the derived values."""
    derived: Derived

    @property
    def all_seeds(self) -> list[int]:
        return self.seeds if self.seeds is not None else [self.seed]

    def with_entropy(self, entropy):
        """This run with the entropy of its data, which is known once the data are open."""
        return dataclasses.replace(self, derived=dataclasses.replace(self.derived, entropy=entropy))

    def name(self, seed) -> str:
        """The unique name of one seed's run: the keys that sweeps vary, then a hash of the whole identity."""
        m, o = self.model, self.opt
        schedule = o.schedule if o.decay_frac == 1 else f'{o.schedule}{o.decay_frac:g}'
        dataset = re.sub(r'[^A-Za-z0-9_.-]+', '-', self.ds_path).strip('-.')[-24:]
        T = f'{self.T:.3g}'.replace('+', '')
        identity_hash = hashlib.sha256(json.dumps(identity(self, seed), sort_keys=True).encode()).hexdigest()[:8]
        return f'{dataset}_D{m.D}_N{m.N}_B{o.B}_lr{o.lr:g}_{schedule}_T{T}_seed{seed}_{identity_hash}'

    def folder(self, seed) -> Path:
        """The folder of one seed's record: run_dir if given (run_dir/seed<s> if seeds is given), else runs/<wandb_tag>/<name>."""
        if self.run_dir is None:
            return Path('runs') / self.wandb_tag / self.name(seed)
        return Path(self.run_dir) if self.seeds is None else Path(self.run_dir) / f'seed{seed}'


def resolve(cfg, vocab_size=None, overridden=frozenset()) -> Run:
    """Returns the checked configuration with all derived values.

    cfg: mapping with the keys of configs/default.yaml. vocab_size: that of the data set; rounded up to a multiple of 32 it replaces
    model.V. overridden: the keys set on the command line or by a sweep (see command_line.py); a T among them must not contradict
    the other keys of the horizon. Raises ConfigError.
    """
    try:
        values = _plain(cfg)
    except OmegaConfBaseException as error:  # an interpolation of a key that does not exist
        raise ConfigError(f'{error.full_key}: {str(error).splitlines()[0]}') from error
    expected = flatten(values.pop('expect', {}))
    try:
        cfg = Config(**values)
    except pydantic.ValidationError as error:
        raise ConfigError('; '.join(map(_message, error.errors()))) from error
    _check_combinations(cfg)
    o = cfg.opt
    m = cfg.model if vocab_size is None else dataclasses.replace(cfg.model, V=math.ceil(vocab_size / 32) * 32)
    params_by_role = models.param_groups(cfg.arch, m)
    p = sum(params_by_role.values())
    T, source = _horizon(cfg, p, overridden)
    horizon = f'T={T:.6g} tokens{source}'
    tokens_per_step = o.B * m.L
    steps, warmup_steps = int(T // tokens_per_step), int(o.warmup_tokens // tokens_per_step)
    num_test_batches = cfg.T_eval // tokens_per_step
    if steps < 1:
        raise ConfigError(f'{horizon} is less than one step of opt.B·model.L={tokens_per_step}; raise the horizon or lower opt.B')
    if steps > MAX_STEPS:
        raise ConfigError(f'{horizon} is {steps:.3g} steps, more than the limit of {MAX_STEPS:.0e}; lower the horizon')
    if num_test_batches < 1:
        raise ConfigError(f'T_eval={cfg.T_eval} is less than one test batch of opt.B·model.L={tokens_per_step}; '
                          f'set T_eval to at least {tokens_per_step}')
    if warmup_steps >= steps:
        raise ConfigError(f'opt.warmup_tokens={o.warmup_tokens:.6g} covers all of {horizon}; lower it or raise the horizon')
    derived = Derived(
        num_params=p, params_by_role=params_by_role, tokens_per_step=tokens_per_step, steps=steps,
        compute=6.0 * p * steps * tokens_per_step, warmup_steps=warmup_steps, num_test_batches=num_test_batches,
        microbatches=max(1, o.B // o.B_max), flops_per_token=float(models.train_flops_per_token(cfg.arch, m)),
        eval_points=evaluation_points(cfg.num_evals, steps))
    run = Run(**{**vars(cfg), 'T': T, 'model': m}, derived=derived)
    _check_expected(run, expected)
    return run


def evaluation_points(num_evals, steps):
    """Half of the points are spaced linearly and half geometrically. Both ends, and the state after the last update, are added."""
    half = num_evals // 2
    linear, geometric = np.linspace(0, steps - 1, half), np.geomspace(1, max(steps - 1, 1), half)
    return tuple(sorted({0, steps - 1, steps, *map(int, linear), *map(int, geometric)}))


def evaluation_warning(run) -> str | None:
    """One line if evaluations cost more FLOPs than training, else None."""
    return None if run.derived.eval_share <= 1 else (f'evaluations cost {run.derived.eval_share:.1f} times the FLOPs of training; '
                                                     f'lower num_evals={run.num_evals} or T_eval={run.T_eval}')


# Checks

def _plain(cfg):
    """The mapping as a dict, with the text 'None' as null: W&B's agent writes Python's str() of a sweep value."""
    if OmegaConf.is_config(cfg):
        cfg = OmegaConf.to_container(cfg, resolve=True)
    return {key: _plain(value) if isinstance(value, dict) else None if value == 'None' else value for key, value in cfg.items()}


def _message(error):
    """One of pydantic's errors as a line: the key, what came and what is wanted."""
    key = ''.join(f'[{part}]' if isinstance(part, int) else f'.{part}' for part in error['loc']).lstrip('.')
    kind, value = error['type'], error['input']
    if kind == 'unexpected_keyword_argument':
        return unknown_key(next(iter(flatten({key: value})), key))
    if kind == 'missing':
        return f'{key} is missing; configs/default.yaml lists all keys'
    shown = f'{key}={"null" if value is None else value}'
    if kind == 'literal_error':
        choices = re.findall(r"'([^']*)'", error['ctx']['expected'])
        return f'{shown} is unknown; choose one of {", ".join(choices)}{suggest(str(value), choices)}'
    if kind == 'dataclass_type':
        return f'{shown} must be a group of keys; set them one by one, e.g. {key}.KEY=value'
    if kind == 'value_error':  # raised by a function of this file
        return f'{shown} {error["ctx"]["error"]}'
    return f'{shown} {error["msg"].replace("Input should be", "must be").partition(",")[0]}'


def _horizon(cfg, p, overridden):
    """(T in tokens, ' (the keys that set it)' or '' for T itself), by one of three ways (paper, appendix C)."""
    given = {key: getattr(cfg, key) for key in ('token_per_param', 'scale', 'exponent') if getattr(cfg, key) is not None}
    source = ' '.join(f'{key}={value:g}' for key, value in given.items())
    ways = 'set token_per_param, or scale and exponent together, or T'
    if not given:
        if cfg.T is None:
            raise ConfigError(f'no horizon: token_per_param, scale, exponent and T are all null; {ways}')
        return cfg.T, ''
    if 'token_per_param' in given:
        if len(given) > 1:
            raise ConfigError(f'the horizon is ambiguous: {source}; {ways}')
        T = cfg.token_per_param * p
    elif len(given) == 1:
        raise ConfigError(f'{source} alone sets no horizon; {ways}')
    else:
        try:
            T = 1e15 * (p / cfg.scale) ** cfg.exponent / (6 * p)
        except OverflowError as error:
            raise ConfigError(f'{source} sets no finite horizon for p={p}') from error
    # The T of a configuration file is a default, which the other keys replace. W&B restarts a run with the T that it had logged.
    if 'T' in overridden and cfg.T is not None and not math.isclose(cfg.T, T):
        raise ConfigError(f'the horizon is ambiguous: T={cfg.T:g} and {source}, which means T={T:.6g}; {ways}')
    return T, f' ({source})'


def _check_combinations(cfg):
    """Raises ConfigError for values that are valid one by one but not together."""
    def require(condition, message):
        if not condition:
            raise ConfigError(message)

    m, o, mlp, generated = cfg.model, cfg.opt, cfg.arch == 'mlp', cfg.ds_path in data.GENERATED
    require(cfg.T_eval is not None, 'T_eval is null; set it to the number of test tokens of an evaluation')
    require(cfg.ds_path is not None, 'ds_path is null; set it to fourier, bigram or a folder with train.bin and test.bin')
    require(mlp == (cfg.ds_path == 'fourier'), f'arch={cfg.arch} cannot learn ds_path={cfg.ds_path}; '
                                               'use mlp with fourier, transformer with bigram or a folder of tokens')
    require(not mlp or (m.L, m.V) == (1, 8), f'model.L={m.L} and model.V={m.V} must be 1 and 8 for ds_path=fourier, '
                                             'whose inputs have 8 dimensions')
    for key in ('shuffle', 'published_averaging'):
        require(not (generated and getattr(cfg, key)), f'{key}=true has no meaning for ds_path={cfg.ds_path}, where every example '
                                                       f'is new and counts; set {key}=false')
    require(mlp or m.L >= 2, f'model.L={m.L} leaves no next token to predict; set model.L to 2 or more')
    require(mlp or m.D % m.dh == 0, f'model.D={m.D} is not a multiple of the head size model.dh={m.dh}; '
                                    f'set model.dh to a divisor of {m.D}')
    require(m.match_mup_at_D is None or o.mup, f'model.match_mup_at_D={m.match_mup_at_D} sets µP multipliers and opt.mup=false '
                                               'turns them off; leave one out')
    require(o.B <= o.B_max or o.B % o.B_max == 0, f'opt.B={o.B} is larger than opt.B_max={o.B_max} and not a multiple of it; '
                                                  f'set opt.B_max to a divisor of {o.B}')
    decays = [f'opt.{key}={getattr(o, key)}' for key in ('weight_decay', 'independent_decay', 'decay_timescale') if getattr(o, key)]
    require(len(decays) < 2, f'the weight decay is ambiguous: {" and ".join(decays)}; leave out all but one')
    require(cfg.stop_above is None or cfg.watch is not None, f'stop_above={cfg.stop_above} needs a forecast; '
                                                             'set watch to the log of the ladder')


def suggest(word, choices) -> str:
    """'; did you mean X?' with the closest of the choices, or '' if none is close. A dotted choice may lack its first part."""
    by_name = {choice.rpartition('.')[2]: choice for choice in choices} | {choice: choice for choice in choices}
    close = [name for name in by_name if name.lower() == word.lower()] or difflib.get_close_matches(word, by_name, n=1)
    return f'; did you mean {by_name[close[0]]}?' if close else ''


def unknown_key(key) -> str:
    """The message for a key that does not exist."""
    groups = {'': Config, 'model.': Model, 'opt.': Opt}
    keys = [prefix + field.name for prefix, group in groups.items() for field in dataclasses.fields(group)]
    return f'unknown key {key!r}; configs/default.yaml lists all keys{suggest(key, keys)}'


def _check_expected(run, expected):
    values = flatten(settings(run, run.all_seeds[0]))
    for key, value in expected.items():
        dotted = SHORT_NAMES.get(key, key)
        found = values.get(dotted)
        if value != found and str(value) != str(found):  # JSON turns 3.0 into 3
            advice = 'leave it out' if dotted.startswith('derived.') else f'set {dotted}'
            raise ConfigError(f'{key}={value} cannot be set: {dotted} is {found} here; {advice}')


def settings(run, seed) -> dict:
    """The configuration of one seed as config.yaml and W&B hold it: nested dicts, with the derived values and the run's name."""
    values = dataclasses.asdict(run) | {'seed': seed, 'seeds': None}
    del values['derived']['eval_points']  # follows from num_evals and steps
    values['derived'] |= {'name': run.name(seed), 'decay_per_step': decay_per_step('hidden', run)}
    return values


def identity(run, seed) -> dict:
    """What one seed computes, as nested dicts: the resolved configuration without bookkeeping and derived values."""
    values = dataclasses.asdict(run) | {'seed': seed, 'seeds': None}
    values = {key: value for key, value in values.items() if key not in (*BOOKKEEPING, 'derived')}
    for key, default in ADDED_KEYS.items():
        section, _, name = key.rpartition('.')
        group = values[section] if section else values
        if group[name] == default:
            del group[name]
    return values


def differences(recorded, run, seed) -> list[str]:
    """'KEY=a there, b here' for each key of the identity in which a recorded configuration (nested dicts) differs from this run."""
    there, wanted = ADDED_KEYS | flatten(recorded), ADDED_KEYS | flatten(identity(run, seed))
    return [f'{key}={there.get(key)} there, {value} here' for key, value in wanted.items() if there.get(key) != value]


def flatten(values, prefix='') -> dict:
    """Nested dicts as one dict with dotted keys."""
    parts = (flatten(value, f'{prefix}{key}.') if isinstance(value, dict) else {f'{prefix}{key}': value}
             for key, value in values.items())
    return dict(item for part in parts for item in part.items())
