"""Sheets of 512 x 512 pixels with 256 images of Fashion-MNIST, all classified at once.

    qkv-jax train experiments/long_images/sheets.py --data.directory ../shared/data/fashion_mnist

A sheet is a grid of 16 x 16 cells of 32 x 32 pixels, in whose middle a 28 x 28 image stands; the model
lays the rows of a batch out so, in their order, which is drawn anew each epoch. Patches of 16 x 16
pixels are 1,024 positions. Each image's class is read from the mean of its cell's last states, and
accuracy is that of images.
Here attention is local in two dimensions and axial in turns; for full attention, to compare with:
--model.attention full
Hardware, time and result: README.md beside this file. Expected: as accurate as full attention, within a
point. Local: Parmar et al. 2018 (arXiv 1802.05751); axial: Ho et al. 2019 (arXiv 1912.12180).
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
        sheet=16,
        cell=32,
        patch=16,
        d_model=64,
        d_ff=128,
        heads=4,
        layers=4,
        attention=("local", "rows", "local", "columns"),
        radius=3,
        augmentation=PixelChanges(flip=True, shift=1),
    ),
    batch_rows=256,
    eval_rows=1024,
    optimizer=OptimizerConfig(
        name="muon",
        peak_lr=6e-3,
        warmup_steps=50,
        schedule="linear",
        weight_decay=0.02,
        clip_norm=1.0,
    ),
    training=TrainingConfig(
        steps=1712,
        evaluate_every=428,
        checkpoint_every=428,
        metric="accuracy",
        mode="max",
        keep=2,
        ema_decay=0.995,
        log_every=50,
    ),
)
