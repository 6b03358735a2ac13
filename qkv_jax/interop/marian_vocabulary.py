"""The vocabularies of the Marian toolkit, as a Hugging Face tokeniser's files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sentencepiece
import yaml

from qkv_jax.interop.errors import InteropError

EOS, UNK, PAD = "</s>", "<unk>", "<pad>"


def vocabularies(
    directory: Path, decoder: Mapping[str, Any], *, pad: int
) -> tuple[dict[str, Any], int]:
    """The files of a Hugging Face tokeniser, and the id of EOS.

    Args:
        directory: with vocabularies in YAML (piece: id), source.spm and target.spm; or with
            vocabularies that are SentencePiece models.
        decoder: decoder.yml, which names them; without it they are found by their names.
        pad: id of padding, one more than the model's largest.

    Returns:
        name -> content of a JSON file, or the path of a file to copy; and the id.

    Raises:
        InteropError: a file is missing or damaged, or does not fit the model.
    """
    paths = _paths(directory, decoder)
    found = [_vocabulary(path, pad) for path in paths]
    separate = found[0] != found[1]
    files: dict[str, Any] = {"vocab.json": found[0]}
    if separate:
        files["target_vocab.json"] = found[1]
    for name, path in zip(("source.spm", "target.spm"), paths):
        files[name] = path if path.suffix == ".spm" else directory / name
        if not files[name].is_file():
            raise InteropError(
                f"{files[name]} is missing: models without SentencePiece have their text cut "
                "into pieces by other programs, and cannot be taken."
            )
    if found[0][EOS] != found[1][EOS]:
        raise InteropError(f"{paths[1]} and {paths[0]} have {EOS} at different ids.")
    files["tokenizer_config.json"] = {"separate_vocabs": separate}
    return files, found[0][EOS]


def read_yaml(path: Path, content: bytes) -> dict[str, Any]:
    """A mapping whose scalars are all text: "no" is a word, and a piece of vocabularies.

    Raises:
        InteropError: it is none.
    """
    loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
    try:
        found = yaml.load(content.decode("utf-8"), Loader=loader)
    except (yaml.YAMLError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InteropError(f"{path} holds no YAML ({reason}).") from None
    if not isinstance(found, dict):
        raise InteropError(f"{path} must hold a mapping of YAML.")
    return found


def _paths(directory: Path, decoder: Mapping[str, Any]) -> tuple[Path, Path]:
    """Of the source's and the target's vocabulary."""
    named = [directory / Path(str(name)).name for name in decoder.get("vocabs") or []]
    for patterns in (
        ("*src.vocab.yml", "*trg.vocab.yml"),
        ("*vocab.yml",),
        ("*vocab.spm",),
    ):
        listed = [sorted(directory.glob(pattern)) for pattern in patterns]
        if not named and all(len(paths) == 1 for paths in listed):
            named = [paths[0] for paths in listed]
    if not 1 <= len(named) <= 2:
        raise InteropError(
            f"{directory} must name one or two vocabularies in decoder.yml (vocabs), or hold one "
            f"named *vocab.yml or *vocab.spm; it names {len(named)}."
        )
    for path in named:
        if not path.is_file():
            raise InteropError(f"{path} is missing: decoder.yml names it.")
    return named[0], named[-1]


def _vocabulary(path: Path, pad: int) -> dict[str, int]:
    """Piece -> id, with padding."""
    if path.suffix == ".spm":
        try:
            processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise InteropError(f"{path} is no SentencePiece model ({error}).") from None
        count = processor.get_piece_size()
        found = {processor.id_to_piece(index): index for index in range(count)}
    else:
        texts = read_yaml(path, path.read_bytes())
        wrong = [x for x in texts.values() if not (isinstance(x, str) and x.isdigit())]
        if wrong:
            raise InteropError(
                f"{path} must hold pieces with ids; one has {wrong[0]!r}."
            )
        found = {piece: int(index) for piece, index in texts.items()}
    missing = [piece for piece in (EOS, UNK) if piece not in found]
    if missing or PAD in found or max(found.values()) >= pad:
        raise InteropError(
            f"{path} does not fit the model: it must hold {EOS} and {UNK}, not {PAD}, and ids "
            f"below {pad:,}; its largest is {max(found.values(), default=0):,}."
        )
    return found | {PAD: pad}
