"""Runs a W&B sweep file on this machine, without an account:  python -m experiments.run experiments/mlp.yaml [key=value …]

The grid one point after another, smallest compute first, seeds fused; finished runs are skipped, a failed one does not stop the
rest. What a point trains is train.py's, where it is recorded is record.py's.
"""
import argparse
import itertools
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pandas as pd
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tqdm import tqdm

import data
import train
from trainer import config
from trainer import distributed as hosts
from trainer import run_folder as record


class Point(NamedTuple):
    """One point of a grid, all its seeds together."""
    swept: dict[str, object]  # what tells it from the others: the keys with more than one value, seeds aside
    run: config.Run
    todo: list[int]  # the seeds not finished yet

    @property
    def label(self):
        return ' '.join(f'{key}={value}' for key, value in self.swept.items()) or config.run_name(self.run, self.run.all_seeds[0])

    @property
    def evaluation(self):
        """FLOPs of one seed's evaluations, not part of C: each takes the gradients of all test batches."""
        evaluations = len(train.evaluation_points(self.run.num_evals, self.run.derived.steps))
        return self.run.derived.compute * evaluations * self.run.derived.num_test_batches / self.run.derived.steps


def read_sweep(path):
    """(config name, {dotted key: values}) of a W&B grid sweep file, what its command fixes included.

    wandb_mode=online in the command becomes offline: no account is needed here. Raises ConfigError.
    """
    try:
        sweep = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise config.ConfigError(f'{path} is not YAML: {error}') from error
    if not isinstance(sweep, dict) or sweep.get('method') != 'grid' or not isinstance(sweep.get('parameters'), dict):
        raise config.ConfigError(f'{path} is no grid sweep; wanted are  method: grid  and keys with their values under  parameters')
    command = [str(word) for word in sweep.get('command') or []]
    if '-cn' not in command[:-1]:
        raise config.ConfigError(f'{path}: the command names no configuration; add -cn and a name to it, e.g. -cn, mlp')
    axes = dict(read_override(word) for word in command if '=' in word)
    if axes.get('wandb_mode') == ['online']:
        axes['wandb_mode'] = ['offline']
    for key, given in sweep['parameters'].items():
        given = given if isinstance(given, dict) else {}
        axes[key] = [given['value']] if 'value' in given else given.get('values')
        if not isinstance(axes[key], list) or not axes[key]:
            raise config.ConfigError(f'{path}: parameter {key} has no values; give it  value: …  or  values: [ … ]')
    return command[command.index('-cn') + 1], axes


def read_override(text):
    """'model.D=32,64' -> ('model.D', [32, 64]); 'seeds=[0,1]' is one value, a list."""
    key, _, values = text.partition('=')
    try:
        values = yaml.safe_load(f'[{values}]')
    except yaml.YAMLError:
        values = []
    if not key or not values:
        raise config.ConfigError(f'{text} is no override; write key=value, or key=value,value for several')
    return key, values


def expand(name, axes, data_needed=True):
    """The points of a grid, smallest compute first, all checked; the values of `seed` become one run's `seeds`.

    Raises ConfigError for the first point that cannot run. data_needed=False: V as configured where the data set is missing.
    """
    if 'seeds' not in axes and len(axes.get('seed', [])) > 1:
        axes = {**axes, 'seeds': [axes['seed']], 'seed': axes['seed'][:1]}
    with initialize_config_dir(str(Path(train.__file__).parent / 'configs'), version_base=None):
        base = compose(name)
    OmegaConf.set_struct(base, False)  # a key that does not exist is config.resolve's to refuse
    points, folders = [], set()
    for values in itertools.product(*axes.values()):
        cfg = base.copy()
        for key, value in zip(axes, values, strict=True):
            OmegaConf.update(cfg, key, value)
        swept = {key: value for key, value in zip(axes, values, strict=True) if len(axes[key]) > 1}
        try:
            run = config.resolve(cfg, data.vocab_size(cfg.ds_path, data_needed))
            hosts.devices(run.opt.B, run.derived.microbatches)
            todo = [seed for seed in run.all_seeds if not (record.ended(run, seed) and well(run, seed))]
        except ValueError as error:
            where = ' '.join(f'{key}={value}' for key, value in swept.items()) or name
            raise config.ConfigError(f'{where}: {error}') from error
        points.append(Point(swept, run, todo))
        for folder in (record.folder_of(run, seed) for seed in run.all_seeds):
            if folder in folders:
                raise config.ConfigError(f'two points of the grid write the folder {folder}; give each value once, and no run_dir')
            folders.add(folder)
    return sorted(points, key=lambda point: point.run.derived.compute * len(point.run.all_seeds))


def train_points(points):
    """Trains what is not finished under one bar of FLOPs, with a line for each point as it ends.

    Returns the labels of failed points, and the train.Interrupted that a signal caused, or None.
    """
    failed = set()
    points = [point for point in points if point.todo or point.run.wandb_mode == 'online']  # W&B may lack some of a finished run
    total = sum(point.run.derived.compute * len(point.todo) for point in points)
    with tqdm(total=total, unit='FLOP', unit_scale=True, smoothing=0.05, disable=not (points and hosts.first())) as bar:
        for point in points:
            run, compute = point.run, point.run.derived.compute * len(point.todo)
            end, of_step = bar.n + compute, compute / run.derived.steps

            def on_steps(steps, shown, of_step=of_step):
                bar.set_postfix({k: f'{v:.4f}' for k, v in shown.items()}, refresh=False)
                bar.update(steps * of_step)

            bar.set_description(point.label)
            try:
                train.train(run, on_steps)
                row = results(run)
                bar.write(f"{point.label}: {row['state']}, test loss {row['test loss']}")
            except train.Interrupted as stop:
                return failed, stop
            except KeyboardInterrupt:  # Ctrl-C while the run was being made ready, before train.train listens for signals
                return failed, train.Interrupted(signal.SIGINT)
            except Exception as error:  # whatever befell this point, the others have their turn, and the exit code tells
                failed.add(point.label)
                bar.write(f"{point.label}: failed, {type(error).__name__}: {' '.join(str(error).split())}")
            bar.total -= end - bar.n  # what a failed or diverged run left undone
            jax.clear_caches()  # programs are compiled for one point; kept, they would add up over a long grid
    return failed, None


def well(run, seed):
    """Whether this seed has ended as it should: at its horizon, or stopped by its forecast."""
    return record.read_summary(record.folder_of(run, seed)).get('state') in ('finished', 'stopped')


def results(run, failed=False):
    """What the records of a run's seeds say: test loss (mean ± standard deviation, ddof 1, of the finished), state, speed."""
    summaries = [record.read_summary(record.folder_of(run, seed)) for seed in run.all_seeds]
    states = Counter(summary.get('state', 'not trained') for summary in summaries)
    state = next(iter(states)) if len(states) == 1 else ', '.join(f'{n} {state}' for state, n in states.items())
    losses = [summary['test_loss'] for summary in summaries if summary.get('state') == 'finished']
    loss = f'{np.mean(losses):.5f}' if losses else ''
    shares = [summary['matmul_share'] for summary in summaries if 'matmul_share' in summary]
    return {'test loss': f'{loss} ± {np.std(losses, ddof=1):.5f}' if len(losses) > 1 else loss,
            'state': 'failed' if failed else state, 'matmul share': f'{np.mean(shares):.0%}' if shares else ''}


def table(points, failed=()):
    """The grid as text, a line a point."""
    rows, runs, compute, evaluation = [], 0, 0.0, 0.0
    for point in points:
        d, seeds = point.run.derived, len(point.run.all_seeds)
        rows.append({**point.swept, 'p': f'{d.num_params:,}', 'C (FLOPs)': f'{d.compute:.3e}', 'steps': f'{d.steps:,}',
                     'tokens': f'{d.steps * d.tokens_per_step:.3e}', 'seeds': seeds, **results(point.run, point.label in failed)})
        runs, compute, evaluation = runs + seeds, compute + d.compute * seeds, evaluation + point.evaluation * seeds
    return (f'{pd.DataFrame(rows).to_string(index=False)}\n'
            f'{runs} runs, {compute:.3e} FLOPs (6·p·T), evaluation +{evaluation / compute:.0%}; '
            'test loss: mean ± standard deviation over seeds (ddof 1)')


def main(argv=None):
    parser = argparse.ArgumentParser(prog='python -m experiments.run', description=__doc__.splitlines()[0].split(':  ')[0])
    parser.add_argument('sweep', help='a W&B sweep file with method: grid')
    parser.add_argument('overrides', nargs='*', metavar='key=value', help="in place of the file's; several values: model.D=32,64")
    parser.add_argument('--dry-run', action='store_true', help='print the table of runs and train none')
    arguments = parser.parse_intermixed_args(argv)
    with train.one_line_errors():
        hosts.each_core_a_device()
        hosts.join(alone=arguments.dry_run)
        name, axes = read_sweep(arguments.sweep)
        points = expand(name, axes | dict(map(read_override, arguments.overrides)), data_needed=not arguments.dry_run)
        if arguments.dry_run:
            print(table(points))
            return
        train.enable_compilation_cache()
        failed, stop = train_points(points)
        if hosts.first():
            print(table(points, failed))
        if stop:
            raise stop
        if failed or not all(well(point.run, seed) for point in points for seed in point.run.all_seeds):
            sys.exit(1)


if __name__ == '__main__':
    main()
