"""The chips of the dry run (chips.yaml), and their own compilers, which run without the chip.

libtpu compiles for TPUs, jax-cuda12-plugin for NVIDIA GPUs; both are Python packages (the extra `chips`). Nothing is executed.
"""
import importlib.util
import math
import os
import re
from pathlib import Path

import jax
import yaml
from jax.experimental import topologies

CHIPS = yaml.safe_load(Path(__file__).with_name('chips.yaml').read_text())
GPU = '''threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 shared_memory_per_block: 49152
    block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 thread_dim_limit_x: 1024
    thread_dim_limit_y: 1024 thread_dim_limit_z: 64 registers_per_core_limit: 65536 registers_per_block_limit: 65536
    dnn_version: "9.10.0" runtime_version: "12.8.0" driver_version: "13.0.0" compile_time_toolkit_version: "12.8.0"'''


def is_tpu(name) -> bool:
    return CHIPS[name]['label'].startswith('TPU')


def peak_flops(name, run) -> float:
    """Peak FLOP/s of a chip at the precision of the run's matrix products (model.dtype, matmul_precision)."""
    precision = 'bfloat16' if run.model.dtype == 'bfloat16' else run.matmul_precision
    return CHIPS[name][precision or ('bfloat16' if is_tpu(name) else 'tensorfloat32')]


def missing(name) -> str | None:
    """A sentence that says how to install the compiler of this chip; None if it is installed."""
    module, packages = (('libtpu', "'libtpu==0.0.42.*'") if is_tpu(name) else
                        ('jax_cuda12_plugin', 'jax-cuda12-plugin==0.10.2 jax-cuda12-pjrt==0.10.2'))
    return None if importlib.util.find_spec(module) else f'the compiler of {name} is missing, pip install {packages}'


def devices(name) -> list | None:
    """Eight devices of this kind to compile for; None if the package with its compiler is not installed."""
    if missing(name):
        return None
    if is_tpu(name):  # without a metadata server; libtpu would let one process in at a time
        os.environ |= {'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1', 'TPU_MIN_LOG_LEVEL': '3'}
        return topologies.get_topology_desc(platform='tpu', topology_name=CHIPS[name]['compile']).devices
    from jax._src.cudnn import fused_attention_stablehlo
    fused_attention_stablehlo.check_cudnn_version = lambda: 91000  # it would ask cuDNN, which is not here
    target = (f'gpu_device_info {{ {GPU} {CHIPS[name]["compile"]} }} platform_name: "CUDA" '
              'runtime_version { major: 12 minor: 8 } dnn_version_info { major: 9 minor: 10 } '
              f'device_description_str: "NVIDIA {CHIPS[name]["label"]}"')
    return topologies.get_topology_desc('any', 'cuda', target_config=target, topology='1x1x8').devices


# What a compiled program does

BYTES = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's16': 2, 'u16': 2, 's32': 4, 'u32': 4, 'f32': 4, 's64': 8, 'u64': 8}
COLLECTIVE = re.compile(r'= (.+?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\((.*?)\)'
                        r'.*?channel_id=(\d+)')


def costs(program) -> dict:
    """XLA's count of the program's FLOPs and bytes to and from memory, on each device; what a loop repeats is counted once."""
    found = program.cost_analysis()
    if found is None:  # of CUDA
        from jax._src.lib import xla_client  # nothing public counts them
        module, = program.runtime_executable().hlo_modules()
        found = xla_client._xla.hlo_module_cost_analysis(jax.devices('cpu')[0].client, module)
    return {'flops': found['flops'], 'bytes': found['bytes accessed']}


def collectives(text) -> list[tuple]:
    """(kind, shape, bytes) of the result of each collective on each device, from XLA's text of a program."""
    found = {}
    for line in text.splitlines():
        if match := COLLECTIVE.search(line):
            result, kind, start, operands, channel = match.groups()
            shapes = re.findall(r'\b([a-z]+\d*)\[([\d,]*)\]', re.sub(r'\{[^}]*\}', '', result))
            if start and kind != 'all-reduce':  # a tuple of operands, results and contexts
                count = operands.count('%')
                shapes = shapes[count:2 * count]
            shapes = [(BYTES[dtype], [int(n) for n in shape.split(',') if n]) for dtype, shape in shapes]
            # A TPU's program repeats a collective in each of its asynchronous parts.
            found[kind, channel] = [(kind, shape, size * math.prod(shape)) for size, shape in shapes]
    return sum(found.values(), [])
