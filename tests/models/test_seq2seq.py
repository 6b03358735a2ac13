import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from qkv_jax.layers import AttentionKind, init_rngs
from qkv_jax.models.seq2seq import (
    Config,
    Model,
    Segments,
    base,
    big,
    check_mesh,
    small,
    tiny,
)
from qkv_jax.ops import LOGICAL_AXES
from qkv_jax.training import logical_sharding, make_mesh
from qkv_jax.training.losses import projected_cross_entropy

SMALL = {
    "vocabulary": 11,
    "d_model": 16,
    "d_ff": 24,
    "heads": 2,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "dropout": 0.0,
    "embedding_dropout": 0.0,
}
# Another value for every field; what is compared has token 3 in the source.
FLIPS = {
    "vocabulary": 13,
    "source_vocabulary": 12,
    "d_model": 32,
    "d_ff": 32,
    "heads": 4,
    "kv_heads": 1,
    "head_size": 6,
    "encoder_attention": AttentionKind(name="linear"),
    "decoder_attention": AttentionKind(name="window", window=1),
    "decoder_heads": 4,
    "decoder_d_ff": 20,
    "heads_by_layer": (2, 1, 2, 3, 1),
    "encoder_layers": 2,
    "decoder_layers": 1,
    "activation": "gelu",
    "gated": True,
    "norm": "pre",
    "normalisation": "rms",
    "epsilon": 0.1,
    "bias": False,
    "attention_scale": 1.0,
    "tie": "none",
    "positions": "sinusoid_inclusive",
    "position_offset": 2,
    "max_positions": 9,
    "relative_buckets": 6,
    "relative_distance": 5,
    "embedding_scale": False,
    "embedding_norm": True,
    "output_bias": True,
    "output_scale": 0.5,
    "zero_pad": True,
    "dropout": 0.5,
    "embedding_dropout": 0.5,
    "attention_dropout": 0.5,
    "activation_dropout": 0.5,
    "dtype": "bfloat16",
    "output_dtype": "bfloat16",
    "pad": 3,
}
# What a field needs to matter.
BESIDE = {
    "source_vocabulary": {"tie": "target"},
    "heads_by_layer": {"head_size": 8},
    "max_positions": {"positions": "learned"},
    "relative_buckets": {"positions": "relative"},
    "relative_distance": {"positions": "relative", "relative_buckets": 4},
}
SOURCE = np.array([[5, 3, 9, 2, 0, 0], [4, 3, 7, 8, 6, 2]], np.int32)
TARGET = np.array([[1, 4, 9, 3, 8], [1, 5, 6, 7, 10]], np.int32)
KINDS = pytest.mark.parametrize(
    "changes",
    [{}, {"norm": "pre", "gated": True, "kv_heads": 1, "tie": "none"}],
    ids=["post", "pre"],
)


LINEAR = AttentionKind(name="linear")


def build(**changes):
    return Model(Config(**(SMALL | changes)), rngs=nnx.Rngs(0))


def pure(model, method="__call__"):
    """A jitted method of (state, ...), and the state."""
    graph, state = nnx.split(model)

    def run(state, *args, **options):
        return getattr(nnx.merge(graph, state), method)(*args, **options)

    return jax.jit(run, static_argnames=("hypotheses", "steps")), state


def logits(model, source=SOURCE, target=TARGET, **options):
    run, state = pure(model)
    return np.asarray(run(state, source, target, **options), np.float32)


@functools.cache
def noisy_logits(config):
    """With an rng, so that dropouts count."""
    return logits(Model(config, rngs=nnx.Rngs(0)), rng=jax.random.key(0))


def shapes(config):
    model = nnx.eval_shape(lambda: Model(config, rngs=init_rngs(0)))
    return nnx.state(model, nnx.Param)


def count(config):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes(config)))


@KINDS
def test_padding_and_neighbours_cannot_change_the_logits(changes):
    model = build(**changes)
    together = logits(model)
    alone = logits(model, SOURCE[:1, :4], TARGET[:1])
    padded = logits(model, np.pad(SOURCE, ((0, 0), (0, 3))), TARGET)
    np.testing.assert_allclose(together[:1], alone, atol=1e-5)
    np.testing.assert_allclose(together, padded, atol=1e-5)


@KINDS
def test_a_future_token_cannot_change_the_past(changes):
    model, target = build(**changes), TARGET.copy()
    before = logits(model)
    target[:, 3] = 2
    after = logits(model, target=target)
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert np.all(np.any(np.abs(before[:, 3:] - after[:, 3:]) > 1e-3, axis=-1))


def test_a_row_of_padding_alone_is_finite_and_has_finite_gradients():
    graph, state = nnx.split(build())

    def loss(state, source):
        return jnp.sum(nnx.merge(graph, state)(source, TARGET) ** 2)

    gradients = jax.jit(jax.grad(loss))(state, np.zeros_like(SOURCE))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize(
    ("changes", "Z"),
    [
        ({}, 1),
        ({}, 3),
        ({"norm": "pre", "gated": True, "kv_heads": 1, "tie": "none"}, 3),
        ({"encoder_attention": LINEAR, "decoder_attention": LINEAR}, 3),
    ],
    ids=["post, one", "post", "pre", "linear"],
)
def test_cached_steps_equal_the_full_forward_of_every_hypothesis(changes, Z):
    model, steps, rng = build(**changes), 4, np.random.default_rng(Z)
    memory = pure(model, "encode")[0](nnx.state(model), SOURCE)
    start, state = pure(model, "init_cache")
    cache = start(state, *memory, hypotheses=Z, steps=steps)
    step, full = pure(model, "decode_step")[0], pure(model)[0]
    prefixes = np.zeros((2, Z, steps), np.int32)
    for t in range(steps):
        if t and Z > 1:
            parents = rng.integers(0, Z, (2, Z)).astype(np.int32)
            prefixes = np.take_along_axis(prefixes, parents[:, :, None], axis=1)
            cache = cache.reorder(jnp.asarray(parents))
        prefixes[:, :, t] = rng.integers(1, 11, (2, Z))
        got, cache = step(state, prefixes[:, :, t], cache)
        whole = full(state, np.repeat(SOURCE, Z, axis=0), prefixes.reshape(-1, steps))
        want = np.asarray(whole)[:, t].reshape(got.shape)
        np.testing.assert_allclose(got, want, atol=1e-5)


def loss_of(graph, state, source, target, rng=None):
    model = nnx.merge(graph, state)
    states = model.states(source, target[:, :-1], rng=rng)
    table = model.output_embedding.table[...]
    weights = jnp.ones(target[:, 1:].shape)
    return projected_cross_entropy(states, table, target[:, 1:], weights)[0]


@KINDS
def test_bfloat16_gradients_are_near_those_of_float32(changes):
    # XLA on CPU once had no kernel for a bfloat16 product of the loss.
    def gradient(dtype):
        graph, state = nnx.split(build(dtype=dtype, **changes))
        run = jax.jit(jax.grad(loss_of, argnums=1), static_argnums=0)
        return run(graph, state, SOURCE, TARGET)

    low, high = (optax.tree.norm(gradient(d)) for d in ("bfloat16", "float32"))
    np.testing.assert_allclose(low, high, rtol=0.1)


def test_one_batch_is_overfitted():
    graph, state = nnx.split(build())
    optimizer = optax.adam(1e-2)

    def step(carry, _):
        state, moments = carry
        loss, gradient = jax.value_and_grad(loss_of, argnums=1)(
            graph, state, SOURCE, TARGET
        )
        updates, moments = optimizer.update(gradient, moments)
        return (optax.apply_updates(state, updates), moments), loss

    train = jax.jit(
        lambda state: jax.lax.scan(step, (state, optimizer.init(state)), length=60)
    )
    (state, _), losses = train(state)
    assert losses[0] > 10 and losses[-1] < 0.2
    predicted = logits(nnx.merge(graph, state), target=TARGET[:, :-1]).argmax(-1)
    np.testing.assert_array_equal(predicted, TARGET[:, 1:])


def test_every_field_has_another_value_to_try():
    # "context" says how a mesh computes the same, see tests/translation/test_mesh.py; "remat" and
    # "scan_layers" compute the same too, see tests/models/test_seq2seq_layers.py.
    fields = {field.name for field in dataclasses.fields(Config)}
    assert set(FLIPS) == fields - {"context", "remat", "scan_layers"}


@pytest.mark.parametrize("field", FLIPS)
def test_every_field_changes_the_parameters_or_the_output(field):
    config = Config(**(SMALL | BESIDE.get(field, {})))
    flipped = dataclasses.replace(config, **{field: FLIPS[field]})
    if shapes(config) == shapes(flipped):
        difference = noisy_logits(config) - noisy_logits(flipped)
        assert np.abs(difference).max() > 1e-3


def test_dropouts_need_an_rng():
    rates = [name for name in FLIPS if "dropout" in name]
    model = build(**{name: 0.5 for name in rates})
    np.testing.assert_array_equal(logits(model), logits(build()))


def test_embedding_dropout_follows_dropout_unless_it_is_given():
    follows = build(dropout=0.4, embedding_dropout=None)
    assert follows.target_positions.dropout_rate == 0.4
    assert build(dropout=0.4).target_positions.dropout_rate == 0.0


def test_parameters_are_float32_and_logits_bfloat16_when_asked():
    model = build(dtype="bfloat16")
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
    run, state = pure(model)
    assert jax.eval_shape(run, state, SOURCE, TARGET).dtype == jnp.bfloat16
    np.testing.assert_allclose(logits(model), logits(build()), atol=0.2)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"heads": 3}, "heads must divide d_model, or head_size .* heads = 3"),
        ({"decoder_heads": 3}, "heads must divide d_model, .* heads = 3"),
        ({"head_size": 0}, "head_size must be positive, or None; got 0"),
        ({"d_model": 15, "heads": 3}, "sinusoids need an even d_model; got 15"),
        ({"source_vocabulary": 12}, 'needs tie = "target" or "none"; got \'all\''),
        ({"position_offset": -1}, "position_offset must not be negative; got -1"),
        ({"epsilon": 0.0}, "epsilon must be positive; got 0.0"),
        ({"heads": 0}, "heads must be positive; got 0"),
        ({"kv_heads": 3}, "kv_heads must divide heads"),
        ({"kv_heads": 0}, "kv_heads = 0"),
        ({"d_model": -16}, "d_model must be positive"),
        ({"d_ff": 0}, "d_ff must be positive"),
        ({"encoder_layers": 0}, "encoder_layers must be positive"),
        ({"decoder_layers": -1}, "decoder_layers must be positive"),
        ({"activation": "tanh"}, "activation must be one of .*relu.*; got 'tanh'"),
        ({"norm": "both"}, "norm must be one of .*; got 'both'"),
        ({"tie": "some"}, "tie must be one of .*; got 'some'"),
        ({"dtype": "float8"}, "dtype must be one of .*; got 'float8'"),
        ({"output_dtype": "half"}, "output_dtype must be one of .*; got 'half'"),
        ({"remat": "some"}, "remat must be one of .*'dots'.*; got 'some'"),
        (
            {
                "scan_layers": True,
                "decoder_attention": AttentionKind(name="entmax", layers=(1,)),
            },
            r"scan_layers needs .* decoder_attention.layers names \(1,\) of 2",
        ),
        (
            {
                "scan_layers": True,
                "head_size": 8,
                "heads_by_layer": (2, 1, 2, 3, 2),
            },
            "heads_by_layer gives the decoder's different numbers of heads",
        ),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\); got 1.0"),
        ({"embedding_dropout": -0.1}, "embedding_dropout must be in"),
        ({"attention_dropout": 2.0}, "attention_dropout must be in"),
        ({"activation_dropout": float("nan")}, "activation_dropout must be in"),
        ({"vocabulary": -1}, "vocabulary must be positive; got -1"),
        ({"pad": 11}, "pad must be a token of the vocabulary of 11; got 11"),
        ({"pad": -1}, "pad must be a token"),
        ({"encoder_attention": AttentionKind(layers=(1,))}, "layers must be of 0 .. 0"),
        ({"decoder_attention": AttentionKind(name="linformer")}, "what is to come"),
        (
            {"encoder_attention": LINEAR, "positions": "relative"},
            "no scores to add relative positions to",
        ),
        (
            {"decoder_attention": LINEAR, "attention_dropout": 0.1},
            "attention_dropout must be 0",
        ),
    ],
)
def test_a_bad_config_is_an_error_that_names_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(**(SMALL | changes))


def test_one_layer_of_a_side_can_have_another_kind():
    kind = AttentionKind(name="entmax", layers=(1,))
    model = build(decoder_attention=kind)
    found = [hasattr(block.attention, "alpha") for block in model.decoder]
    assert found == [False, True]
    assert not hasattr(model.decoder[1].cross, "alpha")


def test_looking_far_is_penalised_as_asked():
    kind = AttentionKind(name="adaptive_span", longest=4, ramp=2.0, penalty=0.3)
    model = build(encoder_attention=kind)
    assert float(model.penalty()) == pytest.approx(0.3 * 0.5)
    assert build().penalty() is None
    free = dataclasses.replace(kind, penalty=None)
    assert build(encoder_attention=free).penalty() is None


def test_lengths_are_not_shared_out_where_there_is_no_mask():
    config = Config(**SMALL, encoder_attention=LINEAR)
    check_mesh(config, {"data": 2, "tensor": 2})
    with pytest.raises(ValueError, match="'linear' does not share out lengths"):
        check_mesh(config, {"context": 2})


def test_a_model_needs_the_size_of_its_vocabulary():
    with pytest.raises(ValueError, match="vocabulary must be positive; got 0"):
        build(vocabulary=0)


@pytest.mark.parametrize(
    "preset, vocabulary, millions",
    [
        (tiny, 9_700, 2.57),
        (small, 9_700, 36.5),
        (base, 9_700, 49.1),
        (base, 37_000, 63.1),
        (big, 37_000, 213),
    ],
)
def test_presets_have_the_parameter_counts_of_the_literature(
    preset, vocabulary, millions
):
    parameters = count(preset(vocabulary=vocabulary))
    assert parameters == pytest.approx(millions * 1e6, rel=0.01)


def test_presets_take_changes():
    assert tiny(vocabulary=5, dropout=0.2) == dataclasses.replace(
        tiny(), vocabulary=5, dropout=0.2
    )


def test_each_table_that_is_not_tied_is_counted():
    one, two, three = (count(Config(**SMALL, tie=t)) for t in ("all", "target", "none"))
    assert two - one == three - two == 11 * 16


def test_tied_target_and_output_leave_the_source_its_own_table():
    model = build(tie="target")
    before = logits(model)
    model.source_embedding.table[...] = jnp.zeros((11, 16))
    assert not np.allclose(before, logits(model), atol=1e-3)
    assert model.output_embedding is model.target_embedding


def test_attention_weights_are_distributions_over_real_tokens():
    model = build()
    names = list(model.attention_layers())
    assert names[0] == "encoder.0.attention" and "decoder.1.cross" in names
    weights = model.attention(SOURCE, TARGET, names)
    for name in names:
        np.testing.assert_allclose(weights[name].sum(-1), 1.0, atol=1e-6)
    assert weights["decoder.1.cross"].shape == (2, 2, 5, 6)
    assert not np.any(weights["decoder.1.cross"][0, ..., 4:])
    assert not np.any(np.triu(weights["decoder.0.attention"][1, 1], 1))


def test_asking_for_attention_weights_leaves_the_model_as_it_was():
    model = build()
    before = nnx.graphdef(model)
    twice = model.attention(SOURCE, TARGET, ["decoder.0.cross"] * 2)
    assert list(twice) == ["decoder.0.cross"]
    assert nnx.graphdef(model) == before
    with pytest.raises(ValueError, match="agree in batch"):
        model.attention(SOURCE[:1], TARGET, ["decoder.0.cross"])
    assert nnx.graphdef(model) == before


def test_an_unknown_attention_layer_is_an_error_with_the_names_there_are():
    with pytest.raises(ValueError, match="no attention layer 'x'; there are encoder.0"):
        build().attention(SOURCE, TARGET, ["x"])


@KINDS
def test_every_axis_of_every_parameter_has_a_logical_name(changes):
    for path, variable in nnx.to_flat_state(nnx.state(build(**changes), nnx.Param)):
        axes = variable.get_metadata("axes")
        assert len(axes) == variable[...].ndim, path
        assert set(axes) <= set(LOGICAL_AXES), path


def test_data_parallel_equals_one_device():
    graph, state = nnx.split(build(dropout=0.3, attention_dropout=0.1))
    batch = np.repeat(SOURCE, 4, axis=0), np.repeat(TARGET, 4, axis=0)
    run = jax.jit(
        lambda state, batch, rng: jax.value_and_grad(loss_of, argnums=1)(
            graph, state, *batch, rng
        )
    )
    rng = jax.random.key(0)
    one = run(state, batch, rng)
    mesh = make_mesh()
    split = jax.device_put(batch, logical_sharding(mesh, "batch"))
    many = run(jax.device_put(state, logical_sharding(mesh)), split, rng)
    for got, want in zip(jax.tree.leaves(many), jax.tree.leaves(one)):
        assert len(got.sharding.device_set) == 8
        np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4)


def loss_and_gradient(model, source, target, labels, **options):
    graph, state = nnx.split(model)

    def loss(state):
        out = nnx.merge(graph, state)(source, target, **options)
        picked = jnp.take_along_axis(jax.nn.log_softmax(out), labels[..., None], -1)
        return -jnp.sum(picked[..., 0] * (labels != 0))

    return jax.jit(jax.value_and_grad(loss))(state)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm": "pre", "gated": True, "kv_heads": 1, "tie": "none"},
        {
            "encoder_attention": AttentionKind(name="window", window=1),
            "decoder_attention": AttentionKind(name="entmax"),
        },
    ],
    ids=["post", "pre", "kinds"],
)
def test_packed_pairs_are_computed_as_if_each_had_its_row(changes):
    model = build(**changes)
    rows = {
        "source": np.array([[5, 3, 9, 2, 0], [4, 3, 2, 0, 0], [7, 7, 8, 6, 2]]),
        "target": np.array([[1, 4, 9, 0], [1, 5, 6, 7], [1, 10, 0, 0]]),
        "labels": np.array([[4, 9, 2, 0], [5, 6, 7, 2], [10, 2, 0, 0]]),
    }
    packed = {
        "source": np.array([[5, 3, 9, 2, 4, 3, 2, 0, 0], [7, 7, 8, 6, 2, 0, 0, 0, 0]]),
        "target": np.array([[1, 4, 9, 1, 5, 6, 7, 0], [1, 10, 0, 0, 0, 0, 0, 0]]),
        "labels": np.array([[4, 9, 2, 5, 6, 7, 2, 0], [10, 2, 0, 0, 0, 0, 0, 0]]),
    }
    segments = Segments(
        jnp.array([[1, 1, 1, 1, 2, 2, 2, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0, 0]]),
        jnp.array([[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 0, 0, 0, 0, 0, 0]]),
    )
    expected, slope = loss_and_gradient(model, **rows)
    value, packed_slope = loss_and_gradient(model, **packed, segments=segments)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        packed_slope,
        slope,
    )
