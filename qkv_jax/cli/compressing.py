"""Commands that make a model of models: a cheaper one, or a mean."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import tyro

from qkv_jax.cli.options import checkpoint_of
from qkv_jax.cli.parsing import PROGRAM, UsageError, parse


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compress:
    """Writes a model with weights of 8 or 4 bits, which every command takes.

    Attributes:
        model: directory of a run, of an imported, published or pruned model, or a hub name.
        out: new directory.
        weights: of linear layers and embeddings; "float32" writes them as they are, without what
            training needs.
        activations: "int8": products are of integers, with a scale a token found as it comes.
        group: inputs that share a scale; default 32 of int4, and all of int8.
        checkpoint: of a run: a step, "best", "latest" or "average".
        source_language, target_language: of a model for several.
        source_prefix: text before every source.
    """

    model: tyro.conf.Positional[str]
    out: tyro.conf.Positional[Path]
    weights: Literal["float32", "int8", "int4"]
    activations: Literal["int8"] | None = None
    group: int | None = None
    checkpoint: str | None = None
    source_language: str | None = None
    target_language: str | None = None
    source_prefix: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prune:
    """Writes a smaller model, which every command takes, `train FILE --init-from OUT` first.

    Attributes:
        model: directory of a run, of an imported, published or pruned model, or a hub name.
        out: new directory.
        heads: share of all attention heads that is removed, the least important first.
        even_heads: each layer loses the same share (CTranslate2 and transformers need that).
        norm_in_layer: importance has norm 1 in each layer, as in Michel et al. 2019: all layers
            matter as much. Else one that matters little loses more heads than others.
        gates: in the place of a share: the heads that training with --gates.penalty has closed.
        feed_forward: share of the units of each feed-forward layer that is removed.
        encoder_layers, decoder_layers: how many layers stay, those whose absence costs most.
        source, reference: files of sentences to measure importance on; default the run's
            validation text.
        checkpoint: of a run: a step, "best", "latest" or "average".
        source_language, target_language: of a model for several.
        source_prefix: text before every source.
    """

    model: tyro.conf.Positional[str]
    out: tyro.conf.Positional[Path]
    heads: float = 0.0
    even_heads: bool = False
    norm_in_layer: bool = False
    gates: bool = False
    feed_forward: float = 0.0
    encoder_layers: int | None = None
    decoder_layers: int | None = None
    source: Path | None = None
    reference: Path | None = None
    checkpoint: str | None = None
    source_language: str | None = None
    target_language: str | None = None
    source_prefix: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Average:
    """Writes the mean of models that were trained from the same weights, which every command takes.

    Between a model and a fine-tuning that did not go far from it lie models that know much of both
    texts (Wortsman et al. 2022, arXiv 2109.01903). For checkpoints of one run there is `train
    --training.average`; for models that have only their tokeniser in common, --ensemble.

    Attributes:
        models: two or more: directories of runs, of imported, published or pruned models, or hub
            names; the first gives the corpus that `evaluate` takes, and how to search.
        output: new directory.
        weights: of each; their sum counts as 1. Default: all the same.
        checkpoint: of runs: a step, "best", "latest" or "average".
        source_language, target_language: of models for several.
        source_prefix: text before every source.
    """

    models: tyro.conf.Positional[tuple[str, ...]]
    output: Path
    weights: tuple[float, ...] | None = None
    checkpoint: str | None = None
    source_language: str | None = None
    target_language: str | None = None
    source_prefix: str | None = None


def average(arguments: list[str]) -> None:
    options = parse("average", Average, arguments)
    from qkv_jax.translation.average import average_models

    try:
        start = average_models(
            options.models, options.output, weights=options.weights, **_of(options)
        )
    except ValueError as error:
        raise UsageError(str(error)) from None
    _say(start, options.output)


def prune(arguments: list[str]) -> None:
    options = parse("prune", Prune, arguments)
    from qkv_jax.compression import Pruning
    from qkv_jax.data import read_pairs
    from qkv_jax.translation.compress import prune_model

    if (options.source is None) != (options.reference is None):
        raise UsageError("--source and --reference go together")
    names = [field.name for field in dataclasses.fields(Pruning)]
    try:
        what = Pruning(**{name: getattr(options, name) for name in names})
    except ValueError as error:
        raise UsageError(str(error)) from None
    pairs = options.source and read_pairs(options.source, options.reference)
    start = prune_model(options.model, options.out, what, pairs=pairs, **_of(options))
    by_layer = getattr(start.model, "heads_by_layer", None)
    if by_layer is not None:
        print(f"heads by layer: {' '.join(map(str, by_layer))}")
    _say(start, options.out)


def _of(options: Average | Compress | Prune) -> dict[str, Any]:
    """Which model, of a run or of several languages."""
    from qkv_jax.translation import LanguageConfig

    return {
        "checkpoint": checkpoint_of(options.checkpoint),
        "languages": LanguageConfig(
            source=options.source_language,
            target=options.target_language,
            prefix=options.source_prefix or "",
        ),
    }


def compress(arguments: list[str]) -> None:
    options = parse("compress", Compress, arguments)
    from qkv_jax.compression import Quantisation
    from qkv_jax.translation.compress import compress_model

    weights = None if options.weights == "float32" else options.weights
    try:
        how = Quantisation(
            weights=weights, activations=options.activations, group=options.group
        )
    except ValueError as error:
        raise UsageError(f"--{error}") from None
    start = compress_model(options.model, options.out, how, **_of(options))
    _say(start, options.out)


def _say(start, out: Path) -> None:
    from qkv_jax.translation.compress import disk_bytes
    from qkv_jax.translation.models import param_count
    from qkv_jax.translation.start import WEIGHTS

    print(
        f"{param_count(start.model):,} parameters, {disk_bytes(out / WEIGHTS):,} bytes of weights"
    )
    print(f'try: {PROGRAM} translate {out} "..."')
