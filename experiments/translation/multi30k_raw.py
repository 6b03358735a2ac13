"""Multi30k as it is written, cased and not tokenised: English, German and French, any two of them.

    qkv-jax train experiments/translation/multi30k_raw.py --data.directory ../shared/data/multi30k/raw

German to English: --data.source de --data.target en; to French: --data.target fr. Model, recipe and
sizes are those of multi30k.py, untouched, to show that they carry; scores are sacreBLEU's on cased,
detokenised text, and so not to be compared with that file's. Hardware, time and result: README.md
beside this file.
"""

from pathlib import Path

from qkv_jax.data import ParallelData
from qkv_jax.models import seq2seq
from qkv_jax.training import OptimizerConfig, TrainingConfig
from qkv_jax.translation import DecodingConfig, TextConfig, TranslationConfig

CONFIG = TranslationConfig(
    data=ParallelData(
        directory=Path("raw"),
        train=("train",),
        valid=("val",),
        test=("test_2016_flickr",),
    ),
    text=TextConfig(
        vocabulary=9700,
        tokenizer="bpe",
        batch_tokens=4096,
        packing=True,
        max_source=64,
        max_target=64,
    ),
    model=seq2seq.tiny(norm="pre", dropout=0.3),
    optimizer=OptimizerConfig(
        name="muon", peak_lr=6e-3, warmup_steps=200, schedule="linear", clip_norm=1.0
    ),
    training=TrainingConfig(
        steps=8100,
        evaluate_every=900,
        checkpoint_every=900,
        metric="bleu",
        mode="max",
        keep=2,
        log_every=50,
    ),
    validation_sentences=1014,
    decoding=DecodingConfig(beams=5, exact=True),
)
