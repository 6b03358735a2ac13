"""Several models of one shape in, one out, whose weights are a mean of theirs: `qkv-jax average`."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qkv_jax import training
from qkv_jax.translation.compress import write
from qkv_jax.translation.config import LanguageConfig
from qkv_jax.translation.models import FLOAT, ModelConfig
from qkv_jax.translation.start import (
    FREE,
    NO_LANGUAGES,
    Checkpoint,
    Start,
    load_start,
)

# What it was made of, beside an average.
AVERAGED = "averaged.json"


def average_models(
    models: Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    checkpoint: Checkpoint | None = None,
    languages: LanguageConfig = NO_LANGUAGES,
) -> Start:
    """Writes the mean of models that were trained from the same weights, and returns it.

    Between a model and a fine-tuning that did not go far from it lie models that know much of both
    texts (Wortsman et al. 2022, arXiv 2109.01903); the mean of several fine-tunings is often better
    than each (arXiv 2203.05482). Of models trained from weights of their own, the mean is noise.

    Args:
        models: two or more: directories of runs, of imported or pruned models, or hub names. The
            first gives the configuration: the corpus that `evaluate` takes, how to search.
        out: a new or empty directory, which `load_start` loads.
        weights: of each, not negative; their sum counts as 1. None: all the same.
        checkpoint: of runs.
        languages: of published models for several.

    Raises:
        ValueError: there are fewer than two models, or weights are not one for each.
        InteropError, RunError: a model is not there, is quantised, or has another shape or tokeniser
            than the first; or the directory is not free. Nothing is written.
    """
    shares = _shares(models, weights)
    starts = [load_start(x, checkpoint=checkpoint, languages=languages) for x in models]
    for name, start in zip(models, starts):
        _check_fits(starts[0], start, models[0], name)
    arrays = [
        _mean(leaves, shares)
        for leaves in zip(*(jax.tree.leaves(x.params) for x in starts))
    ]
    params = jax.tree.unflatten(jax.tree.structure(starts[0].params), arrays)
    pretrained = starts[0].pretrained
    if pretrained is not None:
        pretrained = dataclasses.replace(pretrained, params=params)
    start = starts[0]._replace(params=params, pretrained=pretrained)
    content = {"models": [Path(x).name for x in models], "weights": shares}
    write(
        start, out, made_of=models[0], languages=languages, beside={AVERAGED: content}
    )
    return start


def _shares(
    models: Sequence[str | Path], weights: Sequence[float] | None
) -> list[float]:
    if len(models) < 2:
        raise ValueError(f"models must be two or more; got {len(models)}.")
    if weights is None:
        return [1 / len(models)] * len(models)
    if len(weights) != len(models):
        raise ValueError(
            f"weights must be one for each of the {len(models)} models; got {len(weights)}."
        )
    total = math.fsum(weights)
    if min(weights) < 0 or not 0 < total < math.inf:
        raise ValueError(
            f"weights must not be negative, nor all 0; got {', '.join(map(str, weights))}."
        )
    return [weight / total for weight in weights]


def _mean(arrays: Sequence[jax.Array], shares: Sequence[float]) -> jax.Array:
    """Summed in float64; an array that has share 1 stays as it is to the bit."""
    terms = [x * np.asarray(a, np.float64) for x, a in zip(shares, arrays) if x]
    return jnp.asarray(sum(terms), arrays[0].dtype)


def _check_fits(
    first: Start, other: Start, first_name: str | Path, name: str | Path
) -> None:
    if other.quantisation != FLOAT:
        raise training.RunError(
            f"{name} is quantised, or trained to be: average what it was made of, and compress "
            "the mean."
        )
    apart = _differences(first.model, other.model)
    if apart:
        raise training.RunError(
            f"{name} has another shape than {first_name} ({', '.join(apart)}): only models of one "
            "shape, trained from the same weights, have a mean. Others of one tokeniser can decide "
            "together: --ensemble."
        )
    if other.tokenizer.digest != first.tokenizer.digest:
        raise training.RunError(
            f"{name} has another tokeniser than {first_name}, so that rows of their embeddings are "
            "of different words: only models trained from the same weights have a mean."
        )


def _differences(first: ModelConfig, other: ModelConfig) -> list[str]:
    """Fields that change what weights mean, and in which two models differ."""
    if type(first) is not type(other):
        return ["another kind of model"]
    mine: dict[str, Any] = training.to_plain(first)
    theirs: dict[str, Any] = training.to_plain(other)
    return [x for x in mine if x not in FREE and mine[x] != theirs[x]]
