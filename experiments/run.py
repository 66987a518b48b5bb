"""Runs a W&B sweep file on this machine, without an account:  python -m experiments.run experiments/mlp.yaml [key=value …]

The points of the grid are trained one after another, smallest compute first, with the seeds of a point together. Runs that have
ended are skipped, and a run that fails does not stop the others. Training itself is in train.py.
"""
import argparse
import bisect
import itertools
import signal
import sys
import time
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
from trainer import command_line, config, distributed, process, run_folder
from trainer.process import Interrupted


class Point(NamedTuple):
    """One point of a grid, with all its seeds."""
    swept: dict[str, object]  # its values of the keys that have several values in the grid, seeds aside
    run: config.Run
    todo: list[int]  # the seeds that are still to be trained

    @property
    def label(self):
        return ' '.join(f'{key}={value}' for key, value in self.swept.items()) or self.run.name(self.run.all_seeds[0])

    @property
    def flops_per_batch(self) -> int:
        """FLOPs of the gradient of one batch, for all seeds that are still to be trained."""
        return 6 * self.run.derived.num_params * self.run.derived.tokens_per_step * len(self.todo)

    @property
    def flops(self) -> int:
        """FLOPs of training and evaluation of these seeds."""
        d = self.run.derived
        return self.flops_per_batch * (d.steps + len(d.eval_points) * d.num_test_batches)


def read_sweep(path):
    """(configuration name, {dotted key: values}) of a W&B grid sweep file, including the keys that its command sets.

    wandb_mode=online in the command is read as offline, since no account is needed here. Raises ConfigError.
    """
    try:
        sweep = yaml.safe_load(Path(path).read_text())
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        files = {file.stem: file for file in sorted(Path(__file__).parent.glob('*.yaml'))}
        raise config.ConfigError(f'there is no sweep file {path}; {Path(__file__).parent.name}/ has {", ".join(files)}'
                                 f'{config.suggest(Path(path).stem, files)}') from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise config.ConfigError(f'{path} is not YAML: {error}') from error
    if not isinstance(sweep, dict) or sweep.get('method') != 'grid' or not isinstance(sweep.get('parameters'), dict):
        raise config.ConfigError(f'{path} is not a grid sweep; it needs  method: grid  and, under  parameters,  keys with values')
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
    """'model.D=32,64' -> ('model.D', [32, 64]). A list is one value: 'seeds=[0,1]' -> ('seeds', [[0, 1]])."""
    key, _, values = text.partition('=')
    try:
        values = yaml.safe_load(f'[{values}]')
    except yaml.YAMLError:
        values = []
    if not key or not values:
        raise config.ConfigError(f'{text} is not an override; write key=value, or key=value,value for several values')
    return key, values


def expand(name, axes, data_needed=True):
    """The points of a grid, smallest compute first, all checked. The values of `seed` become the `seeds` of one run.

    data_needed=False: where the data set is missing, model.V is used as configured. Raises ConfigError for the first point that
    cannot run.
    """
    if 'seeds' not in axes and len(axes.get('seed', [])) > 1:
        axes = {**axes, 'seeds': [axes['seed']], 'seed': axes['seed'][:1]}
    command_line.check_config_name(name)
    with initialize_config_dir(str(config.CONFIGS), version_base=None):
        base = compose(name)
    OmegaConf.set_struct(base, False)  # config.resolve reports unknown keys
    points, folders = [], set()
    for values in itertools.product(*axes.values()):
        cfg = base.copy()
        for key, value in zip(axes, values, strict=True):
            OmegaConf.update(cfg, key, value)
        swept = {key: value for key, value in zip(axes, values, strict=True) if len(axes[key]) > 1}
        try:
            run = config.resolve(cfg, data.vocab_size(cfg.ds_path, data_needed), overridden=axes.keys())
            distributed.devices_for(run.opt.B, run.derived.microbatches)
            todo = [seed for seed in run.all_seeds if not (run_folder.ended(run, seed) and succeeded(run, seed))]
        except ValueError as error:
            where = ' '.join(f'{key}={value}' for key, value in swept.items()) or name
            raise config.ConfigError(f'{where}: {error}') from error
        points.append(Point(swept, run, todo))
        for folder in map(run.folder, run.all_seeds):
            if folder in folders:
                raise config.ConfigError(f'two points of the grid write the folder {folder}; give each value once, and no run_dir')
            folders.add(folder)
    return sorted(points, key=lambda point: point.run.derived.compute * len(point.run.all_seeds))


class SweepBar(tqdm):
    """A progress bar of FLOPs, evaluations included. Its rate leaves out the start-up and the compilation of every run."""

    def __init__(self, points, **options):
        super().__init__(total=sum(point.flops for point in points), unit='FLOP', unit_scale=True, smoothing=0, **options)

    def start(self, point):
        """Begins a new run."""
        self.point, self.calls, self.last_call = point, 0, time.time()
        self.set_description(point.label)

    def on_steps(self, steps, metrics):
        """Counts steps and evaluations, for train.train. The first call brings the steps of earlier sessions."""
        if self.disable:
            return
        earlier = bisect.bisect_left(self.point.run.derived.eval_points, steps)
        evaluations = int('test_loss' in metrics) if self.calls else earlier
        flops = self.point.flops_per_batch * (steps + evaluations * self.point.run.derived.num_test_batches)
        if self.calls < 2:  # the second call comes after compilation and one step or evaluation
            self.initial += flops
            self.start_t += time.time() - self.last_call
        self.calls, self.last_call = self.calls + 1, time.time()
        self.set_postfix({name: f'{value:.4f}' for name, value in metrics.items()}, refresh=False)
        self.update(flops)


def train_points(points):
    """Trains what is not finished, with one progress bar for all points, and prints a line as each point ends.

    Returns the labels of the failed points, and the Interrupted that a signal caused, or None.
    """
    failed = set()
    points = [point for point in points if point.todo or point.run.wandb_mode == 'online']  # W&B may lack part of a finished run
    with SweepBar(points, disable=not (points and distributed.is_main_process())) as bar:
        for point in points:
            end = bar.n + point.flops
            bar.start(point)
            try:
                train.train(point.run, bar.on_steps)
                row = results(point.run)
                bar.write(f"{point.label}: {row['state']}, test loss {row['test loss']}")
            except Interrupted as stop:
                return failed, stop
            except KeyboardInterrupt:  # Ctrl-C during start-up, before train.train handles signals
                return failed, Interrupted(signal.SIGINT)
            except Exception as error:  # the other points are still trained; the exit code says that one failed
                failed.add(point.label)
                bar.write(f"{point.label}: failed, {type(error).__name__}: {' '.join(str(error).split())}")
            bar.total -= end - bar.n  # the steps that a failed or diverged run did not do
            jax.clear_caches()  # compiled programs are of one point only, and would fill the memory in a long grid
    return failed, None


def succeeded(run, seed):
    """Whether this seed has reached its horizon, or was stopped by its forecast."""
    return run_folder.read_summary(run.folder(seed)).get('state') in ('finished', 'stopped')


def results(run, failed=False):
    """Test loss (mean ± standard deviation over the finished seeds, ddof 1), state and speed of a run, as text for the table."""
    summaries = [run_folder.read_summary(run.folder(seed)) for seed in run.all_seeds]
    states = Counter(summary.get('state', 'not trained') for summary in summaries)
    state = next(iter(states)) if len(states) == 1 else ', '.join(f'{n} {state}' for state, n in states.items())
    losses = [summary['test_loss'] for summary in summaries if summary.get('state') == 'finished']
    loss = f'{np.mean(losses):.5f}' if losses else ''
    mfu = [summary['mfu'] for summary in summaries if 'mfu' in summary]
    return {'test loss': f'{loss} ± {np.std(losses, ddof=1):.5f}' if len(losses) > 1 else loss,
            'state': 'failed' if failed else state, 'mfu': f'{np.mean(mfu):.0%}' if mfu else ''}


def table(points, failed=()):
    """The grid as text, one line per point, with the totals and a warning where evaluations cost more than training."""
    rows, runs, compute, evaluation = [], 0, 0.0, 0.0
    for point in points:
        d, seeds = point.run.derived, len(point.run.all_seeds)
        rows.append({**point.swept, 'p': f'{d.num_params:,}', 'C (FLOPs)': f'{d.compute:.3e}', 'steps': f'{d.steps:,}',
                     'tokens': f'{d.steps * d.tokens_per_step:.3e}', 'seeds': seeds, **results(point.run, point.label in failed)})
        runs, compute = runs + seeds, compute + d.compute * seeds
        evaluation += d.compute * d.eval_share * seeds
    lines = [pd.DataFrame(rows).to_string(index=False),
             f'{runs} runs, {compute:.3e} FLOPs (6·p·T), evaluation +{evaluation / compute:.0%}; '
             'test loss: mean ± standard deviation over seeds (ddof 1); mfu: share of the measured matmul rate']
    if costly := [point for point in points if point.run.derived.eval_share > 1]:
        worst = max(costly, key=lambda point: point.run.derived.eval_share)
        lines.append(f'warning, {len(costly)} of {len(points)} points: {config.evaluation_warning(worst.run)} ({worst.label})')
    return '\n'.join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(prog='python -m experiments.run', description=__doc__.splitlines()[0].split(':  ')[0])
    parser.add_argument('sweep', help='a W&B sweep file with method: grid')
    parser.add_argument('overrides', nargs='*', metavar='key=value', help="replaces the file's values; several: model.D=32,64")
    parser.add_argument('--dry-run', action='store_true', help='print the table of runs and train nothing')
    arguments = parser.parse_intermixed_args(argv)
    with process.one_line_errors():
        distributed.use_every_core()
        distributed.initialize(automatic=not arguments.dry_run)
        name, axes = read_sweep(arguments.sweep)
        points = expand(name, axes | dict(map(read_override, arguments.overrides)), data_needed=not arguments.dry_run)
        if arguments.dry_run:
            print(table(points))
            return
        process.enable_compilation_cache()
        failed, stop = train_points(points)
        if distributed.is_main_process():
            print(table(points, failed))
        if stop:
            raise stop
        if failed or not all(succeeded(point.run, seed) for point in points for seed in point.run.all_seeds):
            sys.exit(1)


if __name__ == '__main__':
    main()
