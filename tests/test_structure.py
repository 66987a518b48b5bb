"""The house: which room may import which, how large files are, and which packages are declared."""
import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# The rooms and what each may import of this repository besides itself.
MAY_IMPORT = {
    'analysis': set(),
    'token_files': set(),
    'model': set(), 'data': {'token_files'}, 'optimizer': {'model'},
    'trainer': {'model', 'data', 'optimizer', 'token_files', 'analysis'},
    'train': {'trainer', 'model', 'data', 'optimizer', 'analysis'},  # a run that watches itself
    'experiments': {'train', 'trainer', 'model', 'data', 'optimizer', 'token_files'},
    'save_logs': {'analysis'},
    'figures': {'analysis', 'save_logs'},
    'prepare_chess': {'token_files'}, 'prepare_cifar5m': {'token_files'},
    'benchmarks': {'train', 'trainer', 'model', 'data', 'optimizer', 'token_files', 'experiments', 'analysis', 'figures'},
}
TOP_LEVEL = set('''.ci .gitignore CITATION.cff LICENSE Makefile README.md analysis benchmarks configs data.py docs download_chess.sh
    download_cifar5m.sh experiments figures logs model.py optimizer.py prepare_chess.py prepare_cifar5m.py pyproject.toml
    requirements.lock save_logs.py tests token_files train.py trainer'''.split())


def tracked(pattern=''):
    names = subprocess.run(['git', 'ls-files', *[pattern][:bool(pattern)]], cwd=ROOT, capture_output=True, text=True)
    if names.returncode:
        pytest.skip('not a git checkout')
    return [ROOT / name for name in names.stdout.split('\n') if name and (ROOT / name).exists()]


def sources():
    return [path for path in tracked('*.py') if path.relative_to(ROOT).parts[0] != 'tests']


def module_of(path):
    name = '.'.join(path.relative_to(ROOT).with_suffix('').parts)
    return name.removesuffix('.__init__')


def imports(path):
    """The full names of what a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path} has a relative import'
            found |= {node.module} | {f'{node.module}.{name.name}' for name in node.names}
    return found


def graph():
    modules = {module_of(path): path for path in sources()}
    return {name: imports(path) & modules.keys() - {name} for name, path in modules.items()}


def test_every_arrow_points_down():
    wrong = [f'{name} imports {other}' for name, others in graph().items() for other in sorted(others)
             if (room := name.split('.')[0]) != other.split('.')[0] and other.split('.')[0] not in MAY_IMPORT[room]]
    assert not wrong, wrong


def test_no_import_is_circular():
    arrows = graph()
    done = set()

    def visit(name, path):
        assert name not in path, ' → '.join([*path[path.index(name):], name])
        if name not in done:
            for other in arrows[name]:
                if other != name.rpartition('.')[0]:  # a package's own __init__ is not an arrow
                    visit(other, [*path, name])
            done.add(name)

    for name in arrows:
        visit(name, [])


def test_analysis_needs_neither_jax_nor_matplotlib_nor_wandb():
    found = {name.split('.')[0] for path in sources() if path.relative_to(ROOT).parts[0] == 'analysis' for name in imports(path)}
    assert not found & {'jax', 'flax', 'optax', 'matplotlib', 'seaborn', 'wandb'}


def test_only_two_files_know_wandb():
    users = {module_of(path) for path in sources() if any(name.split('.')[0] == 'wandb' for name in imports(path))}
    assert users == {'trainer.wandb_logger', 'save_logs'}


def test_sizes():
    lines = {path: len(path.read_text().splitlines()) for path in sources()}
    assert not {str(path): n for path, n in lines.items() if n > 400}
    assert lines[ROOT / 'train.py'] <= 250
    assert sum(n for path, n in lines.items() if path.relative_to(ROOT).parts[0] != 'benchmarks') < 8_605
    assert len((ROOT / 'README.md').read_text().split()) <= 1500


def test_the_top_level_has_the_agreed_names():
    assert {path.relative_to(ROOT).parts[0] for path in tracked()} == TOP_LEVEL


def test_what_is_imported_is_declared_and_nothing_else():
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    names = lambda words: {re.match(r'[\w-]+', word)[0].lower().replace('_', '-') for word in words}  # noqa: E731
    declared, extras = names(project['dependencies']), project['optional-dependencies']
    distributions = importlib.metadata.packages_distributions()

    def used_by(paths):
        roots = {name.split('.')[0] for path in paths for name in imports(path)}
        return {distributions[root][0].lower().replace('_', '-') for root in roots
                if root not in sys.stdlib_module_names and root in distributions and not (ROOT / f'{root}.py').exists()
                and not (ROOT / root).is_dir()}

    assert used_by(sources()) - names(extras['chess']) - names(extras['notebooks']) == declared
    assert used_by(tracked('tests/*.py')) <= declared | names(extras['dev'])
