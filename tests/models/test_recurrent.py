"""The recurrent encoder-decoder: padding, packing, steps, alignment and fields."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax.layers import ALIGNMENTS
from qkv_jax.models import recurrent
from qkv_jax.models.seq2seq import Segments

CONFIG = recurrent.Config(
    vocabulary=11, d_model=8, encoder_layers=2, decoder_layers=2, half_width=2
)
SOURCE = jnp.array([[3, 4, 5, 6, 2], [7, 8, 2, 0, 0]])
TARGET = jnp.array([[1, 9, 8, 7], [1, 5, 4, 0]])


def build(**changes):
    return recurrent.Model(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0))


@nnx.jit
def run(model, source, target, **options):
    return model(source, target, **options)


@nnx.jit
def step(model, tokens, cache):
    return model.decode_step(tokens, cache)


@pytest.fixture(scope="module", params=ALIGNMENTS)
def model(request):
    return build(alignment=request.param)


def test_padding_and_neighbours_cannot_change_the_logits(model):
    alone = run(model, SOURCE[1:, :3], TARGET[1:, :3])
    beside = run(model, jnp.pad(SOURCE, ((0, 0), (0, 2))), TARGET)
    np.testing.assert_allclose(alone[0], beside[1, :3], atol=1e-5)


def test_a_future_token_cannot_change_the_past(model):
    other = TARGET.at[:, 3].set(10)
    one, two = run(model, SOURCE, TARGET), run(model, SOURCE, other)
    np.testing.assert_allclose(one[:, :3], two[:, :3], atol=1e-6)
    assert jnp.abs(one[:, 3] - two[:, 3]).max() > 1e-3


def test_steps_equal_the_full_pass_for_every_hypothesis(model):
    tokens = jnp.stack([TARGET, TARGET.at[:, 1].set(6)], 1)  # (B, Z, T)
    encoded = nnx.jit(lambda model: model.encode(SOURCE))(model)
    cache = model.init_cache(*encoded, hypotheses=2, steps=4)
    parents = jnp.array([[0, 1], [1, 0]])
    for t in range(4):
        logits, cache = step(model, tokens[:, :, t], cache)
        for z in range(2):
            full = run(model, SOURCE, tokens[:, z])[:, t]
            np.testing.assert_allclose(logits[:, z], full, atol=1e-5)
        if t == 1:
            # The second row's hypotheses change places, and so do their tokens.
            cache = cache.reorder(parents)
            tokens = jnp.take_along_axis(tokens, parents[..., None], axis=1)


@pytest.mark.parametrize("alignment", ["additive", "general"])
def test_a_row_that_holds_two_pairs_gives_what_a_row_for_each_gives(alignment):
    model = build(alignment=alignment)
    packed = run(
        model,
        jnp.concatenate([SOURCE[:1], SOURCE[1:, :3], jnp.zeros((1, 1), int)], 1),
        jnp.concatenate([TARGET[:1], TARGET[1:, :3], jnp.zeros((1, 1), int)], 1),
        segments=Segments(
            jnp.array([[1] * 5 + [2] * 3 + [0]]), jnp.array([[1] * 4 + [2] * 3 + [0]])
        ),
    )
    apart = run(model, SOURCE, TARGET)
    np.testing.assert_allclose(packed[0, :4], apart[0], atol=1e-5)
    np.testing.assert_allclose(packed[0, 4:7], apart[1, :3], atol=1e-5)


def test_attention_is_over_real_tokens(model):
    recorded = nnx.jit(lambda model: model.attention(SOURCE, TARGET, ["decoder.cross"]))
    weights = recorded(model)["decoder.cross"]
    assert weights.shape == (2, 1, 4, 5)
    assert not weights[1, :, :, 3:].any() and weights[1, :, :, :3].sum() > 0
    with pytest.raises(ValueError, match="no attention layer 'encoder.0'"):
        model.attention(SOURCE, TARGET, ["encoder.0"])


def test_one_batch_is_overfitted():
    model = build(d_model=16, dropout=0.0)
    graph, params = nnx.split(model, nnx.Param)

    def loss(params):
        logits = nnx.merge(graph, params)(SOURCE, TARGET[:, :-1])
        nll = -jax.nn.log_softmax(logits)
        return jnp.take_along_axis(nll, TARGET[:, 1:, None], axis=2).mean()

    @jax.jit
    def train(params):
        def step(params, _):
            value, grads = jax.value_and_grad(loss)(params)
            return jax.tree.map(lambda p, g: p - 0.5 * g, params, grads), value

        return jax.lax.scan(step, params, None, length=150)[1]

    losses = train(params)
    assert losses[-1] < 0.1 < losses[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 7}, "d_model must be even; got 7"),
        ({"alignment": "soft"}, "alignment must be one of"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"pad": 11}, "pad must be a token of the vocabulary of 11"),
        ({"half_width": 0}, "half_width must be positive"),
        ({"dtype": "float8"}, "dtype must be"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_every_field_changes_the_parameters_or_the_output():
    rng = jax.random.key(0)
    few = {"alignment": "local", "encoder_layers": 1, "decoder_layers": 1}
    plain = build(**few)
    outputs = run(plain, SOURCE, TARGET, rng=rng)
    for changes in (
        {"half_width": 1},
        {"dropout": 0.5},
        {"dtype": "bfloat16"},
        {"pad": 2},
        {"alignment": "general"},
        {"alignment": "concat"},
    ):
        changed = build(**(few | changes))
        other = run(changed, SOURCE, TARGET, rng=rng)
        assert jnp.abs(outputs - other.astype(outputs.dtype)).max() > 1e-4, changes


def test_a_context_axis_is_refused():
    with pytest.raises(ValueError, match="context must be 1; got 2"):
        recurrent.check_mesh(CONFIG, {"context": 2})
