"""The command line: what each command does."""

import io
import itertools
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qkv_jax.cli import entry, main, parsing
from qkv_jax.translation import demo
from tests import compiling
from tests.cli.toy import MULTI30K, ROOT, TINY_FILE
from tests.translation import toy


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


def test_find_lr_suggests_a_rate_for_any_task_and_writes_a_picture_alone(
    tmp_path, monkeypatch, ask, fail
):
    (tmp_path / "largest.py").write_text(
        "from tests.tasks import toy\nCONFIG = toy.make_config(None)\n"
    )
    monkeypatch.chdir(tmp_path)
    options = ["--find.low=1e-3", "--find.high", "100", "--find.steps", "20"]
    lines = ask("find-lr", "largest.py", *options, "--batch-rows", "8")
    assert re.search(r"--optimizer.peak-lr [\d.e-]+$", lines[-1])
    assert re.search(r"lowest at .* drawn: runs/find-lr/largest.png$", lines[-2])
    made = [str(path) for path in Path().rglob("*.*")]
    assert sorted(made) == ["largest.py", "runs/find-lr/largest.png"]
    message = fail("find-lr", "largest.py", "--find.low", "7")
    assert message == "--find.low must be positive and less than high; got 7.0 and 1.0."
    assert "did you mean --find.high?" in fail("find-lr", "largest.py", "--find.hihg=1")


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


EXPERIMENTS = sorted(
    file
    for file in (ROOT / "experiments").rglob("*.py")
    if "\nCONFIG = " in file.read_text()
)
HELP = [
    [],
    *([command] for command in entry.COMMANDS),
    *(["train", str(file)] for file in EXPERIMENTS),
]


@pytest.mark.parametrize("command", HELP, ids=lambda parts: Path(*parts[-1:]).stem)
def test_help_says_of_each_option_what_it_does(command, ask, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")  # an option's form on one line
    printed = "\n".join(line.strip("│").rstrip() for line in ask(*command, "--help"))
    assert "usage" in printed.lower()
    options = re.findall(r"^ --.*(?:\n  .*)*", printed, re.MULTILINE)
    # After the option's form: on a line of its own, or after two spaces.
    words = [re.split(r"\n *| {2,}", option, maxsplit=1)[1:] for option in options]
    bare = [not text or text[0].startswith("(default") for text in words]
    assert list(itertools.compress(options, bare)) == []


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
    environment = compiling.environment(8)
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
        env=compiling.environment(8),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert re.search(r"error: invalid value \(nan\) .* in \w+$", ended.stderr.strip())
