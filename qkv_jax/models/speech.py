"""Speech recognition: a convolving Transformer over frames, read out by CTC and by a decoder."""

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from qkv_jax.decoding import (
    JointCache,
    PrefixCache,
    beam_search,
    ctc_greedy,
    joint_step,
    power,
    prefix_step,
)
from qkv_jax.layers import (
    AddPositions,
    Convolution,
    DecoderBlock,
    Embedding,
    EncoderBlock,
    Remat,
    Residual,
    check_remat,
    make_norm,
    pairs_of_keys,
    run_blocks,
    windows,
)
from qkv_jax.models.seq2seq import Cache
from qkv_jax.models.spectrograms import Augmentation, prepare
from qkv_jax.ops import Ancestry, KVCache, masks, pin, split_rng

Array = jax.Array
PAD, BOS, EOS, UNK = 0, 1, 2, 3  # Of the data's tokenizers; PAD is CTC's blank too.


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes and choices of the model.

    Attributes:
        vocabulary: V; 0: the data's.
        channels: C of the features; 0: the data's.
        cepstra: how many the bands are turned into before they are normalised; 0: they stay bands.
        subsampling: (size, stride) of each layer that shortens the frames: (3, 2) twice is the
            usual convolution, (4, 4) once stacks frames.
        d_model, d_ff, heads: D, F and N.
        encoder_layers, decoder_layers: L of each; without decoder layers CTC is all there is.
        convolution: neighbours that each encoder layer convolves, odd; 0: none, a plain
            Transformer.
        intermediate: an encoder layer, counted from 1, whose output is held to the CTC loss too,
            and told what it predicts; 0: none.
        dropout: on each sublayer's output, and in attention and feed-forward layers.
        ctc_weight: share of the CTC loss in the loss.
        label_smoothing: of the decoder's targets.
        augmentation: of the frames, in training.
        beams: of the search; 0: CTC's greedy path.
        search_weight: share of CTC in the search's scores; 1: the decoder is not asked.
        longest: most tokens of what is recognised, EOS included.
        remat, scan_layers: what training keeps of each layer for its backward pass, and whether the
            layers of a side are one loop (two, about `intermediate`), see `run_blocks`.
    """

    vocabulary: int = 0
    channels: int = 0
    cepstra: int = 0
    subsampling: tuple[tuple[int, int], ...] = ((3, 2), (3, 2))
    d_model: int = 144
    d_ff: int = 288
    heads: int = 4
    encoder_layers: int = 6
    decoder_layers: int = 2
    convolution: int = 11
    intermediate: int = 0
    dropout: float = 0.1
    ctc_weight: float = 0.3
    label_smoothing: float = 0.1
    augmentation: Augmentation = field(default_factory=Augmentation)
    beams: int = 0
    search_weight: float = 0.4
    longest: int = 64
    remat: Remat = "none"
    scan_layers: bool = False

    def __post_init__(self):
        check_remat(self.remat)
        for name in ("d_model", "d_ff", "heads", "encoder_layers", "longest"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}.")
        for name in ("vocabulary", "channels", "cepstra", "decoder_layers", "beams"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"{name} must not be negative; got {getattr(self, name)}."
                )
        for name in ("ctc_weight", "search_weight"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(
                    f"{name} must be in [0, 1]; got {getattr(self, name)}."
                )
        for name in ("dropout", "label_smoothing"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(
                    f"{name} must be in [0, 1); got {getattr(self, name)}."
                )
        if self.d_model % 2 or self.d_model % self.heads:
            raise ValueError(
                f"d_model must be even and a multiple of heads = {self.heads}; got {self.d_model}."
            )
        if any(size < stride or stride < 1 for size, stride in self.subsampling):
            raise ValueError(
                f"subsampling must be (size, stride) pairs, size >= stride >= 1; got "
                f"{self.subsampling}."
            )
        if not 0 <= self.intermediate < self.encoder_layers:
            raise ValueError(
                f"intermediate must be below encoder_layers = {self.encoder_layers}; "
                f"got {self.intermediate}."
            )


class Encoder(nnx.Module):
    """Features (B, T, C) -> states (B, P, D), a position for each few frames."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        """Draws float32 parameters from the stream "params" of rngs."""
        self.config = config
        widths = [config.cepstra or config.channels] + [config.d_model] * len(
            config.subsampling
        )
        self.subsampling = nnx.List(
            _linear(size * width, config.d_model, (None, "embed"), rngs)
            for (size, _), width in zip(config.subsampling, widths)
        )
        self.input = _linear(widths[-1], config.d_model, (None, "embed"), rngs)
        self.positions = AddPositions(
            config.d_model, dropout_rate=config.dropout, rngs=rngs
        )
        kinds = _kinds(config)
        count = config.encoder_layers
        self.blocks = nnx.List(
            EncoderBlock(config.d_model, **kinds, rngs=rngs) for _ in range(count)
        )
        convolving = range(count if config.convolution else 0)
        self.convolutions = nnx.List(
            Convolution(config.d_model, config.convolution, rngs=rngs)
            for _ in convolving
        )
        self.around = nnx.List(
            Residual(config.d_model, **kinds["residual"], rngs=rngs) for _ in convolving
        )
        self.norm = make_norm(config.d_model, "layer", 1e-5, jnp.float32, rngs)
        self.units = _linear(
            config.d_model, config.vocabulary, ("embed", "vocab"), rngs
        )
        self.told = (
            _linear(config.vocabulary, config.d_model, ("vocab", "embed"), rngs)
            if config.intermediate
            else None
        )

    def __call__(
        self, x: Array, lengths: Array, *, rng: Array | None = None
    ) -> tuple[Array, Array, list[Array]]:
        """States (B, P, D), their lengths (B,), and CTC's logits, each (B, P, V), the last's last.

        Args:
            x: (B, T, C) normalised features, 0 beyond lengths.
            lengths: (B,) frames.
            rng: draws every dropout; None: no dropout.
        """
        rngs = split_rng(rng, 2 * len(self.blocks) + 1)
        for layer, (size, stride) in zip(self.subsampling, self.config.subsampling):
            x = jax.nn.relu(layer(windows(x, size, stride)))
            lengths = -(-lengths // stride)
            x = jnp.where(_valid(x, lengths)[..., None], x, 0.0)
        x = self.positions(self.input(x), jnp.arange(x.shape[1])[None], rng=rngs[0])
        logits, after = [], self.config.intermediate
        if self.told is not None:
            x = self._layers(x, lengths, rngs[1:], slice(after))
            logits.append(self.units(self.norm(x)))
            x = x + self.told(jax.nn.softmax(logits[-1]))
        x = self._layers(x, lengths, rngs[1:], slice(after, None))
        states = pin(self.norm(x), "batch", "length")
        return states, lengths, [*logits, self.units(states)]

    def _layers(
        self, x: Array, lengths: Array, rngs: list[Array | None], which: slice
    ) -> Array:
        """x (B, P, D) through some of the layers, each a block after a convolution, if any."""
        valid, mask = _valid(x, lengths), masks.lengths(key=lengths)

        def layer(parts: tuple[Any, ...], x: Array, drawn: Array | None) -> Array:
            (block, *convolving), rngs = parts, (None, None) if drawn is None else drawn
            if convolving:
                convolution, around = convolving
                convolve = functools.partial(convolution, valid=valid)
                x = around(x, convolve, rng=rngs[0])
            return block(x, mask=mask, rng=rngs[1])

        convolving = (self.convolutions, self.around)
        parts = zip(self.blocks, *(convolving if self.config.convolution else ()))
        return run_blocks(
            list(parts)[which],
            x,
            pairs_of_keys(rngs)[which],
            layer,
            remat=self.config.remat,
            scan=self.config.scan_layers,
        )


class Decoder(nnx.Module):
    """Tokens so far (B, T) and the encoder's states (B, P, D) -> logits of the next (B, T, V)."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        """Draws float32 parameters from the stream "params" of rngs."""
        self.config = config
        self.embedding = Embedding(config.vocabulary, config.d_model, rngs=rngs)
        self.positions = AddPositions(
            config.d_model, dropout_rate=config.dropout, rngs=rngs
        )
        kinds = _kinds(config)
        self.blocks = nnx.List(
            DecoderBlock(config.d_model, **kinds, rngs=rngs)
            for _ in range(config.decoder_layers)
        )
        self.norm = make_norm(config.d_model, "layer", 1e-5, jnp.float32, rngs)

    def __call__(
        self, tokens: Array, states: Array, lengths: Array, *, rng: Array | None = None
    ) -> Array:
        """Logits (B, T, V); tokens: BOS first; rng draws every dropout, None: none."""
        rngs = split_rng(rng, len(self.blocks) + 1)
        places = jnp.arange(tokens.shape[1])[None]
        x = self.positions(self.embedding(tokens), places, rng=rngs[0])
        seen = masks.lengths(key=lengths)
        x = run_blocks(
            self.blocks,
            x,
            rngs[1:],
            lambda block, x, drawn: block(
                x, states, mask=masks.causal(), memory_mask=seen, rng=drawn
            ),
            remat=self.config.remat,
            scan=self.config.scan_layers,
        )
        return self.embedding.logits(self.norm(x))

    def init_cache(
        self, states: Array, lengths: Array, *, hypotheses: int, steps: int
    ) -> Cache:
        """An empty cache for `steps` steps of `hypotheses` (Z) prefixes of each row of states."""
        memory = tuple(block.cross.remember(states) for block in self.blocks)
        B, heads, size, _ = memory[0].key.shape
        empty = KVCache.zeros(B, steps * hypotheses, heads, size, states.dtype)
        return Cache(
            layers=(empty,) * len(memory),
            memory=memory,
            source_lengths=lengths,
            ancestry=Ancestry.start(B, hypotheses, steps),
        )

    def decode_step(self, tokens: Array, cache: Cache) -> tuple[Array, Cache]:
        """The last token of each hypothesis (B, Z) -> logits of the next (B, Z, V), new cache."""
        x = self.positions(self.embedding(tokens), cache.ancestry.step[None, None])
        seen, layers = masks.lengths(key=cache.source_lengths), []
        for block, layer, memory in zip(self.blocks, cache.layers, cache.memory):
            x, layer = block.step(
                x, layer, memory, ancestry=cache.ancestry, memory_mask=seen
            )
            layers.append(layer)
        cache = replace(cache, layers=tuple(layers), ancestry=cache.ancestry.advance())
        return self.embedding.logits(self.norm(x)), cache


class Model(nnx.Module):
    """Features of frames to the units that were said.

    Sources: joint CTC and attention, Watanabe et al. 2017 (IEEE JSTSP 11:8); the encoder's layers,
    Gulati et al. 2020, arXiv 2005.08100, with one feed-forward layer and not two halves.
    """

    unit = "units"

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        """Draws float32 parameters from the stream "params" of rngs."""
        if config.vocabulary < 5 or config.channels < 1:
            raise ValueError(
                "vocabulary must hold a unit besides the 4 special ones, and channels be positive; "
                f"got {config.vocabulary} and {config.channels}."
            )
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs) if config.decoder_layers else None

    def loss(
        self, batch: dict[str, Array], *, rng: Array | None
    ) -> tuple[Array, dict[str, Array]]:
        """The joint loss, a sum over units, EOS included.

        Args:
            batch: "features" (B, T, C), "lengths" (B,), "tokens" (B, U), "weight" (B,).
            rng: draws dropout and augmentation; None: neither.

        Returns:
            The sum, and sums: "loss_sum", "tokens", "ctc_sum" (nats of CTC alone), with a decoder
            "nll_sum" and "accuracy_sum" (of the next unit, told those before), and "unit_errors".
        """
        config, weight, tokens = self.config, batch["weight"], batch["tokens"]
        rngs = split_rng(rng, 3)
        states, lengths, logits = self.encode(batch, rng=rng)
        counts = (tokens != PAD).sum(axis=1)
        ctc = jnp.stack([ctc_loss(x, lengths, tokens) for x in logits])
        ctc_sum = jnp.sum(ctc[-1] * weight)
        sums = {"tokens": jnp.sum((counts + 1) * weight), "ctc_sum": ctc_sum}
        total = jnp.sum(ctc.mean(axis=0) * weight)
        if self.decoder is not None:
            before, after = _targets(tokens, counts)
            guesses = self.decoder(before, states, lengths, rng=rngs[2])
            real = weight[:, None] * (after != PAD)
            nll = optax.softmax_cross_entropy_with_integer_labels(guesses, after)
            even = -jax.nn.log_softmax(guesses).mean(axis=-1)
            smooth = config.label_smoothing
            attention = jnp.sum(real * ((1.0 - smooth) * nll + smooth * even))
            total = config.ctc_weight * total + (1.0 - config.ctc_weight) * attention
            right = guesses.argmax(axis=-1) == after
            sums |= {
                "nll_sum": jnp.sum(real * nll),
                "accuracy_sum": jnp.sum(real * right),
            }
        return total, sums | {"loss_sum": total}

    def encode(
        self, batch: dict[str, Array], *, rng: Array | None = None
    ) -> tuple[Array, Array, list[Array]]:
        """What `Encoder` makes of "features" and "lengths"; rng: as in `loss`."""
        rngs = split_rng(rng, 3)
        x, lengths = prepare(
            batch["features"],
            batch["lengths"],
            cepstra=self.config.cepstra,
            augmentation=self.config.augmentation,
            rng=rngs[0],
        )
        return self.encoder(x, lengths, rng=rngs[1])

    def predict(self, batch: dict[str, Array]) -> dict[str, Array]:
        """{"tokens": (B, longest) int32}: units recognised, then EOS where searched, then PAD."""
        config = self.config
        states, lengths, logits = self.encode(batch)
        if not config.beams:
            spelled = ctc_greedy(logits[-1], lengths)[:, : config.longest]
            short = config.longest - spelled.shape[1]
            return {"tokens": jnp.pad(spelled, ((0, 0), (0, max(short, 0))))}
        cache: Any = PrefixCache.start(logits[-1], lengths, hypotheses=config.beams)
        step = prefix_step(eos=EOS)
        if self.decoder is not None and config.search_weight < 1.0:
            told = self.decoder.init_cache(
                states, lengths, hypotheses=config.beams, steps=config.longest
            )
            cache = JointCache(prefixes=cache, decoder=told)
            step = joint_step(
                self.decoder.decode_step, weight=config.search_weight, eos=EOS
            )
        found = beam_search(
            step,
            cache,
            batch_size=states.shape[0],
            beams=config.beams,
            bos=BOS,
            eos=EOS,
            pad=PAD,
            max_length=config.longest,
            forbidden=(UNK,),
            length_penalty=power(0.0),
        )
        return {"tokens": found.tokens[:, 0]}


def ctc_loss(logits: Array, lengths: Array, tokens: Array) -> Array:
    """Negative log-probability (B,) of tokens (B, U) under CTC; 0 where the frames are too few.

    Args:
        logits: (B, P, V).
        lengths: (B,) frames.
        tokens: (B, U), padded by PAD, the blank.
    """
    counts = (tokens != PAD).sum(axis=1)
    repeats = ((tokens[:, 1:] == tokens[:, :-1]) & (tokens[:, 1:] != PAD)).sum(axis=1)
    beyond = ~_valid(logits, lengths)
    nll = optax.ctc_loss(
        logits,
        beyond.astype(logits.dtype),
        tokens,
        (tokens == PAD).astype(logits.dtype),
        blank_id=PAD,
    )
    return jnp.where(counts + repeats <= lengths, nll, 0.0)


def _targets(tokens: Array, counts: Array) -> tuple[Array, Array]:
    """BOS and tokens, and tokens and EOS: each (B, U + 1)."""
    before = jnp.pad(tokens, ((0, 0), (1, 0)), constant_values=BOS)
    after = jnp.pad(tokens, ((0, 0), (0, 1)))
    places = jnp.arange(after.shape[1])[None]
    return before, jnp.where(places == counts[:, None], EOS, after)


def _valid(x: Array, lengths: Array) -> Array:
    return jnp.arange(x.shape[1])[None] < lengths[:, None]


def _linear(wide: int, narrow: int, axes: tuple, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(
        wide,
        narrow,
        kernel_init=nnx.initializers.xavier_uniform(),
        kernel_metadata={"axes": axes},
        bias_metadata={"axes": axes[1:]},
        rngs=rngs,
    )


def _kinds(config: Config) -> dict[str, Any]:
    """The arguments of a block's sublayers."""
    rate = config.dropout
    return {
        "attention": {"heads": config.heads, "dropout_rate": rate},
        "feed_forward": {
            "d_ff": config.d_ff,
            "activation": "silu",
            "dropout_rate": rate,
        },
        "residual": {"place": "pre", "dropout_rate": rate, "dtype": jnp.float32},
    }
