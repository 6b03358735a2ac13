"""Multi30k en-de with a recurrent encoder-decoder: Bahdanau et al. 2015 (arXiv 1409.0473).

    qkv-jax train experiments/recurrent/bahdanau.py --data.directory ../shared/data/multi30k

Luong et al. 2015 (arXiv 1508.04025): --model.alignment general (or dot, concat, local).
Text, batches, loop and search are those of experiments/translation/multi30k.py, and the model has about
as many parameters as the Transformer there (2.6M). Hardware, time and result: README.md beside
this file. Expected: within 4 BLEU of that Transformer.
"""

from pathlib import Path

from qkv_jax.data import ParallelData
from qkv_jax.models import recurrent
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
        batch_tokens=2048,
        packing=True,
        max_source=64,
        max_target=64,
    ),
    model=recurrent.Config(d_model=192, encoder_layers=1, decoder_layers=1),
    optimizer=OptimizerConfig(
        peak_lr=2e-3, warmup_steps=200, schedule="linear", clip_norm=1.0
    ),
    training=TrainingConfig(
        steps=5000,
        evaluate_every=1000,
        checkpoint_every=1000,
        metric="nll",
        keep=2,
        log_every=50,
    ),
    decoding=DecodingConfig(beams=5, exact=True, alpha=0.8),
)
