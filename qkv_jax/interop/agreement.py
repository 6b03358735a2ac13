"""Whether an exported model computes what ours does."""

import functools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qkv_jax.decoding import beam_search, power
from qkv_jax.interop.ctranslate2 import (
    Vocabularies,
    never_emitted,
    open_translator,
    read_vocabularies,
)
from qkv_jax.interop.trained import Weights
from qkv_jax.models.seq2seq import Model

EXTRA_LENGTH = 10
ROWS = 16
MULTIPLE = 8
# So many finished hypotheses that a search is not ended by their number.
PATIENCE = 1000.0
Ids = Sequence[int]


@dataclass(frozen=True)
class Agreement:
    """How far an exported model and ours agree.

    Attributes:
        tokens: target tokens whose log-probabilities were compared.
        max_difference: the largest difference of two log-probabilities.
        largest: the largest of ours, by its size.
        sentences: whose beam outputs were compared.
        equal: of them, with the same tokens.
    """

    tokens: int
    max_difference: float
    largest: float
    sentences: int
    equal: int

    def __str__(self) -> str:
        share = self.equal / max(1, self.sentences)
        return (
            f"log-probabilities of {self.tokens:,} tokens differ by at most "
            f"{self.max_difference:.2g}; {self.equal:,} of {self.sentences:,} beam outputs "
            f"({share:.1%}) are equal"
        )


class Found(NamedTuple):
    """Translations without EOS, and their scores."""

    tokens: list[list[int]]
    scores: list[float]


def verify(
    model: Weights,
    directory: str | os.PathLike,
    sources: Sequence[Ids],
    *,
    targets: Sequence[Ids] | None = None,
    beams: int = 4,
    alpha: float = 1.0,
    forbidden: Iterable[int] = (),
) -> Agreement:
    """Compares a model with what `export_ctranslate2` wrote of it.

    Both searches run to the same end: until no better hypothesis is possible. Ours leaves out
    what is never emitted before probabilities are taken, as the exported model does.

    Args:
        model: that was exported.
        directory: of CTranslate2.
        sources: ids as the encoder takes them, EOS included; none of EOS alone, for which
            CTranslate2 has no translation.
        targets: ids that are scored, without EOS; None: our translations.
        beams: Z.
        alpha: of the length penalty `power(alpha)`.
        forbidden: as at the export.

    Raises:
        InteropError: ctranslate2 is missing, or it refuses the directory.
        ValueError: there is no source, or not a target for each.
    """
    if not sources or len(targets or sources) != len(sources):
        raise ValueError(
            f"sources must not be empty, and have a target each; got {len(sources)} sources "
            f"and {len(targets or ())} targets."
        )
    translator, vocabularies = open_translator(directory), read_vocabularies(directory)
    never = tuple(sorted(never_emitted(model, forbidden)))
    ours = translate_ours(model, sources, beams=beams, alpha=alpha, never=never)
    theirs = translate_theirs(
        translator, vocabularies, model, sources, beams=beams, alpha=alpha
    )
    equal = sum(a == b for a, b in zip(ours.tokens, theirs.tokens))
    # The forced first token is scored by no one.
    targets = ours.tokens if targets is None else targets
    wanted = score_ours(model, sources, targets, never=never)
    found = score_theirs(translator, vocabularies, sources, targets)
    differences = [np.abs(a - b).max() for a, b in zip(wanted, found)]
    return Agreement(
        tokens=sum(map(len, wanted)),
        max_difference=float(max(differences)),
        largest=float(max(np.abs(one).max() for one in wanted)),
        sentences=len(sources),
        equal=equal,
    )


def translate_ours(
    model: Weights,
    sources: Sequence[Ids],
    *,
    beams: int,
    alpha: float,
    never: tuple[int, ...] = (),
) -> Found:
    """The best hypothesis of each source, of at most 10 tokens more than twice its length."""
    graph, _ = nnx.split(model.model(), nnx.Param)
    result = Found([], [])
    for start in range(0, len(sources), ROWS):
        rows = _pad(sources[start : start + ROWS], model.config.pad, rows=ROWS)
        found = _search(
            model.params,
            rows,
            graph=graph,
            ids=(model.start, model.eos, model.first),
            never=never,
            beams=beams,
            alpha=alpha,
        )
        for row in range(min(ROWS, len(sources) - start)):
            tokens = np.asarray(found.tokens[row, 0])[: int(found.lengths[row, 0])]
            ended = len(tokens) and tokens[-1] == model.eos
            result.tokens.append(tokens[:-1].tolist() if ended else tokens.tolist())
            result.scores.append(float(found.scores[row, 0]))
    return result


def translate_theirs(
    translator: Any,
    vocabularies: Vocabularies,
    model: Weights,
    sources: Sequence[Ids],
    *,
    beams: int,
    alpha: float,
) -> Found:
    """The same by CTranslate2."""
    ids = {piece: i for i, piece in enumerate(vocabularies.target)}
    prefix = None if model.first is None else [[vocabularies.target[model.first]]]
    result = Found([], [])
    for source in sources:
        # One by one: the longest length is of a whole batch.
        (found,) = translator.translate_batch(
            [[vocabularies.source[i] for i in source]],
            target_prefix=prefix,
            beam_size=beams,
            patience=PATIENCE if beams > 1 else 1,
            length_penalty=alpha,
            max_decoding_length=2 * len(source) + EXTRA_LENGTH,
            min_decoding_length=0,
            max_input_length=0,
            return_scores=True,
        )
        result.tokens.append([ids[piece] for piece in found.hypotheses[0]])
        result.scores.append(found.scores[0])
    return result


def score_ours(
    model: Weights,
    sources: Sequence[Ids],
    targets: Sequence[Ids],
    *,
    never: tuple[int, ...] = (),
) -> list[np.ndarray]:
    """The log-probability of every token of each target and of the EOS after it."""
    graph, _ = nnx.split(model.model(), nnx.Param)
    result: list[np.ndarray] = []
    for start in range(0, len(sources), ROWS):
        some = slice(start, start + ROWS)
        ended = [[*target, model.eos] for target in targets[some]]
        labels = _pad(ended, model.config.pad, rows=ROWS)
        before = np.pad(labels[:, :-1], ((0, 0), (1, 0)), constant_values=model.start)
        source = _pad(sources[some], model.config.pad, rows=ROWS)
        scores = _score(model.params, source, before, labels, graph=graph, never=never)
        result += [row[: len(x)] for row, x in zip(np.asarray(scores), ended)]
    return result


def score_theirs(
    translator: Any,
    vocabularies: Vocabularies,
    sources: Sequence[Ids],
    targets: Sequence[Ids],
) -> list[np.ndarray]:
    """The same by CTranslate2."""
    found = translator.score_batch(
        [[vocabularies.source[i] for i in source] for source in sources],
        [[vocabularies.target[i] for i in target] for target in targets],
        max_batch_size=ROWS,
        max_input_length=0,
    )
    return [np.array(one.log_probs, np.float32) for one in found]


@functools.partial(jax.jit, static_argnames=("graph", "ids", "never", "beams", "alpha"))
def _search(params, source, *, graph, ids, never, beams, alpha):
    model: Model = nnx.merge(graph, params)
    (start, eos, first), pad = ids, model.config.pad
    rows, width = source.shape
    steps = 2 * width + EXTRA_LENGTH
    memory, lengths = model.encode(source)
    cache = model.init_cache(memory, lengths, hypotheses=beams, steps=steps)

    def step(tokens, cache):
        logits, cache = model.decode_step(tokens, cache)
        return _without(logits, never), cache

    return beam_search(
        step,
        cache,
        batch_size=rows,
        beams=beams,
        bos=start,
        eos=eos,
        pad=pad,
        max_length=steps,
        limit=jnp.where(lengths > 0, 2 * lengths + EXTRA_LENGTH, 0),
        length_penalty=power(alpha),
        prefix=None if first is None else jnp.full((rows, 1), first),
        end_at_limit=False,
    )


@functools.partial(jax.jit, static_argnames=("graph", "never"))
def _score(params, source, before, labels, *, graph, never):
    logits = _without(nnx.merge(graph, params)(source, before), never)
    scores = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return jnp.take_along_axis(scores, labels[..., None], axis=-1)[..., 0]


def _without(logits: jax.Array, never: tuple[int, ...]) -> jax.Array:
    return logits.at[..., jnp.array(never, jnp.int32)].set(-jnp.inf)


def _pad(sequences: Sequence[Ids], pad: int, *, rows: int) -> np.ndarray:
    """(rows, S) int32, S a multiple of 8, so that few shapes are compiled."""
    longest = max(map(len, sequences))
    width = -(-longest // MULTIPLE) * MULTIPLE
    filled = np.full((rows, width), pad, np.int32)
    for row, ids in zip(filled, sequences):
        row[: len(ids)] = ids
    return filled
