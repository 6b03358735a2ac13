"""The demo's corpus, user-interface text, with a recurrent encoder-decoder in the Transformer's place.

    qkv-jax train experiments/recurrent/interface.py

Text, batches, updates and search are those of `qkv-jax demo`, so that the two compare; the optimizer is
Adam: Muon gave 23.2. Hardware and time: README.md beside this file. Expected: within 4 BLEU of the
Transformer's 41.6; measured: 25.9.
"""

import dataclasses

from qkv_jax.models import recurrent
from qkv_jax.training import OptimizerConfig
from qkv_jax.translation import demo

CONFIG = dataclasses.replace(
    demo.CONFIG,
    model=recurrent.Config(d_model=224, encoder_layers=1, decoder_layers=1),
    optimizer=OptimizerConfig(
        peak_lr=2e-3, warmup_steps=100, schedule="linear", clip_norm=1.0
    ),
)
