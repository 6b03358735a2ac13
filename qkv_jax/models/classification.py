"""The loss of classifiers, and what is measured beside it."""

import jax
import jax.numpy as jnp
import optax

Array = jax.Array


def class_sums(
    logits: Array, labels: Array, weight: Array, *, smoothing: float
) -> dict[str, Array]:
    """Float32 sums over rows of cross-entropy, plain and with smoothed labels, and of hits.

    Args:
        logits: (B, V).
        labels: (B,) int.
        weight: (B,) float32, of each row.
        smoothing: share of a label's probability that is given to all classes, in [0, 1).

    Returns:
        "loss_sum", "nll_sum", "accuracy_sum" and "tokens", the sum of the weights.
    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    target = jax.nn.one_hot(labels, logits.shape[-1], dtype=jnp.float32)
    smooth = optax.smooth_labels(target, smoothing)
    right = jnp.argmax(logits, axis=-1) == labels
    return {
        "loss_sum": -jnp.sum(weight[:, None] * smooth * log_probs),
        "nll_sum": -jnp.sum(weight[:, None] * target * log_probs),
        "accuracy_sum": jnp.sum(weight * right),
        "tokens": jnp.sum(weight),
    }
