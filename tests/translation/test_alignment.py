import numpy as np
import pytest

from qkv_jax.translation.alignment import align, side_by_side, word_numbers


@pytest.mark.parametrize(
    "pieces, numbers",
    [
        (["▁a", "b", "▁c"], [0, 0, 1]),
        (["a", "b", "Ġc"], [0, 0, 1]),
        (["▁", "a", "▁", "▁b", ""], [-1, 0, -1, 1, -1]),
        ([], []),
    ],
)
def test_a_word_begins_where_a_piece_has_the_mark(pieces, numbers):
    assert word_numbers(pieces).tolist() == numbers


def test_weights_of_pieces_are_summed_over_a_source_word_and_averaged_over_a_target_word():
    one_head = np.array([[0.1, 0.2, 0.6], [0.3, 0.4, 0.1], [0.2, 0.1, 0.5], [1, 0, 0]])
    found = align(one_head[None], ["▁a", "b", "▁c"], ["▁x", "y", "▁z", ""])
    np.testing.assert_allclose(found.weights, [[0.5, 0.35], [0.3, 0.5]], rtol=1e-6)
    assert found.pairs == ((0, 0), (1, 1))
    assert found.pharaoh == "0-0 1-1"


def test_heads_count_alike():
    heads = np.array([[[1.0, 0.0]], [[0.2, 0.8]]])
    found = align(heads, ["▁a", "▁b"], ["▁x"])
    np.testing.assert_allclose(found.weights, [[0.6, 0.4]], rtol=1e-6)


def test_nothing_aligns_with_nothing():
    found = align(np.zeros((2, 1, 0)), [], [""])
    assert found.weights.shape == (0, 0) and found.pairs == ()


def test_parts_of_a_text_stand_one_after_the_other():
    first = align(np.array([[[1.0, 0.0]]]), ["▁a", "▁b"], ["▁x"])
    second = align(np.array([[[1.0], [1.0]]]), ["▁c"], ["▁y", "▁z"])
    whole = side_by_side([first, second])
    assert whole.weights.shape == (3, 3)
    assert whole.pharaoh == "0-0 2-1 2-2"
