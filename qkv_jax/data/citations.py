"""A citation graph whose nodes are to be classified: Cora, and any other in the same form."""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qkv_jax.data.errors import DataError
from qkv_jax.data.files import missing_file
from qkv_jax.data.splits import Splits

_ARRAYS = (
    *("feat_row", "feat_col", "feat_val", "num_nodes", "num_features"),
    *("labels", "edges", "train_idx", "val_idx", "test_idx"),
)


@dataclass(frozen=True, kw_only=True)
class CitationGraph:
    """One graph in an npz file, with its fixed training, validation and test nodes.

    The file holds `feat_row`, `feat_col` and `feat_val` (the features that are not 0), `num_nodes`,
    `num_features`, `labels` (nodes,), undirected `edges` (edges, 2), and the nodes of each part:
    `train_idx`, `val_idx` and `test_idx`.

    Attributes:
        directory: holds the file.
        name: of the file, without .npz.
        self_loops: whether each node has an arc to itself.
        normalise: whether a node's features are divided by their sum.
    """

    directory: Path
    name: str = "cora"
    self_loops: bool = True
    normalise: bool = True

    def load(self) -> Splits:
        """The graph as one example in each part; the parts differ in the nodes that count.

        Every array has a leading axis of 1: features (1, P, C) float32; receivers and senders
        (1, A) int32, each edge both ways; labels (1, P) int32; counted (1, P) bool.

        Raises:
            DataError: the file is missing or not of this form; the parts share nodes.
        """
        path = Path(self.directory) / f"{self.name}.npz"
        content = _read(path)
        nodes = int(content["num_nodes"])
        labels = content["labels"].astype(np.int32)
        parts = {
            name: content[f"{key}_idx"]
            for name, key in (("train", "train"), ("valid", "val"), ("test", "test"))
        }
        _check(path, content, parts)
        receivers, senders = _arcs(content["edges"], nodes, self_loops=self.self_loops)
        shared = {
            "features": _features(content, normalise=self.normalise),
            "receivers": receivers,
            "senders": senders,
            "labels": labels,
        }
        shared = {name: array[None] for name, array in shared.items()}
        counted = {
            name: np.isin(np.arange(nodes), at)[None] for name, at in parts.items()
        }
        sizes = {
            "features": int(content["num_features"]),
            "classes": int(labels.max()) + 1,
        }
        report = (
            f"{path.name}: {nodes:,} nodes, {len(receivers):,} arcs, {sizes['features']:,} features, "
            f"{sizes['classes']} classes; nodes to learn, validate and test on: "
            + ", ".join(f"{len(at):,}" for at in parts.values()),
        )
        train, valid, test = (
            shared | {"counted": counted[part]} for part in ("train", "valid", "test")
        )
        return Splits(train=train, valid=valid, test=test, sizes=sizes, report=report)


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in _ARRAYS if name not in file]
            if missing:
                raise DataError(
                    f"{path} holds no {', '.join(missing)}; a graph has {', '.join(_ARRAYS)}"
                )
            return {name: file[name] for name in _ARRAYS}
    except FileNotFoundError:
        raise missing_file(path) from None
    except (AttributeError, OSError, ValueError, zipfile.BadZipFile) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is not an npz file of plain arrays: {error}") from None


def _check(
    path: Path, content: dict[str, np.ndarray], parts: dict[str, np.ndarray]
) -> None:
    nodes, features = int(content["num_nodes"]), int(content["num_features"])
    if content["labels"].shape != (nodes,) or content["labels"].min(initial=0) < 0:
        raise DataError(
            f"{path}: labels must be ({nodes},) classes from 0, one a node; "
            f"got {content['labels'].shape}"
        )
    if content["edges"].ndim != 2 or content["edges"].shape[1] != 2:
        raise DataError(
            f"{path}: edges must be (edges, 2); got {content['edges'].shape}"
        )
    limits = {"edges": nodes, "feat_row": nodes, "feat_col": features}
    limits |= {f"{key}_idx": nodes for key in ("train", "val", "test")}
    for name, limit in limits.items():
        array = content[name]
        if array.size and not 0 <= array.min() <= array.max() < limit:
            raise DataError(
                f"{path}: {name} must lie in 0 .. {limit - 1}; "
                f"got {array.min()} .. {array.max()}"
            )
    together = np.concatenate(list(parts.values()))
    if len(np.unique(together)) < len(together):
        raise DataError(f"{path}: the parts {', '.join(parts)} share nodes")


def _arcs(
    edges: np.ndarray, nodes: int, *, self_loops: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Receivers and senders (A,) int32: each edge both ways, once, in the receivers' order."""
    edges = edges[edges[:, 0] != edges[:, 1]]
    loops = np.repeat(np.arange(nodes if self_loops else 0)[:, None], 2, axis=1)
    arcs = np.unique(np.concatenate([edges, edges[:, ::-1], loops]), axis=0)
    receivers, senders = arcs.T.astype(np.int32)
    return receivers, senders


def _features(content: dict[str, np.ndarray], *, normalise: bool) -> np.ndarray:
    shape = int(content["num_nodes"]), int(content["num_features"])
    features = np.zeros(shape, np.float32)
    np.add.at(features, (content["feat_row"], content["feat_col"]), content["feat_val"])
    if normalise:
        total = features.sum(axis=1, keepdims=True)
        features /= np.where(total == 0.0, 1.0, total)
    return features
