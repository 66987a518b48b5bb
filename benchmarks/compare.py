"""Benchmarks a revision and the working tree, one after the other, and prints their step times side by side:
python -m benchmarks.compare REV [--only TEXT]."""
import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path


def rows_of(folder, only, out):
    """{work: row} of the benchmark as the source in this folder has it."""
    subprocess.run([sys.executable, '-m', 'benchmarks.run', '--json', out, *(['--only', only] if only else [])],
                   cwd=folder, check=True, stdout=subprocess.DEVNULL)
    rows = json.loads(Path(out).read_text())['rows']
    return {f"{r['config']} D={r['D']} L={r['L']} B={r['B']} ×{r['seeds']}": r for r in rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('revision')
    parser.add_argument('--only', default='')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as old:
        archive = Path(old) / 'source.tar'
        subprocess.run(['git', 'archive', '--output', archive, args.revision], check=True)
        with tarfile.open(archive) as tar:
            tar.extractall(old, filter='data')
        before = rows_of(old, args.only, f'{old}/before.json')
        after = rows_of('.', args.only, f'{old}/after.json')
    print(f"{'work':<26}{args.revision:>14}{'here':>10}  share{'':>12}")
    for work in [work for work in before if work in after]:
        b, a = before[work], after[work]
        print(f"{work:<26}{1e3 * b['step_seconds']:>11.2f} ms{1e3 * a['step_seconds']:>7.2f} ms  "
              f"{b['step_share']:.1%} → {a['step_share']:.1%}")


if __name__ == '__main__':
    main()
