"""What a search is told: a model's decoding step, special ids, limits; and the checks of them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp


class ReorderableCache(Protocol):
    """A pytree whose hypotheses can be permuted and repeated, as beam search asks."""

    def reorder(self, parents: jax.Array, /) -> Self:
        """New hypothesis z of row b continues old hypothesis parents[b, z]; (B, Z) int32."""
        ...


# step(tokens (B, Z) int32, cache) -> (logits (B, Z, V), cache)
Step = Callable[[jax.Array, Any], tuple[jax.Array, Any]]

# lengths (int32, any shape, at least 1) -> positive divisors, float32
Penalty = Callable[[jax.Array], jax.Array]


class Rules(NamedTuple):
    """Checked arguments that both searches share.

    Attributes:
        excluded: ids that are never emitted.
        max_length: M, size of the token buffer.
        limits: (B,) int32, at most M: tokens each row may have, EOS included.
        prefix: (B, P) int32: the token that each row's step p has to take; negative: any.
    """

    bos: int
    eos: int
    pad: int
    excluded: tuple[int, ...]
    max_length: int
    limits: jax.Array
    length_penalty: Penalty
    prefix: jax.Array | None


def checked_rules(
    *,
    batch_size: int,
    bos: int,
    eos: int,
    pad: int,
    max_length: int,
    limit: jax.Array | None,
    forbidden: Sequence[int],
    length_penalty: Penalty,
    prefix: jax.Array | None,
) -> Rules:
    """Rules from a search's arguments.

    Raises:
        ValueError: a size is below 1; an id is negative; EOS is PAD or forbidden, so that nothing
            could end; limit is not (B,) integers, or prefix (B, P) of them.
    """
    for name, size in (("batch_size", batch_size), ("max_length", max_length)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1; got {size}.")
    if min(bos, eos, pad, *forbidden) < 0:
        raise ValueError(
            f"bos, eos, pad and forbidden must be at least 0; got {(bos, eos, pad, *forbidden)}."
        )
    if eos == pad or eos in forbidden:
        raise ValueError(
            f"eos must differ from pad = {pad} and forbidden = {tuple(forbidden)}; got {eos}."
        )
    excluded = tuple(sorted({pad, bos, *forbidden} - {eos}))
    full = jnp.full((batch_size,), max_length, jnp.int32)
    limit = full if limit is None else jnp.asarray(limit)
    if limit.shape != (batch_size,) or not jnp.issubdtype(limit.dtype, jnp.integer):
        raise ValueError(
            f"limit must be integers of shape (B,) = ({batch_size},); "
            f"got {limit.dtype} of shape {limit.shape}."
        )
    limits = jnp.minimum(limit.astype(jnp.int32), full)
    if prefix is not None:
        prefix = jnp.asarray(prefix)
        whole = jnp.issubdtype(prefix.dtype, jnp.integer)
        if prefix.ndim != 2 or prefix.shape[0] != batch_size or not whole:
            raise ValueError(
                f"prefix must be integers of shape (B, P) = ({batch_size}, P); "
                f"got {prefix.dtype} of shape {prefix.shape}."
            )
    return Rules(bos, eos, pad, excluded, max_length, limits, length_penalty, prefix)


def normalise(
    logits: jax.Array, rules: Rules, *, tokens: jax.Array, length: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Float32 logits with excluded ids at -inf, and what turns them into log-probabilities.

    Log-probabilities are the model's own: what is excluded keeps its probability, as in fairseq,
    Marian and transformers, so that a score does not depend on what was excluded. A token of the
    prefix has probability 1.

    Args:
        logits: what step returned.
        rules: the search's.
        tokens: (B, Z), what step was given.
        length: () int32, tokens generated before.

    Returns:
        logits (B, Z, V) and normaliser (B, Z): log-probabilities are their difference, -inf (and
        not NaN) where every logit is -inf.

    Raises:
        ValueError: logits are not (B, Z, V), or an id is not below V.
    """
    if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
        batch_size, beams = tokens.shape
        raise ValueError(
            f"step must return logits (B, Z, V) = ({batch_size}, {beams}, V); got {logits.shape}."
        )
    vocabulary = logits.shape[-1]
    if max(rules.eos, *rules.excluded) >= vocabulary:
        raise ValueError(
            f"eos, pad, bos and forbidden must be below V = {vocabulary}; "
            f"got {(rules.eos, *rules.excluded)}."
        )
    logits = logits.astype(jnp.float32)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    normaliser = jnp.where(normaliser == -jnp.inf, 0.0, normaliser)
    logits = logits.at[..., jnp.array(rules.excluded)].set(-jnp.inf)
    if rules.prefix is None:
        return logits, normaliser
    return _force(logits, normaliser, rules.prefix, length)


def _force(
    logits: jax.Array, normaliser: jax.Array, prefix: jax.Array, length: jax.Array
) -> tuple[jax.Array, jax.Array]:
    at = jnp.minimum(length, prefix.shape[1] - 1)
    wanted = jnp.where(length < prefix.shape[1], prefix[:, at], -1)[:, None, None]
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
    only = jnp.where(ids == wanted, 0.0, -jnp.inf)
    forced = wanted >= 0
    return jnp.where(forced, only, logits), jnp.where(forced[..., 0], 0.0, normaliser)
