"""Batches of rows that are cut to few lengths."""

import numpy as np
import pytest

from qkv_jax.data.splits import Cut, ExampleStream, Splits, example_batches

LENGTHS = np.array([3, 17, 9, 30, 8, 4, 16, 23, 7, 5, 31, 2], np.int32)


def arrays():
    row = np.arange(len(LENGTHS))
    inside = np.arange(31)[None] < LENGTHS[:, None]
    return {"row": row, "lengths": LENGTHS, "x": np.where(inside, row[:, None], -1)}


@pytest.fixture(scope="module")
def cut():
    splits = Splits(train=arrays(), valid={}, test={}, padded=("x",))
    return Cut.choose(splits, 3)


def test_bounds_are_few_and_hold_the_longest(cut):
    assert len(cut.bounds) == 3
    assert cut.bounds[-1] == 32 and list(cut.bounds) == sorted(cut.bounds)
    assert cut.buckets(arrays()).max() == 2


def test_a_stream_cuts_padding_and_no_content(cut):
    stream = ExampleStream(arrays(), rows=4, cut=cut)
    batches = [stream[i] for i in range(stream.batches_per_epoch)]
    seen = np.concatenate([batch["row"] for batch in batches])
    assert sorted(seen) == list(range(12))
    for batch in batches:
        assert batch["x"].shape[1] in {*cut.bounds, 31}
        for row, length, x in zip(batch["row"], batch["lengths"], batch["x"]):
            assert length == LENGTHS[row] and (x[:length] == row).all()
    widths = [batch["x"].shape[1] for batch in batches]
    assert min(widths) < 31
    assert "padding" in str(stream)


def test_epochs_differ_and_a_stream_is_reproducible(cut):
    one, two = (ExampleStream(arrays(), rows=4, seed=5, cut=cut) for _ in range(2))
    for i in (4, 0, 2):
        np.testing.assert_array_equal(one[i]["row"], two[i]["row"])
    first, second = ([list(one[i + e]["row"]) for i in range(3)] for e in (0, 3))
    assert first != second


def test_what_does_not_fill_a_batch_is_moved_up_to_longer_rows(cut):
    stream = ExampleStream(arrays(), rows=5, cut=cut)
    assert stream.batches_per_epoch == 2
    rows = [row for i in range(2) for row in stream[i]["row"]]
    assert len(set(rows)) == 10


def test_every_example_is_evaluated_once_from_short_to_long(cut):
    batches = list(example_batches(arrays(), rows=5, cut=cut))
    indices = np.concatenate([indices for indices, _ in batches])
    assert sorted(indices[indices >= 0]) == list(range(12))
    assert [batch["x"].shape[1] for _, batch in batches] == sorted(
        batch["x"].shape[1] for _, batch in batches
    )
    last = batches[-1][1]
    assert last["weight"].tolist() == [1, 1, 0, 0, 0]
    assert (last["lengths"] <= last["x"].shape[1]).all()


def test_rows_longer_than_any_bound_stay_whole():
    batch = Cut(("x",), (8, 16)).take(arrays(), np.array([0, 3]))
    assert batch["x"].shape == (2, 31)
    assert Cut(("x",), (8, 16)).take(arrays(), np.array([0, 4]))["x"].shape == (2, 8)


def test_padded_arrays_need_lengths():
    with pytest.raises(ValueError, match="'lengths' must be among"):
        Splits(train={"x": np.zeros((2, 3))}, valid={}, test={}, padded=("x",))


def test_shares_of_a_batch_are_cut_alike(cut):
    whole = ExampleStream(arrays(), rows=4, cut=cut)
    shares = [ExampleStream(arrays(), rows=4, cut=cut, share=(i, 2)) for i in (0, 1)]
    for i in range(3):
        for name, array in whole[i].items():
            both = [share[i][name] for share in shares]
            np.testing.assert_array_equal(np.concatenate(both), array)
