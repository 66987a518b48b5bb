"""Stop signals, one-line errors, warnings, the progress bar and the compilation cache."""
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import jax
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)  # Slurm sends SIGUSR2 some minutes before a job's time is up
REPEAT_SECONDS = 1.0  # one Ctrl-C reaches a process twice if `wandb agent --forward-signals` passes it on as well


class Interrupted(Exception):
    """A signal stopped the run after its state was saved. args: (signal number,)."""


@contextmanager
def stop_signals():
    """Yields a list of the stop signals received, for the training loop to read between two dispatches.

    A second signal, at least REPEAT_SECONDS after the first, ends the process at once. A thread does this, because Python
    runs signal handlers only after the call in progress (to a device, to a server) has returned.
    """
    received = []
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    threading.Thread(target=_exit_on_second_signal, args=(read_end,), daemon=True).start()
    handlers = {number: signal.signal(number, lambda number, _: received.append(number)) for number in STOP_SIGNALS}
    previous_fd = signal.set_wakeup_fd(write_end)
    try:
        yield received
    finally:
        signal.set_wakeup_fd(previous_fd)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(write_end)  # ends the thread


def _exit_on_second_signal(read_end):
    first = None
    while byte := os.read(read_end, 1):
        if byte[0] not in STOP_SIGNALS:
            continue
        if first is None:
            first = time.monotonic()
            note('stopping: the state is saved first; a second signal ends the program at once')
        elif time.monotonic() - first > REPEAT_SECONDS:
            os._exit(128 + byte[0])
    os.close(read_end)


def note(text):
    """Writes one line to stderr without breaking a progress bar."""
    tqdm.write(text, file=sys.stderr)


def warn(text):
    note(f'warning: {text}')


def brief(error):
    """The message of an error, on one line of at most 120 characters."""
    return ' '.join(str(error).split())[:120] or type(error).__name__


@contextmanager
def one_line_errors():
    """Ends the program with one line for errors that the user can correct, and with exit code 128 + n after signal n."""
    try:
        yield
    except Interrupted as stop:
        print('interrupted; the state is saved, and the same command resumes', file=sys.stderr)
        sys.exit(128 + stop.args[0])
    except KeyboardInterrupt:  # before or after the training loop
        sys.exit(128 + signal.SIGINT)
    except (ValueError, OSError, HydraException, OmegaConfBaseException) as error:
        text = ' '.join(str(error).split())
        hint = "; install Hydra's launcher for Slurm and local jobs:  pip install -e '.[slurm]'" if 'submitit' in text else ''
        sys.exit(f'error: {text}{hint}')


class ProgressBar:
    """A bar of training steps with the newest metrics, for train.train's on_steps. It appears with the first call."""

    def __init__(self, steps, description, visible=True):
        self.settings = dict(total=steps, unit='step', desc=description, smoothing=0.05, disable=not visible)
        self.bar, self.metrics = None, {}

    def close(self):
        if self.bar is not None:
            self.bar.close()

    def on_steps(self, steps, metrics):
        if self.bar is None:  # the first call brings the steps of earlier sessions, which are no part of this one's rate
            self.bar = tqdm(initial=steps, **self.settings)
            return
        self.metrics |= metrics
        self.bar.set_postfix({k: f'{v:.4f}' for k, v in self.metrics.items()}, refresh=False)
        self.bar.update(steps)


def enable_compilation_cache():
    """Keeps compiled programs in ~/.cache/supercollapse (or below $XDG_CACHE_HOME), so that a second start compiles nothing."""
    cache = Path(os.environ.get('XDG_CACHE_HOME', Path.home() / '.cache')) / 'supercollapse' / 'xla'
    jax.config.update('jax_compilation_cache_dir', str(cache))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
    jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
