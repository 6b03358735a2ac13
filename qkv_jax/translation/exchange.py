"""Models out, for other software."""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from qkv_jax.data import Tokenizer
from qkv_jax.interop import (
    Agreement,
    InteropError,
    Trained,
    Vocabularies,
    export_ctranslate2,
    export_huggingface,
    generation_settings,
    new_directory,
    save,
    verify,
)
from qkv_jax.layers import AttentionKind
from qkv_jax.models import seq2seq
from qkv_jax.translation.config import LanguageConfig
from qkv_jax.translation.start import NO_LANGUAGES, Checkpoint, Start, load_start

Format = Literal["hf", "ctranslate2"]


def export_model(
    model: str | Path,
    out: str | Path,
    *,
    to: Format,
    quantization: str | None = None,
    checkpoint: Checkpoint | None = None,
    languages: LanguageConfig = NO_LANGUAGES,
) -> Start:
    """Writes a model for other software, and returns it.

    Args:
        model: directory of a run, or of an imported or published model, or a hub name.
        out: a new or empty directory.
        to: "hf", a directory that `transformers` loads; "ctranslate2".
        quantization: of the weights for CTranslate2, such as "int8"; None: float32.
        checkpoint: of a run.
        languages: of a published model for several.

    Raises:
        InteropError, RunError: there is no such model, the format cannot express it, or the
            directory is not free; nothing is written.
    """
    if to == "hf" and quantization is not None:
        raise InteropError(
            "quantization is of CTranslate2: export to it, or leave it out."
        )
    start = load_start(model, checkpoint=checkpoint, languages=languages).in_float()
    with tempfile.TemporaryDirectory() as temporary:
        start.tokenizer.save(temporary)
        files = sorted(Path(temporary).iterdir())
        if to == "hf":
            _export_huggingface(start, out, files)
        else:
            export_ctranslate2(
                weights(start),
                vocabularies(start),
                out,
                quantization=quantization,
                forbidden=start.tokenizer.never,
                files=files,
            )
    return start


def check_export(
    start: Start, directory: str | Path, sentences: Sequence[str]
) -> Agreement:
    """Compares a model with the CTranslate2 directory that was made of it, on some sentences."""
    sources = start.tokenizer.encode_source(
        [text for text in sentences if text.strip()]
    )
    longest = start.decoding.max_source
    sources = [ids for ids in sources if len(ids) <= longest]
    if not sources:
        raise InteropError(
            f"there is no sentence of at most {longest} tokens to compare on: give some."
        )
    return verify(
        weights(start),
        directory,
        sources,
        alpha=start.decoding.alpha,
        forbidden=start.tokenizer.never,
    )


def weights(start: Start) -> Any:
    """The model as the exporters take it."""
    tokenizer = start.tokenizer
    first = tokenizer.prefix[0] if tokenizer.prefix else None
    if start.pretrained is not None:
        return dataclasses.replace(
            start.pretrained, start=tokenizer.start, eos=tokenizer.eos, first=first
        )
    if not isinstance(start.model, seq2seq.Config):
        raise InteropError(
            "a recurrent model has no place in the formats of transformers and CTranslate2"
        )
    for side in ("encoder_attention", "decoder_attention"):
        kind = getattr(start.model, side)
        if kind != AttentionKind():
            what = "shared keys and values" if kind.name == "softmax" else kind.name
            raise InteropError(
                f"{side} of {what} has no place in the formats of transformers and CTranslate2"
            )
    return Trained(
        config=start.model,
        params=start.params,
        start=tokenizer.start,
        eos=tokenizer.eos,
        first=first,
    )


def vocabularies(start: Start) -> Vocabularies:
    """The piece of every id."""
    tokenizer = start.tokenizer
    return Vocabularies(
        tokenizer.source_pieces(range(tokenizer.source_size)),
        tokenizer.target_pieces(range(tokenizer.target_size)),
    )


def _export_huggingface(start: Start, out: str | Path, files: Sequence[Path]) -> None:
    if start.pretrained is not None:
        with new_directory(out) as building:
            save(start.pretrained, building)
            for file in files:
                (building / file.name).write_bytes(file.read_bytes())
        return
    if not isinstance(start.tokenizer, Tokenizer):
        raise InteropError(
            "a pruned model with a published tokeniser is written for CTranslate2 alone: give "
            "--to ctranslate2."
        )
    model, decoding = weights(start), start.decoding
    export_huggingface(
        model,
        out,
        tokenizer=files[0].read_bytes(),
        generation=generation_settings(
            model,
            beams=decoding.beams,
            alpha=decoding.alpha,
            max_length=decoding.max_length,
            exact=decoding.exact,
            forbidden=start.tokenizer.never,
        ),
        longest=decoding.max_source,
    )
