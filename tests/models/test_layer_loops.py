"""Models whose layers are a loop, or computed again in the backward pass, are what they were."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from qkv_jax.models import image_text, recommender, speech, text_classifier, vit
from tests.jaxprs import equations
from tests.models import (
    images,
    test_image_text,
    test_recommender,
    test_text_classifier,
    test_vit,
)
from tests.tasks import emoji_toy, test_speech

CAPTIONS = emoji_toy.tiny(vocabulary=test_image_text.V, longest=test_image_text.T)
# Of each model the module, a configuration of several layers, and a batch.
MODELS: dict[str, tuple[Any, Any, Any]] = {
    "text": (
        text_classifier,
        dataclasses.replace(test_text_classifier.KINDS["long"], layers=2),
        test_text_classifier.make_batch(),
    ),
    "images": (vit, test_vit.TINY, test_vit.BATCH),
    "items": (
        recommender,
        recommender.sasrec(**test_recommender.SMALL | {"layers": 2}),
        test_recommender.ROWS,
    ),
    "captions": (
        image_text,
        dataclasses.replace(CAPTIONS, image_layers=2, text_layers=2, caption_layers=2),
        test_image_text.batch(),
    ),
    "speech": (
        speech,
        dataclasses.replace(
            test_speech.SMALL, encoder_layers=3, decoder_layers=2, intermediate=1
        ),
        test_speech.batch(),
    ),
}
each = pytest.mark.parametrize("name", MODELS)


def loss(name: str, **ways: Any) -> tuple[Any, Any]:
    """A model's loss in training, of (parameters, batch), and its parameters."""
    module, config, _ = MODELS[name]
    if module is vit:
        model = images.build(module, dataclasses.replace(config, **ways))
    else:
        model = module.Model(dataclasses.replace(config, **ways), rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)
    rng = jax.random.key(1)
    return lambda p, batch: nnx.merge(graph, p).loss(batch, rng=rng)[0], params


def assert_the_same(name: str, ways: dict[str, Any], **shared: Any) -> None:
    """A model has the same loss and gradients with these ways as without."""
    (plain, params), (other, _) = loss(name, **shared), loss(name, **shared, **ways)
    found, expected = (
        jax.jit(jax.value_and_grad(function))(params, MODELS[name][-1])
        for function in (other, plain)
    )
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, found, expected)


@each
def test_a_loop_whose_layers_are_computed_again_computes_the_same(name):
    assert_the_same(name, {"scan_layers": True, "remat": "everything"})


def test_layers_of_several_patterns_are_computed_again_too():
    assert_the_same("images", {"remat": "dots"}, attention=("rows", "columns"))


@each
def test_each_way_changes_the_program(name):
    def counts(**ways: Any) -> tuple[int, ...]:
        function, params = loss(name, **ways)
        program = jax.make_jaxpr(jax.grad(function))(params, MODELS[name][-1])
        names = [e.primitive.name for e in equations(program.jaxpr)]
        return tuple(names.count(kind) for kind in ("dot_general", "scan"))

    plain, loop = counts(), counts(scan_layers=True)
    dots, everything = (counts(remat=remat) for remat in ("dots", "everything"))
    assert loop[0] < plain[0] < dots[0] < everything[0]
    assert plain[1] == dots[1] == everything[1] < loop[1]


@each
def test_what_is_kept_must_have_a_name(name):
    with pytest.raises(ValueError, match="remat must be one of .*'dots'.*; got 'some'"):
        dataclasses.replace(MODELS[name][1], remat="some")
