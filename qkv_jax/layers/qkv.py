"""The textbook layer: one head, three linear maps, softmax(Q K^T / sqrt(d_k)) V."""

import jax
import jax.numpy as jnp
from flax import nnx

from qkv_jax.layers.linear import Linear
from qkv_jax.ops import Mask, Score, dot_product_attention

Array = jax.Array


class QKVAttention(nnx.Module):
    """Q, K and V at work: what attention is, before heads, residuals and normalisation.

    >>> layer = QKVAttention(512, 64, 64, rngs=nnx.Rngs(0))
    >>> query = jnp.ones((1, 10, 512))  # ten positions ask
    >>> key = value = jnp.ones((1, 20, 512))  # twenty are looked at
    >>> layer(query, key, value).shape
    (1, 10, 64)

    A well-known piece of teaching code for this layer goes wrong in three ways. It takes the softmax
    of the scores (B, T, S) over axis 1, the queries, where each query's weights over the keys,
    the last axis, must sum to 1. It leaves out the scale 1 / sqrt(d_k), without which the softmax
    saturates as d_k grows. And its example has 20 keys and 30 values, which no weights can fit:
    each value belongs to a key. The right form, in full:

    >>> q, k, v = layer.query(query), layer.key(key), layer.value(value)
    >>> scores = jnp.einsum("BTH,BSH->BTS", q, k) / 64**0.5
    >>> weights = jax.nn.softmax(scores, axis=-1)
    >>> out = jnp.einsum("BTS,BSE->BTE", weights, v)
    >>> bool(jnp.allclose(out, layer(query, key, value), atol=1e-5))
    True

    Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.2.1.
    """

    def __init__(
        self,
        d_model: int,
        d_key: int,
        d_value: int,
        *,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Builds the three maps, without biases.

        Args:
            d_model: D, width of query, key and value inputs.
            d_key: H, width of the projected queries and keys.
            d_value: E, width of the projected values and of the output.
            dtype: of the computation; parameters are float32.
            rngs: stream "params" draws the parameters (Glorot uniform).
        """

        def project(width: int) -> nnx.Linear:
            return Linear(
                d_model,
                width,
                use_bias=False,
                dtype=dtype,
                kernel_init=nnx.initializers.xavier_uniform(),
                kernel_metadata={"axes": ("embed", "head_dim")},
                rngs=rngs,
            )

        self.query = project(d_key)
        self.key = project(d_key)
        self.value = project(d_value)

    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        *,
        mask: Mask | Array | None = None,
        score: Score | None = None,
    ) -> Array:
        """Attends from query (B, T, D) to key and value (B, S, D): (B, T, E).

        Args:
            query: (B, T, D), what asks.
            key: (B, S, D), what is asked.
            value: (B, S, D), what is answered; as many as keys.
            mask: who may attend, over (B, 1, T, S).
            score: a rule on the scores.

        Raises:
            ValueError: key and value have different lengths.
        """
        if key.shape[1] != value.shape[1]:
            raise ValueError(
                "key and value must have one length S, since each value belongs to a key; got "
                f"{key.shape[1]} keys {key.shape} and {value.shape[1]} values {value.shape}."
            )
        q, k, v = self.query(query), self.key(key), self.value(value)
        heads = (x[:, :, None] for x in (q, k, v))
        return dot_product_attention(*heads, mask=mask, score=score)[:, :, 0]
