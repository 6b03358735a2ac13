"""FSDD: ten spoken digits of a speaker nobody has heard, from the waveform.

    qkv-jax train experiments/speech_recognition/fsdd.py --data.file ../shared/data/fsdd/fsdd.npz

Hardware, time and result: README.md beside this file.
"""

from pathlib import Path

from qkv_jax.data.fsdd import FsddData
from qkv_jax.models.spectrograms import Augmentation
from qkv_jax.models.speech import Config
from qkv_jax.tasks import TaskConfig
from qkv_jax.tasks.error_rates import ErrorRates
from qkv_jax.training import OptimizerConfig, TrainingConfig

CONFIG = TaskConfig(
    data=FsddData(file=Path("fsdd.npz"), speeds=(0.85, 1.0, 1.15)),
    model=Config(
        d_model=96,
        d_ff=192,
        encoder_layers=3,
        decoder_layers=1,
        cepstra=13,
        dropout=0.4,
        ctc_weight=0.5,
        beams=2,
        longest=2,
        augmentation=Augmentation(
            tempo=0.2,
            warp=0.1,
            shift=2.0,
            time_masks=1,
            time_width=0.2,
            band_masks=2,
            band_width=6,
            noise=0.5,
        ),
    ),
    batch_rows=64,
    lengths=2,
    score=ErrorRates(),
    optimizer=OptimizerConfig(
        name="muon",
        peak_lr=6e-3,
        warmup_steps=50,
        schedule="linear",
        clip_norm=1.0,
    ),
    training=TrainingConfig(
        steps=500,
        evaluate_every=250,
        checkpoint_every=250,
        keep=1,
        metric="wer",
        ema_decay=0.99,
    ),
)
