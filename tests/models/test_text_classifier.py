"""Classifiers of text: padding, windows, poolings, what is hidden, and learning."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax.layers import AttentionKind
from qkv_jax.models import text_classifier
from qkv_jax.models.text_classifier import PAD, Config, Model

SMALL = Config(classes=3, vocabulary=23, d_model=8, heads=2, d_ff=12, layers=1)
KINDS = {
    "bert": SMALL,
    "plain": dataclasses.replace(SMALL, layers=0, pooling="mean"),
    "long": dataclasses.replace(SMALL, window=2, pooling="attention"),
    "halting": dataclasses.replace(SMALL, halting=0.01, layers=4, pooling="mean"),
}
each = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)


def make_batch(rows=4, length=7, features=2, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(4, 23, (rows, length, features), np.int32)
    lengths = rng.integers(3, length + 1, rows).astype(np.int32)
    tokens[np.arange(length) >= lengths[:, None]] = PAD
    return {
        "tokens": tokens,
        "labels": (np.arange(rows) % 3).astype(np.int32),
        "weight": np.ones(rows, np.float32),
    }


@nnx.jit(static_argnums=0)
def make(config):
    return Model(config, rngs=nnx.Rngs(0))


@nnx.jit
def predict(model, batch):
    return model.predict(batch)["logits"]


@nnx.jit
def loss(model, batch, rng=None):
    return model.loss(batch, rng=rng)


def logits(config, batch):
    return np.asarray(predict(make(config), batch))


@each
def test_padding_changes_nothing(config):
    batch = make_batch()
    wide = batch | {"tokens": np.pad(batch["tokens"], [(0, 0), (0, 5), (0, 3)])}
    np.testing.assert_allclose(
        logits(config, batch), logits(config, wide), atol=1e-5, rtol=1e-5
    )


@each
def test_a_row_of_weight_zero_counts_for_nothing(config):
    model, batch = make(config), make_batch()
    part = {name: array[:3] for name, array in batch.items()}
    batch["weight"][3] = 0
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5),
        loss(model, batch),
        loss(model, part),
    )


def test_a_word_sees_its_window_and_the_class_token_alone():
    there = jnp.arange(9)[None] < 8
    mask = text_classifier.who_sees_whom(there, 2).materialise((1, 1, 9, 9))
    wanted = np.abs(np.arange(9)[:, None] - np.arange(9)) <= 1
    wanted[0] = wanted[:, 0] = True
    wanted[8] = wanted[:, 8] = False
    np.testing.assert_array_equal(np.broadcast_to(mask[0, 0], (9, 9)), wanted)


def test_all_places_of_a_word_count_as_one_where_words_are_distinct():
    config = dataclasses.replace(SMALL, pooling="distinct")
    tokens = np.array([[2, 5, 5, 9, PAD]])[..., None]
    states = np.repeat(np.arange(5, dtype=np.float32), 8).reshape(1, 5, 8)
    pooled = make(config).pool(states, tokens)
    np.testing.assert_allclose(pooled, np.full((1, 8), (0 + 1.5 + 3) / 3), rtol=1e-5)


def test_a_word_is_the_mean_of_its_features():
    model, batch = make(SMALL), make_batch(features=3)
    batch["tokens"][0, 1] = 5, 9, PAD
    table = np.asarray(model.embedding.table[...]) * 8**0.5
    vectors = model.vectors(batch["tokens"])
    np.testing.assert_allclose(vectors[0, 1], (table[5] + table[9]) / 2, rtol=1e-5)
    np.testing.assert_array_equal(
        model.vectors(np.zeros((1, 1, 2), np.int32)), np.zeros((1, 1, 8))
    )


def test_about_the_share_asked_for_is_left_out_and_never_the_class_token():
    tokens = make_batch(rows=64, length=50)["tokens"]
    rng = jax.random.key(0)
    left = np.asarray(text_classifier.leave_out_words(tokens, 0.3, rng))
    out = (left != tokens).any(-1)
    words = (tokens[..., 0] != PAD) & (np.arange(50) > 0)
    assert not out[~words].any()
    assert out[words].mean() == pytest.approx(0.3, abs=0.03)
    assert (left[out] == PAD).all()
    assert text_classifier.leave_out_words(tokens, 0.3, None) is tokens


@each
def test_a_word_that_is_left_out_is_neither_seen_nor_pooled(config):
    batch = make_batch(rows=1, length=9)
    batch["tokens"][:, 3] = PAD
    shown = np.asarray(make(config).vectors(batch["tokens"]))
    model = make(config)
    there = jnp.asarray((batch["tokens"] != PAD).any(-1))
    tokens = batch["tokens"]
    loud = jnp.asarray(shown).at[:, 3].set(1e6)
    if config.pooling != "class_token":
        np.testing.assert_array_equal(
            model.pool(shown, tokens), model.pool(loud, tokens)
        )
    mask = text_classifier.who_sees_whom(there, config.window)
    assert not np.asarray(mask.materialise((1, 1, 9, 9)))[..., 3].any()


@pytest.mark.parametrize(
    "change",
    [
        {"d_model": 12},
        {"layers": 2},
        {"heads": 4},
        {"d_ff": 10},
        {"window": None},
        {"pooling": "mean"},
        {"pooling": "class_token"},
        {"pooling": "distinct"},
        {"positions": False},
        {"halting": 0.1},
        {"attention": AttentionKind(name="entmax")},
        {"window": None, "attention": AttentionKind(name="linear")},
        {"vector_stddev": 0.1},
        {"dtype": "bfloat16"},
    ],
)
def test_every_size_matters(change):
    config, batch = KINDS["long"], make_batch()
    other = logits(dataclasses.replace(config, **change), batch)
    assert other.dtype == np.float32
    assert np.abs(other - logits(config, batch)).max() > 1e-4


@pytest.mark.parametrize("rate", ["dropout", "masking", "smoothing"])
def test_every_rate_matters_in_training_alone(rate):
    still = dataclasses.replace(SMALL, dropout=0.0, masking=0.0, smoothing=0.0)
    models = [make(still), make(dataclasses.replace(still, **{rate: 0.4}))]
    trained = [float(loss(x, make_batch(), jax.random.key(1))[0]) for x in models]
    tested = [float(loss(x, make_batch())[1]["nll_sum"]) for x in models]
    assert abs(trained[0] - trained[1]) > 1e-3
    assert tested[0] == pytest.approx(tested[1])


@each
def test_one_batch_is_learnt_by_heart(config):
    config = dataclasses.replace(config, dropout=0.0, masking=0.0, smoothing=0.0)
    definition, params = nnx.split(make(config))
    batch = make_batch()

    @jax.jit
    def step(params):
        def total(params):
            return nnx.merge(definition, params).loss(batch, rng=None)

        (value, sums), slopes = jax.value_and_grad(total, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, slopes), value, sums

    for _ in range(150):
        params, value, sums = step(params)
    assert value < 0.4 and sums["accuracy_sum"] == sums["tokens"] == 4


def test_the_three_presets_are_what_they_say():
    assert text_classifier.plain().layers == 0
    assert text_classifier.bert().pooling == "class_token"
    assert text_classifier.long(window=8, d_model=32).window == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pooling": "max"}, "pooling must be one of"),
        ({"masking": 1.0}, r"masking must be in \[0, 1\)"),
        ({"window": 2, "attention": AttentionKind(name="linear")}, "has no window"),
        ({"layers": 0, "attention": AttentionKind(name="linear")}, "is of blocks"),
        ({"attention": AttentionKind(layers=(3,))}, "attention.layers must be of"),
        ({"halting": -1.0}, "halting must not be negative"),
        (
            {"halting": 0.1, "layers": 0},
            "halting must not be negative, and needs layers",
        ),
        ({"vector_stddev": 0.0}, "vector_stddev must be positive"),
        ({"window": 3}, "window must be even"),
        ({"remat": "dots", "layers": 0}, "are of blocks that are applied once"),
        ({"scan_layers": True, "halting": 0.1}, "are of blocks that are applied once"),
    ],
)
def test_what_makes_no_sense_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


def test_sizes_that_no_data_gave_are_refused():
    with pytest.raises(ValueError, match="classes and vocabulary must be positive"):
        Model(Config(), rngs=nnx.Rngs(0))
