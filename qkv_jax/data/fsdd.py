"""The Free Spoken Digit Dataset: six speakers say each digit 50 times."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qkv_jax.data.audio import log_mel, resample
from qkv_jax.data.errors import DataError
from qkv_jax.data.splits import Splits
from qkv_jax.data.utterances import (
    Units,
    check_offsets,
    read_npz,
    train_units,
    utterance_rows,
)

DIGITS = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FsddData:
    """3,000 recordings of a digit, at 8 kHz; the test is a speaker nobody has heard.

    Attributes:
        file: fsdd.npz: "audio" int16, "offsets", where each recording begins and the last ends,
            "label", "speaker", "index" (0 to 49, of a speaker's recordings of a digit),
            "speaker_names" and "sample_rate".
        held_out: the speaker who is the test part; None: the official test, index 0 to 4 of all
            speakers.
        valid_speaker: the speaker who is the validation part; None: a share of the recordings.
        valid_share: of the recordings that are left, where valid_speaker is None.
        units: what the digits' names are written in, see `train_units`.
        speeds: at which each recording is heard in training; see `resample`.
        mel: bands of the features, see `log_mel`.
        seed: draws the validation part.
    """

    file: Path
    held_out: str | None = "george"
    valid_speaker: str | None = None
    valid_share: float = 0.05
    units: Units = "words"
    speeds: tuple[float, ...] = (1.0,)
    mel: int = 40
    seed: int = 0

    def load(self) -> Splits:
        """Recordings as `utterance_rows` gives them; names: the pieces of the vocabulary."""
        arrays = self._read()
        rate = int(arrays["sample_rate"])
        clips = np.split(arrays["audio"] / 32_768, arrays["offsets"][1:-1])
        test = self._test(arrays)
        valid = ~test & self._valid(arrays, np.flatnonzero(~test))
        tokenizer = train_units(DIGITS, self.units)

        def rows(which: np.ndarray, speeds: Sequence[float]) -> dict[str, np.ndarray]:
            heard = [resample(clips[i], speed) for speed in speeds for i in which]
            said = [DIGITS[i] for i in arrays["label"][which]]
            features = [log_mel(x, rate, filters=self.mel) for x in heard]
            return utterance_rows(features, said * len(speeds), tokenizer)

        train = np.flatnonzero(~test & ~valid)
        return Splits(
            train=rows(train, self.speeds),
            valid=rows(np.flatnonzero(valid), (1.0,)),
            test=rows(np.flatnonzero(test), (1.0,)),
            sizes={"vocabulary": tokenizer.vocab_size, "channels": self.mel},
            names=tuple(tokenizer.pieces(range(tokenizer.vocab_size))),
            padded=("features",),
            report=(
                f"test: {self.held_out or 'index 0 to 4 of all speakers'}",
                f"speeds of the training part: {', '.join(map(str, self.speeds))}",
            ),
        )

    def _test(self, arrays: dict[str, np.ndarray]) -> np.ndarray:
        if self.held_out is None:
            return arrays["index"] < 5
        return self._said_by("held_out", self.held_out, arrays)

    def _valid(self, arrays: dict[str, np.ndarray], left: np.ndarray) -> np.ndarray:
        if self.valid_speaker is not None:
            if self.valid_speaker == self.held_out:
                raise DataError(
                    f"valid_speaker must not be held_out; both are {self.held_out!r}"
                )
            return self._said_by("valid_speaker", self.valid_speaker, arrays)
        if not 0 < self.valid_share < 1:
            raise DataError(f"valid_share must be in (0, 1); got {self.valid_share}")
        count = max(round(len(left) * self.valid_share), 1)
        drawn = np.random.default_rng(self.seed).permutation(left)[:count]
        return np.isin(np.arange(len(arrays["label"])), drawn)

    def _said_by(
        self, option: str, name: str, arrays: dict[str, np.ndarray]
    ) -> np.ndarray:
        names = [str(known) for known in arrays["speaker_names"]]
        if name not in names:
            raise DataError(f"{option} must be one of {', '.join(names)}; got {name!r}")
        return arrays["speaker"] == names.index(name)

    def _read(self) -> dict[str, np.ndarray]:
        path = Path(self.file)
        one = ("audio", "offsets", "label", "speaker", "index", "speaker_names")
        arrays = read_npz(path, {name: 1 for name in one} | {"sample_rate": 0})
        check_offsets(
            path, arrays["offsets"], len(arrays["label"]), len(arrays["audio"])
        )
        return arrays
