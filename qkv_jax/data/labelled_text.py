"""Text with labels, from CSV files or from folders of documents, as rows of numbered features.

Every word is several features at once: itself, if the training part has it, and, if asked for, the
letter sequences within it, numbered by a hash. So a word that is new, or misspelt, still has
vectors that were trained.
"""

import csv
import dataclasses
import io
import itertools
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from qkv_jax.data.errors import DataError
from qkv_jax.data.files import missing_file, read_lines
from qkv_jax.data.splits import Splits, hold_out

PAD, UNK, CLS, MASK = range(4)
SPECIAL = 4

_WORD = re.compile(r"\w+(?:'\w+)*|[^\w\s]")
Labelled = list[tuple[str, str]]  # (text, label)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordFeatures:
    """How a text becomes rows of features.

    Attributes:
        length: T, words of a row, the class token before them included; what is longer is cut.
        least: times that a word stands in the training part, at least, to have a number.
        letters: shortest and longest letter sequences within a word, its two ends marked; (0, 0): none.
        buckets: numbers that letter sequences share.
        most: letter sequences of a word, at most: those of longer words are cut.
    """

    length: int
    least: int = 1
    letters: tuple[int, int] = (0, 0)
    buckets: int = 0
    most: int = 0

    def __post_init__(self):
        if self.length < 2 or self.least < 1:
            raise ValueError(
                "length must be at least 2 and least at least 1; "
                f"got length = {self.length}, least = {self.least}."
            )
        low, high = self.letters
        if not 0 <= low <= high or (high > 0) != (self.buckets > 0 and self.most > 0):
            raise ValueError(
                "letters must be (shortest, longest), and buckets and most positive with them; got "
                f"letters = {self.letters}, buckets = {self.buckets}, most = {self.most}."
            )

    def vocabulary(self, texts: Iterable[str]) -> dict[str, int]:
        """Numbers of the words, from `SPECIAL` on, the most frequent first."""
        counts = Counter(itertools.chain.from_iterable(map(words_of, texts)))
        kept = (word for word, count in counts.items() if count >= self.least)
        order = sorted(kept, key=lambda word: (-counts[word], word))
        return {word: number for number, word in enumerate(order, SPECIAL)}

    def encode(
        self, texts: Sequence[str], vocabulary: dict[str, int]
    ) -> dict[str, np.ndarray]:
        """Features of each text.

        Returns:
            tokens: (rows, T, 1 + most) int32. Feature 0 is the word; those after it, letter
                sequences, from `SPECIAL + len(vocabulary)` on; `PAD` where there is none. The
                first token of a row is `CLS`.
            lengths: (rows,) int32, tokens of a row.
        """
        known: dict[str, list[int]] = {}
        tokens = np.full((len(texts), self.length, 1 + self.most), PAD, np.int32)
        tokens[:, 0, 0] = CLS
        lengths = np.ones(len(texts), np.int32)
        for row, text in enumerate(texts):
            words = words_of(text)[: self.length - 1]
            for place, word in enumerate(words, 1):
                if word not in known:
                    known[word] = self._features(word, vocabulary)
                features = known[word]
                tokens[row, place, : len(features)] = features
            lengths[row] += len(words)
        return {"tokens": tokens, "lengths": lengths}

    def _features(self, word: str, vocabulary: dict[str, int]) -> list[int]:
        low, high = self.letters
        marked, first = f"<{word}>", SPECIAL + len(vocabulary)
        parts = (
            marked[at : at + size]
            for size in range(low, high + 1)
            for at in range(len(marked) - size + 1)
            if high and size < len(marked)
        )
        hashed = [first + zlib.crc32(part.encode()) % self.buckets for part in parts]
        return [vocabulary.get(word, UNK), *hashed[: self.most]]


def words_of(text: str) -> list[str]:
    """Words and punctuation marks of a text, in lower case."""
    return _WORD.findall(text.lower())


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledCsv:
    """CSV files with a header, and a column each of texts and of labels, to train and to test on.

    Attributes:
        directory: of the files.
        train, test: their names.
        text, label: names of the two columns.
        features: what a text becomes.
        valid_share: share of the training file that is held out to validate on; 0: none.
        seed: of what is held out.
    """

    directory: Path
    train: str = "train.csv"
    test: str = "test.csv"
    text: str = "text"
    label: str = "label"
    features: WordFeatures
    valid_share: float = 0.1
    seed: int = 0

    def load(self) -> Splits:
        """Reads both files.

        Raises:
            DataError: a file is missing, empty or has other columns.
        """
        train, test = (self._read(self.directory / x) for x in (self.train, self.test))
        kept, held = hold_out(len(train), self.valid_share, seed=self.seed)
        return _splits(
            self.features, [train[i] for i in kept], [train[i] for i in held], test
        )

    def _read(self, path: Path) -> Labelled:
        content = "\n".join(read_lines(path))
        reader = csv.DictReader(io.StringIO(content, newline=""), strict=True)
        columns = list(reader.fieldnames or ())
        if missing := {self.text, self.label} - set(columns):
            raise DataError(
                f"{path} has no column {' or '.join(map(repr, sorted(missing)))}, but "
                f"{', '.join(map(repr, columns)) or 'no header'}: set text and label"
            )
        try:
            rows = [(row[self.text], row[self.label]) for row in reader]
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: {error}") from None
        for number, row in enumerate(rows, 1):
            if None in row or not row[1]:
                raise DataError(f"{path}, example {number}: a column is empty")
        if not rows:
            raise DataError(f"{path} holds a header and no example")
        return rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledDocuments:
    """Text files in a folder a class, within a directory or a zip file.

    Attributes:
        path: the directory, or the zip file.
        features: what a text becomes.
        test_share: share of the documents that is drawn to test on.
        valid_share: share of all documents that is drawn to validate on; 0: none.
        seed: of what is drawn; what is tested on depends on it and test_share alone.
    """

    path: Path
    features: WordFeatures
    test_share: float = 0.2
    valid_share: float = 0.1
    seed: int = 0

    def __post_init__(self):
        if not (
            0 < self.test_share < 1 and 0 <= self.valid_share < 1 - self.test_share
        ):
            raise ValueError(
                "test_share must be positive, valid_share not negative, and their sum below 1; "
                f"got test_share = {self.test_share}, valid_share = {self.valid_share}."
            )

    def load(self) -> Splits:
        """Reads every file named `class/document.txt`, whatever folders stand above.

        Raises:
            DataError: the path is missing, is no zip file, or holds fewer than two classes.
        """
        rows = self._read()
        rest, test = hold_out(len(rows), self.test_share, seed=self.seed)
        share = self.valid_share / (1 - self.test_share)
        kept, held = hold_out(len(rest), share, seed=self.seed)
        parts = (rest[kept], rest[held], test)
        return _splits(self.features, *([rows[i] for i in part] for part in parts))

    def _read(self) -> Labelled:
        if not self.path.exists():
            raise missing_file(self.path)
        try:
            files = _folder(self.path) if self.path.is_dir() else _zip(self.path)
        except zipfile.BadZipFile:
            raise DataError(
                f"{self.path} is neither a directory nor a zip file"
            ) from None
        rows = [
            (content.decode("utf-8", "replace"), name.split("/")[-2])
            for name, content in sorted(files.items())
        ]
        if len({label for _, label in rows}) < 2:
            raise DataError(
                f"{self.path} must hold a folder of .txt files for each of two classes or more; "
                f"found {len(rows)} such files"
            )
        return rows


def _folder(path: Path) -> dict[str, bytes]:
    files = sorted(path.rglob("*/*.txt"))
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


def _zip(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        names = (x for x in archive.namelist() if re.search(r"[^/]/[^/]+\.txt$", x))
        return {name: archive.read(name) for name in names}


def _splits(
    features: WordFeatures, train: Labelled, valid: Labelled, test: Labelled
) -> Splits:
    """Numbers words and classes by the training part, and encodes all three."""
    names = sorted({label for _, label in train})
    number = {name: i for i, name in enumerate(names)}
    if unknown := sorted({label for _, label in valid + test} - set(names)):
        raise DataError(f"no example to train on has the label {unknown[0]!r}")
    vocabulary = features.vocabulary(text for text, _ in train)

    def arrays(part: Labelled) -> dict[str, np.ndarray]:
        labels = np.array([number[label] for _, label in part], np.int32)
        texts = [text for text, _ in part]
        return features.encode(texts, vocabulary) | {"labels": labels}

    words = SPECIAL + len(vocabulary)
    cut = sum(
        len(words_of(text)) >= features.length for text, _ in train + valid + test
    )
    counts = f"{len(names)} classes, {words:,} words, {features.buckets:,} buckets of letters"
    return Splits(
        train=arrays(train),
        valid=arrays(valid),
        test=arrays(test),
        sizes={
            "classes": len(names),
            "vocabulary": words + features.buckets,
        },
        names=tuple(names),
        report=(f"text: {counts}, {cut:,} texts cut at {features.length:,} words",),
    )
