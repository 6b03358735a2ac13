"""Files of pictures with boxes: read, and refused with a line that says why."""

import io

import numpy as np
import pytest
from PIL import Image

from qkv_jax.data import DataError
from qkv_jax.data.boxed_images import BoxedImages
from tests.tasks.detection_toy import NAMES, scenes, write


def rewrite(path, *, without=(), **changes):
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    arrays |= changes
    np.savez(path, **{name: a for name, a in arrays.items() if name not in without})


def test_pictures_and_boxes_come_in_their_parts(tmp_path):
    splits = BoxedImages(path=write(tmp_path / "cells.npz")).load()
    assert splits.names == NAMES and splits.sizes == {"classes": 2}
    assert str(splits) == "examples: 8 training, 2 validation, 3 test"
    expected = scenes(13, seed=1)
    np.testing.assert_array_equal(splits.test["image"], expected["image"][10:])
    np.testing.assert_array_equal(splits.test["boxes"], expected["boxes"][10:, :2])
    np.testing.assert_array_equal(splits.valid["classes"], [[0, 1]] * 2)


def test_a_picture_with_fewer_boxes_is_filled_up(tmp_path):
    path = write(tmp_path / "cells.npz", train=2, valid=0, test=0)
    box = np.asarray([[1, 2, 3, 4, 1]], np.float32)
    rewrite(path, boxes_xyxy_cls=np.repeat(box, 3, 0), box_offsets=np.array([0, 0, 3]))
    train = BoxedImages(path=path).load().train
    np.testing.assert_array_equal(train["classes"], [[-1] * 3, [1] * 3])
    assert not train["boxes"][0].any()


def test_jpeg_pictures_are_decoded(tmp_path):
    path = write(tmp_path / "cells.npz", train=2, valid=0, test=0)
    image = scenes(2, seed=1)["image"]
    files = [io.BytesIO(), io.BytesIO()]
    for picture, file in zip(image, files):
        Image.fromarray(picture).save(file, "jpeg", quality=95)
    contents = [file.getvalue() for file in files]
    offsets = np.cumsum([0, *map(len, contents)])
    jpeg = np.frombuffer(b"".join(contents), np.uint8)
    rewrite(path, without=("images",), jpeg=jpeg, jpeg_offsets=offsets)
    found = BoxedImages(path=path).load().train["image"]
    assert np.abs(found.astype(int) - image).mean() < 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"without": ("split",)}, "lacks split; it has images"),
        ({"without": ("images",)}, "lacks images or jpeg"),
        ({"images": np.zeros((13, 4, 4), np.uint8)}, "must be .n, height, width, 3"),
        ({"split": np.zeros(2)}, "13 pictures, 13 ranges of 26 boxes and 2 parts"),
        ({"class_names": np.asarray(["one"])}, "a class of a box is not below 1"),
    ],
)
def test_a_file_that_does_not_fit_is_named(tmp_path, changes, message):
    path = write(tmp_path / "cells.npz")
    rewrite(path, **changes)
    with pytest.raises(DataError, match=message) as caught:
        BoxedImages(path=path).load()
    assert str(path) in str(caught.value)


def test_no_such_file_and_another_kind_of_file_are_told_apart(tmp_path):
    path = tmp_path / "cells.npz"
    with pytest.raises(DataError, match="No such file.*--data.path"):
        BoxedImages(path=path).load()
    path.write_text("not a zip")
    with pytest.raises(DataError, match="is not a .npz file of pictures with boxes"):
        BoxedImages(path=path).load()
