import itertools

import numpy as np
import pytest

from qkv_jax import viz
from qkv_jax.viz.embeddings import principal_components
from tests.viz.pictures import nothing_is_cut, titles


def _points(count=60, groups=("source", "target"), seed=0):
    rng = np.random.default_rng(seed)
    names = [f"▁word{i}" for i in range(count)]
    return viz.Points(
        rng.normal(size=(count, 5)),
        names,
        [groups[i % len(groups)] for i in range(count)],
    )


def test_the_components_are_those_of_the_largest_variance():
    rng = np.random.default_rng(1)
    plane, _ = np.linalg.qr(rng.normal(size=(7, 2)))
    places = rng.normal(size=(50, 2)) * [5.0, 1.0]
    vectors = places @ plane.T + 3.0
    found, shares = principal_components(vectors)
    np.testing.assert_allclose(shares.sum(), 1.0)
    gram = found @ found.T
    centred = places - places.mean(0)
    np.testing.assert_allclose(gram, centred @ centred.T, atol=1e-9)
    assert found[:, 0].var() > found[:, 1].var()
    again, _ = principal_components(vectors[::-1])
    np.testing.assert_allclose(again, found[::-1], atol=1e-9)


def test_vectors_without_variance_are_at_the_centre():
    found, shares = principal_components(np.ones((3, 1)))
    assert found.tolist() == [[0, 0]] * 3 and shares.tolist() == [0, 0]


def test_groups_are_named_and_names_do_not_overlap(tmp_path):
    path = tmp_path / "embeddings.png"
    figure = viz.plot_embeddings({"one table": _points()}, path, title="vectors")
    (axes,) = figure.axes
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["target (30)", "source (30)"]
    figure.draw_without_rendering()  # Saving left sizes of another resolution.
    boxes = [text.get_window_extent() for text in axes.texts]
    assert axes.texts[0].get_text() == "▁word0" and 5 < len(boxes) < 60
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert "% of the variance" in axes.get_xlabel() and nothing_is_cut(path)


def test_two_tables_have_a_panel_each(tmp_path):
    tables = {"source": _points(9, ["source"]), "target": _points(5, ["target"], 1)}
    figure = viz.plot_embeddings(tables, tmp_path / "embeddings.svg")
    assert titles(figure) == ["source", "target"]


@pytest.mark.parametrize("count, names", [(1, 1), (3, 2)])
def test_points_that_do_not_fit_are_an_error(tmp_path, count, names):
    points = _points(count)._replace(names=["a"] * names)
    with pytest.raises(ValueError, match="words must have at least 2 vectors"):
        viz.plot_embeddings({"words": points}, tmp_path / "a.png")
