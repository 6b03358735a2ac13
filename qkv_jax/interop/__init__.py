"""Checkpoints of other software, in and out: Hugging Face directories, Marian, CTranslate2."""

from qkv_jax.interop.agreement import Agreement as Agreement
from qkv_jax.interop.agreement import verify as verify
from qkv_jax.interop.ctranslate2 import Vocabularies as Vocabularies
from qkv_jax.interop.ctranslate2 import export_ctranslate2 as export_ctranslate2
from qkv_jax.interop.description import load_description as load_description
from qkv_jax.interop.description import save_description as save_description
from qkv_jax.interop.directory import new_directory as new_directory
from qkv_jax.interop.errors import InteropError as InteropError
from qkv_jax.interop.export import export_huggingface as export_huggingface
from qkv_jax.interop.export import generation_settings as generation_settings
from qkv_jax.interop.hub import fetch as fetch
from qkv_jax.interop.marian_npz import convert_marian as convert_marian
from qkv_jax.interop.marian_npz import is_marian_npz as is_marian_npz
from qkv_jax.interop.pretrained import Pretrained as Pretrained
from qkv_jax.interop.pretrained import load as load
from qkv_jax.interop.pretrained import save as save
from qkv_jax.interop.published import import_published as import_published
from qkv_jax.interop.tensors import read_tensors as read_tensors
from qkv_jax.interop.tokenizers import PretrainedTokenizer as PretrainedTokenizer
from qkv_jax.interop.tokenizers import load_tokenizer as load_tokenizer
from qkv_jax.interop.trained import Trained as Trained
