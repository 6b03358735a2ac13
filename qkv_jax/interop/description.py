"""What a checkpoint's weights are called and its settings, without the weights: kept by a run."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from qkv_jax.interop.errors import InteropError
from qkv_jax.interop.names import Place
from qkv_jax.interop.pretrained import Pretrained
from qkv_jax.layers import AttentionKind
from qkv_jax.models.seq2seq import Config

FILE = "pretrained.json"


def save_description(pretrained: Pretrained, directory: str | os.PathLike) -> None:
    """Writes pretrained.json: all but the weights, and what is computed anew or never read."""
    content = {
        "family": pretrained.family,
        "config": dataclasses.asdict(pretrained.config),
        "start": pretrained.start,
        "eos": pretrained.eos,
        "first": pretrained.first,
        "settings": pretrained.settings,
        "generation": pretrained.generation,
        "places": [list(place) for place in pretrained.places],
        "dtypes": {name: str(dtype) for name, dtype in pretrained.dtypes.items()},
    }
    file = Path(directory) / FILE
    temporary = file.with_name(FILE + ".tmp")
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)


def load_description(directory: str | os.PathLike) -> Pretrained | None:
    """What `save_description` wrote, with params None; None where it wrote nothing.

    Weights that replace those of the checkpoint are written in float32.

    Raises:
        InteropError: the file is damaged.
    """
    file = Path(directory) / FILE
    if not file.is_file():
        return None
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        content["config"] = _config(content["config"])
        content["places"] = tuple(Place(*place) for place in content["places"])
        content["dtypes"] = {name: np.dtype(np.float32) for name in content["dtypes"]}
        return Pretrained(**content, params=None, kept={})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InteropError(f"{file} is damaged ({error}): restore it.") from error


def _config(content: dict[str, Any]) -> Config:
    """A config from its fields in JSON's types, in which tuples are lists."""
    fields = dict(content)
    for side in ("encoder_attention", "decoder_attention"):
        if side in fields:
            fields[side] = AttentionKind(**_with_tuples(fields[side]))
    return Config(**_with_tuples(fields))


def _with_tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {n: tuple(x) if isinstance(x, list) else x for n, x in fields.items()}
