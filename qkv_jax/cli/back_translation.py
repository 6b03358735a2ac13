"""The command that makes training pairs of text in the target language alone."""

import dataclasses
import sys
from pathlib import Path

from qkv_jax.cli.options import Search, check_language, load_model
from qkv_jax.cli.parsing import PROGRAM, UsageError, parse, write_lines


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackTranslate(Search):
    """Translates text of the target language back into the source language.

    Sennrich et al. 2016, arXiv 1511.06709. MODEL translates the other way round than the model that is
    to be trained. With --samples 1 sources are drawn instead of searched for, which taught more where
    text was plentiful (Edunov et al. 2018, arXiv 1808.09381).

    Attributes:
        input: text in the target language, a sentence a line, gzip or not; blank lines are left out.
        output: the pairs, "source TAB target", for `train --text.back-translated`: .tsv.
    """

    input: Path
    output: Path


def back_translate(arguments: list[str]) -> None:
    options = parse("back-translate", BackTranslate, arguments)
    from qkv_jax.data.files import read_lines

    if options.output.suffix != ".tsv":
        raise UsageError(f"--output must end in .tsv; got {options.output}")
    check_language(options)
    # A tab parts the two sides of a pair.
    lines = [line.replace("\t", " ").strip() for line in read_lines(options.input)]
    targets = [line for line in lines if line]
    if not targets:
        raise UsageError(f"{options.input} holds no sentences")
    translator = load_model(options)
    count = max(1, options.samples or 0)
    found = translator(targets, n_best=count)
    pairs = [
        (one.text.replace("\t", " ").strip(), target)
        for target, several in zip(targets, found)
        for one in several[:count]
    ]
    kept = [f"{source}\t{target}" for source, target in pairs if source]
    write_lines(options.output, kept)
    print(
        f"{PROGRAM}: {len(kept):,} pairs in {options.output}, of {len(targets):,} sentences; "
        f"train with --text.back-translated {options.output}",
        file=sys.stderr,
    )
