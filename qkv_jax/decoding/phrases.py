"""Forced phrases: which tokens keep them within reach, and a beam shared out by progress.

Source: Post and Vilar 2018, arXiv 1804.06609 (dynamic beam allocation). Differences: progress is
read off the tokens, so an occurrence counts however it came about; tokens after which the limit
would leave no room are ruled out, which is what makes the guarantee hold for any beam.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qkv_jax.decoding.candidates import Candidates, top_candidates
from qkv_jax.decoding.hypotheses import take

NOTHING = -2  # equals no token and no padding of a phrase


class Progress(NamedTuple):
    """How far hypotheses have come.

    Attributes:
        met: (B, Z, C) bool: the phrase occurs. True for an empty one.
        matched: (B, Z, C, L) bool: the last j tokens are the first j of the phrase, which is
            longer than j and not met.
        needed: (B, Z) int32: tokens that suffice for what is unmet, one phrase after the other,
            the one that has come furthest continued. 0: all are met.
    """

    met: jax.Array
    matched: jax.Array
    needed: jax.Array


def progress(phrases: jax.Array, tokens: jax.Array, length: jax.Array) -> Progress:
    """Progress of hypotheses tokens (B, Z, M), of which the first length () count.

    Phrases are (B, C, L), padded on the right by negative ids.
    """
    C, L = phrases.shape[1:]
    B, Z, M = tokens.shape
    phrases = phrases[:, None]
    lengths = (phrases >= 0).sum(axis=-1, dtype=jnp.int32)
    valid = jnp.arange(M)[None, None] < length
    after = jnp.where(valid, tokens, NOTHING)
    padded = jnp.pad(after, ((0, 0), (0, 0), (L, L)), constant_values=NOTHING)
    last = lax.dynamic_slice_in_dim(padded, length, L, axis=2)

    occurs = jnp.ones((B, Z, C, M), bool)
    for i in range(L):
        wanted = phrases[..., i, None]
        occurs &= (wanted < 0) | (padded[:, :, None, L + i : L + i + M] == wanted)
    met = occurs.any(axis=-1) | (lengths == 0)

    matched = [jnp.broadcast_to(lengths > 0, met.shape)]
    for j in range(1, L):
        ends = (last[:, :, None, L - j :] == phrases[..., :j]).all(axis=-1)
        matched.append(ends & (j < lengths))
    by_length = jnp.stack(matched, axis=-1) & ~met[..., None]
    furthest = (by_length * jnp.arange(L, dtype=jnp.int32)[None, None, None]).max(
        axis=(2, 3)
    )
    needed = jnp.where(met, 0, lengths).sum(axis=-1, dtype=jnp.int32) - furthest
    return Progress(met, by_length, needed)


def within_reach(
    logits: jax.Array, phrases: jax.Array, state: Progress, room: jax.Array, eos: int
) -> jax.Array:
    """Logits (B, Z, V), -inf for tokens after which the unmet phrases need more than room (B,).

    EOS is -inf before all are met.
    """
    B, Z, vocabulary = logits.shape
    lengths = (phrases >= 0).sum(axis=-1, dtype=jnp.int32)[:, None]
    unmet = jnp.where(state.met, 0, lengths).sum(axis=-1)
    # Of a phrase's first j tokens, the next leaves all that is unmet but j + 1.
    gain = jnp.arange(1, phrases.shape[2] + 1)[None, None, None]
    continues = state.matched & (
        unmet[..., None, None] - gain <= room[:, None, None, None]
    )
    tokens = jnp.broadcast_to(phrases[:, None], continues.shape).reshape(B, Z, -1)
    tokens = jnp.where(continues.reshape(B, Z, -1), tokens, vocabulary)
    rows, hypotheses = jnp.arange(B)[:, None, None], jnp.arange(Z)[None, :, None]
    allowed = jnp.broadcast_to((unmet <= room[:, None])[..., None], logits.shape)
    allowed = allowed.at[rows, hypotheses, tokens].set(True, mode="drop")
    allowed = allowed.at[:, :, eos].set(state.needed == 0)
    return jnp.where(allowed, logits, -jnp.inf)


def pool(
    logits: jax.Array,
    normaliser: jax.Array,
    log_probs: jax.Array,
    phrases: jax.Array,
    state: Progress,
) -> Candidates:
    """(B, Z (5 + C)) distinct continuations, best first, among which a beam is shared out.

    The 2Z likeliest of hypotheses that have all phrases; of those that have not, the 2Z likeliest,
    the likeliest of each, and each that begins or continues a phrase. Any may be -inf.
    """
    beams = log_probs.shape[1]
    complete = state.needed == 0
    whole, part = (
        top_candidates(
            logits, normaliser, jnp.where(which, log_probs, -jnp.inf), count=2 * beams
        )
        for which in (complete, ~complete)
    )
    extra = _by_phrase(logits, normaliser, log_probs, phrases, state)
    known = _known(extra, part)
    extra = extra._replace(log_probs=jnp.where(known, -jnp.inf, extra.log_probs))
    both = [jnp.concatenate(group, axis=1) for group in zip(whole, part, extra)]
    best, order = lax.top_k(both[0], both[0].shape[1])
    return Candidates(best, take(both[1], order), take(both[2], order))


def _by_phrase(
    logits: jax.Array,
    normaliser: jax.Array,
    log_probs: jax.Array,
    phrases: jax.Array,
    state: Progress,
) -> Candidates:
    """(B, Z (1 + C)): of unfinished hypotheses, the likeliest token and each phrase's next one."""
    at = jnp.arange(phrases.shape[2])[None, None, None]
    at = jnp.where(state.matched, at, 0).max(axis=-1)[..., None]
    following = jnp.take_along_axis(phrases[:, None], at, axis=3)[..., 0]
    likeliest = logits.argmax(axis=-1)[..., None].astype(jnp.int32)
    tokens = jnp.concatenate(
        [likeliest, jnp.where(state.met, NOTHING, following)], axis=2
    )
    gains = jnp.take_along_axis(logits, jnp.maximum(tokens, 0), axis=2)
    totals = log_probs[..., None] + (gains - normaliser[..., None])
    real = (tokens >= 0) & (state.needed > 0)[..., None]
    totals = jnp.where(real, totals, -jnp.inf)
    parents = jnp.arange(log_probs.shape[1], dtype=jnp.int32)[None, :, None]
    parents = jnp.broadcast_to(parents, tokens.shape)
    return Candidates(*(x.reshape(len(x), -1) for x in (totals, parents, tokens)))


def _known(extra: Candidates, listed: Candidates) -> jax.Array:
    """(B, K): which of extra stand in listed, or earlier in extra."""

    def same(x: Candidates, y: Candidates) -> jax.Array:
        real = (y.log_probs > -jnp.inf)[:, None]
        parents = x.parents[:, :, None] == y.parents[:, None]
        return parents & (x.tokens[:, :, None] == y.tokens[:, None]) & real

    earlier = jnp.tri(extra.tokens.shape[1], k=-1, dtype=bool)[None]
    return same(extra, listed).any(axis=2) | (same(extra, extra) & earlier).any(axis=2)


def ranks(log_probs: jax.Array, banks: jax.Array) -> jax.Array:
    """(B, K): how many candidates of the same bank stand before each; candidates best first."""
    count = log_probs.shape[1]
    earlier = jnp.tri(count, k=-1, dtype=bool)[None]
    same = (banks[:, :, None] == banks[:, None]) & (log_probs > -jnp.inf)[:, None]
    return (same & earlier).sum(axis=2, dtype=jnp.int32)


def share_out(
    log_probs: jax.Array, needed: jax.Array, most: int, beams: int
) -> jax.Array:
    """(B, Z) indices of the candidates that stay alive, likeliest first.

    The best of every bank, the best after those, and so on; banks nearest to their end first.

    Args:
        log_probs: (B, K), best first except for those that are -inf, which are dead.
        needed: (B, K) int32 in 0 .. most: the bank.
    """
    alive = log_probs > -jnp.inf
    priority = ranks(log_probs, needed) * (most + 1) + needed
    priority = jnp.where(alive, priority, jnp.iinfo(jnp.int32).max)
    _, kept = lax.top_k(-priority, beams)
    _, order = lax.top_k(take(log_probs, kept), beams)
    return take(kept, order)
