"""Labelled images in idx files, as MNIST and all that took its form come: read from gzip as they are."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qkv_jax.data.errors import DataError
from qkv_jax.data.files import read_bytes
from qkv_jax.data.splits import Splits, hold_out

FASHION = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class IdxImages:
    """A directory with the four files of MNIST: images and labels to train on, and to test with.

    They are `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`, `t10k-images-idx3-ubyte` and
    `t10k-labels-idx1-ubyte`, each with `.gz` behind it or not.

    Attributes:
        directory: where they lie.
        names: of the classes, in order of their labels; (): the labels themselves.
        validation: images that are taken from those to train on; nothing is trained on them.
        seed: which ones.
    """

    directory: Path
    names: tuple[str, ...] = ()
    validation: int = 5000
    seed: int = 0

    def load(self) -> Splits:
        """The images (rows, height, width, 1) uint8, and labels (rows,) int32, of each part.

        Raises:
            DataError: a file is missing, damaged, cut short, or no such idx file; images and
                labels are not equally many; a label has no name; too few images are left.
        """
        directory = Path(self.directory)
        whole, test = (_read_part(directory, part) for part in ("train", "t10k"))
        count = len(whole["label"])
        if not 0 < self.validation < count:
            raise DataError(
                f"validation must be between 1 and {count - 1}, as {directory} has {count} images "
                f"to train on; got {self.validation}"
            )
        if whole["image"].shape[1:] != test["image"].shape[1:]:
            raise DataError(
                f"{directory}: images to train on are {_size(whole)}, images to test with "
                f"{_size(test)}; they must be of one size"
            )
        classes = 1 + int(max(whole["label"].max(), test["label"].max()))
        if self.names and classes > len(self.names):
            raise DataError(
                f"{directory} has the label {classes - 1}, but names has {len(self.names)} classes"
            )
        classes = len(self.names) or classes
        kept, held_out = hold_out(count, self.validation / count, seed=self.seed)
        height, width, channels = whole["image"].shape[1:]
        return Splits(
            train={name: array[kept] for name, array in whole.items()},
            valid={name: array[held_out] for name, array in whole.items()},
            test=test,
            sizes={
                "height": height,
                "width": width,
                "channels": channels,
                "classes": classes,
            },
            names=self.names or tuple(map(str, range(classes))),
            report=(f"images: {_size(whole)} pixels, {classes} classes",),
        )


def read_idx(path: Path, axes: int) -> np.ndarray:
    """The uint8 array of an idx file, gzip or not.

    Args:
        path: of the file; without it, the same with `.gz` behind it is read.
        axes: how many the array has to have.

    Raises:
        DataError: the file is missing, unreadable, damaged, cut short, too long, or no idx file of
            bytes with so many axes.

    Source: the format's description, http://yann.lecun.com/exdb/mnist.
    """
    packed = path.with_name(path.name + ".gz")
    path = packed if packed.exists() or not path.exists() else path
    content = read_bytes(path)
    head = 4 + 4 * axes
    if content[:3] != b"\x00\x00\x08" or len(content) < head:
        raise DataError(
            f"{path} is not an idx file of bytes: it begins with "
            f"{content[:4].hex(' ') or 'nothing'}, and not with 00 00 08 0{axes}"
        )
    if content[3] != axes:
        raise DataError(
            f"{path} holds an array of {content[3]} axes; {axes} are expected. Are images and "
            "labels exchanged?"
        )
    shape = tuple(np.frombuffer(content, ">u4", axes, 4).tolist())
    if len(content) - head != math.prod(shape):
        raise DataError(
            f"{path} should hold {_times(shape)} = {math.prod(shape):,} bytes after its head, but "
            f"holds {len(content) - head:,}; fetch it again"
        )
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape)


def _read_part(directory: Path, part: str) -> dict[str, np.ndarray]:
    images = read_idx(directory / f"{part}-images-idx3-ubyte", 3)
    labels = read_idx(directory / f"{part}-labels-idx1-ubyte", 1)
    if len(images) != len(labels) or not len(images):
        raise DataError(
            f"{directory}: {part} has {len(images)} images and {len(labels)} labels; there must be "
            "one label an image, and at least one"
        )
    return {"image": images[..., None], "label": labels.astype(np.int32)}


def _size(part: dict[str, np.ndarray]) -> str:
    return _times(part["image"].shape[1:3])


def _times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
