"""A citation graph from an npz file: arcs both ways, features, parts, and errors."""

import numpy as np
import pytest

from qkv_jax.data.citations import CitationGraph
from qkv_jax.data.errors import DataError


def write_graph(directory, *, nodes=36, features=13, classes=3, seed=0, **changes):
    """Nodes of a class share features and edges; the arrays in `changes` are replaced."""
    rng = np.random.default_rng(seed)
    labels = np.arange(nodes) % classes
    rows, columns = np.nonzero(
        (np.arange(features) % classes == labels[:, None])
        & (rng.random((nodes, features)) < 0.7)
    )
    step = np.arange(nodes - classes)
    content = {
        "feat_row": rows,
        "feat_col": columns,
        "feat_val": np.ones(len(rows), np.float32),
        "num_nodes": nodes,
        "num_features": features,
        "labels": labels,
        "edges": np.stack([step, step + classes], 1),
        "train_idx": np.arange(classes * 2),
        "val_idx": np.arange(classes * 2, classes * 5),
        "test_idx": np.arange(classes * 5, nodes),
    } | changes
    directory.mkdir(parents=True, exist_ok=True)
    np.savez(
        directory / "cora.npz", **{k: v for k, v in content.items() if v is not None}
    )
    return directory


def test_edges_go_both_ways_once_and_features_sum_to_one(tmp_path):
    edges = np.array([[0, 1], [1, 0], [2, 1], [3, 3]])
    graph = CitationGraph(directory=write_graph(tmp_path, edges=edges))
    splits = graph.load()
    arcs = set(zip(splits.train["receivers"][0], splits.train["senders"][0]))
    assert arcs == {(0, 1), (1, 0), (2, 1), (1, 2)} | {(i, i) for i in range(36)}
    assert splits.train["receivers"].shape == (1, 40)
    sums = splits.train["features"][0].sum(1)
    np.testing.assert_allclose(sums[sums > 0], 1.0, rtol=1e-6)
    assert splits.sizes == {"features": 13, "classes": 3}
    plain = CitationGraph(directory=tmp_path, self_loops=False, normalise=False).load()
    assert plain.train["receivers"].shape == (1, 4)
    assert set(np.unique(plain.train["features"])) == {0.0, 1.0}


def test_parts_are_one_graph_of_which_other_nodes_count(tmp_path):
    splits = CitationGraph(directory=write_graph(tmp_path)).load()
    counted = [part["counted"] for part in (splits.train, splits.valid, splits.test)]
    assert [int(c.sum()) for c in counted] == [6, 9, 21]
    np.testing.assert_array_equal(sum(c.astype(int) for c in counted), np.ones((1, 36)))
    assert splits.train["features"] is splits.test["features"]


def test_cora_has_the_published_counts(shared):
    splits = CitationGraph(directory=shared / "data/cora").load()
    assert splits.train["features"].shape == (1, 2708, 1433)
    assert splits.train["senders"].shape == (1, 2 * 5278 + 2708)
    assert [
        int(part["counted"].sum()) for part in (splits.train, splits.valid, splits.test)
    ] == [140, 500, 1000]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"edges": None}, "holds no edges; a graph has"),
        ({"edges": np.array([[0, 36]])}, "edges must lie in 0 .. 35; got 0 .. 36"),
        ({"edges": np.arange(3)}, r"edges must be \(edges, 2\)"),
        ({"labels": np.arange(3)}, "labels must be"),
        ({"val_idx": np.array([0, 30])}, "the parts train, valid, test share nodes"),
        ({"edges": np.array([None, 1], object)}, "not an npz file of plain arrays"),
    ],
)
def test_errors_name_the_array(tmp_path, changes, message):
    write_graph(tmp_path, **changes)
    with pytest.raises(DataError, match=message):
        CitationGraph(directory=tmp_path).load()


def test_a_wrong_path_and_a_wrong_file_are_told(tmp_path):
    write_graph(tmp_path)
    with pytest.raises(DataError, match="did you mean cora.npz"):
        CitationGraph(directory=tmp_path, name="coras").load()
    (tmp_path / "text.npz").write_text("not a zip")
    with pytest.raises(DataError, match="not an npz file of plain arrays"):
        CitationGraph(directory=tmp_path, name="text").load()
