"""Which attention a layer computes: the softmax over all that its mask admits, or something cheaper."""

import functools
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from qkv_jax.ops import Mask, favor_projection, masks, patterns

Array = jax.Array
KindName = Literal[
    "softmax",
    "window",
    "block_sparse",
    "linear",
    "performer",
    "linformer",
    "entmax",
    "adaptive_span",
]
# What each kind can be told, and what holds where it is not.
OPTIONS: dict[str, dict[str, Any]] = {
    "window": {"window": 64},
    "block_sparse": {"block": 64, "random": 1, "longest": 1024},
    "performer": {"features": 64},
    "linformer": {"rank": 64, "longest": 1024},
    "adaptive_span": {"longest": 1024, "ramp": 32.0, "penalty": 0.0},
}
# Linear in length through their products, and so without a mask of pairs.
MASKLESS = ("linear", "performer", "linformer")


@dataclass(frozen=True, kw_only=True)
class AttentionKind:
    """A kind of self-attention, and its sizes; None: as said here, where the kind has it.

    Attributes:
        name: "softmax" over all keys; "window": those near the query; "block_sparse": those of the
            query's block, its neighbours, the first and some random ones (Zaheer et al. 2020,
            arXiv 2007.14062);
            "linear": elu(x) + 1 in place of the softmax (Katharopoulos et al. 2020, 2006.16236);
            "performer": random features of it (Choromanski et al. 2021, 2009.14794), drawn once and
            for all; "linformer": keys and values of all places mixed into a few (Wang et al. 2020,
            2006.04768), not causal; "entmax": exact zeros, with a learned alpha in (1, 2) a head
            (Correia et al. 2019, 1909.00015); "adaptive_span": each head learns how far it
            looks (Sukhbaatar et al. 2019, 1905.07799).
        layers: numbers of the layers that have it, the others being "softmax"; None: all.
        window: of "window": keys on each side of the query; 64.
        block, random: of "block_sparse": tokens of a block, and random blocks of each; 64, 1.
        features: F of "performer"; 64.
        rank: of "linformer": mixed keys; 64.
        longest: of "block_sparse" and "linformer": tokens of the longest sequence; of
            "adaptive_span": the longest span; 1024.
        ramp: of "adaptive_span": tokens over which weights fade out; 32.
        penalty: of "adaptive_span": added to the loss a token, times the mean share of `longest`
            that the heads of all such layers look at; 0.
        share_key_value: whether values are the keys: one projection less.
    """

    name: KindName = "softmax"
    layers: tuple[int, ...] | None = None
    window: int | None = None
    block: int | None = None
    random: int | None = None
    features: int | None = None
    rank: int | None = None
    longest: int | None = None
    ramp: float | None = None
    penalty: float | None = None
    share_key_value: bool = False

    def __post_init__(self):
        if self.name not in get_args(KindName):
            raise ValueError(
                f"name must be one of {get_args(KindName)}; got {self.name!r}."
            )
        if self.layers == ():
            raise ValueError("layers must be None, for all, or numbers of layers.")
        known = OPTIONS.get(self.name, {})
        for options in OPTIONS.values():
            for option in options:
                value = getattr(self, option)
                if value is None:
                    continue
                if option not in known:
                    raise ValueError(f"{option} is not of the kind {self.name!r}.")
                if value < 0 or (value == 0 and option not in ("penalty", "random")):
                    raise ValueError(f"{option} must be positive; got {value}.")

    def option(self, name: str) -> Any:
        """The value of an option that the kind has."""
        value = getattr(self, name)
        return OPTIONS[self.name][name] if value is None else value

    @property
    def takes_any_mask(self) -> bool:
        """Whether any pair can be ruled out; else only keys, or what comes after the query."""
        return self.name not in MASKLESS

    @property
    def packs(self) -> bool:
        """Whether a row of several sentences gives what a row for each does."""
        return self.takes_any_mask and self.name != "block_sparse"

    @property
    def drops_weights(self) -> bool:
        """Whether there is dropout on its weights."""
        return self.takes_any_mask and self.name != "entmax"

    def of_layer(self, number: int) -> "AttentionKind":
        """The kind of one layer."""
        return self if self.layers is None or number in self.layers else SOFTMAX

    def mask(self) -> Mask | None:
        """What it rules out beside what a caller does; None: nothing."""
        if self.name == "window":
            return masks.window(self.option("window"), self.option("window"))
        if self.name == "block_sparse":
            return patterns.big_bird(
                self.option("longest"),
                self.option("block"),
                global_blocks=1,
                random_blocks=self.option("random"),
                seed=0,
            )
        return None


SOFTMAX = AttentionKind()


@functools.cache
def directions(features: int, size: int) -> np.ndarray:
    """The random directions (F, H) of "performer", the same in every layer and run."""
    with jax.ensure_compile_time_eval():
        return np.asarray(favor_projection(jax.random.key(0), features, size))


def whole_keys(mask: Mask | None, batch: int, length: int) -> tuple[bool, Array | None]:
    """A mask as causal or not, and the keys (B, S) that are there; None: all.

    Raises:
        NotImplementedError: it rules out other pairs.
    """
    causal, there = False, None
    parts = [] if mask is None else [mask]
    while parts:
        part = parts.pop()
        if isinstance(part, masks.And):
            parts += [part.left, part.right]
            continue
        if part == masks.causal():
            causal = True
            continue
        keys = isinstance(part, masks.Lengths) and part.query is None
        if isinstance(part, masks.Dense):
            keys = part.array.shape[1:3] == (1, 1)
        if not keys:
            raise NotImplementedError(
                "attention that is linear in length rules out whole keys and what comes after the "
                f"query, no other pairs; got {type(part).__name__}."
            )
        own = part.materialise((batch, 1, 1, length)).reshape(-1, length)
        own = jnp.broadcast_to(own, (batch, length))
        there = own if there is None else there & own
    return causal, there
