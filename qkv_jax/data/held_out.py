"""Text to score translations on: files, or the test sets that sacreBLEU knows."""

import difflib
import os
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qkv_jax.data.errors import DataError
from qkv_jax.data.parallel import Pair, read_pairs


class HeldOut(NamedTuple):
    """Sentences and their references.

    Attributes:
        sources: one a sentence.
        references: one or more lists, each with a reference for each sentence.
    """

    sources: list[str]
    references: list[list[str]]

    @classmethod
    def of_pairs(cls, pairs: Sequence[Pair]) -> "HeldOut":
        """(source, reference) pairs."""
        return cls([pair[0] for pair in pairs], [[pair[1] for pair in pairs]])


def read_held_out(
    source: str | os.PathLike[str], references: Sequence[str | os.PathLike[str]]
) -> HeldOut:
    """Sentences of a file, and their references of one or more, a line each.

    Raises:
        DataError: as `read_pairs`.
    """
    read = [read_pairs(source, reference) for reference in references]
    return HeldOut(
        [pair[0] for pair in read[0]], [[pair[1] for pair in pairs] for pairs in read]
    )


def read_sacrebleu_set(name: str, pair: str) -> HeldOut:
    """A test set that sacreBLEU knows, downloaded by it where it is not in its cache.

    The text is as its command line reads it, so that scores are the same.

    Args:
        name: such as "wmt17"; several, "wmt17,wmt18", follow one another.
        pair: languages, such as "en-de".

    Raises:
        DataError: sacreBLEU knows no such set or pair; or it is not in the cache and cannot be
            downloaded.
    """
    parts = [_read_one(part, pair) for part in name.split(",")]
    streams = min(len(part.references) for part in parts)
    return HeldOut(
        [line for part in parts for line in part.sources],
        [[x for part in parts for x in part.references[i]] for i in range(streams)],
    )


def _read_one(name: str, pair: str) -> HeldOut:
    from sacrebleu.dataset import (
        DATASETS,
    )  # Imported here: it takes a tenth of a second.

    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=3)
        hint = f": did you mean {' or '.join(near)}?" if near else ""
        raise DataError(
            f"sacreBLEU knows no test set {name!r}{hint or '; `sacrebleu --list` lists them'}"
        )
    known = DATASETS[name]
    if pair not in known.langpairs:
        raise DataError(
            f"sacreBLEU's {name} has no pair {pair!r}: it has {', '.join(known.langpairs)}"
        )
    # SystemExit: how sacreBLEU answers a download whose checksum is wrong.
    try:
        source = known.get_source_file(pair)
        references = known.get_reference_files(pair)
    except (OSError, SystemExit, tarfile.TarError, zipfile.BadZipFile) as error:
        raise DataError(_not_there(known, pair, error)) from None
    return HeldOut(_lines(source), [_lines(file) for file in references])


def _not_there(known: Any, pair: str, error: BaseException) -> str:
    place = Path(known._outdir)
    why = getattr(error, "reason", None) or error
    return (
        f"sacreBLEU's {known.name} is not in its cache {place.parent} and cannot be downloaded "
        f"({why}): run `sacrebleu -t {known.name} -l {pair} --echo src` where there is a network and "
        f"copy its directory {known.name} here (SACREBLEU says where the cache lies), or give files"
    )


def _lines(file: str) -> list[str]:
    # Only a line feed ends a line, and spaces at its end go, as in sacreBLEU's command line.
    lines = Path(file).read_text(encoding="utf-8").split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.rstrip() for line in lines]
