"""The README's walk-through "Your own data", run as it stands."""

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

HERE = Path(__file__).parent.parent


def test_own_data_walk_through(tmp_path):
    section = re.search(r'^## Your own data$(.*?)^## ', (HERE / 'README.md').read_text() + '\n## ', re.M | re.S)[1]
    smaller = ' model.D=32 model.base_D=32 model.dh=32 model.N=1 num_evals=6\n'  # a minute less
    commands = re.search(r'```bash\n(.*?)```', section, re.S)[1].rstrip() + smaller
    for file in HERE.glob('*.py'):
        shutil.copy(file, tmp_path)
    shutil.copytree(HERE / 'configs', tmp_path / 'configs')
    (tmp_path / 'book.txt').write_text(Path(pydoc_data.topics.__file__).read_text()[:220_000])  # English, and everywhere
    env = {**os.environ, 'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}', 'WANDB_MODE': 'disabled'}
    del env['JAX_NUM_CPU_DEVICES']  # as many as the machine has cores
    ran = subprocess.run(['bash', '-euo', 'pipefail', '-c', commands], cwd=tmp_path, env=env, capture_output=True, text=True,
                         timeout=300)
    assert ran.returncode == 0, ran.stderr
    unigram = float(re.search(r'([\d.]+) of test', (tmp_path / 'configs' / 'mytext.yaml').read_text())[1])
    [summary] = tmp_path.glob('runs/**/summary.json')
    history = [json.loads(line) for line in summary.with_name('history.jsonl').read_text().splitlines()]
    assert history[-1]['test_loss'] < unigram < history[0]['test_loss']  # it has learnt more than how common each byte is


def test_sources_of_a_package_are_the_same_characters_everywhere(tmp_path, monkeypatch):
    """The order is that of the names' checksums, no file is in both sets, and what is no ASCII becomes '?'."""
    package = tmp_path / 'elsewhere' / 'some_package'
    (package / 'inner').mkdir(parents=True)
    names = [f'inner/part{i}.py' for i in range(20)] + ['__init__.py']
    for i, name in enumerate(names):
        (package / name).write_text(f'# {i} naïve\n\n')
    monkeypatch.syspath_prepend(tmp_path / 'elsewhere')
    monkeypatch.setattr(package_text, 'TEST', 60)
    monkeypatch.setattr(package_text, 'PIECE', 2)
    monkeypatch.setattr(package_text.importlib.metadata, 'version', lambda name: '1')
    package_text.make('some_package', tmp_path / 'text')
    test, train = ((tmp_path / 'text' / f'{name}.bin').read_bytes() for name in ('test', 'train'))
    order = sorted(range(21), key=lambda i: hashlib.sha256(names[i].encode()).digest())
    text = ''.join(f'# {i} na?ve\n' for i in order).encode()
    end = 60 + (text + b'\n').index(b'\n', 59) - 59  # of the file that reaches 60
    for found, wanted in ((test, text[:end]), (train, text[end:])):
        pieces = [wanted[i:i + 2] for i in range(0, len(wanted) - 1, 2)]
        assert sorted(pieces) == sorted(found[i:i + 2] for i in range(0, len(found), 2)) and found != wanted
    with pytest.raises(ValueError, match='no such package'):
        package_text.make('no_such_package', tmp_path / 'none')
