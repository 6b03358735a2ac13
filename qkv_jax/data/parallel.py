"""Parallel text: two files, TSV, JSONL, gzip of each, or a directory of these."""

import dataclasses
import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

from qkv_jax.data.errors import DataError
from qkv_jax.data.files import missing_file, read_lines

Pair = tuple[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """The three parts of a parallel corpus, as (source, target) sentences.

    Attributes:
        train: the pairs to learn from.
        valid: held out, to choose checkpoints by; may be empty.
        test: held out, to report on; may be empty.
        report: what was read and dropped; prints as one line. None: nothing to say.
        symbols: texts that are one piece each of the vocabulary, such as tags of languages.
    """

    train: list[Pair]
    valid: list[Pair]
    test: list[Pair]
    report: object | None = None
    symbols: tuple[str, ...] = ()


_TSV = {".tsv", ".tab", ".txt"}
_JSONL = {".jsonl", ".ndjson", ".json"}
_SPLITS = (
    {"train", "training"},
    {"valid", "val", "dev", "validation"},
    {"test"},
)


def read_pairs(
    source: str | PathLike[str],
    target: str | PathLike[str] | None = None,
    *,
    languages: tuple[str, str] | None = None,
    split: str = "train",
) -> list[Pair]:
    """Return the (source, target) sentence pairs of a corpus, in file order.

    Args:
        source: a text file with one sentence a line; or, without `target`, a TSV
            file (`source TAB target`), a JSONL file, or a directory of any of
            these. Each may be gzip.
        target: the text file whose line i translates line i of `source`.
        languages: (source, target) codes: the keys of JSONL records that do not
            say "source" and "target", and the endings of file names in a directory.
        split: which part of a directory: "train", "valid" ("val", "dev" and
            "validation" are the same) or "test", or the exact first part of a file
            name such as "test_2016_flickr".

    Raises:
        DataError: a file is missing, empty, not UTF-8, malformed (with the line
            number) or of another length than its partner; a directory holds no or
            several corpora for the split.
    """
    source = Path(source)
    if target is None and source.is_dir():
        source, target = _find_split(source, split, languages)
    if target is not None:
        pairs = _read_two_files(source, Path(target))
    elif _kind(source) in _TSV:
        pairs = _read_tsv(source)
    elif _kind(source) in _JSONL:
        pairs = _read_jsonl(source, languages)
    elif not source.exists():
        raise missing_file(source)
    else:
        raise DataError(
            f"{source} holds one side only: give the file of translations too, "
            f"or one file that ends in .tsv or .jsonl"
        )
    if not pairs:
        raise DataError(f"{source} holds no sentences")
    return pairs


def record_pair(
    record: object, languages: tuple[str, str] | None, *, where: str
) -> Pair:
    """Return the pair that a JSON object or a hub row holds.

    The object, or the object under its key "translation", has the two language
    codes as keys, or else "source" and "target".
    """
    if isinstance(record, Mapping) and isinstance(record.get("translation"), Mapping):
        record = record["translation"]
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: expected an object with a source and a target")
    for keys in (languages, ("source", "target")):
        if keys and all(isinstance(record.get(key), str) for key in keys):
            return record[keys[0]], record[keys[1]]
    wanted = " and ".join(languages or ("source", "target"))
    found = ", ".join(map(str, record)) or "none"
    raise DataError(
        f"{where}: expected text under {wanted}; found the keys {found}. "
        f"Name two of them as languages"
    )


def _kind(path: Path) -> str:
    """Return the suffix that tells the format, below a .gz."""
    return Path(path.stem if path.suffix == ".gz" else path.name).suffix.lower()


def _read_two_files(source: Path, target: Path) -> list[Pair]:
    sources, targets = read_lines(source), read_lines(target)
    if len(sources) != len(targets):
        raise DataError(
            f"{source} has {len(sources):,} lines but {target} has "
            f"{len(targets):,}; line i of one must translate line i of the other"
        )
    return list(zip(sources, targets))


def _read_tsv(path: Path) -> list[Pair]:
    pairs = []
    for number, line in enumerate(read_lines(path), start=1):
        fields = line.split("\t")
        if len(fields) != 2:
            raise DataError(
                f"{path}, line {number}: expected source TAB target, "
                f"got {len(fields)} fields; keep two, for example with cut -f1,2"
            )
        pairs.append((fields[0], fields[1]))
    return pairs


def _read_jsonl(path: Path, languages: tuple[str, str] | None) -> list[Pair]:
    pairs = []
    for number, line in enumerate(read_lines(path), start=1):
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not a JSON object: {error.msg}") from None
        pair = record_pair(record, languages, where=where)
        try:
            "".join(pair).encode()
        except UnicodeEncodeError:
            raise DataError(f"{where}: an escape stands for half a character") from None
        pairs.append(pair)
    return pairs


def _find_split(
    directory: Path, split: str, languages: tuple[str, str] | None
) -> tuple[Path, Path | None]:
    """Return the one file, or two files, that hold the split of a directory."""
    candidates = _candidates(directory, languages)
    names = next((names for names in _SPLITS if split in names), {split})
    # "test" also means the only test_something there is.
    for matches in (
        lambda head: head == split,
        lambda head: head.lower() in names,
        lambda head: head.lower().split("_")[0] in names,
    ):
        found = [files for head, files in candidates if matches(head)]
        if len(found) == 1:
            return found[0]
        if found:
            break
    heads = sorted({head for head, _ in candidates})
    raise _split_error(directory, split, languages, found, heads)


def _candidates(
    directory: Path, languages: tuple[str, str] | None
) -> list[tuple[str, tuple[Path, Path | None]]]:
    """Return the corpora of a directory, each with the first part of its name."""
    candidates: list[tuple[str, tuple[Path, Path | None]]] = []
    for path in sorted(directory.iterdir()):
        head = path.name.split(".")[0]
        name = path.name.removesuffix(".gz").removesuffix(".txt")
        stem, _, language = name.rpartition(".")
        if languages and language == languages[0]:
            for ending in ("", ".gz", ".txt", ".txt.gz"):
                target = path.with_name(f"{stem}.{languages[1]}{ending}")
                if target.exists():
                    candidates.append((head, (path, target)))
        elif _kind(path) in (_TSV - {".txt"}) | _JSONL:
            candidates.append((head, (path, None)))
    return candidates


def _split_error(directory, split, languages, found, heads) -> DataError:
    if found:
        names = ", ".join(source.name for source, _ in found)
        return DataError(
            f"{directory} holds several corpora for the split {split}: {names}; "
            f"name the files, or the first part of a name as the split"
        )
    if not heads:
        wanted = f" in {languages[0]} and {languages[1]}" if languages else ""
        return DataError(
            f"{directory} holds no parallel text{wanted}: expected files such as "
            f"train.en and train.de (with languages en and de), train.tsv or "
            f"train.jsonl, or a .gz of these"
        )
    return DataError(
        f"{directory} has no split {split}; it has {', '.join(heads)}: "
        f"name one of these, or files"
    )
