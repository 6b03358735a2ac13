"""The same training and decoding on one device, and shared out in every way."""

import collections
import dataclasses
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from qkv_jax import training
from qkv_jax.models import seq2seq
from qkv_jax.training import MeshConfig, make_mesh
from qkv_jax.translation import DecodingConfig, Translator
from qkv_jax.translation.loss import make_loss
from qkv_jax.translation.models import init_params

CONFIG = seq2seq.Config(
    vocabulary=88,
    d_model=32,
    d_ff=48,
    heads=4,
    kv_heads=2,
    encoder_layers=1,
    decoder_layers=1,
    norm="pre",
    dropout=0.1,
    attention_dropout=0.1,
)
# All that a search asks of a tokeniser.
IDS = SimpleNamespace(start=1, eos=2, pad=0, never=(0, 1, 3), prefix=())
ROWS, LENGTH = 8, 12
MESHES = {
    "data": {"data": 8},
    "fsdp": {"data": 1, "fsdp": 8},
    "tensor": {"data": 4, "tensor": 2},
    "2x2x2": {"data": 2, "fsdp": 2, "tensor": 2},
    "context": {"data": 2, "context": 4},
    "2x2x2 with context": {"data": 1, "fsdp": 2, "context": 2, "tensor": 2},
}
COLLECTIVES = r"= (.*) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("


def batches():
    rng = np.random.default_rng(0)
    for lengths in ((12, 9), (7, 12), (10, 10)):
        arrays = rng.integers(4, 88, (2, ROWS, LENGTH)).astype(np.int32)
        for array, length in zip(arrays, lengths):
            array[:, length:] = 0
            array[0, 4:] = 0
        yield {"source": arrays[0], "target": arrays[1]}


def remember() -> optax.GradientTransformation:
    """Keeps the last gradient in the optimizer's state."""

    def init(params):
        return jax.tree.map(jnp.zeros_like, params)

    return optax.GradientTransformation(
        init, lambda grads, _, params=None: (grads, grads)
    )


def trained(mesh, config=CONFIG):
    """Losses, the first gradient, parameters after 3 steps, and the compiled step's text."""
    # A large eps: where the gradient is 0 but for rounding, Adam would make that a whole step.
    optimizer = optax.chain(remember(), optax.adam(1e-2, eps=1e-3))
    state = training.create_state(
        lambda: init_params(config, seed=0), optimizer, seed=0, mesh=mesh
    )
    step = training.make_train_step(make_loss(config, 0.1), optimizer, mesh=mesh)
    losses, gradient = [], None
    placed = [training.place_batch(batch, mesh) for batch in batches()]
    compiled = step.lower(state, placed[0]).compile()
    for batch in placed:
        state, metrics = compiled(state, batch)
        losses.append(float(metrics["loss"]))
        gradient = gradient or jax.tree.map(np.asarray, state.opt_state[0])
    return losses, gradient, jax.tree.map(np.asarray, state.params), compiled.as_text()


@pytest.fixture(scope="module")
def one_device():
    return trained(make_mesh(MeshConfig(data=1)))


def collectives(text: str) -> dict[str, list[list[int]]]:
    """Of each kind of collective, the shapes of all its results."""
    found = collections.defaultdict(list)
    for result, kind in re.findall(COLLECTIVES, text):
        for dims in re.findall(r"\[([\d,]*)\]", result):
            found[kind].append([int(size) for size in dims.split(",") if size])
    return found


def alike(found, wanted):
    """Losses, gradients and parameters."""
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
        found[:3],
        wanted[:3],
    )


@pytest.mark.parametrize("name", MESHES)
def test_training_equals_one_device(name, one_device):
    found = trained(make_mesh(MeshConfig(**MESHES[name])))
    alike(found, one_device)
    moved = collectives(found[3])
    counts = {kind: len(shapes) for kind, shapes in moved.items()}
    for shapes in moved.values():
        # Neither logits of all classes nor of a device's share of them cross the mesh.
        assert not [s for s in shapes if len(s) == 3 and s[2] in (88, 44, 22, 11)]
    parameters = len(jax.tree.leaves(found[2]))
    if name == "data":
        assert "all-gather" not in counts, moved["all-gather"]
    if name == "context":
        # But for a few numbers a row, nothing is gathered: no parameter, no activation.
        assert not [s for s in moved["all-gather"] if np.prod(s) > 64]
    if name == "tensor":
        # Nothing is gathered but the residual stream (B, T, D) of a device's rows.
        stream = [ROWS // 4, LENGTH, CONFIG.d_model]
        assert not [s for s in moved["all-gather"] if np.prod(s) > 64 and s != stream]
    if "fsdp" in MESHES[name]:
        # Each matrix at most twice: for the way there and for the way back.
        assert counts["all-gather"] <= 2 * parameters


@pytest.mark.parametrize("context", ["ring", "zigzag", "ulysses"])
def test_lengths_are_shared_out_by_config_alone(context, one_device):
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, context=2, tensor=2))
    found = trained(mesh, dataclasses.replace(CONFIG, context=context))
    alike(found, one_device)
    moved = collectives(found[3])
    # Three attentions, there and back: query, key, value and output, or rings of permutations.
    if context == "ulysses":
        assert len(moved["all-to-all"]) == 48
    else:
        assert "all-to-all" not in moved
        # Zigzag's chunks come and go besides.
        most = len(moved["collective-permute"])
        assert most > 48 if context == "zigzag" else 0 < most <= 48


def test_parameters_and_moments_are_made_in_their_places():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    state = training.create_state(
        lambda: init_params(CONFIG, seed=0),
        optax.adam(1e-3),
        seed=0,
        mesh=mesh,
        ema=True,
    )
    whole = sum(x.size for x in jax.tree.leaves(state.params))
    for tree in (state.params, state.ema, state.opt_state[0].mu, state.opt_state[0].nu):
        held = sum(x.addressable_shards[0].data.size for x in jax.tree.leaves(tree))
        assert held < 0.3 * whole  # a quarter, and what is small


def test_a_mesh_of_explicit_axes_trains_the_same(one_device):
    explicit = jax.make_mesh((4, 2), ("data", "tensor"), (AxisType.Explicit,) * 2)
    assert trained(explicit)[0] == pytest.approx(one_device[0], rel=1e-5)


def test_heads_that_do_not_divide_are_an_error_before_anything_is_made():
    with pytest.raises(ValueError, match="'heads' into 8 parts.* size of 4"):
        trained(make_mesh(MeshConfig(data=1, tensor=8)))


@pytest.mark.parametrize("name", MESHES)
def test_decoding_equals_one_device(name):
    params = init_params(CONFIG, seed=0)
    source = next(batches())["source"]

    def search(sizes):
        mesh = make_mesh(MeshConfig(**sizes))
        decoding = DecodingConfig(beams=2, max_length=8)
        translator = Translator(CONFIG, params, IDS, decoding=decoding, mesh=mesh)
        return jax.device_get(translator.search(source))

    found, wanted = search(MESHES[name]), search({"data": 1})
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_allclose(found.scores, wanted.scores, rtol=1e-5, atol=1e-5)
