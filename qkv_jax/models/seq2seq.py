"""The encoder-decoder Transformer of Vaswani et al. 2017 (arXiv 1706.03762)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from qkv_jax.layers import (
    Activation,
    DecoderBlock,
    Embedding,
    EncoderBlock,
    MultiHeadAttention,
    NormPlace,
    layer_norm,
)
from qkv_jax.ops import (
    Ancestry,
    ContextMethod,
    KVCache,
    check_method,
    masks,
    pin,
    segment_positions,
    split_rng,
)

Array = jax.Array


CHOICES: dict[str, tuple[str, ...]] = {
    "activation": get_args(Activation),
    "norm": get_args(NormPlace),
    "tie": ("all", "target", "none"),
    "dtype": ("float32", "bfloat16"),
    "context": get_args(ContextMethod),
}
SIZES = ("d_model", "d_ff", "heads", "encoder_layers", "decoder_layers")
RATES = ("dropout", "embedding_dropout", "attention_dropout", "activation_dropout")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes and choices of the model.

    Attributes:
        vocabulary: V, shared by source and target; 0: the tokeniser's, filled in by the task.
        d_model: D.
        d_ff: F.
        heads: N.
        kv_heads: K, divides N; None: N.
        encoder_layers, decoder_layers: L on each side.
        activation, gated: of the feed-forward layers.
        norm: "post" (as published) or "pre" (with a final norm on each side).
        tie: which embeddings are one table: source, target and output ("all"), target and
            output ("target"), or none.
        dropout: on each sublayer's output.
        embedding_dropout: on the embeddings; None: as `dropout`.
        attention_dropout, activation_dropout: on attention weights; after the activation.
        dtype: of the computation; parameters are float32 always.
        pad: the token that fills up rows and is never attended to.
        context: how attention shares out the lengths, on a mesh whose axis "context" is larger
            than 1: "ring", "zigzag" or "ulysses", see `context_parallel_attention`. The same is
            computed by each.
    """

    vocabulary: int = 0
    d_model: int = 512
    d_ff: int = 2048
    heads: int = 8
    kv_heads: int | None = None
    encoder_layers: int = 6
    decoder_layers: int = 6
    activation: Activation = "relu"
    gated: bool = False
    norm: NormPlace = "post"
    tie: Literal["all", "target", "none"] = "all"
    dropout: float = 0.1
    embedding_dropout: float | None = None
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    pad: int = 0
    context: ContextMethod = "ring"

    def __post_init__(self):
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {list(choices)}; got {getattr(self, name)!r}."
                )
        for name in SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}.")
        for name in RATES:
            rate = getattr(self, name)
            if rate is not None and not 0.0 <= rate < 1.0:
                raise ValueError(f"{name} must be in [0, 1); got {rate}.")
        kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        if kv_heads < 1 or self.d_model % (2 * self.heads) or self.heads % kv_heads:
            raise ValueError(
                "heads must divide d_model into even sizes and kv_heads must divide heads; got "
                f"d_model = {self.d_model}, heads = {self.heads}, kv_heads = {self.kv_heads}."
            )
        if self.vocabulary < 0:
            raise ValueError(f"vocabulary must be positive; got {self.vocabulary}.")
        if self.pad < 0 or 0 < self.vocabulary <= self.pad:
            raise ValueError(
                f"pad must be a token of the vocabulary of {self.vocabulary}; got {self.pad}."
            )


def tiny(**changes: Any) -> Config:
    """4+4 layers, d128, ff256, 4 heads, dropout 0.3: 2.6M parameters at V = 9,700.

    Source: Wu et al. 2021, arXiv 2105.14462 (Multi30k).
    """
    sizes: dict[str, Any] = {
        "d_model": 128,
        "d_ff": 256,
        "heads": 4,
        "encoder_layers": 4,
        "decoder_layers": 4,
        "dropout": 0.3,
    }
    return Config(**(sizes | changes))


def small(**changes: Any) -> Config:
    """6+6 layers, d512, ff1024, 4 heads, dropout 0.3: 36.5M parameters at V = 9,700.

    Source: fairseq's `transformer_iwslt_de_en`.
    """
    sizes: dict[str, Any] = {"d_model": 512, "d_ff": 1024, "heads": 4, "dropout": 0.3}
    return Config(**(sizes | changes))


def base(**changes: Any) -> Config:
    """6+6 layers, d512, ff2048, 8 heads: 63M parameters at V = 37,000.

    Source: Vaswani et al. 2017, table 3, which gives 65M.
    """
    return Config(**changes)


def big(**changes: Any) -> Config:
    """6+6 layers, d1024, ff4096, 16 heads, dropout 0.3: 214M parameters at V = 37,000.

    Source: Vaswani et al. 2017, table 3, which gives 213M.
    """
    sizes: dict[str, Any] = {"d_model": 1024, "d_ff": 4096, "heads": 16, "dropout": 0.3}
    return Config(**(sizes | changes))


def train_flops(config: Config, *, rows: int, source: int, target: int) -> float:
    """Floating-point operations of the matrix products of an update, forward and backward.

    Attention counts all pairs, masked or not.

    Args:
        config: of the model.
        rows: B.
        source, target: S and T, padding included.
    """
    D, F, V = config.d_model, config.d_ff, config.vocabulary
    kv_share = (config.kv_heads or config.heads) / config.heads
    ends = 2 * D * D  # queries and output, multiply-adds a token
    keys = 2 * kv_share * D * D
    feed = (3 if config.gated else 2) * D * F
    encoder = source * (ends + keys + feed + 2 * source * D)
    decoder = target * (2 * ends + keys + feed + 2 * (target + source) * D)
    decoder += source * keys
    layers = config.encoder_layers * encoder + config.decoder_layers * decoder
    return 3 * 2.0 * rows * (layers + target * D * V)


def check_heads(config: Config, mesh: Mapping[str, int]) -> None:
    """Raises ValueError if `config.context` cannot share the heads out as a mesh asks.

    Args:
        config: of the model.
        mesh: the sizes of its axes.
    """
    context, tensor = (mesh.get(name, 1) for name in ("context", "tensor"))
    whole = config.heads % tensor
    heads = config.heads if whole else config.heads // tensor
    check_method(config.context, heads=heads, devices=context)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Cache:
    """What decoding remembers of B rows with Z hypotheses each.

    Attributes:
        layers: each decoder layer's keys and values so far, slots of `Ancestry`.
        memory: each decoder layer's keys and values of the source, (B, S, K, H).
        source_lengths: (B,) int32.
        ancestry: which slots each hypothesis descends from.
    """

    layers: tuple[KVCache, ...]
    memory: tuple[KVCache, ...]
    source_lengths: Array
    ancestry: Ancestry

    def reorder(self, parents: Array) -> "Cache":
        """New hypothesis z of row b continues old hypothesis parents[b, z]; (B, Z) int32."""
        return replace(self, ancestry=self.ancestry.reorder(parents))


class Segments(NamedTuple):
    """Which of its row's sentence pairs each token belongs to, where rows hold several.

    Pairs do not see each other, and each has its positions from 0: the model computes what it
    would with a row for each.

    Attributes:
        source: (B, S) int32; pair k is k, from 1, and padding 0.
        target: (B, T) int32, the same.
    """

    source: Array
    target: Array


class Model(nnx.Module):
    """source tokens (B, S), target tokens so far (B, T) -> logits of the next tokens (B, T, V)."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        """Draws float32 parameters from the stream "params" of rngs."""
        if config.vocabulary < 1:
            raise ValueError(f"vocabulary must be positive; got {config.vocabulary}.")
        self.config = config
        dtype = jnp.dtype(config.dtype)
        kinds: dict[str, Any] = {
            "attention": {
                "heads": config.heads,
                "kv_heads": config.kv_heads,
                "dropout_rate": config.attention_dropout,
                "context": config.context,
                "dtype": dtype,
            },
            "feed_forward": {
                "d_ff": config.d_ff,
                "activation": config.activation,
                "gated": config.gated,
                "dropout_rate": config.activation_dropout,
                "dtype": dtype,
            },
            "residual": {
                "place": config.norm,
                "dropout_rate": config.dropout,
                "dtype": dtype,
            },
        }

        def embedding() -> Embedding:
            rate = config.embedding_dropout
            return Embedding(
                config.vocabulary,
                config.d_model,
                dropout_rate=config.dropout if rate is None else rate,
                dtype=dtype,
                rngs=rngs,
            )

        def final_norm() -> nnx.LayerNorm | None:
            return (
                layer_norm(config.d_model, dtype, rngs)
                if config.norm == "pre"
                else None
            )

        self.target_embedding = embedding()
        self.source_embedding = None if config.tie == "all" else embedding()
        self.output = embedding() if config.tie == "none" else None
        self.encoder = nnx.List(
            EncoderBlock(config.d_model, **kinds, rngs=rngs)
            for _ in range(config.encoder_layers)
        )
        self.decoder = nnx.List(
            DecoderBlock(config.d_model, **kinds, rngs=rngs)
            for _ in range(config.decoder_layers)
        )
        self.encoder_norm = final_norm()
        self.decoder_norm = final_norm()

    def __call__(
        self,
        source: Array,
        target: Array,
        *,
        segments: Segments | None = None,
        rng: Array | None = None,
    ) -> Array:
        """Logits (B, T, V) of the token after each prefix of target.

        Args:
            source: (B, S) int32, padded with `pad` on the right.
            target: (B, T) int32, what precedes each prediction: BOS first.
            segments: of rows that hold several pairs; None: each holds one.
            rng: draws every dropout; None: no dropout.
        """
        return self.logits(self.states(source, target, segments=segments, rng=rng))

    def states(
        self,
        source: Array,
        target: Array,
        *,
        segments: Segments | None = None,
        rng: Array | None = None,
    ) -> Array:
        """Decoder states (B, T, D), what `logits` are made of; arguments as for a call."""
        rngs = split_rng(rng, 2)
        memory, lengths = self.encode(
            source, segments=None if segments is None else segments.source, rng=rngs[0]
        )
        return self.decode(target, memory, lengths, segments=segments, rng=rngs[1])

    def encode(
        self,
        source: Array,
        *,
        segments: Array | None = None,
        rng: Array | None = None,
    ) -> tuple[Array, Array]:
        """Source tokens (B, S) -> memory (B, S, D) and source lengths (B,) int32."""
        lengths = jnp.sum(source != self.config.pad, axis=1, dtype=jnp.int32)
        mask = (
            masks.lengths(key=lengths) if segments is None else masks.segments(segments)
        )
        rngs = split_rng(rng, len(self.encoder) + 1)
        embed = (
            self.target_embedding
            if self.source_embedding is None
            else self.source_embedding
        )
        x = embed(source, _positions(source, segments), rng=rngs[0])
        for block, block_rng in zip(self.encoder, rngs[1:]):
            x = block(x, mask=mask, rng=block_rng)
        x = x if self.encoder_norm is None else self.encoder_norm(x)
        return pin(x, "batch", "length"), lengths

    def decode(
        self,
        target: Array,
        memory: Array,
        source_lengths: Array,
        *,
        segments: Segments | None = None,
        rng: Array | None = None,
    ) -> Array:
        """Target tokens (B, T) and the encoder's memory (B, S, D) -> states (B, T, D)."""
        rngs = split_rng(rng, len(self.decoder) + 1)
        positions = _positions(target, None if segments is None else segments.target)
        x = self.target_embedding(target, positions, rng=rngs[0])
        mask, memory_mask = masks.causal(), masks.lengths(key=source_lengths)
        if segments is not None:
            mask = mask & masks.segments(segments.target)
            memory_mask = masks.segments(segments.target, segments.source)
        for block, block_rng in zip(self.decoder, rngs[1:]):
            x = block(x, memory, mask=mask, memory_mask=memory_mask, rng=block_rng)
        return x if self.decoder_norm is None else self.decoder_norm(x)

    def logits(self, states: Array) -> Array:
        """Decoder states (..., D) -> logits (..., V) in the computation's dtype."""
        return self.output_embedding.logits(states)

    @property
    def output_embedding(self) -> Embedding:
        """The table whose rows score the classes."""
        return self.target_embedding if self.output is None else self.output

    def attention_layers(self) -> dict[str, MultiHeadAttention]:
        """All attention layers by name: "encoder.0.attention", "decoder.1.cross", ..."""
        layers = {
            f"encoder.{i}.attention": b.attention for i, b in enumerate(self.encoder)
        }
        for i, block in enumerate(self.decoder):
            layers[f"decoder.{i}.attention"] = block.attention
            layers[f"decoder.{i}.cross"] = block.cross
        return layers

    def attention(
        self, source: Array, target: Array, names: Sequence[str]
    ) -> dict[str, Array]:
        """Attention weights of the named layers, each (B, N, T, S) float32.

        Args:
            source, target: as for a call.
            names: of `attention_layers`.

        Raises:
            ValueError: there is no layer of a name.
        """
        layers = self.attention_layers()
        unknown = [name for name in names if name not in layers]
        if unknown:
            raise ValueError(
                f"no attention layer {unknown[0]!r}; there are {', '.join(layers)}."
            )
        chosen = {name: layers[name] for name in names}
        try:
            for layer in chosen.values():
                layer.record = True
            self.states(source, target)
            return {name: layer.weights[...] for name, layer in chosen.items()}
        finally:
            for layer in chosen.values():
                layer.record = False
                if hasattr(layer, "weights"):
                    del layer.weights

    def init_cache(
        self, memory: Array, source_lengths: Array, *, hypotheses: int, steps: int
    ) -> Cache:
        """An empty cache for `steps` steps of `hypotheses` (Z) prefixes of each row of memory."""
        config, batch = self.config, memory.shape[0]
        heads = config.kv_heads or config.heads
        size = config.d_model // config.heads
        return Cache(
            layers=tuple(
                KVCache.zeros(batch, steps * hypotheses, heads, size, memory.dtype)
                for _ in self.decoder
            ),
            memory=tuple(block.cross.remember(memory) for block in self.decoder),
            source_lengths=source_lengths,
            ancestry=Ancestry.start(batch, hypotheses, steps),
        )

    def decode_step(self, tokens: Array, cache: Cache) -> tuple[Array, Cache]:
        """The last token of each hypothesis (B, Z) -> logits of the next (B, Z, V), new cache."""
        x = self.target_embedding(tokens, cache.ancestry.step[None, None])
        memory_mask = masks.lengths(key=cache.source_lengths)
        layers = []
        for block, layer, remembered in zip(self.decoder, cache.layers, cache.memory):
            x, layer = block.step(
                x, layer, remembered, ancestry=cache.ancestry, memory_mask=memory_mask
            )
            layers.append(layer)
        x = x if self.decoder_norm is None else self.decoder_norm(x)
        cache = replace(cache, layers=tuple(layers), ancestry=cache.ancestry.advance())
        return self.logits(x), cache


def _positions(tokens: Array, segments: Array | None) -> Array:
    if segments is None:
        return jnp.arange(tokens.shape[1])[None]
    return segment_positions(segments)
