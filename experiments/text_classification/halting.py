"""Which of 77 things a customer of a bank wants: a block applied to each word as often as it asks.

    qkv-jax train experiments/text_classification/halting.py --data.directory ../shared/data/banking77

Text, features, and rates are those of bert.py beside this file, so that the two compare: here one
block, at most 4 times a token, stands in the place of two blocks, each once (Graves 2016, arXiv
1603.08983; Dehghani et al. 2018, arXiv 1807.03819). depth.png in the run shows how deep tokens went.
Hardware, time and result: README.md beside this file. Expected: the accuracy of bert.py within 1 point;
measured: 91.3, and 1.57 applications a token.
"""

from pathlib import Path

from qkv_jax.data import LabelledCsv, WordFeatures
from qkv_jax.models import text_classifier
from qkv_jax.tasks import TaskConfig
from qkv_jax.tasks.depth import DepthScore
from qkv_jax.training import OptimizerConfig, TrainingConfig

CONFIG = TaskConfig(
    data=LabelledCsv(
        directory=Path("banking77"),
        label="category",
        features=WordFeatures(length=40, letters=(3, 4), buckets=8192, most=16),
        valid_share=0.0,
    ),
    model=text_classifier.bert(layers=4, halting=0.01),
    score=DepthScore(most=4),
    batch_rows=64,
    eval_rows=280,
    optimizer=OptimizerConfig(
        peak_lr=3e-3, warmup_steps=100, schedule="cosine", clip_norm=1.0
    ),
    training=TrainingConfig(
        steps=2300, evaluate_every=460, checkpoint_every=460, keep=2, metric="loss"
    ),
)
