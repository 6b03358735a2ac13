"""Recommenders of the next item of a history: SASRec (causal) and BERT4Rec (masked)."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from qkv_jax.layers import (
    Activation,
    AddPositions,
    Embedding,
    EncoderBlock,
    NormPlace,
    Remat,
    check_remat,
    make_norm,
    run_blocks,
)
from qkv_jax.ops import masks, segment_positions, split_rng

Array = jax.Array


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes and choices of the model.

    Attributes:
        items: V, numbered from 1; 0: the data's.
        objective: "next": each item is predicted from those before it, under a causal mask;
            "masked": items that are masked out are predicted from all others of the history.
        longest: T, items of the longest history.
        d_model: D.
        d_ff: F.
        heads: N.
        layers: L.
        activation: of the feed-forward layers.
        norm: "pre" or "post".
        output_bias: whether each item has a bias, which takes up how popular it is.
        dropout: on embeddings and each sublayer's output.
        attention_dropout, activation_dropout: on attention weights; after the activation.
        mask_rate: of "masked": the share of a row that is predicted in training.
        last_rate: of "masked": the share of rows in training in which it is the last item of each
            history, as in use.
        remat, scan_layers: what training keeps of each layer for its backward pass, and whether the
            layers are one loop, see `run_blocks`.
    """

    items: int = 0
    objective: Literal["next", "masked"] = "next"
    longest: int = 50
    d_model: int = 64
    d_ff: int = 256
    heads: int = 2
    layers: int = 2
    activation: Activation = "gelu"
    norm: NormPlace = "pre"
    output_bias: bool = True
    dropout: float = 0.2
    attention_dropout: float = 0.2
    activation_dropout: float = 0.0
    mask_rate: float = 0.2
    last_rate: float = 0.1
    remat: Remat = "none"
    scan_layers: bool = False

    def __post_init__(self):
        check_remat(self.remat)
        if self.objective not in ("next", "masked"):
            raise ValueError(
                f"objective must be 'next' or 'masked'; got {self.objective!r}."
            )
        for name in ("longest", "d_model", "d_ff", "heads", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}.")
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(
                    f"{name} must be in [0, 1); got {getattr(self, name)}."
                )
        if not 0.0 < self.mask_rate <= 1.0:
            raise ValueError(f"mask_rate must be in (0, 1]; got {self.mask_rate}.")
        if not 0.0 <= self.last_rate <= 1.0:
            raise ValueError(f"last_rate must be in [0, 1]; got {self.last_rate}.")


def sasrec(**changes: Any) -> Config:
    """Self-attentive sequential recommendation: Kang and McAuley 2018, arXiv 1808.09781.

    Difference: the loss is cross-entropy over all items (Klenitskiy and Vasilev 2023, arXiv
    2309.07602), and not binary against a drawn item.
    """
    return Config(**({"objective": "next"} | changes))


def bert4rec(**changes: Any) -> Config:
    """Bidirectional encoder, masked items: Sun et al. 2019, arXiv 1904.06690.

    Difference: the share of masked items is the same in each row, not on average.
    """
    return Config(**({"objective": "masked"} | changes))


class _Questions(NamedTuple):
    """What the model is asked about rows of items.

    Attributes:
        items, segments: (B, T) int32, what it sees.
        at: (B, M) int32, the positions that are asked about; None: all T.
        labels: (B, M) int32, their items.
        weights: (B, M) float32, 0 where there is no question.
    """

    items: Array
    segments: Array
    at: Array | None
    labels: Array
    weights: Array


class Model(nnx.Module):
    """Rows of items (B, T) -> scores of all items, of what comes next or is masked."""

    unit = "items"

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        """Draws float32 parameters from the stream "params" of rngs."""
        if config.items < 1:
            raise ValueError(f"items must be positive; got {config.items}.")
        self.config = config
        dtype = jnp.float32
        # 0: no item; items + 1: a masked one.
        self.embedding = Embedding(
            config.items + 2, config.d_model, dtype=dtype, rngs=rngs
        )
        self.positions = AddPositions(
            config.d_model,
            positions="learned",
            longest=config.longest,
            norm="layer" if config.norm == "post" else None,
            dropout_rate=config.dropout,
            dtype=dtype,
            rngs=rngs,
        )
        parts: dict[str, dict[str, Any]] = {
            "attention": {
                "heads": config.heads,
                "dropout_rate": config.attention_dropout,
            },
            "feed_forward": {
                "d_ff": config.d_ff,
                "activation": config.activation,
                "dropout_rate": config.activation_dropout,
            },
            "residual": {
                "place": config.norm,
                "dropout_rate": config.dropout,
                "dtype": dtype,
            },
        }
        self.blocks = nnx.List(
            EncoderBlock(config.d_model, **parts, rngs=rngs)
            for _ in range(config.layers)
        )
        pre = config.norm == "pre"
        self.norm = (
            make_norm(config.d_model, "layer", 1e-5, dtype, rngs) if pre else None
        )
        self.bias = (
            nnx.Param(jnp.zeros(config.items), axes=("vocab",))
            if config.output_bias
            else None
        )

    def __call__(
        self, items: Array, segments: Array, *, rng: Array | None = None
    ) -> Array:
        """States (B, T, D) of rows of items (B, T), which see those of their own segment alone."""
        if items.shape[1] > self.config.longest:
            raise ValueError(
                f"rows have {items.shape[1]} items; the model's longest is "
                f"{self.config.longest}: make the data's and the model's `longest` the same."
            )
        rngs = split_rng(rng, len(self.blocks) + 1)
        mask = masks.segments(segments)
        if self.config.objective == "next":
            mask = mask & masks.causal()
        x = self.positions(
            self.embedding(items), segment_positions(segments), rng=rngs[0]
        )
        x = run_blocks(
            self.blocks,
            x,
            rngs[1:],
            lambda block, x, drawn: block(x, mask=mask, rng=drawn),
            remat=self.config.remat,
            scan=self.config.scan_layers,
        )
        return x if self.norm is None else self.norm(x)

    def logits(self, states: Array) -> Array:
        """States (..., D) -> logits (..., V), of item i at i - 1."""
        table = self.embedding.weights()[1 : self.config.items + 1]
        logits = jnp.einsum("...D,VD->...V", states, table)
        if self.bias is None:
            return logits
        return logits + self.bias[...].reshape((1,) * (logits.ndim - 1) + (-1,))

    def loss(self, batch: dict[str, Array], *, rng: Array | None):
        """Cross-entropy over all items, summed over what is asked, and the sums to report.

        Args:
            batch: items and segments (B, T), weight (B,); of held-out rows also target (B,).
            rng: draws dropout and what is masked; None: no dropout, and the last of each history
                is masked.
        """
        rngs = split_rng(rng, 2)
        asked = self._ask(batch, rngs[0])
        logits = self._answers(asked, rngs[1])
        weights = asked.weights * batch["weight"][:, None]
        labels = jnp.where(weights > 0.0, asked.labels - 1, 0)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        nll = jnp.sum(jnp.where(weights > 0.0, nll, 0.0) * weights)
        correct = jnp.sum((logits.argmax(-1) == labels) * weights)
        return nll, {
            "loss_sum": nll,
            "accuracy_sum": correct,
            "tokens": jnp.sum(weights),
        }

    def predict(self, batch: dict[str, Array]) -> dict[str, Array]:
        """scores (B, 1 + V) of the item that comes next, by its number; of 0, -inf."""
        logits = self._answers(self._ask_next(batch), None)[:, 0]
        nothing = jnp.full_like(logits[:, :1], -jnp.inf)
        return {"scores": jnp.concatenate([nothing, logits], axis=1)}

    def _answers(self, asked: _Questions, rng: Array | None) -> Array:
        states = self(asked.items, asked.segments, rng=rng)
        if asked.at is not None:
            states = jnp.take_along_axis(states, asked.at[..., None], axis=1)
        return self.logits(states)

    def _ask(self, batch: dict[str, Array], rng: Array | None) -> _Questions:
        if "target" in batch:
            return self._ask_next(batch)
        items, segments = batch["items"], batch["segments"]
        following = jnp.pad(segments[:, 1:], ((0, 0), (0, 1)))
        goes_on = (segments == following) & (items > 0)
        if self.config.objective == "next":
            labels = jnp.pad(items[:, 1:], ((0, 0), (0, 1)))
            return _Questions(
                items, segments, None, labels, goes_on.astype(jnp.float32)
            )
        return self._ask_masked(items, segments, ~goes_on & (items > 0), rng)

    def _ask_masked(
        self, items: Array, segments: Array, last: Array, rng: Array | None
    ) -> _Questions:
        """As many positions of each row as the rate says, or the last one of each history."""
        B, T = items.shape
        if rng is None:
            chance, only_last = jnp.zeros((B, T)), jnp.ones((B, 1), bool)
        else:
            draw, coin = jax.random.split(rng)
            chance = jax.random.uniform(draw, (B, T))
            only_last = jax.random.bernoulli(coin, self.config.last_rate, (B, 1))
        there = jnp.where(only_last, last, items > 0)
        count = T if rng is None else max(1, round(self.config.mask_rate * T))
        chance, at = jax.lax.top_k(jnp.where(there, chance, -1.0), count)
        weights = (chance >= 0.0).astype(jnp.float32)
        labels = jnp.take_along_axis(items, at, axis=1)
        rows = jnp.arange(B)[:, None]
        masked = jnp.where(weights > 0.0, self.config.items + 1, labels)
        items = jnp.asarray(items).at[rows, at].set(masked)
        return _Questions(items, segments, at, labels, weights)

    def _ask_next(self, batch: dict[str, Array]) -> _Questions:
        """What comes behind a row's one history: asked of its last item, or of a mask there."""
        items, segments = batch["items"], batch["segments"]
        count = jnp.sum(items > 0, axis=1, keepdims=True, dtype=jnp.int32)
        if self.config.objective == "next":
            at = count - 1
        else:
            # A full row makes room for the mask by its first item.
            at = jnp.minimum(count, items.shape[1] - 1)
            later = jnp.pad(items[:, 1:], ((0, 0), (0, 1)))
            items = jnp.where(count > at, later, items)
            place = jnp.arange(items.shape[1])[None]
            items = jnp.where(place == at, self.config.items + 1, items)
            segments = (place <= at).astype(jnp.int32)
        labels = batch["target"][:, None]
        return _Questions(items, segments, at, labels, jnp.ones(at.shape))
