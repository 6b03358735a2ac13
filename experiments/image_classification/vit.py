"""Fashion-MNIST with a small Vision Transformer.

    qkv-jax train experiments/image_classification/vit.py --data.directory ../shared/data/fashion_mnist

Data: 28 x 28 grey images of 10 kinds of clothes; 5,000 of the 60,000 training images are held out.
Hardware, time and result: README.md beside this file. Published: two convolutions 91.6.
Patches of 4 x 4 pixels by a stem of convolutions (Xiao et al. 2021, arXiv 2106.14881), means in
place of a class token (Beyer et al. 2022, arXiv 2205.01580). Muon for few epochs.
"""

from pathlib import Path

from qkv_jax.data.idx_images import FASHION, IdxImages
from qkv_jax.models import vit
from qkv_jax.models.image_classification import PixelChanges
from qkv_jax.tasks import TaskConfig
from qkv_jax.training import OptimizerConfig, TrainingConfig

CONFIG = TaskConfig(
    data=IdxImages(directory=Path("fashion_mnist"), names=FASHION),
    model=vit.Config(
        patch=4,
        stem="convolution",
        d_model=96,
        d_ff=192,
        heads=3,
        layers=3,
        augmentation=PixelChanges(flip=True, shift=1),
    ),
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
        steps=4500,
        evaluate_every=900,
        checkpoint_every=900,
        metric="accuracy",
        mode="max",
        keep=2,
        ema_decay=0.998,
        log_every=50,
    ),
)
