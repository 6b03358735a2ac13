"""Attention as composable pure functions, and a JAX trainer for sequence-to-sequence models.

Nothing is imported here: take what you need from `qkv_jax.ops`, `qkv_jax.models`,
`qkv_jax.training` and their neighbours.
"""

__version__ = "0.1.0.dev0"
