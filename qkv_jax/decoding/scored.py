"""What a step's numbers become under a search's rules."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qkv_jax.decoding import phrases as forced
from qkv_jax.decoding.constraints import completing, penalise_repetition, repeating
from qkv_jax.decoding.rules import Rules
from qkv_jax.decoding.steps import LogProbs, normalise


class Scored(NamedTuple):
    """What a step's numbers become.

    Attributes:
        logits: (B, Z, V) float32, what is compared; -inf may not be chosen.
        normaliser: (B, Z) float32: logits less it are what a token adds to a hypothesis.
        ending: (B, Z) float32: what EOS adds where the limit asks for it; -inf: it may not.
        own: (B, Z, V) float32, the model's log-probabilities; None: what a token adds.
        progress: of the forced phrases, before this token; None: there are none.
    """

    logits: jax.Array
    normaliser: jax.Array
    ending: jax.Array
    own: jax.Array | None
    progress: forced.Progress | None

    def gained(self, tokens: jax.Array) -> jax.Array:
        """(B, Z): the model's log-probabilities of tokens (B, Z); -inf for what is ruled out."""

        def at(numbers: jax.Array) -> jax.Array:
            return jnp.take_along_axis(numbers, tokens[..., None], axis=-1)[..., 0]

        added = at(self.logits) - self.normaliser
        if self.own is None:
            return added
        return jnp.where(added == -jnp.inf, added, at(self.own))

    def ended(self, eos: int) -> jax.Array:
        """(B, Z): `gained` of EOS where the limit asks for it."""
        if self.own is None:
            return self.ending
        return jnp.where(self.ending == -jnp.inf, self.ending, self.own[..., eos])


def scored(
    logits: jax.Array | LogProbs,
    rules: Rules,
    *,
    tokens: jax.Array,
    length: jax.Array,
    penalise_log_probs: bool,
) -> Scored:
    """What a step returned, under the rules.

    Log-probabilities are the model's own: what is ruled out keeps its probability, as in fairseq,
    Marian and transformers, so that a score does not depend on what was ruled out. A token of the
    prefix has probability 1.

    Args:
        logits: what step returned.
        rules: the search's.
        tokens: (B, Z, M), of which the first `length` were generated.
        length: () int32.
        penalise_log_probs: whether the repetition penalty is of log-probabilities, or of logits.

    Raises:
        ValueError: logits are not (B, Z, V), or an id is not below V.
    """
    _check_logits(logits, rules, tokens.shape[:2])
    logits, normaliser = normalise(logits)
    own, state, wanted = None, None, rules.constraints
    seen = jnp.pad(tokens, ((0, 0), (0, 0), (1, 0)), constant_values=rules.bos)
    if wanted.repetition_penalty != 1.0:
        own = logits - normaliser[..., None]
        if penalise_log_probs:
            logits, normaliser = own, jnp.zeros_like(normaliser)
        logits = penalise_repetition(
            logits, seen, length + 1, wanted.repetition_penalty
        )
    logits = logits.at[..., jnp.array(rules.excluded)].set(-jnp.inf)
    logits = _rule_out(logits, rules, seen, length)
    if rules.phrases is not None:
        state = forced.progress(rules.phrases, tokens, length)
        room = rules.limits - (length + 1) - int(rules.end_at_limit)
        logits = forced.within_reach(logits, rules.phrases, state, room, rules.eos)
    ending = logits[..., rules.eos] - normaliser
    if wanted.min_length:
        shortened = jnp.where(length < wanted.min_length, -jnp.inf, 0.0)
        logits = logits.at[..., rules.eos].add(shortened)
    result = Scored(logits, normaliser, ending, own, state)
    return result if rules.prefix is None else _force(result, rules, length)


def _check_logits(
    logits: jax.Array | LogProbs, rules: Rules, shape: tuple[int, ...]
) -> None:
    array = logits.values if isinstance(logits, LogProbs) else logits
    if array.ndim != 3 or array.shape[:2] != shape:
        raise ValueError(
            f"step must return logits (B, Z, V) = ({shape[0]}, {shape[1]}, V); got {array.shape}."
        )
    vocabulary = array.shape[-1]
    if max(rules.eos, *rules.excluded) >= vocabulary:
        raise ValueError(
            f"eos, pad, bos and forbidden must be below V = {vocabulary}; "
            f"got {(rules.eos, *rules.excluded)}."
        )
    ids = [i for phrase in rules.constraints.banned_phrases for i in phrase]
    if max(ids, default=0) >= vocabulary:
        raise ValueError(
            f"banned_phrases must be of ids below V = {vocabulary}; got {max(ids)}."
        )


def _rule_out(
    logits: jax.Array, rules: Rules, seen: jax.Array, length: jax.Array
) -> jax.Array:
    """-inf for what would repeat an n-gram or complete a banned phrase."""
    wanted, vocabulary = rules.constraints, logits.shape[-1]
    if wanted.no_repeat_ngram:
        banned = repeating(seen, length + 1, wanted.no_repeat_ngram, vocabulary)
        if banned is not None:
            banned = banned.at[..., rules.eos].set(False)
            logits = jnp.where(banned, -jnp.inf, logits)
    longer = tuple(phrase for phrase in wanted.banned_phrases if len(phrase) > 1)
    if longer:
        banned = completing(seen, length + 1, longer, vocabulary)
        logits = jnp.where(banned, -jnp.inf, logits)
    return logits


def _force(result: Scored, rules: Rules, length: jax.Array) -> Scored:
    """The token of the prefix alone, at no cost."""
    prefix = rules.prefix
    assert prefix is not None
    at = jnp.minimum(length, prefix.shape[1] - 1)
    wanted = jnp.where(length < prefix.shape[1], prefix[:, at], -1)[:, None]
    is_forced = wanted >= 0
    ids = jax.lax.broadcasted_iota(jnp.int32, result.logits.shape, 2)
    only = jnp.where(ids == wanted[..., None], 0.0, -jnp.inf)
    end = jnp.where(wanted == rules.eos, 0.0, -jnp.inf)
    own = result.own
    return result._replace(
        logits=jnp.where(is_forced[..., None], only, result.logits),
        normaliser=jnp.where(is_forced, 0.0, result.normaliser),
        ending=jnp.where(is_forced, end, result.ending),
        own=None if own is None else jnp.where(is_forced[..., None], 0.0, own),
    )
