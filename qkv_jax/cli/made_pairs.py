"""Commands that make training pairs with a model: of target text alone, or of a teacher's output."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qkv_jax.cli.options import Search, check_language, load_model, own_data
from qkv_jax.cli.parsing import PROGRAM, UsageError, parse, write_lines

# What people write stays below it: `qkv_jax.data.compression_ratio` has the numbers.
MOST_COMPRESSION = 2.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackTranslate(Search):
    """Translates text of the target language back into the source language.

    Sennrich et al. 2016, arXiv 1511.06709. MODEL translates the other way round than the model that is
    to be trained. With --samples 1 sources are drawn instead of searched for, which taught more where
    text was plentiful (Edunov et al. 2018, arXiv 1808.09381).

    Attributes:
        input: text in the target language, a sentence a line, gzip or not; blank lines are left out.
        output: the pairs, "source TAB target", for `train --text.back-translated`: a new .tsv. A call
            that was killed is gone on with by the same call.
    """

    input: Path
    output: Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distil(Search):
    """Translates training sources with a teacher, for a smaller model to learn from.

    Sequence-level distillation, Kim and Rush 2016, arXiv 1606.07947, section 3.2: the student is
    trained on what the teacher's search finds, in place of the references, or beside them with
    `train --text.keep-references`. MODEL is the teacher; with --ensemble, several are. Word-level
    distillation needs no such file: `train --distillation.teacher MODEL`; both go together.

    Attributes:
        output: the pairs, "source TAB target", for `train --text.distilled`: a new .tsv. A call that
            was killed is gone on with by the same call.
        input: sources, a sentence a line, gzip or not; default the training part of the teacher's
            own corpus. Each is translated once, however often it is there.
    """

    output: Path
    input: Path | None = None


def back_translate(arguments: list[str]) -> None:
    options = parse("back-translate", BackTranslate, arguments)
    _check_output(options.output)
    check_language(options)
    targets = _sentences(options.input)
    made = _made(options, targets)
    pairs = [(text, target) for target, texts in zip(targets, made) for text in texts]
    _write(options, pairs, len(targets), "--text.back-translated")


def distil(arguments: list[str]) -> None:
    options = parse("distil", Distil, arguments)
    _check_output(options.output)
    if options.input is not None:
        check_language(options)
        sources = _sentences(options.input)
    else:
        # Those of a run for several languages carry their tags.
        corpus = own_data(options, options.model).load()
        sources = _in_one_line(source for source, _ in corpus.train)
    sources = list(dict.fromkeys(sources))
    made = _made(options, sources)
    pairs = [(source, text) for source, texts in zip(sources, made) for text in texts]
    _write(options, pairs, len(sources), "--text.distilled")


def _check_output(output: Path) -> None:
    """Before hours of work."""
    if output.suffix != ".tsv":
        raise UsageError(f"--output must end in .tsv; got {output}")
    if output.exists():
        raise UsageError(
            f"{output} is there already, and is left as it is: choose another --output, or remove it"
        )
    if not output.parent.is_dir():
        raise UsageError(f"--output lies in {output.parent}, which is no directory")


def _sentences(file: Path) -> list[str]:
    from qkv_jax.data.files import read_lines

    found = _in_one_line(read_lines(file))
    if not found:
        raise UsageError(f"{file} holds no sentences")
    return found


def _in_one_line(texts: Any) -> list[str]:
    # A tab parts the two sides of a pair.
    lines = [" ".join(text.replace("\t", " ").splitlines()).strip() for text in texts]
    return [line for line in lines if line]


def _made(options: BackTranslate | Distil, texts: Sequence[str]) -> list[list[str]]:
    """What the model makes of each text: one translation, or all samples, none of them empty."""
    from qkv_jax.translation.resumable import translate_resumably

    def say(done: int) -> None:
        print(f"{PROGRAM}: {done:,} of {len(texts):,} sentences", file=sys.stderr)

    found = translate_resumably(
        load_model(options),
        texts,
        _part(options.output),
        count=max(1, options.samples or 0),
        say=say,
    )
    return [_in_one_line(several) for several in found]


def _part(output: Path) -> Path:
    return output.with_name(output.name + ".part")


def _write(
    options: BackTranslate | Distil,
    pairs: Sequence[tuple[str, str]],
    sentences: int,
    option: str,
) -> None:
    whole = options.output.with_name(options.output.name + ".tmp")
    write_lines(whole, [f"{source}\t{target}" for source, target in pairs])
    whole.replace(options.output)
    _warn_of_loops(options.output, pairs)
    _part(options.output).unlink(missing_ok=True)
    print(
        f"{PROGRAM}: {len(pairs):,} pairs in {options.output}, of {sentences:,} sentences; "
        f"train with {option} {options.output}",
        file=sys.stderr,
    )


def _warn_of_loops(output: Path, pairs: Sequence[tuple[str, str]]) -> None:
    from qkv_jax.data import compression_ratio

    loops = [
        number
        for number, pair in enumerate(pairs, 1)
        if max(map(compression_ratio, pair)) > MOST_COMPRESSION
    ]
    if loops:
        print(
            f"{PROGRAM}: {len(loops):,} of {len(pairs):,} pairs repeat themselves, as in line {loops[0]} "
            f"of {output}; --text.filters.max-compression-ratio {MOST_COMPRESSION} trains without them",
            file=sys.stderr,
        )
