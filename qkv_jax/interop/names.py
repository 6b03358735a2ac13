"""Where each of our parameters stands in a checkpoint, and in which shape."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from qkv_jax.interop.families import Family
from qkv_jax.models.seq2seq import Config


class Place(NamedTuple):
    """One tensor of a checkpoint.

    Attributes:
        ours: dotted name of the parameter.
        theirs: name of the tensor.
        kind: how the one becomes the other, a name of `KINDS`.
    """

    ours: str
    theirs: str
    kind: str


class Kind(NamedTuple):
    """Both ways: (their array, our shape) -> ours, and ours -> theirs."""

    load: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
    save: Callable[[np.ndarray], np.ndarray]


KINDS = {
    "same": Kind(lambda x, shape: x, lambda x: x),
    "linear": Kind(lambda x, shape: x.T, lambda x: x.T),
    # (N H, D) -> (D, N, H); (N H) -> (N, H); (D, N H) -> (N, H, D); (1, V) -> (V).
    "heads": Kind(
        lambda x, shape: x.T.reshape(shape), lambda x: x.reshape(len(x), -1).T
    ),
    "heads_bias": Kind(lambda x, shape: x.reshape(shape), lambda x: x.reshape(-1)),
    "out": Kind(
        lambda x, shape: x.T.reshape(shape), lambda x: x.reshape(-1, x.shape[-1]).T
    ),
    "row": Kind(lambda x, shape: x.reshape(shape), lambda x: x[None]),
}
ATTENTION = (
    ("query", "q", "heads"),
    ("key", "k", "heads"),
    ("value", "v", "heads"),
    ("out", "out", "out"),
)


def places(family: Family, config: Config) -> Iterator[Place]:
    """Of every parameter but the token tables."""
    yield from (_t5_places if family.t5 else _bart_places)(family.prefix, config)


def table_names(family: Family) -> dict[str, list[str]]:
    """Where source, target and output tables can stand; the first that is there counts."""
    shared, prefix = f"{family.prefix}shared.weight", family.prefix
    target = [f"{prefix}decoder.embed_tokens.weight", shared]
    return {
        "source": [f"{prefix}encoder.embed_tokens.weight", shared],
        "target": target,
        "output": ["lm_head.weight", *target],
    }


def unused(family: Family) -> list[str]:
    """Tensors of published checkpoints that no computation reads."""
    if family.t5:
        cross = "decoder.block.0.layer.1.EncDecAttention"
        return [f"{cross}.relative_attention_bias.weight"]
    names = []
    for side in ("encoder", "decoder"):
        names.append(f"{family.prefix}{side}.version")
        if family.sinusoids:
            stem = f"{family.prefix}{side}.embed_positions.weight"
            names += [stem, stem + "s"]
    return names


def _bart_places(prefix: str, config: Config) -> Iterator[Place]:
    if config.output_bias:
        yield Place("output_bias", "final_logits_bias", "row")
    for side, ours in (
        ("encoder", "source_positions"),
        ("decoder", "target_positions"),
    ):
        top = f"{prefix}{side}"
        if config.positions == "learned":
            yield Place(f"{ours}.table", f"{top}.embed_positions.weight", "same")
        if config.embedding_norm:
            yield from _norm(f"{ours}.norm", f"{top}.layernorm_embedding")
        if config.norm == "pre":
            yield from _norm(f"{side}_norm", f"{top}.layer_norm")
        count = getattr(config, f"{side}_layers")
        for i in range(count):
            yield from _bart_block(f"{side}.{i}", f"{top}.layers.{i}", side)


def _bart_block(ours: str, theirs: str, side: str) -> Iterator[Place]:
    sublayers = [("attention", "self_attn")]
    if side == "decoder":
        sublayers.append(("cross", "encoder_attn"))
    for name, there in sublayers:
        for part, letter, kind in ATTENTION:
            stem = f"{theirs}.{there}.{letter}_proj"
            yield Place(f"{ours}.{name}.{part}.kernel", f"{stem}.weight", kind)
            bias = "same" if kind == "out" else "heads_bias"
            yield Place(f"{ours}.{name}.{part}.bias", f"{stem}.bias", bias)
        yield from _norm(f"{ours}.after_{name}.norm", f"{theirs}.{there}_layer_norm")
    for part, layer in (("up", "fc1"), ("down", "fc2")):
        stem = f"{ours}.feed_forward.{part}"
        yield Place(f"{stem}.kernel", f"{theirs}.{layer}.weight", "linear")
        yield Place(f"{stem}.bias", f"{theirs}.{layer}.bias", "same")
    yield from _norm(f"{ours}.after_feed_forward.norm", f"{theirs}.final_layer_norm")


def _norm(ours: str, theirs: str) -> Iterator[Place]:
    yield Place(f"{ours}.scale", f"{theirs}.weight", "same")
    yield Place(f"{ours}.bias", f"{theirs}.bias", "same")


def _t5_places(prefix: str, config: Config) -> Iterator[Place]:
    for side in ("encoder", "decoder"):
        top = f"{prefix}{side}"
        yield Place(f"{side}_norm.scale", f"{top}.final_layer_norm.weight", "same")
        first = f"{top}.block.0.layer.0.SelfAttention"
        yield Place(f"{side}_bias", f"{first}.relative_attention_bias.weight", "same")
        for i in range(getattr(config, f"{side}_layers")):
            yield from _t5_block(f"{side}.{i}", f"{top}.block.{i}.layer", side, config)


def _t5_block(ours: str, theirs: str, side: str, config: Config) -> Iterator[Place]:
    sublayers = [("attention", "SelfAttention")]
    if side == "decoder":
        sublayers.append(("cross", "EncDecAttention"))
    for i, (name, there) in enumerate(sublayers):
        for part, letter, kind in ATTENTION:
            stem = f"{theirs}.{i}.{there}.{letter[0]}.weight"
            yield Place(f"{ours}.{name}.{part}.kernel", stem, kind)
        norm = f"{theirs}.{i}.layer_norm.weight"
        yield Place(f"{ours}.after_{name}.norm.scale", norm, "same")
    last = len(sublayers)
    parts = {"up": "wi_0", "gate": "wi_1"} if config.gated else {"up": "wi"}
    for part, layer in (parts | {"down": "wo"}).items():
        stem = f"{theirs}.{last}.DenseReluDense.{layer}.weight"
        yield Place(f"{ours}.feed_forward.{part}.kernel", stem, "linear")
    norm = f"{theirs}.{last}.layer_norm.weight"
    yield Place(f"{ours}.after_feed_forward.norm.scale", norm, "same")
