"""Saves finished runs, from W&B or from their folders, as one log for the analysis: logs/NAME.parquet.

    python save_logs.py --tag mlp --project supercollapse --out logs/mlp.parquet      from W&B (log in with `wandb login`)
    python save_logs.py --tag mlp --runs runs --out logs/mlp.parquet                  from run folders
    python save_logs.py --files curves.csv --map loss=val_loss --out logs/mine.parquet     from .csv, .parquet or text logs

Runs in another state are left out and named. A value that was not logged is NaN. The same runs give the same file. The columns are
those of analysis/columns.py.
"""

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from analysis import mapping
from analysis import table as logs

ORDER = ('tag', 'num_params', 'schedule', 'decay_frac', 'T', 'seed', 'run', 'step')  # of the rows: the same runs, the same file
ATTEMPTS = 6  # of a request, 1 + 2 + 4 + 8 + 16 s apart; W&B's rate limits last less than a minute


def from_folders(folder, tags):
    """(table of the finished runs, {name: state} of the others) below `folder` with one of the tags (none given: all runs)."""
    table = logs.load(folder)
    if tags:
        kept = table[table['tag'].isin(tags)]
        if not len(kept):
            found = ', '.join(sorted(table['tag'].dropna().unique()))
            raise logs.LogError(f'{folder}: no run tagged {" or ".join(tags)}; tags there: {found}')
        table = kept
    finished = table['state'] == 'finished'
    return table[finished], logs.runs(table[~finished])['state'].to_dict()


def from_wandb(project, entity, tags, how=None):
    """(table of the finished runs, {name: state} of the others) of a W&B project with one of the tags (none given: all runs).

    `how` is the mapping.Map of runs that other code has logged. A run that lacks a key of it is left out, unless all do. Every
    logged row is read; W&B's own `history` would give a sample. Raises LogError, also if the server cannot be reached.
    """
    path = f'{entity}/{project}' if entity else project
    filters = {'tags': {'$in': list(tags)}} if tags else {}
    runs = with_retries(lambda api: list(api.runs(path, filters=filters, order='+created_at')), f'listing the runs of {path}')
    if not runs:
        raise logs.LogError(f'no run in {path}' + (f' is tagged {" or ".join(tags)}' if tags else '') +
                            '; check --project, --entity and --tag')
    tables, others, misfit, names = [], {}, None, Counter(run.name for run in runs)
    for run in tqdm(runs, desc='runs', unit='run'):
        table, reason = None, state_of(run)
        if reason == 'finished':
            try:
                table = table_of(run, tags, how, run.name if names[run.name] == 1 else f'{run.name}-{run.id}')
                reason = 'finished without an evaluation'
            except mapping.MapError as error:
                misfit = reason = error
        if table is None:
            others[run.name] = str(reason)
        else:
            tables.append(table)
    if misfit and not tables:
        raise misfit
    return (logs.tidy(pd.concat(tables)) if tables else pd.DataFrame()), others


def one_from_wandb(path):
    """The table so far of one W&B run, entity/project/id, in any state. Raises LogError if it has no evaluation yet."""
    table = table_of(with_retries(lambda api: api.run(path), f'reading the run {path}'), ())
    if table is None:
        raise logs.LogError(f'{path}: the run has no evaluation yet')
    return logs.tidy(table)


def state_of(run):
    """State of a W&B run. Its summary says where a run diverged: for W&B it is finished, so that an agent does not repeat it."""
    return dict(run.summary).get('state', run.state) if run.state == 'finished' else run.state


def table_of(run, tags, how=None, name=None):
    """The table of one W&B run, or None if it has no evaluation. A run without a tag in its configuration has its tag in W&B."""
    rows = with_retries(lambda api: list(run.scan_history(page_size=1000)), f'reading {run.name}')
    if how:
        table = mapping.apply(how, name, pd.DataFrame(rows), dict(run.config), dict(run.summary))
        return table if len(table) else None
    rows = [row for row in rows if row.get('test_loss') is not None]
    config = dict(run.config)
    if not (config.get('wandb_tag') or config.get('tag')) and run.tags:
        config['tag'] = next((tag for tag in tags if tag in run.tags), run.tags[0])
    return logs.from_run(run.id, config, rows, dict(run.summary) | {'state': state_of(run)}) if rows else None


def with_retries(request, purpose):
    """request(wandb.Api()), repeated with growing pauses while the server does not answer or is too busy. Raises LogError.

    Each request has a new Api, because an old one returns what it has cached.
    """
    import wandb
    for attempt in range(ATTEMPTS):
        try:
            return request(wandb.Api(timeout=60))
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError, ValueError) as error:  # ValueError: no such project
            message = _first_line(error).rstrip('.')
            hint = '' if isinstance(error, ValueError) or 'wandb login' in message else '; log in with `wandb login`'
            raise logs.LogError(f'W&B, {purpose}: {message}{hint}') from None
        except (wandb.errors.CommError, OSError) as error:  # the exceptions of requests are OSErrors
            if attempt == ATTEMPTS - 1:
                raise logs.LogError(f'W&B, {purpose}: {_first_line(error)} (tried {ATTEMPTS} times)') from None
            print(f'note: {purpose}: {_first_line(error)}; trying again in {2 ** attempt} s', file=sys.stderr)
            time.sleep(2 ** attempt)


def _first_line(error):
    return (str(error) or type(error).__name__).splitlines()[0]


def save(table, others, out, **origin):
    """Write the log, and print what is in it and what was left out. Raises LogError if there is no finished run."""
    left_out = Counter(others.values())
    for state, count in sorted(left_out.items()):
        names = sorted(name for name, of_run in others.items() if of_run == state)
        print(f'note: {count} {state} left out: {", ".join(names[:5])}{" …" if count > 5 else ""}', file=sys.stderr)
    if not len(table):
        raise logs.LogError('no finished run with an evaluation; nothing saved')
    table = table.dropna(axis=1, how='all')
    table, copies = logs.drop_duplicates(table.sort_values([c for c in ORDER if c in table], kind='stable'))
    if copies:
        print(f'note: {copies} runs are there twice with the same losses; kept once', file=sys.stderr)
    runs = logs.runs(table)
    origin |= {column: sorted(runs[column].dropna().unique()) for column in ('revision', 'device') if column in runs}
    if 'seconds' in runs:
        origin['hours'] = round(runs['seconds'].sum() / 3600, 3)
    logs.write_parquet(table, out, runs=len(runs), evaluations=len(table), duplicates_dropped=copies, left_out=left_out, **origin)
    print(f'{out}: {len(runs)} runs, {len(table)} evaluations, {Path(out).stat().st_size / 1e6:.2f} MB')


def main():
    parse = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parse.add_argument('--tag', action='append', default=[], help='save the runs with this tag (may be given again)')
    parse.add_argument('--runs', metavar='DIR', help='read run folders below DIR instead of W&B')
    parse.add_argument('--files', metavar='FILE', nargs='+', help='read loss curves from .csv, .parquet or .txt files instead')
    parse.add_argument('--map', metavar='COLUMN=KEY', action='append', default=[],
                       help='where to find a column, or a .yaml of such lines, or a preset: ' + ', '.join(sorted(mapping.PRESETS)))
    parse.add_argument('--smooth', metavar='WINDOW', type=float,
                       help='use the training loss, averaged over this many tokens, or below 1 this share of the run')
    parse.add_argument('--project', help='W&B project')
    parse.add_argument('--entity', help='W&B user or team (default: that of your login)')
    parse.add_argument('--where', metavar='COLUMN=VALUE', action='append', default=[], help='keep only these runs')
    parse.add_argument('--out', metavar='FILE', help='the log to write (default: logs/<first tag>.parquet)')
    args = parse.parse_args()
    try:
        if (args.runs, args.project, args.files).count(None) != 2 or args.runs and (args.map or args.smooth):
            raise logs.LogError('give either --runs DIR (folders), or --project NAME (W&B) or --files FILE …, which may have --map')
        if not (args.tag or args.out):
            raise logs.LogError('give --tag TAG, or --out FILE to save the runs of every tag')
        how = mapping.parse(args.map, args.smooth)
        if args.files:
            table, others = logs.tidy(pd.concat([mapping.read_curves(Path(file), how) for file in args.files])), {}
        else:
            table, others = (from_folders(args.runs, args.tag) if args.runs
                             else from_wandb(args.project, args.entity, args.tag, how if args.map else None))
        for condition in args.where if len(table) else ():
            table = logs.where(table, condition)
        source = (f'folders {args.runs}' if args.runs else f'files {", ".join(args.files)}' if args.files
                  else f'W&B {args.entity + "/" if args.entity else ""}{args.project}')
        mapped = {'map': how.expressions, 'smooth': how.window} if args.map or args.smooth else {}
        save(table, others, args.out or f'logs/{args.tag[0]}.parquet', source=source, tags=args.tag, where=args.where, **mapped)
    except logs.LogError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)


if __name__ == '__main__':
    main()
