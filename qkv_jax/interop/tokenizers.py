"""The tokenisers of published translation models, by their own files."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qkv_jax.interop.languages import find_language
from qkv_jax.interop.pieces import Files, Pieces
from qkv_jax.interop.token_ids import CONFIG, TokenIds
from qkv_jax.interop.vocabularies import MARIAN_CODE, Vocabulary, read_vocabulary

UNUSED = "<unused>"
# What `transformers` cleans up, in its order.
SPACED = [" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"]


@dataclass(frozen=True, kw_only=True)
class PretrainedTokenizer:
    """Text to ids and back, as a published model was trained with.

    What looks like a special token in a text ("</s>", a language's code) is text; only Marian's
    ">>deu<<" at the start of a source is a token. Punctuation is not normalised, as by
    `transformers` where sacremoses is not installed.

    Attributes:
        pad: id of padding.
        start: id that every target starts from; no part of the labels.
        eos: id that ends a target.
        unk: id of what the vocabulary lacks; None: it lacks nothing.
        prefix: ids that every target has to begin with; part of the labels.
        source_beginning: ids that begin every source.
        source_ending: ids that end every source.
        source_size: size of the source vocabulary, the model's.
        target_size: size of the target vocabulary, the model's.
        never: ids that are never to be generated.
        silent: ids that are no text.
        digest: SHA-256 of the files and options.
    """

    pad: int
    start: int
    eos: int
    unk: int | None
    prefix: tuple[int, ...]
    source_beginning: tuple[int, ...]
    source_ending: tuple[int, ...]
    source_size: int
    target_size: int
    never: tuple[int, ...]
    silent: frozenset[int] = field(repr=False)
    digest: str
    _source: Pieces = field(repr=False)
    _target: Pieces = field(repr=False)
    _prepare: Callable[[str], tuple[list[int], str]] = field(repr=False)
    _tidy: Callable[[str], str] = field(repr=False)
    _files: Files = field(repr=False)

    def encode_source(self, sentences: Sequence[str]) -> list[list[int]]:
        """The ids that the encoder takes: language, pieces and ending.

        Raises:
            InteropError: a sentence lacks its language's token, or has an unknown one.
        """
        prepared = [self._prepare(text) for text in _rows(sentences)]
        rows = self._source.encode([text for _, text in prepared])
        begin, end = self.source_beginning, self.source_ending
        return [[*begin, *own, *row, *end] for (own, _), row in zip(prepared, rows)]

    def encode_target(self, sentences: Sequence[str]) -> list[list[int]]:
        """The labels: prefix, pieces and EOS."""
        rows = self._target.encode(_rows(sentences))
        return [[*self.prefix, *row, self.eos] for row in rows]

    def decode(self, sequences: Iterable[Sequence[int]]) -> list[str]:
        """The text of targets, with their prefix or without, up to the first EOS after it.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        return [self._tidy(self._target.decode(self._text(x))) for x in sequences]

    def source_pieces(self, ids: Sequence[int]) -> list[str]:
        """The piece of every id of a source, special ones included."""
        return [self._source.piece(int(index)) or UNUSED for index in ids]

    def target_pieces(self, ids: Sequence[int]) -> list[str]:
        """The piece of every id of a target, special ones included."""
        return [self._target.piece(int(index)) or UNUSED for index in ids]

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes the files that it was loaded from, byte for byte."""
        self._files.write(Path(directory))

    def _text(self, sequence: Sequence[int]) -> list[int]:
        ids = [int(index) for index in sequence]
        if outside := [index for index in ids if not 0 <= index < self.target_size]:
            raise ValueError(
                f"ids must be below target_size = {self.target_size}; got {outside[0]}"
            )
        at = len(self.prefix)
        ids = ids[at:] if tuple(ids[:at]) == self.prefix else ids
        ids = ids[: ids.index(self.eos)] if self.eos in ids else ids
        piece = self._target.piece
        return [x for x in ids if x not in self.silent and piece(x) is not None]


def load_tokenizer(
    directory: str | os.PathLike[str],
    *,
    family: str,
    settings: Mapping[str, Any],
    generation: Mapping[str, Any],
    source_language: str | None = None,
    target_language: str | None = None,
    source_prefix: str = "",
) -> PretrainedTokenizer:
    """The tokeniser of a Hugging Face directory.

    The original files (SentencePiece, vocab.json, merges.txt) are used where they are; else
    tokenizer.json is, by the `tokenizers` library (extra `hub`).

    Args:
        directory: with the files.
        family: `model_type` of its config.json, a key of `FAMILIES`.
        settings: its config.json.
        generation: its generation_config.json; {} where it has none.
        source_language: code of the sources' language, such as "eng_Latn", for multilingual
            models; None: the one that the files name.
        target_language: code of the targets' language; None: the one that the files name. For
            Marian models with tokens such as ">>deu<<": it is put before every source; None:
            every source begins with one already; "": they need none.
        source_prefix: put before every source, such as "translate English to German: ".

    Raises:
        InteropError: a file is missing, damaged or does not fit the model; or a language is
            unknown, or needed and not given.
    """
    files = Files(Path(directory))
    vocabulary = read_vocabulary(files, family, settings)
    ids = TokenIds(files, vocabulary, {**settings, **_present(generation)})
    named = ids.languages(source_language, target_language)
    layout, pad, eos = vocabulary.layout, ids.special("pad"), ids.special("eos")
    sides = (layout.before, layout.after, layout.prefix)
    before, after, prefix = (tuple(ids.token(x, named) for x in side) for side in sides)
    options = [family, source_language, target_language, source_prefix]
    return PretrainedTokenizer(
        pad=pad,
        start=ids.start(named),
        eos=eos,
        unk=vocabulary.target.index("<unk>"),
        prefix=prefix,
        source_beginning=before,
        source_ending=after,
        source_size=ids.size("source"),
        target_size=ids.size("target"),
        never=ids.never(pad),
        silent=ids.silent(),
        digest=_digest(files.content, options),
        _source=vocabulary.source,
        _target=vocabulary.target,
        _prepare=_preparation(vocabulary, target_language, source_prefix),
        _tidy=_tidier(files, vocabulary),
        _files=files,
    )


def _preparation(
    vocabulary: Vocabulary, language: str | None, prefix: str
) -> Callable[[str], tuple[list[int], str]]:
    """Puts the prefix before a source, and takes Marian's token of a language off it, or adds it."""
    known = vocabulary.languages if vocabulary.marked else {}
    if not known:
        return lambda text: ([], prefix + text)
    given = []
    if language:
        given = [known[find_language("target_language", language, known, default=None)]]

    def prepare(text: str) -> tuple[list[int], str]:
        if match := MARIAN_CODE.match(text):
            code = find_language("the token of", match[1], known, default=None)
            return [known[code]], prefix + text[match.end() :]
        if language is None:
            find_language("target_language", None, known, default=None)
        return given, prefix + text

    return prepare


def _tidier(files: Files, vocabulary: Vocabulary) -> Callable[[str], str]:
    cleans = files.json(CONFIG).get("clean_up_tokenization_spaces", False)
    if not (cleans and vocabulary.cleans):
        return vocabulary.tidy

    def tidy(text: str) -> str:
        text = vocabulary.tidy(text)
        for spaced in SPACED:
            text = text.replace(spaced, spaced.strip())
        return text

    return tidy


def _present(content: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if value is not None}


def _digest(files: Mapping[str, bytes], options: Sequence[Any]) -> str:
    digest = hashlib.sha256(json.dumps(options).encode())
    for name in sorted(files):
        digest.update(f"{name} {len(files[name])}\n".encode())
        digest.update(files[name])
    return digest.hexdigest()


def _rows(sentences: Iterable[str]) -> list[str]:
    if isinstance(sentences, str):
        raise TypeError("sentences must be a list of strings; it is one string")
    return list(sentences)
