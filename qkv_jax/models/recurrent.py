"""The recurrent encoder-decoder with attention: Bahdanau et al. 2015 and Luong et al. 2015.

A bidirectional GRU reads the source, a GRU writes the target and looks at the source's states.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from qkv_jax.layers import (
    ALIGNMENTS,
    GRU,
    Alignment,
    Embedding,
    Linear,
    RecurrentAttention,
)
from qkv_jax.models.seq2seq import Segments
from qkv_jax.ops import Mask, dropout, masks, pin, split_rng

Array = jax.Array
SIZES = ("d_model", "encoder_layers", "decoder_layers", "half_width")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes and choices of the model.

    Attributes:
        vocabulary: V, of source and target; 0: the tokeniser's, filled in by the task.
        d_model: D, even: width of embeddings, of the decoder's states, and of the encoder's, half
            of it in each direction. One table embeds source and target and scores the output.
        encoder_layers, decoder_layers: L on each side.
        alignment: "additive": Bahdanau's, the last state looks before it is moved on, and what it
            finds goes in; "dot", "general", "concat", "local": Luong's, the new state looks.
        half_width: keys that "local" sees on each side of the position it predicts.
        dropout: on embeddings, between layers and before the output.
        dtype: of the products; parameters and states are float32 always.
        pad: the token that fills up rows and is never attended to.
    """

    vocabulary: int = 0
    d_model: int = 512
    encoder_layers: int = 1
    decoder_layers: int = 1
    alignment: Alignment = "additive"
    half_width: int = 10
    dropout: float = 0.2
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    pad: int = 0

    def __post_init__(self):
        for name in SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}.")
        if self.d_model % 2:
            raise ValueError(f"d_model must be even; got {self.d_model}.")
        if self.alignment not in ALIGNMENTS:
            raise ValueError(
                f"alignment must be one of {list(ALIGNMENTS)}; got {self.alignment!r}."
            )
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(
                f"dtype must be 'float32', 'bfloat16' or 'float16'; got {self.dtype!r}."
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1); got {self.dropout}.")
        if self.vocabulary < 0:
            raise ValueError(f"vocabulary must be positive; got {self.vocabulary}.")
        if self.pad < 0 or 0 < self.vocabulary <= self.pad:
            raise ValueError(
                f"pad must be a token of the vocabulary of {self.vocabulary}; got {self.pad}."
            )

    @property
    def cross_layers(self) -> list[str]:
        """Names of the attention of the target to the source, in order."""
        return ["decoder.cross"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Cache:
    """What decoding remembers of B rows with Z hypotheses each.

    Attributes:
        states: of each decoder layer, (B, Z, D).
        memory, keys: (B, S, D), of the source.
        source_lengths: (B,) int32.
    """

    states: tuple[Array, ...]
    memory: Array
    keys: Array
    source_lengths: Array

    def reorder(self, parents: Array) -> "Cache":
        """New hypothesis z of row b continues old hypothesis parents[b, z]; (B, Z) int32."""
        chosen = [
            jnp.take_along_axis(state, parents[..., None], axis=1)
            for state in self.states
        ]
        return replace(self, states=tuple(chosen))


class Model(nnx.Module):
    """source tokens (B, S), target tokens so far (B, T) -> logits of the next tokens (B, T, V)."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        """Draws float32 parameters from the stream "params" of rngs."""
        if config.vocabulary < 1:
            raise ValueError(f"vocabulary must be positive; got {config.vocabulary}.")
        self.config = config
        D, dtype = config.d_model, jnp.dtype(config.dtype)

        def linear(width: int) -> nnx.Linear:
            return Linear(
                width,
                D,
                dtype=dtype,
                kernel_init=nnx.initializers.xavier_uniform(),
                kernel_metadata={"axes": ("embed", None)},
                bias_metadata={"axes": (None,)},
                rngs=rngs,
            )

        self.embedding = Embedding(config.vocabulary, D, dtype=dtype, rngs=rngs)
        self.forward = nnx.List(
            GRU(D, D // 2, dtype=dtype, rngs=rngs) for _ in range(config.encoder_layers)
        )
        self.backward = nnx.List(
            GRU(D, D // 2, dtype=dtype, rngs=rngs) for _ in range(config.encoder_layers)
        )
        self.start = nnx.List(linear(D // 2) for _ in range(config.decoder_layers))
        self.attends_first = config.alignment == "additive"
        inputs = [2 * D if self.attends_first else D] + [D] * (
            config.decoder_layers - 1
        )
        self.decoder = nnx.List(GRU(C, D, dtype=dtype, rngs=rngs) for C in inputs)
        self.cross = RecurrentAttention(
            D,
            kind=config.alignment,
            half_width=config.half_width,
            dtype=dtype,
            rngs=rngs,
        )
        # Of state, what it found and, where it looked before it moved on, the token.
        self.readout = linear((3 if self.attends_first else 2) * D)

    def __call__(
        self,
        source: Array,
        target: Array,
        *,
        segments: Segments | None = None,
        rng: Array | None = None,
    ) -> Array:
        """Logits (B, T, V) of the token after each prefix of target; see `states`."""
        states = self.states(source, target, segments=segments, rng=rng)
        return self.embedding.logits(states)

    def states(
        self,
        source: Array,
        target: Array,
        *,
        segments: Segments | None = None,
        rng: Array | None = None,
    ) -> Array:
        """What the logits (B, T, V) are made of, (B, T, D).

        Args:
            source: (B, S) int32, padded with `pad` on the right.
            target: (B, T) int32, what precedes each prediction: BOS first.
            segments: of rows that hold several pairs; None: each holds one.
            rng: draws every dropout; None: no dropout.
        """
        rngs = split_rng(rng, 2)
        memory, lengths = self.encode(
            source, segments=None if segments is None else segments.source, rng=rngs[0]
        )
        return self._decode(target, memory, lengths, segments, rngs[1])[0]

    def projection(self, states: Array) -> tuple[Array, Array]:
        """States (B, T, D) and the table (V, D), whose product is the logits."""
        return states, self.embedding.weights()

    def encode(
        self,
        source: Array,
        *,
        segments: Array | None = None,
        rng: Array | None = None,
    ) -> tuple[Array, Array]:
        """Source tokens (B, S) -> states of both directions (B, S, D), and lengths (B,) int32."""
        real = source != self.config.pad
        # Padding is a sequence of its own, so neither direction comes from it.
        known = real.astype(jnp.int32) if segments is None else segments
        begins, ends = _starts(known), _starts(known[:, ::-1])[:, ::-1]
        rngs = split_rng(rng, self.config.encoder_layers + 1)
        x = self._embed(source, rngs[0])
        zero = jnp.zeros((len(source), 1, self.config.d_model // 2), jnp.float32)
        for i, (onward, back) in enumerate(zip(self.forward, self.backward)):
            ahead = onward(x, begins, zero)
            y = jnp.concatenate([ahead, back(x, ends, zero, reverse=True)], -1)
            y = dropout(y, self.config.dropout, rngs[i + 1])
            x = pin(y if i == 0 else x + y, "batch", "length")
        return x.astype(self.config.dtype), jnp.sum(real, axis=1, dtype=jnp.int32)

    def _embed(self, tokens: Array, rng: Array | None) -> Array:
        return dropout(self.embedding(tokens), self.config.dropout, rng)

    def _decode(
        self,
        target: Array,
        memory: Array,
        lengths: Array,
        segments: Segments | None,
        rng: Array | None,
    ) -> tuple[Array, Array]:
        """States for the output (B, T, D), and those that looked at the source (B, T, D)."""
        keys = self.cross.remember(memory)
        rngs = split_rng(rng, self.config.decoder_layers + 2)
        x = self._embed(target, rngs[0])
        mask: Mask = masks.lengths(key=lengths)
        if segments is None:
            first = jnp.zeros_like(target[:, :1])
            starts = jnp.arange(target.shape[1])[None] == jnp.zeros_like(target)
        else:
            same = segments.target[:, :, None] == segments.source[:, None]
            first, starts = jnp.argmax(same, axis=2), _starts(segments.target)
            mask = masks.segments(segments.target, segments.source)
        initial = self._initial(memory, first)
        if self.attends_first:
            state, asked, found = self._bahdanau(
                x, starts, initial[0], memory, keys, lengths, segments
            )
        else:
            state = self.decoder[0](x, starts, initial[0])
        for layer in range(1, self.config.decoder_layers):
            below = dropout(state, self.config.dropout, rngs[layer])
            state = state + self.decoder[layer](below, starts, initial[layer])
        if not self.attends_first:
            asked, found = state, self._look(state, keys, memory, mask, lengths)
        parts = [state, found, x] if self.attends_first else [state, found]
        return self._read(parts, rngs[-1]), asked

    def _initial(self, memory: Array, first: Array) -> list[Array]:
        """Each decoder layer's state before a target, (B, T or 1, D).

        From the backward direction's state at the first source token, which has seen all of it:
        Bahdanau et al. 2015, appendix A.2.2.
        """
        seen = jnp.take_along_axis(memory, first[..., None], axis=1)
        seen = seen[..., self.config.d_model // 2 :]
        return [jnp.tanh(start(seen)).astype(jnp.float32) for start in self.start]

    def _bahdanau(
        self, x, starts, initial, memory, keys, lengths, segments: Segments | None
    ) -> tuple[Array, Array, Array]:
        """States after each token, before it, and what the latter found: (B, T, D) each."""
        B, T, D = x.shape
        known = jnp.zeros_like(starts, jnp.int32)
        known = known if segments is None else segments.target

        def step(state: Array, now: tuple[Array, ...]):
            token, start, initial, segment = now
            state = jnp.where(start[:, None], initial, state)
            mask: Mask = masks.lengths(key=lengths)
            if segments is not None:
                mask = masks.segments(segment[:, None], segments.source)
            found = self._look(state[:, None], keys, memory, mask, lengths)[:, 0]
            both = jnp.concatenate([token, found.astype(token.dtype)], -1)
            gru = self.decoder[0]
            new = gru.step(state, gru.inputs(both))
            return new, (new, state, found)

        initial = jnp.broadcast_to(initial, (B, T, D))
        rows = [jnp.moveaxis(part, 1, 0) for part in (x, starts, initial, known)]
        _, found = jax.lax.scan(step, jnp.zeros_like(initial[:, 0]), tuple(rows))
        after, before, seen = (jnp.moveaxis(part, 0, 1) for part in found)
        return after, before, seen

    def _look(self, state, keys, memory, mask: Mask, lengths) -> Array:
        query = state.astype(self.config.dtype)
        return self.cross(query, keys, memory, mask, lengths)

    def _read(self, parts: Sequence[Array], rng: Array | None) -> Array:
        together = jnp.concatenate([x.astype(self.config.dtype) for x in parts], -1)
        read = jnp.tanh(self.readout(together))
        return dropout(read, self.config.dropout, rng)

    def input_tables(self) -> list[Embedding]:
        """The table of source and target tokens."""
        return [self.embedding]

    def attention_layers(self) -> dict[str, RecurrentAttention]:
        """The attention layer by its name, "decoder.cross"."""
        return {name: self.cross for name in self.config.cross_layers}

    def attention(
        self, source: Array, target: Array, names: Sequence[str]
    ) -> dict[str, Array]:
        """Attention weights (B, 1, T, S) float32: the soft alignment.

        Args:
            source, target: as for a call.
            names: of `attention_layers`.

        Raises:
            ValueError: there is no layer of a name.
        """
        unknown = [name for name in names if name not in self.attention_layers()]
        if unknown:
            known = ", ".join(self.attention_layers())
            raise ValueError(f"no attention layer {unknown[0]!r}; there are {known}.")
        memory, lengths = self.encode(source)
        _, asked = self._decode(target, memory, lengths, None, None)
        weights = self.cross.weights(
            asked.astype(memory.dtype),
            self.cross.remember(memory),
            masks.lengths(key=lengths),
            lengths,
        )
        return {name: weights for name in names}

    def init_cache(
        self, memory: Array, source_lengths: Array, *, hypotheses: int, steps: int
    ) -> Cache:
        """A cache for `hypotheses` (Z) prefixes of each row of memory; it does not grow with steps."""
        del steps
        first = jnp.zeros((len(memory), hypotheses), jnp.int32)
        return Cache(
            states=tuple(self._initial(memory, first)),
            memory=memory,
            keys=self.cross.remember(memory),
            source_lengths=source_lengths,
        )

    def decode_step(self, tokens: Array, cache: Cache) -> tuple[Array, Cache]:
        """The last token of each hypothesis (B, Z) -> logits of the next (B, Z, V), new cache."""
        x = self._embed(tokens, None)
        mask = masks.lengths(key=cache.source_lengths)
        look = (cache.keys, cache.memory, mask, cache.source_lengths)
        first, inputs = self.decoder[0], x
        if self.attends_first:
            found = self._look(cache.states[0], *look)
            inputs = jnp.concatenate([x, found.astype(x.dtype)], -1)
        state = first.step(cache.states[0], first.inputs(inputs))
        states = [state]
        for layer in range(1, self.config.decoder_layers):
            gru = self.decoder[layer]
            states.append(gru.step(cache.states[layer], gru.inputs(state)))
            state = state + states[-1]
        if not self.attends_first:
            found = self._look(state, *look)
        parts = [state, found, x] if self.attends_first else [state, found]
        logits = self.embedding.logits(self._read(parts, None))
        return logits, replace(cache, states=tuple(states))


def check_mesh(config: Config, mesh: Mapping[str, int]) -> None:
    """Raises ValueError where the mesh has an axis that shares out what this model goes through in order.

    Args:
        config: of the model.
        mesh: the sizes of its axes.
    """
    del config
    context = mesh.get("context", 1)
    if context > 1:
        raise ValueError(
            f"a recurrent model goes through its sequences in order, so context must be 1; got {context}."
        )


def _starts(segments: Array) -> Array:
    """Where a segment (B, T) begins."""
    before = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return segments != before
