"""The commands beyond the paper: forecast, watch, schedule-laws."""

import sys
import time
from pathlib import Path

import numpy as np

from analysis import schedules
from analysis import table as logs
from analysis.beyond import forecast as forecasting
from analysis.beyond import ladder_field, monitor
from analysis.beyond import schedule_laws as laws
from analysis.table import LogError, clean, load, require, where
from figures import commands


def watch(argv):
    parse = commands.parser(monitor.__doc__.splitlines()[0], 'watch')
    parse.add_argument('--against', required=True, metavar='LADDER', help='the log of the ladder this run belongs to')
    parse.add_argument('--horizon', type=float, metavar='TOKENS', help='where the run will end, if it does not say')
    parse.add_argument('--every', type=float, metavar='SECONDS', help='look again after so long, until the run has ended')
    args = parse.parse_args(argv)
    ladder = logs.load(args.against)
    for condition in args.where:
        ladder = logs.where(ladder, condition)
    ladder, notes, _ = logs.clean(logs.between_widths(ladder, args.min_width, args.max_width))
    alarm = monitor.level(ladder, ladder_field.gather(ladder))
    while True:
        table = monitor.read_run(args.log)
        result = monitor.analyse(table, ladder, args.horizon, alarm)
        if args.out and len(result['x']):
            from figures import beyond_panels
            commands.save(lambda result=result: beyond_panels.watch(result), args.out)
        commands.report(args, {k: v for k, v in result.items() if k != 'expected'}, _watch_lines(result), notes)
        state = table['state'].iloc[-1] if 'state' in table else None
        if not args.every or result['now'] >= 0.999 or state not in (None, 'unfinished', 'running'):
            break
        sys.stdout.flush()
        time.sleep(args.every)
        notes = []


def _watch_lines(result):
    """The run so far for people: a few points of the residual, the verdict, the end."""
    if not len(result['x']):
        return [f'x = {result["now"]:.3f}: the ladder\'s curves begin at {result["expected"].x[0]:g}; nothing to compare yet']
    shown = np.unique(np.linspace(0, len(result['x']) - 1, 8).astype(int))
    out = [f'{"x":>5} {"residual":>9}   90% band             p_value']
    out += [f'{result["x"][i]:5.2f} {result["residual"][i]:+9.2%}   [{result["lo90"][i]:+7.2%}, {result["hi90"][i]:+7.2%}]   '
            f'{result["p_value"][i]:.1e}' for i in shown]
    out += [f'differs: {text}' for text in result['differences']]
    if np.isfinite(result['alarm']):
        out.append(f'ALARM: off its ladder from x = {result["alarm"]:.3g}; this looks like')
        out += [f'  {share:5.0%}  {name} ({size:+.3f})' for name, share, size in result['looks_like']]
    else:
        out.append('on track')
    out.append(f'x = {result["now"]:.3f}: loss {result["loss"]:.5g}, forecast of its end {result["forecast"]:.5g} '
               f'[{result["forecast_lo90"]:.5g}, {result["forecast_hi90"]:.5g}] (90%)')
    return out


def schedule_laws(argv):
    parse = commands.parser(laws.__doc__.splitlines()[0], 'schedule-laws')
    parse.add_argument('--fit', nargs='+', metavar='CURVE', help='the curves to fit, two or three; the others are predicted')
    parse.add_argument('--warmup', type=float, metavar='STEPS', help='steps of linear warm-up before the curves of a .csv begin')
    parse.add_argument('--without', type=float, metavar='STEP', help='an evaluation of a .csv to leave out (as published: 24000)')
    args = parse.parse_args(argv)
    notes = []
    if args.log.endswith('.csv') or any(Path(args.log).glob('*.csv')):
        curves = laws.read_csv(args.log, args.warmup, args.without)
    else:
        table, notes, _ = commands.read(args)
        curves = laws.from_table(table)
    if not args.fit or len(args.fit) < 2:
        raise LogError(f'--fit: name two or three curves of {", ".join(curves)}')
    fits, rows, means = laws.compare(curves, args.fit)
    if fits[1].objective > 300 * fits[2].objective:
        notes.append(f'the {fits[1].law.name} has stopped far from a fit: its step sizes are made for losses of a few nats')
    if args.out:
        from figures import beyond_panels
        commands.save(lambda: beyond_panels.schedule_laws(curves, fits[:2], args.fit), args.out)
    lines = [f'{one.law.name}: ' + ', '.join(f'{name} {value:.4g}' for name, value in zip(one.law.names, one.values, strict=True))
             for one in fits]
    lines += [f'fitted on {", ".join(args.fit)}; the unseen curves, errors in units of the loss:',
              f'{"curve":22} {"law":30} {"R²":>8} {"MAE":>9} {"RMSE":>9} {"worst rel.":>10}']
    lines += ['{curve:22} {law:30} {r2:8.4f} {mae:9.5f} {rmse:9.5f} {worst:10.5f}'.format(**row) for row in
              sorted(rows, key=lambda row: row['curve']) + means.assign(curve='MEAN').reset_index().to_dict('records')]
    values = {one.law.name: dict(zip(one.law.names, one.values, strict=True)) | {'objective': one.objective} for one in fits}
    result = {'fitted': args.fit, 'unseen': rows, 'mean': means.to_dict('index'), 'laws': values}
    commands.report(args, result, lines, notes)


def forecast(argv):
    parse = commands.parser(forecasting.__doc__.splitlines()[0], 'forecast')
    parse.add_argument('--target', required=True, metavar='p=…|D=…|each',
                       help='the model to forecast: its parameters or its width; or each of the log from all that are smaller')
    parse.add_argument('--horizon', type=float, metavar='TOKENS', help='its tokens (default: by the ladder\'s rule)')
    parse.add_argument('--seen', type=float, default=0.0, metavar='X', help='read the target\'s own first part, up to x = X, too')
    parse.add_argument('--rate', type=float, metavar='FLOP/S', help='of your machine in training, for the hours')
    parse.add_argument('--schedule', choices=schedules.RATES, help='of the target, the ladder being at a constant rate')
    parse.add_argument('--pairs', metavar='LOG', help='small models under constant and decaying rates, for the α of --schedule')
    args = parse.parse_args(argv)
    if bool(args.schedule) != bool(args.pairs):
        raise LogError('--schedule and --pairs go together: α is fitted to runs under both kinds of rate')
    table = load(args.log)
    for condition in args.where:
        table = where(table, condition)
    table, notes, copies = clean(table)
    if args.min_width:
        require(table, ['D'], '--min-width')
        table = table[table['D'] >= args.min_width]
    if not 0 <= args.seen < 1:
        raise LogError(f'--seen {args.seen:g} must lie between 0 and 1')
    if args.target == 'each':
        beside = [name for name in ('max_width', 'horizon', 'rate', 'schedule', 'out') if getattr(args, name) is not None]
        if beside:
            raise LogError(f'--target each forecasts every model from the smaller ones; leave out --{beside[0].replace("_", "-")}')
        rows = forecasting.leave_out(table, (args.seen,), fewest=3 if table['num_params'].nunique() < 6 else 5)
        return commands.report(args, {'splits': rows}, _split_lines(rows), notes)
    result, more = forecasting.analyse(table, args.target, args.max_width, args.seen, args.horizon, args.rate, args.schedule,
                           clean(load(args.pairs))[0] if args.pairs else None)
    if args.out:
        from figures import beyond_panels
        commands.save(lambda: beyond_panels.forecast(table, result), args.out)
    commands.report(args, result | {'duplicates_dropped': copies}, _forecast_lines(result), notes + more)


def _forecast_lines(result):
    """The forecast for people."""
    at = [int(np.argmin(np.abs(result['x'] - x))) for x in (0.1, 0.3, 0.5, 1)]
    hours = f', {result["hours"]:.3g} hours' if result['hours'] else ''
    out = [f'{len(result["ladder"])} models up to p = {result["ladder"][-1]:.4g} forecast p = {result["num_params"]:.4g}: '
           f'{result["compute"]:.4g} FLOPs ({result["times_compute"]:.3g} times the largest), {result["tokens"]:.4g} tokens{hours}',
           f'L0 {result["L0"]:.4g}{commands.bracket(result["L0_90"])}; bands are for the mean of {result["seeds"]} run(s)',
           f'{"x":>5} {"loss":>9}   50%                   90%']
    out += [f'{result["x"][i]:5.2f} {result["mean"][i]:9.5f}   [{result["lo50"][i]:.5f}, {result["hi50"][i]:.5f}]   '
            f'[{result["lo90"][i]:.5f}, {result["hi90"][i]:.5f}]' for i in at]
    out.append('what compute buys (compute-optimal, times the largest of the ladder):')
    out += [f'{row["times"]:5g} × {row["mean"]:9.5f}   [{row["lo90"]:.5f}, {row["hi90"]:.5f}]   p = {row["p"]:.4g}'
            for row in result['budgets']]
    if result['error']:
        e = result['error']
        out.append(f'error relative to L - L0 (L0 = {e["L0"]:.4g}, of the whole log), {forecasting.FROM} <= x <= 1:  median   worst    final')
        for name, row in {'forecast': e, **e['baselines']}.items():
            out.append(f'  {name:16} {" ":40} {row["reducible_median"]:8.2%} {row["reducible_worst"]:7.2%} {row["final"]:8.2%}')
        out.append(f'the 90% band holds {e["covered90"]:.0%} of the curve')
    return out


def _split_lines(rows):
    """leave_out for people."""
    out = ['models  p of target  compute   median   worst   final power law  in the 90% band']
    keys = ('reducible_median', 'reducible_worst', 'final', 'baseline_final', 'covered90')
    shape = ' {:7.2%} {:7.2%} {:7.2%} {:9.2%}  {:.0%}'
    for row in rows:
        out.append(f'{row["models"]:6} {row["p"]:12.4g} × {row["times_compute"]:6.3g}' + shape.format(*(row[k] for k in keys)))
    return [*out, f'{"mean":28}' + shape.format(*(np.mean([row[k] for row in rows]) for k in keys))]
