"""The command line: evaluate and compare."""

import json
import shutil

import pytest
from sacrebleu.dataset import DATASETS

from tests.translation import toy


@pytest.fixture(scope="module")
def text(corpus):
    """Options for text that is no run's own: 8 sentences."""
    return ["--source", corpus / "valid.en", "--reference", corpus / "valid.de"]


@pytest.fixture(scope="module")
def other(trained, tmp_path_factory):
    """The same run elsewhere."""
    return shutil.copytree(trained, tmp_path_factory.mktemp("other") / "again")


@pytest.fixture
def cached_set(tmp_path, monkeypatch):
    """wmt17 in a cache of sacreBLEU's, as it leaves a set there: two sentences."""
    known = DATASETS["wmt17"]
    monkeypatch.setattr(known, "_outdir", str(tmp_path / "wmt17"))
    monkeypatch.setattr(known, "_rawdir", str(tmp_path / "wmt17" / "raw"))
    (tmp_path / "wmt17").mkdir()
    fields = dict.fromkeys(known.fieldnames("en-de"), "a\nb\n")
    fields |= {"src": "one two\u2028\nnine \n", "ref": "two one\nx\n"}
    for name, content in fields.items():
        file = tmp_path / "wmt17" / f"wmt17.en-de.{name}"
        file.write_text(content, encoding="utf-8")


def test_evaluate_scores_the_runs_own_test_part(trained, ask):
    result = json.loads((trained / "result.json").read_text("utf-8"))["test"]
    lines = ask("evaluate", trained)
    names = ["bleu", "bleu_lower_tokenized", "chrf", "chrf_plus_plus", "ter"]
    assert [line.split()[0] for line in lines[:7]] == [
        *names,
        "exact_match",
        "length_ratio",
    ]
    for name, line in zip(names, lines):
        signature = result["signatures"][name]
        assert line.split()[1:] == [f"{result[name]:.2f}", signature]
    assert "12 sentences in batches of" in lines[6]
    assert lines[7].split()[:3] == ["0-9", "words", "bleu"]
    assert lines[7].endswith("12 sentences, by their source")
    assert json.loads("".join(ask("evaluate", trained, "--json"))) == result


def test_evaluate_scores_files_and_writes_translations(trained, text, tmp_path, ask):
    output = tmp_path / "found.txt"
    lines = ask("evaluate", trained, *text, "--output", output)
    assert lines == ask("evaluate", trained, "--split", "valid")
    assert len(output.read_text("utf-8").split("\n")) == toy.PARTS["valid"] + 1


def test_evaluate_takes_further_references_and_gives_intervals(trained, text, ask):
    more = [*text, "--reference", text[1], "--resamples", "100"]
    lines = ask("evaluate", trained, *more)
    assert " ± " in lines[0]
    assert "nrefs:2|bs:100|seed:12345" in lines[0]


def test_evaluate_puts_several_models_into_one_table(
    trained, other, text, tmp_path, ask
):
    lines = ask("evaluate", trained, other, *text, "--output", tmp_path / "out")
    rows = [line.split("│") for line in lines if "│" in line]
    assert [row[1].strip() for row in rows] == ["trained", "again"]
    assert rows[0][2:] == rows[1][2:]
    assert "TER" in lines[1]
    files = sorted(tmp_path.glob("out/*.txt"))
    assert len(files) == 2
    assert files[0].read_text() == files[1].read_text()
    found = json.loads("".join(ask("evaluate", trained, other, *text, "--json")))
    assert list(found) == [str(trained), str(other)]


def test_evaluate_reads_sacrebleus_sets_from_its_cache(trained, cached_set, ask):
    found = ask("evaluate", trained, "--set", "wmt17", "--json")
    assert json.loads(found[0])["sentences"] == 2


def test_a_set_that_is_nowhere_names_the_way_out(
    trained, cached_set, tmp_path, monkeypatch, fail
):
    def no_network(*_):
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    (tmp_path / "wmt17" / "wmt17.en-de.ref").unlink()
    message = fail("evaluate", trained, "--set", "wmt17", "--pair", "en-de")
    assert f"wmt17 is not in its cache {tmp_path} and cannot be downloaded" in message
    assert "(no route to host): run `sacrebleu -t wmt17 -l en-de --echo src`" in message


def test_comet_is_left_out_where_it_is_not_installed(trained, text, capfd):
    from qkv_jax.cli import main

    words = ["evaluate", trained, *text, "--comet", "Unbabel/wmt22-comet-da"]
    assert main([str(word) for word in words]) == 0
    assert "COMET is left out: it is not installed" in capfd.readouterr().err


def test_compare_tests_runs_and_files_of_translations(trained, other, tmp_path, ask):
    translations = tmp_path / "reversed"
    test = [line.split() for line in ask("translate", trained, "--input", _test(other))]
    translations.write_text("".join(f"{' '.join(x[::-1])} a\n" for x in test))
    output = tmp_path / "out"
    quick = ["--resamples", "100", "--trials", "100", "--output", output]
    lines = ask("compare", trained, other, translations, *quick)
    assert lines[0].strip().startswith("against")
    rows = [line.split("│") for line in lines if line.startswith("│")]
    assert [row[2].strip() for row in rows[:3]] == ["trained", "again", "reversed"]
    assert rows[1][7].strip() == "not shown"
    assert any(line.startswith("bleu bootstrap   nrefs:1|bs:100") for line in lines)
    content = json.loads((output / "comparison.json").read_text("utf-8"))
    assert content["systems"] == [str(other), str(translations)]
    assert {x["source"] for x in content["examples"]} <= set(_lines(_test(other)))
    assert len(list(output.glob("*.txt"))) == 3


def test_compare_takes_files_alone(corpus, tmp_path, ask, fail):
    files = [corpus / "valid.en", corpus / "valid.de"]
    quick = ["--resamples", "100", "--trials", "100", "--metrics", "chrf"]
    (line,) = ask("compare", *files, *quick, "--reference", corpus / "valid.de", "--json")  # fmt: skip
    (found,) = json.loads(line)["differences"]
    assert (found["metric"], found["score"]) == ("chrf", pytest.approx(100.0))
    assert found["verdict"] == "better"
    assert "none of these is a run" in fail("compare", *files)
    (tmp_path / "short").write_text("one\n")
    reference = ["--reference", corpus / "valid.de"]
    message = fail("compare", files[0], tmp_path / "short", *reference)
    assert "short must have a line for each of 8 sentences; it has 1" in message


def test_compare_refuses_runs_on_unlike_text(trained, other, tmp_path, fail):
    run, text = tmp_path / "run", tmp_path / "text"
    shutil.copytree(other, run)
    content = json.loads((run / "config.json").read_text("utf-8"))
    shutil.copytree(content["data"]["directory"], text)
    for name in ("test.en", "test.de"):
        (text / name).write_text("one\n")
    content["data"]["directory"] = str(text)
    (run / "config.json").write_text(json.dumps(content))
    assert "have unlike test parts: give --source" in fail("compare", trained, run)


def _test(run):
    from qkv_jax.translation import read_run

    return read_run(run).data.directory / "test.en"


def _lines(path):
    return path.read_text("utf-8").splitlines()
