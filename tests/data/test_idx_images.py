import gzip

import numpy as np
import pytest

from qkv_jax.data.errors import DataError
from qkv_jax.data.idx_images import FASHION, IdxImages, read_idx

IMAGES, LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"


def idx(array, *, kind=8):
    head = bytes([0, 0, kind, array.ndim])
    return head + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def write(directory, *, train=11, test=3, size=(5, 7), packed=True):
    rng = np.random.default_rng(0)
    made = {}
    for part, rows in (("train", train), ("t10k", test)):
        made[part] = (
            rng.integers(0, 256, (rows, *size), np.uint8),
            np.arange(rows, dtype=np.uint8) % 10,
        )
        for name, array in zip((IMAGES, LABELS), made[part]):
            path = directory / f"{part}-{name}{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(idx(array)) if packed else idx(array))
    return made


@pytest.mark.parametrize("packed", (True, False))
def test_all_images_are_read_and_some_are_held_out(tmp_path, packed):
    (images, labels), (test_images, test_labels) = write(
        tmp_path, packed=packed
    ).values()
    splits = IdxImages(directory=tmp_path, validation=4).load()
    assert splits.sizes == {"height": 5, "width": 7, "channels": 1, "classes": 10}
    assert splits.names == tuple("0123456789")
    np.testing.assert_array_equal(splits.test["image"], test_images[..., None])
    np.testing.assert_array_equal(splits.test["label"], test_labels)
    assert len(splits.train["label"]) == 7 and len(splits.valid["label"]) == 4
    both = np.concatenate([splits.train["image"], splits.valid["image"]])
    order = np.concatenate([splits.train["label"], splits.valid["label"]])
    key = both.reshape(11, -1).tolist()
    assert sorted(key) == sorted(images.reshape(11, -1).tolist())
    assert sorted(order) == sorted(labels)


def test_the_seed_says_which_images_are_held_out(tmp_path):
    write(tmp_path)
    one, again, other = (
        IdxImages(directory=tmp_path, validation=4, seed=seed).load().valid["image"]
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


def test_names_of_classes_set_how_many_there_are(tmp_path):
    write(tmp_path, train=5)
    splits = IdxImages(directory=tmp_path, validation=1, names=FASHION).load()
    assert splits.names == FASHION and splits.sizes["classes"] == 10
    with pytest.raises(DataError, match="has the label 4, but names has 2 classes"):
        IdxImages(directory=tmp_path, validation=1, names=("a", "b")).load()


def fails(path, content, message, axes=3):
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_idx(path, axes)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_wrong_file_is_named_with_what_is_wrong(tmp_path):
    path, good = tmp_path / "x.gz", idx(np.zeros((2, 3, 4), np.uint8))
    packed = gzip.compress(good)
    fails(path, packed[:-9], "damaged gzip file")
    fails(path, gzip.compress(good[:-1]), "2 x 3 x 4 = 24 bytes .* holds 23")
    fails(path, gzip.compress(good + b"x"), "2 x 3 x 4 = 24 bytes .* holds 25")
    fails(path, packed, "3 axes; 1 are expected. Are images and labels", axes=1)
    fails(path, gzip.compress(b"hello"), "not an idx file of bytes: it begins with 68")
    fails(path, gzip.compress(good[:9]), "not an idx file")
    fails(path, gzip.compress(idx(np.zeros((2, 3, 4)), kind=14)), "not an idx file")
    fails(path, b"", "begins with nothing")
    fails(path, good, "not a gzip file")


def test_a_missing_file_is_named_with_what_is_there(tmp_path):
    write(tmp_path)
    (tmp_path / f"t10k-{LABELS}.gz").unlink()
    with pytest.raises(DataError, match=f"t10k-{LABELS}.* did you mean"):
        IdxImages(directory=tmp_path, validation=4).load()
    with pytest.raises(DataError, match="there is no directory"):
        IdxImages(directory=tmp_path / "none").load()


def test_images_and_labels_must_belong_together(tmp_path):
    write(tmp_path)
    path = tmp_path / f"train-{LABELS}.gz"
    path.write_bytes(gzip.compress(idx(np.zeros(9, np.uint8))))
    with pytest.raises(DataError, match="11 images and 9 labels"):
        IdxImages(directory=tmp_path, validation=4).load()


@pytest.mark.parametrize("validation", (0, 11, -1))
def test_images_are_left_to_train_on(tmp_path, validation):
    write(tmp_path)
    with pytest.raises(DataError, match=f"between 1 and 10, .* got {validation}"):
        IdxImages(directory=tmp_path, validation=validation).load()


def test_fashion_mnist_is_read(shared):
    splits = IdxImages(
        directory=shared / "data" / "fashion_mnist", names=FASHION
    ).load()
    parts = (splits.train, splits.valid, splits.test)
    assert [part["image"].shape for part in parts] == [
        (55_000, 28, 28, 1),
        (5_000, 28, 28, 1),
        (10_000, 28, 28, 1),
    ]
    assert splits.test["label"][:5].tolist() == [9, 2, 1, 1, 6]
