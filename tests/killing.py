"""Run a preparation, kill it with SIGKILL at random moments, start it again: for the tests and for measure_prepare.py."""

import hashlib
import random
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


def kill_at_random(script, arguments, out: Path, kills: int, seconds: float, seed: int = 0) -> int:
    """Start the script and kill it, `kills` times, after up to `seconds`; then let it finish. Returns the kills that hit a run.

    Between kills no .bin may stand under its final name unless it is whole, which the caller sees by comparing checksums:
    a run that had finished is wiped, so that the next starts afresh.
    """
    rng, hits = random.Random(seed), 0
    for _ in range(kills):
        process = subprocess.Popen([sys.executable, HERE / script, *map(str, arguments)], stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.05, 1) * seconds)
        hits += process.poll() is None
        process.kill()
        process.wait()
    ran = run(script, *arguments)
    assert ran.returncode == 0, ran.stderr
    return hits
