"""Scores of translations, all by sacreBLEU, with its signatures."""

import bisect
import importlib.util
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sacrebleu.metrics import BLEU, CHRF, TER
from sacrebleu.metrics.base import Metric
from sacrebleu.significance import PairedTest

from qkv_jax.data import MultilingualData, Pair

# Fields of Scores that sacreBLEU computes, and what they are called in tables.
METRIC_NAMES = {
    "bleu": "BLEU",
    "bleu_lower_tokenized": "BLEU lc tok",
    "chrf": "chrF",
    "chrf_plus_plus": "chrF++",
    "ter": "TER",
}
# Of these less is better.
LESS_IS_BETTER = {"ter"}
# Words at which the next group of lengths begins: those of compare-mt (arXiv 1903.07926).
LENGTHS = (10, 20, 30, 40, 50, 60)
# sacreBLEU's tokenisers of languages without spaces, and the package each needs.
TOKENIZERS = {
    **dict.fromkeys(("zh", "zho"), ("zh", None)),
    **dict.fromkeys(("ja", "jpn"), ("ja-mecab", "MeCab")),
    **dict.fromkeys(("ko", "kor"), ("ko-mecab", "mecab_ko")),
}


@dataclass(frozen=True, kw_only=True)
class LengthScores:
    """Scores of the sentences of some lengths.

    Attributes:
        least, most: words of the shortest and the longest that belong here; most None: any.
        sentences: how many there are.
        bleu, chrf, length_ratio: as of `Scores`.
    """

    least: int
    most: int | None
    sentences: int
    bleu: float
    chrf: float
    length_ratio: float


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Corpus scores, 0 to 100 (TER may be more), and what they were computed with.

    Attributes:
        bleu: of the text as it is, tokenised by sacreBLEU ("13a" but for a language of its own).
        bleu_lower_tokenized: of lower-cased text, split at spaces: what papers report on text
            that is tokenised already.
        chrf: chrF2.
        chrf_plus_plus: chrF2++, which counts pairs of words too.
        ter: translation edit rate; less is better.
        exact_match: share of the translations that are a reference, but for spaces around them.
        length_ratio: tokens of the translations over those of the references.
        sentences: how many were scored.
        signatures: sacreBLEU's, for each score.
        length_of: "source" or "reference" (the first one), whose words by_length counts, split
            at spaces.
        by_length: scores of the sentences of each group of lengths that there are any of.
        intervals: of each score, where they were asked for, half the width of its 95 % interval
            by the bootstrap.
        comet: by COMET, where it was asked for.
    """

    bleu: float
    bleu_lower_tokenized: float
    chrf: float
    chrf_plus_plus: float
    ter: float
    exact_match: float
    length_ratio: float
    sentences: int
    signatures: dict[str, str]
    length_of: str
    by_length: tuple[LengthScores, ...]
    intervals: dict[str, float] | None = None
    comet: float | None = None

    def to_json(self) -> dict[str, Any]:
        content = {name: x for name, x in asdict(self).items() if x is not None}
        return content | {"by_length": list(content["by_length"])}


def make_metrics(tokenize: str | None = None) -> dict[str, Metric]:
    """sacreBLEU's metrics by the fields of `Scores`, as its command line makes them.

    Args:
        tokenize: of BLEU, such as "13a", "intl", "zh", "char"; None: "13a".

    Raises:
        ValueError: there is no such tokeniser, or what it needs is not installed.
    """
    if tokenize is not None and tokenize not in BLEU.TOKENIZERS:
        raise ValueError(
            f"tokenize must be one of {', '.join(BLEU.TOKENIZERS)}; got {tokenize!r}."
        )
    try:
        # force: the text may be tokenised on purpose, which sacreBLEU would warn about.
        bleu = BLEU(tokenize=tokenize, force=True)
    except (ImportError, OSError, RuntimeError) as error:
        raise ValueError(f"tokenize {tokenize!r} cannot be used: {error}") from error
    return {
        "bleu": bleu,
        "bleu_lower_tokenized": BLEU(lowercase=True, tokenize="none", force=True),
        "chrf": CHRF(),
        "chrf_plus_plus": CHRF(word_order=2),
        "ter": TER(),
    }


def bleu_tokenizer(language: str | None) -> str | None:
    """sacreBLEU's tokeniser for a target language; None: its default.

    For Japanese and Korean "char" where MeCab, which sacreBLEU's own choice needs, is missing.
    """
    code = (language or "").replace("_", "-").split("-")[0].lower()
    name, needs = TOKENIZERS.get(code, (None, None))
    missing = needs is not None and importlib.util.find_spec(needs) is None
    return "char" if missing else name


def check_lengths(lengths: Sequence[int]) -> None:
    """Makes sure that lengths are such as `score` takes.

    Raises:
        ValueError: they do not increase, or are not positive.
    """
    if list(lengths) != sorted(set(lengths)) or (lengths and lengths[0] < 1):
        raise ValueError(
            f"lengths must be positive and increasing; got {' '.join(map(str, lengths))}."
        )


def score(
    translations: Sequence[str],
    *references: Sequence[str],
    sources: Sequence[str] | None = None,
    tokenize: str | None = None,
    lengths: Sequence[int] = LENGTHS,
    resamples: int = 0,
) -> Scores:
    """Corpus scores of translations.

    Args:
        translations: one a sentence.
        *references: one or more for each sentence.
        sources: of which by_length counts the words; None: it counts those of the reference.
        tokenize: see `make_metrics`.
        lengths: words at which the next group of by_length begins, increasing.
        resamples: of the bootstrap that gives intervals; 0: none.

    Raises:
        ValueError: there is none, or the counts differ; lengths do not increase; as
            `make_metrics`.
    """
    sides = [*references, *([] if sources is None else [sources])]
    if not translations or any(len(side) != len(translations) for side in sides):
        raise ValueError(
            "translations and references must be equally many, and at least one; got "
            f"{len(translations)} and {', '.join(str(len(side)) for side in sides)}."
        )
    check_lengths(lengths)
    metrics = make_metrics(tokenize)
    streams = [list(side) for side in references]
    results = {
        name: metric.corpus_score(list(translations), streams)
        for name, metric in metrics.items()
    }
    signatures = {name: str(x.get_signature()) for name, x in metrics.items()}
    intervals = None
    if resamples:
        intervals, signatures = _intervals(metrics, translations, streams, resamples)
    measured = references[0] if sources is None else sources
    return Scores(
        **{name: result.score for name, result in results.items()},
        exact_match=_exact_match(translations, references),
        length_ratio=_length_ratio(results["bleu"]),
        sentences=len(translations),
        signatures=signatures,
        length_of="reference" if sources is None else "source",
        by_length=tuple(
            _of_lengths(metrics, translations, references, measured, lengths)
        ),
        intervals=intervals,
    )


def score_by_target(
    corpus: Any, pairs: Sequence[Pair], translations: Sequence[str]
) -> dict[str, Scores]:
    """Scores of each target language, by its code, where a corpus has several; else none.

    Args:
        corpus: a `MultilingualData`, or of a single pair of languages.
        pairs: of it, tags before the sources.
        translations: one of each.
    """
    if not isinstance(corpus, MultilingualData) or len(corpus.targets) < 2:
        return {}
    groups: dict[str, list[int]] = {}
    for index, (source, _) in enumerate(pairs):
        groups.setdefault(corpus.target_of(source), []).append(index)
    return {
        target: score(
            [translations[i] for i in group],
            [pairs[i][1] for i in group],
            sources=[pairs[i][0] for i in group],
            tokenize=bleu_tokenizer(target),
        )
        for target, group in groups.items()
    }


def corpus_bleu(
    translations: Sequence[str],
    references: Sequence[str],
    tokenize: str | None = None,
) -> float:
    """BLEU alone, as `Scores.bleu` is."""
    metric = BLEU(tokenize=tokenize, force=True)
    return metric.corpus_score(list(translations), [list(references)]).score


def comet_score(
    model: str,
    sources: Sequence[str],
    translations: Sequence[str],
    references: Sequence[str],
) -> float:
    """The score that COMET's package gives; it must be installed.

    Args:
        model: a name that it knows, such as "Unbabel/wmt22-comet-da", or a checkpoint's file.

    Raises:
        ImportError: it is not installed.
    """
    import comet

    path = model if model.endswith(".ckpt") else comet.download_model(model)
    rows = [
        {"src": source, "mt": translation, "ref": reference}
        for source, translation, reference in zip(sources, translations, references)
    ]
    # On the CPU: JAX has taken an accelerator's memory.
    found = comet.load_from_checkpoint(path).predict(rows, batch_size=8, gpus=0)
    return float(found.system_score)


def _intervals(
    metrics: dict[str, Metric],
    translations: Sequence[str],
    streams: list[list[str]],
    resamples: int,
) -> tuple[dict[str, float], dict[str, str]]:
    """Half widths of 95 % intervals, and signatures that name the bootstrap."""
    intervals, signatures = {}, {}
    for name, metric in metrics.items():
        # corpus_score(n_bootstrap=...) is the same sum, and fails where some samples score 0.
        alone: list[tuple[str, Sequence[str]]] = [("", list(translations))]
        test = PairedTest(alone, {name: metric}, streams, "bs", resamples)
        found, results = test()
        ((title, signature),) = found.items()
        result: Any = results[title][0]
        intervals[name], signatures[name] = float(result.ci), signature.format()
    return intervals, signatures


def _exact_match(
    translations: Sequence[str], references: Sequence[Sequence[str]]
) -> float:
    matches = sum(
        translation.strip() in {one.strip() for one in row}
        for translation, *row in zip(translations, *references)
    )
    return 100.0 * matches / len(translations)


def _length_ratio(bleu: Any) -> float:
    return bleu.sys_len / max(1, bleu.ref_len)


def _of_lengths(
    metrics: dict[str, Metric],
    translations: Sequence[str],
    references: Sequence[Sequence[str]],
    measured: Sequence[str],
    lengths: Sequence[int],
):
    """The scores of each group of lengths that has a sentence, shortest first."""
    groups: list[list[int]] = [[] for _ in range(len(lengths) + 1)]
    for index, text in enumerate(measured):
        groups[bisect.bisect_right(lengths, len(text.split()))].append(index)
    ends: list[int | None] = [n - 1 for n in lengths] + [None]
    for least, most, group in zip([0, *lengths], ends, groups):
        if not group:
            continue
        hypotheses = [translations[i] for i in group]
        streams = [[side[i] for i in group] for side in references]
        bleu = metrics["bleu"].corpus_score(hypotheses, streams)
        yield LengthScores(
            least=least,
            most=most,
            sentences=len(group),
            bleu=bleu.score,
            chrf=metrics["chrf"].corpus_score(hypotheses, streams).score,
            length_ratio=_length_ratio(bleu),
        )
