"""The two tasks: power-law data against a naive construction of the published stream, token batches against plain slices."""
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import data

# Power-law regression

def naive_modes():
    """The 10,000 published modes, drawn in the published order: k [n, 8] integers, w [n], phase [n] in radians; float64."""
    n = 10_000
    k_magnitude, k_direction, k_weight, k_phase = jax.random.split(jax.random.PRNGKey(42), 4)
    r = np.asarray((1 - jax.random.uniform(k_magnitude, (n,))) ** (-1 / 2))
    direction = np.asarray(jax.random.normal(k_direction, (n, 8)))
    k = np.round(r[:, None] * (direction / np.sqrt((direction**2).sum(1, keepdims=True))))
    w = np.asarray(jax.random.normal(k_weight, (n,)), np.float64)
    phase = np.where(np.asarray(jax.random.bernoulli(k_phase, 0.5, (n,))), np.pi / 2, 0)
    return k.astype(np.float64), w / np.sqrt((w**2).sum()), phase


def naive_stream(seed, n, B):
    """The first n batches of inputs [n, B, 8]. Each splits the current key into the next key and the key of its inputs."""
    key, out = jax.random.PRNGKey(seed), []
    for _ in range(n):
        key, sample = jax.random.split(key)
        out.append(np.asarray(jax.random.uniform(sample, (B, 8), minval=-0.5, maxval=0.5)))
    return np.array(out)


def naive_target(x, modes):
    k, w, phase = modes
    return np.sqrt(2) * np.cos(2 * np.pi * x.astype(np.float64) @ k.T + phase) @ w


@pytest.fixture(scope='module')
def fourier(small_mlp):
    return data.fourier_task(small_mlp())


def batches(task, steps):
    """The training batches of these steps, read from the blocks that hold them."""
    draw = jax.jit(task.batch)
    return [draw(jax.tree.map(lambda a, i=i: a[i % task.block_steps], task.block(i // task.block_steps))) for i in steps]


def test_target_agrees_with_ten_thousand_cosines():
    modes = naive_modes()
    x = naive_stream(43, 1, 256)[0]
    distinct = data.fourier_modes()
    y = jax.jit(lambda x: data.fourier_target(x, distinct))(x)
    want = naive_target(x, modes)
    # The float32 argument 2π·k·x, with |k| up to 56, is good to 1e-5. Weights w are of order 0.01. Measured: 1.1e-6.
    np.testing.assert_allclose(y, want, atol=1e-5)
    assert np.abs(want - naive_target(x, (modes[0], modes[1], 0 * modes[2]))).max() > 0.1  # the control: the phases matter


def test_published_facts_of_the_modes():
    k, _, phase = naive_modes()
    first = k[np.arange(len(k)), np.argmax(k != 0, axis=1)]
    direction = np.where(first < 0, -k.T, k.T).T  # k and -k are one mode
    assert len(np.unique(np.column_stack([direction, phase]), axis=0)) == 3908  # published
    distinct = data.fourier_modes()[0]
    assert distinct.shape[1] == len(np.unique(direction, axis=0))  # a cosine and a sine of one k are one mode too
    assert abs(distinct).max() == abs(k).max() == 56


def test_half_the_mean_square_of_the_published_test_batches(resolve):
    test = data.fourier_task(resolve('mlp')).test
    assert test.y.shape == (24, 4096)
    # Published with five digits. The sum of 98,304 float32 squares is good to 1e-6.
    assert float(jnp.mean(test.y**2) / 2) == pytest.approx(0.47689, abs=2e-5)


def test_inputs_are_the_published_streams(fourier):
    n = len(fourier.test.x)
    np.testing.assert_array_equal(fourier.test.x, naive_stream(44, n, 32))
    drawn = np.array([b.x for b in batches(fourier, range(5))])
    np.testing.assert_array_equal(drawn, naive_stream(43, 5, 32))
    assert abs(drawn).max() <= 0.5 and not np.isin(fourier.test.x, drawn).any()  # train and test are disjoint


def test_a_power_law_batch_is_a_function_of_the_step(small_mlp, monkeypatch):
    monkeypatch.setattr(data, 'BLOCK_STEPS', 4)
    first, second = data.fourier_task(small_mlp()), data.fourier_task(small_mlp('seed=7'))
    blocks = {k: np.asarray(first.block(k)) for k in (0, 1, 2, 3)}
    for k in (3, 0, 2, 1):  # in another order, with another seed
        np.testing.assert_array_equal(second.block(k), blocks[k])
    np.testing.assert_array_equal([b.x for b in batches(second, range(3, 10))], naive_stream(43, 10, 32)[3:])
    assert len(np.unique(np.concatenate(list(blocks.values())), axis=0)) == 16  # no key twice


def test_random_stream_does_not_depend_on_the_setting_of_jax(fourier, small_mlp):
    """Batches and modes are the same under both values of jax_threefry_partitionable. Other draws are not."""
    usual = np.asarray(jax.random.uniform(jax.random.PRNGKey(0), (16,)))
    with jax.threefry_partitionable(False):
        other = data.fourier_task(small_mlp())
        (a,), (b,) = batches(fourier, [3]), batches(other, [3])
        modes = data.fourier_modes()
        assert not np.array_equal(jax.random.uniform(jax.random.PRNGKey(0), (16,)), usual)  # the control
    np.testing.assert_array_equal(a.x, b.x)
    np.testing.assert_array_equal(a.y, b.y)
    np.testing.assert_array_equal(fourier.test.x, other.test.x)
    for found, usual in zip(modes, data.fourier_modes(), strict=True):
        np.testing.assert_array_equal(found, usual)


def test_cosine_of_turns_is_accurate_for_many_turns():
    t = np.random.default_rng(0).uniform(-250, 250, 10_000).astype(np.float32)
    np.testing.assert_allclose(data.cos_turns(t), np.cos(2 * np.pi * t.astype(np.float64)), atol=5e-7)  # as its docstring says


# Token files

@pytest.fixture
def open_small(small_transformer):
    def opened(folder, *overrides, seeds=(0,)):
        run = small_transformer(folder, *overrides)
        return run, data.open_task(run, list(seeds))

    return opened


def test_batch_b_is_the_bth_block_and_the_file_wraps_around(write_tokens, open_small, monkeypatch):
    folder = write_tokens()
    tokens = np.fromfile(folder / 'train.bin', np.uint8)
    monkeypatch.setattr(data, 'BLOCK_BYTES', 8 * 16 * 3)  # three batches a block; the 5,000 tokens end inside the 40th batch
    run, task = open_small(folder)
    B, L = run.opt.B, run.model.L
    assert task.block_steps == 3
    for step in (100, 0, 38, 39, 40, 5):  # in any order
        start = step * B * L
        want = tokens[np.arange(start, start + B * L) % len(tokens)].reshape(B, L)
        (batch,) = batches(task, [step])
        np.testing.assert_array_equal(batch.x, want)
        np.testing.assert_array_equal(batch.y[:, :-1], want[:, 1:])
        assert batch.weight[:, :-1].all() and not batch.weight[:, -1].any()  # the last position has no target
    test = np.fromfile(folder / 'test.bin', np.uint8)[:run.derived.num_test_batches * B * L]
    np.testing.assert_array_equal(task.test.x, test.reshape(-1, B, L))


def test_uint16_shards_are_read_as_one_stream(tmp_path, open_small):
    rng = np.random.default_rng(3)
    header = np.zeros(256, '<i4')
    train, n = rng.integers(0, 60, 3000).astype('<u2'), 1234
    train[7] = 1000  # does not fit in uint8
    for name, part in (('x_train_000001', train[:n]), ('x_train_000002', train[n:]), ('x_val_000000', train[:512])):
        header[:3] = 20240520, 1, len(part)
        with open(tmp_path / f'{name}.bin', 'wb') as f:
            header.tofile(f)
            part.tofile(f)
    run, task = open_small(tmp_path, 'model.V=1024')
    for step in (0, 9, 23):  # within a shard, across shards, across the end
        start = step * 8 * 16
        (batch,) = batches(task, [step])
        np.testing.assert_array_equal(batch.x, train[np.arange(start, start + 128) % 3000].reshape(8, 16))
    assert batches(task, [0])[0].x.max() == 1000


def test_shuffled_blocks_depend_on_seed_and_step_alone(write_tokens, open_small):
    folder = write_tokens(train=np.repeat(np.arange(39), 128).astype(np.uint8))  # block b holds only the id b
    run, both = open_small(folder, 'shuffle=true', seeds=(0, 1))
    _, alone = open_small(folder, 'shuffle=true', 'seed=1', seeds=(1,))
    _, ordered = open_small(folder)
    order = both.block(0)[:200]  # [steps, seeds, B, L]
    assert (order == order[..., :1, :1]).all()
    order = order[..., 0, 0]
    np.testing.assert_array_equal(order[:, 1], alone.block(0)[:200, 0, 0, 0])
    assert (order[:, 0] != order[:, 1]).mean() > 0.8  # 38/39 of them, for independent draws
    assert len(np.unique(order[:, 0])) > 35  # 200 draws miss each of 39 blocks with probability 0.6%
    np.testing.assert_array_equal(ordered.block(0)[:78, 0, 0], np.tile(np.arange(39), 2))  # the control: file order
    step_100 = data.drawn_blocks(1, np.array([100]), 39)
    assert step_100[0] == order[100, 1]


def test_shuffled_blocks_beyond_two_billion_tokens(write_tokens, open_small):
    """Positions in the file do not fit in 32 bits, which the numbers of blocks do. The file is sparse and takes no disk space."""
    folder = write_tokens()
    os.truncate(folder / 'train.bin', 5 << 30)
    drawn = np.asarray(data.drawn_blocks(0, np.arange(100), (5 << 30) // 128))
    step = int(np.argmax(drawn > (4 << 30) // 128))
    with open(folder / 'train.bin', 'r+b') as file:
        file.seek(int(drawn[step]) * 128)
        file.write(bytes(range(100, 228)))
    _, task = open_small(folder, 'shuffle=true', 'model.V=256')
    np.testing.assert_array_equal(task.block(0)[step, 0].ravel(), np.arange(100, 228))


@pytest.mark.parametrize('meta, published', [(None, False), ({'pad_id': 0}, False), ({'pad_id': 5}, False), ({'pad_id': 0}, True)])
def test_which_targets_count(write_tokens, open_small, meta, published):
    """The meta file of the data set names the padding id. Without one, id 0 counts."""
    tokens = np.random.default_rng(0).integers(0, 8, 5000, np.uint8)
    _, task = open_small(write_tokens(meta, train=tokens, test=tokens[:1024]), f'published_averaging={published}')
    for batch in (*batches(task, [0, 2]), jax.tree.map(lambda a: a[1], task.test)):
        x, y, weight = map(np.asarray, batch)
        for row in range(8):
            for s in range(16):
                if s < 15:
                    assert y[row, s] == x[row, s + 1]
                    assert weight[row, s] == (published or meta is None or y[row, s] != meta['pad_id'])
                else:  # published: the last position predicts id 0, which counts
                    assert weight[row, s] == published and (not published or y[row, s] == 0)


def test_published_averaging_is_the_mean_over_every_position(write_tokens, open_small):
    """The published loss is the sum of -log softmax over all positions, with target 0 at the last one, divided by B·L."""
    tokens = np.random.default_rng(0).integers(0, 54, 5000, np.uint8)
    tokens[::3] = 0
    _, task = open_small(write_tokens({'pad_id': 0}, train=tokens), 'published_averaging=true')
    (batch,) = batches(task, [1])
    f = np.random.default_rng(1).normal(size=(8, 16, 64))
    want = 0.0
    for row in range(8):
        for s in range(16):
            target = batch.x[row, s + 1] if s < 15 else 0
            want += (np.log(np.exp(f[row, s]).sum()) - f[row, s, target]) / (8 * 16)
    total, weight = data.weighted_sum(task.loss(jnp.float32(f), batch.y), batch.weight)
    assert total / weight == pytest.approx(want, rel=1e-6)  # float32


def test_targets_of_weight_zero_do_not_change_the_sums():
    rng = np.random.default_rng(0)
    loss, weight = rng.normal(size=(4, 6)).astype(np.float32), rng.integers(0, 2, (4, 6)).astype(bool)
    changed = np.where(weight, loss, 1e6).astype(np.float32)
    assert data.weighted_sum(loss, weight) == data.weighted_sum(changed, weight)
    assert data.weighted_sum(loss, weight) != data.weighted_sum(changed, np.ones_like(weight))  # the control


@pytest.mark.parametrize('meta, V', [({'vocab_size': 54}, 64), ({'vocab_size': 64}, 64), ({'vocab_size': 65}, 96), (None, None)])
def test_the_vocabulary_of_a_data_set_is_rounded_up_to_32(write_tokens, compose, resolve, meta, V):
    folder = write_tokens(meta)
    run = resolve('chess', f'ds_path={folder}', 'model.V=200', vocab_size=data.vocab_size(folder))
    assert run.model.V == (V or 200)


# The power-law language

@pytest.fixture(scope='module')
def bigram(resolve):
    """bigram(*overrides) -> (run, task) of a small language, which is far from its unigram frequencies."""
    small = ('model.V=48', 'model.D=16', 'model.L=16', 'opt.B=64', 'T_eval=65536', 'bigram_zipf=1')

    def opened(*overrides):
        run = resolve('bigram', *small, *overrides)
        return run, data.open_task(run, run.all_seeds)

    return opened


def language_of(run):
    return data.bigram_language(run.model.V, run.bigram_zipf, run.bigram_exponent, run.bigram_std)


def test_the_log_probabilities_of_the_language_have_the_stated_spectrum():
    """Without Zipf's law they are M, but for a constant in each row and in each column."""
    V, exponent, std = 200, 0.8, 1.5
    transitions, stationary, _ = data.bigram_language(V, 0.0, exponent, std)
    np.testing.assert_allclose(stationary, 1 / V, rtol=1e-12)
    M = np.log(transitions)
    M = M - M.mean(1, keepdims=True) - M.mean(0) + M.mean()
    assert M.std() == pytest.approx(std, rel=0.02)  # the means of rows and columns hold about 2/200 of the variance
    left = np.cumsum(np.linalg.svd(M, compute_uv=False)[::-1]**2)[::-1]  # of the variance, by all but the first D
    D = np.arange(5, 61)
    slope = np.polyfit(np.log(D + 0.5), np.log(left[D]), 1)[0]
    assert slope == pytest.approx(1 - 2 * exponent, abs=0.03)  # centring takes up to two directions


@pytest.mark.parametrize('zipf', [0.0, 1.0])
def test_unigrams_follow_zipfs_law_and_the_entropy_is_that_of_the_stationary_chain(zipf):
    transitions, stationary, entropy = data.bigram_language(60, zipf, 0.7, 1.5)
    zipf_law = np.arange(1.0, 61)**-zipf
    np.testing.assert_allclose(stationary, zipf_law / zipf_law.sum(), rtol=1e-12)
    np.testing.assert_allclose(transitions.sum(1), 1, rtol=1e-12)
    powers = np.linalg.matrix_power(transitions, 500)  # every row is the stationary distribution
    np.testing.assert_allclose(powers, np.tile(stationary, (60, 1)), rtol=1e-9)
    naive = -sum(powers[0, a] * p * np.log(p) for a in range(60) for p in transitions[a])
    assert entropy == pytest.approx(naive, rel=1e-9)
    unigram = -(stationary * np.log(stationary)).sum()
    assert 0 < entropy < unigram - 0.3 < np.log(60)


def test_bigram_frequencies_are_those_of_the_language(bigram):
    """Counts of 512 batches: the first tokens follow the stationary distribution, each next one the row of the last."""
    run, task = bigram()
    V, (transitions, stationary, _) = run.model.V, language_of(run)
    x = task.block(0)[:512].reshape(-1, 16)
    first = np.bincount(x[:, 0], minlength=V)
    pairs = np.bincount(x[:, :-1].ravel() * V + x[:, 1:].ravel(), minlength=V * V).reshape(V, V)
    for count, p in ((first, stationary), *zip(pairs, transitions, strict=True)):
        expected = count.sum() * p
        seen = expected > 5
        chi2 = ((count - expected)[seen]**2 / expected[seen]).sum()
        assert chi2 < seen.sum() + 5 * np.sqrt(2 * seen.sum())  # chi-squared has mean n and variance 2n
    shuffled = np.roll(transitions, 1, axis=0)  # the control: the rows of other tokens
    assert ((pairs - pairs.sum(1, keepdims=True) * shuffled)**2 / (pairs.sum(1, keepdims=True) * shuffled)).sum() > 10 * V * V


def test_the_loss_of_the_true_model_is_the_entropy(bigram):
    """On the test batches it is the entropy that the run records, and on many tokens the language's, within its standard error."""
    run, task = bigram()
    transitions, _, entropy = language_of(run)
    logits = jnp.asarray(np.log(transitions), jnp.float32)
    total, weight = data.weighted_sum(task.loss(logits[task.test.x], task.test.y), task.test.weight)
    assert float(total / weight) == pytest.approx(task.entropy, rel=1e-5)  # a float32 sum of 61,440 losses
    x = task.block(0)
    surprise = -np.log(transitions[x[..., :-1], x[..., 1:]])
    means = surprise.mean((1, 2))  # of independent batches
    assert means.mean() == pytest.approx(entropy, abs=4 * means.std() / np.sqrt(len(means)))
    assert 4 * means.std() / np.sqrt(len(means)) < 0.01


def test_a_batch_of_the_language_is_a_function_of_the_step(bigram, monkeypatch):
    run, task = bigram('seed=3')
    L, B = run.model.L, run.opt.B
    blocks = {k: task.block(k) for k in (1, 0)}
    monkeypatch.setattr(data, 'BLOCK_STEPS', 5)  # blocks of another length, in another order, for other seeds
    other = bigram('seeds=[0,1]')[1]
    for k in (4, 0, 3):
        np.testing.assert_array_equal(other.block(k), blocks[0][5 * k:5 * (k + 1)])
    rows = data.bigram_task(run, slice(16, 32))
    np.testing.assert_array_equal(rows.block(1), blocks[0][5:10, 16:32])  # those of one of four processes
    np.testing.assert_array_equal(other.test.x, task.test.x)
    # No batch comes twice, and none of the test set is trained on. Two of them agree by chance with probability 1e-500.
    every = np.concatenate([*blocks.values(), task.test.x]).reshape(-1, B * L)
    assert len(np.unique(every, axis=0)) == len(every)
    (batch,) = batches(task, [2])
    np.testing.assert_array_equal(batch.y[:, :-1], blocks[0][2][:, 1:])
    assert batch.weight[:, :-1].all() and not batch.weight[:, -1].any()


def test_the_test_tokens_of_the_language_do_not_depend_on_the_batch_size(bigram):
    tokens = [bigram(f'opt.B={B}')[1].test.x.reshape(-1, 16) for B in (4, 64, 24)]
    assert len(tokens[0]) == len(tokens[1]) == 4096 and len(tokens[2]) == 4080  # 65,536 tokens, in whole batches
    for other in tokens[1:]:
        np.testing.assert_array_equal(other, tokens[0][:len(other)])


def test_the_language_does_not_depend_on_the_setting_of_jax(bigram):
    usual = bigram()[1].block(0)[:3]
    with jax.threefry_partitionable(False):
        jax.clear_caches()
        np.testing.assert_array_equal(bigram()[1].block(0)[:3], usual)
