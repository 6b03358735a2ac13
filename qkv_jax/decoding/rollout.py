"""One loop for searches whose hypotheses do not compete: each takes the token it is told."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qkv_jax.decoding.hypotheses import Hypotheses
from qkv_jax.decoding.rules import Rules
from qkv_jax.decoding.scored import scored
from qkv_jax.decoding.steps import Step

# logits (B, Z, V) with -inf for what is ruled out, tokens before () -> tokens (B, Z) int32
Choose = Callable[[jax.Array, jax.Array], jax.Array]


class _State(NamedTuple):
    """Tokens generated so far (), and hypotheses: (B, Z, M) tokens, (B, Z) the rest."""

    length: jax.Array
    tokens: jax.Array
    last: jax.Array
    log_probs: jax.Array
    lengths: jax.Array
    alive: jax.Array
    cache: Any


def roll_out(
    step: Step, cache: Any, rules: Rules, choose: Choose, *, hypotheses: int = 1
) -> Hypotheses:
    """Z hypotheses a row, in the order of the cache's, that take what `choose` says."""
    shape = (rules.limits.shape[0], hypotheses)
    alive = jnp.broadcast_to((rules.limits > 0)[:, None], shape)
    start = _State(
        length=jnp.zeros((), jnp.int32),
        tokens=jnp.full((*shape, rules.max_length), rules.pad, jnp.int32),
        last=jnp.full(shape, rules.bos, jnp.int32),
        log_probs=jnp.where(alive, 0.0, -jnp.inf),
        lengths=jnp.zeros(shape, jnp.int32),
        alive=alive,
        cache=cache,
    )
    end = lax.while_loop(
        lambda state: state.alive.any(),
        lambda state: _advance(state, step, rules, choose),
        start,
    )
    exists = end.log_probs > -jnp.inf
    lengths = jnp.where(exists, end.lengths, 0)
    scores = end.log_probs / rules.length_penalty(jnp.maximum(lengths, 1))
    tokens = jnp.where(exists[..., None], end.tokens, rules.pad)
    return Hypotheses(tokens, scores, end.log_probs, lengths)


def _advance(state: _State, step: Step, rules: Rules, choose: Choose) -> _State:
    numbers, cache = step(state.last, state.cache)
    told = scored(
        numbers,
        rules,
        tokens=state.tokens,
        length=state.length,
        penalise_log_probs=False,
    )
    length = state.length + 1
    chosen, at_limit = choose(told.logits, state.length), length == rules.limits
    gained = told.gained(chosen)
    if rules.end_at_limit:
        chosen = jnp.where(at_limit[:, None], rules.eos, chosen)
        gained = jnp.where(at_limit[:, None], told.ended(rules.eos), gained)
    last = jnp.where(state.alive, chosen, rules.pad)
    log_probs = state.log_probs + jnp.where(state.alive, gained, 0.0)
    goes_on = (last != rules.eos) & (log_probs > -jnp.inf) & ~at_limit[:, None]
    return _State(
        length=length,
        tokens=state.tokens.at[:, :, state.length].set(last),
        last=last,
        log_probs=log_probs,
        lengths=state.lengths + state.alive,
        alive=state.alive & goes_on,
        cache=cache,
    )
