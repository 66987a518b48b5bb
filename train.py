"""Trains one configuration, all its seeds together, to its horizon:  python train.py -cn mlp model.D=64 opt.lr=0.001 T=2e6

This file has the Hydra entry point and the training loop. trainer/programs.py has the compiled programs.
"""
import functools
import signal
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import hydra
import jax
import numpy as np
from hydra.core.hydra_config import HydraConfig

import data
import optimizer
from trainer import checkpoint, command_line, config, distributed, dry_run, process, programs, resume, run_folder, wandb_logger
from trainer.process import Interrupted, note
from trainer.speed import speed, timed

DISPATCH_SECONDS = 1.0  # of one dispatch: long enough to hide the host's work, short enough for signals and the progress bar

# Metrics without a value before the first update: there is no second moment, no training loss and no earlier evaluation.
UNDEFINED_AT_START = ('Buvar', 'uvar', 'u2_mean', 'umean2', 'train_loss', 'dh', 'df')


def train(run, on_steps=lambda steps, metrics: None) -> list[dict]:
    """Trains the seeds of a run that have not ended, from their newest checkpoint, and returns the summaries of all seeds.

    on_steps(steps, metrics) is called with the number of steps just done and with the metrics to show. Raises Interrupted after a
    signal, once the state is saved; ValueError and OSError, before a folder is made, for data or a folder that cannot be used.
    Every process of a run calls it, and all raise the same errors.
    """
    with distributed.shared_errors():
        ended = {seed: run_folder.ended(run, seed) for seed in run.all_seeds}
        seeds = [seed for seed, summary in ended.items() if not summary]
        jax.config.update('jax_default_matmul_precision', run.matmul_precision)
        task = data.open_task(run, seeds, distributed.local_rows(run.opt.B)) if seeds else None
        monitor = follow_ladder(run) if seeds else None
        wandb_logger.log_in(run)
    summaries = [run_folder.send_to_wandb_again(run, summary) for summary in ended.values() if summary]
    for summary in summaries:
        note(f"seed {summary['seed']}: already {summary['state']}; to train it again, delete {summary['folder']}")
    if seeds:
        with run_folder.locked([run.folder(seed) for seed in seeds]):
            summaries += train_seeds(run.with_entropy(task.entropy), task, seeds, monitor, on_steps)
    return summaries


def train_seeds(run, task, seeds, monitor, on_steps):
    """Trains these seeds together, in folders that are locked for this process, and returns their summaries."""
    with process.stop_signals() as stops, run_folder.closed_on_failure({}) as records:
        session = Session(run, task, seeds, records, stops, monitor, on_steps)
        with closing(session.blocks):
            for point in run.derived.eval_points:
                if point > session.evaluated:
                    session.train_to(point)
                    if session.stop or not records:
                        break
                    session.evaluate()
            session.end()
    stop = session.stop or next(iter(stops), 0)  # a signal after the last step still ends a sweep
    if stop:
        if stop == signal.SIGUSR2 and callable(signal.getsignal(stop)):  # submitit's handler, which requeues the job
            signal.raise_signal(stop)
        raise Interrupted(stop)
    return session.summaries


class Session:
    """One process's training of a group of S seeds: compiled programs, state, position in the data, clock and records.

    `records` {position in the group: RunFolder} are the seeds still in training; a seed that diverges leaves them.
    """

    def __init__(self, run, task, seeds, records, stops, monitor, on_steps):
        self.run, self.task, self.seeds, self.records, self.stops = run, task, seeds, records, stops
        self.monitor, self.on_steps = monitor, on_steps
        self.began = self.saved = time.monotonic()
        self.clock, self.summaries, self.stop, self.steps_per_dispatch = Counter(), [], 0, 1

        program = programs.build(run, task)
        self.test = distributed.put_global(task.test, program.test_sharding)
        self.state, self.evaluated = resume.restore_or_init(run, program, seeds, self.test)
        self.step = self.first_step = int(self.state.step[0])
        self.on_steps(self.step, {})

        derived = run.derived
        scales = optimizer.schedule(run.opt.schedule, run.opt.decay_frac, derived.warmup_steps, derived.steps)
        self.lrs = run.opt.lr * scales
        self.tau = optimizer.gradient_flow_time(self.lrs)
        self.lr_scales = np.pad(scales, (0, task.block_steps), 'edge').astype(np.float32)
        self.peak_lrs = optimizer.peak_lrs(run)

        place = functools.partial(jax.make_array_from_process_local_data, program.raw_sharding)
        self.blocks = data.read_ahead(task, self.step, place)
        self.next_block()
        with timed(self.clock, 'compile_seconds'):
            lowered = (program.train.lower(self.state, self.peak_lrs, *self.block_arguments(), np.int32(0), np.int32(1)),
                       program.evaluate.lower(self.state, self.peak_lrs, self.test))
            with ThreadPoolExecutor(2) as compilers:
                self.run_steps, self.run_evaluation = compilers.map(lambda one: one.compile(), lowered)
        for i, seed in enumerate(seeds):
            records[i] = run_folder.RunFolder(run, seed, self.step, self.evaluated, stops)

    def next_block(self):
        """Takes the next block of training data, of the steps from block_start on."""
        self.block_start, self.raw = next(self.blocks)

    def block_arguments(self):
        return self.raw, self.lr_scales[self.block_start:self.block_start + self.task.block_steps]

    def train_to(self, point):
        """Trains until `point` updates are done, a signal arrives, or no seed is left; saves checkpoints when they are due."""
        while self.step < point and self.records and not self.stop:
            if self.step == self.block_start + self.task.block_steps:
                self.next_block()
            count = min(point, self.block_start + self.task.block_steps, self.step + self.steps_per_dispatch) - self.step
            train_loss = self.dispatch(count)
            for i in [i for i in self.records if not np.isfinite(train_loss[i])]:
                self.close(i, 'diverged')
            self.on_steps(count, {'train_loss': np.mean(train_loss[list(self.records)])} if self.records else {})
            due = time.monotonic() - self.saved > 60 * self.run.checkpoint_minutes
            self.stop = distributed.any_process(self.stops[0] if self.stops else 0)
            self.steps_per_dispatch, due = distributed.broadcast(self.steps_per_dispatch, due)
            if due:
                self.save()

    def dispatch(self, count):
        """Runs `count` steps on the devices and returns the mean training loss of each seed [S] since the last evaluation."""
        before = self.clock['train_seconds']
        with timed(self.clock, 'train_seconds'):
            self.state = self.run_steps(self.state, self.peak_lrs, *self.block_arguments(),
                                        np.int32(self.step - self.block_start), np.int32(count))
            train_loss = np.asarray(self.state.loss_sum / self.state.loss_count)  # waits for the devices
        self.step += count
        self.steps_per_dispatch = max(1, int(DISPATCH_SECONDS * count / (self.clock['train_seconds'] - before)))
        return train_loss

    def evaluate(self):
        """Evaluates every seed before the update of this step and records it."""
        with timed(self.clock, 'eval_seconds'):
            self.state, metrics = self.run_evaluation(self.state, self.peak_lrs, self.test)
            metrics = jax.device_get(metrics)  # {name: [S]}
        if self.step == 0:
            metrics = {k: v for k, v in metrics.items() if k not in UNDEFINED_AT_START}
        tokens = self.step * self.run.derived.tokens_per_step
        position = {'step': self.step, 'tokens': tokens, 'compute': 6.0 * tokens * self.run.derived.num_params,
                    'tau': self.tau[self.step], 'lr': self.lrs[self.step]}
        for i, record in list(self.records.items()):
            if not np.isfinite(metrics['test_loss'][i]):
                self.close(i, 'diverged')
                continue
            row = position | {k: float(v[i]) for k, v in metrics.items()}
            row |= self.monitor([*record.rows, row])
            record.log(row)
            self.stop_if_hopeless(i, row)
        self.on_steps(0, {'test_loss': np.mean(metrics['test_loss'][list(self.records)])} if self.records else {})

    def stop_if_hopeless(self, i, row):
        """Ends a seed whose forecast final loss is above stop_above with 95% probability (run.stop_above)."""
        limit, low = self.run.stop_above, row.get('forecast_lo90', -np.inf)
        if limit is not None and self.step < self.run.derived.steps and distributed.any_process(low > limit):
            note(f'seed {self.seeds[i]}: stopped at step {self.step:,} of {self.run.derived.steps:,}: its forecast final loss is '
                 f'above {low:.5g} with 95% probability, and stop_above={limit:g}')
            self.close(i, 'stopped')

    def totals(self):
        """Numbers of the training so far in this process, for the summary."""
        return {'steps': self.step, 'tokens': self.step * self.run.derived.tokens_per_step, **self.clock,
                'wall_seconds': time.monotonic() - self.began, 'seeds_together': len(self.seeds)}

    def save(self):
        """Saves a checkpoint of every seed in training."""
        checkpoint.delete_unshared([record.checkpoints for record in self.records.values()])
        for i, record in self.records.items():
            record.save(self.step, jax.tree.map(lambda a, i=i: a[i], self.state), **self.totals())
        self.saved = time.monotonic()

    def close(self, i, outcome):
        """Ends the record of one seed."""
        steps = (self.step - self.first_step) * len(self.seeds)
        numbers = self.totals() | speed(self.run, steps, self.clock['train_seconds'])
        self.summaries.append(self.records.pop(i).close(outcome, **numbers))

    def end(self):
        """Ends the session: after a signal with a checkpoint, otherwise at the horizon."""
        if self.stop:
            self.save()
        for i in list(self.records):
            self.close(i, 'interrupted' if self.stop else 'finished')


def follow_ladder(run):
    """Returns monitor(rows), which gives the columns that `watch` adds to a record (analysis/beyond/monitor.py); {} without it."""
    if not run.watch:
        return lambda rows: {}
    from analysis.beyond import monitor  # SciPy is loaded only for a run with `watch`

    return monitor.follow(run.watch, run.derived.num_params, run.derived.compute)


def run_config(cfg, overridden=frozenset()):
    """Checks and trains one composed configuration with a progress bar, and prints how each seed ended.

    overridden: the keys that were set by hand rather than by a configuration file.
    """
    process.enable_compilation_cache()
    run = config.resolve(cfg, data.vocab_size(cfg.ds_path, data_needed=not cfg.dry_run), overridden)
    if run.dry_run:
        jax.config.update('jax_num_cpu_devices', 8)
    else:
        distributed.use_every_core()
        distributed.initialize(run.num_processes, run.process_id, run.coordinator,
                               automatic=not wandb_logger.agent_environment())
        note(programs.describe(run, distributed.devices_for(run.opt.B, run.derived.microbatches)))  # or raises, before any folder
    derived = run.derived
    print(f'p = {derived.num_params:,} parameters, {derived.steps:,} steps, {derived.steps * derived.tokens_per_step:,} tokens, '
          f'C = {derived.compute:.4g} FLOPs, evaluations +{derived.eval_share:.0%}, seeds {run.all_seeds}')
    if run.dry_run:
        print(dry_run.report(run))
        return
    if costly := config.evaluation_warning(run):
        note(f'note: {costly}')
    with closing(process.ProgressBar(derived.steps, run.name(run.all_seeds[0]), distributed.is_main_process())) as bar:
        summaries = train(run, bar.on_steps)
    for summary in summaries:
        print(f"seed {summary['seed']}: {summary['state']}, test_loss {summary.get('test_loss', float('nan')):.5f}, "
              f"{summary['wall_seconds']:.0f} s ({summary['eval_seconds'] / summary['wall_seconds']:.0%} in evaluations) at "
              f"{summary.get('mfu', 0):.0%} of the matmul rate, in {summary['folder']}")
    diverged = any(summary['state'] == 'diverged' for summary in summaries)
    if diverged and not wandb_logger.agent_environment():  # an agent stops after several failed runs
        sys.exit(1)


@hydra.main(version_base=None, config_path=str(config.CONFIGS))
def main(cfg):
    with process.one_line_errors():
        run_config(cfg, command_line.overridden_keys(HydraConfig.get().overrides.task))


if __name__ == '__main__':
    import train as module  # launchers find `main` by its module's name, which is __main__ here

    command_line.run(module.main)
