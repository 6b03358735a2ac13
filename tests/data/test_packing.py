from collections import Counter

import numpy as np
import pytest

from qkv_jax.data import BatchStream, EncodedPairs, Sentences, Shape
from qkv_jax.data.packing import pack, shuffle_packed
from qkv_jax.data.tokenizer import EOS, PAD

SHAPE = Shape(16, 20)


def draw_lengths(count=301, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(1, [[17], [21]], (2, count))


def make_pairs(count=101, *, longest=14):
    """Pair i is tokens 10 + i only."""
    lengths = draw_lengths(count) % longest
    return EncodedPairs(
        *(
            Sentences.from_lists([[10 + i] * n + [EOS] for i, n in enumerate(side)])
            for side in lengths
        )
    )


def stream(pairs=None, **changes):
    options = {"target_tokens": 80, "packing": True, "rows_multiple": 2} | changes
    return BatchStream(pairs or make_pairs(), [Shape(4, 4), SHAPE], **options)


def epoch_of(batches, epoch=0):
    n = batches.batches_per_epoch
    return [batches[i] for i in range(epoch * n, (epoch + 1) * n)]


def sentences_of(batch, side):
    """The sentences of a batch's rows, by (row, number of the segment)."""
    tokens, segments = batch[side], batch[f"{side}_segments"]
    return {
        (row, number): tokens[row][segments[row] == number].tolist()
        for row in range(len(tokens))
        for number in range(1, segments[row].max() + 1)
    }


def test_every_pair_has_one_place_and_rows_hold_what_fits():
    lengths = draw_lengths()
    packed = pack(*lengths, SHAPE)
    used = packed[packed >= 0]
    assert sorted(used) == list(range(301))
    for side, room in zip(lengths, SHAPE):
        assert (np.where(packed < 0, 0, side[packed]).sum(1) <= room).all()


def test_packing_leaves_little_room_where_sentences_are_short():
    lengths = np.full((2, 1000), 3)
    lengths[:, ::2] = 7
    packed = pack(*lengths, Shape(20, 20))
    assert len(packed) == 250  # 2 x 7 + 2 x 3 = 20, with nothing left over


def test_nothing_is_packed_into_no_rows():
    assert pack(np.zeros(0, int), np.zeros(0, int), SHAPE).shape[0] == 0


def test_shuffling_keeps_lengths_and_changes_company():
    lengths = draw_lengths() % 3 + 1
    packed = pack(*lengths, SHAPE)
    shuffled = shuffle_packed(packed, *lengths, np.random.default_rng(1))
    assert sorted(shuffled[shuffled >= 0]) == list(range(301))
    kinds = Counter(tuple(lengths[:, row[row >= 0]].T.ravel()) for row in packed)
    after = Counter(tuple(lengths[:, row[row >= 0]].T.ravel()) for row in shuffled)
    assert kinds == after
    rows = {frozenset(row) for row in packed}
    assert sum(frozenset(row) in rows for row in shuffled) < len(rows) / 10


@pytest.mark.parametrize("epoch", [0, 3])
def test_a_packed_epoch_holds_every_pair_once_whole_and_with_its_partner(epoch):
    pairs = make_pairs()
    seen = Counter()
    for batch in epoch_of(stream(pairs), epoch):
        assert batch["source"].shape == (4, 16) and batch["target"].shape == (4, 20)
        sources, targets = (sentences_of(batch, side) for side in ("source", "target"))
        assert sources.keys() == targets.keys()
        kept = {
            tuple(pairs.source[i]): i for i in range(101) if len(pairs.source[i]) > 1
        }
        for place, source in sources.items():
            if len(source) > 1:  # an empty sentence does not tell where it is from
                index = kept[tuple(source)]
                assert targets[place] == pairs.target[index].tolist()
                seen[index] += 1
        for side in ("source", "target"):
            padding = batch[f"{side}_segments"] == 0
            assert ((batch[side] == PAD) == padding).all()
    assert seen == Counter(kept.values())


def test_epochs_differ_and_are_reproducible():
    first, again = stream(), stream()
    assert all(
        np.array_equal(a["source"], b["source"])
        for a, b in zip(epoch_of(first, 2), epoch_of(again, 2))
    )
    assert not all(
        np.array_equal(a["source"], b["source"])
        for a, b in zip(epoch_of(first, 0), epoch_of(first, 1))
    )


def test_report_counts_one_shape_with_less_padding():
    packed, bucketed = stream().report(), stream(packing=False).report()
    assert packed.shapes == 1 and packed.sentences == bucketed.sentences == 101
    assert packed.target_padding < 0.5 * bucketed.target_padding
    room = packed.batches * 4 * 20
    assert packed.target_padding == pytest.approx(1 - packed.target_tokens / room)


def test_overlong_pairs_are_cut_to_a_row_of_their_own_or_dropped():
    lengths = [3, 40, 5]
    pairs = EncodedPairs(
        *(Sentences.from_lists([[10 + i] * n + [EOS] for i, n in enumerate(lengths)]),)
        * 2
    )
    cut = stream(pairs, overlong="truncate")
    assert cut.report().truncated == 1
    targets = [
        s for b in epoch_of(cut) for s in sentences_of(b, "source").values() if s
    ]
    assert [11] * 15 + [EOS] in targets and len(targets) == 3
    assert stream(pairs).report().dropped == 1


def test_processes_share_the_rows_of_a_batch():
    whole = stream()
    parts = [stream(share=(i, 2)) for i in range(2)]
    for index in (0, 5):
        for name, rows in whole[index].items():
            together = np.concatenate([part[index][name] for part in parts])
            np.testing.assert_array_equal(together, rows)
