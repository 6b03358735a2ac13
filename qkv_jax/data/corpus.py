"""Where a corpus comes from, as settings of an experiment."""

import dataclasses
from pathlib import Path

from qkv_jax.data.errors import DataError
from qkv_jax.data.homeassistant import load_homeassistant
from qkv_jax.data.hub import read_hub
from qkv_jax.data.parallel import Corpus, Pair, read_pairs


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelData:
    """Parallel text in a directory: see `read_pairs` for the formats.

    Attributes:
        directory: where the files lie.
        train: one or two file names relative to the directory, or one split name,
            such as "train", for which files such as train.en and train.de are found.
        valid: the same for validation. Empty: none.
        test: the same for testing. Empty: none.
        source: source language code.
        target: target language code.
    """

    directory: Path
    train: tuple[str, ...] = ("train",)
    valid: tuple[str, ...] = ("valid",)
    test: tuple[str, ...] = ("test",)
    source: str = "en"
    target: str = "de"

    def __post_init__(self):
        for name, most in (("train", 1), ("valid", 0), ("test", 0)):
            files = getattr(self, name)
            if isinstance(files, str) or not most <= len(files) <= 2:
                raise ValueError(f"{name} must be one or two names; got {files!r}")

    def load(self) -> Corpus:
        """Return the three parts.

        Raises:
            DataError: a file is missing or malformed.
        """
        return Corpus(
            train=self._read(self.train),
            valid=self._read(self.valid),
            test=self._read(self.test),
        )

    def _read(self, names: tuple[str, ...]) -> list[Pair]:
        directory = Path(self.directory)
        if not names:
            return []
        if not directory.is_dir():
            raise DataError(f"there is no directory {directory} to read text from")
        languages = (self.source, self.target)
        files = [directory / name for name in names]
        if len(files) == 1 and not files[0].exists():
            return read_pairs(directory, split=names[0], languages=languages)
        return read_pairs(*files, languages=languages)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HomeAssistantData:
    """The default corpus: see `load_homeassistant`.

    Attributes:
        source: source language code.
        target: target language code.
    """

    source: str = "en"
    target: str = "de"

    def load(self) -> Corpus:
        """Return the three parts, downloading the corpus if it is not in the cache.

        Raises:
            DataError: the corpus cannot be had, or a language is unknown.
        """
        return load_homeassistant(self.source, self.target)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubData:
    """A Hugging Face hub data set: see `read_hub`.

    Attributes:
        name: the data set, such as "bentrevett/multi30k".
        config: its configuration. None: its default.
        train: the name of the training split there.
        valid: the same for validation. None: none.
        test: the same for testing. None: none.
        source: source language code.
        target: target language code.
    """

    name: str
    config: str | None = None
    train: str = "train"
    valid: str | None = "validation"
    test: str | None = "test"
    source: str = "en"
    target: str = "de"

    def load(self) -> Corpus:
        """Return the three parts.

        Raises:
            DataError: `datasets` is missing, or the data set or a split of it.
        """
        return Corpus(
            train=self._read(self.train),
            valid=self._read(self.valid),
            test=self._read(self.test),
        )

    def _read(self, split: str | None) -> list[Pair]:
        if split is None:
            return []
        languages = (self.source, self.target)
        return read_hub(self.name, split, languages=languages, config=self.config)
