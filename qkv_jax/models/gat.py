"""Graph attention networks for the nodes of a graph: GAT and GATv2, along arcs or dense."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from qkv_jax.ops import (
    dot_product_attention,
    dropout,
    gat_attention,
    gatv2_attention,
    masks,
    scores,
    split_rng,
)

Array = jax.Array
Attention = Literal["gat", "gatv2"]
Form = Literal["arcs", "dense"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes and choices of the model; those of the paper's experiments on citation graphs.

    Attributes:
        features: C, of a node; 0: the data's.
        classes: V, of a node; 0: the data's.
        attention: "gat" (Velickovic et al. 2018) or "gatv2" (Brody et al. 2022).
        heads, head_size: N and H of every layer but the last; their outputs are concatenated.
        output_heads: of the last layer, whose outputs, of the classes' size, are averaged.
        layers: of attention.
        form: "arcs", which costs O(A), or "dense": `dot_product_attention` under a mask, O(P^2)
            time; equal where no arc is listed twice and nothing is dropped out.
        share: of "gatv2": whether a node's projection is the same when it asks and when it is
            looked at. In "gat" it always is.
        negative_slope: of the leaky ReLU in the scores.
        dropout: on each layer's input.
        attention_dropout: on the attention's weights.
        l2: times half the sum of the squared weights is added to the mean loss in training;
            biases are left out.
    """

    features: int = 0
    classes: int = 0
    attention: Attention = "gat"
    heads: int = 8
    head_size: int = 8
    output_heads: int = 1
    layers: int = 2
    form: Form = "arcs"
    share: bool = False
    negative_slope: float = 0.2
    dropout: float = 0.6
    attention_dropout: float = 0.6
    l2: float = 5e-4

    def __post_init__(self):
        for name, choices in (
            ("attention", ("gat", "gatv2")),
            ("form", ("arcs", "dense")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {list(choices)}; got {getattr(self, name)!r}."
                )
        for name in ("heads", "head_size", "output_heads", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}.")
        for name in ("dropout", "attention_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(
                    f"{name} must be in [0, 1); got {getattr(self, name)}."
                )
        if self.l2 < 0.0:
            raise ValueError(f"l2 must not be negative; got {self.l2}.")
        if self.share and self.attention == "gat":
            raise ValueError(
                "share is of attention='gatv2': 'gat' has one projection anyway."
            )


class GraphAttention(nnx.Module):
    """One layer: projections, attention along the arcs, and a bias on each head's output."""

    def __init__(
        self, inputs: int, heads: int, size: int, *, config: Config, rngs: nnx.Rngs
    ):
        """Draws float32 parameters from the stream "params" of rngs."""
        # One head, as of the last layer, is not split.
        axes = ("heads" if heads > 1 else None, "head_dim")
        init = nnx.initializers.xavier_uniform()

        def project() -> nnx.LinearGeneral:
            return nnx.LinearGeneral(
                inputs,
                (heads, size),
                use_bias=False,
                kernel_init=init,
                kernel_metadata={"axes": (None, *axes)},
                rngs=rngs,
            )

        def vector() -> nnx.Param:
            # As a map from H values to one score, for each head.
            drawn = init(rngs.params(), (heads, size, 1), jnp.float32)[..., 0]
            return nnx.Param(drawn, axes=axes)

        v2 = config.attention == "gatv2"
        self.source = project()
        self.target = project() if v2 and not config.share else None
        self.a = vector()
        self.a_source = None if v2 else vector()
        self.bias = nnx.Param(jnp.zeros((heads, size)), axes=axes)
        self.config = config

    def __call__(
        self, x: Array, receivers: Array, senders: Array, *, rng: Array | None = None
    ) -> Array:
        """Nodes (P, C) -> (P, N, H); rng draws the dropout of inputs and weights, None: none.

        Source: Velickovic et al. 2018, arXiv 1710.10903, section 2.1. Difference: their code drops
        inputs out anew for each head, and the projected values once more.
        """
        rngs = split_rng(rng, 2)
        x = dropout(x, self.config.dropout, rngs[0])
        source = self.source(x)
        target = source if self.target is None else self.target(x)
        vectors = [self.a[...]]
        vectors += [] if self.a_source is None else [self.a_source[...]]
        attend = ATTENTION[self.config.attention, self.config.form]
        heads = attend(
            target,
            source,
            *vectors,
            receivers=receivers,
            senders=senders,
            negative_slope=self.config.negative_slope,
            dropout_rate=0.0 if rng is None else self.config.attention_dropout,
            dropout_rng=rngs[1],
        )
        return heads + self.bias[...][None]


class Model(nnx.Module):
    """features (P, C) and arcs (A,) of a graph -> logits of its nodes (P, V)."""

    unit = "nodes"

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        """Draws float32 parameters from the stream "params" of rngs."""
        for name in ("features", "classes"):
            if getattr(config, name) < 1:
                raise ValueError(
                    f"{name} must be positive; got {getattr(config, name)}."
                )
        self.config = config
        width = config.heads * config.head_size
        inputs = [config.features] + [width] * (config.layers - 1)
        hidden = (config.heads, config.head_size)
        sizes = [hidden] * (config.layers - 1) + [(config.output_heads, config.classes)]
        self.layers = nnx.List(
            GraphAttention(count, *size, config=config, rngs=rngs)
            for count, size in zip(inputs, sizes)
        )

    def __call__(
        self,
        features: Array,
        receivers: Array,
        senders: Array,
        *,
        rng: Array | None = None,
    ) -> Array:
        """Logits (P, V) of the nodes of one graph.

        Args:
            features: (P, C) floating.
            receivers, senders: (A,) int32, see `qkv_jax.ops.graph`; -1: no arc.
            rng: draws every dropout; None: no dropout.
        """
        x, rngs = features, split_rng(rng, len(self.layers))
        for layer, layer_rng in zip(self.layers[:-1], rngs[:-1]):
            heads = layer(x, receivers, senders, rng=layer_rng)
            x = jax.nn.elu(heads).reshape(len(x), -1)
        return self.layers[-1](x, receivers, senders, rng=rngs[-1]).mean(axis=1)

    def loss(self, batch: dict[str, Array], *, rng: Array | None):
        """Cross-entropy summed over the nodes that count, and the sums to report.

        Args:
            batch: features (B, P, C), receivers and senders (B, A), labels and counted (B, P), of
                B graphs; weight (B,).
            rng: draws every dropout, and adds the L2 term; None: neither.
        """
        logits = self._graphs(batch, rng)
        real = batch["counted"] * batch["weight"][:, None]
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        correct = logits.argmax(-1) == batch["labels"]
        nodes = jnp.sum(real)
        nll = jnp.sum(nll * real)
        total = nll if rng is None else nll + nodes * self.config.l2 * self._squares()
        return total, {
            "loss_sum": total,
            "nll_sum": nll,
            "accuracy_sum": jnp.sum(correct * real),
            "tokens": nodes,
        }

    def predict(self, batch: dict[str, Array]) -> dict[str, Array]:
        """logits (B, P, V) of all nodes."""
        return {"logits": self._graphs(batch, None)}

    def _graphs(self, batch: dict[str, Array], rng: Array | None) -> Array:
        arrays = [batch[name] for name in ("features", "receivers", "senders")]
        if rng is None:
            return jax.vmap(self)(*arrays)
        rngs = jax.random.split(rng, len(arrays[0]))
        return jax.vmap(lambda *graph, one: self(*graph, rng=one))(*arrays, one=rngs)

    def _squares(self) -> Array:
        """Half the sum of all squared weights, without the biases."""
        weights = [
            part
            for layer in self.layers
            for part in (layer.source.kernel, layer.a, layer.a_source)
            if part is not None
        ]
        weights += [layer.target.kernel for layer in self.layers if layer.target]
        squares = [jnp.sum(jnp.square(part[...])) for part in weights]
        return 0.5 * jnp.sum(jnp.stack(squares))


def dense_gat_attention(
    target: Array,
    source: Array,
    a_target: Array,
    a_source: Array,
    *,
    receivers: Array,
    senders: Array,
    negative_slope: float = 0.2,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
) -> Array:
    """`gat_attention` as a score rule of `dot_product_attention`, under the graph as a mask.

    Arguments and what comes back are as there; but an arc that is listed twice counts once, and
    dropout draws another pattern.
    """
    asked, seen = (
        jnp.sum(target * a_target[None], -1),
        jnp.sum(source * a_source[None], -1),
    )
    rule = scores.modifier(_gat_rule, asked, seen, jnp.float32(negative_slope))
    return _dense(rule, target, source, receivers, senders, dropout_rate, dropout_rng)


def dense_gatv2_attention(
    target: Array,
    source: Array,
    a: Array,
    *,
    receivers: Array,
    senders: Array,
    negative_slope: float = 0.2,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
) -> Array:
    """`gatv2_attention` in the dense form, see `dense_gat_attention`."""
    rule = scores.modifier(_gatv2_rule, target, source, a, jnp.float32(negative_slope))
    return _dense(rule, target, source, receivers, senders, dropout_rate, dropout_rng)


def _gat_rule(score, b, h, q, k, asked, seen, slope):
    del score, b
    return jax.nn.leaky_relu(asked[q, h] + seen[k, h], slope)


def _gatv2_rule(score, b, h, q, k, target, source, a, slope):
    del score, b
    pair = jax.nn.leaky_relu(target[q, h] + source[k, h], slope)
    return jnp.sum(a[h] * pair, -1)


def _dense(rule, target, source, receivers, senders, rate, rng) -> Array:
    P, S = len(target), len(source)
    there = (receivers >= 0) & (senders >= 0)
    # What is out of range is dropped by a scatter; a negative index would count from the end.
    at = jnp.where(there, receivers, P), jnp.where(there, senders, S)
    arcs = jnp.zeros((P, S), bool).at[at].set(True)
    out = dot_product_attention(
        jnp.zeros_like(target)[None],
        jnp.zeros_like(source)[None],
        source[None],
        mask=masks.dense(arcs[None, None]),
        score=rule,
        dropout_rate=rate,
        dropout_rng=rng,
    )
    return out[0]


ATTENTION: dict[tuple[Attention, Form], Any] = {
    ("gat", "arcs"): gat_attention,
    ("gatv2", "arcs"): gatv2_attention,
    ("gat", "dense"): dense_gat_attention,
    ("gatv2", "dense"): dense_gatv2_attention,
}
