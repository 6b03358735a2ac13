"""Blood cells in one stage: a heat map of centres, a box at each cell, attention between.

    qkv-jax train experiments/detection/single_stage.py --data.path ../shared/data/bccd/bccd_160x120.npz

Hardware, time and result: README.md beside this file. Expected: AP50 0.80 on the test part; measured:
0.862. The head is CenterNet's and TTFNet's, the neck RT-DETR's; rates and sizes are our own.
"""

from pathlib import Path

from qkv_jax.data.boxed_images import BoxedImages
from qkv_jax.models import single_stage
from qkv_jax.tasks import TaskConfig
from qkv_jax.tasks.detection import DetectionScore
from qkv_jax.training import OptimizerConfig, TrainingConfig

CONFIG = TaskConfig(
    data=BoxedImages(path=Path("bccd_160x120.npz")),
    model=single_stage.Config(),
    batch_rows=16,
    eval_rows=29,
    score=DetectionScore(),
    optimizer=OptimizerConfig(
        name="muon",
        peak_lr=5e-3,
        warmup_steps=30,
        schedule="linear",
        weight_decay=0.01,
        clip_norm=1.0,
    ),
    training=TrainingConfig(
        steps=300,
        evaluate_every=75,
        checkpoint_every=75,
        keep=1,
        metric="ap50",
        mode="max",
        ema_decay=0.99,
        log_every=10,
    ),
)
