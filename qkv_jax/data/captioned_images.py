"""Pictures in several drawing styles, each with a caption in several languages, as emoji come."""

import dataclasses
import json
import zipfile
from pathlib import Path

import numpy as np

from qkv_jax.data.errors import DataError
from qkv_jax.data.splits import Splits
from qkv_jax.data.tokenizer import EOS, PAD, train_tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionedImages:
    """A folder of emoji.jsonl, a caption file, and a <style>_64.npz for each drawing style.

    Line i of the caption file is a JSON object with "split" ("train", "valid" or "test") and
    "name_<language>"; it belongs to row i of "images" (n, H, W, 3) uint8 in each .npz file.

    Attributes:
        directory: of the files.
        captions: the name of the caption file.
        images: the names of the files of pictures; "{}" is where the style stands.
        languages: of the captions.
        styles: of the pictures to train and validate on.
        test_styles: of those to test on; None: the same.
        vocabulary: pieces of text, for all languages together, from the training captions.
        longest: tokens of a caption, tag and end included; longer ones are cut.
    """

    directory: Path = Path("emoji")
    captions: str = "emoji.jsonl"
    images: str = "{}_64.npz"
    languages: tuple[str, ...] = ("en", "de", "fr")
    styles: tuple[str, ...] = ("google", "twitter")
    test_styles: tuple[str, ...] | None = None
    vocabulary: int = 1500
    longest: int = 28

    def __post_init__(self):
        if not self.languages or not self.styles or self.test_styles == ():
            raise ValueError("languages, styles and test_styles must not be empty.")
        if self.longest < 3:
            raise ValueError(f"longest must be at least 3; got {self.longest}.")

    def load(self) -> Splits:
        """Parts with "image" (B, S, H, W, 3) uint8 and "tokens" (B, L, T) int32.

        There are S styles and L languages. A caption is its language's tag, its pieces, and EOS.

        Raises:
            DataError: a file is missing, or is no such file.
        """
        rows = self._rows()
        part = np.asarray([row["split"] for row in rows])
        names = [[row[f"name_{tag}"] for row in rows] for tag in self.languages]
        learnt = [
            name
            for column in names
            for name, split in zip(column, part)
            if split == "train"
        ]
        tokenizer = train_tokenizer(
            learnt, vocab_size=self.vocabulary, character_coverage=1.0
        )
        size = tokenizer.vocab_size
        encoded = [
            [[size + tag, *ids][: self.longest - 1] + [EOS] for ids in column]
            for tag, column in enumerate(map(tokenizer.encode, names))
        ]
        T = max(len(ids) for column in encoded for ids in column)
        tokens = np.full((len(rows), len(self.languages), T), PAD, np.int32)
        for tag, column in enumerate(encoded):
            for row, ids in enumerate(column):
                tokens[row, tag, : len(ids)] = ids
        styles = {
            style: self._images(style, len(rows))
            for style in {*self.styles, *(self.test_styles or ())}
        }

        def of(split: str, chosen: tuple[str, ...]) -> dict[str, np.ndarray]:
            here = part == split
            images = np.stack([styles[style][here] for style in chosen], axis=1)
            return {"image": images, "tokens": tokens[here]}

        pieces = tokenizer.pieces(range(size))
        return Splits(
            train=of("train", self.styles),
            valid=of("valid", self.styles),
            test=of("test", self.test_styles or self.styles),
            sizes={"vocabulary": size + len(self.languages), "longest": T},
            names=(*pieces, *(f"<{tag}>" for tag in self.languages)),
            report=(
                f"captions in {', '.join(self.languages)} of up to {T} tokens",
                f"pictures by {', '.join(self.styles)}",
            ),
        )

    def _rows(self) -> list[dict]:
        path = self.directory / self.captions
        needed = ["split", *(f"name_{tag}" for tag in self.languages)]
        try:
            lines = path.read_text("utf-8").splitlines()
            rows = [json.loads(line) for line in lines]
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path} is no file of captions, a JSON object a line ({error}): "
                "--data.directory names its folder"
            ) from error
        for number, row in enumerate(rows, start=1):
            lacking = [x for x in needed if not isinstance(row, dict) or not row.get(x)]
            if lacking:
                raise DataError(f"{path}, line {number}: there is no {lacking[0]!r}")
        return rows

    def _images(self, style: str, count: int) -> np.ndarray:
        path = self.directory / self.images.format(style)
        try:
            with np.load(path, allow_pickle=False) as file:
                images = file["images"]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise DataError(
                f"{path} is no .npz file of 'images' ({error}): --data.styles names styles of "
                "which there is one"
            ) from error
        fitting = images.ndim == 4 and images.shape[3] == 3 and images.dtype == np.uint8
        if not fitting or len(images) != count:
            raise DataError(
                f"{path}: images must be ({count}, height, width, 3) uint8, a row for each line "
                f"of {self.captions}; got {images.shape} {images.dtype}"
            )
        return images
