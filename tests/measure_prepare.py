"""The preparations at true size: rate and peak memory at 1× and 8×, ten kills, a full disk. Takes some 15 minutes and 60 GB.

    python tests/measure_prepare.py DIR            # everything; or name some of: chess cifar5m kills disk

1× is 200,000 games (engine games, repeated under other ratings) in 8 parquet files, and one part of 1,000,448 images.
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
GAMES = 200_000
DISTINCT = 4_000  # games really played


def measure(script, *arguments) -> tuple[float, float, float]:
    """(wall seconds, CPU seconds, peak memory in MB of the processes together, pages that they share counted once)."""
    started = time.time()
    process = subprocess.Popen([sys.executable, killing.HERE / script, *map(str, arguments)], stderr=subprocess.PIPE)
    peak, cpu = 0, 0.0
    while process.poll() is None:
        peak, cpu = max(peak, memory(process.pid)), max(cpu, seconds(process.pid))
        time.sleep(0.05)
    assert process.returncode == 0, process.stderr.read().decode()
    return time.time() - started, cpu, peak / 1024


def family(pid) -> list[int]:
    children = Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
    return [pid, *(p for child in children for p in family(child))]


def memory(pid) -> int:
    """KiB, by /proc (Linux); 0 for a family that ends meanwhile."""
    try:
        return sum(int(line.split()[1]) for p in family(pid)
                   for line in Path(f'/proc/{p}/smaps_rollup').read_text().splitlines() if line.startswith('Pss:'))
    except (FileNotFoundError, ProcessLookupError):
        return 0


def seconds(pid) -> float:
    try:
        return sum(sum(map(int, Path(f'/proc/{p}/stat').read_text().rsplit(')', 1)[1].split()[11:13])) for p in family(pid)) / 100
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
            pq.write_table(rows, target / f'{i}.parquet', row_group_size=len(rows))  # one row group: the worst for memory
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
        if kind == 'chess':
            runs = [('with position', []), ('without', ['--no-position'])]
            inputs, count = chess_inputs(folder, times), GAMES * times
        else:
            runs, inputs, count = [('', [])], image_inputs(folder, times), PART * times
        for label, flags in runs:
            out = folder / f'out-{kind}-{times}{label[:4]}'
            wall, cpu, peak = measure(f'prepare_{kind}.py', *inputs, '--out', out, *flags)
            print(f'| {times}× {label} | {count:,} | {wall:.1f} | {cpu:.1f} | {count / wall:,.0f} | {peak:.0f} |', flush=True)
            subprocess.run(['rm', '-r', out], check=True)


def kills(folder: Path):
    parts = [folder / 'small' / f'cifar5m_part{i}.npz' for i in range(6)]
    parts[0].parent.mkdir(parents=True, exist_ok=True)
    for i, part in enumerate(parts):
        if not part.exists():
            make_images.write_part(part, 50_000, seed=i)
    for script, inputs in (('prepare_chess.py', chess_inputs(folder, 1)[:4]), ('prepare_cifar5m.py', parts)):
        out, reference = folder / 'out-killed', folder / 'out-reference'
        subprocess.run(['rm', '-rf', out, reference], check=True)  # a whole one would end at once
        started = time.time()
        ran = killing.run(script, *inputs, '--out', reference)
        assert ran.returncode == 0, ran.stderr
        whole = time.time() - started
        runs = killing.kill_at_random(script, [*inputs, '--out', out], out, killing.checksums(reference), kills=10, seconds=whole)
        print(f'{script}: 10 of {runs} runs killed within {whole:.1f} s, all bytes those of one undisturbed run', flush=True)
        subprocess.run(['rm', '-r', out, reference], check=True)


def full_disk(folder: Path):
    """Both scripts on a tmpfs that fills up while they write (needs root): told before it starts, or in the middle."""
    disk = folder / 'disk'
    disk.mkdir(parents=True, exist_ok=True)
    for script, inputs, sizes in (('prepare_chess.py', chess_inputs(folder, 1)[:2], (8, 25)),
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
