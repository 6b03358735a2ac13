"""Greedy search: the likeliest token, one after the other."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qkv_jax.decoding.hypotheses import Hypotheses
from qkv_jax.decoding.length_penalty import PER_TOKEN
from qkv_jax.decoding.steps import Penalty, Rules, Step, checked_rules, normalise


class _State(NamedTuple):
    """Tokens generated so far (), and one hypothesis a row: (B, M) tokens, (B,) the rest."""

    length: jax.Array
    tokens: jax.Array
    last: jax.Array
    log_probs: jax.Array
    lengths: jax.Array
    alive: jax.Array
    cache: Any


def greedy_search(
    step: Step,
    cache: Any,
    *,
    batch_size: int,
    bos: int,
    eos: int,
    pad: int,
    max_length: int,
    limit: jax.Array | None = None,
    forbidden: Sequence[int] = (),
    length_penalty: Penalty = PER_TOKEN,
    prefix: jax.Array | None = None,
) -> Hypotheses:
    """The hypothesis that takes the likeliest token at every step, for every row.

    One `lax.while_loop` that ends when all rows have ended; to be called inside jit. A row's
    result depends on nothing but its own logits and limit. Of equal logits the lowest id wins.

    Args:
        step: (tokens (B, 1) int32, cache) -> (logits (B, 1, V), cache); the first tokens are BOS.
        cache: any pytree; its structure, shapes and dtypes must come back from step.
        batch_size: B.
        bos: id that starts a target; never emitted, unless it is EOS.
        eos: id that ends a target.
        pad: id after EOS; never emitted.
        max_length: most tokens of any row, EOS included; static, the size of the buffer.
        limit: (B,) integers, most tokens of each row, EOS included; None: max_length for all.
            The token at the limit is EOS, whatever its probability. A row with 0 gets no
            hypothesis and costs no iterations.
        forbidden: further ids that are never emitted.
        length_penalty: lengths -> divisors; it changes only `scores` here.
        prefix: (B, P) integers, what each row starts with, negative for any token; counted in
            lengths, at no cost in log-probability. None: nothing is forced.

    Returns:
        Hypotheses with Z = 1.

    Raises:
        ValueError: an id, a size, limit's or the logits' shape is wrong.
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
    )
    return search(step, cache, rules)


def search(step: Step, cache: Any, rules: Rules) -> Hypotheses:
    """`greedy_search` of checked arguments."""
    (batch_size,) = rules.limits.shape
    start = _State(
        length=jnp.zeros((), jnp.int32),
        tokens=jnp.full((batch_size, rules.max_length), rules.pad, jnp.int32),
        last=jnp.full((batch_size,), rules.bos, jnp.int32),
        log_probs=jnp.where(rules.limits > 0, 0.0, -jnp.inf),
        lengths=jnp.zeros((batch_size,), jnp.int32),
        alive=rules.limits > 0,
        cache=cache,
    )
    end = lax.while_loop(
        lambda state: state.alive.any(),
        lambda state: _advance(state, step, rules),
        start,
    )
    exists = end.log_probs > -jnp.inf
    lengths = jnp.where(exists, end.lengths, 0)
    scores = end.log_probs / rules.length_penalty(jnp.maximum(lengths, 1))
    tokens = jnp.where(exists[:, None], end.tokens, rules.pad)
    return Hypotheses(
        tokens[:, None], scores[:, None], end.log_probs[:, None], lengths[:, None]
    )


def _advance(state: _State, step: Step, rules: Rules) -> _State:
    logits, cache = step(state.last[:, None], state.cache)
    logits, normaliser = normalise(
        logits, rules, tokens=state.last[:, None], length=state.length
    )
    logits, normaliser = logits[:, 0], normaliser[:, 0]
    length = state.length + 1
    chosen = jnp.where(length == rules.limits, rules.eos, _first_argmax(logits))
    gained = jnp.take_along_axis(logits, chosen[:, None], axis=-1)[:, 0] - normaliser
    last = jnp.where(state.alive, chosen, rules.pad)
    log_probs = state.log_probs + jnp.where(state.alive, gained, 0.0)
    return _State(
        length=length,
        tokens=state.tokens.at[:, state.length].set(last),
        last=last,
        log_probs=log_probs,
        lengths=state.lengths + state.alive,
        alive=state.alive & (last != rules.eos) & (log_probs > -jnp.inf),
        cache=cache,
    )


def _first_argmax(logits: jax.Array) -> jax.Array:
    """`jnp.argmax` over the last axis of (B, V), int32; 4x faster on CPU at V = 8000."""
    ids = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    best = logits.max(axis=-1, keepdims=True)
    return jnp.where(logits == best, ids, logits.shape[1] - 1).min(axis=-1)
