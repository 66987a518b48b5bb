"""The commands of the paper's analysis: collapse, horizon, schedules, reproduced."""

import numpy as np

from analysis import collapse as collapsing
from analysis import horizon as horizons
from analysis import reproduced as reproducing
from analysis import scaling_law
from analysis import schedules as scheduling
from analysis.table import clean, load, runs
from figures import commands


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
    if args.out:
        from figures import panels
        commands.save(lambda: panels.reproduced(table, same, L0), args.out)
    lines = [f'p = {runs(table)["num_params"].iloc[0]:.6g}, {same["run"].nunique()} published seeds, L0 = {L0:.4g}',
             '   x      loss  published        sd   off (sd)      ℓ  published  distance  (noise)']
    for i, x in enumerate(result['x']):
        r = {k: v[i] for k, v in result.items() if v.ndim == 1}
        lines.append(f'{x:4.1f}  {r["loss"]:.5f}    {r["published"]:.5f}  {r["sd"]:.6f}      {r["off"]:+5.2f}  '
                     f'{r["normalised"]:.4f}     {r["normalised_published"]:.4f}   {r["distance"]:+.4f} ({r["noise"]:.4f})')
    commands.report(args, result | {'L0': L0}, lines, notes + more)


def collapse(argv):
    parse = commands.parser(collapsing.__doc__.splitlines()[0], 'collapse')
    parse.add_argument('--L0', type=float, metavar='X', help='hold the irreducible loss instead of fitting it')
    parse.add_argument('--ddof', type=int, default=0, choices=(0, 1), help='of every variance over seeds (default 0)')
    parse.add_argument('--keep-duplicates', action='store_true', help='keep runs that are in the log twice')
    args = parse.parse_args(argv)
    table, notes, copies = commands.read(args, args.keep_duplicates)
    result, more = collapsing.analyse(table, args.L0, args.ddof)
    widths = sorted(int(D) for D in runs(table)['D'].dropna().unique()) if 'D' in table else None
    result |= {'duplicates_dropped': copies, 'widths': widths}
    if args.out:
        from figures import panels
        commands.save(lambda: panels.collapse(table, result), args.out)
    fit, at = result['fit'], [int(np.argmin(np.abs(result['x'] - x))) for x in (0.5, 0.9)]
    fewest, most = min(result['seeds_per_model']), max(result['seeds_per_model'])
    seeds = f'{fewest}' if fewest == most else f'{fewest} to {most}'
    lines = [collapsing.verdict_in_words(result),
             f'{len(result["num_params"])} models, seeds per model: {seeds}; L = L0 + a·(C/1e15)^(-b):',
             *(f'  {k:3} {fit[k]:.5g}{commands.bracket(fit[f"{k}_ci"])}' for k in ('a', 'b', 'L0')),
             *(f'x = {result["x"][i]:.2f}: Δ {result["delta"][i]:.5f} (between models {result["between"][i]:.5f}, within '
               f'{result["within"][i]:.5f})' + (f', σ {result["sigma"][i]:.5f}' if np.isfinite(result['sigma'][i]) else '')
               for i in at),
             *(('Δ < σ averaged over models ' + _from(result['supercollapse_from'], result['supercollapse_from_ci']),
                'Δ < σ of every model       ' + _from(result['supercollapse_from_every_model'],
                                                      result['supercollapse_from_every_model_ci']))
               if fewest > 1 and len(result['num_params']) > 1 else ())]
    if result['L0_sensitivity']:
        by = result['L0_sensitivity']
        each = zip(by['L0'], by['supercollapse_from'], strict=True)
        lines.append('with L0 ' + ', '.join(f'{L:.4g}: {_from(x)}' for L, x in each))
    worst, odd = result['worst_model'], result['worst_run']
    lines += [f'farthest from the mean curve: the model with {worst["num_params"]:.4g} parameters ({worst["departure"]:.2%}); '
              f'farthest from its own model: run {odd["run"]} ({odd["departure"]:.2%})']
    commands.report(args, result, lines, notes + more)


def _from(x, ci=None):
    if not np.isfinite(x):
        return 'never'
    if ci is None:
        return f'from x = {x:.2f}'
    return f'from x = {x:.2f}  [{", ".join(f"{c:.2f}" if np.isfinite(c) else "never" for c in ci)}]'


def horizon(argv):
    parse = commands.parser(horizons.__doc__.splitlines()[0], 'horizon')
    parse.add_argument('--min-compute', type=float, metavar='FLOPS', help='start of the range (default: the first evaluation)')
    parse.add_argument('--max-compute', type=float, metavar='FLOPS', help='end of the range (default: the last evaluation)')
    args = parse.parse_args(argv)
    table, notes, copies = commands.read(args)
    table, more = horizons.constant_rate(table)
    curves = horizons.smooth_curves(table, args.min_compute, args.max_compute)
    result = horizons.fit(curves)
    if args.out:
        from figures import panels
        commands.save(lambda: panels.horizon(curves, result), args.out)
    lines = [f'C* = (p / scale)^exponent · 1e15 FLOPs from {len(result.p)} tangent points of {len(curves.p)} models',
             f'scale     {result.scale:.6g}{commands.bracket(result.scale_ci)}',
             f'exponent  {result.exponent:.4f}{commands.bracket(result.exponent_ci)}   (data exponent γ = exponent - 1)',
             f'R²        {result.r2:.5f}']
    if result.staircase:
        lines.append(f'fit to the steps of the envelope, as in the paper: scale {result.staircase["scale"]:.6g}, '
                     f'exponent {result.staircase["exponent"]:.4f}')
    commands.report(args, result._asdict() | {'level': 0.9, 'duplicates_dropped': copies}, lines,
                    notes + more + horizons.notes(curves, result))


def schedules(argv):
    parse = commands.parser(scheduling.__doc__.splitlines()[0], 'schedules')
    args = parse.parse_args(argv)
    table, notes, copies = commands.read(args)
    result, more = scheduling.analyse(table)
    if args.out:
        from figures import panels
        commands.save(lambda: panels.schedules(scheduling.align(table)[0], result['alpha']), args.out)
    lines = [f'alpha     {result["alpha"]:.4f} ± {result["alpha_se"]:.4f}{commands.bracket(result["alpha_ci"])}'
             f'   (theory {scheduling.THEORY})',
             f'published {result["alpha_published"]:.4f} ± {result["alpha_published_se"]:.4f}'
             f'{commands.bracket(result["alpha_published_ci"])}   (with the trace as logged; the paper sets {scheduling.HAND_SET})',
             f'rmse      {result["rmse"]:.3g} over {result["runs"]} runs; with the second term of eq. 15 '
             f'{result["with_second_term"]["rmse"]:.3g}',
             'mean absolute error relative to the drop that the decay causes, α fitted on the other schedules',
             f'(α={scheduling.HAND_SET} with the trace as logged, the other α with the unbiased trace):',
             f'{"schedule":12} {"decay":>6} {"runs":>5} {"alpha":>7} {"error":>7} {"α=0.26":>7} {"α=0.25":>7} {"α=0":>7}']
    lines += [f'{e["schedule"]:12} {e["decay_frac"]:6g} {e["runs"]:5d} {e["alpha_without"]:7.4f} {e["error"]:7.3f} '
              f'{e["hand_set"]:7.3f} {e["theory"]:7.3f} {e["no_noise_term"]:7.3f}' for e in result['leave_one_schedule_out']]
    commands.report(args, result | {'duplicates_dropped': copies}, lines, notes + more)
