"""The tokenisers of published translation models, by their own files."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qkv_jax.interop.errors import InteropError
from qkv_jax.interop.languages import find_language
from qkv_jax.interop.pieces import Files, Pieces
from qkv_jax.interop.vocabularies import (
    BUILDERS,
    MARIAN_CODE,
    SOURCE,
    TARGET,
    Vocabulary,
)

UNUSED = "<unused>"
# What `transformers` cleans up, in its order.
SPACED = [" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"]
CONFIG = "tokenizer_config.json"


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
    _files: Mapping[str, bytes] = field(repr=False)

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
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            temporary = directory / f"{name}.tmp"
            temporary.write_bytes(content)
            os.replace(temporary, directory / name)

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
    if family not in BUILDERS:
        known = ", ".join(BUILDERS)
        raise InteropError(f"family must be one of {known}; it is {family!r}.")
    files = Files(Path(directory))
    vocabulary = BUILDERS[family](files, settings)
    find = _Finder(files, vocabulary, {**settings, **_present(generation)})
    named = find.languages(source_language, target_language)
    if family == "marian":
        prepare = _marian_preparation(vocabulary, target_language, source_prefix)
    else:
        prepare = _preparation(source_prefix)
    layout, pad, eos = (
        vocabulary.layout,
        find.id("pad", "<pad>"),
        find.id("eos", "</s>"),
    )
    ids = [tuple(find.token(x, named) for x in part) for part in layout[:3]]
    unk = vocabulary.target.index("<unk>")
    silent = {pad, eos, *vocabulary.languages.values(), *vocabulary.silent}
    if family == "marian":
        silent -= set(vocabulary.languages.values())
    for name in ("<s>", "<unk>", "<mask>"):
        index = vocabulary.target.index(name)
        silent |= set() if index is None else {index}
    options = [family, source_language, target_language, source_prefix]
    return PretrainedTokenizer(
        pad=pad,
        start=find.start(named),
        eos=eos,
        unk=unk,
        prefix=ids[2],
        source_beginning=ids[0],
        source_ending=ids[1],
        source_size=find.size("vocab_size"),
        target_size=find.size("decoder_vocab_size"),
        never=find.never(pad),
        silent=frozenset(silent),
        digest=_digest(files.content, options),
        _source=vocabulary.source,
        _target=vocabulary.target,
        _prepare=prepare,
        _tidy=_tidier(files, vocabulary),
        _files=files.content,
    )


def tokenizer_files(
    directory: str | os.PathLike[str], *, family: str, settings: Mapping[str, Any]
) -> dict[str, bytes]:
    """The files of a published model's tokeniser, by name; read and checked.

    Raises:
        InteropError: one is missing or damaged.
    """
    files = Files(Path(directory))
    BUILDERS[family](files, settings)
    files.json(CONFIG)
    return dict(files.content)


class _Finder:
    """Ids that the configuration and the vocabulary both name, checked against each other."""

    def __init__(
        self, files: Files, vocabulary: Vocabulary, settings: Mapping[str, Any]
    ):
        self.files, self.vocabulary, self.settings = files, vocabulary, settings

    def id(self, role: str, piece: str) -> int:
        """The id of padding or EOS."""
        index = self.vocabulary.target.index(piece)
        wanted = self.settings.get(f"{role}_token_id")
        if index is None or wanted not in (None, index):
            raise InteropError(
                f"{self.files.directory}: the model's {role}_token_id is {wanted}, but the "
                f"tokeniser's {piece} is {index}: they are of different models."
            )
        return index

    def token(self, name: str, named: Mapping[str, int]) -> int:
        """The id of a token of a layout."""
        index = named.get(name)
        index = self.vocabulary.target.index(name) if index is None else index
        if index is None:
            raise InteropError(f"{self.files.directory}: the tokeniser lacks {name}.")
        return index

    def languages(self, source: str | None, target: str | None) -> dict[str, int]:
        """The ids of source and target language, of a family that has them."""
        layout, known = self.vocabulary.layout, self.vocabulary.languages
        given = {"source_language": source, "target_language": target}
        marks = {"source_language": SOURCE, "target_language": TARGET}
        defaults = self._defaults()
        found = {}
        for option, language in given.items():
            mark = marks[option]
            if mark in (*layout.before, *layout.after, *layout.prefix, layout.start):
                code = find_language(option, language, known, default=defaults[mark])
                found[mark] = known[code]
            elif language and not (mark == TARGET and known):
                raise InteropError(
                    f"{option} is {language!r}, but the model takes none: leave it out (T5 "
                    "takes a source_prefix, such as 'translate English to German: ')."
                )
        return found

    def _defaults(self) -> dict[str, str | None]:
        config = self.files.json(CONFIG)
        codes = {index: code for code, index in self.vocabulary.languages.items()}
        forced = self.settings.get("forced_bos_token_id")
        start = self.settings.get("decoder_start_token_id")
        found = [codes[x] for x in (forced, start) if x in codes]
        target = found[0] if found else config.get("tgt_lang")
        return {SOURCE: config.get("src_lang"), TARGET: target}

    def start(self, named: Mapping[str, int]) -> int:
        """What targets start from: a language, what the configuration says, or the family's."""
        start, configured = (
            self.vocabulary.layout.start,
            self.settings.get("decoder_start_token_id"),
        )
        if start == TARGET:
            return named[TARGET]
        if configured is not None:
            return configured
        if start is None:
            raise InteropError(
                f"{self.files.directory}: decoder_start_token_id is missing from config.json "
                "and generation_config.json."
            )
        return self.token(start, named)

    def size(self, key: str) -> int:
        """The size of a vocabulary of the model, which has to hold the tokeniser's ids."""
        size = self.settings.get(key) or self.settings.get("vocab_size")
        if not isinstance(size, int):
            raise InteropError(f"{self.files.directory}: config.json lacks vocab_size.")
        source = key == "vocab_size"
        count = (self.vocabulary.source if source else self.vocabulary.target).size()
        if count > size:
            raise InteropError(
                f"{self.files.directory}: the tokeniser has {count:,} ids, but the model's "
                f"vocabulary is of {size:,} ({key}): they are of different models."
            )
        return size

    def never(self, pad: int) -> tuple[int, ...]:
        """Padding, and what the configuration rules out one by one."""
        banned = self.settings.get("bad_words_ids") or []
        alone = [words[0] for words in banned if len(words) == 1]
        return tuple(
            dict.fromkeys([pad, *alone, *(self.settings.get("suppress_tokens") or [])])
        )


def _preparation(prefix: str) -> Callable[[str], tuple[list[int], str]]:
    return lambda text: ([], prefix + text)


def _marian_preparation(
    vocabulary: Vocabulary, language: str | None, prefix: str
) -> Callable[[str], tuple[list[int], str]]:
    """Takes the token of the target's language off a source, or puts it there."""
    known = vocabulary.languages
    given = []
    if language:
        code = find_language("target_language", language, known, default=None)
        given = [known[code]]

    def prepare(text: str) -> tuple[list[int], str]:
        match = MARIAN_CODE.match(text) if known else None
        if match:
            code = find_language("the token of", match[1], known, default=None)
            return [known[code]], prefix + text[match.end() :]
        if known and language is None:
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
