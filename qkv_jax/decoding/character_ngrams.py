"""chrF between all pairs of two lists of texts: each text's n-grams are counted once."""

from collections.abc import Sequence

import numpy as np


def chrf(
    hypotheses: Sequence[str],
    references: Sequence[str],
    *,
    order: int = 6,
    beta: float = 2.0,
) -> np.ndarray:
    """(H, R) float64 in 0 .. 100: chrF of every hypothesis against every reference.

    The numbers are those of sacrebleu's `CHRF().sentence_score(hypothesis, [reference])`: case
    kept, white space dropped, orders that either text is too short for left out.

    Args:
        hypotheses: H texts.
        references: R texts.
        order: longest n-gram of characters.
        beta: how many times recall counts as much as precision.

    Source: Popovic 2015, aclanthology W15-3049; sacrebleu 2.5, metrics/chrf.py.
    """
    texts = ["".join(text.split()) for text in (*hypotheses, *references)]
    places = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    indices = np.array([places[text] for text in texts], np.int64)
    rows, columns = indices[: len(hypotheses)], indices[len(hypotheses) :]
    precision, recall = np.zeros((2, len(rows), len(columns)))
    orders = np.zeros(precision.shape)
    for counts in _counts(list(places), order):
        first, second = counts[rows], counts[columns]
        totals, wanted = first.sum(axis=1)[:, None], second.sum(axis=1)[None]
        both = (totals > 0) & (wanted > 0)
        matches = _overlap(first, second)
        precision += np.where(both, matches / np.maximum(totals, 1), 0.0)
        recall += np.where(both, matches / np.maximum(wanted, 1), 0.0)
        orders += both
    precision, recall = (x / np.maximum(orders, 1) for x in (precision, recall))
    factor = beta**2
    total = factor * precision + recall
    score = 100 * (1 + factor) * precision * recall
    return score / np.where(total > 0, total, 1.0)


def _counts(texts: Sequence[str], order: int) -> list[np.ndarray]:
    """For n = 1 .. order, (texts, distinct n-grams) float32: how often each occurs in each."""
    owner = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    characters = np.array([ord(c) for text in texts for c in text], np.int64)
    _, characters = np.unique(characters, return_inverse=True)
    base, grams, counts = int(characters.max(initial=0)) + 1, characters, []
    for n in range(1, order + 1):
        if n > 1:
            # An n-gram is one of n - 1 and a character more, of the same text.
            inside = owner[n - 1 :] == owner[: max(0, len(owner) - n + 1)]
            grams = np.where(inside, grams[:-1] * base + characters[n - 1 :], -1)
        found, grams = np.unique(grams, return_inverse=True)
        table = np.zeros((len(texts), len(found)), np.float32)
        np.add.at(table, (owner[: len(grams)], grams), 1.0)
        counts.append(table[:, found >= 0])
    return counts


def _overlap(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(H, R): sums of min(first[h], second[r]), as one product a count that occurs."""
    total = np.zeros((len(first), len(second)))
    level = 1
    while first.shape[1]:
        total += (first >= level).astype(np.float32) @ (second >= level).astype(
            np.float32
        ).T
        level += 1
        left = (first.max(axis=0) >= level) & (second.max(axis=0) >= level)
        first, second = first[:, left], second[:, left]
    return total
