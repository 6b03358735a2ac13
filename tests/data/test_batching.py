import json
from collections import Counter

import numpy as np
import pytest

from qkv_jax.data import (
    BatchStream,
    DataError,
    EncodedPairs,
    Sentences,
    Shape,
    choose_buckets,
    train_iterator,
)
from qkv_jax.data.tokenizer import EOS, PAD

BUCKETS = [Shape(4, 4), Shape(8, 8), Shape(16, 20)]


def make_pairs(count=101, *, longest=14, seed=0):
    """Pair i is tokens 10 + i only, so that a row tells where it is from."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest, (2, count))
    return EncodedPairs(
        *(
            Sentences.from_lists([[10 + i] * n + [EOS] for i, n in enumerate(side)])
            for side in lengths
        )
    )


def epoch_of(stream, epoch=0):
    n = stream.batches_per_epoch
    return [stream[i] for i in range(epoch * n, (epoch + 1) * n)]


def members(batches, side="source"):
    return Counter(row[0] - 10 for b in batches for row in b[side] if row[0] != PAD)


def equal(first, second):
    return all(
        a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_every_pair_comes_once_an_epoch_with_its_partner(epoch):
    pairs = make_pairs()
    batches = epoch_of(BatchStream(pairs, BUCKETS, target_tokens=40), epoch)
    assert members(batches) == Counter(range(101))
    for batch in batches:
        assert (batch["source"][:, 0] == batch["target"][:, 0]).all()
    for side, kept in zip(("source", "target"), pairs):
        real = np.concatenate([b[side][b[side] != PAD] for b in batches])
        assert np.array_equal(np.sort(real), np.sort(kept.tokens))


def test_batches_have_few_static_shapes_within_the_budgets():
    stream = BatchStream(
        make_pairs(499), BUCKETS, target_tokens=60, source_tokens=40, rows_multiple=2
    )
    shapes = {(b["source"].shape, b["target"].shape) for b in epoch_of(stream)}
    assert shapes == {((10, 4), (10, 4)), ((4, 8), (4, 8)), ((2, 16), (2, 20))}
    assert stream.report().shapes == 3
    assert all(b["target"].dtype == np.int32 for b in epoch_of(stream))


def test_only_one_batch_an_epoch_has_unused_rows():
    batches = epoch_of(BatchStream(make_pairs(), BUCKETS, target_tokens=60))
    unused = [int((batch["target"][:, 0] == PAD).sum()) for batch in batches]
    assert sum(rows > 0 for rows in unused) <= 1


def test_the_order_depends_on_seed_and_epoch_alone():
    def stream(seed=3):
        return BatchStream(make_pairs(), BUCKETS, target_tokens=60, seed=seed)

    first, second = stream(), stream()
    list(map(second.__getitem__, range(200, 0, -7)))
    assert equal(epoch_of(first, 2), epoch_of(second, 2))
    for other in (epoch_of(first, 1), epoch_of(stream(4), 2)):
        assert [b["source"][0, 0] for b in other] != [
            b["source"][0, 0] for b in epoch_of(first, 2)
        ]


@pytest.mark.parametrize("overlong", ["drop", "truncate"])
def test_overlong_pairs_are_counted_and_end_no_run(overlong):
    stream = BatchStream(make_pairs(), BUCKETS[:2], target_tokens=60, overlong=overlong)
    report, batches = stream.report(), epoch_of(stream)
    counted = report.dropped if overlong == "drop" else report.truncated
    assert counted > 0 and report.dropped + report.truncated == counted
    assert report.sentences == members(batches).total() == 101 - report.dropped
    for batch in batches:
        rows = batch["target"][batch["target"][:, 0] != PAD]
        assert (np.count_nonzero(rows == EOS, axis=1) == 1).all()


def test_nothing_that_fits_is_an_error():
    with pytest.raises(DataError, match="no pair to train on: 1 are longer than"):
        BatchStream(make_pairs(1, longest=9), [Shape(1, 1)], target_tokens=60)


@pytest.mark.parametrize("count", [2, 4])
def test_the_parts_of_processes_make_the_whole_batch(count):
    def stream(**process):
        return BatchStream(
            make_pairs(), BUCKETS, target_tokens=60, rows_multiple=4, **process
        )

    parts = [epoch_of(stream(share=(i, count))) for i in range(count)]
    for whole, *blocks in zip(epoch_of(stream()), *parts, strict=True):
        for side in whole:
            joined = np.concatenate([block[side] for block in blocks])
            assert np.array_equal(joined, whole[side])
            assert len({len(block[side]) for block in blocks}) == 1


def test_the_report_counts_what_an_epoch_holds():
    pairs = make_pairs()
    stream = BatchStream(pairs, BUCKETS, target_tokens=60)
    report, batches = stream.report(), epoch_of(stream)
    assert report.batches == len(batches) == stream.batches_per_epoch
    for side in ("source", "target"):
        rows = np.concatenate([batch[side].ravel() for batch in batches])
        assert getattr(report, f"{side}_tokens") == np.count_nonzero(rows)
        padding = np.mean(rows == PAD)
        assert getattr(report, f"{side}_padding") == pytest.approx(padding)
    assert sum(bucket.sentences for bucket in report.buckets) == 101
    assert "101 pairs an epoch" in str(report) and "2 shapes" in str(report)


def test_buckets_pad_far_less_than_one_shape():
    pairs = make_pairs(2_000, longest=60)
    padding = []
    for count in (1, 8):
        lengths = (pairs.source.lengths, pairs.target.lengths)
        buckets = choose_buckets(*lengths, count=count)
        stream = BatchStream(pairs, buckets, target_tokens=480)
        padding.append(stream.report().target_padding)
    assert padding[1] < 0.6 * padding[0]


@pytest.mark.parametrize("prefetch", [0, 3])
def test_a_restored_position_continues_with_the_same_batches(prefetch):
    def iterator():
        stream = BatchStream(make_pairs(), BUCKETS, target_tokens=200, seed=1)
        return train_iterator(stream, prefetch=prefetch), stream.batches_per_epoch

    straight, per_epoch = iterator()
    batches = [next(straight) for _ in range(2 * per_epoch + 5)]
    for taken in (0, 1, per_epoch - 1, per_epoch, per_epoch + 3):
        first, _ = iterator()
        assert equal([next(first) for _ in range(taken)], batches[:taken])
        state = json.loads(json.dumps(first.get_state()))
        second, _ = iterator()
        next(second)
        second.set_state(state)
        assert equal([next(second) for _ in range(5)], batches[taken : taken + 5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlong": "cut"}, "overlong must be"),
        ({"share": (2, 2)}, "i < n"),
        ({"share": (0, 2), "rows_multiple": 3}, "must divide rows_multiple = 3"),
    ],
)
def test_misuse_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        BatchStream(make_pairs(), BUCKETS, target_tokens=60, **options)


@pytest.mark.parametrize("buckets", [[], [Shape(8, 4), Shape(4, 8)], [Shape(0, 4)]])
def test_buckets_that_are_no_chain_are_refused(buckets):
    with pytest.raises(ValueError, match="buckets must each hold the one before"):
        BatchStream(make_pairs(), buckets, target_tokens=60)
