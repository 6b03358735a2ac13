"""AN4 (Carnegie Mellon, 1991): spelled words, numbers and commands, as cepstra."""

import dataclasses
from pathlib import Path

import numpy as np

from qkv_jax.data.audio import mel_of_cepstra
from qkv_jax.data.errors import DataError
from qkv_jax.data.splits import Splits
from qkv_jax.data.utterances import (
    Units,
    check_offsets,
    read_npz,
    train_units,
    utterance_rows,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class An4Data:
    """948 utterances of 74 speakers to learn from, 130 of 10 others as the test.

    Attributes:
        directory: with an4_train.npz and an4_test.npz: "mfcc" (frames, 13), "offsets", where each
            utterance begins and the last ends, "text", and "ids", an4_clstk/SPEAKER/UTTERANCE.
        units: what transcripts are written in, see `train_units`.
        subwords: V, where units are subwords.
        mel: bands that the cepstra are turned back into, so that bands can be masked and moved;
            0: the cepstra as they are.
        valid_speakers: of the training part, held out as the validation part.
        seed: draws them.
    """

    directory: Path
    units: Units = "characters"
    subwords: int = 100
    mel: int = 40
    valid_speakers: int = 7
    seed: int = 0

    def load(self) -> Splits:
        """Utterances as `utterance_rows` gives them; names: the pieces of the vocabulary."""
        features, texts, ids = self._read("an4_train.npz")
        speakers = np.array([name.split("/")[-2] for name in ids])
        known = np.unique(speakers)
        if not 0 < self.valid_speakers < len(known):
            raise DataError(
                f"valid_speakers must leave some of the {len(known)} speakers to learn from; "
                f"got {self.valid_speakers}"
            )
        chosen = np.random.default_rng(self.seed).permutation(known)
        held_out = np.isin(speakers, chosen[: self.valid_speakers])
        inside, outside = np.flatnonzero(~held_out), np.flatnonzero(held_out)
        tokenizer = train_units([texts[i] for i in inside], self.units, self.subwords)

        def rows(which: np.ndarray) -> dict[str, np.ndarray]:
            return utterance_rows(
                [features[i] for i in which], [texts[i] for i in which], tokenizer
            )

        test_features, test_texts, _ = self._read("an4_test.npz")
        return Splits(
            train=rows(inside),
            valid=rows(outside),
            test=utterance_rows(test_features, test_texts, tokenizer),
            sizes={
                "vocabulary": tokenizer.vocab_size,
                "channels": features[0].shape[1],
            },
            names=tuple(tokenizer.pieces(range(tokenizer.vocab_size))),
            padded=("features",),
            report=(
                f"speakers: {len(known) - self.valid_speakers}, validation {self.valid_speakers}",
                f"vocabulary: {tokenizer.vocab_size} {self.units}",
            ),
        )

    def _read(self, name: str) -> tuple[list[np.ndarray], list[str], list[str]]:
        path = Path(self.directory) / name
        arrays = read_npz(path, {"mfcc": 2, "offsets": 1, "text": 1, "ids": 1})
        check_offsets(path, arrays["offsets"], len(arrays["text"]), len(arrays["mfcc"]))
        if any(str(name).count("/") < 1 for name in arrays["ids"]):
            raise DataError(f"{path}: 'ids' must be PART/SPEAKER/UTTERANCE")
        frames = arrays["mfcc"]
        frames = mel_of_cepstra(frames, self.mel) if self.mel else frames
        features = np.split(frames, arrays["offsets"][1:-1])
        return (
            features,
            [str(t) for t in arrays["text"]],
            [str(i) for i in arrays["ids"]],
        )
