"""What a hypothesis's log-probability is divided by, so that long ones are not always worse."""

import dataclasses
import math

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class LengthPenalty:
    """`((offset + length) / (offset + 1)) ** alpha`: 1 at length 1, and monotone in the length.

    Attributes:
        alpha: 0 compares raw log-probabilities, positive favours long hypotheses, negative short.
        offset: at least 0; the larger, the flatter the penalty is over short lengths.

    Raises:
        ValueError: alpha is not finite, or offset is negative or not finite.
    """

    alpha: float
    offset: float = 0.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.alpha):
            raise ValueError(f"alpha must be finite; got {self.alpha}.")
        if not (math.isfinite(self.offset) and self.offset >= 0):
            raise ValueError(
                f"offset must be finite and at least 0; got {self.offset}."
            )

    def __call__(self, lengths: jax.Array) -> jax.Array:
        """Divisors, float32, of generated lengths (any shape, EOS counted, at least 1)."""
        relative = (lengths.astype(jnp.float32) + self.offset) / (self.offset + 1.0)
        return relative**self.alpha


def power(alpha: float) -> LengthPenalty:
    """`length ** alpha`; with alpha 1 a score is the mean log-probability of a token."""
    return LengthPenalty(alpha)


def gnmt(alpha: float) -> LengthPenalty:
    """`((5 + length) / 6) ** alpha`.

    Source: Wu et al. 2016, arXiv 1609.08144, eq. 14, without its coverage penalty.
    """
    return LengthPenalty(alpha, offset=5.0)


PER_TOKEN = power(1.0)  # the searches' default, as in fairseq and transformers
