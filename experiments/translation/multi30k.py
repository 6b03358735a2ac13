"""Multi30k en-de, text only: the tiny Transformer of Wu et al. 2021 (arXiv 2105.14462).

    qkv-jax train experiments/translation/multi30k.py --data.directory ../shared/data/multi30k

Text: lower-cased, punctuation-normalised, Moses-tokenised files of the Multi30k data set.
Hardware, time and result: README.md beside this file. Published with the recipe of 8,000 updates and
10 averaged checkpoints: 41.02 lower-cased tokenised BLEU on test2016.
Model, smoothing and Adam are the paper's. For a run of under an hour on two cores instead of 160
epochs, the rate decays to 0 within 22 epochs, which makes averaging needless, and dropout is 0.2
instead of 0.3; updates are of 3,072 target tokens instead of 8,000, and the peak rate is lower.
"""

from pathlib import Path

from qkv_jax.data import ParallelData
from qkv_jax.models import seq2seq
from qkv_jax.training import OptimizerConfig, TrainingConfig
from qkv_jax.translation import DecodingConfig, TextConfig, TranslationConfig


def files(part: str) -> tuple[str, str]:
    return (f"tok/{part}.lc.norm.tok.en.gz", f"tok/{part}.lc.norm.tok.de.gz")


CONFIG = TranslationConfig(
    data=ParallelData(
        directory=Path("multi30k"),
        train=files("train"),
        valid=files("val"),
        test=files("test_2016_flickr"),
    ),
    text=TextConfig(
        vocabulary=8000,
        tokenizer="bpe",
        batch_tokens=3072,
        buckets=8,
        max_source=64,
        max_target=64,
    ),
    model=seq2seq.tiny(dropout=0.2),
    optimizer=OptimizerConfig(
        peak_lr=4e-3, warmup_steps=600, schedule="linear", clip_norm=1.0
    ),
    training=TrainingConfig(
        steps=4000, evaluate_every=500, checkpoint_every=500, keep=2, log_every=50
    ),
    decoding=DecodingConfig(beams=5, exact=True),
)
