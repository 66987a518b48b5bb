"""The command line of train.py: its help, and its checks before Hydra reads it."""
import os
import re
import sys

from omegaconf import OmegaConf

from trainer import config
from trainer.process import one_line_errors

EXAMPLE = ('python train.py -cn mlp model.D=64 model.N=5 opt.lr=0.001 opt.readout_lr_mult=1 opt.schedule=linear T=2e6 num_evals=20 '
           'T_eval=20480')
FLAGS = ('-cn', '--config-name')


def run(main):
    """Calls main(), a hydra.main function, with the words of the command line as Hydra is to see them."""
    os.environ.setdefault('HYDRA_FULL_ERROR', '1')  # Hydra raises errors in overrides instead of printing them
    words = sys.argv[1:]
    if '-h' in words or '--help' in words:
        print(usage())
        return
    with one_line_errors():
        if not any(word.startswith('--hydra-help') for word in words):
            check_config(words)
        sys.argv[1:] = map(as_override, words)
        main()


def usage() -> str:
    return (f'usage: python train.py -cn CONFIG [key=value …]\n\nCONFIG is one of {", ".join(config_names())}; for example\n'
            f'  {EXAMPLE}\n\nThe keys and their defaults:\n\n{(config.CONFIGS / "default.yaml").read_text()}')


def check_config(words):
    """Raises ConfigError if the words name no configuration, or one that does not exist."""
    names = [words[i + 1] for i, word in enumerate(words[:-1]) if word in FLAGS]
    names += [word.partition('=')[2] for word in words if word.startswith(tuple(f'{flag}=' for flag in FLAGS))]
    if not names:
        raise config.ConfigError(f'no configuration is named; choose one of {", ".join(config_names())}: {EXAMPLE}')
    check_config_name(names[-1].removesuffix('.yaml'))


def check_config_name(name):
    """Raises ConfigError if there is no configs/<name>.yaml."""
    names = config_names()
    if name not in names:
        raise config.ConfigError(f'there is no configs/{name}.yaml; choose one of {", ".join(names)}{config.suggest(name, names)}')


def config_names() -> list[str]:
    return sorted(path.stem for path in config.CONFIGS.glob('*.yaml'))


def as_override(word) -> str:
    """A word of the command line in the form that Hydra accepts for any key, so that config.resolve reports the unknown ones.

    A W&B agent restarts a preempted run with all that the run has logged. Logged values that are not keys of the configuration go
    under `expect`, and config.resolve compares them with the values that it derives.
    """
    override = re.fullmatch(r'\+{0,2}(([A-Za-z_][\w.]*)=.*)', word, re.DOTALL)
    if not override:  # an option of Hydra, the choice of a launcher, or a deletion
        return word
    setting, key = override.groups()
    return f'+expect.{setting}' if key in config.SHORT_NAMES or key.startswith('derived.') else f'++{setting}'


def overridden_keys(words) -> frozenset[str]:
    """The keys that these overrides set, from Hydra's list of them: ['++T=2e6', '++opt.lr=0.1'] gives {'T', 'opt.lr'}."""
    words = OmegaConf.to_container(words, resolve=False) if OmegaConf.is_config(words) else words  # a value may refer to a key
    return frozenset(word.partition('=')[0].lstrip('+') for word in words)
