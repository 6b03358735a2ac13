"""Cheaper models: weights of fewer bits, and fewer weights. Model in, model out."""

from qkv_jax.compression.gates import GateConfig as GateConfig
from qkv_jax.compression.gates import add_gates as add_gates
from qkv_jax.compression.gates import apply_gates as apply_gates
from qkv_jax.compression.gates import fold_gates as fold_gates
from qkv_jax.compression.gates import open_heads as open_heads
from qkv_jax.compression.gates import writing_heads as writing_heads
from qkv_jax.compression.prune import Pruning as Pruning
from qkv_jax.compression.prune import choose as choose
from qkv_jax.compression.prune import importance as importance
from qkv_jax.compression.prune import keep_layers as keep_layers
from qkv_jax.compression.prune import keep_units as keep_units
from qkv_jax.compression.quantise import Quantisation as Quantisation
from qkv_jax.compression.quantise import dequantised as dequantised
from qkv_jax.compression.quantise import imitate as imitate
from qkv_jax.compression.quantise import pack as pack
from qkv_jax.compression.quantise import quantise as quantise
from qkv_jax.compression.quantise import unpack as unpack
