"""Word and character error rates of what was recognised."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class ErrorRates:
    """Percentages over a part: {"wer": 14.2, "cer": 5.1, "exact": 71.0}.

    "wer" and "cer" are edits over all words and characters of the references; "exact" is the share
    of utterances without any edit: the accuracy, where an utterance is one word.
    """

    def __call__(
        self,
        outputs: Mapping[str, np.ndarray],
        arrays: Mapping[str, np.ndarray],
        names: Sequence[str],
    ) -> dict[str, float]:
        """Rates of outputs["tokens"] (rows, U), pieces of `names`, against arrays["text"].

        Raises:
            ValueError: there is no word to recognise.
        """
        return error_rates(*_lines(outputs, arrays, names))

    def draw(
        self,
        outputs: Mapping[str, np.ndarray],
        arrays: Mapping[str, np.ndarray],
        names: Sequence[str],
        directory: Path,
    ) -> None:
        """Writes recognised.tsv: what was said, and what was heard, an utterance a line."""
        pairs = zip(*_lines(outputs, arrays, names))
        lines = [f"{said}\t{heard}\n" for said, heard in pairs]
        (directory / "recognised.tsv").write_text("".join(lines), encoding="utf-8")


def _lines(
    outputs: Mapping[str, np.ndarray],
    arrays: Mapping[str, np.ndarray],
    names: Sequence[str],
) -> tuple[list[str], list[str]]:
    """What was said, and what was heard."""
    said = [bytes(row).rstrip(b"\0").decode() for row in arrays["text"]]
    return said, [spell(row, names) for row in outputs["tokens"]]


def error_rates(
    references: Sequence[str], hypotheses: Sequence[str]
) -> dict[str, float]:
    """Word and character error rates, and the share of exact hypotheses, in percent.

    Words are parted by spaces; characters are those of the words joined by single spaces.
    """
    if len(references) != len(hypotheses):
        raise ValueError(
            f"references and hypotheses must be as many; got {len(references)} and "
            f"{len(hypotheses)}."
        )
    pairs = [(r.split(), h.split()) for r, h in zip(references, hypotheses)]
    words = sum(len(said) for said, _ in pairs)
    if not words:
        raise ValueError("references hold no word: there is no rate of errors.")
    lines = [(" ".join(said), " ".join(heard)) for said, heard in pairs]
    characters = sum(len(said) for said, _ in lines)
    return {
        "wer": 100 * sum(edit_distance(*pair) for pair in pairs) / words,
        "cer": 100 * sum(edit_distance(*pair) for pair in lines) / characters,
        "exact": 100 * sum(said == heard for said, heard in pairs) / len(pairs),
    }


def edit_distance(first: Sequence, second: Sequence) -> int:
    """Fewest insertions, deletions and substitutions that make one the other (Levenshtein)."""
    previous = list(range(len(second) + 1))
    for i, one in enumerate(first, 1):
        current = [i]
        for j, other in enumerate(second, 1):
            change = previous[j - 1] + (one != other)
            current.append(min(change, previous[j] + 1, current[j - 1] + 1))
        previous = current
    return previous[-1]


def spell(tokens: Sequence[int], names: Sequence[str]) -> str:
    """The text of token ids, up to EOS; ids 0 to 3 are special, and "▁" begins a word."""
    text = ""
    for token in tokens:
        if token == 2:
            break
        text += names[token] if token > 3 else ""
    return " ".join(text.replace("▁", " ").split())
