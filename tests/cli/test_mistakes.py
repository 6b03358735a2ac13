"""The command line: how each mistake ends."""

import io
import shutil

import pytest

from qkv_jax.cli import main
from tests.cli.toy import MULTI30K, train
from tests.translation import toy


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("multi30.py", f"did you mean {MULTI30K}?"),
        ("zzz.py", "zzz.py"),
        ("", "experiments/translation"),
    ],
)
def test_a_missing_experiment_file_is_named_with_the_nearest(fail, name, expected):
    message = fail("train", MULTI30K.parent / name)
    assert message.startswith("there is no experiment file")
    assert message.endswith(expected)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("x = 1\n", "defines no CONFIG"),
        ("CONFIG = {}\n", "defines no CONFIG"),
        ("CONFIG = (\n", "cannot be loaded: '(' was never closed"),
        ("import qkv_jax.nothing\n", "cannot be loaded: No module named"),
    ],
)
def test_a_file_that_is_no_experiment_is_refused(tmp_path, fail, content, expected):
    (tmp_path / "a.py").write_text(content, encoding="utf-8")
    assert expected in fail("train", tmp_path / "a.py")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--optimzer.peak-lr 1", "--optimzer.peak-lr: did you mean --optimizer.peak-"),
        ("--decoding.no-exakt", "did you mean --decoding.no-exact?"),
        ("--no-json", "unknown option --no-json"),
        ("--optimizer.peak-lr high", "--optimizer.peak-lr: could not convert string"),
        ("--training.steps 1.5", "--training.steps: invalid literal for int"),
        ("--training.ema-decay x", "--training.ema-decay: no type"),
        ("--training.steps", "--training.steps"),
        ("--model.norm middle", "'middle'"),
        ("--training.steps 0", "steps must be at least 1; got 0."),
        ("--model.heads 3", "heads must divide d_model, or head_size"),
        ("--label-smoothing 2", "label_smoothing must be in [0, 1); got 2.0."),
        ("--optimizer.warmup-steps 9", "warmup_steps must be less than the 2 steps"),
        ("--training.metric loss", "mode must be 'min' for the metric 'loss'"),
        ("--mesh.data 99", "the mesh asks for 99 devices"),
        ("--data.train a b c", "train must be one or two names"),
        ("stray", "stray"),
        ("--data.directory {tmp}/none", "there is no directory"),
        ("--data.train train.en trian.de", "trian.de does not exist in"),
        ("--text.vocabulary 5000", "5,000 (--text.vocabulary) is larger than"),
        ("--text.filters.max-characters 1", "no training pair is left"),
    ],
)
def test_a_wrong_option_is_one_line_and_starts_nothing(
    corpus, tmp_path, fail, options, expected
):
    more = options.format(tmp=tmp_path).split()
    assert expected in fail(*train(corpus, tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        (b"a\nb\n", b"a\n", "train.en has 2 lines but"),
        (b"", b"", "train.en holds no sentences"),
        (b" \n\n", b"a\nb\n", "no training pair is left"),
        (b"a\nb\xff\n", b"a\nb\n", "train.en, line 2: byte 0xff is not UTF-8"),
    ],
)
def test_bad_text_is_one_line_and_starts_nothing(
    corpus, tmp_path, fail, source, target, expected
):
    text = shutil.copytree(corpus, tmp_path / "text")
    (text / "train.en").write_bytes(source)
    (text / "train.de").write_bytes(target)
    assert expected in fail(*train(text, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ([], "is a finished run: use `qkv-jax evaluate"),
        (["--training.steps", "3"], "training.steps: 2 there, 3 here"),
    ],
)
def test_training_never_overwrites_a_run(trained, corpus, fail, more, expected):
    before = toy.contents(trained)
    assert expected in fail(*train(corpus, trained, *more))
    assert toy.contents(trained) == before


def test_training_never_writes_among_other_files(corpus, tmp_path, fail):
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    assert "is not empty and not a run" in fail(*train(corpus, tmp_path))
    assert toy.contents(tmp_path) == {"thesis.txt": b"years of work"}


@pytest.mark.parametrize("command", ["evaluate", "translate", "plot"])
def test_a_directory_that_is_no_model_is_refused(tmp_path, monkeypatch, fail, command):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"one\n")))
    assert "it has no config.json." in fail(command, tmp_path)
    (tmp_path / "model.npz").write_bytes(b"")
    assert f"qkv-jax import {tmp_path} OUT" in fail(command, tmp_path)
    absent = tmp_path / "none"
    message = fail(command, absent)
    assert message.startswith(f"{absent} is no")


@pytest.mark.parametrize("damaged", ["checkpoints", "tokenizer"])
def test_a_file_cut_short_is_named_and_nothing_is_changed(
    trained, tmp_path, fail, damaged
):
    run = shutil.copytree(trained, tmp_path / "run")
    files = [path for path in (run / damaged).rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-100])
    before = toy.contents(run)
    message = fail("translate", run, "one")
    assert "cut short" in message
    assert str(run / damaged) in message
    assert toy.contents(run) == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("translate RUN one --n-best 3 --beams 2", "--n-best 3 needs --beams of at"),
        ("translate RUN one --n-best 0", "--n-best must be at least 1; got 0"),
        ("translate RUN one --beams 0", "--beams must be positive; got 0"),
        ("translate RUN one --alpha nan", "--alpha must be finite; got nan"),
        ("translate RUN one --nbest 2", "--nbest: did you mean --n-best?"),
        ("translate RUN one --input a.txt", "as arguments or by --input, not both"),
        ("translate RUN --input TMP/a.txt", "a.txt cannot be read: No such file"),
        ("translate RUN one --output TMP/no/a", "a cannot be written: No such file"),
        ("translate RUN one --checkpoint 7", "holds no checkpoint of step 7"),
        ("translate RUN one --checkpoint good", "must be a step, 'best', 'latest'"),
        ("translate", "PATH"),
        ("translate RUN \udcff", "sentence 1 is not UTF-8"),
        ("evaluate RUN --split dev", "'dev'"),
        ("evaluate RUN --source TMP/a", "--source and --reference go together"),
        ("evaluate RUN --source TMP/a --reference TMP/b", "a does not exist"),
        ("evaluate RUN RUN", "is named twice"),
        ("evaluate RUN --pair en-de", "--pair is of --set"),
        ("evaluate RUN --set wmt17 --reference a", "give --set, or --source and"),
        ("evaluate RUN --set wmt170", "no test set 'wmt170': did you mean wmt17"),
        ("evaluate RUN --set wmt17 --pair en-xx", "wmt17 has no pair 'en-xx': it"),
        ("evaluate RUN --tokenize moses", "--tokenize must be one of none, zh"),
        ("evaluate RUN --lengths 5 3", "--lengths must be positive and increasing"),
        ("compare RUN", "compare needs two or more models or files"),
        ("compare RUN TMP/none", "none is no directory"),
        ("compare RUN TMP/none --metrics blue", "--metrics must be of bleu"),
        ("compare RUN TMP/none --level 5", "--level must be in (0, 1); got 5.0"),
        ("train", "train needs an experiment file"),
        ("bogus", "unknown command 'bogus'"),
    ],
)
def test_a_wrong_use_of_a_run_is_one_line(trained, tmp_path, fail, arguments, expected):
    names = {"RUN": str(trained), "TMP": str(tmp_path)}
    for name, value in names.items():
        arguments = arguments.replace(name, value)
    assert expected in fail(*arguments.split())


def test_a_bad_line_of_input_is_named_by_its_number(trained, monkeypatch, fail):
    given = io.TextIOWrapper(io.BytesIO(b"one\ntwo\xff\n"))
    monkeypatch.setattr("sys.stdin", given)
    assert fail("translate", trained) == (
        "standard input, line 2: not UTF-8 (invalid start byte)"
    )


def test_an_interruption_is_no_traceback(monkeypatch, capfd):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("qkv_jax.cli.training.demo", interrupted)
    assert main(["demo"]) == 130
    assert capfd.readouterr().err == "\nqkv-jax: interrupted\n"
