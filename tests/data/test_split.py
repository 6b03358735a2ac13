import random

from qkv_jax.data import split_pairs
from qkv_jax.data.split import normalise


def make_pairs(count):
    """Pairs of which some share a side, some only once normalised."""
    rng = random.Random(0)
    pairs = {
        (f"word {rng.choice('abcdef') * (i % 7 + 1)} {chr(97 + i % 23)}", f"wort {i}x")
        for i in range(count)
    }
    pairs |= {
        (
            f"Text {chr(97 + i % 26)}{chr(97 + i // 26)}",
            f"Text-{chr(97 + i % 26)}, {chr(97 + i // 26)}!",
        )
        for i in range(count)
    }
    return sorted(pairs)


def sides(pairs, side):
    return {normalise(pair[side]) for pair in pairs}


def test_text_is_compared_without_case_punctuation_and_digits():
    assert normalise("Press  “OK”, 1.25 times!") == "press ok 0 times"
    assert normalise("{entity_name} is ON") == "entityname is on"
    assert normalise("STRASSE") == normalise("Straße")
    assert normalise("नमस्ते") == "नमस्ते"
    assert normalise("?!") != normalise("...")


def test_no_held_out_sentence_stands_in_another_part_on_either_side():
    split = split_pairs(make_pairs(300), held_out=50)
    for side in (0, 1):
        train, valid, test = (sides(part, side) for part in split)
        assert not (train & valid or train & test or valid & test)


def test_held_out_parts_have_the_size_asked_for_and_distinct_pairs():
    split = split_pairs(make_pairs(300), held_out=50)
    for part in (split.valid, split.test):
        assert len(part) == 50
        assert len({tuple(map(normalise, pair)) for pair in part}) == 50


def test_the_split_depends_on_neither_order_nor_process():
    pairs = make_pairs(300)
    shuffled = random.Random(1).sample(pairs, len(pairs))
    first, second = (split_pairs(p, held_out=50) for p in (pairs, shuffled))
    assert first.test == second.test and first.valid == second.valid
    assert sorted(first.train) == sorted(second.train)


def test_pairs_that_hang_together_through_others_stay_together():
    chain = [("a", "u"), ("b", "u"), ("b", "v"), ("c", "v")]
    others = [(f"x {w}", f"y {w}") for w in "defghijklmnop"]
    for held_out in range(1, 8):
        split = split_pairs(chain + others, held_out=held_out)
        homes = [sum(pair in part for pair in chain) for part in split]
        assert sorted(homes) == [0, 0, 4]


def test_large_groups_are_for_training():
    hub = [("on", f"an {word}") for word in "abcdefghijkl"]
    split = split_pairs([*hub, ("off", "aus"), ("up", "auf")], held_out=20)
    assert split.train == hub


def test_a_repeated_form_of_a_held_out_pair_is_in_no_part():
    split = split_pairs([("Off", "Aus"), ("off!", "aus"), ("up", "auf")], held_out=1)
    held_out = split.valid + split.test
    assert sorted(held_out) == [("Off", "Aus"), ("up", "auf")]
    assert split.train == []
