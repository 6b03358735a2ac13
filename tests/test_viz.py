import itertools
import json
import warnings

import matplotlib
import matplotlib.image
import numpy as np
import pytest

from qkv_jax import viz

ROWS = [
    {
        "step": step,
        "train/loss": 9.0 / step,
        "train/tokens_per_second": 6000.0,
        "train/learning_rate": 1e-3,
        "train/grad_norm": 1.0 + step / 100,
    }
    for step in range(1, 301)
]
ROWS += [
    {
        "step": step,
        "validation/loss": abs(step - 200) / 100 + 1,
        "validation/bleu": 20.0,
    }
    for step in (100, 200, 300)
]


def _titles(figure):
    return [axes.get_title() for axes in figure.axes]


def _weights(*shape):
    weights = np.random.default_rng(0).random(shape)
    return weights / weights.sum(-1, keepdims=True)


def _nothing_is_cut(path):
    """Whether the outermost pixels are white: a label that ran over the edge would show."""
    pixels = matplotlib.image.imread(path)[..., :3]
    edges = pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]
    return all((edge == 1).all() for edge in edges) and (pixels < 0.9).any()


def test_curves_of_a_run_are_drawn_with_units(tmp_path):
    figure = viz.plot_curves(ROWS, tmp_path / "curves.png", title="a run")
    assert (tmp_path / "curves.png").stat().st_size > 20_000
    panels = {axes.get_title(): axes for axes in figure.axes}
    assert panels["Loss"].get_ylabel() == "mean over the training units"
    assert panels["Throughput"].get_ylabel() == "units per second"
    assert all(axes.get_xlabel() == "step" for axes in figure.axes)
    assert _titles(figure) == [
        "Loss",
        "Translation quality",
        "Learning rate",
        "Throughput",
        "Gradient norm",
    ]
    assert _nothing_is_cut(tmp_path / "curves.png")


def test_the_legend_names_the_best_evaluation(tmp_path):
    figure = viz.plot_curves(ROWS, tmp_path / "curves.png")
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert legend == ["training", "validation, best 1 at step 200"]


def test_a_file_equals_its_rows_and_a_cut_last_line_is_passed_over(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(
        "".join(json.dumps(row) + "\n" for row in ROWS) + '{"step": 301, "tr'
    )
    viz.plot_curves(file, tmp_path / "a.png")
    viz.plot_curves(ROWS, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_short_keys_and_repeated_or_missing_values(tmp_path):
    rows = [
        {"step": 20, "loss": 3.0},
        {"step": 10, "loss": 4.0, "nll": None, "valid/loss": 5.0, "unknown": "x"},
        {"step": 20, "loss": 2.0, "nll": float("nan")},
    ]
    figure = viz.plot_curves(rows, tmp_path / "curves.png")
    assert _titles(figure) == ["Loss"]
    (curve,) = [line for line in figure.axes[0].lines if line.get_label() == "training"]
    np.testing.assert_array_equal(curve.get_xydata(), [[10, 4], [20, 2]])


def test_a_broken_line_is_named(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(
        '{"step": 1, "train/loss": 1}\nloss\n{"step": 2, "train/loss": 1}\n'
    )
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2 is not JSON"):
        viz.plot_curves(file, tmp_path / "curves.png")


@pytest.mark.parametrize(
    "rows", [[], [{"step": 1, "unknown": 2.0}], [{"train/loss": 2.0}]]
)
def test_nothing_to_draw_is_an_error(tmp_path, rows):
    with pytest.raises(ValueError, match="metrics must have rows"):
        viz.plot_curves(rows, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


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
    titles = [title for title in _titles(figure) if title]
    assert titles == [f"head {i + 1}" for i in range(sum(heads))]
    assert any("attention weight" in axes.get_ylabel() for axes in figure.axes)
    assert path.stat().st_size > 5_000 and _nothing_is_cut(path)


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
    viz.plot_curves(ROWS[:3], tmp_path / "curves.pdf")
    viz.plot_attention(np.ones((1, 1)), "a", "b", tmp_path / "attention.png")
    assert dict(matplotlib.rcParams) == before
