"""Several models as one: a step whose log-probabilities are an average of theirs."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from qkv_jax.decoding.steps import LogProbs, Step, normalise

Average = Literal["log_probs", "probs"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EnsembleCache:
    """The caches of an ensemble's members, in their order."""

    members: tuple[Any, ...]

    def reorder(self, parents: jax.Array) -> "EnsembleCache":
        """New hypothesis z of row b continues old hypothesis parents[b, z] in every member."""
        return EnsembleCache(tuple(cache.reorder(parents) for cache in self.members))


def ensemble(steps: Sequence[Step], *, average: Average = "log_probs") -> Step:
    """One step of several models that share a target vocabulary.

    Its cache is `EnsembleCache((cache_1, cache_2, ...))`; every search takes both.

    Args:
        steps: of the members, at least one.
        average: as for average_log_probs.

    Returns:
        (tokens (B, Z), EnsembleCache) -> (LogProbs, EnsembleCache).

    Raises:
        ValueError: no steps, an unknown average, or as many caches as steps were not given.
    """
    steps = tuple(steps)
    if not steps:
        raise ValueError("steps must hold at least one model's step; got none.")

    def step(tokens: jax.Array, cache: EnsembleCache) -> tuple[LogProbs, EnsembleCache]:
        if len(cache.members) != len(steps):
            raise ValueError(
                f"the cache must have a member for each of {len(steps)} steps; "
                f"got {len(cache.members)}."
            )
        pairs = [one(tokens, part) for one, part in zip(steps, cache.members)]
        numbers, caches = zip(*pairs)
        return average_log_probs(numbers, average=average), EnsembleCache(caches)

    return step


def average_log_probs(
    numbers: Sequence[jax.Array | LogProbs], *, average: Average = "log_probs"
) -> LogProbs:
    """Several models' logits (..., V) as one; also for `score_targets`.

    Args:
        numbers: what the models gave, all of one shape.
        average: "log_probs" is the mean of log-probabilities (Marian's; all models have to agree;
            they sum to less than one, and are not normalised anew), "probs" the logarithm of the
            mean probability (fairseq's; one model may vouch for a token).

    Raises:
        ValueError: shapes differ, or average is another word.
    """
    pairs = [normalise(x) for x in numbers]
    shapes = [logits.shape for logits, _ in pairs]
    if len(set(shapes)) != 1:
        raise ValueError(
            f"an ensemble's models must give logits of one shape; got {shapes}. "
            "Do they share the target vocabulary?"
        )
    log_probs = [logits - normaliser[..., None] for logits, normaliser in pairs]
    if average == "log_probs":
        return LogProbs(sum(log_probs[1:], log_probs[0]) / len(log_probs))
    if average == "probs":
        total = jax.nn.logsumexp(jnp.stack(log_probs), axis=0)
        return LogProbs(total - jnp.log(len(log_probs)))
    raise ValueError(f'average must be "log_probs" or "probs"; got {average!r}.')
