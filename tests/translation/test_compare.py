import random
import re

import pytest

from qkv_jax.translation import compare
from qkv_jax.translation.compare import Significance, _holm, show_comparison
from tests.translation.sacrebleu_program import run_sacrebleu, write

FEW = Significance(resamples=100, trials=100)
RNG = random.Random(3)
REFERENCES = [" ".join(RNG.choices("abcdefgh", k=9)) for _ in range(40)]


def worse(share: float, lines: list[str] = REFERENCES) -> list[str]:
    """The lines without a share of their words."""
    return [" ".join(w for w in x.split() if RNG.random() > share) for x in lines]


SYSTEMS = {"old": worse(0.3), "like": worse(0.3), "good": worse(0.1)}


@pytest.fixture(scope="module")
def found():
    return compare(SYSTEMS, REFERENCES, sources=REFERENCES, significance=FEW)


@pytest.mark.parametrize("test", ["bootstrap", "randomization"])
def test_p_values_are_those_of_sacrebleus_command_line(tmp_path, found, test):
    files = [write(tmp_path / name, lines) for name, lines in SYSTEMS.items()]
    short = {"bootstrap": "bs", "randomization": "ar"}[test]
    given = [write(tmp_path / "references", REFERENCES), "-i", *files, "-f", "latex"]
    paired = [f"--paired-{short}", f"--paired-{short}-n", "100", "-m"]
    printed = run_sacrebleu(*given, *paired, "bleu", "chrf", "ter")
    cells = re.findall(r"(\d+\.\d+) (?:\(.* ± (\d+\.\d+)\) )?\(p = (.*?)\)", printed.replace("&", "\n"))  # fmt: skip
    ours = sorted(found.differences, key=lambda x: found.systems.index(x.system))
    for one, (score, interval, p) in zip(ours, cells, strict=True):
        assert f"{getattr(one, f'{test}_p'):.4f}" == p
        assert one.score == pytest.approx(float(score), abs=1e-11)
        if test == "bootstrap":
            assert one.interval == pytest.approx(float(interval))
    for signatures in found.signatures.values():
        assert f" {signatures[test]}\n" in printed


def test_only_a_real_difference_is_called_one(found):
    verdicts = {(x.metric, x.system): x.verdict for x in found.differences}
    for metric in ("bleu", "chrf", "ter"):
        assert verdicts[metric, "good"] == "better"
        assert verdicts[metric, "like"] == "not shown"
    back = compare(dict(reversed(SYSTEMS.items())), REFERENCES, significance=FEW)
    assert {x.verdict for x in back.differences} == {"worse"}


def test_few_differing_sentences_are_never_called_real():
    """sacreBLEU gives 1 / (trials + 1) where all sentences but one are the same, or all are."""
    one = [*REFERENCES[:-1], "z"]
    found = compare({"a": REFERENCES, "b": one}, REFERENCES, significance=FEW)
    assert {x.randomization_p for x in found.differences} == {1 / 101}
    assert {(x.p, x.verdict) for x in found.differences} == {(1.0, "not shown")}
    same = compare({"a": one, "b": list(one)}, REFERENCES, significance=FEW)
    assert {(x.p, x.verdict) for x in same.differences} == {(1.0, "not shown")}
    assert same.examples == ()


def test_p_values_of_several_systems_are_corrected():
    assert _holm([0.03, 0.01, 0.04]) == pytest.approx([0.06, 0.03, 0.06])
    assert _holm([0.9, 0.8]) == [1.0, 1.0]


def test_examples_are_where_a_system_gains_and_loses_most():
    old = ["a b c d", "a b x x", "a b c d", "a b c d"]
    new = ["a b c d", "a b c d", "x x x d", "a b c x"]
    found = compare(
        {"old": old, "new": new},
        ["a b c d"] * 4,
        significance=FEW,
        examples=1,
        by="bleu",
    )
    gained, lost = found.examples
    assert (gained.line, gained.translation) == (2, "a b c d")
    assert (lost.line, lost.baseline, lost.source) == (3, "a b c d", None)
    assert lost.score < lost.baseline_score


def test_the_table_says_the_level_and_both_outputs(found, capsys):
    from rich.console import Console

    for table in show_comparison(found):
        Console(width=100).print(table, markup=False)
    printed = capsys.readouterr().out
    for part in ("against old, on 40 sentences", "real: p < 0.05", "better", "good"):
        assert part in printed
    assert found.examples[0].translation in printed


@pytest.mark.parametrize(
    ("systems", "message"),
    [
        ({"a": REFERENCES}, "systems must be two or more; got 1"),
        ({"a": REFERENCES, "b": ["x"]}, "b must have a line for each of 40 sentences"),
    ],
)
def test_what_cannot_be_compared_is_refused(systems, message):
    with pytest.raises(ValueError, match=message):
        compare(systems, REFERENCES)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"metrics": ("blue",)}, "metrics must be of bleu, .*; got 'blue'"),
        ({"level": 5.0}, r"level must be in \(0, 1\); got 5.0"),
        ({"trials": 1}, "trials must be at least 100; got 1"),
    ],
)
def test_tests_that_say_nothing_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        Significance(**option)
