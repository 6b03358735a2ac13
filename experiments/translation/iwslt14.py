"""IWSLT14, German to English, from the hub: fairseq's transformer_iwslt_de_en and its recipe.

    qkv-jax train experiments/translation/iwslt14.py

Needs the extra `hub`, and a GPU or patience. Published, lower-cased and tokenised:
34.5 to 35 (fairseq, transformer_iwslt_de_en, beam 5); 33.7 (JoeyNMT, sacreBLEU). Sizes and rates
are fairseq's: 6 and 6 layers of 512 with 4 heads, dropout 0.3, Adam (0.9, 0.98), 5e-4, 4,000 updates of
warm-up, smoothing 0.1, 4,096 tokens, 10 averaged checkpoints. Differences: the norm stands
before each sublayer, the text is as the hub has it, one vocabulary of 10,000 serves both sides, and
its vectors are tied. Not run to its end: tests shape it, and train it shrunk.
"""

from qkv_jax.data import Filters, HubData
from qkv_jax.models import seq2seq
from qkv_jax.training import OptimizerConfig, TrainingConfig
from qkv_jax.translation import DecodingConfig, TextConfig, TranslationConfig

CONFIG = TranslationConfig(
    data=HubData(name="bbaaaa/iwslt14-de-en", source="de", target="en"),
    text=TextConfig(
        vocabulary=10000,
        tokenizer="bpe",
        filters=Filters(max_words=175, max_ratio=1.5),
        batch_tokens=4096,
        packing=True,
        max_source=256,
        max_target=256,
    ),
    model=seq2seq.base(norm="pre", heads=4, d_ff=1024, dropout=0.3),
    optimizer=OptimizerConfig(
        name="adamw", peak_lr=5e-4, warmup_steps=4000, weight_decay=1e-4
    ),
    training=TrainingConfig(
        steps=50000, evaluate_every=1000, checkpoint_every=1000, average=10, keep=10
    ),
    decoding=DecodingConfig(beams=5),
)
