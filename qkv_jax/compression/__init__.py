"""Cheaper models: weights of fewer bits, and fewer weights. Model in, model out."""

from qkv_jax.compression.quantise import Quantisation as Quantisation
from qkv_jax.compression.quantise import dequantised as dequantised
from qkv_jax.compression.quantise import imitate as imitate
from qkv_jax.compression.quantise import pack as pack
from qkv_jax.compression.quantise import quantise as quantise
from qkv_jax.compression.quantise import unpack as unpack
