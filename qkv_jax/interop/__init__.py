"""Checkpoints of other software, in and out: Hugging Face directories of translation models."""

from qkv_jax.interop.errors import InteropError as InteropError
from qkv_jax.interop.hub import fetch as fetch
from qkv_jax.interop.marian_npz import convert_marian as convert_marian
from qkv_jax.interop.marian_npz import is_marian_npz as is_marian_npz
from qkv_jax.interop.pretrained import Pretrained as Pretrained
from qkv_jax.interop.pretrained import load as load
from qkv_jax.interop.pretrained import save as save
from qkv_jax.interop.tensors import read_tensors as read_tensors
from qkv_jax.interop.tokenizers import PretrainedTokenizer as PretrainedTokenizer
from qkv_jax.interop.tokenizers import load_tokenizer as load_tokenizer
