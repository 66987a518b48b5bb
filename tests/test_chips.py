"""Laws of the programs that the compilers of TPUs and NVIDIA GPUs make. Nothing runs on a chip:  make test-chips"""
import math
import os
import re
from functools import cache

import jax
import pytest

import model as models
from trainer import chips, config, dry_run

TPU, GPU = 'v5e', 'h100'
if missing := chips.missing(TPU) or chips.missing(GPU):
    pytest.skip(missing, allow_module_level=True)
os.environ['XLA_FLAGS'] = ''  # conftest.py turns optimisations off

# Five is a factor of the batch and of no weight, and so of the size of every array that holds something of the examples.
SMALL = ('chess', 'ds_path=absent', 'model.D=512', 'model.base_D=512', 'model.N=2', 'opt.B=40', 'T_eval=10240', 'T=1e8')
FSDP = (*SMALL, 'model.fsdp_enabled=true')
MUON = (*FSDP, 'opt.name=muon')
HOST = re.compile(r'\b(infeed|outfeed|send|recv)(-done)?\(|is_host_transfer=true|callback|:S\(5\)|\)S\(5\)')  # S(5): host memory


@pytest.fixture(scope='module')
def compiled(resolve):
    """compiled(chip, count, *words) -> (the run, what dry_run.measure found)."""
    @cache
    def found(chip, count, *words):
        run = resolve(*words)
        jax.config.update('jax_default_matmul_precision', run.matmul_precision)
        return run, dry_run.measure(run, dry_run.open_stand_in(run), list(chips.devices(chip)[:count]))

    jax.config.update('jax_enable_compilation_cache', False)
    yield found
    jax.config.update('jax_enable_compilation_cache', True)


@pytest.mark.parametrize('chip', [TPU, GPU])
def test_state_is_donated_and_nothing_visits_the_host(compiled, chip):
    for program in compiled(chip, 8, *FSDP)[1]['programs']:
        memory, text = program.memory_analysis(), program.as_text()
        metrics = 1 << 16  # bytes: an evaluation returns its metrics in new arrays, which a TPU pads
        assert memory.alias_size_in_bytes > 1e6 and memory.output_size_in_bytes - memory.alias_size_in_bytes < metrics
        assert not HOST.findall(text)
    assert HOST.search('%x = (f32[8], token[]) recv(%token)') and HOST.search('f32[8]{0:T(8)S(5)} copy')  # the control


@pytest.mark.parametrize('chip, words', [(TPU, FSDP), (GPU, FSDP), (GPU, (*FSDP, 'model.dtype=bfloat16', 'seeds=[0,1]')),
                                         (GPU, MUON)])
def test_with_fsdp_weights_and_gradients_travel_and_activations_do_not(compiled, chip, words):
    n = 8
    run, found = compiled(chip, n, *words)
    assert 'all-gather' in found['collectives'] and (chip == TPU or 'reduce-scatter' in found['collectives'])
    for program in found['programs']:
        for kind, shape, _ in chips.collectives(program.as_text()):
            # One all-reduce may join small weights and sums in a row. The smallest activation is [5, 128, 512].
            assert math.prod(shape) % 5 or len(shape) == 1 and shape[0] < 5 * 128 * 512, (kind, shape)
    weights = 4 * len(run.all_seeds) * run.derived.num_params
    muon = 15 * weights if run.opt.name == 'muon' else 0  # three products of split matrices in each of five Newton-Schulz steps
    assert weights / 8 < sum(found['collectives'].values()) < 1.5 * (2 * weights + weights / n) + muon


def test_without_fsdp_the_gradient_alone_travels(compiled):
    run, found = compiled(GPU, 8, *SMALL)
    assert set(found['collectives']) == {'all-reduce'}
    assert found['collectives']['all-reduce'] == pytest.approx(4 * run.derived.num_params, rel=0.01)  # and the loss


@pytest.mark.parametrize('chip', [TPU, GPU])
def test_eight_devices_hold_a_sixth_of_parameters_and_moments_at_most(compiled, chip):
    run, found = compiled(chip, 8, *FSDP)
    alone = 3 * 4 * run.derived.num_params  # bytes: p float32 numbers, and two moments of each
    assert alone / 8 < found['parameters'] + found['moments'] < alone / 6
    assert found['arguments'] < alone / 3  # by the compiler's count, with data and probe, which a TPU pads


def test_muon_splits_the_one_moment_of_a_hidden_weight(compiled):
    """A fifth at most, not a sixth: the embeddings, which are small and whole here, weigh more beside it."""
    run, found = compiled(GPU, 8, *MUON)
    alone = 3 * 4 * run.derived.num_params - 4 * models.param_groups(run.arch, run.model)['hidden']
    assert alone / 8 < found['parameters'] + found['moments'] < alone / 5


def scores(text, L):
    """Whether an array of the program has two axes of L in a row, as a head's attention scores have."""
    return re.search(rf'\[(\d+,)+{L},{L}\]', text) is not None


def test_attention_kernel_is_there_where_it_should_be(compiled):
    def text(*overrides):
        return compiled(GPU, 1, *SMALL, *overrides)[1]['programs'][0].as_text()

    fused, plain = text('model.dtype=bfloat16'), text()
    assert {'__cudnn$fmhaSoftmax', '__cudnn$fmhaSoftmaxBackward'} <= set(re.findall(r'custom_call_target="([^"]*)"', fused))
    assert '__cudnn' not in plain and scores(plain, 128) and not scores(fused, 128)


def test_long_sequences_take_splash_on_tpus(compiled):
    """Pallas' kernel, on two devices, with no axes [L, L] in a row."""
    words = ('model.D=128', 'model.base_D=128', 'model.N=1', 'model.L=1024', 'opt.B=8', 'T_eval=16384')
    for program in compiled(TPU, 2, *SMALL, *words)[1]['programs']:
        assert 'tpu_custom_call' in program.as_text() and not scores(program.as_text(), 1024)


def test_float16_is_refused(resolve):
    with pytest.raises(config.ConfigError, match='set model.dtype=bfloat16'):
        resolve(*SMALL, 'model.dtype=float16')


# The paper's sizes, as docs/performance.md states them

CHESS = ('chess', 'ds_path=absent', 'model.D=2048')
CIFAR5M = ('cifar5m', 'ds_path=absent', 'model.D=1024')


@pytest.mark.parametrize('limit, count, words', [
    (4.3e9, 8, (*CHESS, 'model.fsdp_enabled=true')), (2.6e9, 8, (*CHESS, 'model.fsdp_enabled=true', 'model.dtype=bfloat16')),
    (7.0e9, 1, (*CIFAR5M, 'model.dtype=bfloat16'))])
def test_paper_sizes_fit_an_h100(compiled, limit, count, words):
    found = compiled(GPU, count, *words)[1]
    assert limit / 2 < found['peak_bytes'] < limit
