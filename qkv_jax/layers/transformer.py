"""Encoder and decoder blocks, with the norm before or after each sublayer."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from qkv_jax.layers.attention import MultiHeadAttention
from qkv_jax.layers.feed_forward import FeedForward
from qkv_jax.layers.norm import Normalisation, make_norm
from qkv_jax.ops import (
    Ancestry,
    KVCache,
    Mask,
    Score,
    dropout,
    pin,
    pin_stream,
    split_rng,
)

Array = jax.Array
NormPlace = Literal["pre", "post"]


class Residual(nnx.Module):
    """x + f(norm(x)) ("pre"; Xiong et al. 2020, 2002.04745) or norm(x + f(x)) ("post")."""

    def __init__(
        self,
        d_model: int,
        *,
        place: NormPlace,
        dropout_rate: float,
        norm: Normalisation = "layer",
        epsilon: float = 1e-5,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.norm = make_norm(d_model, norm, epsilon, dtype, rngs)
        self.place = place
        self.dropout_rate = dropout_rate

    def __call__(
        self, x: Array, f: Callable[[Array], Array], *, rng: Array | None = None
    ) -> Array:
        # Over "tensor", f is given whole lengths and gives them back: else the partitioner may
        # gather f's parameters in their place.
        y = pin_stream(self.norm(x)) if self.place == "pre" else x
        y = pin(f(pin(y, "batch", "length")), "batch", "length")
        x = pin_stream(x + dropout(pin_stream(y), self.dropout_rate, rng))
        return x if self.place == "pre" else pin_stream(self.norm(x))


class EncoderBlock(nnx.Module):
    """Self-attention, then feed-forward."""

    def __init__(
        self, d_model: int, *, attention: dict, feed_forward: dict, residual: dict, rngs
    ):
        """Builds the sublayers from their keyword arguments."""
        self.attention = MultiHeadAttention(d_model, **attention, rngs=rngs)
        self.feed_forward = FeedForward(d_model, **feed_forward, rngs=rngs)
        self.after_attention = Residual(d_model, **residual, rngs=rngs)
        self.after_feed_forward = Residual(d_model, **residual, rngs=rngs)

    def __call__(
        self,
        x: Array,
        *,
        mask: Mask | None,
        score: Score | None = None,
        rng: Array | None = None,
    ) -> Array:
        """x (B, S, D) -> (B, S, D); rng draws every dropout, None: none."""
        rngs = split_rng(rng, 4)
        x = self.after_attention(
            x,
            lambda y: self.attention(y, mask=mask, score=score, rng=rngs[0]),
            rng=rngs[1],
        )
        return self.after_feed_forward(
            x, lambda y: self.feed_forward(y, rng=rngs[2]), rng=rngs[3]
        )


class DecoderBlock(nnx.Module):
    """Masked self-attention, cross-attention to the encoder, then feed-forward."""

    def __init__(
        self,
        d_model: int,
        *,
        attention: dict,
        cross: dict | None = None,
        feed_forward: dict,
        residual: dict,
        rngs,
    ):
        """Builds the sublayers from their keyword arguments; cross None: as attention."""
        self.attention = MultiHeadAttention(d_model, **attention, rngs=rngs)
        # A kind is of self-attention.
        plain = {name: x for name, x in attention.items() if name != "kind"}
        self.cross = MultiHeadAttention(d_model, **(cross or plain), rngs=rngs)
        self.feed_forward = FeedForward(d_model, **feed_forward, rngs=rngs)
        self.after_attention = Residual(d_model, **residual, rngs=rngs)
        self.after_cross = Residual(d_model, **residual, rngs=rngs)
        self.after_feed_forward = Residual(d_model, **residual, rngs=rngs)

    def __call__(
        self,
        x: Array,
        memory: Array,
        *,
        mask: Mask | None,
        memory_mask: Mask | None,
        score: Score | None = None,
        rng: Array | None = None,
    ) -> Array:
        """x (B, T, D) and the encoder's memory (B, S, D) -> (B, T, D); score: of self-attention."""
        rngs = split_rng(rng, 6)
        x = self.after_attention(
            x,
            lambda y: self.attention(y, mask=mask, score=score, rng=rngs[0]),
            rng=rngs[1],
        )
        x = self.after_cross(
            x,
            lambda y: self.cross(y, memory, mask=memory_mask, rng=rngs[2]),
            rng=rngs[3],
        )
        return self.after_feed_forward(
            x, lambda y: self.feed_forward(y, rng=rngs[4]), rng=rngs[5]
        )

    def step(
        self,
        x: Array,
        cache: KVCache,
        remembered: KVCache,
        *,
        ancestry: Ancestry,
        memory_mask: Mask | None,
        score: Score | None = None,
    ) -> tuple[Array, KVCache]:
        """One position of each of Z hypotheses a row: x (B, Z, D) -> (B, Z, D), new cache."""
        written: dict[str, Any] = {}

        def attend(y: Array) -> Array:
            out, written["cache"] = self.attention.step(y, cache, ancestry, score)
            return out

        x = self.after_attention(x, attend)
        x = self.after_cross(x, lambda y: self.cross.attend(y, remembered, memory_mask))
        return self.after_feed_forward(x, self.feed_forward), written["cache"]
