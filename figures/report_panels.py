"""Plotly figures of one ladder as pieces of HTML, for the page of report.py."""

import numpy as np
from plotly import graph_objects as go
from plotly.colors import sample_colorscale
from plotly.offline import get_plotlyjs as script  # noqa: F401  the page inlines it

from analysis import scaling_law
from figures.style import BLUE, RED, count

X = {'title': 'x = C/C*, normalised', 'range': [0, 1]}
COMPUTE = {'type': 'log', 'title': 'compute C (FLOPs)', 'exponentformat': 'power', 'dtick': 1}
LOSS = {'type': 'log', 'title': 'loss', 'tickformat': '.3~g', 'nticks': 8}


def _html(name, traces, xaxis, yaxis):
    """The figure as HTML with the id `name`, with the letters of the page and no zoom, so that a finger scrolls the page."""
    axis = {'automargin': True, 'showgrid': True, 'fixedrange': True}
    figure = go.Figure(traces, {
        'template': 'simple_white', 'height': 480, 'margin': {'l': 10, 'r': 10, 't': 10, 'b': 10}, 'font': {'size': 16},
        'legend': {'orientation': 'h', 'yref': 'container', 'y': 0, 'yanchor': 'bottom'},
        'xaxis': axis | xaxis, 'yaxis': axis | yaxis})
    return figure.to_html(include_plotlyjs=False, full_html=False, div_id=name,
                          config={'responsive': True, 'displayModeBar': False})


def _line(x, y, name, colour, dash=None):
    return go.Scatter(x=x, y=y, name=name, mode='lines', line={'color': colour, 'width': 2, 'dash': dash})


def _points(x, y, name, colour, **options):
    return go.Scatter(x=x, y=y, name=name, mode='markers', marker={'color': colour, 'size': 9}, **options)


def _band(x, low, high, name, colour):
    return go.Scatter(x=[*x, *x[::-1]], y=[*high, *low[::-1]], mode='lines', fill='toself', fillcolor=colour, opacity=0.2,
                      line={'width': 0}, name=name, hoverinfo='skip')


def _models(p, x, y):
    """A line for each model, from dark to light in log p. x and y [M, K]."""
    place = np.log(p / p[0]) / max(np.log(p[-1] / p[0]), 1e-9)
    return [_line(*one) for one in zip(x, y, map(count, p), sample_colorscale('plasma', 0.88 * place), strict=True)]


def law(x, means, result, fitted):
    """The loss curves means [M, K] against compute, the losses at the horizons, and the fitted scaling_law.Law or None."""
    C = result['compute']
    wide = np.geomspace(C[0] / 2, C[-1] * 2)
    lines = [_line(wide, scaling_law.predict(fitted, wide), 'scaling law', 'black', 'dash')] if fitted else []
    return _html('law', [*_models(result['num_params'], C[:, None] * x, means), *lines,
                         _points(C, result['final_loss'], 'at C*', 'black')], COMPUTE, LOSS)


def collapse(x, step, result):
    """The normalised curves at one step of the slider. The page's script puts in those of the other steps."""
    curves = np.array(step['curves'])
    return _html('collapse', _models(result['num_params'], np.broadcast_to(x, curves.shape), curves), X,
                 {'title': 'normalised loss ℓ', 'range': step['range']})


def spread(step, result):
    """Δ and σ at one step of the slider, which moves the first two lines; and the 90% intervals with the law's L0."""
    x = result['x'][:-1]  # Δ is 0 at x = 1
    bands = [_band(x, *np.array(result[key])[:, :-1], name, colour) for key, name, colour in (
        ('delta_ci', 'Δ, 90% with L0 of the law', BLUE), ('sigma_ci', 'σ, 90%', RED)) if result[key] is not None]
    return _html('spread', [_line(x, step['delta'], 'tolerance Δ', BLUE), _line(x, step['sigma'], 'noise floor σ', RED), *bands], X,
                 {'type': 'log', 'title': 'relative deviation', 'tickformat': '.2~p', 'dtick': 'D2'})


def larger(result, rows, found):
    """Final loss against compute: measured, by the law, and forecast; with the whole forecast curve of one larger model."""
    at, traces = [row['compute'] for row in rows], [_points(result['compute'], result['final_loss'], 'measured', 'black')]
    if rows[0]['law']:
        traces.append(_line(at, [row['law'] for row in rows], 'law', 'black', 'dash'))
    if found:
        late = found['x'] >= 0.1
        C, mean, lo90, hi90 = (found[key][late] for key in ('x', 'mean', 'lo90', 'hi90'))
        traces += [_line(found['compute'] * C, mean, f'forecast, {count(found["num_params"])}', BLUE),
                   _band(found['compute'] * C, lo90, hi90, 'its 90%', BLUE)]
        middle, (low, high) = np.array([row['forecast'] for row in rows]), np.array([row['forecast_ci'] for row in rows]).T
        traces.append(_points(at, middle, 'final loss, 90%', BLUE, error_y={'array': high - middle, 'arrayminus': middle - low}))
    return _html('larger', traces, COMPUTE, LOSS)
