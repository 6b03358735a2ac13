"""A published model, wherever it is and whoever wrote it, as a directory of its own."""

import os
import tempfile
from collections.abc import Collection
from pathlib import Path

from qkv_jax.interop.directory import check_free, new_directory
from qkv_jax.interop.hub import fetch
from qkv_jax.interop.marian_npz import convert_marian, is_marian_npz
from qkv_jax.interop.pieces import Files
from qkv_jax.interop.pretrained import Pretrained, load, save
from qkv_jax.interop.vocabularies import read_vocabulary


def import_published(
    name_or_directory: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    revision: str | None = None,
    ignore: Collection[str] = (),
) -> Pretrained:
    """Writes a published model as `load` and `load_tokenizer` read it, and returns it.

    Weights become model.safetensors, with the names, shapes and types that they had; a tokeniser
    keeps its files byte for byte. Models of the Marian toolkit (.npz) become Hugging Face ones.

    Args:
        name_or_directory: a directory, or a name on the hub; see `fetch`.
        out: a new or empty directory; it appears whole or not at all.
        revision: of the hub.
        ignore: keys of config.json that are known not to change what is computed.

    Raises:
        InteropError: there is no such model, it is damaged, its tokeniser is missing, or it is
            none that can be taken.
    """
    check_free(Path(out))
    directory = fetch(name_or_directory, revision=revision)
    with tempfile.TemporaryDirectory() as temporary:
        if is_marian_npz(directory):
            convert_marian(directory, Path(temporary) / "model")
            directory = Path(temporary) / "model"
        model = load(directory, ignore=ignore)
        files = Files(directory)
        read_vocabulary(files, model.family, model.settings)
        with new_directory(out) as building:
            save(model, building)
            files.write(building)
    return model
