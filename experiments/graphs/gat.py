"""Cora, nodes of a citation graph: GAT as published (Velickovic et al. 2018, arXiv 1710.10903).

    qkv-jax train experiments/graphs/gat.py --data.directory ../shared/data/cora --run.seeds 10

Published: 83.0 +- 0.7 % of the test nodes, over 100 runs. Measured: 83.0 +- 0.7, over 10. Hardware
and time: README.md beside this file. Hyper-parameters are the paper's (section 3.3): two layers, 8
heads of 8 and one of the classes' size, dropout 0.6 on inputs and weights, L2 of 5e-4, Adam at
0.005, patience of 100 epochs; here on the validation nodes' likelihood, looked at every 10. Devices
share out the heads: one graph is one row, which cannot be split.
"""

from pathlib import Path

from qkv_jax.data.citations import CitationGraph
from qkv_jax.models import gat
from qkv_jax.tasks import TaskConfig
from qkv_jax.training import MeshConfig, OptimizerConfig, TrainingConfig

CONFIG = TaskConfig(
    data=CitationGraph(directory=Path("cora")),
    model=gat.Config(),
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
