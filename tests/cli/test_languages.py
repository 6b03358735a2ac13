"""One run for several languages, and training pairs made from text in one language."""

import dataclasses

import pytest

from qkv_jax.cli import main
from tests.cli.toy import ROOT, SMALL, train
from tests.translation import toy

MULTILINGUAL = ROOT / "experiments" / "translation" / "multi30k_multilingual.py"


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """A run into two languages, the second of which is the source itself."""
    corpus = toy.write_corpus(tmp_path_factory.mktemp("text"))
    for part in toy.PARTS:
        (corpus / f"{part}.fr").write_text((corpus / f"{part}.en").read_text())
    run = tmp_path_factory.mktemp("runs") / "several"
    places = ["--data.directory", str(corpus), "--run.directory", str(run)]
    assert main(["train", str(MULTILINGUAL), *SMALL, *places]) == 0
    return run


def test_a_run_for_several_languages_is_told_which(several, ask, fail):
    (german,) = ask("translate", several, "one two", "--target-language", "de")
    (french,) = ask("translate", several, "one two", "--target-language", "fr")
    assert isinstance(german, str) and isinstance(french, str)
    assert "translates into de and fr" in fail("translate", several, "one two")
    said = fail("translate", several, "one", "--target-language", "it")
    assert "choose a target language of en to de, en to fr" in said


def test_a_tag_and_the_option_ask_for_the_same(several, ask):
    from qkv_jax.translation import LanguageConfig, load_translator

    language = LanguageConfig(target="fr")
    told = load_translator(several, languages=language)
    (own,) = told.score([("one two", "one two")])
    (tagged,) = load_translator(several).score([("<2fr> one two", "one two")])
    assert own == tagged
    (found,) = told(["one two"], align=True)
    assert found[0].alignment.weights.shape[1] == 2


def test_each_language_is_scored_by_itself(several, ask):
    whole = ask("evaluate", several)
    german = ask("evaluate", several, "--target-language", "de")
    assert any("24 sentences" in line for line in whole)
    assert any("12 sentences" in line for line in german)


def test_made_pairs_train_another_run(trained, corpus, tmp_path, ask, capfd):
    text, pairs = tmp_path / "mono.de", tmp_path / "made.tsv"
    text.write_text("one two three\n\nfour\tfive\n")
    options = ["--input", text, "--output", pairs]
    ask("back-translate", trained, *options, "--samples", "2", "--min-length", "3")
    rows = [line.split("\t") for line in pairs.read_text().splitlines()]
    assert [row[1] for row in rows] == ["one two three"] * 2 + ["four five"] * 2
    run = tmp_path / "run"
    more = ["--text.back-translated", str(pairs), "--text.vocabulary", "292"]
    assert main(train(corpus, run, *more)) == 0
    assert "back-translated: 4 pairs" in capfd.readouterr().err


def test_a_teachers_translations_train_a_student(
    trained, corpus, tmp_path, ask, fail, capfd, monkeypatch
):
    from qkv_jax.data import read_pairs
    from qkv_jax.translation import load_run, resumable
    from qkv_jax.translation.run import prepare

    monkeypatch.setattr(resumable, "SENTENCES", 64)
    made, part = tmp_path / "made.tsv", tmp_path / "made.tsv.part"
    call = ["distil", trained, "--output", made]

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # After the first part of the text.
        patch.setattr("os.fsync", stop)
        assert main(list(map(str, call))) == 130
    assert not made.exists() and len(part.read_text().splitlines()) == 1 + 64
    with part.open("a") as file:
        file.write('["half a li')
    other = fail(*call, "--beams", "1")
    assert "was begun by another model, with other options or of other text" in other
    capfd.readouterr()
    ask(*call)
    pairs = read_pairs(made)
    sources = list(dict.fromkeys((corpus / "train.en").read_text().splitlines()))
    found = [best[0].text for best in load_run(trained)(sources)]
    assert pairs == [pair for pair in zip(sources, found) if pair[1]]
    assert not part.exists()
    assert "is there already, and is left as it is" in fail(*call)
    student = toy.make_config(corpus, tmp_path / "student")
    references = len((corpus / "train.en").read_text().splitlines())
    for keep, training in ((False, len(pairs)), (True, len(pairs) + references)):
        text = dataclasses.replace(student.text, distilled=made, keep_references=keep)
        report = prepare(dataclasses.replace(student, text=text)).report
        assert f"distilled: {len(pairs)} pairs" in report
        assert f"parts: {training} training, 8 validation, 12 test" in report


def test_pairs_that_repeat_themselves_are_told_of(trained, tmp_path, capfd):
    text, pairs = tmp_path / "mono.de", tmp_path / "made.tsv"
    text.write_text("one two\n" + "three four " * 12 + "\n")
    capfd.readouterr()
    options = ["--input", text, "--output", pairs, "--max-length", "3"]
    assert main(list(map(str, ["back-translate", trained, *options]))) == 0
    said = capfd.readouterr().err
    assert f"repeat themselves, as in line 2 of {pairs}" in said
    assert "--text.filters.max-compression-ratio 2.0 trains without them" in said


def test_pairs_cannot_be_made_of_nothing(trained, tmp_path, fail):
    text = tmp_path / "mono.de"
    text.write_text("\n")
    options = ["--input", text, "--output"]
    said = fail("back-translate", trained, *options, tmp_path / "made.tsv")
    assert "holds no sentences" in said
    said = fail("back-translate", trained, *options, tmp_path / "made.txt")
    assert "must end in .tsv" in said
    said = fail("distil", trained, "--output", tmp_path / "no" / "made.tsv")
    assert "which is no directory" in said
