"""Pictures and captions: what fills up and what comes later changes nothing; pairs are learnt."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from qkv_jax.models import image_text
from tests.tasks.emoji_toy import tiny

V, T = 11, 6


@pytest.fixture(scope="module")
def model():
    return image_text.Model(tiny(vocabulary=V, longest=T), rngs=nnx.Rngs(0))


def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 9, (4, 2, T))
    tokens[:, 0, 0], tokens[:, 1, 0] = 9, 10
    tokens[:, :, 4], tokens[:, :, 5] = 2, 0
    images = np.zeros((4, 2, 16, 16, 3), np.uint8)
    for row in range(4):
        images[row, :, 4 * row : 4 * row + 4] = 255
    weight = np.ones(4, np.float32)
    return {"image": images, "tokens": tokens.astype(np.int32), "weight": weight}


def test_rows_that_fill_up_change_no_loss(model):
    graph, params = nnx.split(model, nnx.Param)
    loss = jax.jit(lambda rows: nnx.merge(graph, params).loss(rows, rng=None))
    rows, other = batch(), batch()
    rows["weight"][3] = other["weight"][3] = 0.0
    other["image"][3], other["tokens"][3, :, 1:3] = 7, 5
    total, sums = loss(rows)
    assert loss(other)[0] == pytest.approx(float(total), rel=1e-6)
    assert sums["tokens"] == 3


def test_a_caption_knows_only_what_was_said(model):
    tokens = jnp.asarray(batch()["tokens"][:, 0])
    patches = jnp.asarray(np.random.default_rng(1).normal(size=(4, 5, 16)), jnp.float32)

    @jax.jit
    def run(tokens):
        states = model.read(tokens)
        return (
            model.text_vectors(states, tokens),
            model.caption_logits(states[:, None], patches)[:, 0],
        )

    (vectors, logits), longer = run(tokens), jnp.pad(tokens[:, :5], ((0, 0), (0, 1)))
    later = run(tokens.at[:, 3].set(4))[1]
    np.testing.assert_allclose(later[:, :3], logits[:, :3], atol=1e-5)
    assert np.abs(later[:, 3:] - logits[:, 3:]).max() > 1e-3
    np.testing.assert_allclose(run(longer)[0], vectors, atol=1e-6)


def test_captions_are_the_likeliest_of_each_step(model):
    rng = np.random.default_rng(2)
    patches = jnp.asarray(rng.normal(size=(3, 5, 16)), jnp.float32)
    starts = jnp.asarray([[9, 10]] * 3)
    captions = jax.jit(model.describe, static_argnums=2)(patches, starts, T)
    states = jax.jit(model.read)(captions.reshape(6, T)).reshape(3, 2, T, -1)
    best = jax.jit(model.caption_logits)(states, patches).argmax(-1)[:, :, :-1]
    said = np.asarray(captions)
    live = np.cumsum(said == 2, axis=-1)[:, :, :-1] == 0
    assert live.sum() > 6 and (said[:, :, 0] == [9, 10]).all()
    np.testing.assert_array_equal(said[:, :, 1:][live], np.asarray(best)[live])
    assert (said[:, :, 1:][~live] == 0).all()


def test_closed_gates_let_nothing_of_the_picture_through():
    config = tiny(vocabulary=V, longest=T)
    blind = image_text.Model(
        image_text.Config(**{**vars(config), "gate": 0.0}), rngs=nnx.Rngs(0)
    )
    states = jnp.ones((2, 1, T, 16))
    logits = jax.jit(blind.caption_logits)(
        states, jnp.asarray([[[1.0] * 16], [[-2.0] * 16]])
    )
    np.testing.assert_array_equal(logits[0], logits[1])


def test_pairs_are_learnt_by_heart(model):
    graph, params = nnx.split(model, nnx.Param)
    optimizer, rows = optax.adam(1e-2), batch()

    def step(carry, rng):
        params, state = carry
        grads, sums = jax.grad(
            lambda p: nnx.merge(graph, p).loss(rows, rng=rng), has_aux=True
        )(params)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), sums["accuracy_sum"] / 4

    rngs = jax.random.split(jax.random.key(0), 150)
    (learnt, _), accuracy = jax.jit(
        lambda p: jax.lax.scan(step, (p, optimizer.init(p)), rngs)
    )(params)
    assert accuracy[-10:].mean() > 0.8 > accuracy[0]
    outputs = jax.jit(lambda p: nnx.merge(graph, p).predict(rows))(learnt)
    fits = np.einsum("bsw,clw->slbc", outputs["image"], outputs["text"])
    assert (fits.argmax(-1) == np.arange(4)).mean() > 0.8
    norms = np.linalg.norm(outputs["text"], axis=-1)
    np.testing.assert_allclose(norms, 1.0, rtol=1e-3)


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"heads": 3}, "heads"), ({"smoothing": 1.0}, "smoothing")],
)
def test_settings_that_cannot_be_are_refused(changes, named):
    with pytest.raises(ValueError, match=named):
        image_text.Config(**changes)
    with pytest.raises(ValueError, match="vocabulary"):
        image_text.Model(image_text.Config(), rngs=nnx.Rngs(0))
