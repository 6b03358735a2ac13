"""What a model gives to targets that are known, in the searches' own numbers."""

import dataclasses

import jax
import jax.numpy as jnp

from qkv_jax.decoding.length_penalty import PER_TOKEN
from qkv_jax.decoding.steps import LogProbs, Penalty, normalise


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TargetScores:
    """Scores of B targets; `log_probs`, `scores` and `lengths` are those of Hypotheses.

    Attributes:
        token_log_probs: (B, T) float32; 0 at PAD and for tokens of the prefix.
        log_probs: (B,) float32: their sum.
        scores: (B,) float32: log_probs / length_penalty(lengths); 0 for an empty target.
        lengths: (B,) int32: tokens, EOS included if there.
    """

    token_log_probs: jax.Array
    log_probs: jax.Array
    scores: jax.Array
    lengths: jax.Array


def score_targets(
    logits: jax.Array | LogProbs,
    targets: jax.Array,
    *,
    pad: int,
    prefix: jax.Array | None = None,
    length_penalty: Penalty = PER_TOKEN,
) -> TargetScores:
    """Teacher-forced scores; of a search's hypothesis, the search's own up to float32 rounding.

    Args:
        logits: (B, T, V) floating, the model's at each position given the tokens before it (BOS,
            then targets without the last). `average_log_probs` makes an ensemble's.
        targets: (B, T) integers, EOS included, then PAD.
        pad: id after EOS.
        prefix: (B, P) integers, the search's: where it is not negative, a token costs nothing.
        length_penalty: lengths -> positive divisors.

    Raises:
        ValueError: targets or prefix are no integers of their shape.
    """
    shape = (logits.values if isinstance(logits, LogProbs) else logits).shape
    targets = jnp.asarray(targets)
    if targets.shape != shape[:-1] or not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(
            f"targets must be integers of the logits' (B, T) = {shape[:-1]}; "
            f"got {targets.dtype} of shape {targets.shape}."
        )
    logits, normaliser = normalise(logits)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    counts = targets != pad
    found = jnp.where(counts & ~_forced(prefix, targets), chosen - normaliser, 0.0)
    lengths = counts.sum(axis=1, dtype=jnp.int32)
    log_probs = found.sum(axis=1)
    scores = log_probs / length_penalty(jnp.maximum(lengths, 1))
    return TargetScores(found, log_probs, scores, lengths)


def _forced(prefix: jax.Array | None, targets: jax.Array) -> jax.Array:
    """(B, T): which tokens a search was given."""
    if prefix is None:
        return jnp.zeros(targets.shape, bool)
    prefix = jnp.asarray(prefix)
    if prefix.ndim != 2 or prefix.shape[0] != targets.shape[0]:
        raise ValueError(
            f"prefix must be (B, P) = ({targets.shape[0]}, P); got {prefix.shape}."
        )
    P, T = prefix.shape[1], targets.shape[1]
    rest = ((0, 0), (0, max(0, T - P)))
    return jnp.pad(prefix[:, :T] >= 0, rest, constant_values=False)
