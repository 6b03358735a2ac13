"""Fashion-MNIST with a small residual network that has squeeze-excitation and self-attention.

    qkv-jax train experiments/image_classification/resnet.py --data.directory ../shared/data/fashion_mnist

Data: 28 x 28 grey images of 10 kinds of clothes; 5,000 of the 60,000 training images are held out.
Hardware, time and result: README.md beside this file. Published: ResNet18 94.9, two convolutions 91.6.
Squeeze-excitation as in Hu et al. 2018 (arXiv 1709.01507), self-attention over the last map as in
Srinivas et al. 2021 (arXiv 2101.11605). Muon for few epochs, as in Jordan 2024 (airbench).
"""

from pathlib import Path

from qkv_jax.data.idx_images import FASHION, IdxImages
from qkv_jax.models import resnet
from qkv_jax.models.image_classification import PixelChanges
from qkv_jax.tasks import TaskConfig
from qkv_jax.training import OptimizerConfig, TrainingConfig

CONFIG = TaskConfig(
    data=IdxImages(directory=Path("fashion_mnist"), names=FASHION),
    model=resnet.Config(widths=(48, 96), augmentation=PixelChanges(flip=True, shift=1)),
    batch_rows=128,
    eval_rows=500,
    optimizer=OptimizerConfig(
        name="muon",
        peak_lr=4e-3,
        warmup_steps=100,
        schedule="linear",
        weight_decay=0.02,
        clip_norm=1.0,
    ),
    training=TrainingConfig(
        steps=6000,
        evaluate_every=1000,
        checkpoint_every=1000,
        metric="accuracy",
        mode="max",
        keep=2,
        ema_decay=0.998,
        log_every=50,
    ),
)
