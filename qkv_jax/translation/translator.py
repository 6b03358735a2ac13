"""A trained model, or several together, that translate text and score translations."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from qkv_jax.compression import Quantisation
from qkv_jax.data import (
    EncodedPairs,
    Pair,
    SentenceTokenizer,
    Shape,
    encode_pairs,
    encode_sources,
    eval_batches,
    source_batches,
)
from qkv_jax.decoding import Hypotheses, minimum_bayes_risk
from qkv_jax.models import seq2seq
from qkv_jax.ops.axes import shares
from qkv_jax.training import (
    auto_mesh,
    batch_shares,
    make_mesh,
    place_batch,
    place_state,
    stop_point,
)
from qkv_jax.training.distributed import fetch
from qkv_jax.translation import search
from qkv_jax.translation.alignment import Alignment, align, side_by_side
from qkv_jax.translation.attention import PairAttention, pair_attention
from qkv_jax.translation.config import DecodingConfig, check_kv_cache
from qkv_jax.translation.models import FLOAT, ModelConfig, model_graph
from qkv_jax.translation.overlong import split_text
from qkv_jax.translation.rows import (
    SHORTEST_ROW,
    checksum,
    filled,
    phrase_rows,
    row_lengths,
)


class Translation(NamedTuple):
    """One hypothesis.

    Attributes:
        text: the translation.
        score: log-probability over the length penalty; comparable within one sentence. Of a
            source that was translated in parts, the mean of theirs.
        alignment: where it was asked for: which words look at which.
    """

    text: str
    score: float
    alignment: Alignment | None = None


class PairScore(NamedTuple):
    """What a model gives to a translation.

    Attributes:
        score: log-probability over the length penalty, as of a `Translation`.
        log_prob: natural logarithm of the target's probability, EOS included.
        tokens: of the target, EOS included.
    """

    score: float
    log_prob: float
    tokens: int


class Wishes(NamedTuple):
    """What the translations of one call have to hold, and must not.

    Attributes:
        prefixes: of each sentence, the text that its translation begins with; None: any.
        phrases: of each sentence, texts that its translation holds; None: any.
        banned: texts that no translation holds.
    """

    prefixes: Sequence[str] | None = None
    phrases: Sequence[Sequence[str]] | None = None
    banned: Sequence[str] = ()


class Translator:
    """Translates sentences in batches of few shapes, each compiled once."""

    def __init__(
        self,
        config: ModelConfig,
        params: Any,
        tokenizer: SentenceTokenizer,
        *,
        decoding: DecodingConfig,
        mesh: Mesh | None = None,
        others: Sequence["Translator"] = (),
        quantisation: Quantisation = FLOAT,
    ):
        """Takes a model's parts.

        Args:
            config: of the model.
            params: the `nnx.Param` state of the model.
            tokenizer: of the model.
            decoding: how to search.
            mesh: devices that share the rows; None: all.
            others: models that decide with it, by the mean of their log-probabilities.
            quantisation: of the params.

        Raises:
            ValueError: another model has another tokeniser; the mesh shares out the axes of
                integers; a recurrent model is to have a cache of int8.
        """
        self.config, self.tokenizer = config, tokenizer
        self.mesh = auto_mesh(make_mesh() if mesh is None else mesh)
        for other in others:
            if other.tokenizer.digest != tokenizer.digest:
                raise ValueError(
                    "models that translate together need the same tokeniser, and theirs differ."
                )
        if quantisation.weights and shares(self.mesh, "heads") > 1:
            raise ValueError(
                'quantised weights lie whole on each device: give a mesh whose axis "tensor" is 1.'
            )
        configs = [config, *(other.config for other in others)]
        check_kv_cache(decoding, *configs)
        self.params: tuple[Any, ...] = (
            place_state(params, self.mesh),
            *(part for other in others for part in other.params),
        )
        self.graphs: tuple[nnx.GraphDef, ...] = (
            model_graph(config, quantisation),
            *(graph for other in others for graph in other.graphs),
        )
        self.decoding = _within(decoding, configs)
        self.lengths = row_lengths(self.decoding.max_source)
        self.ids = search.Ids(
            tokenizer.start, tokenizer.eos, tokenizer.pad, tokenizer.never
        )
        # Shapes (rows, tokens) of the batches so far, each of which is a compilation.
        self.shapes: set[tuple[int, ...]] = set()

    def __call__(
        self,
        sentences: Sequence[str],
        *,
        n_best: int = 1,
        align: bool = False,
        wishes: Wishes | None = None,
    ) -> list[list[Translation]]:
        """The n best translations of each sentence, best first; or n samples, as drawn.

        A blank sentence has one empty translation, and so has one longer than
        `decoding.max_source` that is refused. Where none fulfils the wishes within `max_length`,
        there is an empty one of score -inf.

        Args:
            sentences: any number, of any length.
            n_best: at most as many as `decoding` finds.
            align: whether to say which words look at which; takes one more pass.
            wishes: what the translations have to hold, and must not; None: anything.

        Raises:
            ValueError: n_best is not in 1 .. beams, or samples; wishes are not one a sentence.
        """
        wishes = wishes or Wishes()
        found = self.decoding.found
        if not 1 <= n_best <= found:
            kind = "samples" if self.decoding.samples else "beams"
            raise ValueError(f"n_best must be in 1 .. {kind} = {found}; got {n_best}.")
        for name, given in (("prefixes", wishes.prefixes), ("phrases", wishes.phrases)):
            if given is not None and len(given) != len(sentences):
                raise ValueError(
                    f"{name} must be one a sentence, {len(sentences)}; got {len(given)}."
                )
        results: list[list[Translation]] = [[Translation("", 0.0)] for _ in sentences]
        pieces = [self._parts(text) for text in sentences]
        owners = [i for i, parts in enumerate(pieces) for _ in parts]
        texts = [part for parts in pieces for part in parts]
        done = self._translate(texts, owners, n_best, align, wishes)
        for i, parts in enumerate(pieces):
            own = [done.pop(0) for _ in parts]
            if own:
                results[i] = own[0] if len(own) == 1 else _join(own)
        return results

    def too_long(self, sentences: Sequence[str]) -> int:
        """How many of the sentences are longer than `decoding.max_source`."""
        encoded = encode_sources(list(sentences), self.tokenizer)
        return int((encoded.lengths > self.lengths[-1]).sum())

    def score(self, pairs: Sequence[Pair]) -> list[PairScore]:
        """What the model gives to the target of each (source, target), as it scores its own.

        A source or target past `decoding.max_source` or `max_length` tokens is cut.
        """
        return self.score_encoded(encode_pairs(pairs, self.tokenizer))

    def score_encoded(self, encoded: EncodedPairs) -> list[PairScore]:
        """`score` of tokens."""
        results = [PairScore(0.0, 0.0, 0)] * len(encoded.source)
        for indices, batch in self._pair_batches(encoded):
            stop_point()
            prefix = self._prefix_rows([()] * len(indices))
            if prefix is not None:
                batch = batch | {"prefix": prefix}
            placed = place_batch(batch, self.mesh)
            with jax.set_mesh(self.mesh):
                found = fetch(
                    search.score(
                        self.params,
                        placed["source"],
                        placed["target"],
                        placed.get("prefix"),
                        graphs=self.graphs,
                        ids=self.ids,
                        decoding=self.decoding,
                    )
                )
            for row, index in enumerate(indices):
                if index >= 0:
                    results[index] = PairScore(
                        float(found.scores[row]),
                        float(found.log_probs[row]),
                        int(found.lengths[row]),
                    )
        return results

    def search(
        self,
        source: np.ndarray,
        *,
        prefix: np.ndarray | None = None,
        phrases: np.ndarray | None = None,
        banned: tuple[tuple[int, ...], ...] = (),
    ) -> Hypotheses:
        """Hypotheses of source tokens (B, S) int32, on the devices.

        Args:
            source: (B, S) int32.
            prefix: (B, P) int32, what each target begins with; None: the tokeniser's prefix.
            phrases: (B, C, L) int32, what each target holds.
            banned: sequences of ids that no target holds.
        """
        if prefix is None:
            prefix = self._prefix_rows([()] * len(source))
        arrays = {"source": source, "prefix": prefix, "phrases": phrases}
        given = {name: x for name, x in arrays.items() if x is not None}
        rng = None
        if self.decoding.samples:
            rng = jax.random.key(self.decoding.seed)
            # The noise of a sentence depends on nothing but what it is.
            given["row_ids"] = np.array([checksum(row, self.ids.pad) for row in source])
        placed = place_batch(given, self.mesh)
        self.shapes.add(tuple(n for x in given.values() for n in x.shape))
        with jax.set_mesh(self.mesh):
            return search.search(
                self.params,
                placed["source"],
                placed.get("prefix"),
                placed.get("phrases"),
                rng,
                placed.get("row_ids"),
                graphs=self.graphs,
                ids=self.ids,
                decoding=dataclasses.replace(self.decoding, seed=0),
                banned=banned,
                longest=self.decoding.max_length,
            )

    def attention(
        self, source: str, *, layer: str | None = None
    ) -> tuple[np.ndarray, list[str], list[str]]:
        """What the model looks at while it translates a sentence; of several, the first.

        Args:
            source: the sentence.
            layer: a name of `Model.attention_layers`; None: the last decoder layer's cross
                attention.

        Returns:
            Weights (N, T, S) float32, and the pieces of the source (S) and of what asks (T):
            of the translation, or of the source for an encoder layer.
        """
        layer = layer or self.config.cross_layers[-1]
        found = self.watch(source, layers=[layer])
        asks, seen = found.sides(layer)
        return found.weights[layer], seen.pieces, asks.pieces

    def watch(
        self, source: str, *, layers: Sequence[str] | None = None
    ) -> PairAttention:
        """What the layers look at, all by default, while a sentence is translated."""
        encoded = encode_sources([source], self.tokenizer)
        width = min(int(encoded.lengths[0]), self.lengths[-1])
        source_ids = encoded.rows(np.zeros(1, int), width)
        found = fetch(self.search(np.repeat(source_ids, batch_shares(self.mesh), 0)))
        target_ids = found.tokens[:1, 0, : found.lengths[0, 0]]
        (_, watched), *_ = self._watched(
            np.zeros(1, int), source_ids, target_ids, layers
        )
        return watched

    def watch_pairs(
        self, pairs: Sequence[Pair], *, layers: Sequence[str] | None = None
    ) -> Iterator[tuple[int, PairAttention]]:
        """What the layers look at, all by default, where each target is what is predicted.

        Comes with its index in pairs, in another order. Long sides are cut as by `score`.
        """
        for indices, batch in self._pair_batches(encode_pairs(pairs, self.tokenizer)):
            stop_point()
            yield from self._watched(indices, batch["source"], batch["target"], layers)

    @property
    def attention_layers(self) -> list[str]:
        """Names of the model's attention layers."""
        return list(nnx.merge(self.graphs[0], self.params[0]).attention_layers())

    def _watched(
        self,
        indices: np.ndarray,
        source: np.ndarray,
        target: np.ndarray,
        layers: Sequence[str] | None,
    ) -> Iterator[tuple[int, PairAttention]]:
        """Of the rows of a batch, those in use."""
        names = tuple(self.attention_layers if layers is None else layers)
        found = search.attention(
            self.params[0],
            source,
            target,
            graph=self.graphs[0],
            start=self.ids.start,
            layers=names,
        )
        weights = {name: np.asarray(found[name], np.float32) for name in names}
        for row in np.flatnonzero(indices >= 0):
            own = {name: x[row] for name, x in weights.items()}
            pair = pair_attention(self.tokenizer, source[row], target[row], own)
            yield int(indices[row]), pair

    def _parts(self, text: str) -> list[str]:
        """What of a sentence is translated: all of it, its parts, or nothing."""
        if not text.strip():
            return []
        if self.decoding.overlong == "truncate" or not self.too_long([text]):
            return [text]
        if self.decoding.overlong == "refuse":
            return []

        def length(part: str) -> int:
            return len(self.tokenizer.encode_source([part])[0])

        parts = split_text(text, length, self.lengths[-1])
        return [part for part in parts if part.strip()]

    def _translate(
        self,
        texts: list[str],
        owners: list[int],
        n_best: int,
        with_alignment: bool,
        wishes: Wishes,
    ) -> list[list[Translation]]:
        """Of each text; owners are the sentences they are parts of."""
        results: list[list[Translation]] = [[] for _ in texts]
        first = [i == 0 or owners[i - 1] != owner for i, owner in enumerate(owners)]
        # Wishes are for a sentence; of its parts, the first fulfils them.
        prefixes = [
            self._content(wishes.prefixes[owner]) if wishes.prefixes and begins else ()
            for owner, begins in zip(owners, first)
        ]
        phrases = [
            [self._content(text) for text in wishes.phrases[owner]]
            if wishes.phrases and begins
            else []
            for owner, begins in zip(owners, first)
        ]
        banned = tuple(self._content(text) for text in wishes.banned)
        for indices, source in self._source_batches(texts):
            stop_point()
            rows = [i if i >= 0 else None for i in indices]
            found = fetch(
                self.search(
                    source,
                    prefix=self._prefix_rows(
                        [() if i is None else prefixes[i] for i in rows]
                    ),
                    phrases=phrase_rows(
                        [[] if i is None else phrases[i] for i in rows]
                    ),
                    banned=banned,
                )
            )
            for row, index in enumerate(indices):
                if index >= 0:
                    results[index] = self._texts(found, row, n_best)
            if with_alignment:
                self._align(source, found, indices, results)
        return results

    def _source_batches(self, texts: list[str]):
        encoded = encode_sources(texts, self.tokenizer)
        # A power of two where sentences are few, so that calls of many sizes share shapes.
        rows = min(self.decoding.batch_rows, 1 << max(0, len(texts) - 1).bit_length())
        return source_batches(
            encoded, self.lengths, rows=rows, rows_multiple=batch_shares(self.mesh)
        )

    def _pair_batches(self, pairs: EncodedPairs):
        longest = (self.lengths[-1], self.decoding.max_length)
        lengths = row_lengths(max(longest))
        shapes = [Shape(*(min(n, most) for most in longest)) for n in lengths]
        return eval_batches(
            pairs,
            shapes,
            target_tokens=self.decoding.batch_rows * SHORTEST_ROW,
            rows_multiple=batch_shares(self.mesh),
        )

    def _content(self, text: str) -> tuple[int, ...]:
        """The ids of a target's text, without what every target begins and ends with."""
        (ids,) = self.tokenizer.encode_target([text])
        return tuple(ids[len(self.tokenizer.prefix) : -1])

    def _prefix_rows(self, prefixes: Sequence[Sequence[int]]) -> np.ndarray | None:
        """(B, P) ids that targets begin with, the tokeniser's first; None: none has any."""
        rows = [[*self.tokenizer.prefix, *prefix] for prefix in prefixes]
        width = max(map(len, rows), default=0)
        if not width:
            return None
        if width > len(self.tokenizer.prefix):  # Few shapes.
            width = 1 << (width - 1).bit_length()
        return filled(rows, width)

    def _texts(self, found: Hypotheses, row: int, n_best: int) -> list[Translation]:
        exist = [z for z, x in enumerate(found.scores[row]) if np.isfinite(x)]
        if not self.decoding.minimum_risk:
            exist = exist[:n_best]
        ids = [found.tokens[row, z, : found.lengths[row, z]].tolist() for z in exist]
        # Bytes can spell a line break, which would shift a file of translations.
        texts = [" ".join(text.splitlines()) for text in self.tokenizer.decode(ids)]
        scores = [float(found.scores[row, z]) for z in exist]
        if self.decoding.minimum_risk and texts:
            risks = minimum_bayes_risk(texts)
            order = [int(i) for i in risks.order[:n_best]]
            return [Translation(texts[i], float(risks.utilities[i])) for i in order]
        found_none = [Translation("", -math.inf)]
        return [Translation(*pair) for pair in zip(texts, scores)] or found_none

    def _align(
        self,
        source: np.ndarray,
        found: Hypotheses,
        indices: np.ndarray,
        results: list[list[Translation]],
    ) -> None:
        """Adds alignments to the translations of a batch, one rank after the other."""
        layer = self.config.cross_layers[-2:][0]
        for rank in range(max(len(results[i]) for i in indices if i >= 0)):
            used = np.array([i if rank < len(results[i]) else -1 for i in indices])
            target = np.asarray(found.tokens[:, rank])
            for index, watched in self._watched(used, source, target, [layer]):
                results[index][rank] = results[index][rank]._replace(
                    alignment=align(
                        watched.weights[layer], watched.source.text, watched.target.text
                    )
                )


def _join(parts: Sequence[Sequence[Translation]]) -> list[Translation]:
    """Translations of a text from those of its parts, rank by rank."""
    joined = []
    for ranks in zip(*parts):
        alignments = [rank.alignment for rank in ranks if rank.alignment is not None]
        joined.append(
            Translation(
                " ".join(rank.text for rank in ranks),
                float(np.mean([rank.score for rank in ranks])),
                side_by_side(alignments) if alignments else None,
            )
        )
    return joined


def _within(decoding: DecodingConfig, configs: Sequence[ModelConfig]) -> DecodingConfig:
    """No longer than positions are known for."""
    transformers = [c for c in configs if isinstance(c, seq2seq.Config)]
    known = [c.max_positions for c in transformers if c.positions == "learned"]
    return dataclasses.replace(
        decoding,
        max_source=min([decoding.max_source, *known]),
        max_length=min([decoding.max_length, *known]),
    )
