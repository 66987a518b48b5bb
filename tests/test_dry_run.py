"""The cost report of a run: what it counts, and that it needs neither data nor training."""
import json
import re

import jax
import pytest

from trainer import chips, dry_run


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
        return chips.peak_flops(chip, small_mlp(*overrides))

    assert peak('h100') == peak('h100', 'matmul_precision=tensorfloat32') < peak('h100', 'model.dtype=bfloat16')
    assert peak('v5e') == peak('v5e', 'model.dtype=bfloat16')  # a TPU multiplies bfloat16 by default
    assert peak('v5e', 'matmul_precision=tensorfloat32') == pytest.approx(peak('v5e') / 3, rel=1e-4)  # three passes of bfloat16


def test_bytes_and_flops_of_three_seeds(small_mlp):
    run = small_mlp('seeds=[0,1,2]')
    found = dry_run.measure(run, dry_run.open_stand_in(run), jax.devices())
    p = run.derived.num_params
    assert found['parameters'] == 3 * 4 * p  # float32
    assert found['moments'] == 3 * (2 * 4 * p + 4)  # two of each parameter, and Adam's step count
    assert found['sum'] == found['parameters'] + found['moments'] + found['other'] + found['temporary']
    assert found['flops'] > 3 * run.derived.flops_per_token * run.derived.tokens_per_step  # with elementwise work


def test_without_the_chips_compiler_the_figures_are_a_stand_ins(small_mlp, tmp_path, monkeypatch):
    monkeypatch.setattr(chips.importlib.util, 'find_spec', lambda name: None)
    run = small_mlp('dry_run_chip=v5e', f'dry_run_json={tmp_path}/figures.json')
    report = dry_run.report(run)
    assert "these figures are a stand-in's: the compiler of v5e is missing, pip install 'libtpu" in report and 'H100' not in report
    found = json.loads((tmp_path / 'figures.json').read_text())
    assert (found['chip'], found['own_compiler']) == ('v5e', False)
    one = found['devices']['1']
    assert one['fits'] and one['collectives'] == {} and one['peak_bytes'] > one['parameters'] == 4 * run.derived.num_params
    assert one['hours'] == pytest.approx(6 * run.derived.num_params * 640 / (0.4 * 197e12) / 3600)  # 640 examples


GPU_TEXT = '''  %all-gather-start = ((f32[8,4]{1,0}, f32[2]{0}), (f32[32,4]{1,0}, f32[8]{0})) all-gather-start(%a, %b), channel_id=1
  %all-gather-done = (f32[32,4]{1,0}, f32[8]{0}) all-gather-done(%all-gather-start)
  %all-reduce-start = f32[]{:T(128)} all-reduce-start(%c), channel_id=2, to_apply=%add
  ROOT %reduce-scatter.1 = bf16[1,16]{1,0:T(8,128)(2,1)} reduce-scatter(%d), channel_id=3, replica_groups={{0,1}}
  %reduce-scatter.2 = bf16[1,16]{1,0:T(8,128)(2,1)} reduce-scatter(%d), channel_id=3, replica_groups={{0,1}}'''


def test_bytes_of_collectives_are_those_of_their_results():
    """A TPU's program repeats the third one in each of its asynchronous parts."""
    assert chips.collectives(GPU_TEXT) == [('all-gather', [32, 4], 512), ('all-gather', [8], 32), ('all-reduce', [], 4),
                                           ('reduce-scatter', [1, 16], 32)]
