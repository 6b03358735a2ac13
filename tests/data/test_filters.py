import pytest

from qkv_jax.data import Filters, compression_ratio, filter_pairs

PAIRS = [
    ("a dog", "ein Hund"),
    (" ", "leer"),
    ("a dog", "ein Hund"),
    ("one two three four", "eins"),
    ("x" * 100, "y"),
]
LOOP = "Ein Mann in einem blauen Hemd putzt ein Fenster" + " eines Fensters" * 12
PLAIN = "Ein Mann in einem blauen Hemd steht auf einer Leiter und putzt ein Fenster."


def test_by_default_only_blank_pairs_are_dropped():
    kept, report = filter_pairs(PAIRS, Filters())
    assert kept == [PAIRS[0], *PAIRS[2:]]
    assert (report.total, report.empty, report.kept) == (5, 1, 4)


@pytest.mark.parametrize(
    ("filters", "counts"),
    [
        (Filters(max_characters=50), (1, 1, 0, 0, 0, 3)),
        (Filters(max_words=3), (1, 1, 0, 0, 0, 3)),
        (Filters(max_ratio=4.0), (1, 0, 1, 0, 0, 3)),
        (Filters(max_compression_ratio=5.0), (1, 0, 0, 1, 0, 3)),
        (Filters(drop_duplicates=True), (1, 0, 0, 0, 1, 3)),
        (
            Filters(max_words=3, max_ratio=4.0, drop_duplicates=True),
            (1, 1, 1, 0, 1, 1),
        ),
    ],
)
def test_every_dropped_pair_is_counted_under_one_reason(filters, counts):
    kept, report = filter_pairs(PAIRS, filters)
    reasons = (report.empty, report.too_long, report.ratio, report.repetitive)
    reasons += (report.duplicates,)
    assert (*reasons, report.kept) == counts
    assert report.kept == len(kept) and sum(counts) == report.total


def test_limits_are_inclusive():
    pair = ("four", "vier")
    assert filter_pairs([pair], Filters(max_characters=4, max_words=1))[0] == [pair]


def test_very_short_pairs_pass_the_ratio_filter():
    pair = ("OK", "Einverstanden")
    assert filter_pairs([pair], Filters(max_ratio=2.0))[0] == [pair]


def test_a_text_that_repeats_itself_compresses_and_a_sentence_does_not():
    assert compression_ratio(LOOP) > 3
    assert 0.8 < compression_ratio(PLAIN) < 1.2
    assert compression_ratio("") == 0
    pairs = [("A man.", LOOP), (LOOP, "Ein Mann."), ("A man.", PLAIN)]
    assert filter_pairs(pairs, Filters(max_compression_ratio=2.0))[0] == pairs[2:]


def test_the_report_is_one_line():
    _, report = filter_pairs(PAIRS, Filters(max_words=3))
    assert str(report) == (
        "kept 3 of 5 pairs (dropped: 1 empty, 1 too long, 0 by length ratio, "
        "0 repetitive, 0 duplicates)"
    )


@pytest.mark.parametrize(
    "name", ["max_characters", "max_words", "max_ratio", "max_compression_ratio"]
)
def test_a_limit_below_one_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1; got 0"):
        Filters(**{name: 0})
