"""Stop signals as the operating system sends them: the first one is recorded, a second one ends a program that hangs."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainer import process

# A program that hangs in C code, as one that waits for a device does. Python's own signal handlers do not run there.
HANGING = '''
import ctypes
from trainer import process
with process.stop_signals():
    print('ready', flush=True)
    mutex = ctypes.create_string_buffer(64)  # a pthread_mutex_t, which is unlocked as zeros
    lock = ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex), lock(mutex)  # a deadlock
'''


@pytest.fixture
def hanging():
    """A process that hangs inside stop_signals(), started and ready."""
    root = Path(process.__file__).parent.parent
    with subprocess.Popen([sys.executable, '-c', HANGING], cwd=root, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == 'ready\n'
        yield child
        child.kill()


def test_second_signal_ends_a_program_that_hangs(hanging):
    hanging.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):  # the first one does not
        hanging.wait(process.REPEAT_SECONDS + 0.5)
    hanging.send_signal(signal.SIGINT)
    assert hanging.wait(5) == 128 + signal.SIGINT
    assert hanging.stderr.read().splitlines() == ['stopping: the state is saved first; a second signal ends the program at once']


def test_one_signal_that_arrives_twice_does_not_end_the_program(hanging):
    """A terminal and `wandb agent --forward-signals` both pass on one Ctrl-C."""
    hanging.send_signal(signal.SIGINT)
    time.sleep(0.2)
    hanging.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        hanging.wait(process.REPEAT_SECONDS + 0.5)
    hanging.send_signal(signal.SIGTERM)  # the control
    assert hanging.wait(5) == 128 + signal.SIGTERM


def test_signals_are_recorded_and_handlers_restored():
    before = {number: signal.getsignal(number) for number in process.STOP_SIGNALS}
    with process.stop_signals() as stops:
        assert stops == []
        os.kill(os.getpid(), signal.SIGUSR2)
        assert stops == [signal.SIGUSR2]
    assert {number: signal.getsignal(number) for number in process.STOP_SIGNALS} == before
