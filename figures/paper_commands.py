"""The commands of the paper's analysis: collapse, horizon, schedules, reproduced."""

import numpy as np

from analysis import collapse as collapsing
from analysis import horizon as horizons
from analysis import reproduced as reproducing
from analysis import scaling_law
from analysis import schedules as scheduling
from analysis.table import clean, load, runs
from figures import commands
from figures.tables import onset_text, value_range


def _finish(args, result, lines, notes, panel, *drawn):
    """Draw the figure of --out, panels.<panel>(*drawn), and print the result. Matplotlib is imported for a figure only."""
    if args.out:
        from figures import panels
        commands.save(lambda: getattr(panels, panel)(*drawn), args.out)
    commands.report(args, result, lines, notes)


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
    _finish(args, result | {'L0': L0}, lines, notes + more, 'reproduced', table, same, L0)


def collapse(argv):
    parse = commands.parser(collapsing.__doc__.splitlines()[0], 'collapse')
    parse.add_argument('--L0', type=float, metavar='X', help='hold the irreducible loss instead of fitting it')
    parse.add_argument('--ddof', type=int, default=0, choices=(0, 1), help='of every variance over seeds (default 0)')
    parse.add_argument('--keep-duplicates', action='store_true', help='keep runs that are in the log twice')
    args = parse.parse_args(argv)
    table, notes, copies = commands.read(args, args.keep_duplicates)
    result, more = collapsing.analyse(table, args.L0, args.ddof)
    widths = sorted(table['D'].dropna().astype(int).unique().tolist()) if 'D' in table else None
    result |= {'duplicates_dropped': copies, 'widths': widths}
    fit, seeds, worst, odd = (result[key] for key in ('fit', 'seeds_per_model', 'worst_model', 'worst_run'))
    lines = [collapsing.verdict_in_words(result),
             f'{len(seeds)} models, seeds per model: {value_range(seeds)}; L = L0 + a·(C/1e15)^(-b):',
             *(f'  {k:3} {fit[k]:.5g}{commands.bracket(fit[f"{k}_ci"])}' for k in ('a', 'b', 'L0'))]
    for i in (np.abs(result['x'] - x).argmin() for x in (0.5, 0.9)):
        sigma = f', σ {result["sigma"][i]:.5f}' if np.isfinite(result['sigma'][i]) else ''
        lines.append(f'x = {result["x"][i]:.2f}: Δ {result["delta"][i]:.5f} (between models {result["between"][i]:.5f}, within '
                     f'{result["within"][i]:.5f}){sigma}')
    if result['supercollapse_from_ci']:
        lines += [f'onset of Δ < σ, {which}: {onset_text(result[key], result[f"{key}_ci"])}' for which, key in (
            ('averaged over models', 'supercollapse_from'), ('of every model', 'supercollapse_from_every_model'))]
    if result['L0_sensitivity']:
        each = zip(*result['L0_sensitivity'].values(), strict=True)
        lines.append('onset with other L0: ' + ', '.join(f'{onset_text(x)} with {L:.4g}' for L, x in each))
    lines += [f'farthest from the mean curve: the model with {worst["num_params"]:.4g} parameters ({worst["departure"]:.2%}); '
              f'farthest from its own model: run {odd["run"]} ({odd["departure"]:.2%})']
    _finish(args, result, lines, notes + more, 'collapse', table, result)


def horizon(argv):
    parse = commands.parser(horizons.__doc__.splitlines()[0], 'horizon')
    parse.add_argument('--min-compute', type=float, metavar='FLOPS', help='start of the range (default: the first evaluation)')
    parse.add_argument('--max-compute', type=float, metavar='FLOPS', help='end of the range (default: the last evaluation)')
    args = parse.parse_args(argv)
    table, notes, copies = commands.read(args)
    table, more = horizons.constant_rate(table)
    curves = horizons.smooth_curves(table, args.min_compute, args.max_compute)
    result = horizons.fit(curves)
    lines = [f'C* = (p / scale)^exponent · 1e15 FLOPs from {len(result.p)} tangent points of {len(curves.p)} models',
             f'scale     {result.scale:.6g}{commands.bracket(result.scale_ci)}',
             f'exponent  {result.exponent:.4f}{commands.bracket(result.exponent_ci)}   (data exponent γ = exponent - 1)',
             f'R²        {result.r2:.5f}']
    if result.staircase:
        lines.append('fit to the steps of the envelope, as in the paper: scale {scale:.6g}, exponent {exponent:.4f}'.format(
            **result.staircase))
    _finish(args, result._asdict() | {'level': scaling_law.LEVEL, 'duplicates_dropped': copies}, lines,
            notes + more + horizons.notes(curves, result), 'horizon', curves, result)


def schedules(argv):
    args = commands.parser(scheduling.__doc__.splitlines()[0], 'schedules').parse_args(argv)
    table, notes, copies = commands.read(args)
    result, more = scheduling.analyse(table)
    lines = [f'{name:9} {result[key]:.4f} ± {result[f"{key}_se"]:.4f}{commands.bracket(result[f"{key}_ci"])}   ({note})'
             for name, key, note in (
                 ('alpha', 'alpha', f'theory {scheduling.THEORY}'),
                 ('published', 'alpha_published', f'with the trace as logged; the paper sets {scheduling.HAND_SET}'))]
    lines += [f'rmse      {result["rmse"]:.3g} over {result["runs"]} runs; with the second term of eq. 15 '
              f'{result["with_second_term"]["rmse"]:.3g}',
              'mean absolute error relative to the drop that the decay causes, α fitted on the other schedules',
              f'(α={scheduling.HAND_SET} with the trace as logged, the other α with the unbiased trace):',
              f'{"schedule":12} {"decay":>6} {"runs":>5} {"alpha":>7} {"error":>7} {"α=0.26":>7} {"α=0.25":>7} {"α=0":>7}']
    row = ('{schedule:12} {decay_frac:6g} {runs:5d} {alpha_without:7.4f} {error:7.3f} {hand_set:7.3f} {theory:7.3f} '
           '{no_noise_term:7.3f}')
    lines += [row.format(**errors) for errors in result['leave_one_schedule_out']]
    _finish(args, result | {'duplicates_dropped': copies}, lines, notes + more,
            'schedules', scheduling.align(table)[0], result['alpha'])
