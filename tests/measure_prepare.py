"""Measures the preparations: rate and peak memory at two sizes, ten kills, a full disk. Takes about 20 minutes and 20 GB.

    python tests/measure_prepare.py DIR            # everything; or some of: chess cifar5m kills disk

1× is 50,000 games (engine games, repeated with other ratings) in 8 parquet files, and one CIFAR-5M part of 1,000,448 images.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import killing
import make_games
import make_images
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

PART = 1_000_448  # images of a part of CIFAR-5M
GAMES = 50_000
DISTINCT = 4_000  # games that are played; the others repeat them


def measure(script, *arguments) -> tuple[float, float, float]:
    """(wall seconds, CPU seconds, peak memory in MB) of a script with all its processes. Shared memory pages count once."""
    started = time.time()
    process = subprocess.Popen([sys.executable, killing.HERE / script, *map(str, arguments)], stderr=subprocess.PIPE)
    peak, cpu = 0, 0.0
    while process.poll() is None:
        peak, cpu = max(peak, memory(process.pid)), max(cpu, cpu_seconds(process.pid))
        time.sleep(0.05)
    assert process.returncode == 0, process.stderr.read().decode()
    return time.time() - started, cpu, peak / 1024


def process_tree(pid) -> list[int]:
    """A process and its descendants (Linux)."""
    children = Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
    return [pid, *(p for child in children for p in process_tree(child))]


def memory(pid) -> int:
    """Memory of a process tree in KiB, 0 if one of its processes has just ended (Linux)."""
    try:
        return sum(int(line.split()[1]) for p in process_tree(pid)
                   for line in Path(f'/proc/{p}/smaps_rollup').read_text().splitlines() if line.startswith('Pss:'))
    except (FileNotFoundError, ProcessLookupError):
        return 0


def cpu_seconds(pid) -> float:
    """CPU seconds of a process tree, 0 if one of its processes has just ended (Linux)."""
    try:
        times = [Path(f'/proc/{p}/stat').read_text().rsplit(')', 1)[1].split()[11:13] for p in process_tree(pid)]
        return sum(int(user) + int(system) for user, system in times) / 100
    except (FileNotFoundError, ProcessLookupError):
        return 0.0


def chess_inputs(folder: Path, times: int) -> list[Path]:
    target = folder / f'games{times}x'
    if not target.exists():
        played = folder / 'played'
        if not (played / 'all.parquet').exists():
            played.mkdir(parents=True, exist_ok=True)
            make_games.write_parquet(make_games.games(DISTINCT), played / 'all.parquet')
        table, rng = pq.read_table(played / 'all.parquet'), np.random.default_rng(0)
        target.mkdir()
        for i in range(8):
            rows = table.take(rng.integers(len(table), size=GAMES * times // 8))
            for c in ('WhiteElo', 'BlackElo'):
                ratings = pa.array(rng.integers(600, 2900, size=len(rows)).astype(np.int16))
                rows = rows.set_column(rows.schema.get_field_index(c), c, ratings)
            pq.write_table(rows, target / f'{i}.parquet', row_group_size=len(rows))  # one row group needs most memory
    return sorted(target.iterdir())


def image_inputs(folder: Path, times: int) -> list[Path]:
    first = folder / 'images' / 'cifar5m_part0.npz'
    if not first.exists():
        first.parent.mkdir(parents=True, exist_ok=True)
        make_images.write_part(first, PART, seed=0)
    for i in range(1, times):
        link = first.with_name(f'cifar5m_part{i}.npz')
        if not link.exists():
            link.hardlink_to(first)
    return sorted(first.parent.iterdir())[:times]


def rates(folder: Path, kind: str):
    print(f'\n| {kind} | count | wall s | CPU s | a second | peak MB |\n|---|---|---|---|---|---|', flush=True)
    for times in (1, 8):
        inputs = (chess_inputs if kind == 'chess' else image_inputs)(folder, times)
        count = (GAMES if kind == 'chess' else PART) * times
        out = folder / f'out-{kind}-{times}'
        wall, cpu, peak = measure(f'prepare_{kind}.py', *inputs, '--out', out)
        print(f'| {times}× | {count:,} | {wall:.1f} | {cpu:.1f} | {count / wall:,.0f} | {peak:.0f} |', flush=True)
        subprocess.run(['rm', '-r', out], check=True)


def kills(folder: Path):
    parts = [folder / 'small' / f'cifar5m_part{i}.npz' for i in range(6)]
    parts[0].parent.mkdir(parents=True, exist_ok=True)
    for i, part in enumerate(parts):
        if not part.exists():
            make_images.write_part(part, 50_000, seed=i)
    for script, inputs in (('prepare_chess.py', chess_inputs(folder, 1)[:4]), ('prepare_cifar5m.py', parts)):
        out, reference = folder / 'out-killed', folder / 'out-reference'
        subprocess.run(['rm', '-rf', out, reference], check=True)
        started = time.time()
        ran = killing.run(script, *inputs, '--out', reference)
        assert ran.returncode == 0, ran.stderr
        whole = time.time() - started
        runs = killing.kill_at_random(script, [*inputs, '--out', out], out, killing.checksums(reference), kills=10, seconds=whole)
        print(f'{script}: 10 of {runs} runs killed within {whole:.1f} s; all bytes equal those of an uninterrupted run', flush=True)
        subprocess.run(['rm', '-r', out, reference], check=True)


def full_disk(folder: Path):
    """Run both scripts on a small tmpfs (needs root), which is full in the middle of the work or before the result is begun."""
    disk = folder / 'disk'
    disk.mkdir(parents=True, exist_ok=True)
    for script, inputs, sizes in (('prepare_chess.py', chess_inputs(folder, 1)[:2], (3, 8)),
                                  ('prepare_cifar5m.py', image_inputs(folder, 1), (500,))):
        for size in sizes:
            subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}m', 'tmpfs', disk], check=True)
            try:
                ran = killing.run(script, *inputs, '--out', disk / 'out')
                assert ran.returncode == 1 and not list(disk.glob('out/*.bin')), ran.stderr
                print(f'{size} MB: {ran.stderr.splitlines()[-1]}', flush=True)
            finally:
                subprocess.run(['umount', disk], check=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('dir', type=Path)
    parser.add_argument('what', nargs='*', default=['chess', 'cifar5m', 'kills', 'disk'])
    args = parser.parse_args()
    for what in args.what:
        if what in ('chess', 'cifar5m'):
            rates(args.dir, what)
        else:
            {'kills': kills, 'disk': full_disk}[what](args.dir)


if __name__ == '__main__':
    main()
