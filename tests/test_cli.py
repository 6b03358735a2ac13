"""The command line: what each command does, and how each mistake ends."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qkv_jax.cli import main, parsing
from qkv_jax.translation import demo
from tests.translation import toy

ROOT = Path(__file__).parents[1]
MULTI30K = ROOT / "experiments" / "translation" / "multi30k.py"
SMALL = [
    "--data.train",
    "train",
    "--data.valid",
    "valid",
    "--data.test",
    "test",
    "--text.vocabulary",
    "290",
    "--text.batch-tokens",
    "512",
    "--text.buckets",
    "1",
    "--text.max-source",
    "24",
    "--text.max-target",
    "24",
    "--model.d-model",
    "16",
    "--model.d-ff",
    "32",
    "--model.heads",
    "2",
    "--model.encoder-layers",
    "1",
    "--model.decoder-layers",
    "1",
    "--optimizer.warmup-steps",
    "1",
    "--training.steps",
    "2",
    "--training.log-every",
    "1",
    "--validation-sentences",
    "4",
    "--training.metric",
    "bleu",
    "--training.mode",
    "max",
    "--decoding.beams",
    "2",
    "--decoding.max-source",
    "24",
    "--decoding.no-exact",
    "--decoding.max-length",
    "12",
    "--decoding.batch-rows",
    "8",
]
TINY_FILE = """
from pathlib import Path
from qkv_jax.data import ParallelData
from tests.translation import toy
CONFIG = toy.make_config(Path("text"), None, steps=1)
"""


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QKV_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return toy.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """A finished run of multi30k.py with options; tests only read it."""
    directory = tmp_path_factory.mktemp("runs") / "trained"
    assert main(train(corpus, directory)) == 0
    return directory


def train(corpus, directory, *more):
    places = ["--data.directory", str(corpus), "--run.directory", str(directory)]
    return ["train", str(MULTI30K), *SMALL, *places, *more]


@pytest.fixture
def ask(capfd):
    """Runs a command that succeeds, and returns its standard output's lines."""

    def ask(*arguments):
        capfd.readouterr()
        assert main([str(argument) for argument in arguments]) == 0
        return capfd.readouterr().out.splitlines()

    return ask


@pytest.fixture
def fail(capfd):
    """Runs a command that fails as a user's mistake must, and returns its message."""

    def fail(*arguments):
        capfd.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        printed = capfd.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("qkv-jax: error: ")
        assert printed.err.count("\n") == 1
        assert printed.err.endswith("\n")
        return printed.err.removeprefix("qkv-jax: error: ").strip()

    return fail


def test_training_with_options_leaves_a_finished_run(trained):
    result = json.loads((trained / "result.json").read_text("utf-8"))
    assert result["steps"] == 2
    rows = (trained / "metrics.jsonl").read_text("utf-8").splitlines()
    assert "validation/bleu" in json.loads(rows[-1])
    config = json.loads((trained / "config.json").read_text("utf-8"))
    assert config["decoding"]["exact"] is False
    assert config["model"]["d_model"] == 16


def test_a_run_lies_in_runs_under_the_experiments_name(tmp_path, monkeypatch, ask):
    monkeypatch.chdir(tmp_path)
    toy.write_corpus(tmp_path / "text")
    (tmp_path / "mine.py").write_text(TINY_FILE, encoding="utf-8")
    printed = ask("train", "mine.py", "--data.valid", "--data.test")
    result = json.loads("\n".join(printed))
    assert result["steps"] == 1
    assert "test" not in result
    assert (tmp_path / "runs" / "mine" / "attention.png").exists()


def test_evaluate_scores_the_runs_own_test_part(trained, ask):
    result = json.loads((trained / "result.json").read_text("utf-8"))["test"]
    lines = ask("evaluate", trained)
    assert [line.split()[0] for line in lines] == [
        "bleu",
        "bleu_lower_tokenized",
        "chrf",
        "length_ratio",
    ]
    assert lines[0].split()[1:] == [
        f"{result['bleu']:.2f}",
        result["signatures"]["bleu"],
    ]
    assert "12 sentences in batches of" in lines[-1]
    assert json.loads("".join(ask("evaluate", trained, "--json"))) == result


def test_evaluate_scores_files_and_writes_translations(trained, corpus, tmp_path, ask):
    files = ["--source", corpus / "valid.en", "--reference", corpus / "valid.de"]
    output = tmp_path / "found.txt"
    lines = ask("evaluate", trained, *files, "--output", output)
    assert lines == ask("evaluate", trained, "--split", "valid")
    assert len(output.read_text("utf-8").split("\n")) == toy.PARTS["valid"] + 1


def test_translate_reads_arguments_a_file_and_standard_input(
    trained, tmp_path, monkeypatch, ask
):
    sentences = ["one two", "", "three four five"]
    lines = ask("translate", trained, *sentences)
    assert len(lines) == 3
    assert lines[1] == ""
    source, output = tmp_path / "source.txt", tmp_path / "target.txt"
    source.write_bytes("\r\n".join([*sentences, ""]).encode())
    assert ask("translate", trained, "--input", source, "--output", output) == []
    assert output.read_text("utf-8").split("\n") == [*lines, ""]
    given = io.TextIOWrapper(io.BytesIO("\n".join(sentences).encode()))
    monkeypatch.setattr("sys.stdin", given)
    assert ask("translate", trained) == lines


def test_translate_gives_the_n_best_with_scores(trained, ask):
    lines = ask("translate", trained, "one two", "three", "--n-best", "3")
    assert len(lines) == 6
    scores = [float(line.split("\t")[0]) for line in lines]
    assert scores[:3] == sorted(scores[:3], reverse=True)
    rows = ask("translate", trained, "one two", "three", "--n-best", "3", "--json")
    first = json.loads(rows[0])
    assert first["source"] == "one two"
    best = first["translations"][0]
    assert lines[0] == f"{best['score']:.4f}\t{best['text']}"


def test_a_cut_sentence_is_reported_beside_its_translation(trained, capfd):
    assert main(["translate", str(trained), "one " * 40, "two"]) == 0
    printed = capfd.readouterr()
    assert len(printed.out.splitlines()) == 2
    assert "1 of 2 sentences were longer than 24 tokens" in printed.err


def test_plot_draws_into_a_directory_of_choice(trained, tmp_path, ask):
    before = toy.contents(trained)
    options = ["--text", "one two", "--layer", "encoder.0.attention"]
    lines = ask("plot", trained, *options, "--output", tmp_path / "a" / "b")
    assert [Path(line).name for line in lines] == ["curves.png", "attention.png"]
    assert all(Path(line).read_bytes().startswith(b"\x89PNG") for line in lines)
    assert toy.contents(trained) == before


def test_plot_draws_a_held_out_sentence_by_default(trained, tmp_path, ask):
    lines = ask("plot", trained, "--output", tmp_path)
    assert all(Path(line).exists() for line in lines)


def test_the_demo_ends_with_a_table_of_what_it_did(
    corpus, tmp_path, monkeypatch, capfd
):
    config = toy.shrink(demo.CONFIG, corpus=corpus, directory=None, steps=2)
    monkeypatch.setattr(demo, "CONFIG", config)
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 0
    printed = capfd.readouterr().out
    for part in ("BLEU", "chrF", "nrefs:1|case:mixed", "tokens/s"):
        assert part in printed
    assert 'translate runs/demo "Turn on the light"' in printed
    assert (tmp_path / "runs" / "demo" / "result.json").exists()


COMMANDS = [
    [],
    ["train"],
    ["train", str(MULTI30K)],
    ["evaluate"],
    ["translate"],
    ["plot"],
    ["demo"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[:2]))
def test_help_is_there_for_each_command(command, ask):
    assert "usage" in ask(*command, "--help")[0].lower()


def test_no_command_prints_the_usage(capfd):
    assert main([]) == 2
    assert "usage: qkv-jax COMMAND" in capfd.readouterr().err


def test_the_module_runs_as_a_program():
    command = [sys.executable, "-m", "qkv_jax", "trian"]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2
    message = "qkv-jax: error: unknown command 'trian': did you mean train?\n"
    assert (done.stdout, done.stderr) == ("", message)


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
        ("--text.vocabulary 5000", "larger than this text supports; the largest"),
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
    if command != "plot":
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
        ("plot RUN --layer decoder.0.cros", "did you mean decoder.0.cross?"),
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


@pytest.mark.parametrize(
    ("options", "field", "expected"),
    [
        ("--training.ema-decay 0.9", "training.ema_decay", 0.9),
        ("--training.ema-decay None", "training.ema_decay", None),
        ("--text.filters.drop-duplicates", "text.filters.drop_duplicates", True),
        ("--decoding.no-exact", "decoding.exact", False),
        ("--data.test", "data.test", ()),
        ("--data.train a.en a.de", "data.train", ("a.en", "a.de")),
        ("--text.batch_tokens 7", "text.batch_tokens", 7),
        ("--training.steps=7000", "training.steps", 7000),
    ],
)
def test_options_set_the_fields_they_are_named_after(options, field, expected):
    config = parsing.load_experiment(MULTI30K)
    value = parsing.parse("train", type(config), options.split(), default=config)
    for name in field.split("."):
        value = getattr(value, name)
    assert value == expected


def test_the_known_options_are_those_that_help_lists(ask, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    config = parsing.load_experiment(MULTI30K)
    known = set(parsing._options(type(config), config))
    listed = re.findall(r"--[a-z][\w.-]+", "\n".join(ask("train", MULTI30K, "--help")))
    assert known | {"--help"} == set(listed)


def test_sigterm_saves_the_step_and_says_how_to_go_on(corpus, tmp_path):
    file = tmp_path / "tiny.py"
    file.write_text(
        TINY_FILE.replace('Path("text")', f"Path({str(corpus)!r})").replace(
            "steps=1", "steps=100000"
        )
    )
    directory = tmp_path / "run"
    command = [sys.executable, "-m", "qkv_jax", "train", str(file)]
    command += ["--run.directory", str(directory), "--training.log-every", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )
    metrics = directory / "metrics.jsonl"
    while process.poll() is None and not (
        metrics.exists() and metrics.read_text().count("\n") > 2
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 143, said
    (step,) = re.findall(r"interrupted: step (\d+) is saved in .*goes on", said)
    assert [path.name for path in (directory / "checkpoints").glob("[0-9]*")] == [step]


def test_debug_nans_names_the_operation_in_one_line(corpus, tmp_path):
    file = tmp_path / "tiny.py"
    file.write_text(
        TINY_FILE.replace('Path("text")', f"Path({str(corpus)!r})").replace(
            "steps=1", "steps=5"
        )
    )
    command = [sys.executable, "-m", "qkv_jax", "train", str(file), "--debug-nans"]
    command += ["--run.directory", str(tmp_path / "run"), "--optimizer.peak-lr", "1e36"]
    ended = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert re.search(r"error: invalid value \(nan\) .* in \w+$", ended.stderr.strip())
