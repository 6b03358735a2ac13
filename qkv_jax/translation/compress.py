"""A model in, a cheaper model out: what `qkv-jax compress` and `qkv-jax prune` do."""

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
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
    open_heads,
    writing_heads,
)
from qkv_jax.data import Pair
from qkv_jax.interop import new_directory
from qkv_jax.models import seq2seq
from qkv_jax.translation.config import LanguageConfig
from qkv_jax.translation.loss import module_loss
from qkv_jax.translation.models import FLOAT, model_graph
from qkv_jax.translation.start import (
    NO_LANGUAGES,
    Checkpoint,
    Start,
    check_prunable,
    is_run,
    load_start,
    quantised,
    read_run,
    save_compressed,
)

# Which heads stayed, beside a pruned model; and what they were chosen by.
PRUNED = "pruned.json"
IMPORTANCE = "importance: slope of a sentence's loss"
IN_LAYER = "importance in its layer"
GATES = "norm of output weights"
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
    check_prunable(config, model, heads=what.heads > 0 or what.gates)
    ids: dict[str, Any] = {
        "start": start.tokenizer.start,
        "eos": start.tokenizer.eos,
    }

    def loss(module: Any, batch: Any) -> jax.Array:
        return module_loss(module, batch, None, 0.0, **ids)[0]

    batches = []
    if what.measured:
        pairs = _pairs(model) if pairs is None else pairs
        batches = _batches(start, pairs[:SENTENCES])
    module = nnx.merge(model_graph(config), start.params)
    try:
        config, places = _fewer_layers(module, config, what, batches, loss)
        graph, params = nnx.split(module, nnx.Param)
        scores = importance(
            graph, params, batches, loss, norm_in_layer=what.norm_in_layer
        )
        config, kept = _narrower(module, config, what, scores)
    except ValueError as error:
        raise training.RunError(f"{model}: {error}") from error
    params = nnx.state(module, nnx.Param)
    start = start._replace(model=config, params=params)
    heads = {
        _original(name, places): {"values": values.tolist(), "kept": stay.tolist()}
        for name, (values, stay) in kept.items()
    }
    measure = IN_LAYER if what.norm_in_layer else IMPORTANCE
    content = {"measure": GATES if what.gates else measure, "heads": heads}
    write(start, out, made_of=model, languages=languages, beside={PRUNED: content})
    return start._replace(pretrained=None)


def kept_heads(directory: str | Path) -> tuple[str, dict[str, dict[str, list[Any]]]]:
    """Which heads of a model stayed when it was pruned.

    Args:
        directory: that `prune_model` wrote.

    Returns:
        What the numbers measure; and of each attention layer of the model before, but for those
        that went whole, the "values" (K,) of its key heads, and which of them were "kept".

    Raises:
        RunError: it holds no such record, or a damaged one.
    """
    file = Path(directory) / PRUNED
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return content["measure"], content["heads"]
    except FileNotFoundError:
        raise training.RunError(
            f"{directory} has no {PRUNED}: name a directory that `qkv-jax prune` wrote."
        ) from None
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise training.RunError(f"{file} is damaged ({error}): prune anew.") from error


def _original(name: str, places: Mapping[str, Sequence[int]]) -> str:
    """The name that a layer had before others went."""
    side, index, part = name.split(".")
    return f"{side}.{places[side][int(index)]}.{part}"


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
) -> tuple[seq2seq.Config, dict[str, list[int]]]:
    """Removes layers; what is left, and the places that it had."""
    counts = None if config.heads_by_layer is None else list(config.heads_by_layer)
    names = config.attention_names
    places = {
        side: list(range(getattr(config, f"{side}_layers")))
        for side in ("encoder", "decoder")
    }
    for side in ("encoder", "decoder"):
        count = getattr(what, f"{side}_layers")
        if count is None:
            continue
        places[side] = keep_layers(module, side, count, batches, loss)
        stay = {f"{side}.{i}." for i in places[side]}
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
    return config, places


def _narrower(
    module: Any,
    config: seq2seq.Config,
    what: Pruning,
    scores: dict[str, np.ndarray],
) -> tuple[seq2seq.Config, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Removes heads and units; what is left, and of each attention layer its heads' scores and
    those that stayed."""
    changes: dict[str, Any] = {}
    if what.feed_forward:
        units = {n: x for n, x in scores.items() if n.endswith("feed_forward")}
        kept = choose(units, what.feed_forward, even=True)
        keep_units(module, kept)
        changes["d_ff"] = len(kept["encoder.0.feed_forward"])
        if config.decoder_d_ff is not None:
            changes["decoder_d_ff"] = len(kept["decoder.0.feed_forward"])
    marks = writing_heads(module) if what.gates else scores
    heads = {name: marks[name] for name in config.attention_names if name in marks}
    kept = {name: np.arange(len(x)) for name, x in heads.items()}
    if what.heads or what.gates:
        chosen = open_heads(heads) if what.gates else None
        kept = chosen or choose(heads, what.heads, even=what.even_heads)
        keep_units(module, kept)
        changes |= _heads(config, {name: len(x) for name, x in kept.items()})
    found = {name: (x, kept[name]) for name, x in heads.items()}
    return dataclasses.replace(config, **changes), found


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
    beside: Mapping[str, Any] | None = None,
) -> None:
    """Writes a model's directory; of a run, with its configuration, which knows its corpus.

    beside: JSON-able content of further files by name.
    """
    with new_directory(out) as building:
        save_compressed(start, languages, building)
        for name, content in (beside or {}).items():
            (building / name).write_text(json.dumps(content), encoding="utf-8")
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
