"""A run's copy in W&B, and what a W&B agent tells the run: the only file of the training that knows W&B.

The record on disk, which it copies, is record.py's; reading W&B back is save_logs.py's.
"""
import functools
import os
import secrets
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from trainer import config
from trainer import distributed as hosts
from trainer.checkpoint import brief, warn

PATIENCE = 90  # seconds that the copy waits for a server at its start, and the run at its end


class Mirror:
    """A run's copy in W&B, fed by a thread of its own, so that training never waits for a server.

    A server that cannot be reached at the start leaves the record offline, for `wandb sync`; one that fails later is waited for at
    the end, PATIENCE seconds. Rows are numbered: a run that goes on gives W&B the whole curve again, which takes what it lacks.
    """

    def __init__(self, run, seed, summary, rows):
        self.thread, self.online, folder = ThreadPoolExecutor(1), run.wandb_mode == 'online', summary['folder']
        shutil.rmtree(f'{folder}/wandb', ignore_errors=True)  # of sessions whose rows this one repeats
        self.sweep = agents_run() if seed == run.all_seeds[0] else {}
        here = yaml.safe_load(Path(folder, 'config.yaml').read_text())['environment']
        self.origin = {key: here[key] for key in ('revision', 'device')}  # not configuration: W&B would hand it out again as keys
        values = config.flatten(config.settings(run, seed))
        self.run = self.thread.submit(self._open, run, summary['name'], folder, summary['wandb_id'], values)
        for index, row in enumerate(rows):
            self.log(index, row)

    def _open(self, run, name, folder, wandb_id, values):
        import wandb  # a second of start-up that a run with wandb_mode=disabled does without

        values |= {'seeds': run.seeds} if self.sweep else {}  # given out again, it trains them all
        project = os.environ.get('WANDB_PROJECT', run.wandb_project) if agents_run() else run.wandb_project  # the sweep's
        wanted = dict(project=project, name=name, tags=[run.wandb_tag], dir=folder, reinit='create_new',
                      config={**values, **{short: values[key] for short, key in config.SHORT_NAMES.items()}})

        def begin(mode, run_id):
            return wandb.init(mode=mode, resume='allow' if mode == 'online' else None, **wanted, settings=wandb.Settings(
                run_id=run_id, sweep_id=self.sweep.get('sweep_id'), init_timeout=PATIENCE, finish_timeout=PATIENCE,
                finish_timeout_raises=True, silent=True, console='off', x_disable_stats=True))

        run_id = self.sweep.get('run_id', wandb_id)
        try:
            opened = begin(run.wandb_mode, run_id)
        except wandb.Error as error:
            warn(f'W&B does not answer ({brief(error)}); to upload the run later, the same command, or  wandb sync --id {run_id} '
                 f'{folder}/wandb/offline-run-*')
            self.online = False
            opened = begin('offline', secrets.token_hex(4))  # W&B's client takes an id once in a process
        opened.define_metric('*', step_metric='step')
        if self.sweep:
            opened.mark_preempting()  # a sweep's run that ends without a word, or not with 0, is given out again
        return opened

    def log(self, index, row):
        self.thread.submit(lambda: self.run.result().log(row, step=index))

    def finish(self, summary):
        """Ends it; returns whether W&B has all of it.

        In a sweep only an interrupted run ends with an error for W&B: any other would end the same way again, and again.
        """
        again = summary['state'] == 'interrupted' if self.sweep else summary['state'] not in ('finished', 'stopped')

        def end():
            self.run.result().summary.update(summary | self.origin)
            self.run.result().finish(exit_code=int(again))

        try:
            self.thread.submit(end).result()
        except Exception as error:  # whatever befell W&B, the record on disk is whole, and the training has ended as it has
            warn(f'W&B did not take all of it ({brief(error)}); the same command gives it the rest, or  wandb sync '
                 f'{summary["folder"]}/wandb/run-*')
            return False
        finally:
            self.thread.shutdown()
        return self.online


def log_in(run):
    """Makes sure that there is a W&B key, without asking the server, where a run is to be mirrored online. Raises ConfigError."""
    if run.wandb_mode != 'online' or not hosts.first():
        return
    agents_run()  # before W&B reads the environment
    import wandb

    wandb.setup(wandb.Settings(silent=True))
    try:
        wandb.login(verify=False)
    except wandb.Error as error:
        raise config.ConfigError(f'wandb_mode=online: {str(error).rstrip(".")}; or set wandb_mode=offline') from error


@functools.cache
def agents_run() -> dict:
    """What a W&B agent tells this process of its sweep's run, {} without an agent.

    It is taken out of the environment, where every run that this process opens would find it: only the first seed is the sweep's.
    """
    if 'WANDB_SWEEP_ID' not in os.environ:
        return {}
    os.environ.pop('WANDB_SWEEP_PARAM_PATH', None)  # the point's values, which reach us as overrides
    return {'sweep_id': os.environ.pop('WANDB_SWEEP_ID'), 'run_id': os.environ.pop('WANDB_RUN_ID')}
