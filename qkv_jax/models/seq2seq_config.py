"""Sizes and choices of the encoder-decoder Transformer, its presets, and what they cost."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from qkv_jax.layers import (
    Activation,
    AttentionKind,
    Normalisation,
    NormPlace,
    Positions,
    Remat,
)
from qkv_jax.ops import ContextMethod, check_method

CHOICES: dict[str, tuple[str | None, ...]] = {
    "activation": get_args(Activation),
    "norm": get_args(NormPlace),
    "normalisation": get_args(Normalisation),
    "positions": get_args(Positions),
    "tie": ("all", "target", "input", "none"),
    "dtype": ("float32", "bfloat16", "float16"),
    "output_dtype": ("float32", "bfloat16", "float16", None),
    "remat": get_args(Remat),
    "context": get_args(ContextMethod),
}
SIZES = (
    "d_model",
    "d_ff",
    "heads",
    "encoder_layers",
    "decoder_layers",
    "max_positions",
    "relative_buckets",
    "relative_distance",
)
OPTIONAL_SIZES = ("source_vocabulary", "head_size", "decoder_heads", "decoder_d_ff")
RATES = ("dropout", "embedding_dropout", "attention_dropout", "activation_dropout")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes and choices of the model.

    Attributes:
        vocabulary: V, of the target, and of the source where `source_vocabulary` is None; 0: the
            tokeniser's, filled in by the task.
        source_vocabulary: tokens of the source, where they are others.
        d_model: D.
        d_ff: F.
        heads: N.
        kv_heads: K, divides N; None: N.
        head_size: H; None: D // N.
        encoder_attention, decoder_attention: the kind of self-attention of each side's layers.
        decoder_heads, decoder_d_ff: N and F of the decoder; None: as the encoder's.
        heads_by_layer: N of each of `attention_names`, where they differ, as after pruning; each
            keeps as many query heads a key head as its side has, of size `head_size`.
        encoder_layers, decoder_layers: L on each side.
        activation, gated: of the feed-forward layers.
        norm: "post" (as published) or "pre" (with a final norm on each side).
        normalisation, epsilon: "layer" or "rms"; what is added to the variance.
        bias: whether projections and feed-forward layers add one.
        attention_scale: multiplies the scores; None: H ** -0.5.
        tie: which embeddings are one table: source, target and output ("all"), target and
            output ("target"), source and target ("input"), or none.
        positions: "sinusoid" or "sinusoid_inclusive" (see `AddPositions`), "learned" (tables of
            `max_positions`), or "relative" (T5's learned bias on the scores of self-attention,
            one table a side, of `relative_buckets` up to `relative_distance`).
        position_offset: what the first position counts as.
        max_positions: the longest sequence, where positions are learned.
        relative_buckets, relative_distance: see `scores.relative_bias`.
        embedding_scale: whether token vectors are multiplied by sqrt(D).
        embedding_norm: whether the sum of token and position is normalised.
        output_bias: whether logits have a bias.
        output_scale: multiplies the decoder's states before the output projection.
        zero_pad: whether the vector of `pad` is 0 and stays so (a decoder can start from it).
        dropout: on each sublayer's output.
        embedding_dropout: on the embeddings; None: as `dropout`.
        attention_dropout, activation_dropout: on attention weights; after the activation.
        dtype: of the computation; parameters are drawn in float32.
        output_dtype: of the product with the output embedding; None: dtype.
        remat: what training keeps of each layer for its backward pass, see `run_blocks`: all
            ("none" is computed again), the products with weights ("dots"), or its input alone
            ("everything" is).
        scan_layers: whether the layers of a side are one loop, see `run_blocks`: a program that
            does not grow with their number, and a copy of their weights in each step. Cached
            decoding is not. The same is computed.
        pad: the token that fills up rows and is never attended to.
        context: how attention shares out the lengths, on a mesh whose axis "context" is larger
            than 1: "ring", "zigzag", "ulysses", "gather", or "auto", see
            `context_parallel_attention`. The same is computed by each.
    """

    vocabulary: int = 0
    source_vocabulary: int | None = None
    d_model: int = 512
    d_ff: int = 2048
    heads: int = 8
    kv_heads: int | None = None
    head_size: int | None = None
    encoder_attention: AttentionKind = field(default_factory=AttentionKind)
    decoder_attention: AttentionKind = field(default_factory=AttentionKind)
    decoder_heads: int | None = None
    decoder_d_ff: int | None = None
    heads_by_layer: tuple[int, ...] | None = None
    encoder_layers: int = 6
    decoder_layers: int = 6
    activation: Activation = "relu"
    gated: bool = False
    norm: NormPlace = "post"
    normalisation: Normalisation = "layer"
    epsilon: float = 1e-5
    bias: bool = True
    attention_scale: float | None = None
    tie: Literal["all", "target", "input", "none"] = "all"
    positions: Positions = "sinusoid"
    position_offset: int = 0
    max_positions: int = 1024
    relative_buckets: int = 32
    relative_distance: int = 128
    embedding_scale: bool = True
    embedding_norm: bool = False
    output_bias: bool = False
    output_scale: float = 1.0
    zero_pad: bool = False
    dropout: float = 0.1
    embedding_dropout: float | None = None
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    output_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    remat: Remat = "none"
    scan_layers: bool = False
    pad: int = 0
    context: ContextMethod = "auto"

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
        for name in OPTIONAL_SIZES:
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name} must be positive, or None; got {size}.")
        self._check_heads()
        self._check_kinds()
        self._check_scan()
        if self.d_model % 2 and self.positions.startswith("sinusoid"):
            raise ValueError(f"sinusoids need an even d_model; got {self.d_model}.")
        if self.source_vocabulary and self.tie in ("all", "input"):
            raise ValueError(
                f'source_vocabulary needs tie = "target" or "none"; got {self.tie!r}.'
            )
        if self.position_offset < 0:
            raise ValueError(
                f"position_offset must not be negative; got {self.position_offset}."
            )
        if not self.epsilon > 0:
            raise ValueError(f"epsilon must be positive; got {self.epsilon}.")
        if self.vocabulary < 0:
            raise ValueError(f"vocabulary must be positive; got {self.vocabulary}.")
        if self.pad < 0 or 0 < self.vocabulary <= self.pad:
            raise ValueError(
                f"pad must be a token of the vocabulary of {self.vocabulary}; got {self.pad}."
            )

    def _check_heads(self) -> None:
        for heads in {self.heads, self.decoder_heads or self.heads}:
            kv_heads = self.kv_heads or heads
            if self.kv_heads == 0 or heads % kv_heads:
                raise ValueError(
                    f"kv_heads must divide heads; got heads = {heads}, kv_heads = {self.kv_heads}."
                )
            if self.head_size is None and self.d_model % heads:
                raise ValueError(
                    "heads must divide d_model, or head_size be given; got "
                    f"d_model = {self.d_model}, heads = {heads}."
                )

        if self.heads_by_layer is not None:
            self._check_heads_by_layer(self.heads_by_layer)

    def _check_heads_by_layer(self, counts: tuple[int, ...]) -> None:
        names = self.attention_names
        if len(counts) != len(names):
            raise ValueError(
                f"heads_by_layer must have one number for each of the {len(names)} attention "
                f"layers; got {len(counts)}."
            )
        if self.head_size is None:
            raise ValueError("heads_by_layer needs head_size: it is the same in all.")
        if self.positions == "relative":
            raise ValueError(
                'heads_by_layer cannot be with positions = "relative": all layers of a side share '
                "one table of biases, with a column a head."
            )
        for name, count in zip(names, counts):
            heads, kv_heads, _, _ = self.side(_side_of(name))
            if count < 1 or count % (heads // kv_heads):
                raise ValueError(
                    f"heads_by_layer must hold positive multiples of {heads // kv_heads}, the "
                    f"query heads a key head; got {count} for {name}."
                )

    @property
    def attention_names(self) -> list[str]:
        """Names of all attention layers, in order: the encoder's, then each decoder layer's two."""
        decoder = [
            f"decoder.{i}.{part}"
            for i in range(self.decoder_layers)
            for part in ("attention", "cross")
        ]
        return [f"encoder.{i}.attention" for i in range(self.encoder_layers)] + decoder

    def heads_of(self, name: str) -> tuple[int, int]:
        """Query heads N and key heads K of one of `attention_names`."""
        heads, kv_heads, _, _ = self.side(_side_of(name))
        if self.heads_by_layer is None:
            return heads, kv_heads
        count = self.heads_by_layer[self.attention_names.index(name)]
        return count, count * kv_heads // heads

    def _check_kinds(self) -> None:
        for side in ("encoder", "decoder"):
            kind, count = self.kind(side), getattr(self, f"{side}_layers")
            place = f"{side}_attention"
            if any(not 0 <= number < count for number in kind.layers or ()):
                raise ValueError(
                    f"{place}.layers must be of 0 .. {count - 1}; got {kind.layers}."
                )
            if side == "decoder" and kind.name == "linformer":
                raise ValueError(
                    f"{place} cannot be 'linformer', which mixes what is to come."
                )
            if self.positions == "relative" and not kind.takes_any_mask:
                raise ValueError(
                    f"{place}: {kind.name!r} has no scores to add relative positions to."
                )
            if self.attention_dropout and not kind.drops_weights:
                raise ValueError(
                    f"{place}: {kind.name!r} has no dropout on weights: attention_dropout must be 0."
                )

    def _check_scan(self) -> None:
        if not self.scan_layers:
            return
        for side in ("encoder", "decoder"):
            count, kind = getattr(self, f"{side}_layers"), self.kind(side)
            if len({kind.of_layer(i) for i in range(count)}) > 1:
                raise ValueError(
                    f"scan_layers needs the layers of a side to be alike, and {side}_attention.layers "
                    f"names {kind.layers} of {count}: leave scan_layers False."
                )
            for part in ("attention", "cross") if side == "decoder" else ("attention",):
                names = [f"{side}.{i}.{part}" for i in range(count)]
                if len({self.heads_of(name) for name in names}) > 1:
                    raise ValueError(
                        "scan_layers needs the layers of a side to be alike, and heads_by_layer "
                        f"gives the {side}'s different numbers of heads: leave scan_layers False."
                    )

    def kind(self, side: Literal["encoder", "decoder"]) -> AttentionKind:
        """The kind of self-attention of a side."""
        return self.encoder_attention if side == "encoder" else self.decoder_attention

    @property
    def packs(self) -> bool:
        """Whether rows of several pairs give what a row for each does."""
        return self.encoder_attention.packs and self.decoder_attention.packs

    @property
    def cross_layers(self) -> list[str]:
        """Names of the attention of the target to the source, in order."""
        return [f"decoder.{i}.cross" for i in range(self.decoder_layers)]

    def side(self, name: Literal["encoder", "decoder"]) -> tuple[int, int, int, int]:
        """Heads N, key heads K, head size H and feed-forward width F of a side."""
        heads, width = self.heads, self.d_ff
        if name == "decoder":
            heads, width = self.decoder_heads or heads, self.decoder_d_ff or width
        return (
            heads,
            self.kv_heads or heads,
            self.head_size or self.d_model // heads,
            width,
        )


def _side_of(name: str) -> Literal["encoder", "decoder"]:
    return "encoder" if name.startswith("encoder") else "decoder"


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
    D, V = config.d_model, config.vocabulary
    matrices = 3 if config.gated else 2
    total = 0
    for name in config.attention_names:
        side = _side_of(name)
        (N, K), H = config.heads_of(name), config.side(side)[2]
        asks = source if side == "encoder" else target
        looked_at = source if side == "encoder" or name.endswith("cross") else target
        # Multiply-adds of queries and output, keys and values, scores and sums.
        total += asks * 2 * D * N * H + looked_at * 2 * D * K * H
        total += 2 * asks * looked_at * N * H
    total += config.encoder_layers * source * matrices * D * config.side("encoder")[3]
    total += config.decoder_layers * target * matrices * D * config.side("decoder")[3]
    return 3 * 2.0 * rows * (total + target * D * V)


def check_mesh(config: Config, mesh: Mapping[str, int]) -> None:
    """Raises ValueError if `config.context` cannot share the heads out as a mesh asks.

    Args:
        config: of the model.
        mesh: the sizes of its axes.
    """
    context, tensor = (mesh.get(name, 1) for name in ("context", "tensor"))
    for kind in (config.encoder_attention, config.decoder_attention):
        if context > 1 and not kind.drops_weights:
            raise ValueError(
                f"attention of the kind {kind.name!r} does not share out lengths: leave the axis "
                "context at 1."
            )
    for count in {config.heads_of(name)[0] for name in config.attention_names}:
        heads = count if count % tensor else count // tensor
        check_method(config.context, heads=heads, devices=context)
