"""The tasks, power-law regression and next-token prediction, behind one small interface: `open_task(run)` gives a Task.

A batch is a function of (seed, step), so that a resumed run needs no loader state. token_files/ reads the files.
"""
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from token_files import files as token_files

BLOCK_BYTES = 1 << 25  # of training data sent to the device at a time: large enough to hide the transfer
BLOCK_STEPS = 1024
TEST_ROWS = 16  # opt.B of configs/bigram.yaml
GENERATED = ('fourier', 'bigram')  # the values of ds_path that name no folder


class Batch(NamedTuple):
    x: jax.Array       # model input: [B, 8] float32, or tokens [B, L]
    y: jax.Array       # target: [B] float32, or tokens [B, L]
    weight: jax.Array  # bool like y: which targets count


class Task(NamedTuple):
    block_steps: int                     # M
    block: Callable[[int], Any]          # k -> raw data of steps k·M … (k+1)·M - 1, a pytree of arrays [M, …]
    batch: Callable[[Any], Batch]        # one step's raw data -> Batch, traced on the device
    loss: Callable[[Any, Any], Any]      # (f, y) -> loss of every target, shaped like y
    test: Batch                          # the test batches, stacked: [n, B, …]
    per_seed: bool                       # raw data has a seed axis, [M, S, …]: every seed has its own order
    in_rows: bool                        # raw data holds the B examples, [M, (S,) B, …]; False: it is PRNG keys they are made from
    entropy: float | None = None         # loss of the true distribution on the test batches, nats; None: unknown


def open_task(run, seeds, rows=slice(None)) -> Task:
    """The task of a resolved run for these of its seeds. `rows` are the rows of each batch that this process reads from disk.

    Raises FileNotFoundError or ValueError with one line before any training.
    """
    if run.ds_path == 'fourier':
        return fourier_task(run)
    return bigram_task(run, rows) if run.ds_path == 'bigram' else token_task(run, seeds, rows)


def vocab_size(ds_path, data_needed=True) -> int | None:
    """The vocabulary size in a data set's meta file. None without a meta file, or without a data set if none is needed."""
    if ds_path in (None, *GENERATED) or not (data_needed or Path(str(ds_path)).exists()):
        return None
    return token_files.open_tokens(str(ds_path)).meta.vocab_size


def fast_compile_options() -> dict:
    """XLA options of a program that runs once: a CPU's compiler would spend seconds on optimising random draws."""
    return {'xla_backend_optimization_level': 0} if jax.default_backend() == 'cpu' else {}


def weighted_sum(loss, weight):
    """The sums of loss·weight and of weight, both [B, …]. The sums of the pieces of a batch add up to those of the batch."""
    return jnp.sum(loss * weight), jnp.sum(weight, dtype=jnp.float32)


def read_ahead(task, first_step, place):
    """Yields (first step, raw data) of each block, from the block that holds first_step on.

    The next block is read, and put on the devices by `place`, in the background.
    """
    def fetch(k):
        return place(task.block(k))

    k = first_step // task.block_steps
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(fetch, k)
        while True:
            block = ahead.result()
            k += 1
            ahead = reader.submit(fetch, k)
            yield (k - 1) * task.block_steps, block


# Power-law regression (paper, appendix A): y = Σ_i w_i √2 cos(2π k_i·x + φ_i), x uniform on [-½, ½]^8

def fourier_modes():
    """The target's modes, duplicates summed: (k [8, M], amplitude [M], phase [M] in turns), float32, M = 3,318.

    10,000 modes are drawn from PRNGKey(42) as in the published data: magnitudes with power-law exponent 2, directions, Gaussian
    weights of norm 1, phases 0 or π/2. k and -k are one mode, and a cosine and a sine of one k sum to one shifted cosine.
    """
    n = 10_000

    @partial(jax.jit, compiler_options=fast_compile_options())  # one program instead of forty
    def draws():
        magnitudes, directions, weights, phases = jax.random.split(jax.random.PRNGKey(42), 4)
        return (jax.random.uniform(magnitudes, (n,)), jax.random.normal(directions, (n, 8)), jax.random.normal(weights, (n,)),
                jax.random.bernoulli(phases, 0.5, (n,)))

    with jax.threefry_partitionable(True):  # the other setting draws another function
        u, direction, w, shifted = map(np.asarray, draws())
    r = (1 - u) ** np.float32(-0.5)
    k = np.rint(r[:, None] * direction / np.linalg.norm(direction, axis=1, keepdims=True)).astype(int)
    w = (w / np.linalg.norm(w)).astype(np.float64)
    first = k[np.arange(n), np.argmax(k != 0, axis=1)]
    sign = np.where(first < 0, -1, 1)
    k, which = np.unique(k * sign[:, None], axis=0, return_inverse=True)
    cosine = np.bincount(which, np.where(shifted, 0, w))
    sine = np.bincount(which, np.where(shifted, -w * sign, 0))
    amplitude, phase = np.sqrt(2) * np.hypot(cosine, sine), np.arctan2(-sine, cosine) / (2 * np.pi)
    return tuple(np.asarray(a, np.float32) for a in (k.T, amplitude, phase))


def cos_turns(t):
    """cos(2πt) in float32 with an error below 5e-7; 18 times as fast as jnp.cos on a CPU.

    The nearest whole turn is subtracted, which is exact. The rest r is the argument of an even polynomial, which interpolates
    cos(2π√z) at Chebyshev nodes of z = r² in [0, ¼] (degree 6: error 1.1e-8 in exact arithmetic).
    """
    fit = np.polynomial.Chebyshev.interpolate(lambda z: np.cos(2 * np.pi * np.sqrt(np.maximum(z, 0))), 6, domain=[0, 0.25])
    r = t - jnp.round(t)
    z = r * r
    y = 0.0
    for c in fit.convert(kind=np.polynomial.Polynomial).coef[::-1]:
        y = y * z + float(c)
    return y


def fourier_target(x, modes):
    """y [B] of inputs x [B, 8], computed in pieces of about 512 rows, whose [512, M] cosines fit in a cache.

    A piece takes every n-th row, so that devices that share the batch share every piece.
    """
    k, amplitude, phase = modes
    k_and_phase = np.vstack([k, phase])

    def piece(x):  # [rows, 8] -> [rows]
        x = jnp.pad(x, ((0, 0), (0, 1)), constant_values=1)  # the matrix product then adds the phase
        return jnp.matmul(cos_turns(jnp.matmul(x, k_and_phase, precision='float32')), amplitude, precision='float32')

    B = len(x)
    pieces = max(n for n in range(1, max(1, B // 512) + 1) if B % n == 0)
    y = jax.lax.map(piece, x.reshape(-1, pieces, 8).swapaxes(0, 1))
    return y.swapaxes(0, 1).reshape(B)


def fourier_task(run) -> Task:
    B, modes = run.opt.B, fourier_modes()

    def draw(key):
        with jax.threefry_partitionable(True):
            x = jax.random.uniform(key, (B, 8), minval=-0.5, maxval=0.5)
        return Batch(x, fourier_target(x, modes), jnp.ones(B, bool))

    @partial(jax.jit, static_argnums=1)
    def sample_keys(key, n):  # each batch splits the current key in two, the next key and the sample key: -> key, [n, 2]
        with jax.threefry_partitionable(True):
            return jax.lax.scan(lambda key, _: tuple(jax.random.split(key)), key, length=n)

    starts = [jax.random.PRNGKey(43)]  # the current key at the start of each block met so far

    def block(k):
        while len(starts) <= k:
            starts.append(sample_keys(starts[-1], BLOCK_STEPS)[0])
        return sample_keys(starts[k], BLOCK_STEPS)[1]

    test_keys = sample_keys(jax.random.PRNGKey(44), run.derived.num_test_batches)[1]
    test = jax.jit(lambda keys: jax.lax.map(draw, keys))(test_keys)
    return Task(BLOCK_STEPS, block, draw, lambda f, y: 0.5 * (f[:, 0] - y) ** 2, test, per_seed=False, in_rows=False)


# A power-law language: a Markov chain of tokens whose entropy is known

@cache
def bigram_language(V, zipf, exponent, std):
    """(transitions [V, V], stationary distribution [V], entropy in nats a token) of a first-order Markov chain over V tokens.

    The joint probability of two successive tokens a, b is r(a) exp(M[a, b]) c(b), with r and c such that either token alone follows
    Zipf's law, rank^-zipf. M [V, V] has random singular vectors, entries of standard deviation std, and the squared singular values
    k^(-2s), s = exponent > ½. The sum of those beyond V is spread over the upper half, so that all but the first D add up to about
    D^(1-2s)/(2s-1). A model of width D holds some D singular directions. With zipf = 0 its loss therefore exceeds the entropy by a
    power law in D.
    """
    rng, ranks = np.random.default_rng(42), np.arange(1.0, V + 1)
    beyond = V ** (1 - 2 * exponent) / (2 * exponent - 1)  # the sum of k^(-2s) over k > V
    singular = np.sqrt(ranks ** (-2 * exponent) + (ranks > V / 2) * beyond / (V / 2))

    def orthogonal():
        q, r = np.linalg.qr(rng.normal(size=(V, V)))
        return q * np.sign(np.diag(r))  # a LAPACK library may choose either sign

    M = orthogonal() * singular @ orthogonal()
    joint, unigram = np.exp(std / M.std() * M), ranks**-zipf / np.sum(ranks**-zipf)
    for _ in range(1000):  # Sinkhorn's algorithm
        joint *= (unigram / joint.sum(1))[:, None]
        change = unigram / joint.sum(0)
        joint *= change
        if np.abs(change - 1).max() < 1e-12:
            break
    else:
        raise ValueError(f'bigram_std={std:g}: the probabilities of pairs do not settle on the unigrams; lower it')
    transitions = joint / joint.sum(1, keepdims=True)
    return transitions, unigram, float(-np.sum(joint * np.log(transitions)))


@partial(jax.jit, static_argnums=(3, 4))
def bigram_tokens(seed, batches, table, B, L):
    """Tokens [M, B, L] int32 of these batches [M], each a function of (seed, number of the batch) alone.

    table [V + 1, V] uint32: cumulative probabilities after each token and, in the last row, of the first token, times 2^32.
    """
    V = table.shape[1]

    def next_token(token, u):  # each [M, B]; how many columns before the last are at most u, by binary search
        found = jnp.zeros_like(token)
        for bit in reversed(range(V.bit_length())):
            more = found + (1 << bit)
            found = jnp.where((more < V) & (table[token, more - 1] <= u), more, found)
        return found, found

    with jax.threefry_partitionable(True):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.PRNGKey(seed), batches)
        u = jax.vmap(lambda key: jax.random.bits(key, (L, B), 'uint32'))(keys)
    start = jnp.full((len(batches), B), V, jnp.int32)
    return jnp.moveaxis(jax.lax.scan(next_token, start, jnp.moveaxis(u, 1, 0))[1], 0, 2)


def bigram_task(run, rows) -> Task:
    """Batches of B sequences of L tokens of the language, the same ones for all seeds. Raises ValueError for V > 8192."""
    B, L, V = run.opt.B, run.model.L, run.model.V
    if V > 8192:
        raise ValueError(f'model.V={V}: the language would have a table of V² probabilities; set model.V to at most 8192')
    transitions, stationary, _ = bigram_language(V, run.bigram_zipf, run.bigram_exponent, run.bigram_std)
    cumulative = np.cumsum(np.vstack([transitions, stationary]), axis=1)
    table = jnp.asarray(np.minimum(np.rint(cumulative * 2**32), 2**32 - 1).astype(np.uint32))
    M = int(np.clip(BLOCK_BYTES // (4 * B * L), 1, BLOCK_STEPS))

    def block(k):
        return np.asarray(bigram_tokens(43, jnp.arange(k * M, (k + 1) * M), table, B, L))[:, rows]

    def batch(tokens):
        return Batch(tokens, *next_tokens(tokens, None, False))

    count = run.derived.num_test_batches * B  # test sequences, made TEST_ROWS at a time, so that they do not depend on B
    sequences = bigram_tokens(44, jnp.arange(-(-count // TEST_ROWS)), table, TEST_ROWS, L)
    test = batch(sequences.reshape(-1, L)[:count].reshape(-1, B, L))
    entropy = -np.log(transitions[test.x[..., :-1], test.x[..., 1:]]).mean()
    return Task(M, block, batch, optax.softmax_cross_entropy_with_integer_labels, test, per_seed=False, in_rows=True,
                entropy=float(entropy))


# Next-token prediction from token files

def token_task(run, seeds, rows) -> Task:
    """Batches of B sequences of L tokens. Raises ValueError if a file is too short or an id is not below V."""
    B, L, V = run.opt.B, run.model.L, run.model.V
    train, held_out = (token_files.open_tokens(run.ds_path, split) for split in ('train', 'test'))
    n = run.derived.num_test_batches
    if held_out.size < n * B * L:
        raise ValueError(f'{held_out.files[0]}: {held_out.size} test tokens are fewer than the {n * B * L} of T_eval={run.T_eval}; '
                         f'set T_eval to at most {held_out.size}')
    num_blocks = train.size // (B * L)
    if num_blocks < 1:
        raise ValueError(f'{train.files[0]}: {train.size} tokens are less than one batch of opt.B·model.L={B * L}; lower opt.B')
    for tokens in (train, held_out):
        token_files.check_ids(tokens, V)
    M = int(np.clip(BLOCK_BYTES // (B * L * train.dtype.itemsize), 1, BLOCK_STEPS))

    def block(k):
        if not run.shuffle:  # in file order, and again from the start
            return train.read(k * M * B * L, M * B * L).reshape(M, B, L)[:, rows]
        steps = np.arange(k * M, (k + 1) * M)
        order = [drawn_blocks(seed, steps, num_blocks).tolist() for seed in seeds]  # b·B·L may be over 2^31
        return np.stack([[train.read(b * B * L, B * L).reshape(B, L)[rows] for b in drawn] for drawn in order], 1)  # [M, S, B, L]

    def batch(tokens):
        y, weight = next_tokens(tokens, train.meta.pad_id, run.published_averaging)
        return Batch(tokens, y, weight)

    test = batch(held_out.read(0, n * B * L).reshape(n, B, L))
    return Task(M, block, batch, optax.softmax_cross_entropy_with_integer_labels, test, per_seed=run.shuffle, in_rows=True)


@partial(jax.jit, static_argnums=2)
def drawn_blocks(seed, steps, num_blocks):
    """Which of num_blocks blocks of the file a shuffled run reads at each of the steps [n]; a function of (seed, step) alone."""
    with jax.threefry_partitionable(True):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.PRNGKey(seed), steps)
        return jax.vmap(lambda key: jax.random.randint(key, (), 0, num_blocks))(keys)


def next_tokens(tokens, pad_id, published_averaging):
    """Targets y and bool weights, both like tokens [..., L]: each position predicts the next one of its sequence.

    The last position has no target and padding carries no loss. published_averaging counts every position instead, the last one
    predicting id 0, as the published losses do: about 1/L of such a loss comes from that position, and padding is learned too.
    """
    y = jnp.roll(tokens, -1, axis=-1).at[..., -1].set(0)
    if published_averaging:
        return y, jnp.ones(y.shape, bool)
    weight = jnp.ones(y.shape, bool).at[..., -1].set(False)
    return y, weight if pad_id is None else weight & (y != pad_id)
