"""Pure functions on arrays: attention, masks, scores, positions, caches, dropout."""

from qkv_jax.ops import kv_caches as kv_caches
from qkv_jax.ops import masks as masks
from qkv_jax.ops import patterns as patterns
from qkv_jax.ops import scores as scores
from qkv_jax.ops.adaptive import entmax as entmax
from qkv_jax.ops.adaptive import entmax_attention as entmax_attention
from qkv_jax.ops.adaptive import sparsemax as sparsemax
from qkv_jax.ops.additive import additive_attention as additive_attention
from qkv_jax.ops.additive import additive_weights as additive_weights
from qkv_jax.ops.additive import local_attention as local_attention
from qkv_jax.ops.additive import luong_concat as luong_concat
from qkv_jax.ops.additive import luong_dot as luong_dot
from qkv_jax.ops.additive import luong_general as luong_general
from qkv_jax.ops.additive import monotonic_centres as monotonic_centres
from qkv_jax.ops.additive import predictive_centres as predictive_centres
from qkv_jax.ops.attention import attention_weights as attention_weights
from qkv_jax.ops.attention import dot_product_attention as dot_product_attention
from qkv_jax.ops.attention import explain as explain
from qkv_jax.ops.axes import LOGICAL_AXES as LOGICAL_AXES
from qkv_jax.ops.axes import pin as pin
from qkv_jax.ops.axes import pin_stream as pin_stream
from qkv_jax.ops.cache import Ancestry as Ancestry
from qkv_jax.ops.cache import KVCache as KVCache
from qkv_jax.ops.context_parallel import ContextMethod as ContextMethod
from qkv_jax.ops.context_parallel import blocks_looked_at as blocks_looked_at
from qkv_jax.ops.context_parallel import check_method as check_method
from qkv_jax.ops.context_parallel import (
    context_parallel_attention as context_parallel_attention,
)
from qkv_jax.ops.context_parallel import mesh_attention as mesh_attention
from qkv_jax.ops.context_parallel import shard_attention as shard_attention
from qkv_jax.ops.dropout import dropout as dropout
from qkv_jax.ops.dropout import index_bits as index_bits
from qkv_jax.ops.dropout import split_rng as split_rng
from qkv_jax.ops.graph import arc_attention as arc_attention
from qkv_jax.ops.graph import gat_attention as gat_attention
from qkv_jax.ops.graph import gatv2_attention as gatv2_attention
from qkv_jax.ops.kv_caches import cached_attention as cached_attention
from qkv_jax.ops.linear import LinearState as LinearState
from qkv_jax.ops.linear import causal_linear_attention as causal_linear_attention
from qkv_jax.ops.linear import elu_plus_one as elu_plus_one
from qkv_jax.ops.linear import favor_projection as favor_projection
from qkv_jax.ops.linear import linear_attention as linear_attention
from qkv_jax.ops.linear import linear_attention_step as linear_attention_step
from qkv_jax.ops.linear import performer_attention as performer_attention
from qkv_jax.ops.masks import Mask as Mask
from qkv_jax.ops.positions import rope as rope
from qkv_jax.ops.positions import rope_2d as rope_2d
from qkv_jax.ops.positions import segment_positions as segment_positions
from qkv_jax.ops.positions import sinusoids as sinusoids
from qkv_jax.ops.residuals import column_sums as column_sums
from qkv_jax.ops.residuals import largest_logit as largest_logit
from qkv_jax.ops.residuals import merge as merge
from qkv_jax.ops.residuals import with_sinks as with_sinks
from qkv_jax.ops.scores import Score as Score
