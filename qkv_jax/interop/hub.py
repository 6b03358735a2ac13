"""Models of the Hugging Face hub as directories (extra `hub`)."""

import os
import re
from pathlib import Path
from typing import Any

from qkv_jax.interop.errors import InteropError

# Nothing that runs: configurations, vocabularies and weights. A pytorch_model.bin, which is read
# without unpickling, is only fetched where a model has no safetensors.
DATA = [
    "*.json",
    "*.txt",
    "*.spm",
    "*.model",
    "model.safetensors",
    "model-*.safetensors",
]
TORCH = ["pytorch_model.bin", "pytorch_model-*.bin"]
NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def fetch(
    name_or_directory: str | os.PathLike[str], *, revision: str | None = None
) -> Path:
    """The directory of a model: itself, or the one that a model of the hub is downloaded to.

    Args:
        name_or_directory: an existing directory, or a name such as "Helsinki-NLP/opus-mt-en-de".
        revision: branch, tag or commit on the hub; None: its main branch.

    Raises:
        InteropError: there is neither, the hub cannot be reached, or `huggingface_hub` is not
            installed.
    """
    directory, name = Path(name_or_directory), os.fspath(name_or_directory)
    if directory.is_dir():
        if revision is not None:
            raise InteropError(f"{directory} is a directory: it has no revision.")
        return directory
    if directory.exists() or not NAME.fullmatch(name):
        raise InteropError(
            f"{name} is no directory, and no name of a model on the hub."
        )
    try:
        import huggingface_hub
    except ImportError:
        raise InteropError(
            f"there is no directory {name}; fetching it from the hub needs huggingface_hub: "
            "pip install 'qkv_jax[hub]'."
        ) from None
    path = _download(huggingface_hub, name, revision, DATA)
    if not any(path.glob("*.safetensors")):
        path = _download(huggingface_hub, name, revision, TORCH)
    return path


def _download(hub: Any, name: str, revision: str | None, patterns: list[str]) -> Path:
    try:
        return Path(
            hub.snapshot_download(
                name,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=["*/*"],
            )
        )
    except (OSError, ValueError) as error:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        raise InteropError(_why(name, revision, error, kinds)) from error


def _why(name: str, revision: str | None, error: Exception, kinds: set[str]) -> str:
    """One line for each way that a download fails."""
    if "GatedRepoError" in kinds:
        return f"{name} is only given out to those who accept its terms, on huggingface.co/{name}."
    if "RepositoryNotFoundError" in kinds:
        return (
            f"there is no directory {name}, and no such model on the hub, or it is private: set "
            "HF_TOKEN then."
        )
    if "RevisionNotFoundError" in kinds:
        return f"{name} has no revision {revision!r} on the hub."
    if kinds & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError"}:
        return (
            f"there is no directory {name}; the hub cannot be reached, and {name} was not "
            "downloaded before."
        )
    return f"{name} cannot be downloaded: {str(error).partition(chr(10))[0]}"
