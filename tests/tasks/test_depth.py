"""Depth of tokens: what is counted, what is drawn, and what is refused."""

import numpy as np
import pytest

from qkv_jax.tasks.depth import DepthScore

DEPTH = np.array([[1, 3, 0], [2, 2, 4]])
OUTPUTS = {"depth": DEPTH, "logits": np.eye(2)}
ARRAYS = {"labels": np.array([0, 0])}


def test_tokens_are_counted_and_padding_is_not():
    found = DepthScore(most=4)(OUTPUTS, ARRAYS, ())
    assert found == pytest.approx(
        {"depth_mean": 12 / 5, "depth_most": 4, "spared": 1 - 12 / 20}
    )


def test_it_is_drawn(tmp_path):
    DepthScore(most=4).draw(OUTPUTS, ARRAYS, (), tmp_path)
    assert (tmp_path / "depth.png").stat().st_size > 1000


def test_a_model_of_fixed_or_greater_depth_is_refused():
    with pytest.raises(ValueError, match="set model.halting"):
        DepthScore(most=4)({"logits": np.eye(2)}, ARRAYS, ())
    with pytest.raises(ValueError, match="a token of depth 4"):
        DepthScore(most=3)(OUTPUTS, ARRAYS, ())
    with pytest.raises(ValueError, match="must be positive"):
        DepthScore(most=0)
