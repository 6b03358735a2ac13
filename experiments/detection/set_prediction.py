"""Blood cells as a set: queries with reference boxes, a bipartite matching, losses at each layer.

    qkv-jax train experiments/detection/set_prediction.py --data.path ../shared/data/bccd/bccd_160x120.npz

Backbone, neck, data and augmentation are those of single_stage.py. Result: README.md beside this file.
The losses' weights are Deformable DETR's (2 for classes, 5 for L1, 2 for GIoU); the rest is our own.
"""

from pathlib import Path

from qkv_jax.data.boxed_images import BoxedImages
from qkv_jax.models import set_prediction
from qkv_jax.tasks import TaskConfig
from qkv_jax.tasks.detection import DetectionScore
from qkv_jax.training import OptimizerConfig, TrainingConfig

CONFIG = TaskConfig(
    data=BoxedImages(path=Path("bccd_160x120.npz")),
    model=set_prediction.Config(),
    batch_rows=16,
    eval_rows=29,
    score=DetectionScore(),
    optimizer=OptimizerConfig(
        name="muon",
        peak_lr=4e-3,
        warmup_steps=40,
        schedule="linear",
        weight_decay=0.01,
        clip_norm=1.0,
    ),
    training=TrainingConfig(
        steps=450,
        evaluate_every=75,
        checkpoint_every=75,
        keep=1,
        metric="ap50",
        mode="max",
        ema_decay=0.99,
        log_every=10,
    ),
)
