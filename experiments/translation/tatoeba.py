"""Tatoeba, English to German: 165,000 short sentences of daily life, and the small Transformer.

    qkv-jax train experiments/translation/tatoeba.py --data.directory ../shared/data/tatoeba_ende

Rates, batches and smoothing are those of multi30k.py; the model is the larger `small`, as there is more
text; `base` on a GPU: --model.d-model 512 --model.d-ff 2048 --model.heads 8. Many sentences have
several good translations, of which the references give one, so that scores are low for what
is said right. Hardware, time and result: README.md beside this file.
"""

from pathlib import Path

from qkv_jax.data import ParallelData
from qkv_jax.models import seq2seq
from qkv_jax.training import OptimizerConfig, TrainingConfig
from qkv_jax.translation import DecodingConfig, TextConfig, TranslationConfig

CONFIG = TranslationConfig(
    data=ParallelData(directory=Path("tatoeba_ende")),
    text=TextConfig(
        vocabulary=10000,
        tokenizer="bpe",
        batch_tokens=4096,
        packing=True,
        max_source=64,
        max_target=64,
    ),
    model=seq2seq.small(norm="pre", dropout=0.1),
    optimizer=OptimizerConfig(
        name="muon", peak_lr=6e-3, warmup_steps=200, schedule="linear", clip_norm=1.0
    ),
    training=TrainingConfig(
        steps=4000,
        evaluate_every=500,
        checkpoint_every=500,
        metric="bleu",
        mode="max",
        keep=2,
        log_every=50,
    ),
    validation_sentences=1000,
    decoding=DecodingConfig(beams=5, exact=True),
)
