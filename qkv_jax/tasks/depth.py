"""How often tokens went through a block that each leaves when it has halted."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DepthScore:
    """The depth of tokens, and what it spares, of a classifier whose depth is adaptive.

    Attributes:
        most: applications of the block to a token, at most.
    """

    most: int

    def __post_init__(self):
        if self.most < 1:
            raise ValueError(f"most must be positive; got {self.most}.")

    def __call__(
        self, outputs: Arrays, arrays: Arrays, names: Sequence[str]
    ) -> dict[str, float]:
        """Depths over all tokens of all texts.

        Args:
            outputs: depth (B, T) int, 0 where there is no token.
            arrays: the examples.
            names: of the classes.

        Returns:
            "depth_mean" and "depth_most", in applications; "spared", the share of `most`
            applications a token that was not asked for.

        Raises:
            ValueError: the model's depth is not adaptive, or deeper than `most`.
        """
        found = self._depths(outputs)
        mean = float(found.mean())
        return {
            "depth_mean": mean,
            "depth_most": float(found.max()),
            "spared": 1.0 - mean / self.most,
        }

    def draw(
        self, outputs: Arrays, arrays: Arrays, names: Sequence[str], directory: Path
    ) -> None:
        """Writes depth.png: tokens by depth, texts by mean depth, and the depth at each place."""
        depth = self._depths(outputs)
        per_text = outputs["depth"].sum(axis=1) / (outputs["depth"] > 0).sum(axis=1)
        right = outputs["logits"].argmax(axis=1) == arrays["labels"]
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        left, middle, last = figure.subplots(1, 3)
        counts = np.bincount(depth, minlength=self.most + 1)[1:]
        places = np.arange(1, self.most + 1)
        left.bar(places, counts / counts.sum())
        left.set(xlabel="applications", ylabel="share of tokens", xticks=places)
        middle.hist([per_text[right], per_text[~right]], bins=20, stacked=True)
        middle.legend(["right", "wrong"], title="the class is", fontsize=8)
        middle.set(xlabel="mean applications of a text", ylabel="texts")
        there = (outputs["depth"] > 0).sum(axis=0)
        # Places that few texts reach would be noise.
        kept = there >= max(1, len(right) // 20)
        means = outputs["depth"].sum(axis=0)[kept] / there[kept]
        last.plot(np.flatnonzero(kept), means, "o-", markersize=3)
        last.set(xlabel="place in the text", ylabel="mean applications")
        last.set_ylim(0, self.most)
        figure.savefig(directory / "depth.png", dpi=150)

    def _depths(self, outputs: Arrays) -> np.ndarray:
        if "depth" not in outputs:
            raise ValueError(
                "DepthScore needs a model whose depth is adaptive: set model.halting."
            )
        found = outputs["depth"][outputs["depth"] > 0]
        if found.max() > self.most:
            raise ValueError(
                f"most must be what the model has, its layers; got {self.most}, "
                f"and a token of depth {found.max()}."
            )
        return found
