"""Save finished runs, from W&B or from their folders, as one log that figures/ reads: logs/NAME.parquet.

    python save_logs.py --tag mlp --project supercollapse --out logs/mlp.parquet      every evaluation, through scan_history
    python save_logs.py --tag mlp --runs runs --out logs/mlp.parquet                  the same from runs/, without W&B

Only finished runs are kept; the others are named and counted. A value that was not logged stays missing. Saving the same
runs again writes the same file. The format is figures/table.py's.
"""

import argparse
import math
import sys
import time
from collections import defaultdict
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from analysis import table as logs

ORDER = ['tag', 'num_params', 'schedule', 'decay_frac', 'T', 'seed', 'run']  # of the rows, so that saving is repeatable
ATTEMPTS = 6  # at a request, 1 + 2 + 4 + 8 + 16 s apart: rate limits reset within a minute


def from_folders(folder, tags):
    """(table of the finished runs, {state: names of the others}) below `folder`, of the given wandb_tags (none: of all)."""
    table = logs.load(folder)
    if tags:
        logs.require(table, ['tag'], 'choosing runs by tag')
        kept = table[table['tag'].isin(tags)]
        if not len(kept):
            raise logs.LogError(f'{folder}: no run tagged {" or ".join(tags)}; tags there: '
                                f'{", ".join(sorted(table["tag"].dropna().unique()))}')
        table = kept
    others = {state: sorted(rows['run'].unique()) for state, rows in table[table['state'] != 'finished'].groupby('state')}
    return table[table['state'] == 'finished'], others


def from_wandb(project, entity, tags):
    """(table of the finished runs, {state: names of the others}) of a W&B project, of the given tags (none: of all).

    Every logged row is read (scan_history), none is sampled away. Raises LogError if the server cannot be reached.
    """
    import wandb
    path = f'{entity}/{project}' if entity else project
    filters = {'tags': {'$in': list(tags)}} if tags else {}

    def list_runs():
        return list(wandb.Api(timeout=60).runs(path, filters=filters, order='+created_at'))

    runs = patiently(list_runs, f'listing the runs of {path}')
    if not runs:
        raise logs.LogError(f'no run in {path}' + (f' is tagged {" or ".join(tags)}' if tags else '') +
                            '; check --project, --entity and --tag')
    frames, others = [], defaultdict(list)
    for run in tqdm(runs, desc='runs', unit='run'):
        state = dict(run.summary).get('state', run.state) if run.state == 'finished' else run.state  # a diverged run of a sweep
        if state != 'finished':                                                                     # has ended well for W&B
            others[state].append(run.name)
            continue
        rows, config = _history(run), dict(run.config)
        if not any(config.get(key) for key in ('wandb_tag', 'tag')) and run.tags:
            config['tag'] = next((tag for tag in tags if tag in run.tags), run.tags[0])
        if rows:
            frames.append(logs.from_run(run.id, config, rows, dict(run.summary) | {'state': run.state}))
        else:
            others['finished without an evaluation'].append(run.name)
    return (logs.tidy(pd.concat(frames, ignore_index=True)) if frames else None), dict(others)


def one_from_wandb(path):
    """Rows so far of one W&B run, entity/project/id, whatever its state. A new Api each time: an old one hides what came since."""
    import wandb
    run = patiently(lambda: wandb.Api(timeout=60).run(path), f'asking for the run {path}')
    return logs.from_run(run.id, dict(run.config), _history(run), dict(run.summary) | {'state': run.state})


def _history(run):
    rows = patiently(lambda: list(run.scan_history(page_size=1000)), f'reading {run.name}')
    return [{key: _number(value) for key, value in row.items()} for row in rows if row.get('test_loss') is not None]


def _number(value):
    """W&B may send NaN and the infinities as strings; what is not finite is missing."""
    if value in ('NaN', 'Infinity', '-Infinity') or isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def patiently(request, what):
    """The request's answer, tried again with growing pauses when the server does not answer or is too busy."""
    import requests
    import wandb
    for attempt in range(ATTEMPTS):
        try:
            return request()
        except wandb.errors.AuthenticationError as error:
            raise logs.LogError(f'W&B: {error}') from None
        except (wandb.errors.CommError, requests.exceptions.RequestException, TimeoutError, ValueError) as error:
            # A ValueError is W&B's word for a project that does not exist: no use in waiting for it.
            message = str(error).splitlines()[0] if str(error) else type(error).__name__
            if isinstance(error, ValueError) and not isinstance(error, requests.exceptions.RequestException):
                raise logs.LogError(f'W&B, {what}: {message}') from None
            if attempt == ATTEMPTS - 1:
                raise logs.LogError(f'W&B, {what}: {message} (tried {ATTEMPTS} times)') from None
            print(f'note: {what}: {message}; trying again in {2 ** attempt} s', file=sys.stderr)
            time.sleep(2 ** attempt)


def save(table, others, out, **produced_by):
    """Write the log and say on stderr what went into it and what did not. Raises LogError if no finished run is left."""
    for state, names in sorted(others.items()):
        print(f'note: {len(names)} {state} left out: {", ".join(names[:5])}{" …" if len(names) > 5 else ""}', file=sys.stderr)
    if table is None or not len(table):
        raise logs.LogError('no finished run with an evaluation; nothing saved')
    table = table.dropna(axis=1, how='all')
    table = table.sort_values([c for c in ORDER if c in table] + (['step'] if 'step' in table else []), kind='stable')
    table, copies = logs.drop_duplicates(table.reset_index(drop=True))
    if copies:
        print(f'note: {copies} runs are there twice, bit for bit; kept once', file=sys.stderr)
    runs = logs.runs(table)
    count = len(runs)
    origin = {column: sorted(runs[column].dropna().unique()) for column in ('revision', 'device') if column in runs}
    if 'seconds' in runs:
        origin['hours'] = round(runs['seconds'].sum() / 3600, 3)
    logs.write_parquet(table.reset_index(drop=True), out, runs=count, evaluations=len(table), duplicates_dropped=copies,
                       left_out={state: len(names) for state, names in others.items()}, **origin, **produced_by)
    print(f'{out}: {count} runs, {len(table)} evaluations, {Path(out).stat().st_size / 1e6:.2f} MB')


def main():
    parse = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parse.add_argument('--tag', action='append', default=[], help='save the runs with this tag (may be given again)')
    parse.add_argument('--runs', metavar='DIR', help='read run folders below DIR instead of W&B')
    parse.add_argument('--project', help='W&B project')
    parse.add_argument('--entity', help='W&B user or team (default: that of your key)')
    parse.add_argument('--where', metavar='COLUMN=VALUE', action='append', default=[], help='keep only these runs')
    parse.add_argument('--out', metavar='FILE', help='the log to write (default: logs/<first tag>.parquet)')
    args = parse.parse_args()
    try:
        if bool(args.runs) == bool(args.project):
            raise logs.LogError('give either --runs DIR (folders) or --project NAME (W&B)')
        if not (args.tag or args.out):
            raise logs.LogError('give --tag TAG, or --out FILE to save the runs of every tag')
        table, others = (from_folders(args.runs, args.tag) if args.runs
                         else from_wandb(args.project, args.entity, args.tag))
        for condition in args.where if table is not None else ():
            table = logs.where(table, condition)
        source = f'folders {args.runs}' if args.runs else f'W&B {args.entity + "/" if args.entity else ""}{args.project}'
        save(table, others, args.out or f'logs/{args.tag[0]}.parquet', source=source, tags=args.tag, where=args.where)
    except logs.LogError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)


if __name__ == '__main__':
    main()
