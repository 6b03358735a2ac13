"""The translation task: text, tokeniser, model, loop and search, joined by one configuration."""

from qkv_jax.translation.alignment import Alignment as Alignment
from qkv_jax.translation.compare import Comparison as Comparison
from qkv_jax.translation.compare import compare as compare
from qkv_jax.translation.config import DecodingConfig as DecodingConfig
from qkv_jax.translation.config import DistillationConfig as DistillationConfig
from qkv_jax.translation.config import LanguageConfig as LanguageConfig
from qkv_jax.translation.config import TextConfig as TextConfig
from qkv_jax.translation.config import TranslationConfig as TranslationConfig
from qkv_jax.translation.evaluate import Scores as Scores
from qkv_jax.translation.evaluate import score as score
from qkv_jax.translation.run import evaluate_run as evaluate_run
from qkv_jax.translation.run import load_run as load_run
from qkv_jax.translation.start import is_run as is_run
from qkv_jax.translation.start import load_translator as load_translator
from qkv_jax.translation.start import read_run as read_run
from qkv_jax.translation.translator import PairScore as PairScore
from qkv_jax.translation.translator import Translation as Translation
from qkv_jax.translation.translator import Translator as Translator
from qkv_jax.translation.translator import Wishes as Wishes
