"""Training batches of a few static shapes, in an endless shuffled stream.

A batch is {"source": (B, S), "target": (B, T)}, int32. A row holds a sentence and EOS,
then PAD; a row that only fills up a batch is all PAD. With packing, a row holds several
sentences, each with its EOS, and "source_segments" and "target_segments", of the same shapes,
number them from 1, and PAD 0.
"""

import dataclasses
import sys
import threading
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from qkv_jax.data.buckets import Shape, assign_buckets, bucket_rows, check_chain
from qkv_jax.data.encoding import Batch, EncodedPairs
from qkv_jax.data.errors import DataError
from qkv_jax.data.packing import pack, shuffle_packed


@dataclasses.dataclass(frozen=True, kw_only=True)
class BucketReport:
    """One shape of batches, and how much of an epoch it is; prints as one line."""

    rows: int
    source: int
    target: int
    sentences: int
    batches: int

    def __str__(self) -> str:
        return (
            f"  {self.rows:5,} x ({self.source:3} source, {self.target:3} target): "
            f"{self.sentences:7,} pairs in {self.batches:5,} batches"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchReport:
    """What an epoch consists of; prints as a few lines.

    Token counts are of real tokens with EOS; padding is the share of all others,
    unused rows included. Every shape is one compilation of a train step.
    """

    sentences: int
    dropped: int
    truncated: int
    source_tokens: int
    target_tokens: int
    source_padding: float
    target_padding: float
    batches: int
    buckets: tuple[BucketReport, ...]

    @property
    def shapes(self) -> int:
        """Number of distinct batch shapes."""
        return len(self.buckets)

    def __str__(self) -> str:
        summary = (
            f"{self.sentences:,} pairs an epoch ({self.dropped:,} overlong dropped, "
            f"{self.truncated:,} truncated), {self.source_tokens:,} source and "
            f"{self.target_tokens:,} target tokens in {self.batches:,} batches\n"
            f"padding {self.source_padding:.1%} of source, "
            f"{self.target_padding:.1%} of target; {self.shapes} shapes to compile"
        )
        return "\n".join([summary, *map(str, self.buckets)])


class BatchStream:
    """An endless, reproducible sequence of training batches with random access.

    Item i is batch i % n of epoch i // n, where n = `batches_per_epoch`. Every epoch
    holds every pair once, in an order drawn from (seed, epoch) alone. What does not
    fill a batch of its bucket is moved up to the next larger one, so that only the
    last batch of the largest bucket can have unused rows.

    It is a grain `RandomAccessDataSource`: see `train_iterator`.

    Args:
        pairs: what to learn from.
        buckets: shapes, each holding the one before: see `choose_buckets`.
        target_tokens: the most target tokens in a batch, padding included, over all
            processes.
        source_tokens: the same for the source. None: no limit.
        rows_multiple: rows of a batch are a multiple of this (devices of all
            processes x accumulation steps), and at least this many.
        overlong: what becomes of a pair longer than the largest bucket: "drop" or
            "truncate" (which keeps EOS). Both are counted.
        packing: several pairs share a row of the largest bucket, the only one used: one
            shape, and almost no padding. Which pairs share a row differs by epoch.
        seed: of the order.
        share: (i, n): of each batch, block i of n equal ones of its rows is returned;
            n divides rows_multiple.

    Raises:
        ValueError: an argument is out of range, or buckets are not a chain.
        DataError: no pair fits.
    """

    def __init__(
        self,
        pairs: EncodedPairs,
        buckets: Sequence[Shape],
        *,
        target_tokens: int,
        source_tokens: int | None = None,
        rows_multiple: int = 1,
        overlong: str = "drop",
        packing: bool = False,
        seed: int = 0,
        share: tuple[int, int] = (0, 1),
    ):
        if overlong not in ("drop", "truncate"):
            raise ValueError(f'overlong must be "drop" or "truncate"; got {overlong!r}')
        if not 0 <= share[0] < share[1] or rows_multiple % share[1]:
            raise ValueError(
                f"share must be (i, n) with i < n, and n must divide rows_multiple = "
                f"{rows_multiple}; got {share}"
            )
        self._pairs = pairs
        self._buckets = check_chain(buckets)[-1 if packing else 0 :]
        self._rows = [
            bucket_rows(
                shape,
                target_tokens=target_tokens,
                source_tokens=source_tokens,
                rows_multiple=rows_multiple,
            )
            for shape in self._buckets
        ]
        self._seed = seed
        self._share = share
        self._assign(overlong)
        self._packed: np.ndarray | None = None
        if packing:
            self._pack()
        self._plans: dict[int, list[tuple[int, np.ndarray]]] = {}
        self._lock = threading.Lock()

    @property
    def batches_per_epoch(self) -> int:
        """Number of batches in which every pair comes once."""
        return sum(self._batches)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> Batch:
        epoch, position = divmod(index, self.batches_per_epoch)
        bucket, indices = self._plan(epoch)[position]
        part = np.split(indices, self._share[1])[self._share[0]]
        if self._packed is not None:
            return self._pairs.packed_batch(part, self._buckets[bucket])
        return self._pairs.batch(part, self._buckets[bucket])

    def report(self) -> BatchReport:
        """Return the counts of an epoch, the same for every epoch."""
        used = [i for i, batches in enumerate(self._batches) if batches]
        sides = [
            np.minimum(side.lengths, longest)[self._bucket < len(self._buckets)].sum()
            for side, longest in zip(self._pairs, self._buckets[-1])
        ]
        room = [
            sum(self._batches[i] * self._rows[i] * self._buckets[i][side] for i in used)
            for side in (0, 1)
        ]
        return BatchReport(
            sentences=sum(self._sentences),
            dropped=self._dropped,
            truncated=self._truncated,
            source_tokens=int(sides[0]),
            target_tokens=int(sides[1]),
            source_padding=1 - float(sides[0]) / room[0],
            target_padding=1 - float(sides[1]) / room[1],
            batches=self.batches_per_epoch,
            buckets=tuple(
                BucketReport(
                    rows=self._rows[i],
                    source=self._buckets[i].source,
                    target=self._buckets[i].target,
                    sentences=self._sentences[i],
                    batches=self._batches[i],
                )
                for i in used
            ),
        )

    def _assign(self, overlong: str) -> None:
        """Put every pair into a bucket, and count pairs and batches of each."""
        lengths = (self._pairs.source.lengths, self._pairs.target.lengths)
        last = len(self._buckets)
        self._bucket = assign_buckets(*lengths, self._buckets)
        outside = int((self._bucket == last).sum())
        self._truncated = outside if overlong == "truncate" else 0
        self._dropped = outside - self._truncated
        if overlong == "truncate":
            self._bucket[self._bucket == last] = last - 1
        if not (self._bucket < last).any():
            raise DataError(
                f"no pair to train on: {outside:,} are longer than the largest bucket, "
                f"{self._buckets[-1].source} source and {self._buckets[-1].target} "
                f"target tokens"
            )
        self._sentences, self._batches = [], []
        moved_up = 0
        for index, rows in enumerate(self._rows):
            held = int((self._bucket == index).sum()) + moved_up
            batches = held // rows
            if index == last - 1:
                batches = -(-held // rows)
            moved_up = max(held - batches * rows, 0)
            self._sentences.append(held - moved_up)
            self._batches.append(batches)

    def _pack(self) -> None:
        """Choose which lengths share a row: the same in every epoch."""
        inside = np.flatnonzero(self._bucket == 0)
        source, target = self._packed_lengths()
        rows = pack(source[inside], target[inside], self._buckets[0])
        self._packed = np.where(rows < 0, -1, inside[rows])
        self._batches = [-(-len(rows) // self._rows[0])]

    def _packed_lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of every source and of every target, as far as they fit into a row."""
        source, target = (
            np.minimum(side.lengths, longest)
            for side, longest in zip(self._pairs, self._buckets[0])
        )
        return source, target

    def _plan(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        with self._lock:  # A prefetching thread and its reader may both ask.
            if epoch not in self._plans:
                # Two epochs are kept: around a boundary both are in use.
                for old in sorted(self._plans, key=lambda e: abs(e - epoch))[1:]:
                    del self._plans[old]
                self._plans[epoch] = self._draw(epoch)
            return self._plans[epoch]

    def _draw(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        """Return (bucket, indices of its pairs, -1 for an unused row) of each batch."""
        rng = np.random.default_rng((self._seed, epoch))
        if self._packed is not None:
            packed = shuffle_packed(self._packed, *self._packed_lengths(), rng)
            unused = -len(packed) % self._rows[0]
            packed = np.pad(packed, ((0, unused), (0, 0)), constant_values=-1)
            packed = packed.reshape(self._batches[0], self._rows[0], -1)
            return [(0, batch) for batch in rng.permutation(packed)]
        batches = []
        moved_up = np.zeros(0, np.int64)
        for index, rows in enumerate(self._rows):
            own = np.flatnonzero(self._bucket == index)
            members = rng.permutation(np.concatenate([moved_up, own]))
            padded = np.full(self._batches[index] * rows, -1)
            padded[: len(members)] = members[: len(padded)]
            moved_up = members[len(padded) :]
            batches += [(index, batch) for batch in padded.reshape(-1, rows)]
        order = rng.permutation(len(batches))
        return [batches[i] for i in order]


class Batches(Protocol):
    """Batches by their place in an endless sequence."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Batch: ...


def train_iterator(stream: Batches, *, prefetch: int = 2):
    """Return an endless grain iterator over a stream of batches.

    `get_state()` is a small JSON-able dict that says which batch comes next, whatever
    was prefetched; after `set_state` of it, on an iterator over an equal stream, the
    same batches follow.

    Args:
        stream: where batches come from.
        prefetch: batches made ahead, in one thread. 0: none, no thread.
    """
    # Imported here: grain takes seconds to import, and only training needs it.
    import grain

    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
    return iter(grain.MapDataset.source(stream).to_iter_dataset(options))
