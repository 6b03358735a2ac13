"""The command line with models of any kind: scores, wishes, samples, imports and exports."""

import json
import re
from pathlib import Path

import pytest

from qkv_jax.cli import main
from tests.translation import toy


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A toy run, and the same model as a published one and as an imported one."""
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QKV_JAX_CACHE", str(folder / "cache"))
        corpus = toy.write_corpus(folder / "corpus")
        toy.run(toy.make_config(corpus, folder / "run"))
        assert (
            main(
                ["export", str(folder / "run"), str(folder / "published"), "--to", "hf"]
            )
            == 0
        )
        assert main(["import", str(folder / "published"), str(folder / "in")]) == 0
        yield folder


@pytest.fixture
def say(places, capfd):
    """Runs a command on models of `places` by name; its lines of output."""

    def run(*words: str, fails: bool = False) -> list[str]:
        known = {path.name for path in places.iterdir()}
        capfd.readouterr()
        code = main([str(places / word) if word in known else word for word in words])
        found = capfd.readouterr()
        assert (code == 2) if fails else (code == 0), found.err
        return (found.err if fails else found.out).splitlines()

    return run


def test_what_the_readme_shows_runs(say, places, monkeypatch, capfd):
    (places / "models").mkdir(exist_ok=True)
    (places / "models" / "en-de").symlink_to(places / "in")
    monkeypatch.chdir(places)
    text = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[1]
    exec(compile(code, "README.md", "exec"), {})  # noqa: S102
    (shown,) = capfd.readouterr().out.splitlines()
    assert re.search(r"-\d+\.\d+ ", shown)
    (places / "models" / "en-de").unlink()


def test_a_run_and_its_imported_copy_translate_alike(say):
    ours = say("translate", "run", "one two", "", "nine six")
    assert len(ours) == 3 and ours[1] == ""
    assert say("translate", "in", "one two", "", "nine six") == ours
    assert (
        say("translate", "run", "one two", "", "nine six", "--ensemble", "run") == ours
    )


def test_scores_are_a_line_for_each_pair(say, tmp_path):
    (tmp_path / "source").write_text("one two\nnine\n")
    (tmp_path / "target").write_text("two one\nnine nine nine\n")
    files = ("--source", str(tmp_path / "source"), "--target", str(tmp_path / "target"))
    rows = [list(map(float, line.split("\t"))) for line in say("score", "run", *files)]
    assert all(score == pytest.approx(total / n, abs=1e-4) for score, total, n in rows)
    parsed = [json.loads(line) for line in say("score", "in", *files, "--json")]
    for (score, _, tokens), other in zip(rows, parsed):
        assert other["score"] == pytest.approx(score, abs=1e-4)
        assert other["tokens"] == tokens


def test_wishes_come_from_files_and_options(say, tmp_path):
    (tmp_path / "prefixes").write_text("seven\n\n")
    (tmp_path / "phrases").write_text("\nnine\tone\n")
    found = say(
        "translate", "run", "one two", "six",
        "--prefixes", str(tmp_path / "prefixes"), "--phrases", str(tmp_path / "phrases"),
    )  # fmt: skip
    assert found[0].startswith("seven")
    assert "nine" in found[1] and "one" in found[1]
    (tmp_path / "short").write_text("seven\n")
    (message,) = say(
        "translate",
        "run",
        "one",
        "two",
        "--prefixes",
        str(tmp_path / "short"),
        fails=True,
    )
    assert "must have a line for each of 2 sentences; it has 1" in message


def test_samples_are_drawn_and_ordered(say):
    drawn = say("translate", "run", "one two", "--samples", "3", "--n-best", "3")
    assert len(drawn) == 3
    assert (
        say("translate", "run", "one two", "--samples", "3", "--n-best", "3") == drawn
    )
    best = say(
        "translate", "run", "one two", "--samples", "3", "--minimum-risk", "True"
    )
    assert best[0] in [line.split("\t")[1] for line in drawn]


def test_alignments_follow_the_text(say):
    row = json.loads(say("translate", "run", "one two", "--align", "--json")[0])
    found = row["translations"][0]
    assert len(found["weights"]) == len(
        {p.split("-")[1] for p in found["alignment"].split()}
    )
    line = say("translate", "run", "one two", "--align")[0]
    assert line == f"{found['text']}\t{found['alignment']}"


def test_an_imported_model_is_evaluated_on_files(say, tmp_path):
    (tmp_path / "source").write_text("one two\nnine\n")
    files = (
        "--source",
        str(tmp_path / "source"),
        "--reference",
        str(tmp_path / "source"),
    )
    ours, theirs = (
        json.loads(say("evaluate", name, *files, "--json")[0]) for name in ("run", "in")
    )
    assert ours == theirs
    (message,) = say("evaluate", "in", fails=True)
    assert "is no run, which has a corpus: give --source and --reference" in message


@pytest.mark.parametrize(
    "words, message",
    [
        (
            "translate run one --temperature 2.0",
            "temperature is of samples: give samples.",
        ),
        (
            "translate run one --top-p 2.0 --samples 2",
            "--top-p must be in (0, 1], or None",
        ),
        (
            "translate run one --n-best 3 --samples 2",
            "needs --samples of at least that",
        ),
        ("translate run one --target-language deu", "whose languages are those it was"),
        ("translate in one --checkpoint best", "is no run: it has no checkpoints"),
        (
            "export run published --to hf",
            "published is not empty: choose another directory.",
        ),
        ("import published in", "in is not empty: choose another directory."),
        (
            "import nowhere/at/all x",
            "is no directory, and no name of a model on the hub.",
        ),
        ("export run x --to hf --verify", "--verify is of --to ctranslate2"),
        ("export run x --to hf --quantization int8", "quantization is of CTranslate2"),
        ("export run x", "--to"),
    ],
)
def test_a_wrong_use_of_a_model_is_one_line(say, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (line,) = say(*words.split(), fails=True)
    assert message in line
    assert not list(tmp_path.iterdir())


def test_an_imported_model_is_looked_at(places, tmp_path, ask, fail):
    model = places / "in"
    what = ["--what", "heads", "page", "--output", str(tmp_path)]
    assert "is no run, which has text" in fail("plot", model, *what)
    assert "is no run, which has curves" in fail("plot", model, "--what", "curves")
    files = [
        "--source",
        places / "corpus/test.en",
        "--target",
        places / "corpus/test.de",
    ]
    lines = ask("plot", model, *what, *files, "--sentences", "4")
    assert [Path(line).name for line in lines] == [
        "page.html",
        "heads.png",
        "heads.tsv",
    ]
    links = ask("align", model, *files)
    assert len(links) == toy.PARTS["test"] and all("-" in line for line in links)


def test_compressed_models_translate_and_are_evaluated(say, places):
    said = say("compress", "run", str(places / "small"), "--weights", "int8")
    assert re.match(r"[\d,]+ parameters, [\d,]+ bytes of weights", said[0])
    assert len(say("translate", "small", "one two", "nine")) == 2
    assert any("chrf" in line for line in say("evaluate", "small"))
    (error,) = say(
        "compress",
        "run",
        "out",
        "--weights",
        "int4",
        "--activations",
        "int8",
        fails=True,
    )
    assert "one scale an output" in error
    (error,) = say("prune", "run", "out", fails=True)
    assert "nothing is removed" in error


def test_a_mean_of_models_is_a_model(say, places):
    said = say(
        "average", "run", "run", "--output", str(places / "mean"), "--weights", "3", "1"
    )
    assert re.match(r"[\d,]+ parameters, [\d,]+ bytes of weights", said[0])
    assert say("translate", "mean", "one two") == say("translate", "run", "one two")
    (error,) = say("average", "run", "--output", "out", fails=True)
    assert "models must be two or more; got 1." in error
    (error,) = say(
        "average", "run", "run", "--output", "out", "--weights", "1", fails=True
    )
    assert "weights must be one for each of the 2 models; got 1." in error
