"""Which of several systems' differences are real: paired tests by sacreBLEU, and sentences."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import Any, Literal, NamedTuple

from rich.table import Table
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.metrics.base import Metric
from sacrebleu.significance import PairedTest

from qkv_jax.translation.evaluate import LESS_IS_BETTER, METRIC_NAMES, make_metrics

Verdict = Literal["better", "worse", "not shown"]


@dataclass(frozen=True, kw_only=True)
class Significance:
    """How differences are tested.

    Attributes:
        metrics: which fields of `Scores` are compared.
        tokenize: see `make_metrics`.
        level: a p-value below it makes a difference real.
        resamples: of the paired bootstrap (Koehn, 2004).
        trials: of the approximate randomization (Riezler and Maxwell, 2005).
    """

    metrics: tuple[str, ...] = ("bleu", "chrf", "ter")
    tokenize: str | None = None
    level: float = 0.05
    resamples: int = 1000
    trials: int = 10_000

    def __post_init__(self):
        for name in self.metrics:
            if name not in METRIC_NAMES:
                raise ValueError(
                    f"metrics must be of {', '.join(METRIC_NAMES)}; got {name!r}."
                )
        if not 0.0 < self.level < 1.0:
            raise ValueError(f"level must be in (0, 1); got {self.level}.")
        for name in ("resamples", "trials"):
            if getattr(self, name) < 100:
                raise ValueError(
                    f"{name} must be at least 100; got {getattr(self, name)}."
                )


AS_SACREBLEU = Significance()


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What tells a system from the baseline, by one metric.

    Attributes:
        system, metric: names.
        score, baseline: the corpus scores.
        interval, baseline_interval: half the width of the scores' 95 % intervals, by the bootstrap.
        bootstrap_p, randomization_p: p-values of the paired tests, as sacreBLEU gives them.
        p: what decides: the larger of these and of 2 ** (1 - n), with Holm's correction for the
            number of systems. n is how many sentences the two translate differently: a test that
            swaps them can give no less, though its count of trials may say so.
        verdict: "better" or "worse" where p is below the level, else "not shown".
    """

    system: str
    metric: str
    score: float
    baseline: float
    interval: float
    baseline_interval: float
    bootstrap_p: float
    randomization_p: float
    p: float
    verdict: Verdict


class Example(NamedTuple):
    """A sentence that two systems translate unequally well.

    Attributes:
        system: which is compared with the baseline.
        line: of the sentence, from 1.
        source: None: not known.
        references: one or more.
        baseline, translation: the two outputs.
        baseline_score, score: theirs, by sentence.
    """

    system: str
    line: int
    source: str | None
    references: list[str]
    baseline: str
    translation: str
    baseline_score: float
    score: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Systems against a baseline, on the same sentences.

    Attributes:
        baseline: its name.
        systems: the others' names.
        sentences: how many were translated.
        level: see `Significance`.
        differences: metric by metric, of each system.
        signatures: sacreBLEU's of both tests, "bootstrap" and "randomization", for each metric.
        by: the metric that sentences are compared by.
        examples: of each system, sentences where it gains most, then where it loses most.
    """

    baseline: str
    systems: tuple[str, ...]
    sentences: int
    level: float
    differences: tuple[Difference, ...]
    signatures: dict[str, dict[str, str]]
    by: str
    examples: tuple[Example, ...]

    def to_json(self) -> dict[str, Any]:
        content = asdict(self)
        content["examples"] = [example._asdict() for example in self.examples]
        return content


def compare(
    systems: Mapping[str, Sequence[str]],
    *references: Sequence[str],
    sources: Sequence[str] | None = None,
    significance: Significance = AS_SACREBLEU,
    examples: int = 3,
    by: Literal["chrf", "bleu"] = "chrf",
) -> Comparison:
    """Tests each system against the first by the paired bootstrap and approximate randomization.

    The p-values and signatures are those of `sacrebleu -i A B --paired-bs` and `--paired-ar`; the
    environment's SACREBLEU_SEED seeds them.

    Args:
        systems: translations by name; the first is the baseline.
        *references: one or more for each sentence.
        sources: shown beside examples; None: not known.
        significance: how differences are tested.
        examples: sentences to show from either end, for each system.
        by: what sentences are compared by.

    Raises:
        ValueError: fewer than two systems; counts differ; as `make_metrics`.
    """
    _check(systems, references, sources)
    named = [(name, list(texts)) for name, texts in systems.items()]
    streams = [list(side) for side in references]
    known, found, signatures = make_metrics(significance.tokenize), [], {}
    for name in significance.metrics:
        differences, signatures[name] = _test(
            name, known[name], named, streams, significance
        )
        found += differences
    (baseline, first), *others = named
    return Comparison(
        baseline=baseline,
        systems=tuple(name for name, _ in others),
        sentences=len(first),
        level=significance.level,
        differences=tuple(found),
        signatures=signatures,
        by=by,
        examples=tuple(
            example
            for name, texts in others
            for example in _examples(name, first, texts, streams, sources, by, examples)
        ),
    )


def show_comparison(found: Comparison) -> list[Table]:
    """What differs, and sentences that show it."""
    shown = short_names([found.baseline, *found.systems])
    several = ", with Holm's correction" if len(found.systems) > 1 else ""
    table = Table(
        title=f"against {found.baseline}, on {found.sentences:,} sentences",
        caption=(
            f"real: p < {found.level:g} in the paired bootstrap (bs) and in approximate "
            f"randomization (ar){several}; ±: 95 % interval"
        ),
    )
    table.add_column("metric", no_wrap=True)
    table.add_column("system", overflow="fold")
    for name in ("score", "difference", "p bs", "p ar"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("real?", no_wrap=True)
    for one in found.differences:
        if one.system == found.systems[0]:
            table.add_section()
            row = [METRIC_NAMES[one.metric], shown[found.baseline]]
            table.add_row(*row, f"{one.baseline:.2f} ± {one.baseline_interval:.2f}")
        table.add_row(
            "",
            shown[one.system],
            f"{one.score:.2f} ± {one.interval:.2f}",
            f"{one.score - one.baseline:+.2f}",
            f"{one.bootstrap_p:.4f}",
            f"{one.randomization_p:.4f}",
            one.verdict,
        )
    rows = [(name, [x for x in found.examples if x.system == name]) for name in shown]
    return [
        table,
        *(_show_examples(found.by, name, some) for name, some in rows if some),
    ]


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Paths by their last part, where that tells them apart."""
    last = {name: PurePath(name).name or name for name in names}
    return last if len(set(last.values())) == len(last) else {x: x for x in names}


def _show_examples(by: str, system: str, examples: Sequence[Example]) -> Table:
    title = f"{system}: most gained, then most lost, by {METRIC_NAMES[by]}"
    table = Table(title=title, show_header=False, expand=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", ratio=1)
    for one in examples:
        table.add_row(f"sentence {one.line}", one.source or "")
        for reference in one.references:
            table.add_row("reference", reference)
        table.add_row(f"baseline {one.baseline_score:.0f}", one.baseline)
        table.add_row(f"system {one.score:.0f}", one.translation)
        table.add_section()
    return table


def _check(
    systems: Mapping[str, Sequence[str]],
    references: Sequence[Sequence[str]],
    sources: Sequence[str] | None,
) -> None:
    if len(systems) < 2:
        raise ValueError(f"systems must be two or more; got {len(systems)}.")
    if not references or not references[0]:
        raise ValueError("references must be one or more, of at least one sentence.")
    count = len(references[0])
    given = {f"references {i + 1}": side for i, side in enumerate(references)}
    given |= {**systems, **({} if sources is None else {"sources": sources})}
    for name, side in given.items():
        if len(side) != count:
            raise ValueError(
                f"{name} must have a line for each of {count} sentences; it has {len(side)}."
            )


def _test(
    name: str,
    metric: Metric,
    named: Sequence[tuple[str, Sequence[str]]],
    streams: list[list[str]],
    significance: Significance,
) -> tuple[list[Difference], dict[str, str]]:
    """Both tests by one metric, and their signatures."""

    def paired(kind: str, count: int) -> tuple[Any, str]:
        # One metric at a time: two kinds of BLEU would have one name. The seed is the same.
        test = PairedTest(list(named), {name: metric}, streams, kind, count)
        signatures, scores = test()
        ((title, signature),) = signatures.items()
        return scores[title], signature.format()

    (baseline, *bootstrap), resampled = paired("bs", significance.resamples)
    (_, *randomization), shuffled = paired("ar", significance.trials)
    first, others = named[0][1], named[1:]
    floors = [2.0 ** (1 - sum(map(str.__ne__, first, texts))) for _, texts in others]
    tests = list(zip(bootstrap, randomization))
    decisive = _holm(
        [
            max(one.p_value, other.p_value, floor)
            for (one, other), floor in zip(tests, floors)
        ]
    )
    found = [
        Difference(
            system=system,
            metric=name,
            score=one.score,
            baseline=baseline.score,
            interval=float(one.ci),
            baseline_interval=float(baseline.ci),
            bootstrap_p=one.p_value,
            randomization_p=other.p_value,
            p=p,
            verdict=_verdict(name, one.score - baseline.score, p < significance.level),
        )
        for (system, _), (one, other), p in zip(others, tests, decisive)
    ]
    return found, {"bootstrap": resampled, "randomization": shuffled}


def _verdict(metric: str, difference: float, real: bool) -> Verdict:
    if not real or difference == 0.0:
        return "not shown"
    return "better" if (difference > 0) != (metric in LESS_IS_BETTER) else "worse"


def _holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm, 1979)."""
    corrected, largest = [0.0] * len(p_values), 0.0
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def _examples(
    system: str,
    baseline: Sequence[str],
    texts: Sequence[str],
    streams: Sequence[Sequence[str]],
    sources: Sequence[str] | None,
    by: str,
    count: int,
) -> list[Example]:
    """The sentences where a system gains most, then those where it loses most."""
    metric = CHRF() if by == "chrf" else BLEU(effective_order=True)
    found = []
    for index, (old, new, *references) in enumerate(zip(baseline, texts, *streams)):
        if old == new:
            continue
        scores = [metric.sentence_score(x, references).score for x in (old, new)]
        source = None if sources is None else sources[index]
        found.append(Example(system, index + 1, source, references, old, new, *scores))
    found.sort(key=lambda one: one.baseline_score - one.score)
    gained = [one for one in found[:count] if one.score > one.baseline_score]
    lost = [one for one in found[::-1][:count] if one.score < one.baseline_score]
    return gained + lost
