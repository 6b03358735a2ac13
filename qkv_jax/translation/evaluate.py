"""Scores of translations, all by sacreBLEU, with its signatures."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from sacrebleu.metrics import BLEU, CHRF


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Corpus scores, 0 to 100, and what they were computed with.

    Attributes:
        bleu: of the text as it is, tokenised by sacreBLEU ("13a").
        bleu_lower_tokenized: of lower-cased text, split at spaces: what papers report on text
            that is tokenised already.
        chrf: chrF2.
        length_ratio: tokens of the translations over those of the references.
        signatures: sacreBLEU's, for each score.
    """

    bleu: float
    bleu_lower_tokenized: float
    chrf: float
    length_ratio: float
    signatures: dict[str, str]

    def to_json(self) -> dict:
        return asdict(self)


def score(translations: Sequence[str], references: Sequence[str]) -> Scores:
    """Corpus scores of translations against one reference each.

    Raises:
        ValueError: there is none, or the counts differ.
    """
    if not translations or len(translations) != len(references):
        raise ValueError(
            "translations and references must be equally many, and at least one; got "
            f"{len(translations)} and {len(references)}."
        )
    metrics = {
        "bleu": BLEU(),
        # force: the text is tokenised on purpose, which sacreBLEU would warn about.
        "bleu_lower_tokenized": BLEU(lowercase=True, tokenize="none", force=True),
        "chrf": CHRF(),
    }
    results = {
        name: metric.corpus_score(list(translations), [list(references)])
        for name, metric in metrics.items()
    }
    return Scores(
        **{name: result.score for name, result in results.items()},
        length_ratio=results["bleu"].sys_len / max(1, results["bleu"].ref_len),
        signatures={
            name: str(metric.get_signature()) for name, metric in metrics.items()
        },
    )
