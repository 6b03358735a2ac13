"""Data sets of single examples: arrays whose first axis counts them, in three parts."""

import dataclasses
import sys
from collections.abc import Iterator, Mapping

import numpy as np

from qkv_jax.data.buckets import choose_buckets
from qkv_jax.data.errors import DataError

Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Splits:
    """What a reader of examples returns.

    Attributes:
        train, valid, test: arrays by name, one row an example; valid and test may be empty.
        sizes: what a model takes from its data, such as {"classes": 10}: the fields of its Config
            that have such a name and are 0 are set to these.
        names: of the classes, in their order.
        report: lines that say what was read.
        padded: arrays whose second axis is padded to the longest row, where the array "lengths" says
            how long each is: a batch of short rows can be cut.
    """

    train: Arrays
    valid: Arrays
    test: Arrays
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    names: tuple[str, ...] = ()
    report: tuple[str, ...] = ()
    padded: tuple[str, ...] = ()

    def __post_init__(self):
        if not count_rows(self.train):
            raise DataError("the data set has no example to train on")
        for part in (self.valid, self.test):
            count_rows(part)
        if self.padded and not {"lengths", *self.padded} <= set(self.train):
            raise ValueError(
                f"padded arrays {self.padded} and 'lengths' must be among the data's; "
                f"got {tuple(self.train)}"
            )

    def __str__(self) -> str:
        counts = [
            f"{count_rows(part):,} {name}"
            for name, part in (
                ("training", self.train),
                ("validation", self.valid),
                ("test", self.test),
            )
        ]
        return f"examples: {', '.join(counts)}"


def count_rows(arrays: Arrays) -> int:
    """The number of examples; 0 where there is no array.

    Raises:
        ValueError: the arrays differ in it.
    """
    counts = {name: len(array) for name, array in arrays.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"arrays must have one number of rows; got {counts}")
    return next(iter(counts.values()), 0)


def take_rows(arrays: Arrays, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Rows of every array; an index of -1 gives row 0 and a "weight" of 0 in place of 1."""
    real = indices >= 0
    rows = {name: array[np.where(real, indices, 0)] for name, array in arrays.items()}
    return rows | {"weight": real.astype(np.float32)}


@dataclasses.dataclass(frozen=True)
class Cut:
    """The few lengths that padded arrays are cut to: each is one more shape to compile for.

    Attributes:
        padded: see `Splits`.
        bounds: lengths, rising; a batch is cut to the first that holds its longest row, and stays
            whole where none does.
    """

    padded: tuple[str, ...] = ()
    bounds: tuple[int, ...] = ()

    @classmethod
    def choose(cls, splits: Splits, count: int) -> "Cut":
        """The `count` bounds at most that pad the training part least."""
        if not splits.padded or count < 2:
            return cls()
        lengths = splits.train["lengths"]
        shapes = choose_buckets(lengths, np.ones_like(lengths), count=count, multiple=8)
        return cls(splits.padded, tuple(shape.source for shape in shapes))

    def take(
        self, arrays: Arrays, indices: np.ndarray, *, of: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """`take_rows` of arrays that are cut to the longest row of a batch.

        Args:
            arrays: of the data.
            indices: which rows.
            of: those of the whole batch, where `indices` are a process's share of it.
        """
        if not self.bounds:
            return take_rows(arrays, indices)
        whole = indices if of is None else of
        longest = arrays["lengths"][whole[whole >= 0]].max()
        bound = next((bound for bound in self.bounds if bound >= longest), None)
        batch = take_rows(
            {
                name: array[:, :bound] if name in self.padded else array
                for name, array in arrays.items()
            },
            indices,
        )
        # A row that only fills up is a longer one, perhaps.
        batch["lengths"] = np.minimum(batch["lengths"], longest)
        return batch

    def buckets(self, arrays: Arrays) -> np.ndarray:
        """(rows,) int64: which of the bounds holds each row; all 0 where there are none."""
        if not self.bounds:
            return np.zeros(count_rows(arrays), np.int64)
        return np.searchsorted(self.bounds, arrays["lengths"])


def hold_out(
    count: int, share: float, *, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The sorted indices of examples that stay, and of a share of them drawn to validate on.

    Raises:
        ValueError: share is not in [0, 1).
    """
    if not 0.0 <= share < 1.0:
        raise ValueError(f"share must be in [0, 1); got {share}")
    order = np.random.default_rng(seed).permutation(count)
    held = round(count * share)
    return np.sort(order[held:]), np.sort(order[:held])


class ExampleStream:
    """An endless, reproducible sequence of batches of examples with random access.

    Item i is batch i % n of epoch i // n, where n = `batches_per_epoch`. Every epoch is an order
    drawn from (seed, epoch) alone. What does not fill a batch comes in none of that epoch's, but
    where all examples together do not: then each batch holds all of them, and rows of weight 0.
    Where rows are cut, a batch holds rows of about one length; what does not fill a batch is moved
    up to longer ones.

    It is a grain `RandomAccessDataSource`: see `train_iterator`.

    Args:
        arrays: what to learn from.
        rows: of a batch.
        seed: of the order.
        cut: to which lengths; None: no array is cut.
        share: (i, n): of each batch, block i of n equal ones of its rows is returned.
    """

    def __init__(
        self,
        arrays: Arrays,
        *,
        rows: int,
        seed: int = 0,
        cut: Cut | None = None,
        share: tuple[int, int] = (0, 1),
    ):
        if rows < 1:
            raise ValueError(f"rows must be positive; got {rows}")
        if not 0 <= share[0] < share[1] or rows % share[1]:
            raise ValueError(
                f"share must be (i, n) with i < n, and n must divide rows = {rows}; got {share}"
            )
        self._share = share
        self._arrays, self._rows, self._seed = arrays, rows, seed
        self._count = count_rows(arrays)
        self._cut = cut or Cut()
        self._buckets = self._cut.buckets(arrays)
        self._plan: tuple[int, list[np.ndarray]] = (-1, [])

    @property
    def batches_per_epoch(self) -> int:
        """Number of batches in which every example comes at most once."""
        return max(1, self._count // self._rows)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        epoch, position = divmod(index, self.batches_per_epoch)
        batch = self._epoch(epoch)[position]
        unused = self._rows - len(batch)
        batch = np.pad(batch, (0, unused), constant_values=-1)
        part, parts = self._share
        return self._cut.take(self._arrays, np.split(batch, parts)[part], of=batch)

    def _epoch(self, epoch: int) -> list[np.ndarray]:
        """The rows of each batch of an epoch."""
        known, plan = self._plan
        if known != epoch:
            plan = self._draw(np.random.default_rng((self._seed, epoch)))
            self._plan = (epoch, plan)
        return plan

    def _draw(self, rng: np.random.Generator) -> list[np.ndarray]:
        order = rng.permutation(self._count)
        if self._count < self._rows:
            return [order]
        batches, moved_up = [], order[:0]
        for bucket in range(self._buckets.max() + 1):
            own = order[self._buckets[order] == bucket]
            members = np.concatenate([moved_up, own])
            full = len(members) // self._rows * self._rows
            batches += np.split(members[:full], full // self._rows) if full else []
            moved_up = members[full:]
        if not self._cut.bounds:
            return batches
        return [batches[i] for i in rng.permutation(len(batches))]

    def __str__(self) -> str:
        line = f"batches: {self.batches_per_epoch:,} an epoch, of {self._rows:,} rows"
        if not self._cut.bounds:
            return line
        taken = [self._cut.take(self._arrays, batch) for batch in self._epoch(0)]
        real = sum(int(batch["lengths"].sum()) for batch in taken)
        held = sum(
            batch[self._cut.padded[0]].shape[1] * len(batch["lengths"])
            for batch in taken
        )
        bounds = ", ".join(map(str, self._cut.bounds))
        return f"{line} cut to {bounds}; padding {1 - real / held:.1%}"


def example_batches(
    arrays: Arrays, *, rows: int, cut: Cut | None = None
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Every example once: (rows,) int64 indices, -1 for an unused row, and the batch.

    They come in order; where they are cut, from short to long.
    """
    cut = cut or Cut()
    order = np.argsort(cut.buckets(arrays), kind="stable")
    order = np.pad(order, (0, -len(order) % rows), constant_values=-1)
    for indices in order.reshape(-1, rows):
        yield indices, cut.take(arrays, indices)
