"""Pure functions on arrays: attention, masks, scores, positions, caches, dropout."""

from qkv_jax.ops import masks as masks
from qkv_jax.ops import patterns as patterns
from qkv_jax.ops import scores as scores
from qkv_jax.ops.attention import attention_weights as attention_weights
from qkv_jax.ops.attention import dot_product_attention as dot_product_attention
from qkv_jax.ops.attention import explain as explain
from qkv_jax.ops.cache import Ancestry as Ancestry
from qkv_jax.ops.cache import KVCache as KVCache
from qkv_jax.ops.dropout import dropout as dropout
from qkv_jax.ops.dropout import split_rng as split_rng
from qkv_jax.ops.masks import Mask as Mask
from qkv_jax.ops.positions import segment_positions as segment_positions
from qkv_jax.ops.positions import sinusoids as sinusoids
from qkv_jax.ops.residuals import column_sums as column_sums
from qkv_jax.ops.residuals import largest_logit as largest_logit
from qkv_jax.ops.residuals import merge as merge
from qkv_jax.ops.residuals import with_sinks as with_sinks
from qkv_jax.ops.scores import Score as Score
