"""One model from English into German and French: Johnson et al. 2017 (arXiv 1611.04558).

    qkv-jax train experiments/translation/multi30k_multilingual.py --data.directory ../shared/data/multi30k/raw

A tag before each source names its target language; then `translate RUN --target-language fr`, and
`evaluate RUN --target-language fr`. The reverse, both into English: --data.pairs de en fr en. The
recipe is that of multi30k_raw.py, with as many updates for both languages together as there for one.
Hardware, time and result: README.md beside this file. With 2,400 updates, and subwords for three
languages, it is better in each direction than a model of that direction alone with 1,200.
"""

from pathlib import Path

from qkv_jax.data import MultilingualData
from qkv_jax.models import seq2seq
from qkv_jax.training import OptimizerConfig, TrainingConfig
from qkv_jax.translation import DecodingConfig, TextConfig, TranslationConfig

CONFIG = TranslationConfig(
    data=MultilingualData(
        directory=Path("raw"),
        pairs=(("en", "de"), ("en", "fr")),
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
