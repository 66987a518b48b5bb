"""The page of a ladder: verdict first, no network, a slider that moves the curves, and a reason for all that is missing.

The browser is Chromium without a window. Without it these tests are skipped.
"""

import html
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from analysis import collapse, scaling_law
from analysis import table as logs
from analysis.table import LogError
from figures import __main__ as commands_of
from figures import report
from tests.logs_of import power_law_table

# What the slider does, as a reader would: the curves and Δ before and after it is moved to its end.
MOVE = '''
const read = () => ({
  paths: [...document.querySelectorAll('#collapse .scatterlayer .js-line')].map(line => line.getAttribute('d')),
  delta: document.querySelector('#spread .scatterlayer .js-line').getAttribute('d'),
  text: document.getElementById('L0-text').textContent})
const slider = document.getElementById('L0'), before = read()
slider.value = slider.max
slider.dispatchEvent(new Event('input'))
await new Promise(done => setTimeout(done, 500))
return {before, after: read()}'''
# Figures that a browser has drawn, and what does not fit into the width of a phone.
LOOK = '''
const letters = [...document.querySelectorAll('body *')].filter(one => one.innerText && one.tagName != 'SUP')
return {figures: document.querySelectorAll('.js-plotly-plot .plot-container').length, width: document.documentElement.scrollWidth,
        window: innerWidth, smallest: Math.min(...letters.map(one => parseFloat(getComputedStyle(one).fontSize)))}'''


@pytest.fixture(scope='module')
def browse():
    """browse(page, script) -> (what the body of an async function returns in the page, lines of the browser's console)."""
    chromium = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if chromium is None:
        pytest.skip('needs the browser chromium, e.g. apt-get install chromium')

    def browsed(page, script, width=1000):
        probe = f'''<script>addEventListener("load", () => setTimeout(async () => {{
            const found = await (async () => {{{script}}})()
            document.documentElement.textContent = JSON.stringify(found) }}, 500))</script>'''
        copy = page.with_name('probe.html')
        copy.write_text(page.read_text() + probe)
        done = subprocess.run([chromium, '--headless', '--no-sandbox', '--disable-gpu', f'--user-data-dir={page.parent}/profile',
                               '--enable-logging=stderr', '--virtual-time-budget=9000', f'--window-size={width},900', '--dump-dom',
                               copy.as_uri()], capture_output=True, text=True, timeout=100, check=True)
        found = re.sub(r'<[^>]+>', '', done.stdout)
        return json.loads(html.unescape(found)), [line for line in done.stderr.splitlines() if 'CONSOLE' in line]

    return browsed


@pytest.fixture(scope='module')
def page(tmp_path_factory):
    """(path of the page of a planted ladder of four models and three seeds, its table)."""
    folder = tmp_path_factory.mktemp('page')
    table = power_law_table(np.random.default_rng(0), models=4, seeds=3, evals=40)
    logs.write_parquet(table, folder / 'log.parquet', source='planted <runs>')
    assert commands_of.main(['report', str(folder / 'log.parquet'), '--out', str(folder / 'page.html')]) == 0
    return folder / 'page.html', logs.clean(table)[0]


def written(tmp_path, table):
    """The page of a table."""
    table.to_csv(tmp_path / 'log.csv', index=False)
    assert commands_of.main(['report', str(tmp_path / 'log.csv'), '--out', str(tmp_path / 'page.html')]) == 0
    return tmp_path / 'page.html'


def words(path):
    """The text that a reader sees."""
    return html.unescape(re.sub(r'<[^>]+>', ' ', re.sub(r'<(script|style).*?</\1>', '', path.read_text(), flags=re.DOTALL)))


def test_the_verdict_comes_first_and_the_page_is_one_small_file(page):
    path, table = page
    result, _ = collapse.analyse(table)
    text = words(path)
    assert re.search(r'<h1>(.*?)</h1>', path.read_text())[1] == result['verdict']
    assert text.index(result['verdict_reason']) < text.index('Scaling law') < text.index('What more compute buys')
    assert path.stat().st_size < 6e6
    assert 'planted <runs>' in text and 'planted <runs>' not in path.read_text(), 'text of a log is escaped'
    assert [one.name for one in path.parent.iterdir() if 'tmp' in one.name] == []


def test_the_slider_moves_the_curves_and_the_tolerance(page, browse):
    found, console = browse(page[0], MOVE)
    before, after = found['before'], found['after']
    assert console == []
    assert len(before['paths']) == 4 and all(before['paths'])
    assert not set(before['paths']) & set(after['paths'])
    assert before['delta'] != after['delta'] and 'law' in before['text'] and before['text'] != after['text']


def test_an_error_of_a_script_is_seen(page, browse, tmp_path):
    """The control: without Plotly's script the console is not empty."""
    broken = tmp_path / 'broken.html'
    broken.write_text(page[0].read_text().replace('Plotly.newPlot', 'Plotly.newPlott'))
    assert browse(broken, 'return 0')[1]


@pytest.mark.parametrize('width', [500, 1200])  # headless Chromium has no narrower window than 500
def test_the_page_fits_its_window_and_its_letters_are_large(page, browse, width):
    found, _ = browse(page[0], LOOK, width)
    assert found['figures'] == 4 and found['width'] <= found['window'] and found['smallest'] >= 16


def test_each_step_of_the_slider_is_what_the_analysis_gives(page):
    _, table = page
    result, curves = collapse.analyse(table)[0], collapse.curves(table)
    steps, first = report.slider(curves, result)
    np.testing.assert_allclose(steps[first]['delta'], result['delta'][:-1], rtol=1e-3)  # of four digits
    np.testing.assert_allclose(steps[first]['sigma'], result['sigma'][:-1], rtol=1e-3)
    for L0, step in ((0.0, steps[0]), (result['fit']['L0'], steps[first])):
        mean = collapse.model_average(curves) @ collapse.normalise(curves, L0)
        np.testing.assert_allclose(mean, step['curves'], atol=1e-5)
    best = next(one for one in result['L0_choices'] if one['name'] == 'best')
    step = next(one for one in steps if '(best)' in one['text'])
    assert f'Δ(0.5) = {best["delta"]:.4f}, spread of the drop {best["drop_spread"]:.1%}' in step['text']


def test_larger_models_have_lower_losses_and_wider_intervals(page):
    points = scaling_law.optimal_points(page[1])
    rows = report.larger(points, scaling_law.fit(points.compute, points.loss), None)
    assert [row['times'] for row in rows] == [1, 2, 10, 100] and rows[0]['forecast'] is None
    assert np.all(np.diff([row['law'] for row in rows]) < 0)
    low, high = np.array([row['law_ci'] for row in rows]).T
    planted = 0.1 + 60 * np.sqrt(1 / np.sqrt([row['compute'] / 6 for row in rows]))  # 30·t^(-½) + 30·p^(-½) with t = p
    assert np.all(low < high) and np.all(np.abs(planted / (low + high) * 2 - 1) < 0.05)


def test_three_curves_of_one_seed_get_a_page_that_says_what_is_missing(tmp_path, browse):
    table = power_law_table(np.random.default_rng(1), models=3, seeds=1, evals=40)
    table = pd.concat([table, table[:20].assign(run='<cut>')])  # half a run, which is left out and named
    path = written(tmp_path, table[['run', 'num_params', 'tokens', 'test_loss']].rename(
        columns={'num_params': 'p', 'test_loss': 'loss'}))
    text = words(path)
    assert re.search('<h1>(.*?)</h1>', path.read_text())[1] == 'not decidable'
    for missing in ('no noise floor σ', 'three models: the fit is exact', 'the log lacks lr', 'the log lacks weight_decay',
                    'the end of each run counts as its C*', 'left out: <cut>'):
        assert missing in text, missing
    found, console = browse(path, MOVE)
    assert console == [] and not set(found['before']['paths']) & set(found['after']['paths'])


@pytest.mark.parametrize('models', [1, 2])
def test_too_few_models_for_a_law_get_a_page(tmp_path, models):
    text = words(written(tmp_path, power_law_table(np.random.default_rng(2), models=models, seeds=2, evals=40)))
    assert 'no scaling law, and so no L0' in text and 'forecast: ' in text


def test_what_is_no_ladder_is_answered_in_one_line(tmp_path, capsys, page):
    two = power_law_table(np.random.default_rng(3), models=3, seeds=2, evals=20)
    two['schedule'] = np.where(two['seed'] == 0, 'linear', 'cosine')
    two.to_csv(tmp_path / 'two.csv', index=False)
    assert commands_of.main(['report', str(tmp_path / 'two.csv')]) == 2
    assert 'choose one with --where schedule=' in capsys.readouterr().err
    assert commands_of.main(['report', str(tmp_path / 'two.csv'), '--out', 'page.pdf']) == 2
    assert 'ends in .html' in capsys.readouterr().err


def test_without_plotly_one_line_says_what_to_install(page, monkeypatch):
    monkeypatch.setitem(sys.modules, 'plotly', None)
    monkeypatch.delitem(sys.modules, 'figures.report_panels', raising=False)
    monkeypatch.delattr('figures.report_panels', raising=False)
    with pytest.raises(LogError, match='pip install plotly'):
        report.page(page[1], {}, [], [])
