"""docs/data.md: its commands run as they are written, and the corpus that needs no download is the same everywhere."""

import hashlib
import json
import os
import pydoc_data.topics
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import package_text

CHECKOUT = Path(__file__).parent.parent
TEXT = (CHECKOUT / 'docs' / 'data.md').read_text()


def section(heading):
    """The text of docs/data.md below a heading, up to the next one."""
    return re.search(rf'^## {heading}$(.*?)^## ', TEXT + '\n## ', re.M | re.S)[1]


def test_the_commands_for_ones_own_text_train_a_model(tmp_path):
    commands = re.search(r'```bash\n(.*?)```', section('Train on your own text'), re.S)[1].rstrip()
    commands += ' model.D=32 model.base_D=32 model.dh=32 model.N=1 num_evals=6\n'  # a smaller model saves a minute
    for source in ('train.py', 'model.py', 'data.py', 'optimizer.py'):
        shutil.copy(CHECKOUT / source, tmp_path)
    for package in ('trainer', 'token_files', 'analysis', 'configs'):
        shutil.copytree(CHECKOUT / package, tmp_path / package)
    (tmp_path / 'book.txt').write_text(Path(pydoc_data.topics.__file__).read_text()[:220_000])  # English text in every Python
    env = {**os.environ, 'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}', 'WANDB_MODE': 'disabled'}
    del env['JAX_NUM_CPU_DEVICES']  # as many devices as the machine has cores
    ran = subprocess.run(['bash', '-euo', 'pipefail', '-c', commands], cwd=tmp_path, env=env, capture_output=True, text=True,
                         timeout=300)
    assert ran.returncode == 0, ran.stderr
    unigram = float(re.search(r'([\d.]+) of test', (tmp_path / 'configs' / 'mytext.yaml').read_text())[1])
    [summary] = tmp_path.glob('runs/**/summary.json')
    history = [json.loads(line) for line in summary.with_name('history.jsonl').read_text().splitlines()]
    assert history[-1]['test_loss'] < unigram < history[0]['test_loss']  # it has learned more than how common each byte is


def test_every_script_and_configuration_in_the_page_exists():
    for name in re.findall(r'(?:python |\./|sh )([\w/]+\.(?:py|sh))', TEXT):
        assert (CHECKOUT / name).exists(), name
    for module in re.findall(r'python -m ([\w.]+)', TEXT):
        path = CHECKOUT / module.replace('.', '/')
        assert path.with_suffix('.py').exists() or (path / '__main__.py').exists(), module
    for name in set(re.findall(r'-cn (\w+)', TEXT)) - {'mytext'}:
        assert (CHECKOUT / 'configs' / f'{name}.yaml').exists(), name


def test_the_package_corpus_is_the_same_everywhere(tmp_path, monkeypatch):
    """Files come in the order of their names' checksums, no file is in both sets, and characters outside ASCII become '?'."""
    package = tmp_path / 'elsewhere' / 'some_package'
    (package / 'inner').mkdir(parents=True)
    names = [f'inner/part{i}.py' for i in range(20)] + ['__init__.py']
    for i, name in enumerate(names):
        (package / name).write_text(f'# {i} naïve\n\n')
    monkeypatch.syspath_prepend(tmp_path / 'elsewhere')
    monkeypatch.setattr(package_text, 'TEST_CHARACTERS', 60)
    monkeypatch.setattr(package_text, 'PIECE', 2)
    monkeypatch.setattr(package_text.importlib.metadata, 'version', lambda name: '1')
    package_text.make('some_package', tmp_path / 'text')
    test, train = ((tmp_path / 'text' / f'{name}.bin').read_bytes() for name in ('test', 'train'))
    order = sorted(range(21), key=lambda i: hashlib.sha256(names[i].encode()).digest())
    text = ''.join(f'# {i} na?ve\n' for i in order).encode()
    end = 60 + (text + b'\n').index(b'\n', 59) - 59  # the end of the file in which character 60 lies
    for found, wanted in ((test, text[:end]), (train, text[end:])):
        pieces = [wanted[i:i + 2] for i in range(0, len(wanted) - 1, 2)]
        assert sorted(pieces) == sorted(found[i:i + 2] for i in range(0, len(found), 2)) and found != wanted
    with pytest.raises(ValueError, match='no such package'):
        package_text.make('no_such_package', tmp_path / 'none')
