"""Ranks among all items, by hand, and the floor that popularity sets."""

import numpy as np
import pytest

from qkv_jax.data.ratings import Ratings
from qkv_jax.tasks.ranking import Ranking, popularity, ranks_of

SCORES = np.array([[9.0, 5, 3, 4, 1, 2]] * 3, np.float32)
TARGET = np.array([1, 5, 2])
SEEN = np.array([[2, 3, 0], [1, 0, 0], [1, 3, 2]])


def test_ranks_are_among_all_items_or_those_not_seen():
    np.testing.assert_array_equal(ranks_of(SCORES, TARGET), [1, 4, 3])
    # The last row's target was seen itself, and still counts.
    np.testing.assert_array_equal(ranks_of(SCORES, TARGET, SEEN), [1, 3, 1])


def test_scores_that_say_nothing_rank_last():
    equal = np.zeros_like(SCORES)
    np.testing.assert_array_equal(ranks_of(equal, TARGET), [5, 5, 5])
    np.testing.assert_array_equal(ranks_of(equal * np.nan, TARGET), [5, 5, 5])


def test_metrics_are_the_means_of_hits_and_discounts():
    outputs, arrays = {"scores": SCORES}, {"target": TARGET, "seen": SEEN}
    got = Ranking(at=(1, 3), exclude_seen=False)(outputs, arrays)
    wanted = {
        "hr@1": 1 / 3,
        "ndcg@1": 1 / 3,
        "hr@3": 2 / 3,
        "ndcg@3": (1 + 1 / 2) / 3,
        "mrr": (1 + 1 / 4 + 1 / 3) / 3,
    }
    assert got == pytest.approx(wanted)
    assert Ranking(at=(1,))(outputs, arrays)["hr@1"] == pytest.approx(2 / 3)


def test_popularity_gives_the_published_floor(shared):
    test = Ratings(directory=shared / "data/movietweetings100k").load().test
    floor = Ranking()({"scores": popularity(test, 2414)}, test)
    assert round(floor["hr@10"], 4) == 0.1549
    assert round(floor["ndcg@10"], 4) == 0.0781


def test_at_must_be_positive():
    with pytest.raises(ValueError, match="at must hold positive numbers"):
        Ranking(at=(0,))
