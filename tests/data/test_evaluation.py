import numpy as np
import pytest

from qkv_jax.data import EncodedPairs, Sentences, Shape, eval_batches, source_batches
from qkv_jax.data.tokenizer import EOS, PAD

LENGTHS = [3, 1, 9, 2, 30, 3, 7]


def make_sentences(lengths=LENGTHS):
    return Sentences.from_lists([[10 + i] * n + [EOS] for i, n in enumerate(lengths)])


def test_every_pair_comes_once_with_its_index():
    pairs = EncodedPairs(make_sentences(), make_sentences(LENGTHS[::-1]))
    buckets = [Shape(4, 4), Shape(8, 12), Shape(16, 16)]
    outputs = [0] * len(LENGTHS)
    for indices, batch in eval_batches(pairs, buckets, target_tokens=24):
        assert len(indices) == len(batch["source"]) == 24 // batch["target"].shape[1]
        for index, source, target in zip(indices, batch["source"], batch["target"]):
            if index < 0:
                assert (source == PAD).all() and (target == PAD).all()
                continue
            outputs[index] += 1
            assert source[0] == target[0] == 10 + index
            assert EOS in source and EOS in target
    assert outputs == [1] * len(LENGTHS)


def test_sentences_to_translate_come_once_and_long_ones_are_cut():
    sentences = make_sentences()
    found = {}
    for indices, rows in source_batches(sentences, [4, 8, 16], rows=2):
        assert rows.shape[0] <= 2 and rows.shape[1] in (4, 8, 16)
        found |= {i: row for i, row in zip(indices.tolist(), rows) if i >= 0}
    assert sorted(found) == list(range(len(LENGTHS)))
    assert found[4].tolist() == [14] * 15 + [EOS]
    assert found[1].tolist() == [11, EOS, PAD, PAD]


@pytest.mark.parametrize("multiple, rows", [(1, [64, 8]), (3, [66, 9])])
def test_few_sentences_of_a_length_make_a_small_batch(multiple, rows):
    sentences = make_sentences([2] * 40 + [9])
    shapes = [
        batch.shape
        for _, batch in source_batches(
            sentences, [4, 8, 16], rows=64, rows_multiple=multiple
        )
    ]
    assert shapes == [(rows[0], 4), (rows[1], 16)]


def test_what_fills_no_batch_of_its_length_goes_into_the_next_ones():
    sentences = make_sentences([2, 6, 1, 5, 2, 14])
    batches = source_batches(sentences, [4, 8, 16, 32], rows=2)
    rows = [(indices.tolist(), batch.shape) for indices, batch in batches]
    assert rows == [([2, 0], (2, 4)), ([4, 3], (2, 8)), ([1, 5], (2, 16))]


def test_a_corpus_wastes_few_rows_and_has_few_shapes():
    rng = np.random.default_rng(0)
    lengths = np.round(rng.lognormal(np.log(20), 0.6, 1000)).astype(int).tolist()
    batches = source_batches(make_sentences(lengths), [16, 32, 64, 128, 256], rows=64)
    shapes = [batch.shape for _, batch in batches]
    assert sum(rows for rows, _ in shapes) < 1.1 * 1000
    assert len(set(shapes)) <= 6


def test_nothing_to_translate_is_no_batch():
    assert list(source_batches(make_sentences([]), [4], rows=2)) == []


@pytest.mark.parametrize("lengths", [[], [8, 4], [4, 4], [0, 4]])
def test_lengths_must_increase(lengths):
    with pytest.raises(ValueError, match="lengths must be positive and increasing"):
        list(source_batches(make_sentences(), lengths, rows=2))


def test_order_within_a_shape_is_kept():
    pairs = EncodedPairs(make_sentences([3] * 5), make_sentences([3] * 5))
    batches = list(eval_batches(pairs, [Shape(4, 4)], target_tokens=8))
    assert np.concatenate([i for i, _ in batches]).tolist() == [0, 1, 2, 3, 4, -1]
