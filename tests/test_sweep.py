"""W&B as users use it: a sweep on preemptible machines, end to end with the real client; what happens without a server."""
import os
import time

import measure_sweep
import pytest

from trainer import run_folder as record
from trainer import wandb_logger as mirror


@pytest.mark.slow
def test_a_sweep_outlives_a_killed_machine_and_a_server_that_is_gone(tmp_path):
    """Every point finished once, every history whole and the folder's own: measure_sweep.py's checks, on a smaller grid."""
    if 'SUPERCOLLAPSE_SHARED' not in os.environ:
        pytest.skip('needs a local stand-in for the W&B server: SUPERCOLLAPSE_SHARED/tools/wandb_loopback.py')
    found = measure_sweep.run_sweep(tmp_path, widths=[16, 24, 32], seeds=[0], steps=6000, outage=3)
    assert found['points'] == 3 and not found['unsupported']


def test_without_a_server_nothing_waits_and_nothing_is_lost(small_mlp, tmp_path, monkeypatch, capsys):
    """The port is closed. Rows are taken at once; the run's end waits for its patience, and says what to upload later."""
    for name, value in {'BASE_URL': 'http://127.0.0.1:9', 'API_KEY': 'a' * 40, 'ERROR_REPORTING': 'false'}.items():
        monkeypatch.setenv(f'WANDB_{name}', value)
    monkeypatch.setattr(mirror, 'PATIENCE', 1)
    run = small_mlp('wandb_mode=online', f'run_dir={tmp_path}/run')
    begin = time.monotonic()
    one = record.Record(run, 0)
    for step in range(100):
        one.log({'step': step, 'test_loss': 1 / (1 + step)})
    assert time.monotonic() - begin < 0.5
    one.close('finished')
    [warning] = [line for line in capsys.readouterr().err.splitlines() if line.startswith('warning:')]
    assert 'W&B does not answer' in warning and f'wandb sync --id {one.wandb_id} ' in warning
    (offline,) = (tmp_path / 'run' / 'wandb').glob('offline-run-*')
    assert b'0.0101010' in next(offline.glob('*.wandb')).read_bytes()  # the last row
