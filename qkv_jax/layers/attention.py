"""Multi-head attention as a module: four projections around one attention op."""

import jax
import jax.numpy as jnp
from flax import nnx

from qkv_jax.layers.kinds import SOFTMAX, AttentionKind, directions, whole_keys
from qkv_jax.layers.linear import LinearGeneral, finished, product
from qkv_jax.ops import (
    Ancestry,
    ContextMethod,
    KVCache,
    Mask,
    Score,
    attention_weights,
    causal_linear_attention,
    dot_product_attention,
    entmax_attention,
    linear_attention,
    mesh_attention,
    performer_attention,
    scores,
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
        kind: AttentionKind = SOFTMAX,
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
            kind: of attention, and its sizes.
            dtype: of the computation; parameters are float32.
            rngs: stream "params" draws the parameters (Glorot uniform).
        """
        if dropout_rate and not kind.drops_weights:
            raise ValueError(f"there is no dropout on the weights of {kind.name!r}.")
        kv_heads = heads if kv_heads is None else kv_heads
        if (head_size is None and d_model % heads) or heads % kv_heads:
            raise ValueError(
                "heads must divide d_model, and kv_heads must divide heads; got "
                f"d_model = {d_model}, heads = {heads}, kv_heads = {kv_heads}."
            )
        size = d_model // heads if head_size is None else head_size

        def project(count: int, name: str) -> nnx.LinearGeneral:
            return LinearGeneral(
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
        self.value = None if kind.share_key_value else project(kv_heads, "kv_heads")
        self.out = LinearGeneral(
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
        if kind.name == "linformer":
            rank, longest = kind.option("rank"), kind.option("longest")
            mixing = nnx.initializers.normal(rank**-0.5)(
                rngs.params(), (longest, rank), jnp.float32
            )
            self.mixing = nnx.Param(mixing, axes=(None, None))
        # Where each starts: alpha at 1.5, spans at half of the longest.
        if kind.name == "entmax":
            self.alpha = nnx.Param(jnp.zeros(heads), axes=("heads",))
        if kind.name == "adaptive_span":
            self.span = nnx.Param(jnp.zeros(heads), axes=("heads",))
        self.kind = kind
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
        keys = [self.key] if self.value is None else [self.key, self.value]
        if memory is None:
            query, *made = _products([self.query, *keys], x)
        else:
            (query,), made = _products([self.query], x), _products(keys, memory)
        key, value = made[0], made[-1]
        self._record(query, key, mask, score)
        return self.out(self._whole(query, key, value, mask, score, rng))

    def remember(self, memory: Array) -> KVCache:
        """Keys and values of memory (B, S, D), to attend to many times."""
        return KVCache.of(*self._key_value(memory))

    def span_share(self) -> Array:
        """Of "adaptive_span": the share of the longest span that each head looks at, (N,)."""
        return jax.nn.sigmoid(self.span[...])

    def entmax_alpha(self) -> Array:
        """Of "entmax": the learned alpha of each head, (N,), in (1, 2): 1 is the softmax."""
        return 1.0 + jax.nn.sigmoid(self.alpha[...])

    def _key_value(self, x: Array) -> tuple[Array, Array]:
        key = self.key(x)
        return key, key if self.value is None else self.value(x)

    def _own_score(self) -> Score | None:
        """What the kind does with scores."""
        if self.kind.name != "adaptive_span":
            return None
        spans = self.span_share() * self.kind.option("longest")
        return scores.adaptive_span(spans, self.kind.option("ramp"))

    def _whole(
        self,
        query: Array,
        key: Array,
        value: Array,
        mask: Mask | None,
        score: Score | None,
        rng: Array | None,
    ) -> Array:
        """The attention of whole sequences: (B, T, N, E)."""
        if not self.kind.takes_any_mask:
            return self._maskless(query, key, value, mask, score)
        mask, score = _both(self.kind.mask(), mask), _chain(score, self._own_score())
        if self.kind.name == "entmax":
            return entmax_attention(
                query,
                key,
                value,
                self.entmax_alpha(),
                mask=mask,
                score=score,
                scale=self.scale,
            )
        return mesh_attention(
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

    def _maskless(
        self,
        query: Array,
        key: Array,
        value: Array,
        mask: Mask | None,
        score: Score | None,
    ) -> Array:
        if score is not None:
            raise NotImplementedError(
                f"{self.kind.name!r} has no scores to apply a rule to."
            )
        B, S = key.shape[:2]
        causal, there = whole_keys(mask, B, S)
        if self.kind.name == "linear":
            attend = causal_linear_attention if causal else linear_attention
            return attend(query, key, value, key_mask=there)
        if self.kind.name == "performer":
            return performer_attention(
                query,
                key,
                value,
                self._directions(query),
                causal=causal,
                key_mask=there,
            )
        if causal or S > len(self.mixing[...]):
            raise NotImplementedError(
                f"'linformer' mixes at most {len(self.mixing[...])} keys, those to come too; got {S}"
                + (", and a causal mask." if causal else ".")
            )
        mixing = self.mixing[...][:S].astype(key.dtype)
        if there is not None:
            mixing = jnp.where(there[..., None], mixing, 0)
        else:
            mixing = jnp.broadcast_to(mixing, (B, *mixing.shape))
        key, value = (jnp.einsum("BSKH,BSR->BRKH", x, mixing) for x in (key, value))
        return dot_product_attention(query, key, value, scale=self.scale)

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
        self._record(query, remembered.rows()[0], mask, score)
        heads = remembered.attend(
            query, mask=mask, score=score, scale=self.scale, filled=filled
        )
        return self.out(heads)

    def _directions(self, query: Array) -> Array:
        return jnp.asarray(directions(self.kind.option("features"), query.shape[3]))

    def _record(
        self, query: Array, key: Array, mask: Mask | None, score: Score | None
    ) -> None:
        if not self.record:
            return
        if self.kind.takes_any_mask and self.kind.name != "entmax":
            weights = attention_weights(
                query,
                key,
                mask=_both(self.kind.mask(), mask),
                score=_chain(score, self._own_score()),
                scale=self.scale,
            )
        else:  # What each key's own unit vector as its value gives.
            B, S, K, _ = key.shape
            unit = jnp.broadcast_to(jnp.eye(S)[None, :, None], (B, S, K, S))
            query, key = query.astype(jnp.float32), key.astype(jnp.float32)
            found = self._whole(query, key, unit, mask, score, None)
            weights = found.transpose(0, 2, 1, 3)
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
        cache = cache.write(*self._key_value(x), at)
        mask, own, limits = ancestry.mask(), self._own_score(), self.kind.mask()
        if limits is not None:
            mask = mask & ancestry.mask_over_slots(limits)
        if own is not None:
            score = _chain(score, ancestry.score_over_slots(own))
        if self.kind.takes_any_mask and self.kind.name != "entmax":
            filled = at + x.shape[1]
            return self.attend(x, cache, mask, score, filled), cache
        query, key, value = self.query(x), *cache.rows()
        heads = self._few(query, key, value, mask, score)
        return self.out(heads), cache

    def _few(
        self, query: Array, key: Array, value: Array, mask: Mask, score: Score | None
    ) -> Array:
        """`_whole` for a few queries and any mask, in O(T S)."""
        if self.kind.name == "entmax":
            return self._whole(query, key, value, mask, score, None)
        B, T, N, _ = query.shape
        allowed = mask.materialise((B, N, T, key.shape[1]))
        if self.kind.name == "linear":
            return linear_attention(query, key, value, mask=allowed)
        return performer_attention(
            query,
            key,
            value,
            self._directions(query),
            key_mask=allowed.any(axis=(1, 2)),
            mask=allowed,
        )


def _both(one: Mask | None, other: Mask | None) -> Mask | None:
    return one if other is None else other if one is None else one & other


def _chain(one: Score | None, other: Score | None) -> Score | None:
    return one if other is None else other if one is None else scores.chain(one, other)


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
    y = product(x.astype(dtype), kernels, (((2,), (0,)), ((), ())))
    biases = [layer.bias[...] for layer in layers if layer.bias is not None]
    if biases:
        y = y + jnp.stack(biases)[None, None]
    y = finished(y, dtype)
    return [y[:, :, i] for i in range(len(layers))]
