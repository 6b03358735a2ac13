"""Text to ids and back: the two libraries behind published tokenisers, and their files."""

import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import sentencepiece

from qkv_jax.interop.errors import InteropError

# All files of a tokeniser that a published directory can hold.
FILES = (
    "source.spm",
    "target.spm",
    "sentencepiece.bpe.model",
    "spiece.model",
    "vocab.json",
    "target_vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


class Files:
    """The files of a tokeniser, as bytes.

    Raises:
        InteropError: the directory is not there.
    """

    def __init__(self, directory: Path):
        if not directory.is_dir():
            raise InteropError(f"{directory} is no directory.")
        self.directory = directory
        self.content = {
            name: (directory / name).read_bytes()
            for name in FILES
            if (directory / name).is_file()
        }

    def __contains__(self, name: str) -> bool:
        return name in self.content

    def write(self, directory: Path) -> None:
        """Writes them into a directory, byte for byte."""
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self.content.items():
            temporary = directory / f"{name}.tmp"
            temporary.write_bytes(content)
            os.replace(temporary, directory / name)

    def missing(self, *names: str) -> InteropError:
        """The error to raise where none of some files is there."""
        return InteropError(
            f"{self.directory} holds no tokeniser: {' or '.join(names)} is missing."
        )

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file; {} where it is absent."""
        if name not in self.content:
            return {}
        try:
            content = json.loads(self.content[name].decode("utf-8"))
        except ValueError as error:
            raise self._damaged(name, error) from None
        if not isinstance(content, dict):
            raise self._damaged(name, "no JSON object")
        return content

    def vocabulary(self, name: str) -> dict[str, int]:
        """A JSON file of piece -> id."""
        content = self.json(name)
        if not content or not all(type(x) is int and x >= 0 for x in content.values()):
            raise self._damaged(name, "no pieces with ids")
        return content

    @functools.cached_property
    def added(self) -> dict[str, int]:
        """Tokens that were put beside a vocabulary, with their ids."""
        added = dict(self.json("added_tokens.json"))
        listed = self.json("tokenizer_config.json").get("added_tokens_decoder", {})
        try:
            added |= {token["content"]: int(index) for index, token in listed.items()}
            for token in self.json("tokenizer.json").get("added_tokens", []):
                added[token["content"]] = int(token["id"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise self._damaged(
                "tokenizer_config.json or tokenizer.json", error
            ) from None
        return added

    def sentencepiece(self, name: str) -> sentencepiece.SentencePieceProcessor:
        """A SentencePiece model."""
        if not self.content[name]:
            raise self._damaged(name, "it is empty")
        try:
            return sentencepiece.SentencePieceProcessor(model_proto=self.content[name])
        except RuntimeError as error:
            raise self._damaged(name, error) from None

    def _damaged(self, name: str, why: object) -> InteropError:
        return InteropError(
            f"{self.directory / name} is damaged ({why}): get it again."
        )


class Pieces(Protocol):
    """One side's vocabulary."""

    def encode(self, sentences: Sequence[str]) -> list[list[int]]:
        """Ids of each sentence, special ones left out."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids none of which is special."""

    def piece(self, index: int) -> str | None:
        """The piece of an id; None: it has none."""

    def index(self, piece: str) -> int | None:
        """The id of a piece, special ones included; None: there is none."""

    def size(self) -> int:
        """One more than the largest id of a piece that text can become."""


class SentencePieces:
    """Pieces of a SentencePiece model, with ids of their own.

    Args:
        processor: cuts text into pieces, and joins them.
        ordinary: piece -> id, of the pieces that text can become.
        special: piece -> id, of those that it cannot.
        unk: id of every other piece.
        joiner: joins pieces where another model does than the one that cuts.
    """

    def __init__(
        self,
        processor: sentencepiece.SentencePieceProcessor,
        ordinary: Mapping[str, int],
        special: Mapping[str, int],
        unk: int,
        *,
        joiner: sentencepiece.SentencePieceProcessor | None = None,
    ):
        self.processor, self.joiner = processor, joiner or processor
        self.ordinary, self.special, self.unk = ordinary, special, unk
        self.names = {index: piece for piece, index in ordinary.items()}
        self.names |= {index: piece for piece, index in special.items()}

    def encode(self, sentences: Sequence[str]) -> list[list[int]]:
        pieces = self.processor.encode(list(sentences), out_type=str)
        return [[self.ordinary.get(x, self.unk) for x in row] for row in pieces]

    def decode(self, ids: Sequence[int]) -> str:
        return self.joiner.decode_pieces([self.names[index] for index in ids])

    def piece(self, index: int) -> str | None:
        return self.names.get(index)

    def index(self, piece: str) -> int | None:
        return self.special.get(piece, self.ordinary.get(piece))

    def size(self) -> int:
        return max(self.ordinary.values()) + 1


class FastPieces:
    """Pieces of a `tokenizers` pipeline; what looks like a special token in a text is none."""

    def __init__(self, tokenizer: Any):
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        self.tokenizer = tokenizer
        self.unk = tokenizer.token_to_id("<unk>")
        added = tokenizer.get_added_tokens_decoder()
        self.special = {index for index, token in added.items() if token.special}

    def encode(self, sentences: Sequence[str]) -> list[list[int]]:
        found = self.tokenizer.encode_batch(list(sentences), add_special_tokens=False)
        # A Unigram model has special tokens among its pieces, and finds them.
        special, unk = self.special, self.unk
        return [[unk if x in special else x for x in row.ids] for row in found]

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def piece(self, index: int) -> str | None:
        return self.tokenizer.id_to_token(index)

    def index(self, piece: str) -> int | None:
        return self.tokenizer.token_to_id(piece)

    def size(self) -> int:
        return max(self.tokenizer.get_vocab(with_added_tokens=False).values()) + 1


def fast_pieces(files: Files) -> FastPieces:
    """The pipeline of tokenizer.json.

    Raises:
        InteropError: `tokenizers` is not installed, or the file is damaged.
    """
    tokenizers = _tokenizers("tokenizer.json", files)
    try:
        return FastPieces(
            tokenizers.Tokenizer.from_buffer(files.content["tokenizer.json"])
        )
    except ValueError as error:
        reason = str(error).partition("\n")[0]
        path = files.directory / "tokenizer.json"
        raise InteropError(f"{path} is damaged ({reason}): get it again.") from None


def byte_pieces(files: Files) -> FastPieces:
    """Byte-level BPE of vocab.json and merges.txt, as GPT-2's and BART's."""
    tokenizers = _tokenizers("merges.txt", files)
    vocabulary = files.vocabulary("vocab.json")
    lines = files.content["merges.txt"].decode("utf-8").splitlines()
    merges = [tuple(x.split(" ")) for x in lines if x and not x.startswith("#version")]
    for pair in merges:
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocabulary.keys():
            path = files.directory / "merges.txt"
            raise InteropError(f"{path} does not fit vocab.json: it merges {pair}.")
    space = files.json("tokenizer_config.json").get("add_prefix_space", False)
    model = tokenizers.models.BPE(vocab=vocabulary, merges=merges)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=space
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return FastPieces(tokenizer)


def _tokenizers(name: str, files: Files) -> Any:
    try:
        import tokenizers
    except ImportError:
        raise InteropError(
            f"{files.directory / name} needs the tokenizers library: "
            "pip install 'qkv_jax[hub]'."
        ) from None
    return tokenizers
