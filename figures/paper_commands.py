"""The commands on the paper's own analysis: collapse, horizon, schedules, reproduced."""

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
    parse.add_argument('published', metavar='PUBLISHED', help='the log to compare with, a whole ladder')
    args = parse.parse_args(argv)
    table, notes, _ = commands.read(args)
    ladder, more, _ = clean(load(args.published))
    points = scaling_law.optimal_points(ladder)
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
    parse.add_argument('--keep-duplicates', action='store_true', help='count runs that are in the log twice twice')
    args = parse.parse_args(argv)
    table, notes, copies = commands.read(args, args.keep_duplicates)
    result, more = collapsing.analyse(table, args.L0, args.ddof)
    widths = sorted(int(D) for D in runs(table)['D'].dropna().unique()) if 'D' in table else None
    result |= {'duplicates_dropped': copies, 'widths': widths}
    if args.out:
        from figures import panels
        commands.save(lambda: panels.collapse(table, result), args.out)
    fit, at = result['fit'], [int(np.argmin(np.abs(result['x'] - x))) for x in (0.5, 0.9)]
    lines = [f'{len(result["num_params"])} models, {min(result["seeds_per_model"])} to {max(result["seeds_per_model"])} seeds; '
             f'L = L0 + a·(C/1e15)^(-b):',
             *(f'  {k:3} {fit[k]:.5g}{commands.bracket(fit[f"{k}_ci"])}' for k in ('a', 'b', 'L0')),
             *(f'x = {result["x"][i]:.2f}: Δ {result["delta"][i]:.5f} (between models {result["between"][i]:.5f}, within '
               f'{result["within"][i]:.5f}), σ {result["sigma"][i]:.5f}' for i in at),
             *(('Δ < σ averaged over models ' + _from(result['supercollapse_from'], result['supercollapse_from_ci']),
                'Δ < σ of every model       ' + _from(result['supercollapse_from_every_model'],
                                                      result['supercollapse_from_every_model_ci']))
               if min(result['seeds_per_model']) > 1 and len(result['num_params']) > 1 else
               ('Δ < σ: cannot be told without two models of two seeds',))]
    if result['L0_sensitivity']:
        by = result['L0_sensitivity']
        each = zip(by['L0'], by['supercollapse_from'], strict=True)
        lines.append('with L0 ' + ', '.join(f'{L:.4g}: {_from(x)}' for L, x in each))
    worst, odd = result['worst_model'], result['worst_run']
    lines += [f'departing most: the model with {worst["num_params"]:.4g} parameters ({worst["departure"]:.2%}); '
              f'of its model, run {odd["run"]} ({odd["departure"]:.2%})']
    commands.report(args, result, lines, notes + more)


def _from(x, ci=None):
    if not np.isfinite(x):
        return 'never'
    if ci is None:
        return f'from x = {x:.2f}'
    return f'from x = {x:.2f}  [{", ".join(f"{c:.2f}" if np.isfinite(c) else "never" for c in ci)}]'


def horizon(argv):
    parse = commands.parser(horizons.__doc__.splitlines()[0], 'horizon')
    parse.add_argument('--min-compute', type=float, metavar='FLOPS', help='start of the range (default: all of the runs)')
    parse.add_argument('--max-compute', type=float, metavar='FLOPS', help='end of the range')
    args = parse.parse_args(argv)
    table, notes, copies = commands.read(args)
    table, more = horizons.constant_rate(table)
    curves = horizons.smooth_curves(table, args.min_compute, args.max_compute)
    result = horizons.fit(curves)
    notes = notes + more
    if result.seeds == 1:
        notes.append('a model with one seed: its share of the seeds\' noise is missing from the intervals')
    if result.exponent_ci is None:
        notes.append('two tangent points: the line through them is exact and has no interval')
    if args.out:
        from figures import panels
        commands.save(lambda: panels.horizon(curves, result), args.out)
    lines = [f'C* = (p / scale)^exponent · 1e15 FLOPs from {len(result.p)} tangent points of {len(curves.p)} models',
             f'scale     {result.scale:.6g}{commands.bracket(result.scale_ci)}',
             f'exponent  {result.exponent:.4f}{commands.bracket(result.exponent_ci)}   (data exponent γ = exponent - 1)',
             f'R²        {result.r2:.5f}']
    if result.staircase:
        lines.append(f'the envelope\'s staircase, as in the paper: scale {result.staircase["scale"]:.6g}, '
                     f'exponent {result.staircase["exponent"]:.4f}')
    commands.report(args, result._asdict() | {'level': 0.9, 'duplicates_dropped': copies}, lines, notes)


def schedules(argv):
    parse = commands.parser(scheduling.__doc__.splitlines()[0], 'schedules')
    args = parse.parse_args(argv)
    table, notes, copies = commands.read(args)
    aligned, more = scheduling.align(table)
    result, whole, errors = scheduling.fit(aligned), scheduling.fit(aligned, second_term=True), scheduling.leave_one_out(aligned)
    if result.groups == 1 < result.runs:
        notes.append('one constant-rate run: its own noise is not in the standard error of α')
    if result.runs == 1:
        notes.append('a single run with a decay phase: α has no standard error and no schedule can be left out')
    if args.out:
        from figures import panels
        commands.save(lambda: panels.schedules(aligned, result.alpha), args.out)
    lines = [f'alpha     {result.alpha:.4f} ± {result.alpha_se:.4f}{commands.bracket(result.alpha_ci)}'
             f'   (theory {scheduling.THEORY}, set by hand in the paper {scheduling.HAND_SET})',
             f'rmse      {result.rmse:.3g} over {result.runs} runs; with the second term of eq. 15 {whole.rmse:.3g}',
             'mean absolute error relative to the drop that the decay causes, α fitted on the other schedules:',
             f'{"schedule":12} {"decay":>6} {"runs":>5} {"alpha":>7} {"error":>7} {"α=0.26":>7} {"α=0.25":>7} {"α=0":>7}']
    lines += [f'{e["schedule"]:12} {e["decay_frac"]:6g} {e["runs"]:5d} {e["alpha_without"]:7.4f} {e["error"]:7.3f} '
              f'{e["hand_set"]:7.3f} {e["theory"]:7.3f} {e["no_noise_term"]:7.3f}' for e in errors]
    commands.report(args, result._asdict() | {
        'rmse_relative': scheduling.rmse_relative(aligned, result.alpha), 'leave_one_schedule_out': errors,
        'hand_set': {'alpha': scheduling.HAND_SET, 'rmse_relative': scheduling.rmse_relative(aligned, scheduling.HAND_SET)},
        'with_second_term': {'alpha': whole.alpha, 'rmse': whole.rmse}, 'duplicates_dropped': copies}, lines, notes + more)
