"""Run a preparation, kill it with SIGKILL at random moments, start it again: for the tests and for measure_prepare.py."""

import hashlib
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent.parent


def run(script, *arguments, **options):
    command = [sys.executable, HERE / script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, **options)


def checksums(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir()) if path.is_file()}


def kill_at_random(script, arguments, out: Path, want: dict[str, str], kills: int, seconds: float, seed: int = 0) -> int:
    """Start the script and kill it up to `seconds` after it begins work, until `kills` have hit it at work; then let it finish.

    Asserts that whatever stands under its final name after a kill, and all of it in the end, is what `want` (checksums of an
    uninterrupted run) says. A run that finishes first is wiped, so that the next begins afresh. Returns the runs it took.
    """
    rng, hits, runs = random.Random(seed), 0, 0
    while hits < kills:
        process = subprocess.Popen([sys.executable, HERE / script, *map(str, arguments)], stderr=subprocess.DEVNULL)
        while process.poll() is None and not (out / '.preparing').exists():  # the first kill meets it at work, not importing
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 1) * seconds)
        killed, runs = process.poll() is None, runs + 1
        hits += killed
        process.kill()
        process.wait()
        found = {name: sha for name, sha in (checksums(out) if out.exists() else {}).items() if not name.endswith('.part')}
        assert found == (want if not killed else {name: want[name] for name in found})
        if not killed:
            shutil.rmtree(out)
    ran = run(script, *arguments)
    assert ran.returncode == 0, ran.stderr
    assert checksums(out) == want
    return runs
