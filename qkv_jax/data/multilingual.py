"""Several language pairs as one corpus, and tags before sources that say what is wanted."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np

from qkv_jax.data.corpus import ParallelData
from qkv_jax.data.parallel import Corpus, Pair

BACK_TRANSLATED = "<bt>"


def language_tag(language: str) -> str:
    """What stands before a source to be translated into a language, such as "<2de>"."""
    return f"<2{language}>"


def tagged(tag: str, pairs: list[Pair]) -> list[Pair]:
    """The pairs, with a tag before each source."""
    return [(f"{tag} {source}", target) for source, target in pairs]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultilingualData:
    """Parallel text of several language pairs, for one model.

    Where there are several target languages, a tag before each source names its own, as one piece
    of the vocabulary (Johnson et al. 2017, arXiv 1611.04558).

    Attributes:
        directory: of the files, see `ParallelData`.
        pairs: (source, target) language codes.
        train, valid, test: names in `ParallelData`, the same for every pair.
        temperature: a pair with n training sentences gets a share in proportion to
            n ** (1 / temperature), smaller ones by repeating sentences (Arivazhagan et al. 2019,
            arXiv 1907.05019); 1: as they are.
    """

    directory: Path
    pairs: tuple[tuple[str, str], ...] = (("en", "de"), ("en", "fr"))
    train: tuple[str, ...] = ("train",)
    valid: tuple[str, ...] = ("valid",)
    test: tuple[str, ...] = ("test",)
    temperature: float = 1.0

    def __post_init__(self):
        if not self.pairs or len(set(self.pairs)) < len(self.pairs):
            raise ValueError(
                f"pairs must be different language pairs, at least one; got {self.pairs}"
            )
        if not self.temperature >= 1:
            raise ValueError(f"temperature must be at least 1; got {self.temperature}")
        self.parts()

    @property
    def targets(self) -> tuple[str, ...]:
        """The target languages, in the order of the pairs."""
        return tuple(dict.fromkeys(target for _, target in self.pairs))

    @property
    def symbols(self) -> tuple[str, ...]:
        """The tags: none where there is one target language."""
        return tuple(map(language_tag, self.targets)) if len(self.targets) > 1 else ()

    def target_of(self, source: str) -> str:
        """The target language that the tag of a source of `load` names, or that all have."""
        tag = source.split(" ", 1)[0]
        return dict(zip(self.symbols, self.targets)).get(tag, self.targets[0])

    def parts(self) -> list[ParallelData]:
        """The data of each pair, without tags."""
        return [
            ParallelData(
                directory=self.directory,
                train=self.train,
                valid=self.valid,
                test=self.test,
                source=source,
                target=target,
            )
            for source, target in self.pairs
        ]

    def load(self) -> Corpus:
        """Returns the three parts; what is held out takes turns between the pairs.

        Raises:
            DataError: a file is missing or malformed.
        """
        corpora = [part.load() for part in self.parts()]
        found: dict[str, list[list[Pair]]] = {
            split: [self._tagged(i, getattr(x, split)) for i, x in enumerate(corpora)]
            for split in ("train", "valid", "test")
        }
        train = found["train"]
        wanted = repeated([len(pairs) for pairs in train], self.temperature)
        return Corpus(
            train=[
                pair
                for pairs, count in zip(train, wanted)
                for pair in itertools.islice(itertools.cycle(pairs), count)
            ],
            valid=_in_turns(found["valid"]),
            test=_in_turns(found["test"]),
            symbols=self.symbols,
        )

    def _tagged(self, number: int, pairs: list[Pair]) -> list[Pair]:
        if not self.symbols:
            return pairs
        return tagged(language_tag(self.pairs[number][1]), pairs)


def repeated(counts: list[int], temperature: float) -> list[int]:
    """How many sentences each corpus gives: the largest as many as it has, others no fewer."""
    sizes = np.array(counts, float)
    wanted = sizes.max() * (sizes / sizes.max()) ** (1 / temperature)
    return [max(count, round(x)) for count, x in zip(counts, wanted)]


def _in_turns(parts: list[list[Pair]]) -> list[Pair]:
    rows = itertools.zip_longest(*parts)
    return [pair for row in rows for pair in row if pair is not None]
