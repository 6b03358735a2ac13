"""Beam search with separate lists of alive and finished hypotheses."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qkv_jax.decoding import phrases as forced
from qkv_jax.decoding.candidates import Candidates, top_candidates
from qkv_jax.decoding.constraints import Constraints
from qkv_jax.decoding.greedy import first_argmax
from qkv_jax.decoding.hypotheses import Hypotheses, empty, merge, take
from qkv_jax.decoding.length_penalty import PER_TOKEN
from qkv_jax.decoding.rollout import roll_out
from qkv_jax.decoding.rules import Rules, checked_rules
from qkv_jax.decoding.scored import Scored, scored
from qkv_jax.decoding.steps import Penalty, ReorderableCache, Step


class _State(NamedTuple):
    """Tokens generated so far (), and the alive hypotheses (B, Z), likeliest first.

    A hypothesis with log-probability -inf is dead; a row is done when all of its are. `own` is
    what the model gives them where log_probs are penalised; None: the same.
    """

    length: jax.Array
    tokens: jax.Array
    last: jax.Array
    log_probs: jax.Array
    own: jax.Array | None
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
    constraints: Constraints | None = None,
    phrases: jax.Array | None = None,
    end_at_limit: bool = True,
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
            lengths, at no cost in log-probability. None: nothing is forced. A row without room
            for it and EOS gets no hypothesis.
        constraints: rules for every row; None: none.
        phrases: (B, C, L) integers, sequences that every hypothesis of a row has to hold, in any
            order, overlaps allowed; padded on the right by negative ids, and unused ones all
            negative. The beam is shared out by how far hypotheses have come, and a token after
            which the limit would not leave room for the phrases still to come, one after the
            other, is ruled out. So a row has a hypothesis whenever its limit leaves room after
            the prefix for all phrases in a row and EOS, and the model and the other rules allow
            their tokens; otherwise it may have none. A phrase must not hold EOS or PAD.
        end_at_limit: False lets the token at the limit be any, as transformers does; a
            hypothesis without EOS then counts as finished.
        exact: False ends a row already when no alive hypothesis would win by ending with its next
            token. With a penalty that favours length, this takes far fewer iterations (the bound
            above is loose until near the limit) and can miss a better, longer hypothesis; with
            one that does not, the result is the same.

    Returns:
        Hypotheses, best first.

    Raises:
        ValueError: an id, a size, or the shape of limit, prefix, phrases or the logits is wrong.

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
        constraints=constraints,
        phrases=phrases,
        end_at_limit=end_at_limit,
    )
    if beams == 1:
        return roll_out(step, cache, rules, first_argmax)
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
    log_probs = jnp.where(first & (rules.limits > 0)[:, None], 0.0, -jnp.inf)
    penalised = rules.constraints.repetition_penalty != 1.0
    return _State(
        length=jnp.zeros((), jnp.int32),
        tokens=jnp.full(shape, rules.pad, jnp.int32),
        last=jnp.full(shape[:2], rules.bos, jnp.int32),
        log_probs=log_probs,
        own=log_probs if penalised else None,
        finished=empty(shape, rules.pad),
        cache=cache,
    )


def _advance(state: _State, step: Step, rules: Rules, exact: bool) -> _State:
    beams = state.last.shape[1]
    numbers, cache = step(state.last, state.cache)
    told = scored(
        numbers,
        rules,
        tokens=state.tokens,
        length=state.length,
        penalise_log_probs=True,
    )
    length = state.length + 1
    at_limit = (length == rules.limits)[:, None]
    candidates = _candidates(state, told, rules, at_limit)
    own = _own(state, told, candidates)
    tokens = take(state.tokens, candidates.parents)
    tokens = tokens.at[:, :, state.length].set(candidates.tokens)

    ends = candidates.tokens == rules.eos
    ends = ends if rules.end_at_limit else ends | at_limit
    goes_on = jnp.where(ends, -jnp.inf, candidates.log_probs)
    if rules.phrases is None:
        ranks = jnp.arange(2 * beams)[None]
        log_probs, kept = lax.top_k(goes_on, beams)
    else:
        needed = forced.progress(rules.phrases, tokens, length).needed
        ranks = forced.ranks(candidates.log_probs, needed)
        kept = forced.share_out(goes_on, needed, rules.phrases[0].size, beams)
        log_probs = take(goes_on, kept)
    finished = merge(
        state.finished,
        _ended(candidates, own, ends & (ranks < beams), tokens, length, rules),
    )

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
        own=None if own is None else take(own, kept),
        finished=finished,
        cache=cache.reorder(take(candidates.parents, kept)),
    )


def _candidates(
    state: _State, told: Scored, rules: Rules, at_limit: jax.Array
) -> Candidates:
    """(B, K) continuations of each row, best first; K is 2Z where no phrase is forced."""
    if told.progress is None or rules.phrases is None:
        count = 2 * state.last.shape[1]
        free = top_candidates(
            told.logits, told.normaliser, state.log_probs, count=count
        )
    else:
        free = forced.pool(
            told.logits, told.normaliser, state.log_probs, rules.phrases, told.progress
        )
    if not rules.end_at_limit:
        return free
    count = free.tokens.shape[1]
    only = _only_eos(state.log_probs + told.ending, rules.eos, count=count)
    return jax.tree.map(lambda *pair: jnp.where(at_limit, *pair), only, free)


def _only_eos(log_probs: jax.Array, eos: int, *, count: int) -> Candidates:
    """(B, K) candidates where hypotheses, with log_probs (B, Z) if EOS follows, must end."""
    beams = log_probs.shape[1]
    padded = jnp.pad(log_probs, ((0, 0), (0, count - beams)), constant_values=-jnp.inf)
    best, order = lax.top_k(padded, count)
    return Candidates(best, order % beams, jnp.full_like(order, eos))


def _own(state: _State, told: Scored, candidates: Candidates) -> jax.Array | None:
    """(B, K): log-probabilities that the model gives the candidates; None: the same."""
    if state.own is None or told.own is None:
        return None
    rows = jnp.arange(candidates.tokens.shape[0])[:, None]
    gained = told.own[rows, candidates.parents, candidates.tokens]
    return take(state.own, candidates.parents) + gained


def _ended(
    candidates: Candidates,
    own: jax.Array | None,
    ends: jax.Array,
    tokens: jax.Array,
    length: jax.Array,
    rules: Rules,
) -> Hypotheses:
    """(B, K) hypotheses; score -inf for those that do not end."""
    totals = jnp.where(ends, candidates.log_probs, -jnp.inf)
    scores = totals / rules.length_penalty(length)
    log_probs = totals if own is None else jnp.where(totals > -jnp.inf, own, -jnp.inf)
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
