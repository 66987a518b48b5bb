"""Prints the step times of a revision beside those of the working tree:  python -m benchmarks.compare REV [--only TEXT]

The two are benchmarked one after the other, by benchmarks.run as each of them has it.
"""
import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path


def benchmark(source, only, out):
    """{work: row} of the source in this folder. The rows are also written to the file `out`."""
    subprocess.run([sys.executable, '-m', 'benchmarks.run', '--json', out, *(['--only', only] if only else [])],
                   cwd=source, check=True, stdout=subprocess.DEVNULL)
    rows = json.loads(Path(out).read_text())['rows']
    return {f"{r['config']} D={r['D']} L={r['L']} B={r['B']} ×{r['seeds']}": r for r in rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0].split(':  ')[0])
    parser.add_argument('revision')
    parser.add_argument('--only', default='', help='rows whose description matches this pattern')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as source:
        archive = Path(source) / 'source.tar'
        subprocess.run(['git', 'archive', '--output', archive, args.revision], check=True)
        with tarfile.open(archive) as tar:
            tar.extractall(source, filter='data')
        before = benchmark(source, args.only, f'{source}/before.json')
        after = benchmark('.', args.only, f'{source}/after.json')
    print(f"{'work':<26}{args.revision:>14}{'here':>10}  share{'':>12}")
    for work in [work for work in before if work in after]:
        b, a = before[work], after[work]
        print(f"{work:<26}{1e3 * b['step_seconds']:>11.2f} ms{1e3 * a['step_seconds']:>7.2f} ms  "
              f"{b['step_share']:.1%} → {a['step_share']:.1%}")


if __name__ == '__main__':
    main()
