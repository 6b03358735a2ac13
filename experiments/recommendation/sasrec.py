"""MovieTweetings, what a user rates next: SASRec (Kang and McAuley 2018, arXiv 1808.09781).

    qkv-jax train experiments/recommendation/sasrec.py --data.directory ../shared/data/movietweetings100k

Floor: popularity alone, HR@10 0.1549 (`python -m benchmarks.popularity`). Aim: 0.20. Measured:
0.2262. Hardware, time and what else was tried: README.md beside this file. Sizes are near the
paper's; its loss is cross-entropy over all items, its rate decays to 0 within 30 epochs.
"""

from pathlib import Path

from qkv_jax.data.ratings import Ratings
from qkv_jax.models import recommender
from qkv_jax.tasks import TaskConfig
from qkv_jax.tasks.ranking import Ranking
from qkv_jax.training import OptimizerConfig, TrainingConfig

CONFIG = TaskConfig(
    data=Ratings(directory=Path("movietweetings100k")),
    model=recommender.sasrec(dropout=0.5),
    batch_rows=32,
    eval_rows=512,
    score=Ranking(),
    optimizer=OptimizerConfig(
        name="adamw",
        peak_lr=6e-3,
        warmup_steps=100,
        schedule="linear",
        weight_decay=0.3,
    ),
    training=TrainingConfig(
        steps=1110,
        evaluate_every=111,
        checkpoint_every=1110,
        keep=1,
        metric="ndcg@10",
        mode="max",
        log_every=37,
    ),
)
