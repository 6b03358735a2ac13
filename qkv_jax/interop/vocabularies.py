"""The vocabularies of published families, from their files, and what stands beside a sentence."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import sentencepiece

from qkv_jax.interop.errors import InteropError
from qkv_jax.interop.languages import M2M100, MBART, MBART50, NLLB, WMT21
from qkv_jax.interop.pieces import (
    Files,
    Pieces,
    SentencePieces,
    byte_pieces,
    fast_pieces,
)

FAIRSEQ = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
EOS = "</s>"
# The languages of source and target, in a layout.
SOURCE, TARGET = "source", "target"
MARIAN_CODE = re.compile(r">>([^<>\s]+)<<")


class Layout(NamedTuple):
    """Tokens beside a sentence, by name; `SOURCE` and `TARGET` stand for its language's.

    Attributes:
        before: of a source.
        after: of a source.
        prefix: of a target; EOS ends it.
        start: what a target starts from; None: what the configuration says.
    """

    before: tuple[str, ...] = ()
    after: tuple[str, ...] = (EOS,)
    prefix: tuple[str, ...] = ()
    start: str | None = None


BEFORE = Layout(before=(SOURCE,), prefix=(TARGET,))
AFTER = Layout(after=(EOS, SOURCE), prefix=(TARGET,))


class Vocabulary(NamedTuple):
    """What a family's files give.

    Attributes:
        source: pieces of sources.
        target: pieces of targets.
        layout: what stands beside them.
        languages: code -> id of a token.
        marked: whether a source names its target's language itself, as Marian's do (">>deu<<").
        silent: further ids that are no text.
        tidy: finishes a decoded text.
        cleans: whether spaces before punctuation go where tokenizer_config.json says so.
    """

    source: Pieces
    target: Pieces
    layout: Layout
    languages: Mapping[str, int] = {}
    marked: bool = False
    silent: Sequence[int] = ()
    tidy: Callable[[str], str] = str
    cleans: bool = True


def marian(files: Files, settings: Mapping[str, Any]) -> Vocabulary:
    """source.spm, target.spm, vocab.json; target_vocab.json where vocabularies are separate."""
    for name in ("source.spm", "target.spm", "vocab.json"):
        if name not in files:
            raise files.missing(name)
    cut, join = files.sentencepiece("source.spm"), files.sentencepiece("target.spm")
    source = files.vocabulary("vocab.json")
    separate = "target_vocab.json" in files
    target = files.vocabulary("target_vocab.json") if separate else source
    names = (EOS, "<unk>", "<pad>")
    for name, ids in (("vocab.json", source), ("target_vocab.json", target)):
        wrong = [x for x in names if ids.get(x) is None or ids[x] != source.get(x)]
        if wrong:
            raise InteropError(
                f"{files.directory / name} must hold {', '.join(names)}, with the ids of "
                f"vocab.json; it does not for {wrong[0]}."
            )
    special = {name: source[name] for name in names}
    found = {m[1]: source[m[0]] for x in source if (m := MARIAN_CODE.fullmatch(x))}
    return Vocabulary(
        source=SentencePieces(cut, source, special, source["<unk>"], joiner=join),
        target=SentencePieces(join, target, special, target["<unk>"]),
        layout=Layout(),
        languages={} if separate else found,
        marked=True,
        tidy=lambda text: text.replace("▁", " ").strip(),
    )


def m2m_100(files: Files, settings: Mapping[str, Any]) -> Vocabulary:
    """M2M100 (vocab.json, sentencepiece.bpe.model) or NLLB, which has the same model."""
    config = files.json("tokenizer_config.json")
    name = str(config.get("tokenizer_class") or settings.get("tokenizer_class"))
    if name.startswith("Nllb") or "vocab.json" not in files:
        layout = AFTER if config.get("legacy_behaviour") else BEFORE
        return _fairseq(files, NLLB, layout)._replace(cleans=False)
    if "sentencepiece.bpe.model" not in files:
        raise files.missing("sentencepiece.bpe.model")
    ordinary = files.vocabulary("vocab.json")
    codes = WMT21 if config.get("language_codes") == "wmt21" else M2M100
    languages = {code: len(ordinary) + i for i, code in enumerate(codes)}
    languages |= _added(files, r"__(\w+)__")
    special = {f"__{code}__": index for code, index in languages.items()}
    special |= {x: ordinary[x] for x in FAIRSEQ if x in ordinary}
    processor = files.sentencepiece("sentencepiece.bpe.model")
    pieces = SentencePieces(processor, ordinary, special, ordinary["<unk>"])
    return Vocabulary(pieces, pieces, BEFORE, languages, tidy=str.strip)


def mbart(files: Files, settings: Mapping[str, Any]) -> Vocabulary:
    """mBART, with the source's language at its end, or mBART-50, with it at the beginning."""
    config = files.json("tokenizer_config.json")
    name = str(config.get("tokenizer_class") or settings.get("tokenizer_class"))
    listed = files.json("special_tokens_map.json").get("additional_special_tokens", [])
    if name.startswith("MBart50") or MBART50[-1] in [*listed, *files.added]:
        return _fairseq(files, MBART50, BEFORE)
    return _fairseq(files, MBART, Layout(after=(EOS, SOURCE), start=TARGET))


def bart(files: Files, settings: Mapping[str, Any]) -> Vocabulary:
    """Byte-level BPE: vocab.json and merges.txt, or tokenizer.json."""
    if "vocab.json" in files and "merges.txt" in files:
        pieces = byte_pieces(files)
    elif "tokenizer.json" in files:
        pieces = fast_pieces(files)
    else:
        raise files.missing("merges.txt", "tokenizer.json")
    layout = Layout(before=("<s>",), prefix=("<s>",))
    return Vocabulary(pieces, pieces, layout, cleans=False)


def t5(files: Files, settings: Mapping[str, Any]) -> Vocabulary:
    """spiece.model, with sentinels at its end, counted down; or tokenizer.json."""
    if "spiece.model" not in files:
        if "tokenizer.json" not in files:
            raise files.missing("spiece.model", "tokenizer.json")
        fast = fast_pieces(files)
        sentinels = [i for x, i in files.added.items() if x.startswith("<extra_id_")]
        return Vocabulary(fast, fast, Layout(start="<pad>"), silent=sentinels)
    processor = files.sentencepiece("spiece.model")
    ordinary, special = _plain(processor)
    count = files.json("tokenizer_config.json").get("extra_ids")
    count = 100 if count is None else count
    first = processor.get_piece_size()
    extra = {f"<extra_id_{count - 1 - i}>": first + i for i in range(count)}
    pieces = SentencePieces(processor, ordinary, special | extra, processor.unk_id())
    return Vocabulary(
        pieces, pieces, Layout(start="<pad>"), silent=list(extra.values())
    )


BUILDERS: dict[str, Callable[[Files, Mapping[str, Any]], Vocabulary]] = {
    "marian": marian,
    "pegasus": marian,  # As `export_huggingface` writes it.
    "m2m_100": m2m_100,
    "bart": bart,
    "mbart": mbart,
    "t5": t5,
    "mt5": t5,
}


def read_vocabulary(
    files: Files, family: str, settings: Mapping[str, Any]
) -> Vocabulary:
    """The vocabulary of a family, or Marian's where a model of another has its files.

    Raises:
        InteropError: a file is missing or damaged, or the family is not known.
    """
    if "source.spm" in files:  # So have all models that were trained here.
        return marian(files, settings)
    if family not in BUILDERS:
        raise InteropError(
            f"{files.directory}: tokenisers are known of {', '.join(BUILDERS)}; the model is of "
            f"{family!r}."
        )
    return BUILDERS[family](files, settings)


def _fairseq(files: Files, codes: Sequence[str], layout: Layout) -> Vocabulary:
    """Pieces of sentencepiece.bpe.model from 4 on, then languages; or tokenizer.json."""
    code = r"([a-z]{2,3}_[A-Z][A-Za-z]+)"
    if "sentencepiece.bpe.model" not in files:
        if "tokenizer.json" not in files:
            raise files.missing("sentencepiece.bpe.model", "tokenizer.json")
        fast = fast_pieces(files)
        found = {x: index for x in codes if (index := fast.index(x)) is not None}
        return Vocabulary(fast, fast, layout, found | _added(files, code))
    processor = files.sentencepiece("sentencepiece.bpe.model")
    ordinary = {x: i + 1 for x, i in _plain(processor)[0].items()}
    first = processor.get_piece_size() + 1
    languages = {x: first + i for i, x in enumerate(codes)} | _added(files, code)
    special = FAIRSEQ | languages
    special |= {"<mask>": files.added.get("<mask>", first + len(codes))}
    pieces = SentencePieces(processor, ordinary, special, FAIRSEQ["<unk>"])
    return Vocabulary(pieces, pieces, layout, languages)


def _plain(
    processor: sentencepiece.SentencePieceProcessor,
) -> tuple[dict[str, int], dict[str, int]]:
    """Pieces that text can become, and those that it cannot, with SentencePiece's own ids."""
    ordinary: dict[str, int] = {}
    special: dict[str, int] = {}
    for index in range(processor.get_piece_size()):
        control = processor.is_control(index) or processor.is_unknown(index)
        (special if control else ordinary)[processor.id_to_piece(index)] = index
    return ordinary, special


def _added(files: Files, pattern: str) -> dict[str, int]:
    """Languages among the tokens that were put beside a vocabulary."""
    found = {x: re.fullmatch(pattern, x) for x in files.added}
    return {m[1]: files.added[x] for x, m in found.items() if m}
