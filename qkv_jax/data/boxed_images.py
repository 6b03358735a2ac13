"""Pictures with boxes in one .npz file, as BCCD's blood cells come."""

import dataclasses
import io
import itertools
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from qkv_jax.data.errors import DataError
from qkv_jax.data.splits import Splits

_NEEDED = ("boxes_xyxy_cls", "box_offsets", "split", "class_names")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BoxedImages:
    """A .npz file of pictures of one size, and boxes of things of several classes on them.

    Its arrays, for n pictures and m boxes:
        images (n, H, W, 3) uint8; or jpeg (bytes,) uint8 and jpeg_offsets (n + 1,)
        boxes_xyxy_cls (m, 5): x0, y0, x1, y1 in pixels, and the class from 0
        box_offsets (n + 1,): picture i has boxes box_offsets[i] to box_offsets[i + 1]
        split (n,): 0 to train on, 1 to validate on, 2 to test on
        class_names (V,)

    Attributes:
        path: of the file.
    """

    path: Path = Path("bccd_160x120.npz")

    def load(self) -> Splits:
        """Parts with "image" (B, H, W, 3) uint8, "boxes" (B, M, 4) float32, "classes" (B, M) int32.

        M is the largest number of boxes on a picture; where there are fewer, boxes are 0 and
        classes -1.

        Raises:
            DataError: the file is missing or is no such file.
        """
        found = self._read()
        images, split = self._images(found), found["split"]
        counts = np.diff(found["box_offsets"])
        names = tuple(map(str, found["class_names"]))
        boxes = found["boxes_xyxy_cls"]
        if not len(images) == len(counts) == len(split) or counts.sum() != len(boxes):
            raise DataError(
                f"{self.path}: {len(images)} pictures, {len(counts)} ranges of {len(boxes)} boxes "
                f"and {len(split)} parts do not fit each other"
            )
        if len(boxes) and not 0 <= boxes[:, 4].min() <= boxes[:, 4].max() < len(names):
            raise DataError(
                f"{self.path}: a class of a box is not below {len(names)}, the number of names"
            )
        row = np.repeat(np.arange(len(counts)), counts)
        place = np.arange(len(boxes)) - found["box_offsets"][row]
        shape = (len(images), int(counts.max(initial=1)))
        arrays = {
            "image": images,
            "boxes": np.zeros((*shape, 4), np.float32),
            "classes": np.full(shape, -1, np.int32),
        }
        arrays["boxes"][row, place] = boxes[:, :4]
        arrays["classes"][row, place] = boxes[:, 4]
        train, valid, test = (
            {name: array[split == part] for name, array in arrays.items()}
            for part in range(3)
        )
        H, W = images.shape[1:3]
        return Splits(
            train=train,
            valid=valid,
            test=test,
            sizes={"classes": len(names)},
            names=names,
            report=(f"{len(boxes):,} boxes on pictures of {W} x {H}",),
        )

    def _read(self) -> dict[str, np.ndarray]:
        try:
            with np.load(self.path, allow_pickle=False) as file:
                found = {name: file[name] for name in file.files}
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise DataError(
                f"{self.path} is not a .npz file of pictures with boxes ({error}): "
                "--data.path names one"
            ) from error
        missing = [name for name in _NEEDED if name not in found]
        if missing or not ("images" in found or {"jpeg", "jpeg_offsets"} <= set(found)):
            raise DataError(
                f"{self.path} lacks {missing[0] if missing else 'images or jpeg'}; it has "
                f"{', '.join(found) or 'nothing'}"
            )
        return found

    def _images(self, found: Mapping[str, np.ndarray]) -> np.ndarray:
        if "images" in found:
            images = found["images"]
        else:
            from PIL import Image  # Comes with matplotlib.

            ends, content = found["jpeg_offsets"], found["jpeg"].tobytes()
            pictures = (
                Image.open(io.BytesIO(content[start:end])).convert("RGB")
                for start, end in itertools.pairwise(ends)
            )
            try:
                images = np.stack([np.asarray(picture) for picture in pictures])
            except (OSError, ValueError) as error:
                raise DataError(
                    f"{self.path}: its JPEG pictures cannot be read, or are not of one size "
                    f"({error})"
                ) from error
        if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
            raise DataError(
                f"{self.path}: images must be (n, height, width, 3) uint8; got "
                f"{images.shape} {images.dtype}"
            )
        return images
