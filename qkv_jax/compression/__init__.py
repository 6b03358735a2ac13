"""Cheaper models: weights of fewer bits, and fewer weights. Model in, model out."""

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
