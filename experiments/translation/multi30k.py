"""Multi30k en-de, text only: the tiny Transformer of Wu et al. 2021 (arXiv 2105.14462).

    qkv-jax train experiments/translation/multi30k.py --data.directory ../shared/data/multi30k

Text: lower-cased, punctuation-normalised, Moses-tokenised files of the Multi30k data set.
Hardware, time and result: README.md beside this file. Published with the recipe of 8,000 updates and
10 averaged checkpoints: 41.02 lower-cased tokenised BLEU on test2016. Expected: 40.5; measured: 40.59,
40.50 and 40.44 by three seeds, with `--precision.compute bfloat16`, which a CPU with avx512_bf16 does in 0.75
of the time.
Vocabulary, dropout and smoothing are the paper's; the norm stands before each sublayer. For 70 minutes
on a core with avx512_bf16 (some 4 hours on one without AVX-512) instead of 160 epochs of Adam, Muon
takes the updates, its rate decays to 0 within 70 epochs, which makes averaging needless, and pairs
share rows. The checkpoint of the best validation BLEU is kept.
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
