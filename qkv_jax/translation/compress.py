"""A model in, a cheaper model out: what `qkv-jax compress` and `qkv-jax prune` do."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qkv_jax import data, training
from qkv_jax.compression import (
    Pruning,
    Quantisation,
    choose,
    importance,
    keep_layers,
    keep_units,
)
from qkv_jax.data import Pair
from qkv_jax.interop import new_directory
from qkv_jax.models import seq2seq
from qkv_jax.translation.config import LanguageConfig
from qkv_jax.translation.models import FLOAT, model_graph
from qkv_jax.translation.run import module_loss
from qkv_jax.translation.start import (
    NO_LANGUAGES,
    Checkpoint,
    Start,
    is_run,
    load_start,
    quantised,
    read_run,
    save_compressed,
)

# Of what importance is measured on.
SENTENCES = 1024
BATCH_TOKENS = 2048
BUCKETS = 2


def compress_model(
    model: str | Path,
    out: str | Path,
    how: Quantisation,
    *,
    checkpoint: Checkpoint | None = None,
    languages: LanguageConfig = NO_LANGUAGES,
) -> Start:
    """Writes a model with quantised weights, which `load_start` loads, and returns it.

    Args:
        model: directory of a run, or of an imported, published or pruned model, or a hub name.
        out: a new or empty directory.
        how: weights None: they are written as they are, without what training needs.
        checkpoint: of a run.
        languages: of a published model for several.

    Raises:
        InteropError, RunError: there is no such model, it cannot be quantised, or the directory
            is not free; nothing is written.
    """
    start = transformer(model, checkpoint=checkpoint, languages=languages)
    if start.quantisation not in (FLOAT, how) and how != FLOAT:
        raise training.RunError(
            f"{model} is quantised already, or trained to be, with "
            f"{_shown(start.quantisation)}: give the same options, or compress the model that it "
            "was made of."
        )
    start = start.in_float() if how == FLOAT else quantised(start, how)
    write(start, out, made_of=model, languages=languages)
    return start


def prune_model(
    model: str | Path,
    out: str | Path,
    what: Pruning,
    *,
    pairs: Sequence[Pair] | None = None,
    checkpoint: Checkpoint | None = None,
    languages: LanguageConfig = NO_LANGUAGES,
) -> Start:
    """Writes a smaller model, in float, to be trained on, quantised or exported; and returns it.

    Layers are removed first, then heads and units of those that stay.

    Args:
        model, out, checkpoint, languages: see `compress_model`.
        what: is removed.
        pairs: that importance is measured on, the first `SENTENCES` of them; None: validation
            pairs of the run.

    Raises:
        InteropError, RunError: as `compress_model`; or the model does not have what is removed.
    """
    start = transformer(model, checkpoint=checkpoint, languages=languages).in_float()
    config: Any = start.model
    _check_prunable(config, what, model)
    batches = _batches(start, (_pairs(model) if pairs is None else pairs)[:SENTENCES])
    ids = {"start": start.tokenizer.start, "eos": start.tokenizer.eos}

    def loss(module: Any, batch: Any) -> jax.Array:
        return module_loss(module, batch, None, 0.0, **ids)[0]

    module = nnx.merge(model_graph(config), start.params)
    try:
        config = _fewer_layers(module, config, what, batches, loss)
        graph, params = nnx.split(module, nnx.Param)
        scores = importance(graph, params, batches, loss)
        config = _narrower(module, config, what, scores)
    except ValueError as error:
        raise training.RunError(f"{model}: {error}") from error
    params = nnx.state(module, nnx.Param)
    start = start._replace(model=config, params=params)
    write(start, out, made_of=model, languages=languages)
    return start._replace(pretrained=None)


def _check_prunable(config: seq2seq.Config, what: Pruning, model: str | Path) -> None:
    kinds = {config.encoder_attention.name, config.decoder_attention.name}
    if kinds != {seq2seq.Config().encoder_attention.name}:
        raise training.RunError(
            f"{model} has self-attention of the kinds {', '.join(sorted(kinds))}, whose own "
            "parameters belong to heads and places of layers: only plain attention is pruned."
        )
    if what.heads and config.positions == "relative":
        raise training.RunError(
            f"{model} has relative positions, whose biases all layers of a side share, a column a "
            "head: prune feed_forward or layers."
        )


def _pairs(model: str | Path) -> list[Pair]:
    if not is_run(model):
        raise training.RunError(
            f"{model} is no run, which has a corpus: give --source and --reference."
        )
    corpus = read_run(model).data.load()
    return corpus.valid or corpus.train


def _batches(start: Start, pairs: Sequence[Pair]) -> list[dict[str, jax.Array]]:
    encoded = data.encode_pairs(pairs, start.tokenizer)
    buckets = data.choose_buckets(
        encoded.source.lengths,
        encoded.target.lengths,
        count=BUCKETS,
        max_source=start.decoding.max_source,
        max_target=start.decoding.max_length,
    )
    found = data.eval_batches(encoded, buckets, target_tokens=BATCH_TOKENS)
    return [
        {name: jnp.asarray(batch[name]) for name in ("source", "target")}
        for _, batch in found
    ]


def _fewer_layers(
    module: Any, config: seq2seq.Config, what: Pruning, batches: Any, loss: Any
) -> seq2seq.Config:
    counts = None if config.heads_by_layer is None else list(config.heads_by_layer)
    names = config.attention_names
    for side in ("encoder", "decoder"):
        count = getattr(what, f"{side}_layers")
        if count is None:
            continue
        kept = keep_layers(module, side, count, batches, loss)
        stay = {f"{side}.{i}." for i in kept}
        if counts is not None:
            pairs = [
                (n, c)
                for n, c in zip(names, counts)
                if not n.startswith(side) or any(n.startswith(x) for x in stay)
            ]
            names, counts = [n for n, _ in pairs], [c for _, c in pairs]
        config = dataclasses.replace(
            config,
            heads_by_layer=None if counts is None else tuple(counts),
            **{f"{side}_layers": count},
        )
    return config


def _narrower(
    module: Any,
    config: seq2seq.Config,
    what: Pruning,
    scores: dict[str, np.ndarray],
) -> seq2seq.Config:
    """Removes heads and units, and says what is left."""
    changes: dict[str, Any] = {}
    if what.feed_forward:
        units = {n: x for n, x in scores.items() if n.endswith("feed_forward")}
        kept = choose(units, what.feed_forward, even=True)
        keep_units(module, kept)
        changes["d_ff"] = len(kept["encoder.0.feed_forward"])
        if config.decoder_d_ff is not None:
            changes["decoder_d_ff"] = len(kept["decoder.0.feed_forward"])
    if what.heads:
        heads = {name: scores[name] for name in config.attention_names}
        kept = choose(heads, what.heads, even=what.even_heads)
        keep_units(module, kept)
        changes |= _heads(config, {name: len(x) for name, x in kept.items()})
    return dataclasses.replace(config, **changes)


def _heads(config: seq2seq.Config, kept: dict[str, int]) -> dict[str, Any]:
    """Fields of the configuration with so many key heads in each attention layer."""
    sides = {"encoder": config.side("encoder"), "decoder": config.side("decoder")}
    groups = {
        side: heads // kv_heads for side, (heads, kv_heads, _, _) in sides.items()
    }
    sizes = {size for _, _, size, _ in sides.values()}
    if len(sizes) > 1:
        raise ValueError(
            "heads of the two sides have different sizes: prune feed_forward or layers."
        )
    counts = {name: n * groups[name.split(".")[0]] for name, n in kept.items()}
    of = {s: {n for name, n in counts.items() if name.startswith(s)} for s in sides}
    changes: dict[str, Any] = {"head_size": sizes.pop()}
    even = all(len(numbers) == 1 for numbers in of.values())
    if not even or (config.kv_heads and len(set(kept.values())) > 1):
        uneven = {"heads_by_layer": tuple(counts.values()), "scan_layers": False}
        return changes | uneven
    heads, decoder_heads = (of[side].pop() for side in sides)
    return changes | {
        "heads": heads,
        "decoder_heads": None if decoder_heads == heads else decoder_heads,
        "kv_heads": config.kv_heads and next(iter(kept.values())),
        "heads_by_layer": None,
    }


def transformer(model: str | Path, **options: Any) -> Start:
    """A model that can be compressed; options as for `load_start`.

    Raises:
        RunError: it is a recurrent one.
    """
    start = load_start(model, **options)
    if not isinstance(start.model, seq2seq.Config):
        raise training.RunError(
            f"{model} is a recurrent model, and only Transformers are compressed: its cells "
            "multiply by their weights themselves, not through layers that can be replaced."
        )
    return start


def write(
    start: Start,
    out: str | Path,
    *,
    made_of: str | Path,
    languages: LanguageConfig,
) -> None:
    """Writes a model's directory; of a run, with its configuration, which knows its corpus."""
    with new_directory(out) as building:
        save_compressed(start, languages, building)
        if is_run(made_of):
            name = training.runs.CONFIG_FILE
            shutil.copy(Path(made_of) / name, building / name)
            # It is not for `train` to go on with.
            training.finish_run(building, {"made_of": Path(made_of).name})


def _shown(how: Quantisation) -> str:
    return ", ".join(f"{k} {v}" for k, v in vars(how).items() if v is not None)


def disk_bytes(directory: str | Path) -> int:
    """Bytes of all files of a directory."""
    return sum(x.stat().st_size for x in Path(directory).rglob("*") if x.is_file())
