"""Ratings: the core, the order in time, what is held out, packed rows, and errors."""

import gzip

import numpy as np
import pytest

from qkv_jax.data.errors import DataError
from qkv_jax.data.ratings import Ratings


def write_ratings(directory, *, users=30, items=11, least=5, most=12, seed=0):
    """Users who rate one item after the other, in the order of their numbers, from anywhere."""
    rng = np.random.default_rng(seed)
    lines = []
    for user in range(1, users + 1):
        start, count = rng.integers(items), rng.integers(least, most + 1)
        for step in range(count):
            item = 100 + (start + step) % items
            lines.append(f"{user}::{item}::7::{1000 + step}")
    # Lines in any order: time alone decides.
    text = "\n".join(lines[i] for i in rng.permutation(len(lines))) + "\n"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "ratings.dat.gz").write_bytes(gzip.compress(text.encode()))
    return directory


def histories(splits):
    """Each training history as a tuple, whatever row it stands in."""
    found = []
    for items, segments in zip(splits.train["items"], splits.train["segments"]):
        for k in range(1, segments.max() + 1):
            found.append(tuple(int(i) for i in items[segments == k]))
    return sorted(found)


def test_the_last_two_items_are_held_out_and_what_was_seen_is_told(tmp_path):
    lines = ["1::30::5::9", "1::10::5::7", "1::20::5::8", "1::40::1::10"]
    lines += [line.replace("1::", "2::", 1) for line in lines]
    lines += [line.replace("1::", "3::", 1) for line in lines[:4]]
    (tmp_path / "ratings.dat").write_text("\n".join(lines))
    (tmp_path / "movies.dat").write_text("0010::Ten (1910)::Drama\n30::Thirty::\n")
    splits = Ratings(directory=tmp_path, core=3, longest=2).load()
    assert histories(splits) == [(1, 2)] * 3
    assert splits.names == ("", "Ten (1910)", "20", "Thirty", "40")
    assert splits.sizes == {"items": 4}
    for part, target, seen, items in (
        (splits.valid, 3, [1, 2], [1, 2]),
        (splits.test, 4, [1, 2, 3], [2, 3]),
    ):
        np.testing.assert_array_equal(part["target"], [target] * 3)
        np.testing.assert_array_equal(part["seen"], [seen] * 3)
        np.testing.assert_array_equal(part["items"], [items] * 3)
        np.testing.assert_array_equal(part["segments"], [[1, 1]] * 3)


def test_the_core_is_what_is_left_when_all_have_enough(tmp_path):
    write_ratings(tmp_path)
    wanted = histories(Ratings(directory=tmp_path).load())
    with gzip.open(tmp_path / "ratings.dat.gz", "at") as file:
        # Item 7 has five ratings, until users 50 to 54, of too few each, are gone.
        file.writelines(f"{user}::7::1::1\n{user}::8::1::2\n" for user in range(50, 55))
    splits = Ratings(directory=tmp_path).load()
    assert histories(splits) == wanted
    assert "30 users, 11 items" in splits.report[0]


def test_long_histories_are_cut_and_short_ones_share_rows(tmp_path):
    write_ratings(tmp_path, most=11)
    whole = histories(Ratings(directory=tmp_path, longest=50).load())
    splits = Ratings(directory=tmp_path, longest=7).load()
    assert {len(history) for history in histories(splits)} <= set(range(1, 8))
    assert sum(map(len, histories(splits))) == sum(map(len, whole))
    # The last items stay together.
    long = [history for history in whole if len(history) > 7]
    assert long and all(history[-7:] in histories(splits) for history in long)
    assert (splits.train["items"] > 0).mean() > 0.8
    assert splits.test["items"].shape == (30, 7)


def test_movietweetings_has_the_published_counts(shared):
    splits = Ratings(directory=shared / "data/movietweetings100k").load()
    assert "68,055 ratings, 4,333 users, 2,414 items" in splits.report[0]
    assert len(splits.test["target"]) == 4333


def test_errors_say_what_is_wrong_and_the_way_out(tmp_path):
    with pytest.raises(DataError, match="ratings.dat does not exist"):
        Ratings(directory=tmp_path).load()
    (tmp_path / "ratings.dat").write_text("1::2::3::4\n1,2,3,4\n")
    with pytest.raises(DataError, match=r"line 2: expected user::item::rating::time"):
        Ratings(directory=tmp_path).load()
    (tmp_path / "ratings.dat").write_text("1::2::3::4\n")
    with pytest.raises(DataError, match="use a smaller core"):
        Ratings(directory=tmp_path).load()
    with pytest.raises(ValueError, match="core must be at least 3"):
        Ratings(directory=tmp_path, core=2)
    with pytest.raises(ValueError, match="longest must be at least 2"):
        Ratings(directory=tmp_path, longest=1)
