"""Kills a preparation with SIGKILL at random moments and starts it again, for the tests and for measure_prepare.py."""
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
    """Kills the script `kills` times at random moments of its work, lets it finish, and returns how often it was started.

    Each kill comes up to `seconds` after the script has begun to work. want: checksums of the files of an uninterrupted run.
    Asserts that every finished file after a kill, and all files at the end, are those. A run that ends before its kill is removed.
    """
    rng, hits, runs = random.Random(seed), 0, 0
    while hits < kills:
        process = subprocess.Popen([sys.executable, HERE / script, *map(str, arguments)], stderr=subprocess.DEVNULL)
        while process.poll() is None and not (out / '.preparing').exists():  # it is still importing
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
