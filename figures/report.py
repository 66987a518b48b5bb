"""One page about a ladder, to hand round: the verdict in words, what it rests on, and what more compute buys.

The page is one file that needs no network. Its text is in report.html and its figures in report_panels.py. What the log cannot give
is left out, and the page says why.
"""

import html
import json
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path
from string import Template

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from analysis import collapse, conditions, scaling_law
from analysis import table as logs
from analysis.beyond import forecast as forecasting
from analysis.beyond import ladder_field
from analysis.table import LogError
from figures import commands
from figures.tables import number, onset_text, summary, value_range

MULTIPLES = 1, 2, 10, 100  # of the ladder's largest compute, in the table of what more compute buys
TARGET = 10                # the multiple for which a whole curve is forecast
STEPS = 41                 # of the slider, besides the values of L0 that have a name
MEANING = {
    'supercollapse': 'The curves of all sizes agree more closely than two runs of one size. This is the sign of good scaling. It '
                     'is no proof: small ladders can hide a wrong horizon.',
    'collapse': f'The curves of all sizes have one shape, within {collapse.TIGHT:.0%}. They differ by more than the noise. See '
                'which of the conditions below differ.',
    'no collapse': 'The shape of the curves changes with size. A condition below differs, or the learning rate or the horizon does '
                   'not grow with size by the right rule.',
    'not decidable': 'The log does not answer the question. The line above says why. Without a noise floor, repeat one size with '
                     'another seed. Where L0 decides, add wider models.'}


def analyse(table):
    """(record of the page, notes). What cannot be computed is None, and `missing` says why. Raises LogError if it is no ladder."""
    missing = {}

    def attempt(part, function):
        try:
            return function(table)
        except LogError as error:
            missing[part] = str(error).split(';')[0]  # what follows names options of other commands

    result, notes = attempt('scaling law', collapse.analyse) or collapse.analyse(table, 0.0)
    law = None if 'scaling law' in missing else scaling_law.Law(*(result['fit'][name] for name in ('a', 'b', 'L0')))
    if not law:
        result |= {'verdict': 'not decidable', 'verdict_reason': f'no scaling law, and so no L0: {missing["scaling law"]}'}
    met, (found, more) = attempt('conditions', conditions.conditions) or [], attempt('forecast', forecast) or (None, [])
    missing |= {one.name: one.advice for one in met if one.verdict == 'unknown'}
    if 'opt_compute' not in table:
        missing['horizon law'] = 'the log has no compute-optimal C*; the end of each run counts as its C*'
    return {'collapse': result, 'law': law, 'conditions': [one._asdict() for one in met], 'forecast': found, 'missing': missing,
            'larger': larger(scaling_law.optimal_points(table), law, found)}, notes + more


def forecast(table):
    """forecast.analyse of the model whose horizon is TARGET times the largest compute of the ladder."""
    ladder = ladder_field.read_ladder(table)
    return forecasting.analyse(table, f'p={forecasting.optimal_params(ladder, TARGET * ladder.compute[-1])}')


def larger(points, law, found):
    """[{times, compute, law, law_ci, p, forecast, forecast_ci}] for MULTIPLES of the largest compute. None is not known."""
    draws, budgets = law and scaling_law.bootstrap(points, law)[0], {one['times']: one for one in (found or {}).get('budgets', [])}
    rows = []
    for times in MULTIPLES:
        C, budget = times * points.compute[-1], budgets.get(times)
        rows.append({
            'times': times, 'compute': C, 'law': scaling_law.predict(law, C) if law else None,
            'law_ci': scaling_law.interval(scaling_law.predict(scaling_law.Law(**draws), C)) if draws else None,
            'p': budget and budget['p'], 'forecast': budget and budget['mean'],
            'forecast_ci': budget and [budget['lo90'], budget['hi90']]})
    return rows


def slider(curves, result):
    """(steps, index of the first shown): for each L0 the mean curves [M, K], Δ and σ [K - 1], their range, and a line of text."""
    named = [one for one in result['L0_choices'] if one['name'] in ('zero', 'law', 'best')]
    names = pd.DataFrame(named, columns=['L0', 'name']).groupby('L0')['name'].agg(', '.join).to_dict()
    floors = np.union1d(np.linspace(0, 0.98 * curves.loss[:, -1].min(), STEPS), [result['fit']['L0'], *names])
    ell = collapse.model_average(curves) @ collapse.normalise(curves, floors)
    each = collapse.spread(curves, floors, result['ddof'])
    half, sigma, top = np.abs(curves.x - 0.5).argmin(), each.sigma.mean(1), ell[..., curves.x >= 0.1].max((1, 2))
    onset, drop, steps = collapse.onset(curves.x, each.delta, sigma), collapse.drop_spread(curves, floors), []
    for i, L0 in enumerate(floors):
        text = (f'L̂ = {L0:.4g}{f" ({names[L0]})" if L0 in names else ""}: Δ(0.5) = {each.delta[i, half]:.4f}, spread of the drop '
                f'{drop[i]:.1%}' + (f', Δ < σ from x = {onset_text(onset[i])}' if np.isfinite(sigma[i]).all() else ''))
        steps.append({'curves': np.round(ell[i], 5).tolist(), 'range': [1 - 0.04 * (top[i] - 1), top[i]], 'text': text,
                      'delta': _json(each.delta[i]), 'sigma': _json(sigma[i])})
    return steps, int(np.searchsorted(floors, result['fit']['L0']))


def _json(values):
    """[K - 1] numbers with four digits, None for NaN, without x = 1, where Δ is 0."""
    return [float(f'{one:.4g}') if np.isfinite(one) else None for one in values[:-1]]


def page(table, record, notes, origin):
    """The page as HTML. `origin` {name: text} says how it was computed."""
    try:
        from figures import report_panels as panels
    except ModuleNotFoundError as error:
        raise LogError(f'the report needs {error.name}, which is not installed: pip install {error.name}') from None
    result, found, curves = record['collapse'], record['forecast'] or {}, collapse.curves(table)
    (steps, first), met, check = slider(curves, result), record['conditions'], found.get('calibration')
    p, C, mark = result['num_params'], result['compute'], {'met': '✓ met', 'differs': '✗ differs', 'unknown': '? unknown'}
    choices = [{'L0': one['name'].replace('_', ', '), 'value': number(one['L0'], one['L0_ci']), 'Δ(0.5)': one['delta'],
                'drop': f'{one["drop_spread"]:.1%}', 'verdict': one['verdict']} for one in result['L0_choices']]
    larger = [{'compute': f'× {one["times"]}', 'parameters': one['p'] and panels.count(one['p'])} | {
        name: one[name] and number(one[name], one[f'{name}_ci']) for name in ('law', 'forecast')} for one in record['larger']]
    calibration = check and (
        f'Of {check["splits"]} models of this ladder, each forecast from the smaller ones, the 90% intervals held '
        f'{check["covered90"]:.0%} of the curves. The mean error of the final loss was {check["final"]:.1%} of L - L0.')
    return Template(Path(__file__).with_suffix('.html').read_text()).substitute(
        plotly=panels.script(), verdict=result['verdict'], reason=html.escape(result['verdict_reason']),
        meaning=MEANING[result['verdict']], name=html.escape(Path(origin['log']).name), models=len(p),
        parameters=' to '.join(dict.fromkeys([panels.count(p[0]), panels.count(p[-1])])),
        seeds=value_range(result['seeds_per_model']), compute=' to '.join(dict.fromkeys(f'{one:.3g}' for one in C[[0, -1]])),
        missing=_list([f'{part}: {reason}' for part, reason in record['missing'].items()] + notes),
        law=_table(summary({'fit': result['fit']})) if record['law'] else '',
        law_figure=panels.law(curves.x, collapse.model_average(curves) @ curves.loss, result, record['law']),
        steps=json.dumps(steps), first=first, last=len(steps) - 1, choices=_table(choices),
        collapse_figure=panels.collapse(curves.x, steps[first], result), spread_figure=panels.spread(steps[first], result),
        conditions=_table([{'condition': one['name'], 'verdict': mark[one['verdict']], 'spread': one['spread'],
                            'limit': one['limit']} for one in met]),
        advice=_list([f'{one["name"]}: {one["advice"]}' for one in met if one['advice']]),
        larger=_table(larger), larger_figure=panels.larger(result, record['larger'], record['forecast']),
        calibration=calibration or '', origin=_table(list(origin.items()), header=False))


def _table(rows, header=True):
    return pd.DataFrame(rows).to_html(index=False, header=header, border=0, na_rep='–', float_format='{:.3g}'.format)


def _list(lines):
    return ''.join(f'<li>{html.escape(line)}' for line in lines) or '<li>nothing'


def report(argv):
    """Write the page of a log and print its verdict."""
    parse = commands.parser(__doc__.splitlines()[0], 'report', 'the page to write (default: report.html)')
    parse.set_defaults(out='report.html')
    parse.add_argument('--seeds-by', **commands.SEEDS_BY)
    args = parse.parse_args(argv)
    if Path(args.out).suffix != '.html':
        raise LogError(f'--out {args.out}: wanted a name that ends in .html')
    table, notes, _ = commands.read(args)
    record, more = analyse(table)
    said = (pq.read_schema(args.log).metadata or {}).get(logs.METADATA_KEY, '{}') if args.log.endswith('.parquet') else '{}'
    packages = ', '.join(f'{name} {version(name)}' for name in ('numpy', 'scipy', 'pandas', 'plotly'))
    text = page(table, record, notes + more, {
        'log': args.log, **{name: json.dumps(value) for name, value in json.loads(said).items() if value},
        'options': ' '.join([*(f'--where {one}' for one in args.where), f'--seeds-by {args.seeds_by}']),
        'versions': f'Python {platform.python_version()}, {packages}', 'date': date.today().isoformat()})
    logs.write_whole(args.out, lambda temporary: temporary.write_text(text))
    lines = [f'{record["collapse"]["verdict"]}: {record["collapse"]["verdict_reason"]}',
             f'{args.out}: {Path(args.out).stat().st_size / 1e6:.1f} MB']
    commands.finish(args, record, lines, [f'{part}: {reason}' for part, reason in record['missing'].items()] + notes + more)
