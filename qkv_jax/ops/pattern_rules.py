"""The rules behind patterns.py, and what they say of whole blocks of pairs."""

import itertools
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkv_jax.ops.masks import Mask

Array = jax.Array


class Known:
    """A numpy array that is equal to others, and hashed, by what stands in it."""

    def __init__(self, array: np.ndarray):
        self.array = array.copy()  # the caller may write into theirs
        self._content = array.shape, array.tobytes()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Known) and self._content == other._content

    def __hash__(self) -> int:
        return hash(self._content)

    def __repr__(self) -> str:
        return f"Known(shape={self.array.shape})"


@dataclass(frozen=True, kw_only=True)
class Lookup(Mask):
    """A mask with a bool table, (1 or B, ...): `known` at trace time, or `traced`."""

    traced: Array | None
    known: Known | None = field(metadata={"static": True})

    @property
    def table(self) -> Any:
        return self.traced if self.known is None else self.known.array

    def materialise(self, shape):
        self.check(shape)
        return super().materialise(shape)

    def fill(self, grid):
        self.check(grid.shape)
        return self

    def check(self, shape: tuple[int, int, int, int]) -> None:
        """Raises ValueError if the table does not fit (B, N, T, S)."""
        raise NotImplementedError


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Dilated(Mask):
    left: int | None = field(metadata={"static": True})
    right: int | None = field(metadata={"static": True})
    step: int = field(metadata={"static": True})

    def allowed(self, b, h, q, k):
        inside = (q - k) % self.step == 0
        if self.left is not None:
            inside = inside & (k >= q - self.left * self.step)
        if self.right is not None:
            inside = inside & (k <= q + self.right * self.step)
        return inside

    def blocks(self, grid):
        # A block's distances k - q are all those from `low` to `high`.
        low, high, step = grid.k - grid.q_last, grid.k_last - grid.q, self.step
        first, last = -(-low // step), high // step  # steps that lie among them
        some = first <= last
        every = (low == high) & (low % step == 0) if step > 1 else low <= high
        if self.left is not None:
            some = some & (last >= -self.left)
            every = every & (low >= -self.left * step)
        if self.right is not None:
            some = some & (first <= self.right)
            every = every & (high <= self.right * step)
        if self.left is not None and self.right is not None:
            some = some & (-self.left <= self.right)
        return some, every


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Chunked(Mask):
    width: int = field(metadata={"static": True})

    def allowed(self, b, h, q, k):
        return q // self.width == k // self.width

    def blocks(self, grid):
        q, q_last = grid.q // self.width, grid.q_last // self.width
        k, k_last = grid.k // self.width, grid.k_last // self.width
        return (q <= k_last) & (k <= q_last), (q == k_last) & (k == q_last)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Summaries(Mask):
    """The last `count` keys of each chunk of `width`."""

    width: int = field(metadata={"static": True})
    count: int = field(metadata={"static": True})

    def allowed(self, b, h, q, k):
        return k % self.width >= self.width - self.count

    def blocks(self, grid):
        start = self.width - self.count
        same = grid.k // self.width == grid.k_last // self.width
        some = (grid.k_last % self.width >= start) | ~same
        return some, (grid.k % self.width >= start) & same


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class BlockSparse(Lookup):
    """The table is the layout, (1 or B, 1 or N, blocks of queries, blocks of keys)."""

    block_size: int = field(metadata={"static": True})

    def allowed(self, b, h, q, k):
        at = self._rows(b, h)
        return jnp.asarray(self.table)[*at, q // self.block_size, k // self.block_size]

    def blocks(self, grid):
        # Prefix sums count the admitted blocks of the layout that a block of the grid touches.
        size, (n_q, n_k) = self.block_size, self.table.shape[2:]
        sums, at = _sums(_sums(self.table, 2), 3), self._rows(grid.b, grid.h)
        # A grid over several devices may have blocks past the layout's end.
        top, bottom = (
            np.minimum(x, n_q) for x in (grid.q // size, grid.q_last // size + 1)
        )
        left, right = (
            np.minimum(x, n_k) for x in (grid.k // size, grid.k_last // size + 1)
        )
        count = sums[*at, bottom, right] - sums[*at, top, right]
        count = count - sums[*at, bottom, left] + sums[*at, top, left]
        return count > 0, count == (bottom - top) * (right - left)

    def check(self, shape):
        B, N, T, S = shape
        (rows, heads, n_q, n_k), size = self.table.shape, self.block_size
        if (
            rows not in (1, B)
            or heads not in (1, N)
            or n_q * size < T
            or n_k * size < S
        ):
            raise ValueError(
                f"block_sparse: layout must broadcast to (B, N) = {(B, N)} and cover (T, S) = "
                f"{(T, S)} in blocks of {size}; got shape {self.table.shape}."
            )

    def _rows(self, b, h):
        return [i if size > 1 else 0 for i, size in zip((b, h), self.table.shape)]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class GlobalTokens(Lookup):
    """The table is (1 or B, length); positions past it are not global."""

    def allowed(self, b, h, q, k):
        table = jnp.asarray(self.table)
        b = b if table.shape[0] > 1 else 0
        q, k = (table.at[b, x].get(mode="fill", fill_value=False) for x in (q, k))
        return q | k

    def blocks(self, grid):
        some_q, every_q = self._states(grid.b, grid.q, grid.q_last)
        some_k, every_k = self._states(grid.b, grid.k, grid.k_last)
        return some_q | some_k, every_q | every_k

    def check(self, shape):
        if self.table.shape[0] not in (1, shape[0]):
            raise ValueError(
                f"global_tokens: tokens must be (B, length) with B = {shape[0]}; "
                f"got shape {self.table.shape}."
            )

    def _states(self, b, first, last):
        """Of runs of positions: whether any is global, and whether all are."""
        sums, length = _sums(self.table, 1), self.table.shape[1]
        b = b if self.table.shape[0] > 1 else 0
        end, start = (np.minimum(x, length) for x in (last + 1, first))
        count = sums[b, end] - sums[b, start]
        return count > 0, count == last + 1 - first


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Local2D(Mask):
    height: int = field(metadata={"static": True})
    width: int = field(metadata={"static": True})
    radius: tuple[int, int] = field(metadata={"static": True})

    def allowed(self, b, h, q, k):
        rows, columns = self.radius
        near = abs(q // self.width - k // self.width) <= rows
        near = near & (abs(q % self.width - k % self.width) <= columns)
        return near & (q < self.height * self.width) & (k < self.height * self.width)

    def blocks(self, grid):
        count = self.height * self.width
        boxes = (
            _boxes(first, np.minimum(last, count - 1), self.width)
            for first, last in ((grid.q, grid.q_last), (grid.k, grid.k_last))
        )
        some, every = False, True
        for pair in itertools.product(*boxes):
            near = far = True
            for (q, q_last), (k, k_last), radius in zip(*pair, self.radius):
                near = near & (k - q_last <= radius) & (q - k_last <= radius)
                far = far & (q_last - k <= radius) & (k_last - q <= radius)
            some, every = some | near, every & far
        some = some & (grid.q < count) & (grid.k < count)
        return some, every & (grid.q_last < count) & (grid.k_last < count)


def lookup(table: np.ndarray | Array) -> dict[str, Any]:
    """The fields of a `Lookup`."""
    if isinstance(table, np.ndarray):
        return {"traced": None, "known": Known(table)}
    return {"traced": table, "known": None}


def _sums(table: Any, axis: int) -> Any:
    """Sums of the first 0, 1, 2, ... entries along an axis, int32."""
    xp = np if isinstance(table, np.ndarray) else jnp
    before = [(int(i == axis), 0) for i in range(table.ndim)]
    return xp.pad(xp.cumsum(table, axis, dtype=np.int32), before)


def _boxes(first: np.ndarray, last: np.ndarray, width: int) -> tuple:
    """Runs of pixels as three boxes each: ((row, last row), (column, last column)).

    They are the first row, the whole rows between, and the last row; where there is just one row,
    or none between, a box stands twice.
    """
    (top, left), (bottom, right) = divmod(first, width), divmod(last, width)
    one, many = bottom == top, bottom - top > 1
    end = np.where(one, right, width - 1)
    return (
        ((top, top), (left, end)),
        (
            (top + many, np.where(many, bottom - 1, top)),
            (np.where(many, 0, left), np.where(many, width - 1, end)),
        ),
        ((bottom, bottom), (np.where(one, left, 0), right)),
    )
