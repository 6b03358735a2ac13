"""Sparse patterns of attention, as masks: dilated, chunked, block-sparse, global tokens, images.

They compose with all others by `&`, `|` and `~`: `patterns.axial(32, 32, 0) & masks.causal()`.
What a pattern says of blocks of pairs is known at trace time, except where it holds traced arrays,
and is exact unless the function's docstring says otherwise.

An array that a pattern looks up may be numpy's or JAX's. Numpy's is a part of the program: what it
rules out is known at trace time, and another array is another program. JAX's is an argument. The rules themselves: pattern_rules.py.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from qkv_jax.ops import masks
from qkv_jax.ops.masks import Mask
from qkv_jax.ops.pattern_rules import (
    BlockSparse,
    Chunked,
    Dilated,
    GlobalTokens,
    Local2D,
    Summaries,
    lookup,
)

Array = jax.Array


def dilated(left: int | None, right: int | None, step: int) -> Mask:
    """Admits every `step`-th key from `left` steps before the query to `right` steps after it.

    That is `(q - k) % step == 0` and `q - left * step <= k <= q + right * step`; a bound that is
    None is none. Step 1 is `masks.window`.

    Raises:
        ValueError: step < 1.

    Source: Beltagy et al. 2020, arXiv 2004.05150, section 3.1.
    """
    _check("dilated", 1, step=step)
    left, right = (None if bound is None else int(bound) for bound in (left, right))
    return Dilated(left=left, right=right, step=int(step))


def chunked(width: int) -> Mask:
    """Admits keys of the query's own chunk: `q // width == k // width`.

    Raises:
        ValueError: width < 1.

    Source: Qiu et al. 2019, arXiv 1911.02972, section 3, with the identity as permutation.
    """
    _check("chunked", 1, width=width)
    return Chunked(width=int(width))


def strided(stride: int) -> Mask:
    """Admits the last `stride` keys before the query, itself, and every `stride`-th before them.

    For data with a period, as an image of rows of `stride` pixels. One mask for all heads. Which
    blocks are empty is exact; a full block may count as one in doubt.

    Raises:
        ValueError: stride < 1.

    Source: Child et al. 2019, arXiv 1904.10509, section 4.3, both kinds of heads merged.
    """
    _check("strided", 1, stride=stride)
    return masks.window(int(stride), 0) | dilated(None, 0, stride)


def fixed(stride: int, summary: int) -> Mask:
    """Admits, causally, the query's own chunk of `stride` and the last `summary` keys of each.

    For data without a period, as text. One mask for all heads. What it says of blocks is sound: one
    that is empty or full may count as one in doubt.

    Raises:
        ValueError: summary is not in 1..stride.

    Source: Child et al. 2019, arXiv 1904.10509, section 4.3, both kinds of heads merged.
    """
    _check("fixed", 1, stride=stride, summary=summary)
    if summary > stride:
        raise ValueError(
            f"fixed: summary must be at most stride = {stride}; got {summary}."
        )
    summaries = Summaries(width=int(stride), count=int(summary))
    return masks.causal() & (chunked(stride) | summaries)


def block_sparse(layout: np.ndarray | Array, block_size: int) -> Mask:
    """Admits pair (q, k) where `layout[q // block_size, k // block_size]` is True.

    Args:
        layout: bool, (blocks of queries, blocks of keys), or with axes (N, ...) or (B, N, ...)
            before them, each of which may be 1. It may be longer than T and S need.
        block_size: queries, and keys, in a block of the layout. An implementation's own blocks
            may have any size: it skips those that touch nothing admitted, hence fewer pairs where
            its blocks are larger than the layout's.

    Raises:
        TypeError: layout is not bool.
        ValueError: block_size < 1; layout has not 2 to 4 axes or, once T and S are known, does not
            cover them.

    Source: Gray et al. 2017, "GPU kernels for block-sparse weights"; Child et al. 2019, arXiv
    1904.10509, section 5.5.
    """
    _check("block_sparse", 1, block_size=block_size)
    _check_bool("block_sparse", "layout", layout)
    if np.ndim(layout) not in (2, 3, 4):
        raise ValueError(
            "block_sparse: layout must be (blocks of queries, blocks of keys), with N or B and N "
            f"before them or not; got shape {np.shape(layout)}."
        )
    layout = layout.reshape((1,) * (4 - layout.ndim) + layout.shape)
    return BlockSparse(**lookup(layout), block_size=int(block_size))


def big_bird(
    length: int,
    block_size: int,
    *,
    window_blocks: int = 3,
    global_blocks: int = 2,
    random_blocks: int = 3,
    heads: int = 1,
    seed: int,
) -> Mask:
    """Blocks near the diagonal, a few blocks that see and are seen by all, and random ones.

    Args:
        length: T and S, at most.
        block_size: of the layout, see `block_sparse`.
        window_blocks: blocks of keys around a query's own, odd: half on each side.
        global_blocks: the first ones see, and are seen by, all.
        random_blocks: further blocks of keys that each block of queries sees.
        heads: heads that draw random blocks of their own; 1: all share them.
        seed: of the random blocks; the same seed gives the same mask.

    Raises:
        ValueError: a number is too small; window_blocks is even.

    Source: Zaheer et al. 2020, arXiv 2007.14062, BigBird-ITC; its sizes are the defaults here, with
    blocks of 64. Differences: some published code takes the first and the last block as global.
    """
    _check("big_bird", 1, length=length, block_size=block_size, heads=heads)
    _check(
        "big_bird",
        0,
        window_blocks=window_blocks,
        global_blocks=global_blocks,
        random_blocks=random_blocks,
    )
    if window_blocks % 2 == 0:
        raise ValueError(f"big_bird: window_blocks must be odd; got {window_blocks}.")
    at = np.arange(-(-length // block_size))
    layout = abs(at[:, None] - at) <= window_blocks // 2
    layout |= (at[:, None] < global_blocks) | (at < global_blocks)
    draws = np.random.default_rng(seed).random((heads, len(at), len(at)))
    order = np.where(layout, 1.0, draws).argsort(-1).argsort(-1)
    return block_sparse(layout | (order < random_blocks), block_size)


def global_tokens(tokens: Sequence[int] | np.ndarray | Array) -> Mask:
    """Admits a pair whose query or key is one of `tokens`.

    Args:
        tokens: positions, the same in all rows: ints in a sequence; or bool (B, length), B or 1,
            where positions past the length are not global.

    Raises:
        TypeError, ValueError: tokens are neither; an array's shape does not fit.

    Source: Beltagy et al. 2020, arXiv 2004.05150, section 3.1.
    """
    if isinstance(tokens, (np.ndarray, Array)):
        _check_bool("global_tokens", "tokens", tokens)
        if tokens.ndim != 2:
            raise ValueError(
                f"global_tokens: tokens must be (B, length); got shape {tokens.shape}."
            )
        return GlobalTokens(**lookup(tokens))
    _check("global_tokens", 0, **{f"tokens[{i}]": x for i, x in enumerate(tokens)})
    table = np.zeros((1, max(tokens, default=-1) + 1), bool)
    table[0, list(tokens)] = True
    return GlobalTokens(**lookup(table))


def longformer(window: int, tokens: Sequence[int] | np.ndarray | Array) -> Mask:
    """Admits `window // 2` keys on each side of the query, itself, and all that is global.

    Which blocks are empty is exact; a full block may count as one in doubt.

    Args:
        window: even, w of the paper.
        tokens: which see, and are seen by, all; see `global_tokens`.

    Raises:
        TypeError, ValueError: window is odd or negative; tokens do not fit.

    Source: Beltagy et al. 2020, arXiv 2004.05150, section 3.1.
    """
    _check("longformer", 0, window=window)
    if window % 2:
        raise ValueError(f"longformer: window must be even; got {window}.")
    return masks.window(window // 2, window // 2) | global_tokens(tokens)


def local_2d(height: int, width: int, radius: int | tuple[int, int]) -> Mask:
    """Admits pixels at most `radius` rows and `radius` columns away, in an image.

    Position i is the pixel of row `i // width` and column `i % width`. Positions from
    `height * width` on are no part of the image: they attend to nothing, and nothing to them.

    Args:
        height, width: pixels, or patches, of the image.
        radius: for rows and columns, or one for each. A pixel at the edge sees fewer others.

    Raises:
        ValueError: height or width < 1; a radius < 0.

    Source: Parmar et al. 2018, arXiv 1802.05751, section 3.3. Differences: the neighbourhood is
    centred on each pixel.
    """
    _check("local_2d", 1, height=height, width=width)
    rows, columns = radius if isinstance(radius, tuple) else (radius, radius)
    _check("local_2d", 0, **{"radius (rows)": rows, "radius (columns)": columns})
    return Local2D(
        height=int(height), width=int(width), radius=(int(rows), int(columns))
    )


def axial(height: int, width: int, axis: int) -> Mask:
    """Admits pixels of the query's own column (axis 0) or row (axis 1), in an image.

    The image is laid out as for `local_2d`.

    Raises:
        ValueError: height or width < 1; axis is not 0 or 1.

    Source: Ho et al. 2019, arXiv 1912.12180, section 3.
    """
    _check("axial", 1, height=height, width=width)
    if axis not in (0, 1):
        raise ValueError(f"axial: axis must be 0 (columns) or 1 (rows); got {axis!r}.")
    return local_2d(height, width, (height, 0) if axis == 0 else (0, width))


def _check(owner: str, least: int, **numbers: Any) -> None:
    for name, number in numbers.items():
        if not isinstance(number, (int, np.integer)) or number < least:
            raise ValueError(
                f"{owner}: {name} must be an int, {least} or more; got {number!r}."
            )


def _check_bool(owner: str, name: str, array: Any) -> None:
    if getattr(array, "dtype", None) != np.bool_:
        got = getattr(array, "dtype", type(array).__name__)
        raise TypeError(f"{owner}: {name} must be a bool array; got {got}.")
