"""Batches epoch by epoch, where epochs differ in how many they have."""

from typing import Any, Protocol

import grain

from qkv_jax.data.encoding import Batch


class Epochs(Protocol):
    """Batches by their epoch and their place in it."""

    def batches(self, epoch: int) -> int: ...

    def batch(self, epoch: int, position: int) -> Batch: ...


class EpochDataset(grain.IterDataset):
    """All batches of the epochs 0, 1, ... without an end."""

    def __init__(self, stream: Epochs):
        super().__init__()
        self._stream = stream

    def __iter__(self) -> "EpochIterator":
        return EpochIterator(self._stream)


class EpochIterator(grain.DatasetIterator):
    """Its state is which batch of which epoch comes next: no earlier epoch is made to go on."""

    def __init__(self, stream: Epochs):
        super().__init__()
        self._stream = stream
        self._epoch = self._position = 0

    def __next__(self) -> Batch:
        if self._position >= self._stream.batches(self._epoch):
            self._epoch, self._position = self._epoch + 1, 0
        batch = self._stream.batch(self._epoch, self._position)
        self._position += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "position": self._position}

    def set_state(self, state: dict[str, Any]) -> None:
        self._epoch, self._position = state["epoch"], state["position"]
