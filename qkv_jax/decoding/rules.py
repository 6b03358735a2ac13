"""What a search is told: special ids, limits, constraints; and the checks of them."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qkv_jax.decoding.constraints import NONE, Constraints
from qkv_jax.decoding.steps import Penalty


class Rules(NamedTuple):
    """Checked arguments that all searches share.

    Attributes:
        excluded: ids that are never emitted.
        max_length: M, size of the token buffer.
        limits: (B,) int32, at most M: tokens each row may have, EOS included.
        prefix: (B, P) int32: the token that each row's step p has to take; negative: any.
        constraints: rules for every row.
        phrases: (B, C, L) int32: what each row has to hold, padded by negative ids.
        end_at_limit: whether the token at the limit has to be EOS.
    """

    bos: int
    eos: int
    pad: int
    excluded: tuple[int, ...]
    max_length: int
    limits: jax.Array
    length_penalty: Penalty
    prefix: jax.Array | None
    constraints: Constraints
    phrases: jax.Array | None
    end_at_limit: bool


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
    constraints: Constraints | None,
    phrases: jax.Array | None,
    end_at_limit: bool,
) -> Rules:
    """Rules from a search's arguments.

    Raises:
        ValueError: a size is below 1; an id is negative; EOS is PAD, forbidden or a banned
            phrase, so that nothing could end; limit, prefix or phrases are no integers of their
            shape.
    """
    for name, size in (("batch_size", batch_size), ("max_length", max_length)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1; got {size}.")
    if min(bos, eos, pad, *forbidden) < 0:
        raise ValueError(
            f"bos, eos, pad and forbidden must be at least 0; got {(bos, eos, pad, *forbidden)}."
        )
    constraints = NONE if constraints is None else constraints
    single = {phrase[0] for phrase in constraints.banned_phrases if len(phrase) == 1}
    if eos == pad or eos in forbidden or eos in single:
        raise ValueError(
            f"eos must differ from pad = {pad}, forbidden = {tuple(forbidden)} and banned "
            f"phrases of one token {tuple(sorted(single))}; got {eos}."
        )
    excluded = tuple(sorted({pad, bos, *forbidden, *single} - {eos}))
    full = jnp.full((batch_size,), max_length, jnp.int32)
    limit = full if limit is None else integers("limit", limit, ("B",), batch_size)
    return Rules(
        bos=bos,
        eos=eos,
        pad=pad,
        excluded=excluded,
        max_length=max_length,
        limits=jnp.minimum(limit, full),
        length_penalty=length_penalty,
        prefix=_optional("prefix", prefix, ("B", "P"), batch_size),
        constraints=constraints,
        phrases=_optional("phrases", phrases, ("B", "C", "L"), batch_size),
        end_at_limit=end_at_limit,
    )


def _optional(
    name: str, array: jax.Array | None, axes: tuple[str, ...], batch_size: int
) -> jax.Array | None:
    """`integers` of an array that may be absent; one without entries is absent."""
    array = None if array is None else integers(name, array, axes, batch_size)
    return None if array is None or array.size == 0 else array


def integers(
    name: str, array: jax.Array, axes: tuple[str, ...], batch_size: int
) -> jax.Array:
    array = jnp.asarray(array)
    whole = jnp.issubdtype(array.dtype, jnp.integer)
    if array.ndim != len(axes) or array.shape[0] != batch_size or not whole:
        comma = "," if len(axes) == 1 else ""
        sizes = ", ".join([str(batch_size), *axes[1:]])
        raise ValueError(
            f"{name} must be integers of shape ({', '.join(axes)}{comma}) = ({sizes}{comma}); "
            f"got {array.dtype} of shape {array.shape}."
        )
    return array.astype(jnp.int32)
