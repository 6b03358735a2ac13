"""Pictures of a run: its curves, its attention, its heads and its embeddings."""

from qkv_jax.viz.attention import plot_attention as plot_attention
from qkv_jax.viz.curves import plot_curves as plot_curves
from qkv_jax.viz.curves import plot_rates as plot_rates
from qkv_jax.viz.embeddings import Points as Points
from qkv_jax.viz.embeddings import plot_embeddings as plot_embeddings
from qkv_jax.viz.heads import plot_heads as plot_heads
from qkv_jax.viz.page import Heads as Heads
from qkv_jax.viz.page import write_page as write_page
