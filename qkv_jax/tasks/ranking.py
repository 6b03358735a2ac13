"""How high a recommender ranks the item that came next, among all items."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """HR@k, NDCG@k and the mean reciprocal rank, over all items: no sample of them.

    Attributes:
        at: k, of each of the metrics "hr@k" and "ndcg@k".
        exclude_seen: whether items that the user has rated before are left out of the ranking.
    """

    at: tuple[int, ...] = (5, 10, 20)
    exclude_seen: bool = True

    def __post_init__(self):
        if not self.at or min(self.at) < 1:
            raise ValueError(f"at must hold positive numbers; got {self.at}")

    def __call__(
        self,
        outputs: Mapping[str, np.ndarray],
        arrays: Mapping[str, np.ndarray],
        names: Sequence[str] = (),
    ) -> dict[str, float]:
        """The metrics of users' scores.

        Args:
            outputs: scores (users, 1 + V) floating, of items by number; 0 is no item.
            arrays: target (users,) int; seen (users, W) int, then 0.

        Source: Krichene and Rendle 2020 (KDD), of why to rank all items; NDCG of one right item is
        1 / log2(1 + rank).
        """
        ranks = ranks_of(
            outputs["scores"],
            arrays["target"],
            arrays["seen"] if self.exclude_seen else None,
        )
        metrics = {}
        for k in self.at:
            hit = ranks <= k
            metrics[f"hr@{k}"] = float(hit.mean())
            metrics[f"ndcg@{k}"] = float((hit / np.log2(1.0 + ranks)).mean())
        return metrics | {"mrr": float((1.0 / ranks).mean())}


def ranks_of(
    scores: np.ndarray, target: np.ndarray, seen: np.ndarray | None = None
) -> np.ndarray:
    """The rank of each row's target, from 1; an item of the same score stands before it.

    Args:
        scores: (users, 1 + V) floating; column 0 is no item. NaN ranks last.
        target: (users,) int, 1 .. V.
        seen: (users, W) int, items that do not count, unless one is the target; 0: none.
    """
    scores = np.where(np.isnan(scores), -np.inf, scores)
    wanted = np.take_along_axis(scores, target[:, None], axis=1)
    before = scores >= wanted
    if seen is not None:
        np.put_along_axis(before, seen, False, axis=1)
    before[:, 0] = False
    np.put_along_axis(before, target[:, None], True, axis=1)
    return before.sum(axis=1)


def popularity(arrays: Mapping[str, np.ndarray], items: int) -> np.ndarray:
    """Scores (users, 1 + V) that any recommender should beat: how many users have rated each item.

    Counted over all that is `seen` (users, W) in the arrays. Of equally popular items, that of the
    higher number comes first.
    """
    counts = np.bincount(arrays["seen"].ravel(), minlength=1 + items)
    counts[0] = 0
    scores = counts + np.arange(1 + items) / (1 + items)
    return np.broadcast_to(scores, (len(arrays["seen"]), 1 + items))
