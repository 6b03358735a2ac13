"""The model card that a run leaves."""

import hashlib
import json
import re
from pathlib import Path

import pytest

from qkv_jax.translation import load_run
from qkv_jax.translation.run import read_result
from tests.translation import toy


@pytest.fixture(scope="module")
def card(finished) -> str:
    return (finished / "model_card.md").read_text("utf-8")


def rows(card: str, title: str) -> list[list[str]]:
    """The cells of a section's tables."""
    (text,) = re.findall(rf"\n## {title}\n(.*?)(?=\n## |\Z)", card, re.DOTALL)
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[x.strip() for x in re.split(r"(?<!\\)\|", x)[1:-1]] for x in lines]


def test_it_begins_with_what_the_hub_reads(card):
    assert card.startswith(
        '---\nlibrary_name: "qkv-jax"\npipeline_tag: "translation"\n'
    )
    assert 'language: ["en", "de"]\n---\n\n# finished\n' in card
    assert re.search(r"Code: qkv-jax \S+, (commit [0-9a-f]{40}|not in a git)", card)


def test_the_data_are_known_by_their_files_hashes(card, corpus):
    found = rows(card, "Data")
    for part, row in zip(("train", "valid", "test"), found[2:], strict=True):
        files = [corpus / f"{part}.{language}" for language in ("en", "de")]
        digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
        assert row[1:] == [str(toy.PARTS[part]), *(f"`{x}`" for x in digests)]
    assert "Test sources that are training sources too: " in card


def test_metrics_stand_with_their_signatures(card, finished):
    test = read_result(finished)["test"]
    found = {row[0]: row[1:] for row in rows(card, "Metrics")}
    for name, title in (("bleu", "BLEU"), ("chrf_plus_plus", "chrF++"), ("ter", "TER")):
        signature = test["signatures"][name].replace("|", r"\|")
        assert found[title] == [f"{test[name]:.2f}", f"`{signature}`"]
    assert found["0 to 9"][0] == "12"


def test_samples_are_translations_of_the_test_part(card, finished, corpus):
    samples = rows(card, "Samples")[2:]
    sources = (corpus / "test.en").read_text("utf-8").splitlines()
    references = (corpus / "test.de").read_text("utf-8").splitlines()
    assert [row[:2] for row in samples] == [
        [sources[i], references[i]] for i in range(0, 10, 2)
    ]
    (best,) = load_run(finished)([samples[1][0]])
    assert samples[1][2].split() == best[0].text.split()


def test_training_hardware_and_configuration_are_told(card, finished):
    training = dict(rows(card, "Training")[2:])
    assert training["updates"] == "4"
    parameters = read_result(finished)["parameters"]
    assert training["parameters"] == f"{parameters:,}"
    assert "validation/loss, best" in training
    assert dict(rows(card, "Hardware")[2:])["devices"] == "8 x cpu (cpu)"
    assert "W, assumed for any processor in full use" in card
    content = json.loads(re.findall(r"```json\n(.*?)```", card, re.DOTALL)[0])
    assert content == json.loads((Path(finished) / "config.json").read_text("utf-8"))


def test_limits_are_those_of_the_run(card):
    assert "It learned from 150 pairs" in card
    assert re.search(r"Sources of more than 24 are cut \(\d of the test part\)", card)
