"""Retrieval between pictures and captions, and the quality of captions that were generated."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

Arrays = Mapping[str, np.ndarray]
_BYTES = re.compile(r"(?:<0x[0-9A-F]{2}>)+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageTextScore:
    """Recall at 1 and 5 in both directions, chrF and exact matches of captions.

    Attributes:
        end: the token that ends a caption.
        pad: the token that fills it up.
        pictures: that `draw` shows.
    """

    end: int = 2
    pad: int = 0
    pictures: int = 12

    def __call__(
        self, outputs: Arrays, arrays: Arrays, names: Sequence[str]
    ) -> dict[str, float]:
        """Means over styles and languages, in [0, 1], but "chrf" in [0, 100].

        Args:
            outputs: image (B, S, W) and text (B, L, W), whose products say how well they fit;
                captions (B, S, L, T).
            arrays: tokens (B, L, T), whose first is the language's tag.
            names: the pieces of text of all tokens.

        Returns:
            "recall1", the mean of "image_to_text1" and "text_to_image1"; "recall5" likewise;
            "chrf" (sacrebleu's, of the corpus), "exact"; and "recall1_<tag>", "chrf_<tag>",
            "exact_<tag>" of each language.
        """
        fits = np.einsum("bsw,clw->slbc", outputs["image"], outputs["text"])
        to_text, to_image = ranks(fits), ranks(fits.swapaxes(2, 3))
        values = {
            "image_to_text1": (to_text < 1).mean(),
            "image_to_text5": (to_text < 5).mean(),
            "text_to_image1": (to_image < 1).mean(),
            "text_to_image5": (to_image < 5).mean(),
        }
        for at in (1, 5):
            both = values[f"image_to_text{at}"] + values[f"text_to_image{at}"]
            values[f"recall{at}"] = both / 2
        told: list[tuple[float, float]] = []
        for k, tag in enumerate(names[t].strip("<>") for t in self._tags(arrays)):
            found = np.stack([to_text[:, k], to_image[:, k]])
            values[f"recall1_{tag}"] = (found < 1).mean()
            told.append(self._captions(outputs, arrays, names, k))
            values[f"chrf_{tag}"], values[f"exact_{tag}"] = told[-1]
        values["chrf"], values["exact"] = np.mean(told, axis=0)
        return {name: float(value) for name, value in values.items()}

    def draw(
        self, outputs: Arrays, arrays: Arrays, names: Sequence[str], directory: Path
    ) -> None:
        """Writes captions.png: pictures with what was said of them, and the true captions."""
        count = min(self.pictures, len(arrays["image"]))
        chosen = np.linspace(0, len(arrays["image"]) - 1, count).astype(int)
        columns = min(4, count)
        figure = Figure(figsize=(4 * columns, 2.6 * -(-count // columns)))
        for place, row in enumerate(chosen):
            axes = figure.add_subplot(-(-count // columns), columns, place + 1)
            axes.imshow(arrays["image"][row, 0])
            axes.set_axis_off()
            said = [
                f"{self.text(found, names)}\n({self.text(true, names)})"
                for found, true in zip(
                    outputs["captions"][row, 0], arrays["tokens"][row]
                )
            ]
            axes.set_title("\n".join(said), fontsize=6)
        figure.tight_layout()
        figure.savefig(Path(directory) / "captions.png", dpi=110)

    def text(self, tokens: np.ndarray, names: Sequence[str]) -> str:
        """The text of a caption's tokens, without its tag."""
        tokens = tokens[1:]
        ends = np.flatnonzero((tokens == self.end) | (tokens == self.pad))
        pieces = "".join(names[t] for t in (tokens[: ends[0]] if len(ends) else tokens))
        return _BYTES.sub(_from_bytes, pieces).replace("▁", " ").strip()

    def _tags(self, arrays: Arrays) -> np.ndarray:
        return arrays["tokens"][0, :, 0]

    def _captions(
        self, outputs: Arrays, arrays: Arrays, names: Sequence[str], language: int
    ) -> tuple[float, float]:
        from sacrebleu.metrics import CHRF  # Takes a while to import.

        truth = [self.text(tokens, names) for tokens in arrays["tokens"][:, language]]
        styles = outputs["captions"].shape[1]
        found = [
            self.text(tokens, names)
            for style in range(styles)
            for tokens in outputs["captions"][:, style, language]
        ]
        same = np.mean([a == b for a, b in zip(found, truth * styles)])
        return CHRF().corpus_score(found, [truth * styles]).score, float(same)


def ranks(fits: np.ndarray) -> np.ndarray:
    """How many others fit a row better, or as well, than its own: (..., B, B) -> (..., B)."""
    own = np.diagonal(fits, axis1=-2, axis2=-1)[..., None]
    return (fits >= own).sum(axis=-1) - 1


def _from_bytes(found: re.Match[str]) -> str:
    content = bytes.fromhex(re.sub("<0x|>", "", found[0]))
    return content.decode("utf-8", errors="replace")
