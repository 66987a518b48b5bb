"""The commands of the paper's analysis: collapse, power, horizon, schedules, reproduced, conditions."""

import numpy as np

from analysis import collapse as collapsing
from analysis import conditions as conditioning
from analysis import horizon as horizons
from analysis import power as powers
from analysis import reproduced as reproducing
from analysis import scaling_law
from analysis import schedules as scheduling
from analysis.table import LogError, clean, load, runs
from figures import commands
from figures.tables import number, summary, value_range


def reproduced(argv):
    parse = commands.parser(reproducing.__doc__.splitlines()[0], 'reproduced')
    parse.add_argument('published', metavar='PUBLISHED', help='the log to compare with, of a whole ladder')
    args = parse.parse_args(argv)
    table, notes, _ = commands.read(args)
    ladder, more, _ = clean(load(args.published))
    points = scaling_law.optimal_points(collapsing.ladder(ladder))
    L0 = scaling_law.fit(points.compute, points.loss).L0
    same = reproducing.same_model(table, ladder)
    result = reproducing.compare(table, same, L0)
    lines = [f'p = {runs(table)["num_params"].iloc[0]:.6g}, {same["run"].nunique()} published seeds, L0 = {L0:.4g}',
             '   x      loss  published        sd   off (sd)      ℓ  published  distance  (noise)']
    columns = ('x', 'loss', 'published', 'sd', 'off', 'normalised', 'normalised_published', 'distance', 'noise')
    row = '{:4.1f}  {:.5f}    {:.5f}  {:.6f}      {:+5.2f}  {:.4f}     {:.4f}   {:+.4f} ({:.4f})'
    lines += [row.format(*values) for values in zip(*(result[column] for column in columns), strict=True)]
    commands.finish(args, result | {'L0': L0}, lines, notes + more, 'panels.reproduced', table, same, L0)


def collapse(argv):
    parse = commands.parser(collapsing.__doc__.splitlines()[0], 'collapse')
    parse.add_argument('--L0', type=float, metavar='X', help='hold the irreducible loss instead of fitting it')
    parse.add_argument('--ddof', type=int, default=0, choices=(0, 1), help='of every variance over seeds (default 0)')
    parse.add_argument('--seeds-by', **commands.SEEDS_BY)
    args = parse.parse_args(argv)
    table, notes, copies = commands.read(args)
    result, more = collapsing.analyse(table, args.L0, args.ddof)
    widths = sorted(table['D'].dropna().astype(int).unique().tolist()) if 'D' in table else None
    result |= {'duplicates_dropped': copies, 'widths': widths}
    seeds, worst, odd = (result[key] for key in ('seeds_per_model', 'worst_model', 'worst_run'))
    at = [np.abs(result['x'] - x).argmin() for x in (0.5, 0.9)]
    lines = [collapsing.verdict_in_words(result),
             f'{len(seeds)} models, seeds per model: {value_range(seeds)}; L = L0 + a·(C/1e15)^(-b):',
             commands.text(summary(result)),
             'tolerance Δ, its parts between and within models, noise floor σ:',
             commands.text({name: result[name][at] for name in ('x', 'delta', 'between', 'within', 'sigma')})]
    lines += ['verdict with each L0, delta and sigma at x = 0.5:',
              commands.text([{key: number(value, one['L0_ci']) if key == 'L0' else value for key, value in one.items()
                              if key != 'L0_ci'} for one in result['L0_choices']])] if result['L0_choices'] else []
    lines.append(f'farthest from the mean curve: the model with {worst["num_params"]:.4g} parameters ({worst["departure"]:.2%}); '
                 f'farthest from its own model: run {odd["run"]} ({odd["departure"]:.2%})')
    commands.finish(args, result, lines, notes + more, 'panels.collapse', {'': (table, result)})


def power(argv):
    parse = commands.parser(powers.__doc__.splitlines()[0], 'power', out=None)
    parse.add_argument('--L0', type=float, metavar='X', help='hold the irreducible loss instead of fitting it')
    parse.add_argument('--const', metavar='LOG', help='constant-rate runs, to fit µ and s to instead of taking them from b and γ')
    parse.add_argument('--beside', metavar='LOG', action='append', default=[],
                       help='a misscaled ladder with models of this one: its Δ beside the predicted one (can be repeated)')
    parse.add_argument('--gamma', type=float, metavar='F', default=0.8, help='the error whose price is printed: F·γ (default 0.8)')
    parse.add_argument('--seeds', type=int, metavar='N', help='a planned ladder with N seeds of every model')
    parse.add_argument('--more', type=int, metavar='N', default=0, help='a planned ladder with N larger models, at the same steps')
    args = parse.parse_args(argv)
    for name, least, value in (('--seeds', 1, args.seeds), ('--more', 0, args.more), ('--gamma', 0, args.gamma)):
        if value is not None and value < least:
            raise LogError(f'{name} {value:g} must be at least {least}')
    table, notes, copies = commands.read(args)
    constant = horizons.constant_rate(clean(load(args.const))[0])[0] if args.const else None
    result, ladder, more = powers.analyse(table, args.L0, constant, args.gamma, args.seeds, args.more)
    result['beside'] = {log: powers.compare(ladder, clean(load(log))[0]) for log in args.beside}
    x, span = result['x'], result['num_params'][-1] / result['num_params'][0]
    shown = {'x': x, 'Δ of the log': result['delta'], 'threshold': result['threshold']}
    of_largest = {'excess': 'loss of largest ×', 'noise': 'N of largest ×'}  # the size is an exponent of p
    shown |= {of_largest.get(name, f'{name.replace("_", " ")} ×'): span ** sizes if name in of_largest else sizes
              for name, sizes in result['smallest'].items()}
    half = np.abs(x - 0.5).argmin()
    predictions = [{'γ ×': one['factor'], **{f'Δ({at:g})': value for at, value in zip(x, one['delta'], strict=True)},
                    f'L0 refitted Δ({x[half]:g})': one['delta_refit'][half], f'eq. 7 alone Δ({x[half]:g})': one['delta_law'][half]}
                   for one in result['predicted']]
    lines = [f'{len(result["num_params"])} models, p = {result["num_params"][0]:.4g} to {result["num_params"][-1]:.4g}, seeds per '
             f'model: {value_range(result["seeds_per_model"])}; L0 = {result["fit"]["L0"]:.4g}, γ = {result["gamma"]:.3f}, '
             f'µ = {result["mu"]:.3f}, s = {result["share"]:.2f}',
             f'smallest errors that Δ shows with {result["power"]:.0%} power at {result["false_alarms"]:.0%} false alarms (–: none '
             'that was tried):', commands.text(shown), 'the same with L0 refitted:',
             commands.text({'x': x, 'threshold': result['threshold_refit']} |
                           {f'{name.replace("_", " ")} ×': sizes for name, sizes in result['smallest_refit'].items()}),
             f'what would show {args.gamma:g}·γ: seeds per model, or models at the same steps up to p:',
             commands.text({'x': x} | result['needed']),
             'predicted Δ, median, for other γ at the same total compute:', commands.text(predictions)]
    if result['noise'] is not None:
        lines += ['N(x)/R(1), the part of ℓ that is noise of SGD, by model:', commands.text({'x': x} | {
            f'p = {p:.4g}': noise for p, noise in zip(ladder.p, result['noise'], strict=True)})]
    for log, one in result['beside'].items():
        lines += [f'{log} beside the prediction for its horizons:', commands.text({'x': x} | {
            key: one[key] for key in ('measured', 'delta', 'delta_law', 'p_value', 'measured_refit', 'delta_refit')})]
    commands.finish(args, result | {'duplicates_dropped': copies}, lines, notes + more)


def horizon(argv):
    parse = commands.parser(horizons.__doc__.splitlines()[0], 'horizon')
    parse.add_argument('--min-compute', type=float, metavar='FLOPS', help='start of the range (default: the first evaluation)')
    parse.add_argument('--max-compute', type=float, metavar='FLOPS', help='end of the range (default: the last evaluation)')
    args = parse.parse_args(argv)
    table, notes, copies = commands.read(args)
    table, more = horizons.constant_rate(table)
    curves = horizons.smooth_curves(table, args.min_compute, args.max_compute)
    result = horizons.fit(curves)
    lines = [f'C* = (p / scale)^exponent · 1e15 FLOPs from {len(curves.p)} models, {len(result.p)} of them trained past it; '
             'data exponent γ = exponent - 1:', commands.text(summary(result))]
    if result.staircase:
        lines.append('fit to the steps of the envelope, as in the paper: scale {scale:.6g}, exponent {exponent:.4f}'.format(
            **result.staircase))
    commands.finish(args, result._asdict() | {'level': scaling_law.LEVEL, 'duplicates_dropped': copies}, lines,
                    notes + more + horizons.notes(curves, result), 'panels.horizon', curves, result)


def schedules(argv):
    args = commands.parser(scheduling.__doc__.splitlines()[0], 'schedules').parse_args(argv)
    table, notes, copies = commands.read(args)
    result, more = scheduling.analyse(table)
    lines = [f'theory: α = {scheduling.THEORY}; the paper sets {scheduling.HAND_SET} by hand, with the trace as logged',
             commands.text(summary(result)),
             'mean absolute error relative to the drop that the decay causes: with α fitted on the other schedules, with the two α '
             'above, and with α = 0:', commands.text(result['leave_one_schedule_out'])]
    commands.finish(args, result | {'duplicates_dropped': copies}, lines, notes + more,
                    'panels.schedules', scheduling.align(table)[0], result['alpha'])


def conditions(argv):
    args = commands.parser(conditioning.__doc__.splitlines()[0], 'conditions', out=None).parse_args(argv)
    table, notes, _ = commands.read(args)
    found = conditioning.conditions(table)
    values = {'parameters': found[0].num_params, **{one.name: one.values for one in found}}
    verdicts = [{'condition': one.name, 'verdict': one.verdict, 'spread': one.spread, 'limit': one.limit} for one in found]
    lines = [commands.text(verdicts), *(f'{one.name}: {one.advice}' for one in found if one.advice), commands.text(values)]
    commands.finish(args, {'conditions': [one._asdict() for one in found]}, lines, notes)
