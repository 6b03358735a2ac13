"""MovieTweetings, what a user rates next: BERT4Rec (Sun et al. 2019, arXiv 1904.06690).

    qkv-jax train experiments/recommendation/bert4rec.py --data.directory ../shared/data/movietweetings100k

Floor: popularity alone, HR@10 0.1549 (`python -m benchmarks.popularity`). Aim: 0.20. Measured:
0.2186. Hardware, time and what else was tried: README.md beside this file. Half of each row is
masked, as the paper does where histories are short (0.4 to 0.6); in 7 rows of 10 it is the last of
each history alone. Best after 16 of the 40 epochs.
"""

from pathlib import Path

from qkv_jax.data.ratings import Ratings
from qkv_jax.models import recommender
from qkv_jax.tasks import TaskConfig
from qkv_jax.tasks.ranking import Ranking
from qkv_jax.training import OptimizerConfig, TrainingConfig

CONFIG = TaskConfig(
    data=Ratings(directory=Path("movietweetings100k")),
    model=recommender.bert4rec(mask_rate=0.5, last_rate=0.7),
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
        steps=1480,
        evaluate_every=148,
        checkpoint_every=1480,
        keep=1,
        metric="ndcg@10",
        mode="max",
        log_every=37,
    ),
)
