import itertools
import warnings

import matplotlib
import numpy as np
import pytest

from qkv_jax import viz
from tests.viz.pictures import nothing_is_cut, titles


def _weights(*shape):
    weights = np.random.default_rng(0).random(shape)
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize(
    "shape", [(5, 5), (8, 5, 5), (40, 50), (8, 40, 50), (2, 1, 1), (3, 2, 30)]
)
def test_tokens_stand_on_both_axes_of_attention(tmp_path, shape):
    *heads, targets, sources = shape
    source = [f"source{i}" for i in range(sources)]
    target = [f"target{i}" for i in range(targets)]
    path = tmp_path / "attention.png"
    figure = viz.plot_attention(_weights(*shape), source, target, path, title="layer 2")
    main = figure.axes[0]
    assert [text.get_text() for text in main.get_xticklabels()] == source
    assert [text.get_text() for text in main.get_yticklabels()] == target
    assert (main.get_xlabel(), main.get_ylabel()) == ("source", "target")
    shown = [title for title in titles(figure) if title]
    assert shown == [f"head {i + 1}" for i in range(sum(heads))]
    assert any("attention weight" in axes.get_ylabel() for axes in figure.axes)
    assert path.stat().st_size > 5_000 and nothing_is_cut(path)


def test_the_large_panel_is_the_mean_of_the_heads(tmp_path):
    weights = _weights(3, 2, 4)
    figure = viz.plot_attention(weights, "abcd", "xy", tmp_path / "attention.png")
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), weights.mean(0))
    np.testing.assert_allclose(figure.axes[2 + 2].images[0].get_array(), weights[2])


def test_labels_do_not_overlap(tmp_path):
    tokens = [f"▁token{i}" for i in range(50)]
    figure = viz.plot_attention(
        _weights(50, 50), tokens, tokens, tmp_path / "attention.png"
    )
    for labels in (figure.axes[0].get_xticklabels(), figure.axes[0].get_yticklabels()):
        boxes = [label.get_window_extent() for label in labels]
        assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))


def test_any_script_markup_or_control_character_is_drawn_without_a_warning(tmp_path):
    tokens = ["你好", "مرحبا", "ไทย", "$x$", "a_$", "\n", "\ud800", "", "x" * 100, "😀"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = viz.plot_attention(
            _weights(10, 10),
            tokens,
            tokens,
            tmp_path / "attention.png",
            title="$a 你\n",
        )
    labels = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    assert labels[3:7] == ["$x$", "a_$", "\\n", "\\ud800"]
    assert labels[8] == "x" * 17 + "…"


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 4, 5), (1, 1, 5, 4), (0, 5, 4)])
def test_weights_that_do_not_fit_the_tokens_are_an_error(tmp_path, shape):
    with pytest.raises(
        ValueError, match="T = 5 target tokens and S = 4 source tokens"
    ) as error:
        viz.plot_attention(np.zeros(shape), "abcd", "vwxyz", tmp_path / "attention.png")
    assert str(shape) in str(error.value)


def test_weights_of_zero_are_drawn(tmp_path):
    viz.plot_attention(np.zeros((2, 3, 4)), "abcd", "xyz", tmp_path / "attention.svg")
    assert (tmp_path / "attention.svg").read_text("utf-8").startswith("<?xml")


def test_global_settings_are_untouched(tmp_path):
    before = dict(matplotlib.rcParams)
    viz.plot_curves([{"step": 1, "loss": 2.0}], tmp_path / "curves.pdf")
    viz.plot_attention(np.ones((1, 1)), "a", "b", tmp_path / "attention.png")
    assert dict(matplotlib.rcParams) == before


def test_links_are_framed_where_they_are(tmp_path):
    weights = np.eye(3)
    path = tmp_path / "attention.png"
    figure = viz.plot_attention(weights, "abc", "xyz", path, links=[(0, 2), (1, 1)])
    frames = [patch.get_xy() for patch in figure.axes[0].patches]
    assert frames == [(-0.5, 1.5), (0.5, 0.5)]
