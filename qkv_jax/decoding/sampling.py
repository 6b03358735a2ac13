"""Sampling: tokens drawn from the model's distribution, or from a part of it."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qkv_jax.decoding import truncation
from qkv_jax.decoding.constraints import Constraints
from qkv_jax.decoding.hypotheses import Hypotheses
from qkv_jax.decoding.length_penalty import PER_TOKEN
from qkv_jax.decoding.rollout import Choose, roll_out
from qkv_jax.decoding.rules import checked_rules, integers
from qkv_jax.decoding.steps import Penalty, Step


def sample(
    step: Step,
    cache: Any,
    *,
    rng: jax.Array,
    batch_size: int,
    samples: int,
    bos: int,
    eos: int,
    pad: int,
    max_length: int,
    row_ids: jax.Array | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    typical: float | None = None,
    limit: jax.Array | None = None,
    forbidden: Sequence[int] = (),
    length_penalty: Penalty = PER_TOKEN,
    prefix: jax.Array | None = None,
    constraints: Constraints | None = None,
    phrases: jax.Array | None = None,
    end_at_limit: bool = True,
) -> Hypotheses:
    """Z independent samples of every row, in the order they were drawn; some may be equal.

    Rules come first (what is ruled out is never drawn), then temperature, top_k, top_p and
    typical, in this order, as in transformers. Log-probabilities are the model's own, before all
    of these. One `lax.while_loop` that ends when all rows have; to be called inside jit. Noise is
    a function of rng, a row's id, the sample's index and the step: neither the batch, nor a row's
    place in it, nor `samples` or `max_length` change a sample. A token of probability below
    about 1e-7 is never drawn (the resolution of float32 noise).

    Args:
        step: (tokens (B, Z) int32, cache) -> (logits (B, Z, V), cache); the first tokens are BOS.
        cache: any pytree; its structure, shapes and dtypes must come back from step. All Z
            hypotheses of a row start alike; nothing is reordered.
        rng: a `jax.random` key.
        batch_size: B.
        samples: Z.
        bos, eos, pad, max_length, limit, forbidden, prefix, constraints, phrases, end_at_limit:
            as for greedy_search.
        row_ids: (B,) integers: what each row's noise is drawn by, such as its place in the
            corpus; None: its place in the batch.
        temperature: positive; logits are divided by it.
        top_k: draw from the likeliest k, at least 1; None: from all.
        top_p: draw from the fewest likeliest tokens of this probability, in (0, 1].
        typical: draw from the fewest tokens of this probability that are nearest to the expected
            surprise, in (0, 1].
        length_penalty: lengths -> divisors; it changes only `scores`.

    Returns:
        Hypotheses. A sample that the rules leave no token has score -inf and length 0.

    Raises:
        ValueError: as greedy_search; samples, row_ids or a number of the distribution is wrong.
    """
    rules = checked_rules(
        batch_size=batch_size,
        bos=bos,
        eos=eos,
        pad=pad,
        max_length=max_length,
        limit=limit,
        forbidden=forbidden,
        length_penalty=length_penalty,
        prefix=prefix,
        constraints=constraints,
        phrases=phrases,
        end_at_limit=end_at_limit,
    )
    if samples < 1:
        raise ValueError(f"samples must be at least 1; got {samples}.")
    _check_distribution(temperature, top_k, top_p, typical)
    ids = jnp.arange(batch_size) if row_ids is None else row_ids
    draw = _drawer(rng, integers("row_ids", ids, ("B",), batch_size), samples)

    def choose(logits: jax.Array, length: jax.Array) -> jax.Array:
        logits = logits / temperature
        if top_k is not None:
            logits = truncation.top_k(logits, top_k)
        if top_p is not None:
            logits = truncation.top_p(logits, top_p)
        if typical is not None:
            logits = truncation.typical(logits, typical)
        return draw(logits, length)

    return roll_out(step, cache, rules, choose, hypotheses=samples)


def _drawer(rng: jax.Array, row_ids: jax.Array, samples: int) -> Choose:
    # Threefry alone is the same under vmap and alone; a key of any kind seeds it.
    seed = jax.random.bits(rng, (2,), jnp.uint32)
    base = jax.random.wrap_key_data(seed, impl="threefry2x32")
    fold = jax.random.fold_in
    rngs = jax.vmap(fold, (None, 0))(base, row_ids)
    rngs = jax.vmap(jax.vmap(fold, (None, 0)), (0, None))(rngs, jnp.arange(samples))

    def draw(logits: jax.Array, length: jax.Array) -> jax.Array:
        def noise(rng: jax.Array) -> jax.Array:
            return jax.random.gumbel(fold(rng, length), logits.shape[2:])

        noisy = logits + jax.vmap(jax.vmap(noise))(rngs)
        # Unlike `first_argmax`, this never compares a sum with the same sum rounded otherwise.
        return jnp.argmax(noisy, axis=-1).astype(jnp.int32)

    return draw


def _check_distribution(
    temperature: float, top_k: int | None, top_p: float | None, typical: float | None
) -> None:
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(
            f"temperature must be positive and finite; got {temperature}. For the likeliest "
            "token, use greedy_search."
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1; got {top_k}.")
    for name, mass in (("top_p", top_p), ("typical", typical)):
        if mass is not None and not 0.0 < mass <= 1.0:
            raise ValueError(f"{name} must be in (0, 1]; got {mass}.")
