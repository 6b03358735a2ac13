"""What a tokenizer of sentences is, and SentencePiece ones, trained once for a corpus."""

import hashlib
import io
import json
import re
import threading
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import sentencepiece

from qkv_jax.data.errors import DataError
from qkv_jax.data.files import cache_directory, write_atomically

PAD = 0
BOS = 1
EOS = 2
UNK = 3

_FILE_NAME = "tokenizer.model"
# SentencePiece draws for all its models, in all threads, from one generator.
_generator = threading.Lock()


class SentenceTokenizer(Protocol):
    """Source and target sentences to the ids that a model of translation takes, and back.

    `Tokenizer` is one, and so are those of published models (`qkv_jax.interop`).

    Attributes:
        pad: id that fills up rows, never part of a sentence.
        start: id that the decoder starts from.
        eos: id that ends a target.
        unk: id of what is not in the vocabulary, or None.
        prefix: ids that every target begins with, such as its language's.
        source_beginning: ids that every source begins with, such as its language's.
        source_ending: ids that every source ends with, cut or not.
        never: ids that are never generated.
        source_size, target_size: V of each side.
        digest: equal for equal tokenizers.
    """

    @property
    def pad(self) -> int: ...

    @property
    def start(self) -> int: ...

    @property
    def eos(self) -> int: ...

    @property
    def unk(self) -> int | None: ...

    @property
    def prefix(self) -> tuple[int, ...]: ...

    @property
    def source_beginning(self) -> tuple[int, ...]: ...

    @property
    def source_ending(self) -> tuple[int, ...]: ...

    @property
    def never(self) -> tuple[int, ...]: ...

    @property
    def source_size(self) -> int: ...

    @property
    def target_size(self) -> int: ...

    @property
    def digest(self) -> str: ...

    def encode_source(self, sentences: Sequence[str]) -> list[list[int]]:
        """All ids of each source, `source_beginning` and `source_ending` included."""
        ...

    def encode_target(self, sentences: Sequence[str]) -> list[list[int]]:
        """All ids of each target, `prefix` and EOS included."""
        ...

    def decode(self, sequences: Iterable[Sequence[int]]) -> list[str]:
        """The text of each target, up to its first EOS, special ids left out."""
        ...

    def source_pieces(self, ids: Sequence[int]) -> list[str]:
        """The piece of every id of a source."""
        ...

    def target_pieces(self, ids: Sequence[int]) -> list[str]:
        """The piece of every id of a target."""
        ...

    def save(self, directory: str | PathLike[str]) -> Any:
        """Writes what it can be loaded from again."""
        ...


class Tokenizer:
    """Text to token ids and back, by one SentencePiece model of both languages.

    The ids 0 to 3 are `PAD`, `BOS`, `EOS` and `UNK`. A character the vocabulary
    lacks becomes its UTF-8 bytes, so that no text is lost.

    Args:
        model: the bytes of a SentencePiece model file.
        tag: what stands before every source, such as a language's tag; a piece of the vocabulary.

    Raises:
        DataError: the bytes are no SentencePiece model, or one with other special ids.
        ValueError: the vocabulary lacks the tag.
    """

    pad, start, eos, unk = PAD, BOS, EOS, UNK
    prefix: tuple[int, ...] = ()
    source_ending: tuple[int, ...] = (EOS,)
    never: tuple[int, ...] = (PAD, BOS, UNK)

    def __init__(self, model: bytes, *, tag: str | None = None):
        try:
            if not model:
                raise RuntimeError("the model is empty")
            processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise DataError(
                "the tokenizer is no SentencePiece model, or was cut short; "
                "train it again"
            ) from None
        ids = tuple(
            getattr(processor, f"{name}_id")() for name in ("pad", "bos", "eos", "unk")
        )
        if ids != (PAD, BOS, EOS, UNK):
            raise DataError(
                f"the tokenizer must have pad, bos, eos and unk at 0, 1, 2 and 3; "
                f"got {ids}: train it with --pad_id=0 --bos_id=1 --eos_id=2 --unk_id=3"
            )
        if tag is not None and processor.piece_to_id(tag) == UNK:
            raise ValueError(f"the vocabulary has no piece {tag!r}")
        self._model = model
        self._processor = processor
        ids = [] if tag is None else processor.encode(tag, out_type=int)
        self.source_beginning: tuple[int, ...] = tuple(ids)

    @property
    def vocab_size(self) -> int:
        """The number of ids, special ones included."""
        return self._processor.get_piece_size()

    @property
    def source_size(self) -> int:
        """The same: one vocabulary."""
        return self.vocab_size

    @property
    def target_size(self) -> int:
        """The same: one vocabulary."""
        return self.vocab_size

    @property
    def digest(self) -> str:
        """SHA-256 of the model: equal for equal tokenizers."""
        return hashlib.sha256(self._model).hexdigest()

    def encode(self, sentences: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each sentence, without special ids."""
        return self._processor.encode(list(sentences), out_type=int)

    def encode_source(self, sentences: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each sentence, after the tag, and EOS."""
        return [[*self.source_beginning, *ids, EOS] for ids in self.encode(sentences)]

    def encode_target(self, sentences: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each sentence, and EOS."""
        return [[*ids, EOS] for ids in self.encode(sentences)]

    def tagged(self, tag: str) -> "Tokenizer":
        """Return the same tokenizer, with a tag before every source."""
        return Tokenizer(self._model, tag=tag)

    def sample(
        self, sentences: Sequence[str], *, alpha: float, nbest: int = -1, seed: int
    ) -> list[list[int]]:
        """Return the token ids of each sentence, without special ids, in a drawn segmentation.

        Symbols such as tags may be split by a unigram model.

        Args:
            sentences: text.
            alpha: of a BPE model, the share of merges that are left out (BPE-dropout: Provilkov
                et al. 2020, arXiv 1910.13267); of a unigram model, the power of a segmentation's
                probability that it is drawn by (Kudo 2018, arXiv 1804.10959): the smaller, the
                more even.
            nbest: of a unigram model, how many of the best are drawn from, up to 512; -1: all.
            seed: in [0, 2 ** 31): equal ones draw the same.
        """
        with _generator:
            sentencepiece.set_random_generator_seed(seed)
            return self._processor.encode(
                list(sentences),
                out_type=int,
                num_threads=1,  # Several would share out the sentences by their speed.
                enable_sampling=True,
                alpha=alpha,
                nbest_size=nbest,
            )

    def decode(self, sequences: Iterable[Sequence[int]]) -> list[str]:
        """Return the text of each sequence, up to its first EOS, special ids left out.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        return [self._processor.decode(self._content(ids)) for ids in sequences]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the piece of every id, special ones included; "▁" starts a word."""
        return [self._processor.id_to_piece(int(token)) for token in ids]

    source_pieces = target_pieces = pieces

    def save(self, directory: str | PathLike[str]) -> Path:
        """Write the model into the directory, atomically, and return its path."""
        path = Path(directory) / _FILE_NAME
        write_atomically(path, self._model)
        return path

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Tokenizer":
        """Return the tokenizer of a model file, or of a directory `save` wrote to.

        Raises:
            DataError: there is no such file, or it is no tokenizer.
        """
        path = Path(path)
        if path.is_dir():
            path = path / _FILE_NAME
        try:
            return cls(path.read_bytes())
        except OSError as error:
            raise DataError(
                f"the tokenizer {path} cannot be read: {error.strerror}"
            ) from None
        except DataError as error:
            raise DataError(f"{path}: {error}") from None

    def _content(self, ids: Sequence[int]) -> list[int]:
        content = []
        for token in map(int, ids):
            if token == EOS:
                break
            if not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"ids must be below vocab_size = {self.vocab_size}; got {token}"
                )
            if token > UNK:
                content.append(token)
        return content


def train_tokenizer(
    sentences: Sequence[str],
    *,
    vocab_size: int,
    model_type: str = "unigram",
    normalization: str = "identity",
    character_coverage: float = 0.9995,
    symbols: Sequence[str] = (),
    directory: str | PathLike[str] | None = None,
) -> Tokenizer:
    """Return the tokenizer for a corpus, trained now or taken from the cache.

    The cached model is tied by SHA-256 to the sentences, their order, every setting
    and the SentencePiece version. Training is deterministic.

    Args:
        sentences: the text to cover; for one vocabulary of two languages, the
            sentences of both.
        vocab_size: the number of ids, 4 special ones and 256 bytes included.
        model_type: "unigram" or "bpe".
        normalization: "identity" keeps text as it is, except for repeated or outer
            spaces, so that what a model learns and writes is what references hold;
            "nmt_nfkc" also unifies compatibility characters ("…" becomes "..."),
            which makes noisy text easier, but changes what BLEU compares.
        character_coverage: the share of characters that get a piece of their own,
            0.98 to 1; the rest are written as bytes.
        symbols: texts that are one piece each, wherever they stand, such as tags.
        directory: where models are kept. None: `tokenizers` in the user's cache.

    Raises:
        ValueError: a setting is out of range.
        DataError: the corpus is empty, or does not support the vocabulary: the
            message names the largest or smallest possible size.
    """
    for name, value, allowed in (
        ("model_type", model_type, ("unigram", "bpe")),
        ("normalization", normalization, ("identity", "nmt_nfkc")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {allowed}; got {value!r}")
    if not 0.98 <= character_coverage <= 1:
        raise ValueError(
            f"character_coverage must be from 0.98 to 1; got {character_coverage}"
        )
    if not any(sentence.strip() for sentence in sentences):
        raise DataError("no sentences to train a tokenizer on: the corpus is empty")
    settings = {
        "vocab_size": vocab_size,
        "model_type": model_type,
        "normalization_rule_name": normalization,
        "character_coverage": character_coverage,
    }
    if symbols:
        settings["user_defined_symbols"] = list(symbols)
    directory = Path(directory) if directory else cache_directory() / "tokenizers"
    path = directory / f"{_fingerprint(sentences, settings)}.model"
    if path.exists():
        try:
            return Tokenizer.load(path)
        except DataError:
            pass  # A damaged entry of the cache is replaced.
    model = _train(sentences, settings)
    write_atomically(path, model)
    return Tokenizer(model)


def _fingerprint(sentences: Sequence[str], settings: dict) -> str:
    state = [sentencepiece.__version__, settings, len(sentences)]
    digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode())
    for sentence in sentences:
        content = sentence.encode()
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def _train(sentences: Sequence[str], settings: dict) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            pad_id=PAD,
            bos_id=BOS,
            eos_id=EOS,
            unk_id=UNK,
            byte_fallback=True,
            num_threads=1,  # Several threads sum in another order: another model.
            minloglevel=2,
            **settings,
        )
    except RuntimeError as error:
        raise _training_error(str(error), settings["vocab_size"]) from None
    return model.getvalue()


def _training_error(message: str, vocab_size: int) -> DataError:
    asked = f"vocab_size {vocab_size:,} (--text.vocabulary)"
    if largest := re.search(r"value <= (\d+)", message):
        return DataError(
            f"{asked} is larger than this text supports; "
            f"the largest possible is {int(largest[1])}"
        )
    if smallest := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return DataError(
            f"{asked} is too small for the characters of this text; "
            f"the smallest possible is {int(smallest[1])}, or lower character_coverage"
        )
    reason = message.partition("\n")[0].strip()
    return DataError(f"no tokenizer of {vocab_size:,} pieces can be trained: {reason}")
