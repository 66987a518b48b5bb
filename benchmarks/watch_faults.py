"""How many faults the watch catches by x = 0.3, and how many healthy runs it blames:  python -m benchmarks.watch_faults

Healthy runs are the ladder's own, each against the others; faulty ones are those of experiments/laptop_fault_*.yaml, of the
ladder without µP, and runs that see the same stretch of data again and again. `--train` trains these; the others are
experiments.run's.
"""
import argparse

import numpy as np

FAULTS = {  # fault: (log, condition)
    'learning rate × 2': ('logs/laptop_fault_lr.parquet', 'peak_lr=0.002'),
    'learning rate ÷ 2': ('logs/laptop_fault_lr.parquet', 'peak_lr=0.0005'),
    'horizon × 1.5': ('logs/laptop_fault_horizon.parquet', None),
    'µP off': ('logs/laptop_mlp_no_mup.parquet', None),
    'data repeated': ('logs/laptop_fault_repeat.parquet', None),
}
REPEAT_FROM, REPEATED = 0.1, 0.005  # from this share of the horizon on, the last such share of it is all the data there is


def train_repeated(widths=(32, 44), seeds=(0, 1, 2)):
    """Trains laptop models that from REPEAT_FROM on see one stretch of data again and again, in runs/laptop_fault_repeat."""
    import hosts

    import data
    import train
    from experiments import run as runner

    hosts.each_core_a_device()
    train.enable_compilation_cache()
    fresh = data.open_task
    name, axes = runner.read_sweep('experiments/laptop_mlp.yaml')
    axes |= {'model.D': list(widths), 'seed': list(seeds), 'wandb_tag': ['laptop_fault_repeat'], 'wandb_mode': ['disabled']}
    for point in runner.expand(name, axes):
        run = point.run
        first, length = (max(1, int(share * run.derived.steps)) for share in (REPEAT_FROM, REPEATED))

        def repeating(run, seeds, rows, first=first, length=length):
            task = fresh(run, seeds, rows)

            def block(k):  # one step's data is one entry of a block
                steps = np.arange(k * task.block_steps, (k + 1) * task.block_steps)
                steps = np.where(steps < first, steps, first - length + (steps - first) % length)
                blocks = {j: np.asarray(task.block(j)) for j in np.unique(steps // task.block_steps)}
                return np.stack([blocks[s // task.block_steps][s % task.block_steps] for s in steps])
            return task._replace(block=block)

        data.open_task = repeating
        train.train(run)
    data.open_task = fresh


def main():
    parse = argparse.ArgumentParser(prog='python -m benchmarks.watch_faults', description=__doc__.splitlines()[0].split(':  ')[0])
    parse.add_argument('--ladder', default='logs/laptop_mlp.parquet')
    parse.add_argument('--train', action='store_true', help='only train the runs with repeated data (some minutes)')
    args = parse.parse_args()
    if args.train:
        train_repeated()
        return
    print(f'{"runs":18} {"count":>5}  by x = 0.3  by the end  median x   looks like')
    for row in monitor.caught(args.ladder, FAULTS):
        print(f'{row["runs"]:18} {row["count"]:5}  {row["by 0.3"]:9.0%}  {row["by the end"]:10.0%}  {row["median x"]:8.2f}'
              f'   {row["looks like"]}')


if __name__ == '__main__':
    commands.run(main)
