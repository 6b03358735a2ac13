"""Data sets of single examples: arrays whose first axis counts them, in three parts."""

import dataclasses
import sys
from collections.abc import Iterator, Mapping

import numpy as np

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
    """

    train: Arrays
    valid: Arrays
    test: Arrays
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    names: tuple[str, ...] = ()
    report: tuple[str, ...] = ()

    def __post_init__(self):
        if not count_rows(self.train):
            raise DataError("the data set has no example to train on")
        for part in (self.valid, self.test):
            count_rows(part)

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

    It is a grain `RandomAccessDataSource`: see `train_iterator`.

    Args:
        arrays: what to learn from.
        rows: of a batch.
        seed: of the order.
        share: (i, n): of each batch, block i of n equal ones of its rows is returned.
    """

    def __init__(
        self,
        arrays: Arrays,
        *,
        rows: int,
        seed: int = 0,
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
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    @property
    def batches_per_epoch(self) -> int:
        """Number of batches in which every example comes at most once."""
        return max(1, self._count // self._rows)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        epoch, position = divmod(index, self.batches_per_epoch)
        order = self._epoch(epoch)[position * self._rows :][: self._rows]
        unused = self._rows - len(order)
        padded = np.pad(order, (0, unused), constant_values=-1)
        part, parts = self._share
        return take_rows(self._arrays, np.split(padded, parts)[part])

    def _epoch(self, epoch: int) -> np.ndarray:
        known, order = self._order
        if known != epoch:
            rng = np.random.default_rng((self._seed, epoch))
            order = rng.permutation(self._count)
            self._order = (epoch, order)
        return order

    def __str__(self) -> str:
        return f"batches: {self.batches_per_epoch:,} an epoch, of {self._rows:,} rows"


def example_batches(
    arrays: Arrays, *, rows: int
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Every example once, in order: (rows,) int64 indices, -1 for an unused row, and the batch."""
    count = count_rows(arrays)
    for start in range(0, count, rows):
        indices = np.arange(start, start + rows)
        indices = np.where(indices < count, indices, -1)
        yield indices, take_rows(arrays, indices)
