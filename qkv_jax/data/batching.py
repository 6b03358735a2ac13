"""Training batches of a few static shapes, in an endless shuffled stream.

A batch is {"source": (B, S), "target": (B, T)}, int32. A row holds a sentence and EOS,
then PAD; a row that only fills up a batch is all PAD. With packing, a row holds several
sentences, each with its EOS, and "source_segments" and "target_segments", of the same shapes,
number them from 1, and PAD 0.
"""

import dataclasses
import sys
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from qkv_jax.data.buckets import Shape, assign_buckets, bucket_rows, check_chain
from qkv_jax.data.encoding import Batch, EncodedPairs, choose
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


@dataclasses.dataclass(frozen=True)
class _Layout:
    """What the lengths of an epoch's pairs decide.

    Attributes:
        pairs: of the epoch.
        bucket: (pairs,) int, that of each pair; the number of buckets for one that is left out.
        sentences, batches: of each bucket.
        dropped, truncated: pairs longer than the largest bucket.
        packed: (rows, K), the pairs of each packed row, -1 for none; None: not packed.
    """

    pairs: EncodedPairs
    bucket: np.ndarray
    sentences: list[int]
    batches: list[int]
    dropped: int
    truncated: int
    packed: np.ndarray | None = None


class _Plan(NamedTuple):
    """An epoch: its pairs, and (bucket, indices of its pairs) of each batch."""

    pairs: EncodedPairs
    batches: list[tuple[int, np.ndarray]]


class BatchStream:
    """An endless, reproducible sequence of training batches with random access.

    Every epoch holds every pair once, in an order drawn from (seed, epoch) alone. What does not
    fill a batch of its bucket is moved up to the next larger one, so that only the
    last batch of the largest bucket can have unused rows.

    Where pairs are the same in every epoch, item i is batch i % n of epoch i // n, where n =
    `batches_per_epoch`: it is a grain `RandomAccessDataSource`. See `train_iterator`.

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
        resample: epoch -> the same pairs, segmented anew, such as a `SubwordSampler`. A pair that
            is then longer than the largest bucket stands as in `pairs`. Epochs differ in their
            number of batches, but not in their shapes. None: `pairs` in every epoch.

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
        resample: Callable[[int], EncodedPairs] | None = None,
    ):
        if overlong not in ("drop", "truncate"):
            raise ValueError(f'overlong must be "drop" or "truncate"; got {overlong!r}')
        if not 0 <= share[0] < share[1] or rows_multiple % share[1]:
            raise ValueError(
                f"share must be (i, n) with i < n, and n must divide rows_multiple = "
                f"{rows_multiple}; got {share}"
            )
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
        self._overlong = overlong
        self._packing = packing
        self._resample = resample
        self._pairs = pairs
        self._first = self._lay_out(pairs if resample is None else self._drawn(0))
        self._plans: dict[int, _Plan] = {}
        self._lock = threading.Lock()

    @property
    def resampled(self) -> bool:
        """Whether pairs differ by epoch."""
        return self._resample is not None

    @property
    def batches_per_epoch(self) -> int:
        """Number of batches in which every pair comes once; where it differs, of epoch 0."""
        return sum(self._first.batches)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> Batch:
        if self.resampled:
            raise TypeError(
                "epochs differ in their number of batches: use batch(epoch, position)"
            )
        return self.batch(*divmod(index, self.batches_per_epoch))

    def batches(self, epoch: int) -> int:
        """Return the number of batches of an epoch."""
        return len(self._plan(epoch).batches)

    def batch(self, epoch: int, position: int) -> Batch:
        """Return a batch of an epoch."""
        plan = self._plan(epoch)
        bucket, indices = plan.batches[position]
        part = np.split(indices, self._share[1])[self._share[0]]
        make = plan.pairs.packed_batch if self._packing else plan.pairs.batch
        return make(part, self._buckets[bucket])

    def report(self) -> BatchReport:
        """Return the counts of an epoch: of epoch 0, where they differ."""
        layout = self._first
        used = [i for i, batches in enumerate(layout.batches) if batches]
        sides = [
            np.minimum(side.lengths, longest)[layout.bucket < len(self._buckets)].sum()
            for side, longest in zip(layout.pairs, self._buckets[-1])
        ]
        room = [
            sum(
                layout.batches[i] * self._rows[i] * self._buckets[i][side] for i in used
            )
            for side in (0, 1)
        ]
        return BatchReport(
            sentences=sum(layout.sentences),
            dropped=layout.dropped,
            truncated=layout.truncated,
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
                    sentences=layout.sentences[i],
                    batches=layout.batches[i],
                )
                for i in used
            ),
        )

    def _drawn(self, epoch: int) -> EncodedPairs:
        """The pairs of an epoch, none longer than a row that is not so in every epoch."""
        assert self._resample is not None
        drawn = self._resample(epoch)
        fits = np.logical_and(
            *(
                side.lengths <= longest
                for side, longest in zip(drawn, self._buckets[-1])
            )
        )
        return EncodedPairs(
            *(choose(fits, *sides) for sides in zip(drawn, self._pairs))
        )

    def _lay_out(self, pairs: EncodedPairs) -> _Layout:
        """Put every pair into a bucket, and count pairs and batches of each."""
        last = len(self._buckets)
        bucket = assign_buckets(
            pairs.source.lengths, pairs.target.lengths, self._buckets
        )
        outside = int((bucket == last).sum())
        truncated = outside if self._overlong == "truncate" else 0
        if self._overlong == "truncate":
            bucket[bucket == last] = last - 1
        if not (bucket < last).any():
            raise DataError(
                f"no pair to train on: {outside:,} are longer than the largest bucket, "
                f"{self._buckets[-1].source} source and {self._buckets[-1].target} "
                f"target tokens"
            )
        sentences, batches = [], []
        moved_up = 0
        for index, rows in enumerate(self._rows):
            held = int((bucket == index).sum()) + moved_up
            made = held // rows
            if index == last - 1:
                made = -(-held // rows)
            moved_up = max(held - made * rows, 0)
            sentences.append(held - moved_up)
            batches.append(made)
        layout = _Layout(
            pairs, bucket, sentences, batches, outside - truncated, truncated
        )
        return self._pack(layout) if self._packing else layout

    def _pack(self, layout: _Layout) -> _Layout:
        """Choose which lengths share a row."""
        inside = np.flatnonzero(layout.bucket == 0)
        source, target = self._packed_lengths(layout.pairs)
        rows = pack(source[inside], target[inside], self._buckets[0])
        return dataclasses.replace(
            layout,
            packed=np.where(rows < 0, -1, inside[rows]),
            batches=[-(-len(rows) // self._rows[0])],
        )

    def _packed_lengths(self, pairs: EncodedPairs) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of every source and of every target, as far as they fit into a row."""
        source, target = (
            np.minimum(side.lengths, longest)
            for side, longest in zip(pairs, self._buckets[0])
        )
        return source, target

    def _plan(self, epoch: int) -> _Plan:
        with self._lock:  # A prefetching thread and its reader may both ask.
            if epoch not in self._plans:
                # Two epochs are kept: around a boundary both are in use.
                for old in sorted(self._plans, key=lambda e: abs(e - epoch))[1:]:
                    del self._plans[old]
                layout = self._first
                if self.resampled and epoch:
                    layout = self._lay_out(self._drawn(epoch))
                self._plans[epoch] = _Plan(layout.pairs, self._draw(layout, epoch))
            return self._plans[epoch]

    def _draw(self, layout: _Layout, epoch: int) -> list[tuple[int, np.ndarray]]:
        """Return (bucket, indices of its pairs, -1 for an unused row) of each batch."""
        rng = np.random.default_rng((self._seed, epoch))
        if layout.packed is not None:
            lengths = self._packed_lengths(layout.pairs)
            packed = shuffle_packed(layout.packed, *lengths, rng)
            unused = -len(packed) % self._rows[0]
            packed = np.pad(packed, ((0, unused), (0, 0)), constant_values=-1)
            packed = packed.reshape(layout.batches[0], self._rows[0], -1)
            return [(0, batch) for batch in rng.permutation(packed)]
        batches = []
        moved_up = np.zeros(0, np.int64)
        for index, rows in enumerate(self._rows):
            own = np.flatnonzero(layout.bucket == index)
            members = rng.permutation(np.concatenate([moved_up, own]))
            padded = np.full(layout.batches[index] * rows, -1)
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

    if isinstance(stream, BatchStream) and stream.resampled:
        from qkv_jax.data.epochs import EpochDataset

        ahead = grain.experimental.ThreadPrefetchIterDataset(
            EpochDataset(stream), prefetch_buffer_size=prefetch
        )
        return iter(ahead)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
    return iter(grain.MapDataset.source(stream).to_iter_dataset(options))
