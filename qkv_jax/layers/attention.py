"""Multi-head attention as a module: four projections around one attention op."""

import jax
import jax.numpy as jnp
from flax import nnx

from qkv_jax.ops import (
    Ancestry,
    ContextMethod,
    KVCache,
    Mask,
    Score,
    attention_weights,
    mesh_attention,
)
from qkv_jax.ops.axes import shares

Array = jax.Array


class MultiHeadAttention(nnx.Module):
    """Self-, cross- and cached attention with N query heads and K key/value heads.

    Set `record` to True and the last call's weights stay in `weights`, (B, N, T, S) float32;
    while it is False, no weights are computed.
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_size: int | None = None,
        scale: float | None = None,
        bias: bool = True,
        dropout_rate: float = 0.0,
        context: ContextMethod = "auto",
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Builds the projections.

        Args:
            d_model: D, width of inputs and outputs.
            heads: N.
            kv_heads: K, divides N (grouped queries); default N.
            head_size: H; default D // N, for which N divides D.
            scale: multiplies the scores; default H ** -0.5.
            bias: whether the projections add one.
            dropout_rate: on the attention weights.
            context: how the lengths of whole sequences are shared out, on a mesh whose axis
                "context" is larger than 1; see `context_parallel_attention`.
            dtype: of the computation; parameters are float32.
            rngs: stream "params" draws the parameters (Glorot uniform).
        """
        kv_heads = heads if kv_heads is None else kv_heads
        if (head_size is None and d_model % heads) or heads % kv_heads:
            raise ValueError(
                "heads must divide d_model, and kv_heads must divide heads; got "
                f"d_model = {d_model}, heads = {heads}, kv_heads = {kv_heads}."
            )
        size = d_model // heads if head_size is None else head_size

        def project(count: int, name: str) -> nnx.LinearGeneral:
            return nnx.LinearGeneral(
                d_model,
                (count, size),
                use_bias=bias,
                dtype=dtype,
                kernel_init=nnx.initializers.xavier_uniform(),
                kernel_metadata={"axes": ("embed", name, "head_dim")},
                bias_metadata={"axes": (name, "head_dim")},
                rngs=rngs,
            )

        self.query = project(heads, "heads")
        self.key = project(kv_heads, "kv_heads")
        self.value = project(kv_heads, "kv_heads")
        self.out = nnx.LinearGeneral(
            (heads, size),
            d_model,
            axis=(-2, -1),
            use_bias=bias,
            dtype=dtype,
            kernel_init=nnx.initializers.xavier_uniform(),
            kernel_metadata={"axes": ("heads", "head_dim", "embed")},
            bias_metadata={"axes": ("embed",)},
            rngs=rngs,
        )
        self.scale = scale
        self.dropout_rate = dropout_rate
        self.context: ContextMethod = context
        self.record = False

    def __call__(
        self,
        x: Array,
        memory: Array | None = None,
        *,
        mask: Mask | None = None,
        score: Score | None = None,
        rng: Array | None = None,
    ) -> Array:
        """Attends from x (B, T, D) to memory (B, S, D), or to x itself: (B, T, D).

        Args:
            x: (B, T, D), what asks.
            memory: (B, S, D), what is looked at; None: x.
            mask: who may attend, over (B, N, T, S).
            score: a rule on the scores.
            rng: draws the weights' dropout; None: no dropout.
        """
        if memory is None:
            query, key, value = _products([self.query, self.key, self.value], x)
        else:
            (query,) = _products([self.query], x)
            key, value = _products([self.key, self.value], memory)
        self._record(query, key, mask, score)
        heads = mesh_attention(
            query,
            key,
            value,
            mask=mask,
            score=score,
            scale=self.scale,
            dropout_rate=0.0 if rng is None else self.dropout_rate,
            dropout_rng=rng,
            method=self.context,
        )
        return self.out(heads)

    def remember(self, memory: Array) -> KVCache:
        """Keys and values of memory (B, S, D), to attend to many times."""
        return KVCache.of(self.key(memory), self.value(memory))

    def attend(
        self,
        x: Array,
        remembered: KVCache,
        mask: Mask | None = None,
        score: Score | None = None,
        filled: Array | None = None,
    ) -> Array:
        """Attends from a few x (B, T, D) to keys and values at hand: (B, T, D).

        Arguments past x are those of `KVCache.attend`.
        """
        query = self.query(x)
        self._record(query, remembered.key.transpose(0, 3, 1, 2), mask, score)
        heads = remembered.attend(
            query, mask=mask, score=score, scale=self.scale, filled=filled
        )
        return self.out(heads)

    def _record(
        self, query: Array, key: Array, mask: Mask | None, score: Score | None
    ) -> None:
        if self.record:
            weights = attention_weights(
                query, key, mask=mask, score=score, scale=self.scale
            )
            self.weights = nnx.Intermediate(weights)

    def step(
        self,
        x: Array,
        cache: KVCache,
        ancestry: Ancestry,
        score: Score | None = None,
    ) -> tuple[Array, KVCache]:
        """One step of decoding: x (B, Z, D), one position of each of Z hypotheses a row."""
        at = ancestry.step * x.shape[1]
        cache = cache.write(self.key(x), self.value(x), at)
        filled = at + x.shape[1]
        return self.attend(x, cache, ancestry.mask(), score, filled), cache


def _products(layers: list[nnx.LinearGeneral], x: Array) -> list[Array]:
    """What each layer makes of x (B, T, D).

    Over a mesh axis that shares out heads, layers of one shape make it by one product, so that the
    slopes of x are summed over the devices once.
    """
    mesh = jax.sharding.get_abstract_mesh()
    shared = not mesh.empty and mesh.are_all_axes_auto and shares(mesh, "heads") > 1
    if not shared or len({layer.kernel.shape for layer in layers}) > 1:
        return [layer(x) for layer in layers]
    dtype = layers[0].dtype
    kernels = jnp.stack([layer.kernel[...] for layer in layers], axis=1)
    y = jnp.einsum("BTD,DINH->BTINH", x.astype(dtype), kernels.astype(dtype))
    biases = [layer.bias[...] for layer in layers if layer.bias is not None]
    if biases:
        y = y + jnp.stack(biases).astype(dtype)[None, None]
    return [y[:, :, i] for i in range(len(layers))]
