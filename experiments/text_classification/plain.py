"""Which of 77 things a customer of a bank wants: words -> Q, K, V -> scores -> one vector -> class.

    qkv-jax train experiments/text_classification/plain.py --data.directory ../shared/data/banking77

Text: Banking77 (Casanueva et al. 2020, arXiv 2003.04807), 10,003 questions to train on, 3,080 to
test on. Hardware, time and result: README.md beside this file. A linear SVM on TF-IDF: 87.6 accuracy.
Expected: 88. The hyper-parameters are ours, chosen on a tenth of the training part
(`--data.valid-share 0.1`); what stands here trains on all of it.
"""

from pathlib import Path

from qkv_jax.data import LabelledCsv, WordFeatures
from qkv_jax.models import text_classifier
from qkv_jax.tasks import TaskConfig
from qkv_jax.training import OptimizerConfig, TrainingConfig

CONFIG = TaskConfig(
    data=LabelledCsv(
        directory=Path("banking77"),
        label="category",
        features=WordFeatures(length=40, letters=(3, 4), buckets=8192, most=16),
        valid_share=0.0,
    ),
    model=text_classifier.plain(),
    batch_rows=64,
    eval_rows=280,
    optimizer=OptimizerConfig(
        peak_lr=3e-3, warmup_steps=100, schedule="cosine", clip_norm=1.0
    ),
    training=TrainingConfig(
        steps=2300, evaluate_every=460, checkpoint_every=460, keep=2, metric="loss"
    ),
)
