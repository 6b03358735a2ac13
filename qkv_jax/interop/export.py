"""Models trained here as Hugging Face checkpoints, exactly or not at all.

A configuration is written in a family's keys and read back as any published checkpoint is; what
comes back different is what the family cannot express.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import sentencepiece
from flax import nnx

from qkv_jax.interop.directory import new_directory
from qkv_jax.interop.errors import InteropError
from qkv_jax.interop.families import ACTIVATIONS, FAMILIES
from qkv_jax.interop.names import KINDS, places, unused
from qkv_jax.interop.pretrained import (
    Pretrained,
    abstract_model,
    assemble,
    flatten,
    read_fields,
    save,
    write_json,
)
from qkv_jax.interop.trained import Trained, named_arrays, with_all_key_heads
from qkv_jax.models.seq2seq import Config
from qkv_jax.ops import sinusoids

CLASSES = {
    "marian": "MarianMTModel",
    "pegasus": "PegasusForConditionalGeneration",
    "m2m_100": "M2M100ForConditionalGeneration",
    "bart": "BartForConditionalGeneration",
    "mbart": "MBartForConditionalGeneration",
    "t5": "T5ForConditionalGeneration",
}
# BART's tables of positions begin with two rows that are not used.
LEARNED_OFFSET = 2
HERE = Path("the model")


def export_huggingface(
    model: Trained,
    directory: str | os.PathLike,
    *,
    tokenizer: bytes,
    generation: Mapping[str, Any] | None = None,
    longest: int = 512,
) -> Pretrained:
    """Writes a directory that `transformers` loads, model and tokeniser; and returns the model.

    Args:
        model: see `to_huggingface`.
        directory: new or empty.
        tokenizer: see `write_marian_tokenizer`.
        generation: of `generation_settings`; None: only the special ids.
        longest: tokens that sources have at most.

    Raises:
        InteropError: no family can express the model; the tokeniser is not the model's; or the
            directory is not free. Nothing is written then.
    """
    pretrained = to_huggingface(model, generation=generation)
    with new_directory(directory) as building:
        save(pretrained, building)
        write_marian_tokenizer(building, tokenizer, model=model, longest=longest)
    return pretrained


def to_huggingface(
    model: Trained, *, generation: Mapping[str, Any] | None = None
) -> Pretrained:
    """The same model as a checkpoint of a published family.

    Post-norm with sinusoids is Marian, pre-norm Pegasus; post-norm with learned positions and an
    embedding norm is BART, pre-norm mBART; pre-norm with inclusive sinusoids M2M100; and with RMS
    norms, relative positions and no biases T5. Key heads that are shared are written once for
    each query head, and biases that are absent as zeros.

    Args:
        model: to be written.
        generation: of `generation_settings`; None: only the special ids.

    Raises:
        InteropError: no family expresses it; the message lists the fields that stand in the way.
    """
    config, named = _restated(model)
    wants = {name: _differences(name, config, model) for name in CLASSES}
    family = min(wants, key=lambda name: len(wants[name]))
    if wants[family]:
        raise InteropError(
            f"transformers has no such model: the closest is {CLASSES[family]}, if it had "
            f"{', '.join(wants[family])}. Export to CTranslate2, or train with these."
        )
    settings = _settings(family, config, model)
    if generation is None:
        generation = {}
    generation = _special_ids(model) | dict(generation)
    fields, special = read_fields(settings, generation, HERE)
    tensors = _tensors(family, fields, config, named)
    return assemble(fields, special, settings, generation, tensors, HERE)


def generation_settings(
    model: Trained,
    *,
    beams: int,
    alpha: float,
    max_length: int,
    exact: bool = True,
    forbidden: Sequence[int] = (),
) -> dict[str, Any]:
    """generation_config.json: `model.generate` searches as `beam_search` does.

    Args:
        model: whose special ids they are.
        beams: Z.
        alpha: of the length penalty `power(alpha)`; `transformers` has no other.
        max_length: most tokens of a translation, EOS included.
        exact: see `beam_search`; the rule of `transformers` for False is a little different.
        forbidden: further ids that are never emitted.
    """
    never = sorted({model.config.pad, model.start, *forbidden} - {model.eos})
    settings = _special_ids(model) | {
        "num_beams": beams,
        "length_penalty": alpha,
        "max_length": max_length + 1,  # The start counts.
        "suppress_tokens": never,
        "do_sample": False,
    }
    if beams > 1:
        settings["early_stopping"] = "never" if exact else False
    return settings


def write_marian_tokenizer(
    directory: Path, tokenizer: bytes, *, model: Trained, longest: int = 512
) -> None:
    """Writes the files of a MarianTokenizer with the ids and pieces of a SentencePiece model.

    Args:
        directory: to write into.
        tokenizer: the bytes of the SentencePiece model, of both languages.
        model: whose ids they are.
        longest: tokens that sources have at most.

    Raises:
        InteropError: the tokeniser is not the model's.
    """
    pieces = sentencepiece_pieces(tokenizer)
    sizes = {model.config.vocabulary, model.config.source_vocabulary}
    if not {None, len(pieces)} >= sizes:
        raise InteropError(
            f"the tokeniser has {len(pieces)} pieces, the model embeds "
            f"{model.config.vocabulary}: they must be of the same run."
        )
    for name in ("source.spm", "target.spm"):
        (directory / name).write_bytes(tokenizer)
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    text = json.dumps(vocabulary, ensure_ascii=False, indent=0) + "\n"
    (directory / "vocab.json").write_text(text, encoding="utf-8")
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
    content = {
        "tokenizer_class": "MarianTokenizer",
        "model_max_length": longest,
        "separate_vocabs": False,
        # "</s>" in a text is text.
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "pad_token": pieces[model.config.pad],
        "bos_token": pieces[model.start],
        "eos_token": pieces[model.eos],
        "unk_token": pieces[processor.unk_id()],
    }
    write_json(directory / "tokenizer_config.json", content)


def sentencepiece_pieces(tokenizer: bytes) -> list[str]:
    """The piece of every id of a SentencePiece model, given as bytes."""
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
    except RuntimeError:
        raise InteropError("the tokeniser is no SentencePiece model.") from None
    return [processor.id_to_piece(i) for i in range(processor.get_piece_size())]


def _restated(model: Trained) -> tuple[Config, dict[str, np.ndarray]]:
    """The same computation, with nothing said that can be left out."""
    config, named = with_all_key_heads(model.config, named_arrays(model))
    changes: dict[str, Any] = {"zero_pad": False, "dtype": "float32", "context": "ring"}
    changes |= {"output_dtype": None, "remat": "none", "scan_layers": False}
    if config.decoder_heads == config.heads:
        changes["decoder_heads"] = None
    if config.decoder_d_ff == config.d_ff:
        changes["decoder_d_ff"] = None
    if config.source_vocabulary == config.vocabulary:
        changes["source_vocabulary"] = None
    missing = LEARNED_OFFSET - config.position_offset
    if config.positions == "learned" and missing > 0:
        changes["position_offset"] = LEARNED_OFFSET
        for name in ("source_positions.table", "target_positions.table"):
            named[name] = np.pad(named[name], ((missing, 0), (0, 0)))
    return dataclasses.replace(config, **changes), named


def _traits(config: Config) -> dict[str, Any]:
    """What is computed, apart from the sizes that every family can choose."""
    traits: dict[str, Any] = {
        name: getattr(config, name)
        for name in (
            "norm",
            "normalisation",
            "epsilon",
            "bias",
            "gated",
            "activation",
            "positions",
            "embedding_scale",
            "embedding_norm",
            "output_bias",
            "output_scale",
        )
    }
    for side in ("encoder", "decoder"):
        size = config.side(side)[2]
        traits[f"{side} heads of size"] = size
        scale = config.attention_scale
        traits[f"{side} attention_scale"] = size**-0.5 if scale is None else scale
    if config.positions == "relative":
        traits["decoder_heads"] = config.decoder_heads
        traits["decoder_d_ff"] = config.decoder_d_ff
    else:
        traits["position_offset"] = config.position_offset
    return traits


def _differences(family: str, config: Config, model: Trained) -> list[str]:
    """What the family would make of the model, where it is something else."""
    fields, _ = read_fields(_settings(family, config, model), {}, HERE)
    tie = {
        name: getattr(config, name)
        for name in ("tie", "vocabulary", "source_vocabulary")
    }
    theirs = Config(**fields, **tie)
    ours, wanted = _traits(config), _traits(theirs)
    found = []
    for name in ours.keys() | wanted.keys():
        if name in ("bias", "output_bias") and not ours[name]:
            continue  # One of zeros is none.
        if ours.get(name) != wanted.get(name):
            found.append(f"{name} = {wanted.get(name)!r} (not {ours.get(name)!r})")
    if config.source_vocabulary and family != "marian":
        found.append("source_vocabulary = None")
    return sorted(found)


def _special_ids(model: Trained) -> dict[str, Any]:
    ids = {
        "pad_token_id": model.config.pad,
        "bos_token_id": model.start,
        "eos_token_id": model.eos,
        "decoder_start_token_id": model.start,
        # `transformers` has defaults for these, which the model does not.
        "forced_eos_token_id": None,
        "forced_bos_token_id": model.first,
    }
    return ids


def _settings(family: str, config: Config, model: Trained) -> dict[str, Any]:
    """config.json of a family, as near to the configuration as it comes."""
    settings = {
        "model_type": family,
        "architectures": [CLASSES[family]],
        "dtype": "float32",
        "is_encoder_decoder": True,
        "d_model": config.d_model,
        "vocab_size": config.vocabulary,
        "tie_word_embeddings": config.tie == "all",
        **_special_ids(model),
    }
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    activation = names[config.activation]
    if FAMILIES[family].t5:
        return settings | _t5_settings(config, activation)
    settings |= {
        "encoder_layers": config.encoder_layers,
        "decoder_layers": config.decoder_layers,
        "num_hidden_layers": config.encoder_layers,
        "encoder_attention_heads": config.heads,
        "decoder_attention_heads": config.decoder_heads or config.heads,
        "encoder_ffn_dim": config.d_ff,
        "decoder_ffn_dim": config.decoder_d_ff or config.d_ff,
        "activation_function": activation,
        "dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        "activation_dropout": config.activation_dropout,
        "scale_embedding": config.embedding_scale,
        "max_position_embeddings": config.max_positions,
    }
    if family == "marian":
        settings |= {
            "vocab_size": config.source_vocabulary or config.vocabulary,
            "decoder_vocab_size": config.vocabulary,
            "share_encoder_decoder_embeddings": config.tie in ("all", "input"),
            "tie_word_embeddings": config.tie in ("all", "target"),
        }
    return settings


def _t5_settings(config: Config, activation: str) -> dict[str, Any]:
    kind = "gelu" if activation == "gelu_new" and config.gated else activation
    return {
        "d_ff": config.d_ff,
        "d_kv": config.side("encoder")[2],
        "num_heads": config.heads,
        "num_layers": config.encoder_layers,
        "num_decoder_layers": config.decoder_layers,
        "feed_forward_proj": f"gated-{kind}" if config.gated else kind,
        "layer_norm_epsilon": config.epsilon,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_distance,
        "scale_decoder_outputs": config.output_scale != 1.0,
        "dropout_rate": config.dropout,
    }


def _tensors(
    family: str,
    fields: Mapping[str, Any],
    config: Config,
    named: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """All tensors by their names; a bias that is absent is 0."""
    kind = FAMILIES[family]
    tie = {
        name: getattr(config, name)
        for name in ("tie", "vocabulary", "source_vocabulary")
    }
    theirs = Config(**fields, **tie)
    shapes = flatten(nnx.state(abstract_model(theirs), nnx.Param))
    tensors = {}
    for ours, name, how in places(kind, theirs):
        x = named.get(ours)
        x = np.zeros(shapes[ours].shape, np.float32) if x is None else x
        tensors[name] = KINDS[how].save(x)
    if family == "pegasus":  # Its class does not compute them when it loads.
        rows = np.array(sinusoids(jnp.arange(config.max_positions), config.d_model))
        tensors |= dict.fromkeys(
            (name for name in unused(kind) if name.endswith("embed_positions.weight")),
            rows,
        )
    return tensors | _tables(family, config, named)


def _tables(
    family: str, config: Config, named: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The token tables under the names that the class has for what is tied."""
    prefix = FAMILIES[family].prefix
    target = named["target_embedding.table"]
    source = named.get("source_embedding.table", target)
    output = named.get("output.table", target)
    shared, encoder, decoder = (
        f"{prefix}{name}.weight"
        for name in ("shared", "encoder.embed_tokens", "decoder.embed_tokens")
    )
    if config.tie == "all":
        return {shared: target}
    tables = {encoder: source, decoder: target}
    if family != "marian" or config.tie == "input":
        tables[shared] = target
    if family != "marian" or config.tie != "target":
        tables["lm_head.weight"] = output
    return tables
