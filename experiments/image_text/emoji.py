"""Emoji in two drawing styles and their names in three languages: retrieval and captions.

    qkv-jax train experiments/image_text/emoji.py --data.directory ../shared/data/emoji

From one style to the other: --data.styles google --data.test-styles twitter. Result: README.md beside
this file; expected: recall@1 of 20 % among 357, where chance is 0.3 %. Sizes and rates are our own.
"""

from pathlib import Path

from qkv_jax.data.captioned_images import CaptionedImages
from qkv_jax.models import image_text
from qkv_jax.tasks import TaskConfig
from qkv_jax.tasks.image_text import ImageTextScore
from qkv_jax.training import OptimizerConfig, TrainingConfig

CONFIG = TaskConfig(
    data=CaptionedImages(directory=Path("emoji")),
    model=image_text.Config(),
    batch_rows=128,
    eval_rows=111,
    score=ImageTextScore(),
    optimizer=OptimizerConfig(
        name="muon",
        peak_lr=4e-3,
        warmup_steps=30,
        schedule="linear",
        weight_decay=0.02,
        clip_norm=1.0,
    ),
    training=TrainingConfig(
        steps=400,
        evaluate_every=100,
        checkpoint_every=50,
        keep=1,
        metric="recall1",
        mode="max",
        ema_decay=0.99,
        log_every=10,
    ),
)
