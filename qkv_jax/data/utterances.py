"""Utterances, features of their frames and what was said, as rows of padded arrays."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import sentencepiece

from qkv_jax.data.errors import DataError
from qkv_jax.data.tokenizer import BOS, EOS, PAD, UNK, Tokenizer

Units = Literal["characters", "subwords", "words"]
_MODEL_TYPES = {"characters": "char", "subwords": "unigram", "words": "word"}


def train_units(texts: Sequence[str], units: Units, size: int = 100) -> Tokenizer:
    """A tokenizer of transcripts: the units that a recogniser writes.

    Unlike `train_tokenizer`'s it has no bytes, as a recogniser of frames needs few classes; what
    the texts lack becomes UNK.

    Args:
        texts: transcripts of the training part.
        units: "characters", "words", or "subwords" (SentencePiece, unigram).
        size: V of subwords, special ones included, at most; of the others it is what the texts hold.

    Raises:
        ValueError: no such units.
        DataError: no text, or too small a size.
    """
    if units not in _MODEL_TYPES:
        raise ValueError(f"units must be one of {tuple(_MODEL_TYPES)}; got {units!r}.")
    if not any(text.strip() for text in texts):
        raise DataError("no transcripts to train a tokenizer on: all are empty")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type=_MODEL_TYPES[units],
            vocab_size=size if units == "subwords" else 1_000_000,
            hard_vocab_limit=False,
            add_dummy_prefix=units != "characters",
            character_coverage=1.0,
            normalization_rule_name="identity",
            pad_id=PAD,
            bos_id=BOS,
            eos_id=EOS,
            unk_id=UNK,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).partition("\n")[0].strip()
        raise DataError(f"no {units} in {size} pieces: {reason}") from None
    return Tokenizer(model.getvalue())


def utterance_rows(
    features: Sequence[np.ndarray], texts: Sequence[str], tokenizer: Tokenizer
) -> dict[str, np.ndarray]:
    """Arrays of a part, an utterance a row.

    Args:
        features: of each, (its frames, C).
        texts: what was said in each.
        tokenizer: of `train_units`.

    Returns:
        "features" (rows, T, C) float32 and "lengths" (rows,) int32, their frames;
        "tokens" (rows, U) int32, without BOS and EOS, padded by PAD;
        "text" (rows, bytes) uint8, UTF-8, padded by 0: what a scorer compares with.
    """
    return {
        "features": pad_rows(features, np.float32),
        "lengths": np.array([len(frames) for frames in features], np.int32),
        "tokens": pad_rows(
            [np.array(ids, int) for ids in tokenizer.encode(texts)], np.int32
        ),
        "text": pad_rows(
            [np.frombuffer(text.encode(), np.uint8) for text in texts], np.uint8
        ),
    }


def pad_rows(rows: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    """Arrays of unequal first axes as one, with zeros after each."""
    longest = max(len(row) for row in rows)
    padded = np.zeros((len(rows), longest, *rows[0].shape[1:]), dtype)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded


def read_npz(path: Path, shapes: dict[str, int]) -> dict[str, np.ndarray]:
    """Arrays of an npz file.

    Args:
        path: of the file.
        shapes: names of arrays, and how many axes each has.

    Raises:
        DataError: there is no such file, or it lacks an array of that many axes.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in shapes if name in file}
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError:
        raise DataError(f"{path} is no npz file, or holds Python objects") from None
    for name, axes in shapes.items():
        if name not in arrays or arrays[name].ndim != axes:
            found = arrays[name].shape if name in arrays else "none"
            raise DataError(
                f"{path} must hold the array {name!r} of {axes} axes; found {found}"
            )
    return arrays


def check_offsets(path: Path, offsets: np.ndarray, rows: int, samples: int) -> None:
    """Raises DataError unless offsets part `samples` into `rows` runs."""
    fits = len(offsets) == rows + 1 and offsets[0] == 0 and offsets[-1] == samples
    if not fits or (np.diff(offsets) < 1).any():
        raise DataError(
            f"{path}: 'offsets' must rise from 0 to {samples:,} in {rows + 1:,} numbers, "
            f"where each utterance begins and the last ends"
        )
