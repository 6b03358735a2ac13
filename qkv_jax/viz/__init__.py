"""Pictures of a run: its curves, its attention and its embeddings."""

from qkv_jax.viz.attention import plot_attention as plot_attention
from qkv_jax.viz.curves import plot_curves as plot_curves
