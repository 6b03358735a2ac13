"""AN4: spelled words, numbers and commands of speakers nobody has heard, from 13 cepstra.

    qkv-jax train experiments/speech_recognition/an4.py --data.directory ../shared/data/an4_mfcc

Hardware, time and result: README.md beside this file.
"""

from pathlib import Path

from qkv_jax.data.an4 import An4Data
from qkv_jax.models.spectrograms import Augmentation
from qkv_jax.models.speech import Config
from qkv_jax.tasks import TaskConfig
from qkv_jax.tasks.error_rates import ErrorRates
from qkv_jax.training import OptimizerConfig, TrainingConfig

CONFIG = TaskConfig(
    data=An4Data(directory=Path("an4_mfcc"), units="words"),
    model=Config(
        cepstra=13,
        d_model=128,
        d_ff=256,
        encoder_layers=4,
        decoder_layers=1,
        dropout=0.1,
        ctc_weight=0.5,
        beams=8,
        search_weight=0.5,
        longest=24,
        augmentation=Augmentation(
            tempo=0.15,
            warp=0.08,
            shift=1.0,
            time_masks=2,
            band_masks=2,
            band_width=6,
            noise=0.1,
        ),
    ),
    batch_rows=16,
    lengths=3,
    score=ErrorRates(),
    optimizer=OptimizerConfig(
        name="muon",
        peak_lr=6e-3,
        warmup_steps=200,
        schedule="linear",
        clip_norm=1.0,
    ),
    training=TrainingConfig(
        steps=4200,
        evaluate_every=300,
        checkpoint_every=300,
        keep=2,
        metric="wer",
        ema_decay=0.995,
    ),
)
