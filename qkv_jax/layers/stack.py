"""Layers one after another: kept, computed again in the backward pass, or as one loop."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from qkv_jax.layers.linear import PRODUCT

Array = jax.Array
Block = TypeVar("Block")  # A module, or a tuple of some.
Remat = Literal["none", "dots", "everything"]
# What the backward pass finds kept; None: a layer's input alone. Attention's T x S products are not
# among it, and what is kept has the dtype of the computation, where sums are float32.
SAVED: dict[str, Any] = {
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
    "everything": None,
}


def check_remat(remat: str) -> None:
    """Raises a ValueError, with the choices, for what is none of `Remat`."""
    if remat not in get_args(Remat):
        raise ValueError(f"remat must be one of {get_args(Remat)}; got {remat!r}.")


def run_blocks(
    blocks: Sequence[Block],
    x: Array,
    rngs: Sequence[Array | None],
    call: Callable[[Block, Array, Array | None], Array],
    *,
    remat: Remat = "none",
    scan: bool = False,
) -> Array:
    """x through each block in turn.

    Args:
        blocks: L modules, or tuples of modules, that change nothing of their own when called;
            none: x comes back.
        x: what the first one takes, and of the same shape and dtype what each gives.
        rngs: each block's.
        call: (block, x, rng) -> x; may read other arrays, of which gradients are made too.
        remat: what the backward pass computes again, for less memory: nothing ("none"), all but
            the blocks' products with weights ("dots"), or all from each block's input
            ("everything": about a third more operations). Chen et al. 2016, arXiv 1604.06174.
        scan: the blocks are one loop, whose program is that of a single block. Their weights are
            stacked in each call, so that they stay apart everywhere else: a copy of them all in
            memory, and of their gradients.

    Raises:
        ValueError: remat is unknown; scan, and the blocks are not alike but for the values of their
            weights.
    """
    check_remat(remat)
    if not blocks or (remat == "none" and not scan):
        for block, rng in zip(blocks, rngs, strict=True):
            x = call(block, x, rng)
        return x
    parts = [nnx.split(block) for block in blocks]
    graph = parts[0][0]

    def apply(graph: Any, state: Any, x: Array, rng: Array | None) -> Array:
        return call(nnx.merge(graph, state), x, rng)

    if remat != "none":
        # A loop's body is compiled by itself: there is nothing outside that it could share.
        apply = jax.checkpoint(
            apply, policy=SAVED[remat], prevent_cse=not scan, static_argnums=0
        )
    if not scan:
        for (graph, state), rng in zip(parts, rngs, strict=True):
            x = apply(graph, state, x, rng)
        return x
    states = [state for _, state in parts]
    if any(other != graph for other, _ in parts) or len(set(map(_shapes, states))) > 1:
        raise ValueError(
            f"scan needs blocks that are alike, and the {len(blocks)} differ in more than the "
            "values of their weights: leave scan False."
        )
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *states)
    drawn = None if rngs[0] is None else jnp.stack(list[Any](rngs))

    def step(x: Array, part: Any) -> tuple[Array, None]:
        state, rng = part
        return apply(graph, state, x, rng), None

    return jax.lax.scan(step, x, (stacked, drawn))[0]


def pairs_of_keys(rngs: Sequence[Array | None]) -> list[Array | None]:
    """2 L keys -> L arrays (2,) of keys, for blocks that draw twice; of None, L None."""
    return [
        None if first is None else jnp.stack(list[Any]((first, second)))
        for first, second in zip(rngs[::2], rngs[1::2])
    ]


def _shapes(state: Any) -> Any:
    leaves, structure = jax.tree.flatten(state)
    return structure, tuple((x.shape, x.dtype) for x in leaves)
