import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx

from qkv_jax.compression import (
    Quantisation,
    dequantised,
    imitate,
    pack,
    quantise,
    unpack,
)
from qkv_jax.layers import init_rngs
from qkv_jax.models import seq2seq

SIZES = {
    "d_model": 20,
    "d_ff": 28,
    "heads": 2,
    "encoder_layers": 1,
    "decoder_layers": 1,
}
WAYS = {
    "int8": Quantisation(weights="int8"),
    "int8 in groups": Quantisation(weights="int8", group=5),
    "int8 activations": Quantisation(weights="int8", activations="int8"),
    "int4": Quantisation(weights="int4", group=10),
}
SOURCE = jnp.array([[5, 3, 7, 2, 0], [9, 2, 0, 0, 0]])
TARGET = jnp.array([[1, 4, 8], [1, 6, 2]])


@functools.cache
def plain():
    """Graph and parameters of the float model."""
    return halves_of(
        lambda: seq2seq.Model(
            seq2seq.tiny(vocabulary=13, zero_pad=True, **SIZES), rngs=init_rngs(3)
        )
    )


@functools.cache
def halves(name):
    """Graph and parameters of the model as a way has it."""
    before = plain()

    def make():
        made = nnx.merge(*before)
        quantise(made, WAYS[name])
        return made

    return halves_of(make)


def halves_of(make):
    """In one compilation."""
    graph = nnx.split(nnx.eval_shape(make), nnx.Param)[0]
    return graph, jax.jit(lambda: nnx.state(make(), nnx.Param))()


@functools.partial(jax.jit, static_argnums=0)
def logits(graph, params):
    return nnx.merge(graph, params)(SOURCE, TARGET)


def test_a_weight_is_within_half_a_scale_of_what_it_was():
    graph, params = halves("int8")
    kernel = nnx.merge(graph, params).encoder[0].attention.out.kernel[...]
    before = nnx.merge(*plain()).encoder[0].attention.out.kernel[...]
    assert kernel.qvalue.dtype == jnp.int8
    assert kernel.scale.shape == (1, 1, 20)  # One for each output.
    np.testing.assert_allclose(
        kernel.scale[0, 0], np.abs(before).max((0, 1)) / 127.5, rtol=1e-6
    )
    off = jnp.abs(qwix.dequantize(kernel) - before)
    assert (off <= kernel.scale * 0.51).all()


def test_groups_share_a_scale_and_divide_the_inputs():
    graph, params = halves("int4")
    made = nnx.merge(graph, params)
    assert made.encoder[0].feed_forward.up.kernel[...].scale.shape == (2, 28)
    # 28 inputs in groups of at most 10: of 7.
    assert made.encoder[0].feed_forward.down.kernel[...].scale.shape == (4, 20)
    assert made.target_embedding.table[...].scale.shape == (13, 2)


@pytest.mark.parametrize("name", WAYS)
def test_the_quantised_model_computes_what_its_weights_say(name):
    graph, params = halves(name)
    found = logits(graph, params)
    wanted = logits(plain()[0], dequantised(params))
    exact = not WAYS[name].activations
    np.testing.assert_allclose(found, wanted, atol=1e-5 if exact else 0.2)
    assert exact == np.allclose(found, wanted, atol=1e-5)
    assert not np.allclose(found, logits(*plain()), atol=1e-4)


def test_cached_steps_of_a_quantised_model_agree_with_the_whole():
    graph, params = halves("int4")

    @jax.jit
    def steps(params):
        made = nnx.merge(graph, params)
        memory, lengths = made.encode(SOURCE)
        cache = made.init_cache(memory, lengths, hypotheses=1, steps=3)
        found = []
        for t in range(3):
            one, cache = made.decode_step(TARGET[:, t : t + 1], cache)
            found.append(one)
        return jnp.concatenate(found, 1)

    np.testing.assert_allclose(steps(params), logits(graph, params), atol=1e-5)


def test_products_are_of_integers_where_activations_are():
    def dots(name):
        graph, params = halves(name)
        text = str(jax.make_jaxpr(functools.partial(logits, graph))(params))
        return text.count("preferred_element_type=int32")

    assert dots("int8") == 0
    # 4 + 2 of the encoder, 8 + 2 of the decoder, and the logits.
    assert dots("int8 activations") == 17


@pytest.mark.parametrize("name", ["int8 activations", "int4"])
def test_imitation_computes_as_the_quantised_model_and_has_slopes(name):
    how = WAYS[name]

    def loss(params):
        made = nnx.merge(plain()[0], params)
        imitate(made, how)
        return jnp.sum(made(SOURCE, TARGET) ** 2)

    value, slopes = jax.jit(jax.value_and_grad(loss))(plain()[1])
    wanted = jnp.sum(logits(*halves(name)) ** 2)
    # The logits' own activations are not imitated.
    np.testing.assert_allclose(value, wanted, rtol=0.05 if how.activations else 1e-4)
    assert all(
        jnp.abs(x).max() > 0
        for x in jax.tree.leaves(slopes["encoder"][0]["feed_forward"])
    )


def test_a_zero_row_of_padding_stays_zero():
    made = nnx.merge(*halves("int8"))
    assert not made.target_embedding(jnp.array([[0]])).any()


def test_four_bits_are_packed_two_a_byte():
    x = jnp.array([[-8, 7, -1], [0, 3, -5]], jnp.int4)
    assert pack(x).tolist() == [0x78, 0x0F, 0xB3]
    np.testing.assert_array_equal(unpack(pack(x), (2, 3)), x)
    np.testing.assert_array_equal(unpack(pack(x[0]), (3,)), x[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "int2"}, "weights must be"),
        ({"weights": "int8", "activations": "int4"}, "activations must be"),
        ({"activations": "int8"}, "give weights"),
        ({"weights": "int4", "group": 1}, "group must be"),
        ({"weights": "int4", "activations": "int8"}, "one scale an output"),
        ({"weights": "int8", "activations": "int8", "group": 8}, "one scale an output"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Quantisation(**options)
