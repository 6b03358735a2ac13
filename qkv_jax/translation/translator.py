"""A trained model that translates text."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from qkv_jax.data import BOS, EOS, PAD, UNK, Tokenizer, encode_sentences, source_batches
from qkv_jax.decoding import Hypotheses, beam_search
from qkv_jax.models import seq2seq
from qkv_jax.training import (
    auto_mesh,
    batch_shares,
    make_mesh,
    place_batch,
    place_state,
)
from qkv_jax.training.distributed import fetch
from qkv_jax.translation.config import DecodingConfig

EXTRA_LENGTH = 10
SHORTEST_ROW = 16


class Translation(NamedTuple):
    """One hypothesis.

    Attributes:
        text: the translation.
        score: log-probability over the length penalty; comparable within one sentence.
    """

    text: str
    score: float


class Translator:
    """Translates sentences in batches of few shapes, each compiled once."""

    def __init__(
        self,
        config: seq2seq.Config,
        params: Any,
        tokenizer: Tokenizer,
        *,
        decoding: DecodingConfig,
        mesh: Mesh | None = None,
    ):
        """Takes a model's parts.

        Args:
            config: of the model.
            params: the `nnx.Param` state of `seq2seq.Model(config)`.
            tokenizer: of both languages.
            decoding: how to search.
            mesh: devices that share the rows; None: all.
        """
        self.config, self.tokenizer, self.decoding = config, tokenizer, decoding
        self.mesh = auto_mesh(make_mesh() if mesh is None else mesh)
        self.params = place_state(params, self.mesh)
        self.graph = model_graph(config)
        self.lengths = _row_lengths(decoding.max_source)

    def __call__(
        self, sentences: Sequence[str], *, n_best: int = 1
    ) -> list[list[Translation]]:
        """The n best translations of each sentence, best first.

        A blank sentence has one empty translation; one longer than `decoding.max_source` is cut.

        Raises:
            ValueError: n_best is not in 1 .. beams.
        """
        if not 1 <= n_best <= self.decoding.beams:
            raise ValueError(
                f"n_best must be in 1 .. beams = {self.decoding.beams}; got {n_best}."
            )
        results: list[list[Translation]] = [[Translation("", 0.0)] for _ in sentences]
        places = [i for i, text in enumerate(sentences) if text.strip()]
        encoded = encode_sentences([sentences[i] for i in places], self.tokenizer)
        # A power of two where sentences are few, so that calls of many sizes share shapes.
        rows = min(self.decoding.batch_rows, 1 << max(0, len(places) - 1).bit_length())
        batches = source_batches(
            encoded,
            self.lengths,
            rows=rows,
            rows_multiple=batch_shares(self.mesh),
        )
        for indices, source in batches:
            found = fetch(self.search(source))
            for row, index in enumerate(indices):
                if index >= 0:
                    results[places[index]] = self._texts(found, row, n_best)
        return results

    def too_long(self, sentences: Sequence[str]) -> int:
        """How many of the sentences are cut before they are translated."""
        encoded = encode_sentences(list(sentences), self.tokenizer)
        return int((encoded.lengths > self.lengths[-1]).sum())

    def search(self, source: np.ndarray) -> Hypotheses:
        """Hypotheses of source tokens (B, S) int32, on the devices."""
        source = place_batch({"source": source}, self.mesh)["source"]
        with jax.set_mesh(self.mesh):
            return _search(
                self.params, source, graph=self.graph, decoding=self.decoding
            )

    def attention(
        self, source: str, *, layer: str | None = None
    ) -> tuple[np.ndarray, list[str], list[str]]:
        """What the model looks at while it translates a sentence.

        Args:
            source: the sentence.
            layer: a name of `Model.attention_layers`; None: the last decoder layer's cross
                attention.

        Returns:
            Weights (N, T, S) float32, and the pieces of the source (S) and of what asks (T):
            of the translation, or of the source for an encoder layer.
        """
        (ids,) = self.tokenizer.encode([source])
        source_ids = np.array([[*ids, EOS]], np.int32)
        found = fetch(self.search(np.repeat(source_ids, batch_shares(self.mesh), 0)))
        target_ids = found.tokens[0, 0, : found.lengths[0, 0]]
        model = nnx.merge(self.graph, self.params)
        layer = layer or f"decoder.{self.config.decoder_layers - 1}.cross"
        shifted = np.array([[BOS, *target_ids[:-1]]], np.int32)
        weights = model.attention(source_ids, shifted, [layer])[layer]
        encoder, cross = layer.startswith("encoder"), layer.endswith("cross")
        looked_at = source_ids[0] if encoder or cross else shifted[0]
        asks = source_ids[0] if encoder else target_ids
        return np.asarray(weights)[0], self._pieces(looked_at), self._pieces(asks)

    @property
    def attention_layers(self) -> list[str]:
        """Names of the model's attention layers."""
        return list(nnx.merge(self.graph, self.params).attention_layers())

    def _pieces(self, ids: np.ndarray) -> list[str]:
        return self.tokenizer.pieces([int(i) for i in ids])

    def _texts(self, found: Hypotheses, row: int, n_best: int) -> list[Translation]:
        exist = [z for z in range(n_best) if np.isfinite(found.scores[row, z])]
        texts = self.tokenizer.decode([found.tokens[row, z].tolist() for z in exist])
        # Bytes can spell a line break, which would shift a file of translations.
        return [
            Translation(" ".join(text.splitlines()), float(found.scores[row, z]))
            for text, z in zip(texts, exist)
        ]


@functools.cache
def model_graph(config: seq2seq.Config) -> nnx.GraphDef:
    """The static half of the model; its parameters are not made."""
    model = nnx.eval_shape(lambda: seq2seq.Model(config, rngs=nnx.Rngs(0)))
    return nnx.split(model, nnx.Param)[0]


@functools.partial(jax.jit, static_argnames=("graph", "decoding"))
def _search(
    params: Any, source: jax.Array, *, graph, decoding: DecodingConfig
) -> Hypotheses:
    model = nnx.merge(graph, params)
    rows, width = source.shape
    steps = min(decoding.max_length, 2 * width + EXTRA_LENGTH)
    memory, lengths = model.encode(source)
    cache = model.init_cache(memory, lengths, hypotheses=decoding.beams, steps=steps)
    limit = jax.numpy.minimum(2 * lengths + EXTRA_LENGTH, steps)
    return beam_search(
        model.decode_step,
        cache,
        batch_size=rows,
        beams=decoding.beams,
        bos=BOS,
        eos=EOS,
        pad=PAD,
        max_length=steps,
        limit=jax.numpy.where(lengths > 0, limit, 0),
        forbidden=(UNK,),
        length_penalty=decoding.penalty,
        exact=decoding.exact,
    )


def _row_lengths(longest: int) -> list[int]:
    """Row lengths that double, up to the longest."""
    lengths, length = [], SHORTEST_ROW
    while length < longest:
        lengths.append(length)
        length *= 2
    return [*lengths, longest]
