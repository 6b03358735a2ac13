"""Commands that make models cheaper."""

import dataclasses
from pathlib import Path
from typing import Literal

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


def compress(arguments: list[str]) -> None:
    options = parse("compress", Compress, arguments)
    from qkv_jax.compression import Quantisation
    from qkv_jax.translation import LanguageConfig
    from qkv_jax.translation.compress import compress_model

    weights = None if options.weights == "float32" else options.weights
    try:
        how = Quantisation(
            weights=weights, activations=options.activations, group=options.group
        )
    except ValueError as error:
        raise UsageError(f"--{error}") from None
    start = compress_model(
        options.model,
        options.out,
        how,
        checkpoint=checkpoint_of(options.checkpoint),
        languages=LanguageConfig(
            source=options.source_language,
            target=options.target_language,
            prefix=options.source_prefix or "",
        ),
    )
    _say(start, options.out)


def _say(start, out: Path) -> None:
    from qkv_jax.translation.compress import disk_bytes
    from qkv_jax.translation.models import param_count
    from qkv_jax.translation.start import WEIGHTS

    print(
        f"{param_count(start.model):,} parameters, {disk_bytes(out / WEIGHTS):,} bytes of weights"
    )
    print(f'try: {PROGRAM} translate {out} "..."')
