import math

import pytest

from qkv_jax.data import DataError
from qkv_jax.translation.alignment_error import Links, alignment_scores, read_links


def _links(sure, possible):
    return Links(frozenset(sure), frozenset(possible))


def test_scores_are_those_of_the_formula():
    reference = [_links({(0, 0), (1, 1)}, {(2, 1)}), _links({(0, 1)}, set())]
    found = [[(0, 0), (2, 1), (2, 2)], [(0, 1)]]
    scores = alignment_scores(found, reference)
    assert scores.precision == 3 / 4
    assert scores.recall == 2 / 3
    assert scores.error_rate == pytest.approx(1 - (2 + 3) / (4 + 3))


def test_all_sure_and_some_possible_links_are_without_error():
    reference = [_links({(0, 0)}, {(0, 0), (1, 1), (1, 2)})]
    assert alignment_scores([[(0, 0), (1, 2)]], reference) == (1, 1, 0)


def test_nothing_found_is_all_error_and_no_reference_has_no_score():
    assert alignment_scores([[]], [_links({(0, 0)}, set())]).error_rate == 1
    assert all(map(math.isnan, alignment_scores([], [])))


def test_each_sentence_needs_its_reference():
    with pytest.raises(ValueError, match="shorter"):
        alignment_scores([[], []], [_links(set(), set())])


@pytest.mark.parametrize(
    ("content", "one_based"),
    [("0-0 1?2 2p1\n\n", False), ("1-1  2?3 3p2\r\n\r\n", True)],
)
def test_sure_and_possible_links_are_read(tmp_path, content, one_based):
    (tmp_path / "gold").write_bytes(content.encode())
    first, second = read_links(tmp_path / "gold", [(3, 3), (1, 1)], one_based=one_based)
    assert first == _links({(0, 0)}, {(0, 0), (1, 2), (2, 1)})
    assert second == _links(set(), set())


@pytest.mark.parametrize(
    ("content", "one_based", "expected"),
    [
        ("0-0\n", False, "a line for each of 2 sentence pairs; it has 1"),
        ("0-0\n0:0\n", False, "line 2: '0:0' is no link; write sure ones as 3-4"),
        ("2-2\n\n", False, "line 1: link 2-2, .* counted from 1, give --one-based"),
        ("0-1\n\n", True, "line 1: link 0-1, .* counted from 0, leave --one-based out"),
    ],
)
def test_wrong_references_are_named(tmp_path, content, one_based, expected):
    (tmp_path / "gold").write_text(content, "utf-8")
    with pytest.raises(DataError, match=expected):
        read_links(tmp_path / "gold", [(2, 2), (1, 1)], one_based=one_based)
