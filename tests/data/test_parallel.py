import gzip
import json

import pytest

from qkv_jax.data import DataError, ParallelData, read_pairs

PAIRS = [("A dog runs.", "Ein Hund läuft."), ("Two men sit.", "Zwei Männer sitzen.")]


def write(path, lines, *, end="\n"):
    """Write lines as UTF-8, as gzip if the name says so, and return the path."""
    content = "".join(line + end for line in lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_sides(directory, stem, *, suffix="", pairs=PAIRS):
    for side, language in enumerate(("en", "de")):
        write(directory / f"{stem}.{language}{suffix}", [pair[side] for pair in pairs])


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_two_files_are_read_line_by_line(tmp_path, suffix):
    write_sides(tmp_path, "train", suffix=suffix)
    files = [tmp_path / f"train.{language}{suffix}" for language in ("en", "de")]
    assert read_pairs(*files) == PAIRS


@pytest.mark.parametrize("name", ["a.tsv", "a.tsv.gz", "a.txt"])
def test_one_tab_separated_file_holds_both_sides(tmp_path, name):
    path = write(tmp_path / name, ["\t".join(pair) for pair in PAIRS])
    assert read_pairs(str(path)) == PAIRS


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize(
    ("keys", "languages", "nested"),
    [
        (("source", "target"), None, False),
        (("source", "target"), ("en", "de"), False),
        (("en", "de"), ("en", "de"), False),
        (("en", "de"), ("en", "de"), True),
    ],
)
def test_json_lines_are_read_by_key(tmp_path, name, keys, languages, nested):
    records = [dict(zip(keys, pair)) for pair in PAIRS]
    if nested:
        records = [{"id": 1, "translation": record} for record in records]
    path = write(tmp_path / name, [json.dumps(record) for record in records])
    assert read_pairs(path, languages=languages) == PAIRS


def test_languages_choose_the_direction_of_json_lines(tmp_path):
    path = write(tmp_path / "a.jsonl", ['{"en": "dog", "de": "Hund"}'])
    assert read_pairs(path, languages=("de", "en")) == [("Hund", "dog")]


@pytest.mark.parametrize(
    "separator", ["\u2028", "\u2029", "\x85", "\x0c", "\x1e", "\r"]
)
def test_only_line_feeds_end_a_line(tmp_path, separator):
    pairs = [(f"one{separator}more", "eins"), ("two", "zwei")]
    write_sides(tmp_path, "train", pairs=pairs)
    assert read_pairs(tmp_path / "train.en", tmp_path / "train.de") == pairs


def test_windows_line_ends_byte_order_mark_and_missing_last_end_are_taken(tmp_path):
    (tmp_path / "a.en").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    (tmp_path / "a.de").write_bytes(b"eins\nzwei")
    pairs = read_pairs(tmp_path / "a.en", tmp_path / "a.de")
    assert pairs == [("one", "eins"), ("two", "zwei")]


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_a_bad_byte_is_named_with_its_line(tmp_path, bom):
    path = tmp_path / "a.tsv"
    path.write_bytes(bom + b"a\tb\n\xffc\td\n")
    with pytest.raises(DataError, match=r"a\.tsv, line 2: byte 0xff is not UTF-8"):
        read_pairs(path)


def test_a_missing_file_is_named_with_its_neighbours(tmp_path):
    write_sides(tmp_path, "train")
    with pytest.raises(DataError, match=r"trian\.en does not exist .*train\.en"):
        read_pairs(tmp_path / "trian.en", tmp_path / "train.de")
    with pytest.raises(DataError, match="there is no directory .*nowhere"):
        read_pairs(tmp_path / "nowhere" / "a.tsv")


def test_files_of_unequal_length_are_named_with_their_counts(tmp_path):
    write(tmp_path / "a.en", ["one", "two"])
    write(tmp_path / "a.de", ["eins"])
    with pytest.raises(DataError, match=r"a\.en has 2 lines but .*a\.de has 1"):
        read_pairs(tmp_path / "a.en", tmp_path / "a.de")


@pytest.mark.parametrize("name", ["a.tsv", "a.jsonl", "a.tsv.gz"])
def test_an_empty_corpus_is_an_error(tmp_path, name):
    with pytest.raises(DataError, match="holds no sentences"):
        read_pairs(write(tmp_path / name, []))


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("a.tsv", "only one", "line 2: expected source TAB target, got 1 fields"),
        ("a.tsv", "a\tb\tc", "line 2: expected source TAB target, got 3 fields"),
        ("a.jsonl", "{", "line 2: not a JSON object"),
        ("a.jsonl", "[1]", "line 2: expected an object"),
        (
            "a.jsonl",
            '{"en": "a"}',
            "line 2: expected text under source and target; .*en",
        ),
        ("a.jsonl", '{"source": "a", "target": 1}', "line 2: expected text under"),
        (
            "a.jsonl",
            '{"source": "\\ud800", "target": "a"}',
            "line 2: .*half a character",
        ),
    ],
)
def test_a_malformed_line_is_named(tmp_path, name, line, message):
    good = "a\tb" if name == "a.tsv" else '{"source": "a", "target": "b"}'
    with pytest.raises(DataError, match=message):
        read_pairs(write(tmp_path / name, [good, line]))


def test_a_damaged_or_misnamed_gzip_file_is_named(tmp_path):
    whole = gzip.compress(b"a\tb\n" * 1000)
    (tmp_path / "a.tsv.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a\.tsv\.gz is a damaged gzip file"):
        read_pairs(tmp_path / "a.tsv.gz")
    (tmp_path / "b.tsv.gz").write_bytes(b"a\tb\n")
    with pytest.raises(DataError, match="not a gzip file"):
        read_pairs(tmp_path / "b.tsv.gz")


def test_one_side_alone_is_an_error(tmp_path):
    write_sides(tmp_path, "train")
    with pytest.raises(DataError, match="holds one side only: give the file of trans"):
        read_pairs(tmp_path / "train.en")


@pytest.mark.parametrize(
    "stem", ["val", "dev", "valid", "validation", "val.lc.norm.tok"]
)
def test_a_directory_knows_the_names_of_splits(tmp_path, stem):
    write_sides(tmp_path, "train", pairs=PAIRS[:1])
    write_sides(tmp_path, stem, suffix=".gz")
    (tmp_path / "_about.txt").write_text("not a corpus")
    assert read_pairs(tmp_path, split="valid", languages=("en", "de")) == PAIRS


def test_a_directory_may_hold_one_file_a_split(tmp_path):
    write(tmp_path / "train.tsv.gz", ["\t".join(pair) for pair in PAIRS])
    record = json.dumps({"en": "dog", "de": "Hund"})
    write(tmp_path / "test.jsonl", [record])
    assert read_pairs(tmp_path) == PAIRS
    pairs = read_pairs(tmp_path, split="test", languages=("en", "de"))
    assert pairs == [("dog", "Hund")]


def test_several_test_sets_are_told_apart_by_the_first_part_of_a_name(tmp_path):
    write_sides(tmp_path, "test_2016")
    assert read_pairs(tmp_path, split="test", languages=("en", "de")) == PAIRS
    write_sides(tmp_path, "test_2017", pairs=PAIRS[:1])
    with pytest.raises(DataError, match=r"several .* test_2016\.en, test_2017\.en"):
        read_pairs(tmp_path, split="test", languages=("en", "de"))
    pairs = read_pairs(tmp_path, split="test_2017", languages=("en", "de"))
    assert pairs == PAIRS[:1]


def test_a_directory_without_the_split_says_what_it_has(tmp_path):
    with pytest.raises(DataError, match="no parallel text in en and fr"):
        read_pairs(tmp_path, languages=("en", "fr"))
    write_sides(tmp_path, "train")
    with pytest.raises(DataError, match="has no split test; it has train"):
        read_pairs(tmp_path, split="test", languages=("en", "de"))


def test_settings_take_splits_and_relative_file_names(tmp_path):
    (tmp_path / "tok").mkdir()
    write_sides(tmp_path, "train")
    write_sides(tmp_path / "tok", "val", suffix=".gz")
    valid = ("tok/val.en.gz", "tok/val.de.gz")
    corpus = ParallelData(directory=tmp_path, valid=valid, test=()).load()
    assert (corpus.train, corpus.valid, corpus.test) == (PAIRS, PAIRS, [])
    reverse = ParallelData(
        directory=tmp_path, valid=(), test=(), source="de", target="en"
    )
    assert reverse.load().train == [pair[::-1] for pair in PAIRS]


def test_settings_name_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="train must be one or two names"):
        ParallelData(directory=tmp_path, train=())
    with pytest.raises(DataError, match="there is no directory .*nowhere"):
        ParallelData(directory=tmp_path / "nowhere").load()


@pytest.mark.parametrize(
    ("folder", "split", "languages", "count"),
    [
        ("multi30k/raw", "train", ("en", "fr"), 29_000),
        ("multi30k/tok", "valid", ("en", "de"), 1_014),
        ("multi30k/tok", "test_2016_flickr", ("en", "de"), 1_000),
        ("tatoeba_ende", "train", None, 164_776),
    ],
)
def test_published_corpora_are_read_as_they_come(
    shared, folder, split, languages, count
):
    directory = shared / "data" / folder
    if not directory.is_dir():
        pytest.skip(f"needs the corpus in {directory}")
    pairs = read_pairs(directory, split=split, languages=languages)
    assert len(pairs) == count
    assert all(source.strip() and target.strip() for source, target in pairs)
