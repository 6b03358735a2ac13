"""Heads whose weights are made to have each role."""

import math

import numpy as np
import pytest

from qkv_jax.data.conllu import Tree
from qkv_jax.translation.attention import PairAttention, Tokens
from qkv_jax.translation.heads import FEWEST, head_rows, summarise_heads

ENCODER, DECODER, CROSS = (
    "encoder.0.attention",
    "decoder.0.attention",
    "decoder.0.cross",
)
WORDS = 5
COUNTS = np.array([0, 0, 0, 50, 40, 1, 60, 70, 80, 90])  # The rarest token is 5.


def _tokens(ids, special):
    pieces = [f"▁w{i}" for i in ids]
    return Tokens(np.array(ids), pieces, np.array(special))


def _pair(weights):
    """Tokens 3 to 7 and EOS, 2; the target is the same, from the start, 1."""
    last = [False] * WORDS + [True]
    source = _tokens([*range(3, 3 + WORDS), 2], last)
    given = _tokens([1, *range(3, 3 + WORDS)], last[::-1])
    arrays = {name: np.array(x, np.float32) for name, x in weights.items()}
    return PairAttention(source, source, given, arrays)


def _at(place):
    """(6, 6) weights of 1, where each row looks at place(row)."""
    return np.eye(WORDS + 1)[[place(row) for row in range(WORDS + 1)]]


def _one(weights, layer=ENCODER, counts=(COUNTS, COUNTS), **more):
    (head,) = summarise_heads([_pair({layer: [weights]})], counts, **more)
    return head


def test_even_weights_have_the_greatest_entropy_and_no_role():
    head = _one(np.full((6, 6), 1 / 6))
    assert head.entropy == pytest.approx(math.log(6), rel=1e-5)
    assert head.normalised == pytest.approx(1, rel=1e-5)
    assert head.confidence == pytest.approx(1 / 6)
    assert head.special == pytest.approx(1 / 6)
    distances = [abs(q - k) for q in range(WORDS) for k in range(6)]
    assert head.distance == pytest.approx(np.mean(distances), rel=1e-5)
    assert head.rare_chance == 1 / WORDS and head.roles == []


def test_a_head_that_looks_one_back_is_positional():
    head = _one(_at(lambda row: max(row - 1, 0)))
    assert (head.offset, head.at_offset) == (-1, 1.0)
    assert head.roles == ["-1"]
    assert head.entropy == 0 and head.confidence == 1


def test_a_decoder_counts_offsets_and_entropy_among_the_tokens_in_sight():
    even = np.tril(np.ones((6, 6)))
    even /= even.sum(1, keepdims=True)
    assert _one(even, DECODER).normalised == pytest.approx(1, rel=1e-5)
    head = _one(_at(lambda row: max(row - 2, 0)), DECODER)
    assert (head.offset, head.at_offset) == (-2, 1.0)


def test_a_head_that_looks_at_the_rarest_token_is_a_rare_word_head():
    head = _one(_at(lambda row: 2))
    assert head.rare == 1 and head.roles == ["rare"]
    assert _one(_at(lambda row: 2), counts=(np.ones(10, int),) * 2).roles == []


def test_a_head_that_looks_at_eos_is_special():
    head = _one(_at(lambda row: WORDS))
    assert (head.special, head.confidence) == (1, 0)
    assert head.roles == ["special"]


def test_cross_attention_has_a_distance_from_the_diagonal_and_no_offset():
    head = _one(np.eye(6), CROSS)
    assert (head.distance, head.offset, head.at_offset) == (0, None, None)
    assert _one(np.eye(6), DECODER).offset == 0


def _parsed(place, count=FEWEST):
    # Words 0 and 3 are the adjectives of 2 and 4: one fixed distance finds half of them.
    tree = Tree([f"w{i}" for i in range(3, 8)], [2, 2, -1, 4, 2], ["amod"] + ["x"] * 4)
    tree.relations[3] = "amod"
    return [(_pair({ENCODER: [_at(place)]}), tree)] * count


def test_a_head_that_follows_a_relation_is_syntactic():
    follows = {0: 2, 3: 4}
    head = _one(np.eye(6), parsed=_parsed(lambda row: follows.get(row, row)))
    assert head.relation == ("amod>head", 1.0, 0.5)
    assert "amod>head" in head.roles
    head = _one(np.eye(6), parsed=_parsed(lambda row: {2: 0, 4: 3}.get(row, row)))
    assert head.relation == ("amod<head", 1.0, 0.5)


def test_a_fixed_distance_or_a_rare_relation_is_not_syntactic():
    head = _one(np.eye(6), parsed=_parsed(lambda row: min(row + 1, 5)))
    assert head.relation.share == head.relation.baseline == 0.5
    assert head.roles == ["0"]
    assert _one(np.eye(6), parsed=_parsed(lambda row: 0, count=3)).relation is None


def test_sentences_parted_otherwise_than_the_tree_are_passed_over():
    pair = _pair({ENCODER: [np.eye(6)]})
    tree = Tree(["a"] * 4, [-1, 0, 0, 0], ["root", "amod", "amod", "amod"])
    assert _one(np.eye(6), parsed=[(pair, tree)] * FEWEST).relation is None


def test_the_table_has_a_row_for_each_head_and_leaves_out_what_is_not_known():
    weights = {ENCODER: [np.eye(6), np.eye(6)], CROSS: [np.eye(6)]}
    heads = summarise_heads([_pair(weights)], (COUNTS, COUNTS))
    titles, *rows = [row.split("\t") for row in head_rows(heads)]
    assert [row[:2] for row in rows] == [[ENCODER, "1"], [ENCODER, "2"], [CROSS, "1"]]
    assert all(len(row) == len(titles) for row in rows)
    assert "relation" not in titles and rows[2][titles.index("offset")] == "-"
    known = [_one(np.eye(6), parsed=_parsed(lambda row: 0))]
    assert "relation_baseline" in head_rows(known)[0].split("\t")


def test_no_token_to_look_at_is_an_error():
    with pytest.raises(ValueError, match="a pair with a token on each side"):
        summarise_heads([], (COUNTS, COUNTS))
