import json

import numpy as np
import pytest

from qkv_jax import viz
from tests.viz.pictures import nothing_is_cut, titles

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


def test_curves_of_a_run_are_drawn_with_units(tmp_path):
    figure = viz.plot_curves(ROWS, tmp_path / "curves.png", title="a run")
    assert (tmp_path / "curves.png").stat().st_size > 20_000
    panels = {axes.get_title(): axes for axes in figure.axes}
    assert panels["Loss"].get_ylabel() == "mean over the training units"
    assert panels["Throughput"].get_ylabel() == "units per second"
    assert all(axes.get_xlabel() == "step" for axes in figure.axes)
    assert titles(figure) == [
        "Loss",
        "Translation quality",
        "Learning rate",
        "Throughput",
        "Gradient norm",
    ]
    assert nothing_is_cut(tmp_path / "curves.png")


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
    assert titles(figure) == ["Loss"]
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
