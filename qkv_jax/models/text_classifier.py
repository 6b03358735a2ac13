"""Classifiers of text: words -> vectors -> attention -> one vector -> class.

Three of them, told apart by `Config`: the plain pipeline, in which every word asks all words once
(`plain`); a BERT-style encoder, whose class token stands for the text (`bert`); and an encoder of
long text, whose words see a window around them and the class token, which sees all (`long`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from qkv_jax.layers import (
    AdaptiveDepth,
    AddPositions,
    AttentionKind,
    Embedding,
    EncoderBlock,
    Halted,
    Linear,
    Positions,
    QKVAttention,
    Remat,
    check_remat,
    make_norm,
    run_blocks,
)
from qkv_jax.models.classification import class_sums
from qkv_jax.ops import Mask, dropout, masks, patterns, pin, split_rng
from qkv_jax.ops.dropout import keep

Array = jax.Array
Batch = Mapping[str, Array]
Pooling = Literal["class_token", "mean", "distinct", "attention"]
PAD = 0  # The feature that stands for nothing.


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes and rates.

    Attributes:
        classes: number of classes; 0: taken from the data.
        vocabulary: number of features; 0: taken from the data.
        d_model: D.
        layers: encoder blocks; 0: one `QKVAttention` in their place, and no more.
        heads: N, of a block.
        d_ff: F, of a block.
        window: even number of words that a word sees around it, besides the class token, which sees
            and is seen by all; None: every word sees all.
        attention: the kind of attention of the blocks.
        halting: what is added to the loss a text for each application of a block to one of its tokens,
            on average: there is one block then, applied to each token until that halts, at most
            `layers` times, see `AdaptiveDepth`; None: `layers` blocks, each applied once.
        pooling: which one vector stands for the text: that of the class token; the mean over its
            tokens; the mean in which all places of a word count together as one ("distinct": of
            film reviews, which words occur tells more than how often, Pang et al. 2002,
            cs/0205070); or the mean weighted by the attention of one learned query.
        positions: whether sinusoids are added to the words' vectors.
        vector_stddev: of the entries of words' vectors, as they are drawn. Where training texts are few,
            vectors drawn small keep what a word has not been taught from counting.
        dropout: after the embedding, after every sublayer, and on the vector that is classified.
        masking: share of words that training leaves out, as if they were padding: what takes their
            place would be a word that no text to be classified has.
        smoothing: share of a label's probability that is given to all classes.
        dtype: of the computation.
        remat, scan_layers: what training keeps of each block for its backward pass, and whether the
            blocks are one loop, see `run_blocks`.
    """

    classes: int = 0
    vocabulary: int = 0
    d_model: int = 128
    layers: int = 2
    heads: int = 4
    d_ff: int = 256
    window: int | None = None
    attention: AttentionKind = field(default_factory=AttentionKind)
    halting: float | None = None
    pooling: Pooling = "class_token"
    positions: bool = True
    vector_stddev: float = 1.0
    dropout: float = 0.3
    masking: float = 0.15
    smoothing: float = 0.1
    dtype: str = "float32"
    remat: Remat = "none"
    scan_layers: bool = False

    def __post_init__(self):
        check_remat(self.remat)
        if (self.remat != "none" or self.scan_layers) and (
            self.halting is not None or not self.layers
        ):
            raise ValueError(
                "remat and scan_layers are of blocks that are applied once each; got halting = "
                f"{self.halting}, layers = {self.layers}."
            )
        if self.pooling not in get_args(Pooling):
            raise ValueError(
                f"pooling must be one of {get_args(Pooling)}; got {self.pooling!r}."
            )
        if self.halting is not None and (self.halting < 0 or not self.layers):
            raise ValueError(
                "halting must not be negative, and needs layers; got "
                f"halting = {self.halting}, layers = {self.layers}."
            )
        if self.vector_stddev <= 0:
            raise ValueError(
                f"vector_stddev must be positive; got {self.vector_stddev}."
            )
        for name in ("dropout", "masking", "smoothing"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(
                    f"{name} must be in [0, 1); got {getattr(self, name)}."
                )
        if self.window is not None and (self.window < 0 or self.window % 2):
            raise ValueError(
                f"window must be even, or None; got {self.window}: half of it is on each side."
            )
        if self.window is not None and not self.attention.takes_any_mask:
            raise ValueError(
                f"attention of the kind {self.attention.name!r} has no window: set it to None."
            )
        if not self.layers and self.attention != AttentionKind():
            raise ValueError("attention is of blocks: layers must be positive.")
        if any(not 0 <= layer < self.layers for layer in self.attention.layers or ()):
            raise ValueError(
                f"attention.layers must be of 0 .. {self.layers - 1}; got {self.attention.layers}."
            )


def plain(**changes: Any) -> Config:
    """Every word asks all words once, and the answers' mean is classified."""
    sizes: dict[str, Any] = {"layers": 0, "pooling": "mean", "dropout": 0.4}
    return Config(**(sizes | changes))


def bert(**changes: Any) -> Config:
    """Two encoder blocks, and the class token is classified (Devlin et al. 2018, 1810.04805).

    Differences: the norm stands before each sublayer, positions are sinusoids, words are sums of
    features, and nothing is trained on other text before.
    """
    return Config(**changes)


def long(**changes: Any) -> Config:
    """One block whose words see a window and the class token (Beltagy et al. 2020, 2004.05150).

    Differences: one projection for both kinds of attention, and the mean over the text is classified.
    """
    sizes: dict[str, Any] = {
        "d_model": 32,
        "layers": 1,
        "heads": 1,
        "d_ff": 64,
        "window": 64,
        "pooling": "mean",
        "positions": False,
        "vector_stddev": 0.1,
        "masking": 0.5,
    }
    return Config(**(sizes | changes))


class Model(nnx.Module):
    """Features of tokens (B, T, features) -> scores of the classes (B, V)."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        """Draws float32 parameters from the stream "params" of rngs."""
        if config.classes < 1 or config.vocabulary < 1:
            raise ValueError(
                "classes and vocabulary must be positive; got "
                f"classes = {config.classes}, vocabulary = {config.vocabulary}."
            )
        self.config = config
        D, dtype = config.d_model, jnp.dtype(config.dtype)
        rates: dict[str, Any] = {"dropout_rate": config.dropout, "dtype": dtype}
        stddev = config.vector_stddev * D**-0.5
        self.embedding = Embedding(
            config.vocabulary, D, stddev=stddev, zero=PAD, rngs=rngs
        )
        positions: Positions = "sinusoid" if config.positions else "relative"
        self.positions = AddPositions(D, positions=positions, **rates, rngs=rngs)
        self.blocks = nnx.List(
            EncoderBlock(
                D,
                attention={
                    "heads": config.heads,
                    "kind": config.attention.of_layer(i),
                    "dtype": dtype,
                },
                feed_forward={"d_ff": config.d_ff, "activation": "gelu", **rates},
                residual={"place": "pre", **rates},
                rngs=rngs,
            )
            for i in range(config.layers if config.halting is None else 1)
        )
        if config.halting is not None:
            self.depth = AdaptiveDepth(self.blocks[0], D, most=config.layers, rngs=rngs)
            self.blocks = nnx.List([])
        if not config.layers:
            self.qkv = QKVAttention(D, D, D, dtype=dtype, rngs=rngs)
        self.norm = make_norm(D, "layer", 1e-5, dtype, rngs)
        if config.pooling == "attention":
            query = nnx.initializers.normal(D**-0.5)(rngs.params(), (D,), jnp.float32)
            self.query = nnx.Param(query, axes=("embed",))
        self.classify = Linear(
            D,
            config.classes,
            dtype=dtype,
            kernel_metadata={"axes": ("embed", None)},
            bias_metadata={"axes": (None,)},
            rngs=rngs,
        )

    def __call__(self, tokens: Array, *, rng: Array | None = None) -> Array:
        """Scores of the classes, float32.

        Args:
            tokens: (B, T, features) int32, `PAD` where there is none; the first token of each text
                is the class token.
            rng: draws the dropouts; None: there is none.
        """
        return self.classes(tokens, rng=rng)[0]

    def classes(
        self, tokens: Array, *, rng: Array | None = None
    ) -> tuple[Array, Halted | None]:
        """The scores of a call, and how often the block was applied, where that is adaptive."""
        rngs = split_rng(rng, 3 + max(1, len(self.blocks)))
        places = jnp.arange(tokens.shape[1])[None]
        x = self.positions(self.vectors(tokens), places, rng=rngs[0])
        there = (tokens != PAD).any(axis=2)
        if self.config.attention.takes_any_mask:
            mask = who_sees_whom(there, self.config.window)
        else:
            mask = masks.dense(there[:, None, None, :])
        halted = None
        if self.config.halting is not None:
            halted = self.depth(x, there, mask=mask, rng=rngs[3])
            x = halted.states
        elif not self.blocks:
            x = dropout(self.qkv(x, x, x, mask=mask), self.config.dropout, rngs[1])
        x = run_blocks(
            self.blocks,
            x,
            rngs[3 : 3 + len(self.blocks)],
            lambda block, x, drawn: block(x, mask=mask, rng=drawn),
            remat=self.config.remat,
            scan=self.config.scan_layers,
        )
        pooled = self.norm(self.pool(x, tokens))
        pooled = dropout(pooled, self.config.dropout, rngs[2])
        return self.classify(pooled).astype(jnp.float32), halted

    def vectors(self, tokens: Array) -> Array:
        """The mean vector of each token's features: (B, T, features) -> (B, T, D)."""
        table = pin(self.embedding.weights(), "vocab", None)

        # One feature after the other: on a CPU the gradient of a single large lookup takes XLA
        # seven times as long. `PAD` is a row of zeros.
        def add(total: Array, feature: Array) -> tuple[Array, None]:
            return total + table[feature], None

        start = jnp.zeros((*tokens.shape[:2], table.shape[1]), table.dtype)
        total, _ = jax.lax.scan(add, start, jnp.moveaxis(tokens, 2, 0))
        count = jnp.maximum((tokens != PAD).sum(axis=2), 1)[..., None]
        return pin(total / count * table.shape[1] ** 0.5, "batch", "length")

    def pool(self, states: Array, tokens: Array) -> Array:
        """One vector for each text: states (B, T, D) of tokens (B, T, features) -> (B, D)."""
        there = (tokens != PAD).any(axis=2)
        if self.config.pooling == "class_token":
            return states[:, 0]
        scores = jnp.zeros(states.shape[:2], jnp.float32)
        if self.config.pooling == "attention":
            scores = states.astype(jnp.float32) @ self.query[...]
        if self.config.pooling == "distinct":
            scores = -jnp.log(occurrences(tokens[..., 0], self.config.vocabulary))
        weights = jax.nn.softmax(scores, axis=1, where=there)
        return jnp.einsum("BT,BTD->BD", weights.astype(states.dtype), states)

    def loss(
        self, batch: Batch, *, rng: Array | None
    ) -> tuple[Array, dict[str, Array]]:
        """Label-smoothed cross-entropy, summed over texts, and sums to report.

        Args:
            batch: tokens, as for a call; labels (B,) int32; weight (B,) float32.
            rng: draws the words that are left out, and the dropouts; None: there is neither.
        """
        tokens, labels, weight = batch["tokens"], batch["labels"], batch["weight"]
        rngs = split_rng(rng, 2)
        tokens = leave_out_words(tokens, self.config.masking, rngs[0])
        logits, halted = self.classes(tokens, rng=rngs[1])
        sums = class_sums(logits, labels, weight, smoothing=self.config.smoothing)
        if halted is not None and self.config.halting is not None:
            count = jnp.maximum((tokens != PAD).any(axis=2).sum(axis=1), 1)
            ponder, depth = (
                jnp.sum(weight * x.sum(axis=1) / count)
                for x in (halted.ponder, halted.depth)
            )
            sums["depth_sum"] = depth
            sums["loss_sum"] = sums["loss_sum"] + self.config.halting * ponder
        return sums["loss_sum"], sums

    def predict(self, batch: Batch) -> dict[str, Array]:
        """Scores of the classes, (B, V), and where it is adaptive, the depth of tokens (B, T)."""
        logits, halted = self.classes(batch["tokens"])
        return {"logits": logits} | ({} if halted is None else {"depth": halted.depth})


def who_sees_whom(there: Array, window: int | None) -> Mask:
    """Pairs of tokens that are there, (B, T): all, or those near each other or the class token's."""
    real = masks.segments(jnp.where(there, 1, 2), there.astype(jnp.int32))
    return real if window is None else real & patterns.longformer(window, [0])


def occurrences(words: Array, vocabulary: int) -> Array:
    """How often the word at each place of (B, T) occurs in its row, float32."""

    def of_row(row: Array) -> Array:
        return jnp.zeros(vocabulary, jnp.float32).at[row].add(1.0)[row]

    return jax.vmap(of_row)(words)


def leave_out_words(tokens: Array, rate: float, rng: Array | None) -> Array:
    """Tokens (B, T, features), a share of the words, but never the class token, made padding."""
    if rng is None or not rate:
        return tokens
    B, T, _ = tokens.shape
    places = jnp.arange(T)[None, :, None]
    kept = keep(rng, rate, jnp.arange(B)[:, None, None], places) | (places == 0)
    return jnp.where(kept, tokens, PAD)
