"""The configuration: names and types of all keys, their checks, and the values derived from them, worked out once.

`resolve` turns what Hydra composed (defaults live in configs/default.yaml) into a frozen `Run`; after it nobody writes, and nobody
computes p, T, V or the number of steps again. Leaves the data to data.py and the run's folder to record.py.
"""
import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import model as models
from optimizer import SCHEDULES


class ConfigError(ValueError):
    """A configuration that cannot run; the message is one line that names the key to change."""


@dataclass(frozen=True)
class Model:
    base_D: int
    D: int
    match_mup_at_D: int | None
    mlp_expansion: int
    dh: int
    L: int
    N: int
    V: int
    embed_init_std: float
    init_std_mult: float
    fsdp_enabled: bool
    dtype: str | None
    scale_by_depth: bool
    remat: bool


@dataclass(frozen=True)
class Opt:
    B: int
    B_max: int
    lr: float
    embed_lr_mult: float
    readout_lr_mult: float
    warmup_tokens: float
    schedule: str
    decay_frac: float
    b1: float
    b2: float
    eps: float
    weight_decay: float
    mup: bool


@dataclass(frozen=True)
class Config:
    """What a user sets; meanings and defaults stand in configs/default.yaml."""
    token_per_param: float | None
    scale: float | None
    exponent: float | None
    T: float | None
    T_eval: int | None
    num_evals: int
    arch: str
    ds_path: str | None
    shuffle: bool
    published_averaging: bool
    seed: int
    seeds: list[int] | None
    run_dir: str | None
    checkpoint_minutes: float
    watch: str | None
    stop_above: float | None
    dry_run: bool
    num_processes: int | None
    process_id: int | None
    coordinator: str | None
    wandb_mode: str
    wandb_project: str
    wandb_tag: str
    matmul_precision: str | None
    model: Model
    opt: Opt


@dataclass(frozen=True)
class Derived:
    """What follows from a Config. p counts every trainable scalar."""
    num_params: int
    params_by_role: dict[str, int]
    tokens_per_step: int   # B·L
    steps: int             # T // (B·L)
    compute: float         # C = 6·p·steps·B·L FLOPs
    warmup_steps: int
    num_test_batches: int
    microbatches: int      # pieces a batch is accumulated from
    flops_per_token: float  # of the matrix products and attention, for speeds


@dataclass(frozen=True)
class Run(Config):
    """A checked Config with T in tokens and V as the data set has it, and what is derived from it."""
    derived: Derived

    @property
    def all_seeds(self) -> list[int]:
        return self.seeds if self.seeds is not None else [self.seed]


def resolve(cfg, vocab_size=None) -> Run:
    """Checks a composed config and derives the rest.

    cfg: mapping with the keys of configs/default.yaml. vocab_size: the data set's own (see data.vocab_size), rounded up to a
    multiple of 32 it takes the place of model.V. Raises ConfigError.
    """
    try:
        cfg = _nulls(cfg)
        echo = flatten(cfg.pop('echo', {}))
        for section in ('model', 'opt'):
            if not isinstance(cfg[section], dict):
                raise ConfigError(f'{section}={cfg[section]} must be a group of keys; set them one by one, {section}.KEY=…')
        if not isinstance(cfg['seeds'], list | None):
            raise ConfigError(f"seeds={cfg['seeds']} must be a list of numbers, e.g. 'seeds=[0,1,2]', or null")
        cfg = OmegaConf.to_object(OmegaConf.merge(_schema(), cfg))
    except OmegaConfBaseException as error:
        raise ConfigError(_one_line(error)) from error
    m, o = cfg.model, cfg.opt
    _check_values(cfg)
    if vocab_size is not None:
        m = dataclasses.replace(m, V=-(-vocab_size // 32) * 32)

    groups = models.param_groups(cfg.arch, m)
    p = sum(groups.values())
    T = _horizon(cfg, p)
    tokens_per_step = o.B * m.L
    steps = int(T // tokens_per_step)
    microbatches = max(1, o.B // o.B_max)
    if steps < 1:
        raise ConfigError(f'T={T:.6g} tokens is less than one step of opt.B·model.L={tokens_per_step}; raise T or lower opt.B')
    if cfg.T_eval // tokens_per_step < 1:
        raise ConfigError(f'T_eval={cfg.T_eval} is less than one test batch of opt.B·model.L={tokens_per_step}; '
                          f'set T_eval to at least {tokens_per_step}')
    warmup_steps = int(o.warmup_tokens // tokens_per_step)
    if warmup_steps >= steps:
        raise ConfigError(f'opt.warmup_tokens={o.warmup_tokens:.6g} covers all of the T={T:.6g} tokens; lower it or raise T')
    derived = Derived(
        num_params=p, params_by_role=groups, tokens_per_step=tokens_per_step, steps=steps,
        compute=6.0 * p * steps * tokens_per_step, warmup_steps=warmup_steps,
        num_test_batches=cfg.T_eval // tokens_per_step, microbatches=microbatches,
        flops_per_token=float(models.train_flops_per_token(cfg.arch, m)))
    run = Run(**{**vars(cfg), 'T': T, 'model': m}, derived=derived)
    _check_echo(run, echo)
    return run


def as_override(word):
    """A word of the command line. What we log beside the keys there are, and W&B gives back to a run that it starts again, is set
    apart under `echo`, where `resolve` compares it with what it comes to."""
    key, equals, _ = word.partition('=')
    return f'+echo.{word}' if equals and (key in SHORT_NAMES or key.startswith('derived.')) else word


def _check_echo(run, echo):
    values = flatten(settings(run, run.all_seeds[0]))
    for key, value in echo.items():
        found = values.get(SHORT_NAMES.get(key, key))
        if value != found and str(value) != str(found):  # JSON makes 3 of 3.0
            meant = SHORT_NAMES.get(key, key)
            raise ConfigError(f'{key}={value} is not for setting, and comes to {found}; ' +
                              (f'set {meant}' if not meant.startswith('derived.') else 'leave it out'))


def _schema():
    """Names and types as OmegaConf checks them; it takes frozen classes for read-only until told otherwise."""
    schema = OmegaConf.structured(Config)
    OmegaConf.set_readonly(schema, False)
    for name, section in (('model', Model), ('opt', Opt)):
        schema[name] = OmegaConf.structured(section)
        OmegaConf.set_readonly(schema[name], False)
    return schema


def _nulls(cfg):
    """The plain mapping, with the text 'None' read as null: W&B's agent writes Python's str() of a sweep value."""
    if OmegaConf.is_config(cfg):
        cfg = OmegaConf.to_container(cfg, resolve=True)
    return {k: _nulls(v) if isinstance(v, dict) else None if v == 'None' else v for k, v in cfg.items()}


def _one_line(error):
    """OmegaConf's message and key on one line."""
    text = str(error).splitlines()[0]
    key = getattr(error, 'full_key', None)
    if isinstance(error, OmegaConfBaseException) and 'not in' in text:
        return f'unknown key {key!r}; configs/default.yaml lists the keys there are'
    return f'{key}: {text}'


def _horizon(cfg, p):
    """Training tokens T from the one of three ways the config gives (paper, appendix C)."""
    given = {k: getattr(cfg, k) for k in ('token_per_param', 'scale', 'exponent') if getattr(cfg, k) is not None}
    ways = 'give token_per_param, or scale and exponent together, or T'
    if 'token_per_param' in given:
        if len(given) > 1:
            raise ConfigError(f'the horizon is ambiguous: {", ".join(f"{k}={v}" for k, v in given.items())}; {ways}')
        return cfg.token_per_param * p
    if len(given) == 1:
        (key, value), = given.items()
        raise ConfigError(f'{key}={value} alone sets no horizon; {ways}')
    if given:
        try:
            return 1e15 * (p / cfg.scale) ** cfg.exponent / (6 * p)
        except OverflowError as error:
            raise ConfigError(f'scale={cfg.scale} and exponent={cfg.exponent} set no finite horizon for p={p}') from error
    if cfg.T is None:
        raise ConfigError(f'no horizon: token_per_param, scale, exponent and T are all null; {ways}')
    return cfg.T


def _check_values(cfg):
    m, o = cfg.model, cfg.opt
    _one_of('arch', cfg.arch, models.ARCHS)
    _one_of('opt.schedule', o.schedule, SCHEDULES)
    _one_of('wandb_mode', cfg.wandb_mode, ('offline', 'online', 'disabled'))
    _one_of('model.dtype', m.dtype, (None, 'float32', 'bfloat16', 'float16'))
    _one_of('matmul_precision', cfg.matmul_precision, (None, 'float32', 'tensorfloat32', 'bfloat16'))
    positive = {'model.base_D': m.base_D, 'model.D': m.D, 'model.match_mup_at_D': m.match_mup_at_D, 'model.dh': m.dh,
                'model.mlp_expansion': m.mlp_expansion, 'model.L': m.L, 'model.N': m.N, 'model.V': m.V, 'opt.B': o.B,
                'opt.B_max': o.B_max, 'opt.lr': o.lr, 'opt.decay_frac': o.decay_frac, 'token_per_param': cfg.token_per_param,
                'scale': cfg.scale, 'exponent': cfg.exponent, 'T': cfg.T, 'T_eval': cfg.T_eval, 'num_evals': cfg.num_evals,
                'checkpoint_minutes': cfg.checkpoint_minutes}
    for key, value in positive.items():
        if value is not None and not 0 < value < float('inf'):
            raise ConfigError(f'{key}={value} must be positive and finite')
    not_negative = {'opt.embed_lr_mult': o.embed_lr_mult, 'opt.readout_lr_mult': o.readout_lr_mult, 'opt.warmup_tokens':
                    o.warmup_tokens, 'opt.weight_decay': o.weight_decay, 'opt.eps': o.eps, 'model.init_std_mult': m.init_std_mult,
                    'model.embed_init_std': m.embed_init_std, 'seed': cfg.seed}
    for key, value in not_negative.items():
        if not 0 <= value < float('inf'):
            raise ConfigError(f'{key}={value} must be finite and not negative')
    if max([cfg.seed, *(cfg.seeds or [])]) >= 2**31:
        raise ConfigError(f'seed={cfg.seed} or seeds={cfg.seeds}: a seed must be below 2^31')
    for key, value in {'opt.b1': o.b1, 'opt.b2': o.b2}.items():
        if not 0 <= value < 1:
            raise ConfigError(f'{key}={value} must lie in [0, 1)')
    if o.decay_frac > 1:
        raise ConfigError(f'opt.decay_frac={o.decay_frac} must lie in (0, 1]; it is a share of the steps after the warm-up')
    if cfg.stop_above is not None and cfg.watch is None:
        raise ConfigError(f'stop_above={cfg.stop_above:g} needs a forecast; set watch to the log of the ladder')
    if cfg.T_eval is None:
        raise ConfigError('T_eval is null; set it to the number of test tokens an evaluation reads')
    if cfg.ds_path is None:
        raise ConfigError('ds_path is null; set it to fourier or to a folder with train.bin and test.bin')
    if (cfg.ds_path == 'fourier') != (cfg.arch == 'mlp'):
        raise ConfigError(f'arch={cfg.arch} cannot learn ds_path={cfg.ds_path}; the pairs are mlp with fourier, transformer with a '
                          'folder of tokens')
    if cfg.arch == 'mlp' and (m.L, m.V) != (1, 8):
        raise ConfigError(f'model.L={m.L} and model.V={m.V} must be 1 and 8 for ds_path=fourier, whose inputs have 8 dimensions')
    if cfg.ds_path == 'fourier' and (cfg.shuffle or cfg.published_averaging):
        key = 'shuffle' if cfg.shuffle else 'published_averaging'
        raise ConfigError(f'{key}=true means nothing for ds_path=fourier, where every example is new and counts; set {key}=false')
    if m.match_mup_at_D is not None and not o.mup:
        raise ConfigError(f'model.match_mup_at_D={m.match_mup_at_D} sets µP multipliers, opt.mup=false has none; leave one out')
    if cfg.arch == 'transformer' and m.L < 2:
        raise ConfigError(f'model.L={m.L} leaves no next token to predict; set model.L to 2 or more')
    if cfg.arch == 'transformer' and m.D % m.dh:
        raise ConfigError(f'model.D={m.D} is not a multiple of the head size model.dh={m.dh}; set model.dh to a divisor of {m.D}')
    if o.B > o.B_max and o.B % o.B_max:
        raise ConfigError(f'opt.B={o.B} is over opt.B_max={o.B_max} and not a multiple of it; set opt.B_max to a divisor of {o.B}')
    if cfg.seeds is not None and (not cfg.seeds or len(set(cfg.seeds)) < len(cfg.seeds) or min(cfg.seeds) < 0):
        raise ConfigError(f'seeds={cfg.seeds} must be a list of different numbers from 0 on, or null')


def _one_of(key, value, names):
    if value not in names:
        raise ConfigError(f'{key}={value} is unknown; choose one of {", ".join("null" if n is None else n for n in names)}')


def as_dict(run, seed) -> dict:
    """A run's resolved configuration as plain nested dicts, for one seed of its group."""
    values = dataclasses.asdict(run)
    values.update(seed=seed, seeds=None)
    return values


# Keys that say where a run is written, not what is computed.
BOOKKEEPING = ('run_dir', 'checkpoint_minutes', 'watch', 'stop_above', 'wandb_mode', 'wandb_project', 'wandb_tag', 'dry_run',
               'num_processes', 'process_id', 'coordinator')

# The short names of the published logs, for W&B: each is the last part of one dotted key and of no other that matters.
SHORT_NAMES = {
    'D': 'model.D', 'N': 'model.N', 'L': 'model.L', 'V': 'model.V', 'dh': 'model.dh', 'mlp_expansion': 'model.mlp_expansion',
    'B': 'opt.B', 'lr': 'opt.lr', 'schedule': 'opt.schedule', 'decay_frac': 'opt.decay_frac', 'warmup_tokens': 'opt.warmup_tokens',
    'num_params': 'derived.num_params', 'steps': 'derived.steps'}


def settings(run, seed) -> dict:
    """The configuration as config.yaml and W&B hold it: resolved, with what is derived from it and the run's name."""
    values = as_dict(run, seed)
    values['derived']['name'] = run_name(run, seed)
    return values


def asked(run, seed) -> dict:
    """What one seed computes, as the user asked for it: neither bookkeeping nor what is derived."""
    return {k: v for k, v in as_dict(run, seed).items() if k not in (*BOOKKEEPING, 'derived')}


def flatten(values, prefix='') -> dict:
    """Nested dicts as one dict with dotted keys."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f'{prefix}{key}.')
        else:
            flat[f'{prefix}{key}'] = value
    return flat


def fingerprint(run, seed) -> str:
    """8 hex digits of what one seed computes; equal configurations, however they were written, have equal ones."""
    return hashlib.sha256(json.dumps(asked(run, seed), sort_keys=True).encode()).hexdigest()[:8]


def run_name(run, seed) -> str:
    """A readable, unique name: the keys that sweeps vary, then the fingerprint for all the others."""
    m, o = run.model, run.opt
    schedule = o.schedule if o.decay_frac == 1 else f'{o.schedule}{o.decay_frac:g}'
    dataset = re.sub(r'[^A-Za-z0-9_.-]+', '-', run.ds_path).strip('-.')[-24:]
    T = f'{run.T:.3g}'.replace('+', '')
    return f'{dataset}_D{m.D}_N{m.N}_B{o.B}_lr{o.lr:g}_{schedule}_T{T}_seed{seed}_{fingerprint(run, seed)}'
