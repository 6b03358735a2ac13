"""Cora, nodes of a citation graph: GATv2 (Brody et al. 2022, arXiv 2105.14491).

    qkv-jax train experiments/graphs/gatv2.py --data.directory ../shared/data/cora --run.seeds 10

Published with GAT: 83.0 +- 0.7 % of the test nodes. Measured: 83.3 +- 0.6, over 10.
Hardware and time: README.md beside this file. All hyper-parameters are those of gat.py.
"""

from pathlib import Path

from qkv_jax.data.citations import CitationGraph
from qkv_jax.models import gat
from qkv_jax.tasks import TaskConfig
from qkv_jax.training import MeshConfig, OptimizerConfig, TrainingConfig

CONFIG = TaskConfig(
    data=CitationGraph(directory=Path("cora")),
    model=gat.Config(attention="gatv2"),
    batch_rows=1,
    optimizer=OptimizerConfig(
        peak_lr=5e-3, warmup_steps=0, schedule="constant", b2=0.999, eps=1e-8
    ),
    training=TrainingConfig(
        steps=1000,
        evaluate_every=10,
        checkpoint_every=1000,
        keep=1,
        metric="nll",
        patience=10,
        log_every=100,
    ),
    mesh=MeshConfig(data=1, tensor=-1),
)
