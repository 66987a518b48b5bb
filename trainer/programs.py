"""The compiled programs of a run: initialise, train and evaluate, for all its seeds at once, and how their arrays are sharded.

The functions are pure and written for one seed. `over_seeds` is the one place that maps them over several.
"""
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import data
import model as models
import optimizer
from trainer import distributed

CACHE_BYTES = 1 << 20  # of a CPU core's own (L2) cache
PROBE_BYTES = 1 << 26  # of features and logits kept between evaluations, all seeds together: 64 MiB
WHOLE_BYTES = 1 << 20  # a smaller weight stays whole with FSDP: its collectives would cost latency and save next to nothing


class State(NamedTuple):
    """All that training needs to resume, for one seed. In the compiled programs every leaf has a seed axis in front."""
    params: Any
    moments: Any           # of the optimiser
    step: jax.Array        # updates done
    loss_sum: jax.Array    # of the training batches since the last evaluation
    loss_count: jax.Array
    probe: tuple           # features and logits of the first test batch at the last evaluation


class Problem(NamedTuple):
    """What the functions below are given besides arrays; constant while a run trains."""
    run: Any         # config.Run
    task: data.Task
    mesh: Any        # of the devices, with the one axis 'data'
    graphdef: Any    # of the model: nnx.merge(graphdef, params) is callable
    transform: Any   # optax.GradientTransformation
    in_turn: bool    # the seeds are taken one after the other
    probe_rows: int  # sequences of the first test batch whose features and logits are compared between evaluations
    probe_spec: Any  # PartitionSpec of these: they are split over the devices if their number divides them


class Programs(NamedTuple):
    """The jitted programs of a run with S seeds, and the shardings of their arguments."""
    init: Any      # (keys [S], test) -> State
    train: Any     # (state, peak_lrs, raw data of M steps, lr_scales [M], first, count) -> State, `count` steps on from row `first`
    evaluate: Any  # (state, peak_lrs, test) -> State, {name: [S]}
    raw_sharding: Any
    test_sharding: Any
    state_shardings: Any


def build(run, task, devices=None) -> Programs:
    """The programs of a run on these devices (default: distributed.devices_for). Nothing is compiled yet."""
    devices = devices or distributed.devices_for(run.opt.B, run.derived.microbatches)
    mesh = jax.sharding.Mesh(devices, ('data',))
    problem = make_problem(run, task, mesh)
    seed_axis = [None] * task.per_seed  # in front of the examples of a batch
    whole = NamedSharding(mesh, PartitionSpec())
    batch_sharding = NamedSharding(mesh, PartitionSpec(*seed_axis, 'data'))
    raw_sharding = NamedSharding(mesh, PartitionSpec(None, *seed_axis, 'data')) if task.in_rows else whole

    init = over_seeds(partial(initial_state, problem), key=0, test=None)
    keys = jax.random.split(jax.random.key(0), len(run.all_seeds))
    state = jax.eval_shape(init, keys, task.test)
    specs = jax.tree.map(lambda leaf: storage(run, mesh, leaf.shape[1:]), state)._replace(probe=(problem.probe_spec,) * 2)
    state_shardings = jax.tree.map(lambda spec: NamedSharding(mesh, PartitionSpec(None, *spec)), specs)
    options = distributed.compiler_options(devices)
    return Programs(
        init=jax.jit(init, out_shardings=state_shardings, compiler_options=data.fast_compile_options()),
        train=jax.jit(partial(train_steps, problem, batch_sharding), donate_argnums=0, out_shardings=state_shardings,
                      compiler_options=options),
        evaluate=jax.jit(over_seeds(partial(evaluate, problem), problem.in_turn, state=0, peak_lrs=None, test=None),
                         donate_argnums=0, out_shardings=(state_shardings, whole), compiler_options=options),
        raw_sharding=raw_sharding,
        test_sharding=NamedSharding(mesh, PartitionSpec(None, 'data')),
        state_shardings=state_shardings)


def make_problem(run, task, mesh) -> Problem:
    attention = attention_of(run, mesh.devices.flat[0])
    options = {'attention': partial(models.causal_attention, implementation=attention, mesh=mesh)} if attention else {}
    graphdef, _, _ = models.structure(run.arch, run.model, **options)
    entries = len(run.all_seeds) * run.model.L * (run.model.D + run.model.V)  # float32 numbers of features and logits a sequence
    rows = max(1, min(run.opt.B // run.derived.microbatches, PROBE_BYTES // (4 * entries)))
    spec = PartitionSpec('data' if rows % mesh.size == 0 else None)
    return Problem(run, task, mesh, graphdef, optimizer.transformation(run), seeds_in_turn(run, mesh.devices.flat), rows, spec)


def attention_of(run, device) -> str | None:
    """The implementation of the attention of a run on this kind of device (model.attention_for); None for an MLP."""
    return None if run.arch == 'mlp' else models.attention_for(run.model, device)


def describe(run, devices) -> str:
    """A line for the user: the devices of a run, and how they are used."""
    attention = attention_of(run, devices[0])
    return f'training on {len(devices)} × {devices[0].device_kind}' + (f', attention: {attention}' if attention else '')


# Sharding

def storage(run, mesh, shape) -> PartitionSpec:
    """How a weight of this shape, its moments and its gradient are stored.

    With FSDP a weight is split along its first axis that the number of devices divides. Small weights, and all without FSDP, are
    whole on every device.
    """
    large = run.model.fsdp_enabled and 4 * len(run.all_seeds) * math.prod(shape) >= WHOLE_BYTES
    axis = next((i for i, size in enumerate(shape) if size % mesh.size == 0), None) if large else None
    return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, 'data')


def gather(problem, params):
    """The weights, whole on every device, as all passes use them: weights and gradients travel, activations do not."""
    return jax.lax.with_sharding_constraint(params, NamedSharding(problem.mesh, PartitionSpec()))


def scatter(problem, gradient):
    """The gradient, summed over the devices and stored like the weights."""
    return jax.tree.map(lambda g: jax.lax.with_sharding_constraint(
        g, NamedSharding(problem.mesh, storage(problem.run, problem.mesh, g.shape))), gradient)


def over_seeds(function, in_turn=False, **axes):
    """The function over all seeds: a named argument has a seed axis in front (0) or is shared (None).

    All seeds at once (jax.vmap), or one after the other (jax.lax.map).
    """
    if not in_turn:
        return jax.vmap(function, in_axes=tuple(axes.values()))

    def mapped(*arguments):
        named = dict(zip(axes, arguments, strict=True))
        shared = {name: argument for name, argument in named.items() if axes[name] is None}
        own = {name: argument for name, argument in named.items() if axes[name] == 0}
        return jax.lax.map(lambda one: function(**shared, **one), own)

    return mapped


def seeds_in_turn(run, devices) -> bool:
    """Whether the seeds are taken one after the other.

    On several GPUs with cuDNN's attention, which joins the seeds to the batch: the batch would have to be gathered. On a CPU where
    one seed's features [rows, D] alone fill the cache of a core, which is then faster (docs/performance.md).
    """
    if len(devices) > 1 and attention_of(run, devices[0]) == 'cudnn':
        return True
    rows = run.opt.B // run.derived.microbatches * run.model.L // len(devices)
    return devices[0].platform == 'cpu' and 4 * rows * run.model.D >= CACHE_BYTES


# One seed

def initial_state(problem, key, test):
    run = problem.run
    params = models.init(run.arch, run.model, key)
    empty = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(partial(probe, problem), params, test))
    return State(params, problem.transform.init(params), jnp.int32(0), jnp.float32(0), jnp.int32(0), empty)


def loss_sum(problem, params, batch):
    """(sum of the losses of the targets that count, their number) of a batch."""
    f, _ = nnx.merge(problem.graphdef, params)(batch.x)
    return data.weighted_sum(problem.task.loss(f, batch.y), batch.weight)


def batch_gradient(problem, params, batch):
    """((loss sum, weight), gradient of the mean loss) of a batch, accumulated over run.derived.microbatches pieces.

    params are gathered here, so that an evaluation's passes keep no whole weights. The gradient is stored like the weights.
    """
    params = gather(problem, params)

    def piece_gradient(batch):
        (total, weight), g = jax.value_and_grad(partial(loss_sum, problem), has_aux=True)(params, batch)
        return total, weight, scatter(problem, g)

    n = problem.run.derived.microbatches
    if n == 1:
        total, weight, g = piece_gradient(batch)
    else:
        # A piece takes every n-th example, so that each device holds an equal share of each piece.
        pieces = jax.tree.map(lambda a: a.reshape(-1, n, *a.shape[1:]).swapaxes(0, 1), batch)
        shapes = jax.eval_shape(piece_gradient, jax.tree.map(lambda a: a[0], pieces))
        zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
        (total, weight, g), _ = jax.lax.scan(lambda sums, b: (jax.tree.map(jnp.add, sums, piece_gradient(b)), None), zero, pieces)
    return (total, weight), jax.tree.map(lambda g: g / jnp.maximum(weight, 1), g)  # without a target that counts, the gradient is 0


def probe(problem, params, test):
    """Features and logits, float32, of the first rows of the first test batch."""
    rows = jax.lax.with_sharding_constraint(test.x[0, :problem.probe_rows], NamedSharding(problem.mesh, problem.probe_spec))
    f, h = nnx.merge(problem.graphdef, gather(problem, params))(rows)
    return h.astype(jnp.float32), f


def train_step(problem, state, peak_lrs, batch, lr_scale):
    """The state after one update, with the learning rates peak_lrs · lr_scale."""
    (total, weight), g = batch_gradient(problem, state.params, batch)
    updates, moments = problem.transform.update(g, state.moments, state.params)
    params = optimizer.apply_updates(state.params, updates, peak_lrs, lr_scale)
    return state._replace(params=params, moments=moments, step=state.step + 1,
                          loss_sum=state.loss_sum + total / jnp.maximum(weight, 1), loss_count=state.loss_count + 1)


def evaluate(problem, state, peak_lrs, test):
    """(state with the running training loss reset, {name: scalar}): losses and gradient trace on the test batches [n, B, …]."""
    run = problem.run
    P = optimizer.preconditioner(state.moments, peak_lrs, run)
    (totals, weights), trace = optimizer.gradient_trace(partial(batch_gradient, problem, state.params), test, P, run.opt.B)
    h, f = probe(problem, state.params, test)
    metrics = {'test_loss': jnp.sum(totals) / jnp.sum(weights), 'train_loss': state.loss_sum / state.loss_count, **trace,
               'h': rms(h), 'f': rms(f), 'dh': rms(h - state.probe[0]), 'df': rms(f - state.probe[1])}
    return state._replace(loss_sum=jnp.float32(0), loss_count=jnp.int32(0), probe=(h, f)), metrics


def rms(a):
    return jnp.sqrt(jnp.mean(a * a))


# All seeds

def train_steps(problem, batch_sharding, state, peak_lrs, raw, lr_scales, first, count):
    """The state after `count` steps from row `first` of the raw data [M, …] and of lr_scales [M]."""
    task = problem.task
    step = over_seeds(partial(train_step, problem), problem.in_turn,
                      state=0, peak_lrs=None, batch=0 if task.per_seed else None, lr_scale=None)

    def body(i, state):
        batch = task.batch(jax.tree.map(lambda a: a[i], raw))
        return step(state, peak_lrs, jax.lax.with_sharding_constraint(batch, batch_sharding), lr_scales[i])

    return jax.lax.fori_loop(first, first + count, body, state)
