"""The command line: what shows what a model has learned."""

import json
from pathlib import Path

import pytest

from qkv_jax.cli import main
from tests.translation import toy

TREE = """\
1\tone\t_\t_\t_\t_\t2\tamod\t_\t_
2\ttwo\t_\t_\t_\t_\t0\troot\t_\t_

"""
PICTURES = ["alignment.png", "page.html", "heads.png", "heads.tsv", "spans.png"]
PICTURES += ["embeddings.png"]


@pytest.fixture(scope="module")
def drawn(trained, tmp_path_factory):
    """A directory with every picture but curves and attention, and what was said of them."""
    directory = tmp_path_factory.mktemp("drawn")
    (directory / "trees").write_text(TREE * 40, "utf-8")
    what = ["alignment", "heads", "spans", "embeddings", "page"]
    options = ["--dependencies", str(directory / "trees"), "--sentences", "5"]
    command = ["plot", str(trained), "--output", str(directory), *options]
    assert main([*command, "--what", *what]) == 0
    return directory


def test_plot_draws_into_a_directory_of_choice(trained, tmp_path, ask):
    before = toy.contents(trained)
    options = ["--text", "one two", "--layer", "encoder.0.attention"]
    lines = ask("plot", trained, *options, "--output", tmp_path / "a" / "b")
    assert [Path(line).name for line in lines] == ["curves.png", "attention.png"]
    assert all(Path(line).read_bytes().startswith(b"\x89PNG") for line in lines)
    assert toy.contents(trained) == before


def test_plot_draws_what_is_asked_for(drawn):
    for name in PICTURES:
        content = (drawn / name).read_bytes()
        kind = {"png": b"\x89PNG", "html": b"<!doctype html>", "tsv": b"layer\thead\t"}
        assert content.startswith(kind[name.rpartition(".")[2]]), name
    assert not (drawn / "curves.png").exists()


def test_every_head_has_a_row_with_its_relation(drawn):
    text = (drawn / "heads.tsv").read_text("utf-8")
    titles, *rows = [line.split("\t") for line in text.splitlines()]
    layers = ["encoder.0.attention", "decoder.0.attention", "decoder.0.cross"]
    expected = [[layer, head] for layer in layers for head in "12"]
    assert [row[:2] for row in rows] == expected
    relations = [row[titles.index("relation")] for row in rows]
    assert all(name.startswith("amod") for name in relations[:2])
    assert relations[2:] == ["-"] * 4
    entropy = [float(row[titles.index("normalised")]) for row in rows]
    assert all(0 <= value <= 1.0001 for value in entropy)


def test_curves_alone_are_drawn_without_a_model(trained, tmp_path, monkeypatch, ask):
    monkeypatch.setattr("qkv_jax.cli.looking.load_model", None)
    lines = ask("plot", trained, "--what", "curves", "--output", tmp_path)
    assert lines == [str(tmp_path / "curves.png")] and Path(lines[0]).exists()


@pytest.fixture
def pairs(tmp_path):
    """Options that name three pairs."""
    (tmp_path / "a").write_text("one two\nthree four five\nsix\n", "utf-8")
    (tmp_path / "b").write_text("two one\nfive four three\nsix\n", "utf-8")
    return ["--source", str(tmp_path / "a"), "--target", str(tmp_path / "b")]


def test_align_links_each_word_of_a_target_to_one_of_its_source(
    trained, tmp_path, pairs, ask
):
    lines = ask("align", trained, *pairs)
    links = [[tuple(map(int, x.split("-"))) for x in line.split()] for line in lines]
    for found, words in zip(links, (2, 3, 1), strict=True):
        assert sorted(target for _, target in found) == [*range(words)]
        assert all(0 <= source < words for source, _ in found)
    output = tmp_path / "links"
    assert ask("align", trained, *pairs, "--output", output) == []
    assert output.read_text("utf-8").splitlines() == lines


def test_align_scores_against_a_reference(trained, tmp_path, pairs, ask):
    own = ask("align", trained, *pairs)
    (tmp_path / "gold").write_text("\n".join([*own, ""]), "utf-8")
    options = [*pairs, "--gold", tmp_path / "gold"]
    table = ask("align", trained, *options)
    assert table[0].split() == ["layer", "precision", "recall", "AER"]
    assert table[1].split() == ["decoder.0.cross", "1.0000", "1.0000", "0.0000"]
    (tmp_path / "gold").write_text("1p1 2-1\n\n\n", "utf-8")
    row = json.loads(ask("align", trained, *options, "--one-based", "--json")[0])
    assert 0 <= row["decoder.0.cross"]["error_rate"] <= 1
    assert row["decoder.0.cross"]["precision"] <= 1 / 6 * 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("plot RUN --layer decoder.0.cros", "did you mean decoder.0.cross?"),
        (
            "plot RUN --what alignment --layer encoder.0.attention",
            "no cross-attention layer 'enc",
        ),
        ("plot RUN --what heat", "'heat'"),
        ("plot RUN --source TMP/a", "--source and --target go together"),
        ("plot RUN --what heads --sentences 0", "--sentences must be positive; got 0"),
        ("plot RUN --what page --text=", "--text is blank"),
        ("plot RUN --what heads --dependencies TMP/no", "no does not exist in"),
        (
            "plot RUN --what page --text one --output TMP/a",
            "a cannot hold the pictures",
        ),
        ("align RUN --source TMP/a --target TMP/b --json", "are of a --gold file"),
        (
            "align RUN --source TMP/a --target TMP/b --layer x",
            "there are decoder.0.cross",
        ),
        ("align RUN --source TMP/a --target TMP/b --gold TMP/b", "'two' is no link"),
    ],
)
def test_a_wrong_use_is_one_line(trained, tmp_path, pairs, fail, arguments, expected):
    names = {"RUN": str(trained), "TMP": str(tmp_path)}
    for name, value in names.items():
        arguments = arguments.replace(name, value)
    assert expected in fail(*arguments.split())
