"""The copy of a run in W&B, beside the record of run_folder.py. No other file of the trainer imports wandb."""
import atexit
import functools
import os
import queue
import secrets
import shutil
import sys
import threading
import time
from functools import partial

from trainer import config, distributed
from trainer.process import brief, note, warn

TIMEOUT = 90  # seconds that W&B's client waits for its server, at the start and at the end of a run
TIMEOUT_INTERRUPTED = 15  # seconds that a run which a signal has stopped waits for W&B


class WandbLogger:
    """Writes one run to W&B from a thread of its own, so that training never waits for a server.

    Rows are numbered. A run that resumes sends its whole curve again, and W&B adds the rows that it lacks. If the server does not
    answer at the start, the copy is written offline, for `wandb sync`.
    """

    def __init__(self, run, seed, summary, rows, environment, stops=()):
        """summary: of the run folder; rows: evaluations so far; environment: a dict; stops: signals received so far."""
        self.stops, self.folder, self.run, self.error = stops, summary['folder'], None, None
        self.online = run.wandb_mode == 'online'
        self.sweep = agent_environment() if seed == run.all_seeds[0] else {}  # W&B knows one run of a group
        # Of the summary and not of the configuration, which W&B would hand out again as overrides.
        self.origin = {key: environment[key] for key in ('revision', 'device')}
        shutil.rmtree(f'{self.folder}/wandb', ignore_errors=True)  # of earlier sessions, whose rows this one sends again
        self.calls = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()
        self.calls.put(partial(self._open, run, seed, summary))
        for index, row in enumerate(rows):
            self.log(index, row)

    def _work(self):
        """Makes the calls in order until a None. The first error is kept; the calls after it are still made."""
        while call := self.calls.get():
            try:
                call()
            except Exception as error:  # any error: the record is on disk, so W&B's client must not stop training
                self.error = self.error or error

    def _open(self, run, seed, summary):
        import wandb  # takes a second, which a run with wandb_mode=disabled does without

        values = config.flatten(config.settings(run, seed))
        if self.sweep:
            values['seeds'] = run.seeds  # a requeued run trains them all again
        settings = dict(sweep_id=self.sweep.get('sweep_id'), init_timeout=TIMEOUT, finish_timeout=TIMEOUT,
                        finish_timeout_raises=True, silent=True, console='off', x_disable_stats=True)
        arguments = dict(
            project=os.environ.get('WANDB_PROJECT', run.wandb_project) if agent_environment() else run.wandb_project,
            name=summary['name'], tags=[run.wandb_tag], dir=self.folder, reinit='create_new',
            config=values | {short: values[key] for short, key in config.SHORT_NAMES.items()})
        run_id = self.sweep.get('run_id', summary['wandb_id'])
        try:
            self.run = wandb.init(mode=run.wandb_mode, resume='allow' if self.online else None, **arguments,
                                  settings=wandb.Settings(run_id=run_id, **settings))
        except wandb.Error as error:
            warn(f'W&B does not answer ({brief(error)}); the run is recorded offline. To upload it later, repeat the command, or '
                 f'run  wandb sync --id {run_id} {self.folder}/wandb/offline-run-*')
            self.online = False
            # under another id: the client refuses to open one id twice in a process
            self.run = wandb.init(mode='offline', **arguments, settings=wandb.Settings(run_id=secrets.token_hex(4), **settings))
        self.run.define_metric('*', step_metric='step')
        if self.sweep:
            self.run.mark_preempting()  # W&B requeues a run that ends with an exit code other than 0, or disappears

    def log(self, index, row):
        self.calls.put(lambda: self.run.log(row, step=index))

    def finish(self, summary) -> bool:
        """Ends the copy and returns whether W&B has all of it.

        In a sweep only an interrupted run reports an error, since W&B would requeue a diverged or failed one for ever. A signal
        ends the waiting for a server that does not answer.
        """
        requeue = summary['state'] == 'interrupted' if self.sweep else summary['state'] not in ('finished', 'stopped')

        def end():
            self.run.summary.update(summary | self.origin)
            self.run.finish(exit_code=int(requeue))

        self.calls.put(end)
        self.calls.put(None)
        self._wait()
        if self.thread.is_alive():  # a signal ended the waiting
            warn('W&B does not answer, and has not received all of the run; repeat the command to send the rest')
            atexit.register(exit_now, 128 + self.stops[0])  # called before the client's own exit handler, which would wait
            return False
        if self.error:
            warn(f'W&B did not receive all of the run ({brief(self.error)}); repeat the command to send the rest, or run  '
                 f'wandb sync {self.folder}/wandb/run-*')
            return False
        return self.online

    def _wait(self):
        """Waits until the thread has ended, or until a signal."""
        begun, signals, told = time.monotonic(), len(self.stops), False
        while self.thread.is_alive():
            self.thread.join(0.2)
            waited = time.monotonic() - begun
            if len(self.stops) > signals or (signals and waited > TIMEOUT_INTERRUPTED):
                return
            if waited > 2 and not told:
                told = True
                limit = TIMEOUT_INTERRUPTED if signals else TIMEOUT
                note(f'waiting up to {limit} s for W&B; the record in {self.folder} is complete, and Ctrl-C stops the waiting')


def exit_now(code):
    sys.stdout.flush()
    os._exit(code)


def log_in(run):
    """Makes sure, without asking the server, that there is a W&B key if a run is to be copied online. Raises ConfigError."""
    if run.wandb_mode != 'online' or not distributed.is_main_process():
        return
    agent_environment()  # before W&B reads the environment
    import wandb

    wandb.setup(wandb.Settings(silent=True))
    try:
        wandb.login(verify=False)
    except wandb.Error as error:
        raise config.ConfigError(f'wandb_mode=online: {str(error).rstrip(".")}; or set wandb_mode=offline') from error


@functools.cache
def agent_environment() -> dict:
    """{sweep_id, run_id} that a W&B agent has started this process with, {} without an agent.

    They leave the environment, where W&B would read them for every seed: only the first belongs to the sweep.
    """
    if 'WANDB_SWEEP_ID' not in os.environ:
        return {}
    os.environ.pop('WANDB_SWEEP_PARAM_PATH', None)  # the same values are on the command line
    return {'sweep_id': os.environ.pop('WANDB_SWEEP_ID'), 'run_id': os.environ.pop('WANDB_RUN_ID')}
