"""Search, scores and attention of one batch, compiled once for each of its shapes."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from qkv_jax.decoding import (
    Constraints,
    EnsembleCache,
    Hypotheses,
    TargetScores,
    average_log_probs,
    beam_search,
    ensemble,
    sample,
    score_targets,
)
from qkv_jax.translation.config import DecodingConfig

Array = jax.Array
EXTRA_LENGTH = 10


class Ids(NamedTuple):
    """The ids of a tokeniser that a search has to know."""

    start: int
    eos: int
    pad: int
    never: tuple[int, ...]


@functools.partial(
    jax.jit, static_argnames=("graphs", "ids", "decoding", "banned", "longest")
)
def search(
    params: tuple[Any, ...],
    source: Array,
    prefix: Array | None,
    phrases: Array | None,
    rng: Array | None,
    row_ids: Array | None,
    *,
    graphs: tuple[nnx.GraphDef, ...],
    ids: Ids,
    decoding: DecodingConfig,
    banned: tuple[tuple[int, ...], ...],
    longest: int,
) -> Hypotheses:
    """Hypotheses of source tokens (B, S) by one model, or by several together.

    Args:
        params: of each model.
        source: (B, S) int32; a row of padding gets no hypothesis.
        prefix: (B, P) int32, what each target begins with, negative for any; None: nothing.
        phrases: (B, C, L) int32, what each target has to hold; None: nothing.
        rng, row_ids: of samples.
        graphs: of each model.
        ids: of the tokeniser.
        decoding: how to search.
        banned: sequences of ids that no target may hold.
        longest: tokens of the longest target.
    """
    models = [nnx.merge(graph, part) for graph, part in zip(graphs, params)]
    forced = 0 if prefix is None else prefix.shape[1]
    steps = min(longest, 2 * source.shape[1] + EXTRA_LENGTH + forced)
    hypotheses = decoding.samples or decoding.beams
    room: dict[str, Any] = {"hypotheses": hypotheses, "steps": steps}
    if decoding.kv_cache == "int8":
        room["dtype"] = jnp.int8
    caches = [model.init_cache(*model.encode(source), **room) for model in models]
    lengths = jnp.sum(source != ids.pad, axis=1, dtype=jnp.int32)
    limit = jnp.minimum(2 * lengths + EXTRA_LENGTH + forced, steps)
    step, cache = models[0].decode_step, caches[0]
    if len(models) > 1:
        step = ensemble([model.decode_step for model in models])
        cache = EnsembleCache(tuple(caches))
    options: dict[str, Any] = {
        "batch_size": source.shape[0],
        "bos": ids.start,
        "eos": ids.eos,
        "pad": ids.pad,
        "max_length": steps,
        "limit": jnp.where(lengths > 0, limit, 0),
        "forbidden": tuple(i for i in ids.never if i != ids.eos),
        "length_penalty": decoding.penalty,
        "prefix": prefix,
        "phrases": phrases,
        "constraints": Constraints(
            min_length=decoding.min_length,
            no_repeat_ngram=decoding.no_repeat_ngram,
            repetition_penalty=decoding.repetition_penalty,
            banned_phrases=banned,
        ),
    }
    if decoding.samples:
        return sample(
            step,
            cache,
            rng=jax.random.key(0) if rng is None else rng,
            row_ids=row_ids,
            samples=decoding.samples,
            temperature=decoding.temperature,
            top_k=decoding.top_k,
            top_p=decoding.top_p,
            typical=decoding.typical,
            **options,
        )
    return beam_search(
        step, cache, beams=decoding.beams, exact=decoding.exact, **options
    )


@functools.partial(jax.jit, static_argnames=("graphs", "ids", "decoding"))
def score(
    params: tuple[Any, ...],
    source: Array,
    target: Array,
    prefix: Array | None,
    *,
    graphs: tuple[nnx.GraphDef, ...],
    ids: Ids,
    decoding: DecodingConfig,
) -> TargetScores:
    """Teacher-forced scores of targets (B, T), EOS included, given sources (B, S)."""
    shifted = shift(target, ids.start)
    logits = [
        nnx.merge(graph, part)(source, shifted) for graph, part in zip(graphs, params)
    ]
    return score_targets(
        logits[0] if len(logits) == 1 else average_log_probs(logits),
        target,
        pad=ids.pad,
        prefix=prefix,
        length_penalty=decoding.penalty,
    )


@functools.partial(jax.jit, static_argnames=("graph", "start", "layers"))
def attention(
    params: Any,
    source: Array,
    target: Array,
    *,
    graph: nnx.GraphDef,
    start: int,
    layers: tuple[str, ...],
) -> dict[str, Array]:
    """Weights (B, N, T, S) of layers for sources (B, S) and targets (B, T)."""
    model = nnx.merge(graph, params)
    return model.attention(source, shift(target, start), layers)


def shift(target: Array, start: int) -> Array:
    """What the decoder is given for targets (B, T): the start, and all tokens but the last."""
    return jnp.pad(target[:, :-1], ((0, 0), (1, 0)), constant_values=start)
