"""The speech recogniser: padding, what its options change, and small files learned by heart."""

import dataclasses
import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax import training
from qkv_jax.data.splits import take_rows
from qkv_jax.models.spectrograms import Augmentation
from qkv_jax.models.speech import Config, Model, ctc_loss
from qkv_jax.tasks import load_task
from qkv_jax.tasks.config import fill_sizes, new_model
from qkv_jax.training import MeshConfig, OptimizerConfig, RunConfig, TrainingConfig
from tests.data.utterances import write_an4, write_fsdd
from tests.tasks import toy

SMALL = Config(
    vocabulary=9,
    channels=5,
    d_model=8,
    d_ff=8,
    heads=2,
    encoder_layers=1,
    decoder_layers=1,
    convolution=3,
    longest=6,
)


def batch(filling=0.0, frames=20, weight=(1.0, 1.0)):
    features = np.random.default_rng(0).normal(size=(2, frames, 5))
    features[1, 11:] = filling
    return {
        "features": jnp.asarray(features, jnp.float32),
        "lengths": jnp.array([19, 11]),
        "tokens": jnp.array([[4, 4, 7], [5, 0, 0]]),
        "weight": jnp.array(weight),
    }


@functools.cache
def model(config):
    return Model(config, rngs=nnx.Rngs(0))


@functools.cache
def loss_of(config, rng=None):
    """A jitted function from a batch to the loss's sums."""
    made, rng = model(config), None if rng is None else jax.random.key(rng)
    return jax.jit(lambda rows: made.loss(rows, rng=rng)[1])


@functools.cache
def total(config, rng=None):
    return float(loss_of(config, rng)(batch())["loss_sum"])


def encode(rows):
    return jax.jit(model(SMALL).encode)(rows)


def shapes(config):
    made = nnx.eval_shape(lambda: new_model(config, seed=0))
    return sorted(leaf.shape for leaf in jax.tree.leaves(nnx.state(made, nnx.Param)))


def test_what_fills_rows_up_changes_nothing():
    assert loss_of(SMALL)(batch()) == loss_of(SMALL)(batch(filling=9.0))
    rows = batch()
    longer = rows | {"features": jnp.pad(rows["features"], ((0, 0), (0, 8), (0, 0)))}
    (states, lengths, _), (more, _, _) = encode(rows), encode(longer)
    assert lengths.tolist() == [5, 3] and more.shape[1] == 7
    np.testing.assert_allclose(states[1, :3], more[1, :3], atol=1e-5)


def test_a_row_of_weight_0_counts_nothing():
    one, other, both = (
        loss_of(SMALL)(batch(weight=w)) for w in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0))
    )
    assert one["tokens"] == 4 and other["tokens"] == 2
    for name, value in both.items():
        assert value == pytest.approx(float(one[name] + other[name]), rel=1e-5), name


@pytest.mark.parametrize(
    "change",
    [
        {"cepstra": 3},
        {"subsampling": ((4, 4),)},
        {"convolution": 0},
        {"intermediate": 1, "encoder_layers": 2},
        {"decoder_layers": 0},
    ],
)
def test_choices_of_layers_change_the_parameters(change):
    changed = dataclasses.replace(SMALL, **change)
    assert shapes(changed) != shapes(SMALL)
    _, sums = jax.eval_shape(lambda: new_model(changed, seed=0).loss(batch(), rng=None))
    assert ("nll_sum" in sums) == bool(changed.decoder_layers)


@pytest.mark.parametrize("change", [{"ctc_weight": 0.6}, {"label_smoothing": 0.0}])
def test_choices_of_losses_change_the_loss(change):
    assert abs(total(dataclasses.replace(SMALL, **change)) - total(SMALL)) > 1e-4


def test_dropout_and_augmentation_are_drawn_in_training_alone():
    noise = Augmentation(noise=0.5)
    noisy = dataclasses.replace(SMALL, augmentation=noise, dropout=0.0)
    assert total(noisy) == pytest.approx(total(SMALL), rel=1e-5)
    assert abs(total(noisy, 0) - total(SMALL)) > 1e-3
    assert abs(total(SMALL, 0) - total(SMALL)) > 1e-3


def test_ctc_of_too_few_frames_is_left_out():
    logits = jnp.zeros((2, 4, 5))
    tokens = jnp.array([[4, 4, 4], [4, 3, 4]])
    nll = ctc_loss(logits, jnp.array([4, 4]), tokens)
    # Four frames spell 4 3 4 in as many ways as one blank or one repeat can be put in: 4 + 3.
    np.testing.assert_allclose(nll, [0.0, 4 * np.log(5) - np.log(7)], rtol=1e-4)


def test_the_decoder_steps_as_it_reads():
    states, lengths, _ = encode(batch())
    decoder = model(SMALL).decoder
    tokens = jnp.array([[1, 4, 4, 7], [1, 5, 2, 0]])
    whole = jax.jit(decoder)(tokens, states, lengths)
    cache = decoder.init_cache(states, lengths, hypotheses=1, steps=4)
    step = jax.jit(decoder.decode_step)
    for t in range(4):
        logits, cache = step(tokens[:, t : t + 1], cache)
        np.testing.assert_allclose(logits[:, 0], whole[:, t], atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "multiple of heads"),
        ({"subsampling": ((2, 3),)}, "size >= stride"),
        ({"intermediate": 1}, "below encoder_layers"),
        ({"ctc_weight": 2.0}, "ctc_weight must be in"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"longest": 0}, "longest must be positive"),
        ({"beams": -1}, "beams must not be negative"),
    ],
)
def test_wrong_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


def test_a_model_needs_the_sizes_of_its_data():
    with pytest.raises(ValueError, match="a unit besides"):
        Model(Config(), rngs=nnx.Rngs(0))


def experiment(name, data):
    """An experiment on other data."""
    file = Path(__file__).parents[2] / f"experiments/speech_recognition/{name}.py"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.CONFIG
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **data))


@pytest.fixture(scope="module")
def an4(tmp_path_factory):
    directory = write_an4(tmp_path_factory.mktemp("an4"), speakers=7)
    return experiment("an4", {"directory": directory, "valid_speakers": 1, "mel": 16})


@pytest.fixture(scope="module")
def fsdd(tmp_path_factory):
    file = write_fsdd(tmp_path_factory.mktemp("fsdd") / "fsdd.npz", recordings=2)
    return experiment("fsdd", {"file": file, "held_out": "eve"})


@pytest.mark.parametrize("name", ["an4", "fsdd"])
def test_experiments_have_shapes(name, request):
    config = request.getfixturevalue(name)
    splits = config.data.load()
    whole = nnx.eval_shape(
        lambda: new_model(fill_sizes(config.model, splits.sizes), seed=0)
    )
    graph, params = nnx.split(whole, nnx.Param)
    rows = take_rows(splits.train, np.arange(3))

    def run(params, rows):
        made = nnx.merge(graph, params)
        return made.loss(rows, rng=jax.random.key(0))[0], made.predict(rows)

    loss, found = jax.eval_shape(run, params, rows)
    assert loss.shape == ()
    assert found["tokens"].shape == (3, config.model.longest)


def shrunk(config, directory, **changes):
    """An experiment of a size for tests; its other choices are kept."""
    sizes = {"d_model": 16, "d_ff": 16, "heads": 2, "encoder_layers": 1}
    model = dataclasses.replace(config.model, **sizes, **changes)
    return dataclasses.replace(
        config,
        model=model,
        optimizer=OptimizerConfig(peak_lr=0.02, warmup_steps=10),
        batch_rows=8,
        lengths=1,
        mesh=MeshConfig(data=1),
        run=RunConfig(directory=directory),
    )


def test_a_recogniser_learns_words_and_finds_them_by_search(an4, tmp_path):
    plain = {"augmentation": Augmentation(), "dropout": 0.0, "longest": 6}
    config = shrunk(an4, tmp_path, beams=0, subsampling=((3, 2),), **plain)
    steps = TrainingConfig(
        steps=300, evaluate_every=300, checkpoint_every=300, metric="wer"
    )
    config = dataclasses.replace(config, training=steps)
    assert toy.run(config)["test"]["wer"] < 20
    searching = dataclasses.replace(config.model, beams=3, search_weight=0.5)
    trained = load_task(tmp_path, config=dataclasses.replace(config, model=searching))
    test = trained.splits.test
    assert config.score(trained.predict(test), test, trained.splits.names)["wer"] < 20


def test_eight_devices_train_as_one(an4, tmp_path):
    config = shrunk(an4, tmp_path)
    optimizer = training.make_optimizer(config.optimizer, 20)
    found = []
    for shape in (MeshConfig(data=1), MeshConfig(data=4, tensor=2)):
        mesh = training.make_mesh(shape)
        task = config.task(mesh)
        step = training.make_train_step(task.loss_fn, optimizer, mesh=mesh)
        state = training.create_state(task.params, optimizer, seed=0, mesh=mesh)
        for _ in range(2):
            rows = training.place_batch(next(task.iterator), mesh)
            state, metrics = step(state, rows)
        found.append(float(metrics["loss"]))
    assert found[0] == pytest.approx(found[1], rel=1e-4)
