"""The commands that go beyond the paper: forecast, watch and schedule-laws. Each takes its command-line arguments as a list."""

import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd

from analysis import schedules
from analysis import table as logs
from analysis.beyond import forecast as forecasting
from analysis.beyond import monitor, schedule_curves
from analysis.beyond import schedule_laws as laws
from analysis.table import LogError
from figures import commands, tables

SHOWN_X = (0.1, 0.3, 0.5, 1)  # at which a forecast is printed
# The published fit's objective over its minimum: 2 and 13 on the curves it was made for, 61 on squared errors of about 0.02.
MAX_OBJECTIVE_RATIO = 30


def forecast(argv):
    """Print a larger model's loss curve, forecast from a log of smaller ones, and draw it."""
    parse = commands.parser(forecasting.__doc__.splitlines()[0], 'forecast')
    parse.add_argument('--target', required=True, metavar='p=…|D=…|each',
                       help='the model to forecast, by parameters or width; each: every model of the log, from all smaller ones')
    parse.add_argument('--horizon', type=float, metavar='TOKENS', help='tokens of the target (default: from those of the ladder)')
    parse.add_argument('--seen', type=float, default=0.0, metavar='X', help='also use the target\'s own curve up to x = X')
    parse.add_argument('--rate', type=float, metavar='FLOP/S', help='speed of your machine in training, to print hours')
    parse.add_argument('--schedule', choices=schedules.RATES, help='schedule of the target, if the ladder has a constant rate')
    parse.add_argument('--pairs', metavar='LOG', help='small models at constant and decaying rates, to fit the α of --schedule')
    args = parse.parse_args(argv)
    if bool(args.schedule) != bool(args.pairs):
        raise LogError('--schedule and --pairs go together: α is fitted to runs at both kinds of rate')
    if not 0 <= args.seen < 1:
        raise LogError(f'--seen {args.seen:g} must be at least 0 and below 1')
    each = args.target == 'each'
    if each:
        given = [name for name in ('max_width', 'horizon', 'rate', 'schedule', 'out') if getattr(args, name) is not None]
        if given:
            raise LogError(f'--target each forecasts every model from the smaller ones; leave out --{given[0].replace("_", "-")}')
    max_width, args.max_width = args.max_width, None  # it limits the ladder and not the log, as the target is wider
    table, notes, copies = commands.read(args)
    if each:
        models = table['num_params'].nunique()
        if models < 4:
            raise LogError(f'--target each needs four models, three to forecast from and one to forecast; the log has {models}')
        rows = forecasting.leave_out(table, (args.seen,), min_models=3 if models < 6 else 5)
        return commands.finish(args, {'splits': rows}, _split_lines(rows), notes)
    result, more = forecasting.analyse(table, args.target, max_width, args.seen, args.horizon, args.rate, args.schedule,
                                       logs.clean(logs.load(args.pairs))[0] if args.pairs else None)
    commands.finish(args, result | {'duplicates_dropped': copies}, _forecast_lines(result), notes + more,
                    'beyond_panels.forecast', table, result)


def _forecast_lines(result):
    """A forecast as text."""
    bands = ['mean', 'lo50', 'hi50', 'lo90', 'hi90']
    at = [np.abs(result['x'] - x).argmin() for x in SHOWN_X]
    curve = pd.DataFrame({name: result[name][at] for name in ['x', *bands]}).rename(columns={'mean': 'median'})
    final = pd.DataFrame(result['budgets'])[['times', *bands, 'p']].rename(columns={'mean': 'median'})
    hours = f', {result["hours"]:.3g} hours' if result['hours'] else ''
    out = [f'forecast from {len(result["ladder"])} models up to p = {result["ladder"][-1]:.6g}, for {result["times_compute"]:.3g} '
           f'times the compute of the largest{hours}; the bands are for the mean of {result["seeds"]} run(s)',
           commands.text(tables.summary(result)), 'loss at x = C/C*, its median and its 50% and 90% intervals:',
           commands.text(curve, '.5f', x='.2f'),
           'final loss of a compute-optimal model at multiples of the ladder\'s largest compute:',
           commands.text(final, '.5f', p='.6g')]
    if check := result['calibration']:
        out.append(f'check on the ladder itself: of {check["splits"]} models, each forecast from the smaller ones, the 90% bands '
                   f'held {check["covered90"]:.0%} of the curves; mean error of the final loss {check["final"]:.2%} of L - L0')
    if error := result['error']:
        table = pd.DataFrame([{'': name, **row} for name, row in {'forecast': error, **error['baselines']}.items()])
        out += [f'error relative to L - L0 for x >= {forecasting.ERRORS_FROM_X} (L0 = {error["L0"]:.4g}, from the whole log):',
                commands.text(table[['', 'reducible_median', 'reducible_worst', 'final']], '.2%'),
                f'the 90% band holds {error["covered90"]:.0%} of the curve']
    return out


def _split_lines(rows):
    """The errors of every split as text, and their means."""
    errors = ['reducible_median', 'reducible_worst', 'final', 'baseline_final', 'covered90']
    table = pd.DataFrame(rows)[['models', 'p', 'times_compute', *errors]]
    means = table[errors].mean().to_frame().T
    return [commands.text(table, '.2%', p='.6g', times_compute='.3g'), 'mean', commands.text(means, '.2%')]


def watch(argv):
    """Print the residual, alarm and forecast of a run that may still be training, once or again and again."""
    parse = commands.parser(monitor.__doc__.splitlines()[0], 'watch')
    parse.add_argument('--against', required=True, metavar='LADDER', help='the log of the ladder this run belongs to')
    parse.add_argument('--horizon', type=float, metavar='TOKENS', help='where the run will end, if its configuration does not say')
    parse.add_argument('--every', type=float, metavar='SECONDS', help='repeat after so many seconds until the run has ended')
    args = parse.parse_args(argv)
    source, args.log = args.log, args.against  # --where and the widths choose the ladder
    ladder, notes, _ = commands.read(args)
    level = monitor.alarm_level(ladder)
    while True:
        table = _load_run(source)
        result = monitor.analyse(table, ladder, args.horizon, level)
        commands.finish(args, {k: v for k, v in result.items() if k != 'expected'}, _watch_lines(result), notes,
                        'beyond_panels.watch' if len(result['x']) else None, result)
        state = table['state'].iloc[-1] if 'state' in table else None
        if not args.every or result['now'] >= 0.999 or state not in (None, 'unfinished', 'running'):
            break
        sys.stdout.flush()
        time.sleep(args.every)
        notes = []


def _load_run(source):
    """The rows of one run so far: a run folder, a log file, or a W&B run entity/project/id."""
    if Path(source).exists():
        table = logs.load(source)
    elif len(source.split('/')) == 3:
        import save_logs
        table = logs.tidy(save_logs.one_from_wandb(source))
    else:
        raise LogError(f'{source}: neither a file or folder nor a W&B run (entity/project/id)')
    names = table['run'].unique()
    if len(names) > 1:
        raise LogError(f'{source} holds {len(names)} runs ({", ".join(map(str, names[:3]))} …); name the folder of one of them')
    return table


def _watch_lines(result):
    """The state of a run as text: some residuals, the verdict, the forecast of its end."""
    if not len(result['x']):
        return [f'x = {result["now"]:.3f}: nothing to compare yet; the ladder begins at x = {result["expected"].x[0]:g}']
    at = np.unique(np.linspace(0, len(result['x']) - 1, 8).astype(int))
    table = pd.DataFrame({name: result[name][at] for name in ('x', 'residual', 'lo90', 'hi90', 'p_value')})
    out = [commands.text(table, '+.2%', x='.2f', p_value='.1e')]
    off = np.isfinite(result['alarm'])
    out.append(f'ALARM: off its ladder from x = {result["alarm"]:.3g} (p-value below {result["level"]:.2g})' if off else 'on track')
    out.append(f'x = {result["now"]:.3f}: loss {result["loss"]:.5g}, forecast of the final loss {result["forecast"]:.5g} '
               f'[{result["forecast_lo90"]:.5g}, {result["forecast_hi90"]:.5g}] (90%)')
    return out


def schedule_laws(argv):
    """Print the errors of two schedule laws on the curves that they were not fitted to, and draw them."""
    parse = commands.parser(laws.__doc__.splitlines()[0], 'schedule-laws')
    parse.add_argument('--fit', nargs='+', metavar='CURVE',
                       help='the curves to fit, two or three; the others are predicted (default for a log: const and linear)')
    parse.add_argument('--warmup', type=float, metavar='STEPS', help='steps of linear warm-up before the curves of a .csv begin')
    parse.add_argument('--without', type=float, metavar='STEP', help='an evaluation of a .csv to leave out (as published: 24000)')
    parse.add_argument('--transfer', action='store_true',
                       help='also predict the larger models of the log from the smallest one and their constant-rate runs')
    args = parse.parse_args(argv)
    if not args.transfer and (args.log.endswith('.csv') or any(Path(args.log).glob('*.csv'))):
        curves, notes = schedule_curves.read_csv(args.log, args.warmup, args.without), []
    else:
        table, notes, _ = commands.read(args)
        curves, more = schedule_curves.from_table(table, table['num_params'].min() if args.transfer else None)
        notes = notes + more
    fitted = args.fit or laws.default_fit(curves)
    fits, rows, means = laws.compare(curves, fitted)
    if fits[1].objective > MAX_OBJECTIVE_RATIO * fits[2].objective:
        notes.append(f'the fit of the {fits[1].law.name} has stopped far from its minimum: its step sizes are made for losses of a '
                     'few nats')
    values = {one.law.name: dict(zip(one.law.names, one.values, strict=True)) | {'objective': one.objective} for one in fits}
    result = {'fitted': fitted, 'unseen': rows, 'mean': means.to_dict('index'), 'laws': values}
    by_law = pd.DataFrame.from_dict(values, orient='index').rename_axis('law').reset_index()
    errors = pd.concat([pd.DataFrame(rows).sort_values('curve', kind='stable'), means.reset_index().assign(curve='MEAN')])
    lines = [commands.text(by_law), f'fitted on {", ".join(fitted)}; errors on the unseen curves, in units of the loss:',
             commands.text(errors, '.5f')]
    if args.transfer:
        by_size = {p: schedule_curves.from_table(table, p)[0] for p in table['num_params'].unique()}
        result['sizes'], result['transfer_L0'] = laws.compare_sizes(by_size, fitted)
        means = pd.DataFrame(result['sizes']).pivot_table(index='law', columns='num_params', values='mae', sort=False)
        lines += [f'mean absolute errors by parameters; transferred from the smallest model with L0 = {result["transfer_L0"]:.4g}:',
                  commands.text(means.rename(columns='{:.4g}'.format).reset_index(), '.5f')]
    commands.finish(args, result, lines, notes, 'beyond_panels.schedule_laws', curves, fits[:2], fitted)
