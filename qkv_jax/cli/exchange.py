"""Commands that take models in and write them out for other software."""

import dataclasses
import sys
from pathlib import Path
from typing import Literal

import tyro

from qkv_jax.cli.options import checkpoint_of
from qkv_jax.cli.parsing import PROGRAM, UsageError, parse, read_lines

SENTENCES = 100
# Of log-probabilities in float32.
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Import:
    """Checks a published translation model, and writes it as a directory that every command takes.

    Attributes:
        model: directory of a Hugging Face model or of the Marian toolkit (.npz), or a hub name.
        out: new directory.
        revision: branch, tag or commit on the hub.
        ignore: keys of its config.json that are known not to change what is computed.
    """

    model: tyro.conf.Positional[str]
    out: tyro.conf.Positional[Path]
    revision: str | None = None
    ignore: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Writes a model for `transformers` or CTranslate2.

    Attributes:
        model: directory of a run, of an imported or published model, or a hub name.
        out: new directory.
        to: "hf": a directory that `transformers` loads; "ctranslate2": one for its Translator.
        quantization: of the weights for CTranslate2: int8, int16, float16, bfloat16, float32.
        verify: compare what was written for CTranslate2 with the model: log-probabilities and
            beam outputs.
        input: file with sentences to compare on; default some of the run's held-out text.
        checkpoint: of a run: a step, "best", "latest" or "average".
        source_language, target_language: of a model for several.
        source_prefix: text before every source.
    """

    model: tyro.conf.Positional[str]
    out: tyro.conf.Positional[Path]
    to: Literal["hf", "ctranslate2"]
    quantization: str | None = None
    verify: bool = False
    input: Path | None = None
    checkpoint: str | None = None
    source_language: str | None = None
    target_language: str | None = None
    source_prefix: str | None = None


def import_model(arguments: list[str]) -> None:
    options = parse("import", Import, arguments)
    import jax

    from qkv_jax.interop import import_published

    found = import_published(
        options.model, options.out, revision=options.revision, ignore=options.ignore
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(found.params))
    print(f"{found.family}: {count:,} parameters, {len(found.dtypes)} tensors")
    print(f'try: {PROGRAM} translate {options.out} "..."')


def export(arguments: list[str]) -> None:
    options = parse("export", Export, arguments)
    from qkv_jax.translation import LanguageConfig, exchange

    if options.verify and options.to != "ctranslate2":
        raise UsageError(
            "--verify is of --to ctranslate2; what is written for hf is exact"
        )
    sentences = _sentences(options) if options.verify else []
    start = exchange.export_model(
        options.model,
        options.out,
        to=options.to,
        quantization=options.quantization,
        checkpoint=checkpoint_of(options.checkpoint),
        languages=LanguageConfig(
            source=options.source_language,
            target=options.target_language,
            prefix=options.source_prefix or "",
        ),
    )
    print(options.out)
    if start.decoding.length_penalty == "gnmt":
        print(
            f'{PROGRAM}: the length penalty "gnmt" is not known there: its scores are divided by '
            "a power of the length",
            file=sys.stderr,
        )
    if options.verify:
        found = exchange.check_export(start, options.out, sentences)
        print(found)
        exact = options.quantization in (None, "float32")
        if exact and found.max_difference > TOLERANCE:
            raise UsageError(
                f"{options.out} differs from the model by more than {TOLERANCE}: do not use it"
            )


def _sentences(options: Export) -> list[str]:
    from qkv_jax.translation import is_run, read_run

    if options.input is not None:
        return read_lines(options.input)
    if not is_run(options.model):
        raise UsageError(
            f"--verify needs sentences, and {options.model} is no run, which has some: "
            "give a file of them by --input"
        )
    corpus = read_run(options.model).data.load()
    pairs = (corpus.test or corpus.valid or corpus.train)[:SENTENCES]
    return [source for source, _ in pairs]
