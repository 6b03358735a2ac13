import numpy as np
import pytest

from qkv_jax.data import EOS, PAD, Sentences, encode_pairs, train_tokenizer


@pytest.fixture
def sentences():
    return Sentences.from_lists([[11, 12, 13, EOS], [EOS], [21, EOS]])


def test_sentences_end_in_eos_and_are_kept_flat(sentences):
    assert sentences.tokens.tolist() == [11, 12, 13, EOS, EOS, 21, EOS]
    assert sentences.tokens.dtype == np.int32
    assert sentences.lengths.tolist() == [4, 1, 2]
    assert len(sentences) == 3
    assert sentences[2].tolist() == [21, EOS]


def test_rows_are_padded_and_missing_rows_are_all_padding(sentences):
    rows = sentences.rows(np.array([2, -1, 0, 1]), 5)
    assert rows.dtype == np.int32
    assert rows.tolist() == [
        [21, EOS, PAD, PAD, PAD],
        [PAD] * 5,
        [11, 12, 13, EOS, PAD],
        [EOS, PAD, PAD, PAD, PAD],
    ]


def test_a_sentence_longer_than_its_row_is_cut_and_keeps_eos(sentences):
    assert sentences.rows(np.array([0, 2]), 2).tolist() == [[11, EOS], [21, EOS]]


def test_endings_of_several_ids_stay_and_rows_are_filled_with_the_pad_given():
    made = Sentences.from_lists([[5, 6, 7, 2, 9], [2, 9]], ending=(2, 9), pad=1)
    rows = made.rows(np.array([0, 1, -1]), 4).tolist()
    assert rows == [[5, 6, 2, 9], [2, 9, 1, 1], [1, 1, 1, 1]]


def test_no_sentences_are_no_rows():
    empty = Sentences.from_lists([])
    assert len(empty) == 0 and empty.rows(np.array([], int), 3).shape == (0, 3)


def test_pairs_are_encoded_by_one_vocabulary(tmp_path):
    pairs = [("a b c", "c b"), ("b", "a a a")]
    tokenizer = train_tokenizer(
        [side for pair in pairs for side in pair], vocab_size=264, directory=tmp_path
    )
    encoded = encode_pairs(pairs, tokenizer)
    for side, kept in enumerate(encoded):
        texts = tokenizer.decode([kept[i] for i in range(len(kept))])
        assert texts == [pair[side] for pair in pairs]
