"""Beam search with separate lists of alive and finished hypotheses."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qkv_jax.decoding import greedy
from qkv_jax.decoding.candidates import Candidates, top_candidates
from qkv_jax.decoding.hypotheses import Hypotheses, empty, merge, take
from qkv_jax.decoding.length_penalty import PER_TOKEN
from qkv_jax.decoding.steps import (
    Penalty,
    ReorderableCache,
    Rules,
    Step,
    checked_rules,
    normalise,
)


class _State(NamedTuple):
    """Tokens generated so far (), and the alive hypotheses (B, Z), likeliest first.

    A hypothesis with log-probability -inf is dead; a row is done when all of its are.
    """

    length: jax.Array
    tokens: jax.Array
    last: jax.Array
    log_probs: jax.Array
    finished: Hypotheses
    cache: ReorderableCache


def beam_search(
    step: Step,
    cache: ReorderableCache,
    *,
    batch_size: int,
    beams: int,
    bos: int,
    eos: int,
    pad: int,
    max_length: int,
    limit: jax.Array | None = None,
    forbidden: Sequence[int] = (),
    length_penalty: Penalty = PER_TOKEN,
    prefix: jax.Array | None = None,
    exact: bool = True,
) -> Hypotheses:
    """The Z best hypotheses of every row that a beam of Z finds.

    A step takes the 2Z likeliest continuations of a row. Those of the first Z that end go to the
    finished list (at most Z, by score); the Z likeliest that do not end stay alive, so an ending
    never costs a place in the beam. A row is done when Z have finished and the likeliest alive one,
    even if all its further tokens were certain and its length the best allowed, could not beat the
    worst of them (`early_stopping="never"` in transformers, with the exact bound for any alpha).

    One `lax.while_loop` that ends when all rows are done; to be called inside jit. A row's result
    depends on nothing but its own logits and limit. Of equal ones the lowest (hypothesis, token)
    wins. `beams=1` is greedy search: nothing competes, and reorder is not called.

    Args:
        step: (tokens (B, Z) int32, cache) -> (logits (B, Z, V), cache); the first tokens are BOS.
        cache: pytree with `reorder(parents (B, Z)) -> cache`; its structure, shapes and dtypes
            must come back from step and reorder. All Z hypotheses of a row start alike.
        batch_size: B.
        beams: Z.
        bos: id that starts a target; never emitted, unless it is EOS.
        eos: id that ends a target.
        pad: id after EOS; never emitted.
        max_length: most tokens of any hypothesis, EOS included; static, the size of the buffer.
        limit: (B,) integers, most tokens of each row, EOS included; None: max_length for all.
            The token at the limit is EOS and costs its log-probability. A row with 0 gets no
            hypothesis and costs no iterations.
        forbidden: further ids that are never emitted.
        length_penalty: lengths -> positive divisors, monotone in the length.
        prefix: (B, P) integers, what each row starts with, negative for any token; counted in
            lengths, at no cost in log-probability. None: nothing is forced.
        exact: False ends a row already when no alive hypothesis would win by ending with its next
            token. With a penalty that favours length, this takes far fewer iterations (the bound
            above is loose until near the limit) and can miss a better, longer hypothesis; with
            one that does not, the result is the same.

    Returns:
        Hypotheses, best first.

    Raises:
        ValueError: an id, a size, limit's or the logits' shape is wrong.

    Source: the two lists are those of tensor2tensor and flax/examples/wmt; that only the first Z
    continuations may end is fairseq's and transformers' rule.
    """
    if beams < 1:
        raise ValueError(f"beams must be at least 1; got {beams}.")
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
    if beams == 1:
        return greedy.search(step, cache, rules)
    end = lax.while_loop(
        lambda state: (state.log_probs > -jnp.inf).any(),
        lambda state: _advance(state, step, rules, exact),
        _start(cache, rules, beams),
    )
    return end.finished


def _start(cache: ReorderableCache, rules: Rules, beams: int) -> _State:
    """All Z hypotheses of a row are the same at first, so only one of them is alive."""
    shape = (rules.limits.shape[0], beams, rules.max_length)
    first = jnp.arange(beams)[None] == 0
    return _State(
        length=jnp.zeros((), jnp.int32),
        tokens=jnp.full(shape, rules.pad, jnp.int32),
        last=jnp.full(shape[:2], rules.bos, jnp.int32),
        log_probs=jnp.where(first & (rules.limits > 0)[:, None], 0.0, -jnp.inf),
        finished=empty(shape, rules.pad),
        cache=cache,
    )


def _advance(state: _State, step: Step, rules: Rules, exact: bool) -> _State:
    beams = state.last.shape[1]
    logits, cache = step(state.last, state.cache)
    logits, normaliser = normalise(
        logits, rules, tokens=state.last, length=state.length
    )
    length = state.length + 1
    free = top_candidates(logits, normaliser, state.log_probs, count=2 * beams)
    forced = _only_eos(
        state.log_probs + (logits[..., rules.eos] - normaliser), rules.eos
    )
    at_limit = (length == rules.limits)[:, None]
    candidates = jax.tree.map(lambda *pair: jnp.where(at_limit, *pair), forced, free)
    tokens = take(state.tokens, candidates.parents)
    tokens = tokens.at[:, :, state.length].set(candidates.tokens)
    finished = merge(state.finished, _ended(candidates, tokens, length, rules))

    goes_on = jnp.where(candidates.tokens == rules.eos, -jnp.inf, candidates.log_probs)
    log_probs, kept = lax.top_k(goes_on, beams)
    longest = jnp.maximum(rules.limits, length + 1) if exact else length + 1
    can_improve = (
        _bound(log_probs[:, 0], length + 1, longest, rules.length_penalty)
        > finished.scores[:, -1]
    )
    log_probs = jnp.where(can_improve[:, None], log_probs, -jnp.inf)
    return _State(
        length=length,
        tokens=take(tokens, kept),
        last=jnp.where(log_probs > -jnp.inf, take(candidates.tokens, kept), rules.pad),
        log_probs=log_probs,
        finished=finished,
        cache=cache.reorder(take(candidates.parents, kept)),
    )


def _only_eos(log_probs: jax.Array, eos: int) -> Candidates:
    """(B, 2Z) candidates where hypotheses, with log_probs (B, Z) if EOS follows, must end."""
    padded = jnp.pad(
        log_probs, ((0, 0), (0, log_probs.shape[1])), constant_values=-jnp.inf
    )
    best, order = lax.top_k(padded, padded.shape[1])
    return Candidates(best, order % log_probs.shape[1], jnp.full_like(order, eos))


def _ended(
    candidates: Candidates, tokens: jax.Array, length: jax.Array, rules: Rules
) -> Hypotheses:
    """(B, 2Z) hypotheses; score -inf for those that do not end or are not of the first Z."""
    count = candidates.tokens.shape[1]
    ends = (candidates.tokens == rules.eos) & (jnp.arange(count)[None] < count // 2)
    log_probs = jnp.where(ends, candidates.log_probs, -jnp.inf)
    scores = log_probs / rules.length_penalty(length)
    return Hypotheses(tokens, scores, log_probs, jnp.broadcast_to(length, scores.shape))


def _bound(
    log_probs: jax.Array,
    shortest: jax.Array,
    longest: jax.Array,
    length_penalty: Penalty,
) -> jax.Array:
    """(B,): what hypotheses with log_probs (B,) can score at most, if of these lengths.

    Log-probabilities only fall, and a monotone divisor is greatest at one of its ends.
    """
    return log_probs / jnp.maximum(length_penalty(shortest), length_penalty(longest))
