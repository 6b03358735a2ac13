"""Files that torch itself writes are read as torch reads them."""

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from qkv_jax.interop import InteropError
from qkv_jax.interop.torch_file import read_torch_file

pytestmark = pytest.mark.peers

KINDS = ["float32", "float64", "float16", "int64", "int32", "int16", "int8", "uint8"]
KINDS += ["bool", "complex64", "complex128"]
BITS = ["bfloat16", "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2"]


@pytest.fixture(params=[True, False], ids=["zip", "before-1.6"])
def saved(request, tmp_path):
    """Saves with torch, in both formats, and reads."""

    def save(content):
        path = tmp_path / "pytorch_model.bin"
        torch.save(content, path, _use_new_zipfile_serialization=request.param)
        return read_torch_file(path)

    return save


@pytest.mark.parametrize("kind", KINDS + BITS)
def test_every_type_of_number(saved, kind):
    content = torch.randn(5, 3).mul(20).abs()
    x = content.to(getattr(torch, kind))
    found = saved({"x": x, "scalar": x[0, 0].clone(), "none": x[:0].clone()})
    dtype = getattr(np, kind, None) or getattr(ml_dtypes, kind)
    assert found["x"].dtype == dtype
    assert found["x"].tobytes() == x.view(torch.uint8).numpy().tobytes()
    assert found["scalar"].shape == () and found["none"].shape == (0, 3)


def test_views_of_one_storage_and_parameters(saved):
    whole = torch.arange(60.0).reshape(3, 4, 5)
    views = {
        "whole": whole,
        "permuted": whole.permute(2, 0, 1),
        "part": whole[1:, ::2, 3],
        "one": whole[2, 3, 4],
        "parameter": torch.nn.Parameter(whole.transpose(0, 1)),
        "buffer": torch.arange(4).expand(1, -1),
    }
    found = saved(views)
    assert found.keys() == views.keys()
    for name, x in views.items():
        np.testing.assert_array_equal(found[name], x.detach().numpy())


def test_a_state_dict_with_its_metadata(saved):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    found = saved(module.state_dict())
    wanted = module.state_dict()
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        np.testing.assert_array_equal(found[name], x.numpy())
    inner = saved({"state_dict": module.state_dict(), "epoch": 3})
    assert inner.keys() == wanted.keys()


@pytest.mark.parametrize(
    "content",
    [
        torch.nn.Linear(2, 2),
        {"a": torch.nn.Linear(2, 2)},
        {"a": torch.float32},
        {"a": torch.device("cpu")},
        {"a": torch.eye(2).to_sparse()},
        {"a": torch.zeros(2).as_subclass(type("Odd", (torch.Tensor,), {}))},
    ],
    ids=["module", "inner module", "dtype", "device", "sparse", "subclass"],
)
def test_what_torch_unpickles_beside_tensors_is_refused(saved, content, request):
    kind = type(content["a"]) if isinstance(content, dict) else None
    if kind is not None and kind.__name__ == "Odd":
        kind.__module__, kind.__qualname__ = __name__, "Odd"
        request.getfixturevalue("monkeypatch").setitem(globals(), "Odd", kind)
    with pytest.raises(InteropError, match="holds more than tensors"):
        saved(content)
