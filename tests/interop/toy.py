"""Directories laid out as published tokenisers are, with vocabularies of a few sentences."""

import io
import json
from pathlib import Path
from typing import Any

import sentencepiece

from qkv_jax.interop.languages import M2M100, MBART, MBART50, NLLB

ENGLISH = [
    "The house is small.",
    "The houses are green, and the garden is not.",
    "A dog, a cat and a bird sat in the garden.",
    "Is the small dog green? No, it's the bird!",
    "We don't see the cat 1 2 3 4 5 6 7 8 9 0.",
]
GERMAN = [
    "Das Haus ist klein.",
    "Die Häuser sind grün, und der Garten ist es nicht.",
    "Ein Hund, eine Katze und ein Vogel saßen im Garten.",
    "Ist der kleine Hund grün? Nein, es ist der Vögel!",
    "Wir sehen die Katze nicht, über 10 Größen.",
]
# Umlauts, emoji, unknown characters, runs of spaces, and nothing.
DIFFICULT = [
    "The house is small.",
    "Die Häuser sind grün.",
    "the   green    dog",
    "",
    "grün 🙂🙃 Garten 你好 the",
    "A bird , a cat ! Is it ' s n't ?",
    "  Hund",
]
SPECIAL = ["</s> the <unk>", "de_DE eng_Latn __de__", "<mask><pad>", "a <extra_id_0> b"]


def train(sentences: list[str], **options: Any) -> bytes:
    """A SentencePiece model of about 90 pieces."""
    model = io.BytesIO()
    options = {"vocab_size": 90, "model_type": "unigram"} | options
    options["hard_vocab_limit"] = options["model_type"] == "bpe"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences * 3),
        model_writer=model,
        minloglevel=2,
        num_threads=1,
        **options,
    )
    return model.getvalue()


def pieces(model: bytes) -> list[str]:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    return [processor.id_to_piece(i) for i in range(processor.get_piece_size())]


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def marian(directory: Path, *, separate: bool = False, codes: tuple[str, ...] = ()):
    """Ids in an order that is not SentencePiece's; padding comes last."""
    source, target = train(ENGLISH), train(GERMAN)
    (directory / "source.spm").write_bytes(source)
    (directory / "target.spm").write_bytes(target)
    content = [pieces(source), pieces(target)]
    content = content if separate else [content[0] + content[1]]
    sizes = []
    for name, found in zip(("vocab.json", "target_vocab.json"), content):
        names = ["</s>", "<unk>", *(f">>{code}<<" for code in codes)]
        names += [x for x in sorted(set(found)) if x not in ("<s>", *names)]
        names = names[:45] if separate else names
        write_json(directory / name, {x: i for i, x in enumerate([*names, "<pad>"])})
        sizes.append(len(names) + 1)
    config = {"source_lang": "en", "target_lang": "de", "separate_vocabs": separate}
    write_json(directory / "tokenizer_config.json", config)
    pad = sizes[0] - 1
    return {
        "model_type": "marian",
        "vocab_size": sizes[0],
        "decoder_vocab_size": sizes[-1],
        "pad_token_id": pad,
        "eos_token_id": 0,
        "decoder_start_token_id": pad,
        "bad_words_ids": [[pad]],
    }


def m2m_100(directory: Path) -> dict[str, Any]:
    model = train(ENGLISH + GERMAN, model_type="bpe")
    (directory / "sentencepiece.bpe.model").write_bytes(model)
    names = ["<s>", "<pad>", "</s>", "<unk>"]
    names += [x for x in sorted(pieces(model)) if x not in names]
    write_json(directory / "vocab.json", {x: i for i, x in enumerate(names)})
    languages = [f"__{code}__" for code in M2M100]
    config = {"additional_special_tokens": languages, "num_madeup_words": 8}
    config["tokenizer_class"] = "M2M100Tokenizer"
    write_json(directory / "tokenizer_config.json", config)
    size = len(names) + 100 + 8
    return fairseq_settings("m2m_100", size)


def fairseq_settings(family: str, size: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": family,
        "vocab_size": size,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        **more,
    }


def fairseq(directory: Path, codes: tuple[str, ...], kind: str, model_type: str):
    """sentencepiece.bpe.model, with a gap of one id, then languages, then the mask."""
    model = train(ENGLISH + GERMAN, model_type=model_type)
    (directory / "sentencepiece.bpe.model").write_bytes(model)
    first = len(pieces(model)) + 1
    names = dict(enumerate(["<s>", "<pad>", "</s>", "<unk>"]))
    names |= {first + i: x for i, x in enumerate([*codes, "<mask>"])}
    added = {
        str(i): {
            "content": x,
            "special": True,
            "lstrip": x == "<mask>",
            "rstrip": False,
            "normalized": x == "<mask>",
            "single_word": False,
        }
        for i, x in names.items()
    }
    config = {"tokenizer_class": kind, "added_tokens_decoder": added}
    config["additional_special_tokens"] = list(codes)
    write_json(directory / "tokenizer_config.json", config)
    return first + len(codes) + 1


def nllb(directory: Path, *, legacy: bool = False) -> dict[str, Any]:
    size = fairseq(directory, NLLB, "NllbTokenizer", "bpe")
    if legacy:
        config = json.loads((directory / "tokenizer_config.json").read_text("utf-8"))
        write_json(
            directory / "tokenizer_config.json", config | {"legacy_behaviour": True}
        )
    return fairseq_settings("m2m_100", size + 2)


def mbart(directory: Path) -> dict[str, Any]:
    size = fairseq(directory, MBART, "MBartTokenizer", "unigram")
    return fairseq_settings("mbart", size) | {"decoder_start_token_id": None}


def mbart50(directory: Path) -> dict[str, Any]:
    size = fairseq(directory, MBART50, "MBart50Tokenizer", "unigram")
    return fairseq_settings("mbart", size)


def t5(directory: Path, family: str = "t5") -> dict[str, Any]:
    model = train(ENGLISH + GERMAN, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    (directory / "spiece.model").write_bytes(model)
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 5}
    config["additional_special_tokens"] = [f"<extra_id_{i}>" for i in range(5)]
    write_json(directory / "tokenizer_config.json", config)
    return {
        "model_type": family,
        "vocab_size": len(pieces(model)) + 13,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }


def bart(directory: Path) -> dict[str, Any]:
    """The 256 bytes in GPT-2's letters, and a few merges."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [i for i in range(256) if i not in shown]
    letters = [chr(i) for i in shown] + [chr(256 + i) for i in range(len(hidden))]
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ã", "¼"), ("i", "n"), ("e", "n")]
    names = ["<s>", "<pad>", "</s>", "<unk>", *letters]
    names += ["".join(pair) for pair in merges] + ["<mask>"]
    write_json(directory / "vocab.json", {x: i for i, x in enumerate(names)})
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (directory / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    return fairseq_settings("bart", len(names), forced_bos_token_id=0)
