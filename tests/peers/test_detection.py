"""Average precision against pycocotools: the same numbers to the last digits."""

import numpy as np
import pytest

pytest.importorskip("pycocotools", reason="needs the extra `detection`")

from qkv_jax.tasks import detection

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]


def scene(seed: int, *, pictures: int = 12, classes: int = 4):
    """Boxes, and guesses near some of them; the last class has no box."""
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, 60, (pictures, 9, 2))
    boxes = np.concatenate([low, low + rng.uniform(4, 30, (pictures, 9, 2))], axis=-1)
    kinds = rng.integers(-1, classes - 1, (pictures, 9))
    near = np.repeat(boxes, 3, axis=1) + rng.normal(0, 2.5, (pictures, 27, 4))
    near[..., 2:] = np.maximum(near[..., 2:], near[..., :2])
    guesses = rng.integers(0, classes, (pictures, 27))
    known = np.repeat(kinds, 3, axis=1)
    guesses = np.where((rng.random(guesses.shape) < 0.8) & (known >= 0), known, guesses)
    # Few levels, so that many scores are equal; some are 0.
    scores = rng.integers(0, 20, guesses.shape) / 20
    outputs = {"boxes": near, "classes": guesses, "scores": scores}
    return outputs, {"boxes": boxes, "classes": kinds}


@pytest.mark.parametrize("seed", range(3))
def test_average_precisions_are_those_of_pycocotools(seed):
    outputs, arrays = scene(seed)
    ours = detection.average_precisions(outputs, arrays, 4)
    theirs = detection._by_pycocotools(outputs, arrays, 4)
    np.testing.assert_allclose(ours, theirs, atol=1e-12)
    assert 0.1 < np.nanmean(ours) < 0.9 and np.isnan(ours[:, 3]).all()


def test_nothing_found_is_a_precision_of_nothing():
    outputs, arrays = scene(0)
    outputs["scores"] = np.zeros_like(outputs["scores"])
    np.testing.assert_array_equal(
        detection._by_pycocotools(outputs, arrays, 4)[:, :3], 0.0
    )
