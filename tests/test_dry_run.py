"""The cost report of a run: what it counts, and that it needs neither data nor training."""
import re

import jax
import pytest

from trainer import dry_run


@pytest.fixture(autouse=True)
def precision():
    """Restores the precision of matrix products, which a report sets for its run."""
    before = jax.config.jax_default_matmul_precision
    yield
    jax.config.update('jax_default_matmul_precision', before)


def hours(report, chip):
    """Hours of training on one chip of this kind."""
    return float(re.search(rf'^  {chip} +fits on 1: (\S+) h', report, re.MULTILINE)[1])


@pytest.mark.parametrize('shuffle', [True, False])
def test_report_of_token_files_that_are_absent(small_transformer, tmp_path, shuffle):
    run = small_transformer(tmp_path / 'absent', f'shuffle={shuffle}', 'seeds=[0,1]')
    report = dry_run.report(run)
    assert report.startswith(f'compiled for {jax.devices()[0].platform}; temporaries differ on other platforms')
    assert 'FLOPs of a step: ' in report and not list(tmp_path.iterdir())


def test_precision_of_matrix_products_changes_the_hours(small_mlp):
    """The peak of an H100 is 494 TFLOP/s in TF32, which is its default, and 67 in float32."""
    found = {precision: hours(dry_run.report(small_mlp('T=1e9', f'matmul_precision={precision}')), 'H100 80 GB')
             for precision in ('null', 'float32')}
    assert found['float32'] / found['null'] == pytest.approx(494 / 67, rel=0.01)  # printed with three digits


def test_peak_is_that_of_the_precision_in_use(small_mlp):
    def peak(chip, *overrides):
        return dry_run.peak_flops(chip, small_mlp(*overrides))

    assert peak('H100 80 GB') == peak('H100 80 GB', 'matmul_precision=tensorfloat32') < peak('H100 80 GB', 'model.dtype=bfloat16')
    assert peak('TPU v5e') == peak('TPU v5e', 'model.dtype=bfloat16')  # a TPU multiplies bfloat16 by default
    assert peak('TPU v5e', 'matmul_precision=tensorfloat32') == peak('TPU v5e') / 3  # three passes of bfloat16


def test_bytes_and_flops_of_three_seeds(small_mlp):
    run = small_mlp('seeds=[0,1,2]')
    found = dry_run.measure(run, dry_run.open_stand_in(run), jax.devices())
    p = run.derived.num_params
    assert found['parameters'] == 3 * 4 * p  # float32
    assert found['moments'] == 3 * (2 * 4 * p + 4)  # two of each parameter, and Adam's step count
    assert found['sum'] == found['parameters'] + found['moments'] + found['other'] + found['temporary']
    assert found['step_flops'] > 3 * run.derived.flops_per_token * run.derived.tokens_per_step  # with elementwise work
