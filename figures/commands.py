"""What the figure commands share: reading a log, one-line errors, JSON on stdout, a figure on request."""

import argparse
import json
import math
import sys

import numpy as np

from analysis import table as logs


def parser(doc, name, figure=True):
    """An argument parser with what every command takes: LOG, --where, widths, --json and, if it draws, --out."""
    parse = argparse.ArgumentParser(prog=f'python -m figures {name}', description=doc)
    parse.add_argument('log', metavar='LOG', help='a .parquet log, a folder of runs, an authors\' .pkl, or a .csv')
    parse.add_argument('--where', metavar='COLUMN=VALUE', action='append', default=[],
                       help='keep only these runs, e.g. --where schedule=linear (may be given again)')
    parse.add_argument('--min-width', type=float, metavar='D', help='leave narrower models out')
    parse.add_argument('--max-width', type=float, metavar='D', help='leave wider models out')
    parse.add_argument('--json', action='store_true', help='the result as JSON on stdout, and nothing else there')
    if figure:
        parse.add_argument('--out', metavar='FIG', help='write the figure (.png or .pdf)')
    return parse


def read(args, keep_duplicates=False):
    """(clean table, notes, duplicates dropped) of the log and the filters given on the command line."""
    table = logs.load(args.log)
    for condition in args.where:
        table = logs.where(table, condition)
    table = logs.between_widths(table, args.min_width, args.max_width)
    return logs.clean(table, keep_duplicates)


def plain(value):
    """Plain JSON values: arrays become lists, named tuples dicts, NaN and infinities null."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if hasattr(value, '_asdict'):
        return plain(value._asdict())
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def save(draw, path):
    """Draw on a new figure and write it. Matplotlib is only imported here: the numbers do not wait for it."""
    import matplotlib
    matplotlib.use('Agg')
    from figures import style
    with style.theme():
        style.save(draw(), path)
    print(f'figure: {path}', file=sys.stderr)


def report(args, result, lines, notes):
    """The result on stdout, as JSON or as lines for people; notes go to stderr either way."""
    for note in notes:
        print(f'note: {note}', file=sys.stderr)
    if args.json:
        print(json.dumps(plain(result | {'notes': notes}), allow_nan=False))
    else:
        print('\n'.join(lines))


def bracket(ci):
    """' [low, high]' for people, or nothing if there is no interval."""
    return f'  [{ci[0]:.4g}, {ci[1]:.4g}]' if ci else ''
