"""A model in, a cheaper model out: what `qkv-jax compress` does."""

import shutil
from pathlib import Path
from typing import Any

from qkv_jax import training
from qkv_jax.compression import Quantisation
from qkv_jax.interop import new_directory
from qkv_jax.models import seq2seq
from qkv_jax.translation.config import LanguageConfig
from qkv_jax.translation.models import FLOAT
from qkv_jax.translation.start import (
    NO_LANGUAGES,
    Checkpoint,
    Start,
    is_run,
    load_start,
    quantised,
    save_compressed,
)


def compress_model(
    model: str | Path,
    out: str | Path,
    how: Quantisation,
    *,
    checkpoint: Checkpoint | None = None,
    languages: LanguageConfig = NO_LANGUAGES,
) -> Start:
    """Writes a model with quantised weights, which `load_start` loads, and returns it.

    Args:
        model: directory of a run, or of an imported, published or pruned model, or a hub name.
        out: a new or empty directory.
        how: weights None: they are written as they are, without what training needs.
        checkpoint: of a run.
        languages: of a published model for several.

    Raises:
        InteropError, RunError: there is no such model, it cannot be quantised, or the directory
            is not free; nothing is written.
    """
    start = transformer(model, checkpoint=checkpoint, languages=languages)
    if start.quantisation not in (FLOAT, how) and how != FLOAT:
        raise training.RunError(
            f"{model} is quantised already, or trained to be, with "
            f"{_shown(start.quantisation)}: give the same options, or compress the model that it "
            "was made of."
        )
    start = start.in_float() if how == FLOAT else quantised(start, how)
    write(start, out, made_of=model, languages=languages)
    return start


def transformer(model: str | Path, **options: Any) -> Start:
    """A model that can be compressed; options as for `load_start`.

    Raises:
        RunError: it is a recurrent one.
    """
    start = load_start(model, **options)
    if not isinstance(start.model, seq2seq.Config):
        raise training.RunError(
            f"{model} is a recurrent model, and only Transformers are compressed: its cells "
            "multiply by their weights themselves, not through layers that can be replaced."
        )
    return start


def write(
    start: Start,
    out: str | Path,
    *,
    made_of: str | Path,
    languages: LanguageConfig,
) -> None:
    """Writes a model's directory; of a run, with its configuration, which knows its corpus."""
    with new_directory(out) as building:
        save_compressed(start, languages, building)
        if is_run(made_of):
            name = training.runs.CONFIG_FILE
            shutil.copy(Path(made_of) / name, building / name)
            # It is not for `train` to go on with.
            training.finish_run(building, {"made_of": Path(made_of).name})


def _shown(how: Quantisation) -> str:
    return ", ".join(f"{k} {v}" for k, v in vars(how).items() if v is not None)


def disk_bytes(directory: str | Path) -> int:
    """Bytes of all files of a directory."""
    return sum(x.stat().st_size for x in Path(directory).rglob("*") if x.is_file())
