"""What the commands share: options, reading a log, saving a figure, printing text and JSON."""

import argparse
import json
import sys
from importlib import import_module

import pandas as pd

from analysis import table as logs
from analysis.collapse import without_reruns
from analysis.columns import LogError, hint

SEEDS_BY = {'choices': ('seed', 'run'), 'default': 'seed',
            'help': 'what is a seed of a model: each value of the column seed (default), or each run, reruns included'}


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the options, with the option that is like a misspelt one."""

    def error(self, message):
        words = [word.split('=')[0] for word in message.split() if word.startswith('--') and 'unrecognized' in message]
        raise LogError(message + ''.join(hint(word, self._option_string_actions) for word in words[:1]))


def parser(description, name, out='write the figure (.png or .pdf)'):
    """The argument parser of one command, with LOG, --where, the widths, --json and, unless `out` is None, --out with this help."""
    parse = Parser(prog=f'python -m figures {name}', description=description, allow_abbrev=False)
    parse.add_argument('log', metavar='LOG', help='a .parquet log, a folder of runs, an authors\' .pkl, or a .csv')
    parse.add_argument('--where', metavar='COLUMN=VALUE', action='append', default=[],
                       help='keep only these runs, e.g. --where schedule=linear (can be repeated)')
    parse.add_argument('--min-width', type=float, metavar='D', help='leave out narrower models')
    parse.add_argument('--max-width', type=float, metavar='D', help='leave out wider models')
    parse.add_argument('--json', action='store_true', help='print the result as JSON on stdout, and nothing else there')
    if out:
        parse.add_argument('--out', metavar='FILE', help=out)
    return parse


def read(args):
    """(clean table, notes, number of duplicate runs dropped) of the log, after the filters and SEEDS_BY of the command line."""
    table = logs.load(args.log)
    for condition in args.where:
        table = logs.where(table, condition)
    table = logs.between_widths(table, args.min_width, args.max_width)
    table, notes, copies = logs.clean(table)
    if vars(args).get('seeds_by') == 'seed':
        table, more = without_reruns(table)
        notes = notes + more
    return table, notes, copies


def finish(args, result, lines, notes, panel=None, *drawn):
    """Write the figure of --out and print the result on stdout.

    The figure is drawn by the function `panel`, e.g. 'panels.collapse', from `drawn`; Matplotlib is imported for that only, so that
    commands start fast. The result is printed as `lines`, or with --json as JSON in which NaN and infinities are null. Notes always
    go to stderr.
    """
    if panel and args.out:
        import matplotlib
        matplotlib.use('Agg')
        from figures import style
        style.use_theme()
        module, function = panel.split('.')
        style.save(getattr(import_module(f'figures.{module}'), function)(*drawn), args.out)
        print(f'figure: {args.out}', file=sys.stderr)
    for note in notes:
        print(f'note: {note}', file=sys.stderr)
    if args.json:
        text = json.dumps(result | {'notes': notes}, default=lambda array: array.tolist())
        lines = [json.dumps(json.loads(text, parse_constant=lambda _: None))]
    print('\n'.join(lines))


def text(rows, number='.4g', **formats):
    """A data frame, or what makes one, as text: each column of numbers by its own format, or by `number`."""
    return pd.DataFrame(rows).to_string(index=False, na_rep='–', float_format=f'{{:{number}}}'.format,
                                        formatters={name: f'{{:{form}}}'.format for name, form in formats.items()})
