"""Minimum Bayes risk: of several texts, the one that is most like the others."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from qkv_jax.decoding.character_ngrams import chrf

# (hypotheses H, references R) -> (H, R) numbers, the higher the better
Utility = Callable[[Sequence[str], Sequence[str]], np.ndarray]


class Risks(NamedTuple):
    """What candidates are worth.

    Attributes:
        order: (N,) int: places of the candidates, best first; of equal ones the earliest first.
        utilities: (N,) float64: expected utility of each candidate, in the given order.
    """

    order: np.ndarray
    utilities: np.ndarray


def minimum_bayes_risk(
    candidates: Sequence[str],
    *,
    references: Sequence[str] | None = None,
    utility: Utility = chrf,
) -> Risks:
    """Ranks texts by their mean utility against references that were sampled from the model.

    Args:
        candidates: N texts, such as the decoded samples of one sentence; repeats count.
        references: R texts, each as likely as it occurs; None: the candidates, themselves
            included (with samples that are all different, that adds the same to each).
        utility: of all pairs.

    Raises:
        ValueError: there are no candidates or references, or utility is not (N, R).

    Source: Eikema and Aziz 2020, arXiv 2005.10283, section 6; chrF as the utility: Freitag et al.
    2022, arXiv 2111.09388.
    """
    references = candidates if references is None else references
    if not candidates or not references:
        raise ValueError(
            f"candidates and references must not be empty; got {len(candidates)} and "
            f"{len(references)}."
        )
    pairs = np.asarray(utility(candidates, references), np.float64)
    if pairs.shape != (len(candidates), len(references)):
        raise ValueError(
            f"utility must return (N, R) = {(len(candidates), len(references))}; "
            f"got {pairs.shape}."
        )
    utilities = pairs.mean(axis=1)
    return Risks(np.argsort(-utilities, kind="stable"), utilities)
