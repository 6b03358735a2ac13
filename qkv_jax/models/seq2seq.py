"""The encoder-decoder Transformer of Vaswani et al. 2017 (arXiv 1706.03762)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from qkv_jax.layers import (
    AddPositions,
    DecoderBlock,
    Embedding,
    EncoderBlock,
    MultiHeadAttention,
    make_norm,
    run_blocks,
)
from qkv_jax.models.seq2seq_config import (
    Config,
    base,
    big,
    check_mesh,
    small,
    tiny,
    train_flops,
)
from qkv_jax.ops import (
    Ancestry,
    KVCache,
    Score,
    masks,
    pin,
    scores,
    segment_positions,
    split_rng,
)

__all__ = [
    "Cache",
    "Config",
    "Model",
    "Segments",
    "base",
    "big",
    "check_mesh",
    "small",
    "tiny",
    "train_flops",
]

Array = jax.Array


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

        def norm() -> Any:
            return make_norm(
                config.d_model, config.normalisation, config.epsilon, dtype, rngs
            )

        def embedding(vocabulary: int) -> Embedding:
            return Embedding(
                vocabulary,
                config.d_model,
                scale=config.embedding_scale,
                zero=config.pad if config.zero_pad else None,
                dtype=jnp.dtype(config.output_dtype or config.dtype),
                rngs=rngs,
            )

        def positions() -> AddPositions:
            rate = config.embedding_dropout
            return AddPositions(
                config.d_model,
                positions=config.positions,
                offset=config.position_offset,
                longest=config.max_positions,
                norm=config.normalisation if config.embedding_norm else None,
                epsilon=config.epsilon,
                dropout_rate=config.dropout if rate is None else rate,
                dtype=dtype,
                rngs=rngs,
            )

        def bias(heads: int) -> nnx.Param | None:
            if config.positions != "relative":
                return None
            init = nnx.initializers.normal(stddev=config.d_model**-0.5)
            table = init(rngs.params(), (config.relative_buckets, heads), jnp.float32)
            return nnx.Param(table, axes=(None, "heads"))

        self.target_embedding = embedding(config.vocabulary)
        self.source_embedding = (
            embedding(config.source_vocabulary or config.vocabulary)
            if config.tie in ("target", "none")
            else None
        )
        self.output = (
            embedding(config.vocabulary) if config.tie in ("input", "none") else None
        )
        self.output_bias = (
            nnx.Param(jnp.zeros(config.vocabulary), axes=("vocab",))
            if config.output_bias
            else None
        )
        self.source_positions, self.target_positions = positions(), positions()
        self.encoder_bias = bias(config.side("encoder")[0])
        self.decoder_bias = bias(config.side("decoder")[0])
        self.encoder = nnx.List(
            EncoderBlock(config.d_model, **_kinds(config, "encoder", i), rngs=rngs)
            for i in range(config.encoder_layers)
        )
        self.decoder = nnx.List(
            DecoderBlock(config.d_model, **_kinds(config, "decoder", i), rngs=rngs)
            for i in range(config.decoder_layers)
        )
        self.encoder_norm = norm() if config.norm == "pre" else None
        self.decoder_norm = norm() if config.norm == "pre" else None

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
        x = self.source_positions(
            embed(source), _positions(source, segments), rng=rngs[0]
        )
        score = self._relative(self.encoder_bias, bidirectional=True)

        def call(block: EncoderBlock, x: Array, rng: Array | None) -> Array:
            return block(x, mask=mask, score=score, rng=rng)

        x = self._run(self.encoder, x, rngs[1:], call)
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
        x = self.target_positions(self.target_embedding(target), positions, rng=rngs[0])
        score = self._relative(self.decoder_bias, bidirectional=False)
        mask, memory_mask = masks.causal(), masks.lengths(key=source_lengths)
        if segments is not None:
            mask = mask & masks.segments(segments.target)
            memory_mask = masks.segments(segments.target, segments.source)

        def call(block: DecoderBlock, x: Array, rng: Array | None) -> Array:
            rules: dict[str, Any] = {"mask": mask, "memory_mask": memory_mask}
            return block(x, memory, **rules, score=score, rng=rng)

        x = self._run(self.decoder, x, rngs[1:], call)
        return x if self.decoder_norm is None else self.decoder_norm(x)

    def _run(self, blocks: Any, x: Array, rngs: Any, call: Any) -> Array:
        if any(layer.record for layer in self.attention_layers().values()):
            # What is recorded cannot leave what is computed again, or a loop.
            return run_blocks(blocks, x, rngs, call)
        config = self.config
        return run_blocks(
            blocks, x, rngs, call, remat=config.remat, scan=config.scan_layers
        )

    def logits(self, states: Array) -> Array:
        """Decoder states (..., D) -> logits (..., V) in the output's dtype."""
        if self.config.output_scale != 1.0:
            states = states * self.config.output_scale
        logits = self.output_embedding.logits(states)
        if self.output_bias is None:
            return logits
        bias = self.output_bias[...].astype(logits.dtype)
        return logits + bias.reshape((1,) * (logits.ndim - 1) + (-1,))

    def projection(self, states: Array) -> tuple[Array, Array]:
        """Decoder states (B, T, D) -> x (B, T, W) and table (V, W), whose product is the logits."""
        states = states.astype(self.output_embedding.dtype)
        if self.config.output_scale != 1.0:
            states = states * self.config.output_scale
        table = self.output_embedding.weights()
        if self.output_bias is None:
            return states, table
        one = jnp.ones_like(states[..., :1])
        bias = self.output_bias[...][:, None]
        return jnp.concatenate([states, one], -1), jnp.concatenate([table, bias], -1)

    def _relative(self, table: Any, *, bidirectional: bool) -> Score | None:
        if table is None:
            return None
        return scores.relative_bias(
            table[...], bidirectional, self.config.relative_distance
        )

    def _relative_step(self, ancestry: Ancestry) -> Score | None:
        """The decoder's bias for the slots of a cache, where slot s holds step s // Z."""
        if self.decoder_bias is None:
            return None
        table = self.decoder_bias[...]
        _, Z, steps = ancestry.slots.shape
        distance = jnp.repeat(jnp.arange(steps), Z) - ancestry.step
        buckets = scores.relative_buckets(
            distance, table.shape[0], False, self.config.relative_distance
        )
        return scores.bias(table[buckets].T[None, :, None])

    @property
    def output_embedding(self) -> Embedding:
        """The table whose rows score the classes."""
        return self.target_embedding if self.output is None else self.output

    def penalty(self) -> Array | None:
        """What is added to the loss a token for looking far; None: nothing is."""
        terms = []
        for kind, blocks in (
            (self.config.encoder_attention, self.encoder),
            (self.config.decoder_attention, self.decoder),
        ):
            if kind.name == "adaptive_span" and kind.option("penalty"):
                layers = [b.attention for b in blocks if hasattr(b.attention, "span")]
                shares = jnp.stack([layer.span_share() for layer in layers])
                terms.append(kind.option("penalty") * shares.mean())
        return sum(terms[1:], terms[0]) if terms else None

    def input_tables(self) -> list[Embedding]:
        """The tables of source and target tokens; where they share one, that."""
        own = self.source_embedding
        return [self.target_embedding] if own is None else [own, self.target_embedding]

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
        self,
        memory: Array,
        source_lengths: Array,
        *,
        hypotheses: int,
        steps: int,
        dtype: Any = None,
    ) -> Cache:
        """An empty cache for `steps` steps of `hypotheses` (Z) prefixes of each row of memory.

        Args:
            memory, source_lengths: see `encode`.
            hypotheses, steps: Z, and the longest prefix.
            dtype: of keys and values; int8: with a scale a head and slot. None: memory's.
        """
        config, batch = self.config, memory.shape[0]
        dtype = memory.dtype if dtype is None else dtype
        size = config.side("decoder")[2]
        counts = [
            config.heads_of(f"decoder.{i}.attention") for i in range(len(self.decoder))
        ]
        return Cache(
            layers=tuple(
                KVCache.zeros(batch, steps * hypotheses, heads, size, dtype)
                for _, heads in counts
            ),
            memory=tuple(
                block.cross.remember(memory).astype(dtype) for block in self.decoder
            ),
            source_lengths=source_lengths,
            ancestry=Ancestry.start(batch, hypotheses, steps),
        )

    def decode_step(self, tokens: Array, cache: Cache) -> tuple[Array, Cache]:
        """The last token of each hypothesis (B, Z) -> logits of the next (B, Z, V), new cache."""
        x = self.target_embedding(tokens)
        x = self.target_positions(x, cache.ancestry.step[None, None])
        score = self._relative_step(cache.ancestry)
        memory_mask = masks.lengths(key=cache.source_lengths)
        layers = []
        for block, layer, remembered in zip(self.decoder, cache.layers, cache.memory):
            x, layer = block.step(
                x,
                layer,
                remembered,
                ancestry=cache.ancestry,
                memory_mask=memory_mask,
                score=score,
            )
            layers.append(layer)
        x = x if self.decoder_norm is None else self.decoder_norm(x)
        cache = replace(cache, layers=tuple(layers), ancestry=cache.ancestry.advance())
        return self.logits(x), cache


def _positions(tokens: Array, segments: Array | None) -> Array:
    if segments is None:
        return jnp.arange(tokens.shape[1])[None]
    return segment_positions(segments)


def _kinds(
    config: Config, side: Literal["encoder", "decoder"], layer: int
) -> dict[str, Any]:
    """The arguments of a layer's sublayers."""
    _, _, size, width = config.side(side)
    dtype = jnp.dtype(config.dtype)

    def attention(part: str) -> dict[str, Any]:
        heads, kv_heads = config.heads_of(f"{side}.{layer}.{part}")
        return {
            "heads": heads,
            "kv_heads": kv_heads,
            "head_size": size,
            "scale": config.attention_scale,
            "bias": config.bias,
            "dropout_rate": config.attention_dropout,
            "context": config.context,
            "dtype": dtype,
        }

    kind = config.kind(side).of_layer(layer)
    return {
        "attention": attention("attention") | {"kind": kind},
        **({} if side == "encoder" else {"cross": attention("cross")}),
        "feed_forward": {
            "d_ff": width,
            "activation": config.activation,
            "gated": config.gated,
            "bias": config.bias,
            "dropout_rate": config.activation_dropout,
            "dtype": dtype,
        },
        "residual": {
            "place": config.norm,
            "dropout_rate": config.dropout,
            "norm": config.normalisation,
            "epsilon": config.epsilon,
            "dtype": dtype,
        },
    }
