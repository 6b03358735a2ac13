"""flax.nnx modules: each holds parameters and calls the ops.

A parameter's `axes` metadata names its logical axes, which training/sharding.py maps to a mesh.
"""

from qkv_jax.layers.attention import MultiHeadAttention as MultiHeadAttention
from qkv_jax.layers.convolution import Convolution as Convolution
from qkv_jax.layers.convolution import windows as windows
from qkv_jax.layers.embedding import AddPositions as AddPositions
from qkv_jax.layers.embedding import Embedding as Embedding
from qkv_jax.layers.embedding import Positions as Positions
from qkv_jax.layers.feed_forward import Activation as Activation
from qkv_jax.layers.feed_forward import FeedForward as FeedForward
from qkv_jax.layers.halting import AdaptiveDepth as AdaptiveDepth
from qkv_jax.layers.halting import Halted as Halted
from qkv_jax.layers.kinds import AttentionKind as AttentionKind
from qkv_jax.layers.linear import Linear as Linear
from qkv_jax.layers.norm import Normalisation as Normalisation
from qkv_jax.layers.norm import make_norm as make_norm
from qkv_jax.layers.qkv import QKVAttention as QKVAttention
from qkv_jax.layers.recurrent import ALIGNMENTS as ALIGNMENTS
from qkv_jax.layers.recurrent import GRU as GRU
from qkv_jax.layers.recurrent import Alignment as Alignment
from qkv_jax.layers.recurrent import RecurrentAttention as RecurrentAttention
from qkv_jax.layers.rngs import init_rngs as init_rngs
from qkv_jax.layers.stack import Remat as Remat
from qkv_jax.layers.stack import check_remat as check_remat
from qkv_jax.layers.stack import pairs_of_keys as pairs_of_keys
from qkv_jax.layers.stack import run_blocks as run_blocks
from qkv_jax.layers.transformer import DecoderBlock as DecoderBlock
from qkv_jax.layers.transformer import EncoderBlock as EncoderBlock
from qkv_jax.layers.transformer import NormPlace as NormPlace
from qkv_jax.layers.transformer import Residual as Residual
