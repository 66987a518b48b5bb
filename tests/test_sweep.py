"""W&B with its real client: a sweep on preemptible machines from start to end, and a run without a server."""
import os
import time

import measure_sweep
import pytest

from trainer import run_folder, wandb_logger


@pytest.mark.slow
def test_a_sweep_survives_a_killed_machine_and_a_stopped_server(tmp_path):
    """The checks of measure_sweep.py on a smaller grid: every point finishes once, and every history is complete."""
    if 'SUPERCOLLAPSE_SHARED' not in os.environ:
        pytest.skip('needs a local stand-in for the W&B server: SUPERCOLLAPSE_SHARED/tools/wandb_loopback.py')
    found = measure_sweep.run_sweep(tmp_path, widths=[16, 24, 32], seeds=[0], steps=6000, outage=3)
    assert found['points'] == 3 and not found['unsupported']


def test_without_a_server_nothing_waits_and_nothing_is_lost(small_mlp, tmp_path, monkeypatch, capsys):
    """The port is closed. Logging does not wait. The end of the run waits for TIMEOUT and prints how to upload the run later."""
    for name, value in {'BASE_URL': 'http://127.0.0.1:9', 'API_KEY': 'a' * 40, 'ERROR_REPORTING': 'false'}.items():
        monkeypatch.setenv(f'WANDB_{name}', value)
    monkeypatch.setattr(wandb_logger, 'TIMEOUT', 1)
    run = small_mlp('wandb_mode=online', f'run_dir={tmp_path}/run')
    begin = time.monotonic()
    record = run_folder.RunFolder(run, 0)
    for step in range(100):
        record.log({'step': step, 'test_loss': 1 / (1 + step)})
    assert time.monotonic() - begin < 0.5
    record.close('finished')
    [warning] = [line for line in capsys.readouterr().err.splitlines() if line.startswith('warning:')]
    assert 'W&B does not answer' in warning and f'wandb sync --id {record.wandb_id} ' in warning
    (offline,) = (tmp_path / 'run' / 'wandb').glob('offline-run-*')
    assert b'0.0101010' in next(offline.glob('*.wandb')).read_bytes()  # the last row
