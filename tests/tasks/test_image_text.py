"""Recall and captions by hand, and a model trained on one device and on eight."""

import numpy as np
import pytest
from flax import nnx

from qkv_jax.data.captioned_images import CaptionedImages
from qkv_jax.data.splits import take_rows
from qkv_jax.tasks.config import fill_sizes, new_model
from qkv_jax.tasks.image_text import ImageTextScore, ranks
from qkv_jax.training import MeshConfig
from tests.tasks import emoji_toy
from tests.tasks.steps import step_losses
from tests.test_experiments import ROOT, load

NAMES = ("<pad>", "<s>", "</s>", "<unk>", "▁red", "▁dot", "<0xE2>", "<0x82>", "<0xAC>")


def test_ranks_count_what_fits_better_or_as_well():
    fits = np.asarray([[0.9, 0.1, 0.2], [0.5, 0.4, 0.5], [0.3, 0.3, 0.3]])
    assert ranks(fits).tolist() == [0, 2, 2]


def score():
    vectors = np.eye(2, dtype=np.float32)
    tokens = np.asarray([[[9, 4, 5, 2, 0]], [[9, 5, 2, 0, 0]]])
    outputs = {
        # The second style is taken for the other picture.
        "image": np.stack([vectors, vectors[::-1]], axis=1),
        "text": vectors[:, None],
        "captions": np.stack([tokens, tokens[::-1]], axis=1),
    }
    images = np.zeros((2, 2, 8, 8, 3), np.uint8)
    return outputs, {"tokens": tokens, "image": images}, (*NAMES, "<en>")


def test_recall_is_the_mean_of_styles_and_directions():
    values = ImageTextScore()(*score())
    assert values["recall1"] == values["image_to_text1"] == values["recall1_en"] == 0.5
    assert values["recall5"] == 1.0
    assert values["exact"] == values["exact_en"] == 0.5
    assert 0 < values["chrf"] < 100


def test_text_is_put_together_from_pieces_and_bytes():
    text = ImageTextScore().text
    assert text(np.asarray([9, 4, 5, 2, 5]), NAMES) == "red dot"
    assert text(np.asarray([9, 5, 6, 7, 8]), NAMES) == "dot€"
    assert text(np.asarray([9, 6, 0, 0, 0]), NAMES) == "\N{REPLACEMENT CHARACTER}"


def test_captions_are_drawn(tmp_path):
    ImageTextScore().draw(*score(), tmp_path)
    assert (tmp_path / "captions.png").stat().st_size > 1000


@pytest.fixture
def splits(tmp_path, monkeypatch):
    monkeypatch.setenv("QKV_JAX_CACHE", str(tmp_path / "cache"))
    return CaptionedImages(
        directory=emoji_toy.write(tmp_path / "emoji"),
        languages=("en", "de"),
        styles=("flat", "round"),
        vocabulary=290,
    ).load()


def test_updates_are_alike_on_one_device_and_on_eight(splits):
    arrays = {name: array[:8] for name, array in splits.train.items()}
    losses = [
        step_losses(emoji_toy.tiny(**splits.sizes), arrays, mesh=mesh)
        for mesh in (MeshConfig(data=1), MeshConfig(data=2, fsdp=2, tensor=2))
    ]
    np.testing.assert_allclose(*losses, rtol=2e-4)


def test_the_experiment_starts_from_a_folder(splits):
    config = load(ROOT / "experiments" / "image_text" / "emoji.py").CONFIG
    model = fill_sizes(config.model, splits.sizes)
    batch = take_rows(splits.train, np.arange(2))
    made = nnx.eval_shape(lambda: new_model(model, seed=0))
    total, sums = nnx.eval_shape(lambda m: m.loss(batch, rng=None), made)
    assert total.shape == sums["tokens"].shape == ()
    outputs = nnx.eval_shape(lambda m: m.predict(batch), made)
    assert outputs["captions"].shape == (2, 2, 2, splits.sizes["longest"])
