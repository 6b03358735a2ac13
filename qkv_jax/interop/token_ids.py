"""Ids that a model's configuration and its tokeniser both name, checked against each other."""

from collections.abc import Mapping
from typing import Any

from qkv_jax.interop.errors import InteropError
from qkv_jax.interop.languages import find_language
from qkv_jax.interop.pieces import Files
from qkv_jax.interop.vocabularies import SOURCE, TARGET, Vocabulary

CONFIG = "tokenizer_config.json"
PIECES = {"pad": "<pad>", "eos": "</s>"}


class TokenIds:
    """What a tokeniser needs to know of its model.

    Args:
        files: of the tokeniser.
        vocabulary: read from them.
        settings: config.json, and over it what generation_config.json says.
    """

    def __init__(
        self, files: Files, vocabulary: Vocabulary, settings: Mapping[str, Any]
    ):
        self.files, self.vocabulary, self.settings = files, vocabulary, settings

    def special(self, role: str) -> int:
        """The id of padding or EOS."""
        piece = PIECES[role]
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

    def size(self, side: str) -> int:
        """The size of a vocabulary of the model, which has to hold the tokeniser's ids."""
        pieces = self.vocabulary.source if side == "source" else self.vocabulary.target
        size = self.settings.get("vocab_size")
        if side == "target":
            size = self.settings.get("decoder_vocab_size") or size
        if not isinstance(size, int):
            raise InteropError(f"{self.files.directory}: config.json lacks vocab_size.")
        if pieces.size() > size:
            raise InteropError(
                f"{self.files.directory}: the {side} tokeniser has {pieces.size():,} ids, but "
                f"the model's vocabulary is of {size:,}: they are of different models."
            )
        return size

    def never(self, pad: int) -> tuple[int, ...]:
        """Padding, and what the configuration rules out one by one."""
        banned = self.settings.get("bad_words_ids") or []
        alone = [words[0] for words in banned if len(words) == 1]
        return tuple(
            dict.fromkeys([pad, *alone, *(self.settings.get("suppress_tokens") or [])])
        )

    def silent(self) -> frozenset[int]:
        """Ids that are no text."""
        target = self.vocabulary.target
        found = {target.index(x) for x in ("<s>", "<pad>", "</s>", "<unk>", "<mask>")}
        found |= set(self.vocabulary.silent)
        if not self.vocabulary.marked:
            found |= set(self.vocabulary.languages.values())
        return frozenset(index for index in found if index is not None)
