"""Attention to keys that go round a ring of devices, a part of the whole on each.

Partial results are float32 between hops, and a hop whose blocks the mask rules out is skipped. In
reverse the keys go round once more. Within `jax.shard_map` only; see context_parallel.py.

Source: Liu et al. 2023, arXiv 2310.01889.
"""

from typing import Any

import jax
import jax.numpy as jnp

from qkv_jax.ops import blockwise
from qkv_jax.ops.axes import vary
from qkv_jax.ops.block_loops import block_ranks
from qkv_jax.ops.derivatives import differentiable
from qkv_jax.ops.parts import (
    Inputs,
    Plan,
    Softmax,
    cotangents,
    merged,
    rows_of,
    zero_slopes,
)

Array = jax.Array


def _there(inputs: Inputs, plan: Plan, axis: str, devices: int) -> Softmax:
    """Attention of the queries here to the keys that go round, once.

    Args:
        inputs: filled up; their part says which blocks of queries and of keys are here at first.
        plan: see there.
        axis: the mesh axis that is the ring.
        devices: along it.
    """
    B, T, N, _ = inputs.query.shape
    wide = jnp.promote_types(inputs.query.dtype, jnp.float32)
    ranks = block_ranks(inputs, plan)

    def hop(carry, _):
        found, keys, places = carry
        here, here_ranks = _with_keys(inputs, ranks, keys, places)

        def look():
            return merged(found, blockwise.look(here, plan, here_ranks, wide))

        found = _unless_empty(here_ranks, look, found)
        return (found, *_pass_on((keys, places), axis, devices)), None

    line = jnp.full((B, T, N, 1), -jnp.inf, wide)
    out = jnp.zeros((B, T, N, inputs.value.shape[3]), wide)
    nothing = vary(Softmax(out, line, jnp.ones_like(line)), inputs)
    carry = (nothing, _joined(*inputs[1:3]), inputs.part.keys)
    (found, *_), _ = jax.lax.scan(hop, carry, length=devices)
    return found._replace(out=found.out.astype(inputs.query.dtype))


def _back(
    inputs: Inputs, found: Softmax, slopes: Any, plan: Plan, axis: str, devices: int
) -> list[Array]:
    """The keys go round once more, and take along the sums of their slopes."""
    wide = found.top.dtype
    ranks = block_ranks(inputs, plan)
    rows = vary(rows_of(found, slopes, inputs.mask is not None), inputs)

    def hop(carry, _):
        d_query, d_score, d_keys, keys, places = carry
        here, here_ranks = _with_keys(inputs, ranks, keys, places)

        def look():
            new, *d_pair, d_rule = blockwise.look_back(
                here, rows, plan, here_ranks, wide
            )
            return jax.tree.map(
                jnp.add, (d_query, d_score, d_keys), (new, d_rule, _joined(*d_pair))
            )

        sums = _unless_empty(here_ranks, look, (d_query, d_score, d_keys))
        passed = _pass_on((sums[2], keys, places), axis, devices)
        return (*sums[:2], *passed), None

    keys = _joined(*inputs[1:3])
    sums = jnp.zeros(inputs.query.shape, wide), zero_slopes(inputs.score)
    zeros = vary((*sums, jnp.zeros(keys.shape, wide)), inputs)
    carry: Any = (*zeros, keys, inputs.part.keys)
    (d_query, d_score, d_keys, *_), _ = jax.lax.scan(hop, carry, length=devices)
    d_key, d_value = _parted(d_keys, inputs)
    return cotangents(inputs, d_query, d_key, d_value, d_score)


# (inputs, plan, axis, devices) -> the output and the log-sum-exp, as `_there` says.
ring = differentiable(_there, _back)


def _joined(key: Array, value: Array) -> Array:
    """(B, S, K, H + E): so that one message a hop takes both."""
    return jnp.concatenate([key, value], axis=-1)


def _parted(keys: Array, inputs: Inputs) -> tuple[Array, Array]:
    size = inputs.key.shape[3]
    return keys[..., :size], keys[..., size:]


def _with_keys(
    inputs: Inputs, ranks: Any, keys: Any, places: Any
) -> tuple[Inputs, Any]:
    """The inputs with the keys that are here now, and the ranks of just their blocks."""
    key, value = _parted(keys, inputs)
    part = inputs.part._replace(keys=places)
    ranks = None if ranks is None else jnp.asarray(ranks)[..., places]
    return inputs._replace(key=key, value=value, part=part), ranks


def _unless_empty(ranks: Any, look: Any, found: Any) -> Any:
    """look(), or what was found if all blocks are empty."""
    if ranks is None:
        return look()
    return jax.lax.cond(jnp.any(ranks < 2), look, lambda: found)


def _pass_on(arrays: Any, axis: str, devices: int) -> Any:
    ring = [(i, (i + 1) % devices) for i in range(devices)]
    return jax.lax.ppermute(arrays, axis, ring)
