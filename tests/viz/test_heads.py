import numpy as np
import pytest

from qkv_jax import viz
from tests.viz.pictures import nothing_is_cut, titles

VALUES = {
    "encoder.0.attention": [0.5, 1.0],
    "encoder.1.attention": [0.25, 0.75],
    "decoder.0.attention": [0.1, 0.2, 0.3],
    "decoder.0.cross": [0.0, 0.9, 0.4],
}


@pytest.mark.parametrize("copies", [1, 8])
def test_each_kind_of_layer_has_a_panel_with_every_number(tmp_path, copies):
    values = {name: numbers * copies for name, numbers in VALUES.items()}
    path = tmp_path / "heads.png"
    figure = viz.plot_heads(values, path, label="entropy in nats", title="a model")
    kinds = ["encoder self-attention", "decoder self-attention", "cross-attention"]
    assert titles(figure)[:3] == kinds
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts[::copies] == ["0.50", "1.00", "0.25", "0.75"] or copies > 1
    assert len(texts) == 4 * copies
    assert figure.axes[3].get_ylabel() == "entropy in nats"
    assert nothing_is_cut(path)


def test_notes_stand_under_the_number_in_a_frame(tmp_path):
    notes = {"decoder.cross": ["", "rare"]}
    values = {"decoder.cross": [0.0, 2.0]}
    figure = viz.plot_heads(values, tmp_path / "a.svg", label="nats", notes=notes)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["0.00", "2.00\nrare"]
    assert len(figure.axes[0].patches) == 1


def test_no_head_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="at least one layer"):
        viz.plot_heads({}, tmp_path / "heads.png", label="nats")


def test_heads_of_zero_are_drawn(tmp_path):
    viz.plot_heads(
        {"decoder.cross": np.zeros(1)}, tmp_path / "a.png", label="tokens of distance"
    )
    assert nothing_is_cut(tmp_path / "a.png")
