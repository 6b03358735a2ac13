"""What a run has learned, as pictures, a table of its heads and a page of all of them."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from matplotlib.figure import Figure

from qkv_jax import training, viz
from qkv_jax.data import Pair
from qkv_jax.data.conllu import Tree
from qkv_jax.translation import alignment
from qkv_jax.translation.attention import PairAttention
from qkv_jax.translation.heads import HeadSummary, summarise_heads
from qkv_jax.translation.translator import Translator

POINTS = 400
# From what share of its occurrences on a subword is of one language.
MOSTLY = 0.9


def draw_run(directory: Path, translator: Translator, pairs: Sequence[Pair]) -> None:
    """Draws curves.png, and attention.png of a sentence of middling length."""
    viz.plot_curves(directory / training.metrics.METRICS_FILE, directory / "curves.png")
    usual = min(pairs, key=lambda pair: abs(len(pair[0].split()) - 8))[0]
    layer = translator.config.cross_layers[-1]
    watched = translator.watch(usual, layers=[layer])
    draw_attention(watched, directory / "attention.png", layer=layer)


def draw_attention(watched: PairAttention, path: Path, *, layer: str) -> Figure:
    """Draws every head of a layer over the subwords of a sentence."""
    asks, seen = watched.sides(layer)
    weights = watched.weights[layer]
    return viz.plot_attention(weights, seen.pieces, asks.pieces, path, title=layer)


def draw_alignment(watched: PairAttention, path: Path, *, layer: str) -> Figure:
    """Draws which words of the source those of the target look at, by the mean of the heads."""
    source, target = watched.source.text, watched.target.text
    found = alignment.align(watched.weights[layer], source, target)
    return viz.plot_attention(
        found.weights,
        alignment.words(source),
        alignment.words(target),
        path,
        links=found.pairs,
        title=f"alignment by {layer}",
    )


def write_page(watched: PairAttention, path: Path) -> None:
    """Writes a page of every head of every layer."""
    layers = {}
    for name, weights in watched.weights.items():
        asks, seen = watched.sides(name)
        layers[name] = viz.Heads(weights, asks.pieces, seen.pieces)
    source, target = (
        " ".join(alignment.words(side.text))
        for side in (watched.source, watched.target)
    )
    viz.write_page(layers, path, title=f"{source} → {target}")


def draw_heads(heads: Sequence[HeadSummary], path: Path) -> Figure:
    """Draws the entropy of each head, with its roles."""
    return viz.plot_heads(
        _by_layer(heads, [head.normalised for head in heads]),
        path,
        label="normalised entropy",
        notes=_by_layer(heads, ["\n".join(head.roles) for head in heads]),
    )


def draw_kept(
    measure: str, heads: Mapping[str, Mapping[str, Sequence[Any]]], path: Path
) -> Figure:
    """Draws what `kept_heads` found: the measure of every head, those framed that stayed."""
    return viz.plot_heads(
        {name: found["values"] for name, found in heads.items()},
        path,
        label=measure,
        notes={
            name: ["kept" * (i in found["kept"]) for i in range(len(found["values"]))]
            for name, found in heads.items()
        },
    )


def draw_spans(
    translator: Translator, heads: Sequence[HeadSummary], path: Path
) -> Figure:
    """Draws how far each head looks; of cross-attention, from the diagonal of the pair.

    Where heads have learned spans, or alphas of entmax, they stand below.
    """
    distances = _by_layer(heads, [head.distance for head in heads])
    notes = {name: [""] * len(own) for name, own in distances.items()}
    model = nnx.merge(translator.graphs[0], translator.params[0])
    for name, layer in model.attention_layers().items():
        if hasattr(layer, "span"):
            spans = np.asarray(layer.span_share()) * layer.kind.option("longest")
            notes[name] = [f"span {span:.0f}" for span in spans]
        if hasattr(layer, "alpha"):
            alphas = np.asarray(layer.entmax_alpha())
            notes[name] = [f"alpha {alpha:.2f}" for alpha in alphas]
    return viz.plot_heads(distances, path, label="mean distance in tokens", notes=notes)


def _by_layer(
    heads: Sequence[HeadSummary], values: Iterable[Any]
) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for head, value in zip(heads, values):
        found.setdefault(head.layer, []).append(value)
    return found


def draw_embeddings(
    translator: Translator, counts: tuple[np.ndarray, np.ndarray], path: Path
) -> Figure:
    """Draws the vectors of the commonest subwords, with the language that each is of."""
    tokenizer = translator.tokenizer
    model = nnx.merge(translator.graphs[0], translator.params[0])
    tables = [np.asarray(table.weights()) for table in model.input_tables()]
    if len(tables) == 1:
        groups = {
            "source and target": (
                tables[0],
                tokenizer.target_pieces,
                counts[0] + counts[1],
            )
        }
    else:
        pieces = (tokenizer.source_pieces, tokenizer.target_pieces)
        groups = dict(zip(("source", "target"), zip(tables, pieces, counts)))
    points = {}
    for name, (table, pieces_of, count) in groups.items():
        order = np.argsort(-count, kind="stable")
        ids = order[count[order] > 0][:POINTS]
        kinds = [name] * len(ids)
        if len(tables) == 1:
            shares = counts[0][ids] / count[ids]
            kinds = [_language(share) for share in shares]
        points[name] = viz.Points(table[ids], pieces_of(ids.tolist()), kinds)
    return viz.plot_embeddings(
        points, path, title=f"the {POINTS} commonest subwords of each table"
    )


def _language(share: float) -> str:
    if share >= MOSTLY:
        return "source"
    return "target" if share <= 1 - MOSTLY else "both languages"


def count_tokens(
    translator: Translator, pairs: Sequence[Pair]
) -> tuple[np.ndarray, np.ndarray]:
    """How often each id occurs in text, special ones not counted: (V,) int of each side."""
    tokenizer = translator.tokenizer
    sides = zip(*pairs) if pairs else ((), ())
    encode = (tokenizer.encode_source, tokenizer.encode_target)
    special = (
        {tokenizer.pad, *tokenizer.source_beginning, *tokenizer.source_ending},
        {tokenizer.pad, tokenizer.eos, *tokenizer.prefix},
    )
    size = max(tokenizer.source_size, tokenizer.target_size)
    found = []
    for side, ids_of, no_text in zip(sides, encode, special):
        rows = ids_of(list(side))
        ids = np.fromiter((i for row in rows for i in row), np.int64)
        count = np.bincount(ids, minlength=size)
        count[list(no_text)] = 0
        found.append(count)
    return found[0], found[1]


def measure_heads(
    translator: Translator,
    pairs: Sequence[Pair],
    counts: tuple[np.ndarray, np.ndarray],
    trees: Sequence[Tree] = (),
) -> list[HeadSummary]:
    """What each head does in held-out pairs, and in sentences with trees, if there are any.

    Raises:
        ValueError: no pair has a token on each side.
    """
    watched = (found for _, found in translator.watch_pairs(pairs))
    encoder = [x for x in translator.attention_layers if x.startswith("encoder")]
    sentences = [(" ".join(tree.words), "") for tree in trees]
    parsed = (
        (found, trees[index])
        for index, found in translator.watch_pairs(sentences, layers=encoder)
    )
    return summarise_heads(watched, counts, parsed if encoder and trees else ())
