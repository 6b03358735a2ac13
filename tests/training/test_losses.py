import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qkv_jax.training import logical_sharding, make_mesh
from qkv_jax.training.losses import Taught, projected_cross_entropy

B, T, D, V = 8, 5, 3, 7
RNG = np.random.default_rng(0)
STATES = RNG.normal(size=(B, T, D)).astype(np.float32)
TABLE = RNG.normal(size=(V, D)).astype(np.float32)
LABELS = RNG.integers(0, V, (B, T)).astype(np.int32)
WEIGHTS = (RNG.random((B, T)) < 0.7).astype(np.float32) * 1.5
BATCH = (STATES, TABLE, LABELS, WEIGHTS)

smoothings = pytest.mark.parametrize("smoothing", [0.0, 0.1])


def oracle(states, table, labels, weights, smoothing):
    """Sums and gradients token by token, float64."""
    states, table = states.astype(np.float64), table.astype(np.float64)
    sums, slopes = np.zeros(3), (np.zeros_like(states), np.zeros_like(table))
    for at in np.ndindex(labels.shape):
        logits = table @ states[at]
        p = np.exp(logits) / np.exp(logits).sum()
        target = np.full(V, smoothing / V)
        target[labels[at]] += 1 - smoothing
        correct = logits.argmax() == labels[at]
        terms = -target @ np.log(p), -np.log(p[labels[at]]), correct
        sums += weights[at] * np.array(terms)
        slopes[0][at] += weights[at] * (p - target) @ table
        slopes[1][:] += weights[at] * np.outer(p - target, states[at])
    return sums, slopes


def run(
    states,
    table,
    labels,
    weights,
    smoothing=0.0,
    chunks=1,
    r_drop=0.0,
    taught=None,
):
    """Sums, and the gradients of the loss for states and table."""

    def loss(states, table):
        options = (smoothing, chunks, r_drop, taught)
        sums = projected_cross_entropy(states, table, labels, weights, *options)
        return sums[0], sums

    gradients, sums = jax.grad(loss, argnums=(0, 1), has_aux=True)(states, table)
    return sums, gradients


jitted = jax.jit(run, static_argnums=(4, 5, 6))


def close(got, want, tolerance=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, tolerance, tolerance), got, want
    )


@smoothings
@pytest.mark.parametrize("chunks", [1, 2, 3, 99])
def test_sums_and_gradients_equal_the_oracle(smoothing, chunks):
    sums, gradients = jitted(*BATCH, smoothing, chunks)
    truth = oracle(*BATCH, smoothing)
    close(list(sums), list(truth[0]))
    close(gradients, truth[1])
    without_gradients = projected_cross_entropy(*BATCH, smoothing, chunks)
    close(without_gradients, sums, 1e-6)


def test_without_smoothing_it_is_the_integer_cross_entropy():
    loss, nll, _ = projected_cross_entropy(*BATCH)
    losses = optax.softmax_cross_entropy_with_integer_labels(STATES @ TABLE.T, LABELS)
    np.testing.assert_allclose(loss, np.sum(losses * WEIGHTS), rtol=1e-5)
    np.testing.assert_allclose(nll, loss, rtol=1e-6)


@smoothings
def test_tokens_of_weight_zero_change_nothing(smoothing):
    states, labels = STATES.copy(), LABELS.copy()
    states[WEIGHTS == 0], labels[WEIGHTS == 0] = 50.0, 0
    before = jitted(*BATCH, smoothing)
    after = jitted(states, TABLE, labels, WEIGHTS, smoothing)
    close(after, before)
    assert not np.any(after[1][0][WEIGHTS == 0])


def test_weights_that_are_all_zero_give_exact_zeros():
    result = jitted(STATES, TABLE, LABELS, np.zeros_like(WEIGHTS), 0.1)
    assert all(np.all(leaf == 0.0) for leaf in jax.tree.leaves(result))


def test_gradients_scale_with_what_is_done_to_the_loss():
    def mean(states, table):
        sums = projected_cross_entropy(states, table, LABELS, WEIGHTS, 0.1)
        return 3.0 * sums[0] / WEIGHTS.sum() + sums[2]

    got = jax.jit(jax.grad(mean, argnums=(0, 1)))(STATES, TABLE)
    factor = 3.0 / WEIGHTS.sum()
    close(got, tuple(factor * slope for slope in oracle(*BATCH, 0.1)[1]))


def test_large_logits_stay_finite():
    sums, gradients = jitted(STATES * 1e3, TABLE, LABELS, WEIGHTS, 0.1)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((sums, gradients)))


def test_bfloat16_states_give_float32_sums_and_gradients_of_their_own_dtype():
    low = STATES.astype(jnp.bfloat16)
    sums, (d_states, d_table) = jitted(low, TABLE, LABELS, WEIGHTS, 0.1)
    truth = oracle(low, TABLE, *BATCH[2:], 0.1)
    assert {x.dtype for x in sums} == {jnp.dtype("float32")}
    assert (d_states.dtype, d_table.dtype) == (jnp.bfloat16, jnp.float32)
    # The table and the slopes are rounded to bfloat16, eps 4e-3.
    close(list(sums[:2]), list(truth[0][:2]), 1e-2)
    close((d_states.astype(np.float32), d_table), truth[1], 3e-2)


def test_float16_tells_small_slopes_from_0_whatever_the_scale():
    states = jnp.array([[[1.0, 0.25]]], jnp.float16)
    table = jnp.array([[0.0, 0.0], [-16.0, 0.5], [-16.0, -0.5]])
    options = (jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1)))

    def scaled(table, scale):
        return scale * projected_cross_entropy(states, table, *options)[0]

    logits = np.array([0.0, -15.875, -16.125])
    share = (
        np.exp(logits) / np.exp(logits).sum()
    )  # 1.3e-7: float16 has steps of 6e-8 there.
    expected = share[1:, None] * np.array([1.0, 0.25])
    for scale in (1.0, 2.0**20):
        got = jax.jit(jax.grad(scaled))(table, scale) / scale
        np.testing.assert_allclose(got[1:], expected, rtol=2e-3)


def apart(states, table):
    """KL(P || Q) + KL(Q || P) at each place of a pair of rows, by its definition."""
    log_p, log_q = (
        jax.nn.log_softmax(jnp.asarray(states[at::2]) @ jnp.asarray(table).T)
        for at in (0, 1)
    )
    one = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
    return one + (jnp.exp(log_q) * (log_q - log_p)).sum(-1)


@pytest.mark.parametrize("chunks", [1, 3])
def test_two_passes_of_a_row_are_drawn_together(chunks):
    """Equation 4 of R-Drop: both losses, and alpha / 2 times both divergences."""
    twice = (np.repeat(LABELS[::2], 2, axis=0), np.repeat(WEIGHTS[::2], 2, axis=0))
    alpha, batch = 3.0, (STATES, TABLE, *twice)

    def divergence(states, table):
        return alpha / 2 * jnp.sum(apart(states, table) * twice[1][::2])

    more, slopes = jax.value_and_grad(divergence, argnums=(0, 1))(STATES, TABLE)
    (loss, nll, correct), gradients = jitted(*batch, 0.1, chunks, alpha)
    plain = jitted(*batch, 0.1, chunks)
    close((loss, nll, correct), (plain[0][0] + more, *plain[0][1:]))
    close(gradients, jax.tree.map(jnp.add, plain[1], slopes))
    assert more > 1.0


# A teacher of another width: its logits have the student's shape alone.
TAUGHT = Taught(
    states=RNG.normal(size=(B, T, 2)).astype(np.float32),
    table=RNG.normal(size=(V, 2)).astype(np.float32),
)


def taught_oracle(w, heat, smoothing):
    """(1 - w) labels + w T^2 KL(teacher || student), token by token, float64 numpy."""
    states, table = STATES.astype(float), TABLE.astype(float)
    (loss, *others), slopes = oracle(*BATCH, smoothing)
    loss, slopes = (1 - w) * loss, [(1 - w) * slope for slope in slopes]
    for at in np.ndindex(LABELS.shape):
        theirs = np.exp(TAUGHT.table.astype(float) @ TAUGHT.states[at] / heat)
        ours = np.exp(table @ states[at] / heat)
        p, q = theirs / theirs.sum(), ours / ours.sum()
        loss += w * WEIGHTS[at] * heat**2 * (p * np.log(p / q)).sum()
        slope = w * WEIGHTS[at] * heat**2 * (q - p) / heat
        slopes[0][at] += slope @ table
        slopes[1] += np.outer(slope, states[at])
    return [loss, *others], tuple(slopes)


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize(("w", "heat"), [(0.3, 1.0), (0.3, 2.5), (1.0, 0.7)])
def test_a_teacher_draws_the_student_to_it_as_weighted_and_softened(w, heat, chunks):
    taught = dataclasses.replace(TAUGHT, weight=w, temperature=heat)
    sums, gradients = jitted(*BATCH, 0.1, chunks, 0.0, taught)
    truth = taught_oracle(w, heat, 0.1)
    close(list(sums), truth[0])
    close(gradients, truth[1])


def test_a_student_that_predicts_as_its_teacher_is_not_drawn_anywhere():
    same = Taught(states=STATES, table=TABLE, weight=1.0, temperature=3.0)
    (loss, *_), gradients = jitted(*BATCH, 0.1, 1, 0.0, same)
    close((loss, *gradients), (0.0, np.zeros_like(STATES), np.zeros_like(TABLE)), 1e-4)


def test_a_teacher_and_two_dropouts_add_up():
    batch = (*BATCH[:2], *(np.repeat(x[::2], 2, axis=0) for x in BATCH[2:]))
    taught = dataclasses.replace(
        TAUGHT, states=np.repeat(TAUGHT.states[::2], 2, axis=0)
    )
    options, plain = (0.1, 2), jitted(*batch, 0.1, 2)
    drawn = jitted(*batch, *options, 3.0)
    half = jitted(*batch, *options, 0.0, taught)
    both = jitted(*batch, *options, 3.0, taught)
    close(both, jax.tree.map(lambda x, y, z: x + y - z, drawn, half, plain))


@pytest.mark.parametrize("chunks", [1, 2])
def test_sharded_over_the_batch_equals_one_device(chunks):
    mesh = make_mesh()
    rows, whole = logical_sharding(mesh, "batch"), logical_sharding(mesh)
    split = jax.device_put(BATCH, (rows, whole, rows, rows))
    many, one = jitted(*split, 0.1, chunks), jitted(*BATCH, 0.1, chunks)
    assert len(many[1][0].sharding.device_set) == 8
    close(many, one)
