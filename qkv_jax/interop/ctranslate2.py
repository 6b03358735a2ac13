"""Models for CTranslate2, an engine that translates without JAX (extra `export`).

The directory is built with its own specification classes, from our parameters: torch and
`transformers` are not needed.
"""

import importlib.util
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from qkv_jax.interop.directory import check_free, new_directory
from qkv_jax.interop.errors import InteropError
from qkv_jax.interop.names import KINDS
from qkv_jax.interop.trained import Weights, named_arrays, with_all_key_heads
from qkv_jax.models.seq2seq import Config
from qkv_jax.ops import sinusoids

ACTIVATIONS = {"relu": "RELU", "gelu": "GELU", "gelu_tanh": "GELUTanh", "silu": "SWISH"}
UNK = "<unk>"
UNUSED = "<unused>"
# Finite in float16, and of probability 0.
NEVER = -6e4
# Sinusoids are written for at least so many positions.
POSITIONS = 1024
Named = Mapping[str, np.ndarray]
Side = Literal["encoder", "decoder"]


class Vocabularies(NamedTuple):
    """The piece of every id.

    Attributes:
        source: of sources.
        target: of targets.
    """

    source: Sequence[str]
    target: Sequence[str]


def export_ctranslate2(
    model: Weights,
    vocabularies: Vocabularies,
    directory: str | os.PathLike,
    *,
    quantization: str | None = None,
    forbidden: Iterable[int] = (),
    files: Iterable[str | os.PathLike] = (),
) -> None:
    """Writes a directory for `ctranslate2.Translator`; all of it, or nothing after an error.

    Sources are given to it as pieces, with what the tokeniser puts around them (EOS). What a
    search never emits (padding, the start, `forbidden`) has probability 0 there, so that no
    option has to be set; all others share out what it had.

    Args:
        model: a `Pretrained` or `Trained`.
        vocabularies: pieces, at most as many as the model embeds; the rest is unused.
        directory: new or empty.
        quantization: of the weights, "int8", "int8_float32", "int8_float16", "int8_bfloat16",
            "int16", "float16", "bfloat16" or "float32"; None: float32. On a CPU without VNNI,
            CTranslate2 adds pairs of int8 products in 16 bits, which saturate: outputs of one
            file differ between CPUs.
        forbidden: further target ids that are never emitted.
        files: copied beside it, the tokeniser's.

    Raises:
        InteropError: ctranslate2 is missing; the vocabularies are not the model's; the
            quantisation is unknown; the directory is not free, or a file cannot be copied.
    """
    specs = _import().specs
    known = specs.model_spec.ACCEPTED_MODEL_TYPES
    if quantization is not None and quantization not in known:
        raise InteropError(
            f"quantization must be one of {', '.join(known)}; got {quantization!r}."
        )
    if "bfloat16" in str(quantization) and not importlib.util.find_spec("torch"):
        raise InteropError(
            f'quantization "{quantization}" needs torch: pip install torch, or choose another.'
        )
    check_free(Path(directory))
    spec = _specification(specs, model, sorted(never_emitted(model, forbidden)))
    _describe(spec, model, vocabularies)
    spec.validate()
    spec.optimize(quantization=quantization or "float32")
    for file in files:
        if not Path(file).is_file():
            raise InteropError(f"{file} is missing: it was to be copied.")
        spec.register_file(str(file))
    with new_directory(directory) as building:
        spec.save(str(building))


def never_emitted(model: Weights, forbidden: Iterable[int] = ()) -> set[int]:
    """Target ids of probability 0 in an exported model."""
    return {model.config.pad, model.start, *forbidden} - {model.eos}


def read_vocabularies(directory: str | os.PathLike) -> Vocabularies:
    """The pieces of a directory that `export_ctranslate2` wrote.

    Raises:
        InteropError: a file is missing or damaged.
    """
    directory = Path(directory)
    shared = directory / "shared_vocabulary.json"
    names = ("source_vocabulary.json", "target_vocabulary.json")
    files = [shared] * 2 if shared.is_file() else [directory / name for name in names]
    try:
        return Vocabularies(*(json.loads(x.read_text(encoding="utf-8")) for x in files))
    except (OSError, ValueError) as error:
        raise InteropError(f"{directory} is no CTranslate2 model ({error}).") from error


def open_translator(directory: str | os.PathLike, **options: Any) -> Any:
    """A `ctranslate2.Translator` on the CPU.

    Raises:
        InteropError: ctranslate2 is missing, or refuses the directory.
    """
    try:
        return _import().Translator(str(directory), device="cpu", **options)
    except (RuntimeError, ValueError) as error:
        raise InteropError(f"{directory} is no CTranslate2 model ({error}).") from error


def _import() -> Any:
    try:
        import ctranslate2
    except ImportError as error:
        raise InteropError(
            f"CTranslate2 is missing ({error}): pip install qkv-jax[export]."
        ) from None
    return ctranslate2


def _describe(spec: Any, model: Weights, vocabularies: Vocabularies) -> None:
    """Registers the vocabularies, and names what the engine has to know of them."""
    config = model.config
    target = _complete(vocabularies.target, config.vocabulary, "target")
    rows = config.source_vocabulary or config.vocabulary
    source = _complete(vocabularies.source, rows, "source")
    for name, pieces in (("source", source), ("target", target)):
        if UNK not in pieces:
            raise InteropError(
                f"the {name} vocabulary has no {UNK!r}: CTranslate2 needs it."
            )
    if target[model.eos] not in source:
        raise InteropError(
            f"the source vocabulary lacks the end of targets, {target[model.eos]!r}."
        )
    spec.register_source_vocabulary(source)
    spec.register_target_vocabulary(target)
    spec.config.unk_token = UNK
    # Only a name is asked for: no source gets it. One that the source lacks would be added to it.
    spec.config.bos_token = target[model.eos]
    spec.config.eos_token = target[model.eos]
    spec.config.decoder_start_token = target[model.start]
    spec.config.layer_norm_epsilon = config.epsilon


def _complete(pieces: Sequence[str], count: int, name: str) -> list[str]:
    """As many different pieces as there are rows."""
    if len(pieces) > count:
        raise InteropError(
            f"the {name} vocabulary has {len(pieces)} pieces, the model embeds {count}: they "
            "are of different models."
        )
    rows = [*pieces, *[UNUSED] * (count - len(pieces))]
    rows = [f"<unused{i}>" if x == UNUSED else x for i, x in enumerate(rows)]
    if len(set(rows)) < count:
        twice = next(x for i, x in enumerate(rows) if x in rows[:i])
        raise InteropError(f"the {name} vocabulary has {twice!r} twice.")
    return rows


def _specification(specs: Any, model: Weights, never: Sequence[int]) -> Any:
    config, named = with_all_key_heads(model.config, named_arrays(model))
    encoder = _stack(
        specs.transformer_spec.TransformerEncoderSpec, specs, config, "encoder"
    )
    decoder = _stack(
        specs.transformer_spec.TransformerDecoderSpec, specs, config, "decoder"
    )
    target = named["target_embedding.table"]
    encoder.embeddings[0].weight = named.get("source_embedding.table", target)
    decoder.embeddings.weight = target
    decoder.projection.weight = named.get("output.table", target)
    bias = np.array(named.get("output_bias", np.zeros(config.vocabulary, np.float32)))
    bias[list(never)] = NEVER
    decoder.projection.bias = bias
    if config.output_scale != 1.0:
        decoder.scale_outputs = np.float32(config.output_scale)
    _fill_stack(encoder, named, config, "encoder", "source_positions")
    _fill_stack(decoder, named, config, "decoder", "target_positions")
    return specs.TransformerSpec(encoder, decoder)


def _stack(kind: Any, specs: Any, config: Config, side: Side) -> Any:
    """The empty specification of a side."""
    heads, _, size, _ = config.side(side)
    return kind(
        getattr(config, f"{side}_layers"),
        heads,
        pre_norm=config.norm == "pre",
        activation=specs.Activation[ACTIVATIONS[config.activation]],
        layernorm_embedding=config.embedding_norm,
        relative_attention_bias=config.positions == "relative",
        ffn_glu=config.gated,
        rms_norm=config.normalisation == "rms",
        head_dim=None if size * heads == config.d_model else size,
    )


def _fill_stack(
    spec: Any, named: Named, config: Config, side: Side, where: str
) -> None:
    scale = config.d_model**0.5 if config.embedding_scale else 1.0
    spec.scale_embeddings = np.float32(scale)
    if config.positions != "relative":
        spec.position_encodings.encodings = _positions(named, config, where)
    if config.embedding_norm:
        _norm(spec.layernorm_embedding, named, f"{where}.norm")
    if config.norm == "pre":
        _norm(spec.layer_norm, named, f"{side}_norm")
    for i, layer in enumerate(spec.layer):
        name = f"{side}.{i}"
        parts = {"attention": layer.self_attention}
        if side == "decoder":
            parts["cross"] = layer.attention
        for part, attention in parts.items():
            _attention(attention, named, f"{name}.{part}", config, side)
            _norm(attention.layer_norm, named, f"{name}.after_{part}.norm")
        if config.positions == "relative":
            attention = layer.self_attention
            attention.relative_attention_bias = named[f"{side}_bias"]
            attention.relative_attention_max_distance = np.int32(
                config.relative_distance
            )
        _feed_forward(layer.ffn, named, name)


def _positions(named: Named, config: Config, where: str) -> np.ndarray:
    """What is added to each position, from the first."""
    if config.positions == "learned":
        return named[f"{where}.table"][config.position_offset :]
    rows = jnp.arange(max(config.max_positions, POSITIONS)) + config.position_offset
    inclusive = config.positions == "sinusoid_inclusive"
    return np.asarray(sinusoids(rows, config.d_model, inclusive=inclusive))


def _attention(spec: Any, named: Named, name: str, config: Config, side: Side) -> None:
    size = config.side(side)[2]
    scale = size**-0.5 if config.attention_scale is None else config.attention_scale
    spec.queries_scale = np.float32(scale)
    own = len(spec.linear) == 2
    groups = [["query", "key", "value"]] if own else [["query"], ["key", "value"]]
    for linear, group in zip(spec.linear, groups):
        stems = [f"{name}.{part}" for part in group]
        linear.weight = np.concatenate([_heads(named, f"{x}.kernel") for x in stems])
        if config.bias:
            linear.bias = np.concatenate([_heads(named, f"{x}.bias") for x in stems])
    last = f"{name}.out"
    spec.linear[-1].weight = KINDS["out"].save(named[f"{last}.kernel"])
    if config.bias:
        spec.linear[-1].bias = named[f"{last}.bias"]


def _heads(named: Named, name: str) -> np.ndarray:
    kind = "heads" if name.endswith("kernel") else "heads_bias"
    return KINDS[kind].save(named[name])


def _feed_forward(spec: Any, named: Named, name: str) -> None:
    stem = f"{name}.feed_forward"
    parts = {"up": spec.linear_0, "down": spec.linear_1}
    if f"{stem}.gate.kernel" in named:
        parts["gate"] = spec.linear_0_noact
    for part, linear in parts.items():
        linear.weight = KINDS["linear"].save(named[f"{stem}.{part}.kernel"])
        if f"{stem}.{part}.bias" in named:
            linear.bias = named[f"{stem}.{part}.bias"]
    _norm(spec.layer_norm, named, f"{name}.after_feed_forward.norm")


def _norm(spec: Any, named: Named, name: str) -> None:
    spec.gamma = named[f"{name}.scale"]
    if f"{name}.bias" in named:
        spec.beta = named[f"{name}.bias"]
