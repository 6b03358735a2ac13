"""Connectionist temporal classification (CTC): its greedy path, and its scores of prefixes.

CTC gives every frame a distribution over V units, of which unit 0 is the blank; a path through the
frames spells what is left after repeats are merged and blanks removed (Graves et al. 2006). The
searches of this folder go over units, not frames: `prefix_step` lets them search CTC alone, which
is prefix beam search, and `joint_step` CTC together with a decoder. Their `pad` is the blank.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qkv_jax.decoding.steps import LogProbs, ReorderableCache, Step, normalise

Array = jax.Array

# In place of -inf: the difference of two is 0 and not NaN.
LOG_ZERO = -1e30


def ctc_greedy(logits: Array, lengths: Array) -> Array:
    """What the likeliest unit of every frame spells.

    Args:
        logits: (B, T, V).
        lengths: (B,) frames.

    Returns:
        (B, T) int32, filled up with 0.
    """
    B, T, _ = logits.shape
    path = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    path = jnp.where(jnp.arange(T)[None] < lengths[:, None], path, 0)
    before = jnp.pad(path[:, :-1], ((0, 0), (1, 0)))
    kept = (path != before) & (path != 0)
    place = jnp.where(kept, jnp.cumsum(kept, axis=1) - 1, T)
    spelled = jnp.zeros((B, T), jnp.int32)
    return spelled.at[jnp.arange(B)[:, None], place].set(path, mode="drop")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PrefixCache:
    """How the frames can spell each hypothesis so far.

    Attributes:
        log_probs: (B, T, V) of the units at each frame; beyond a row's frames, the blank is sure.
        blank, unit: (B, Z, T + 1): log-probability of the paths through the first t frames that
            spell the hypothesis and end with the blank, or with its last unit.
        prefix: (B, Z): log-probability that what the frames spell begins with the hypothesis.
        last: (B, Z) int32: its last unit; 0: it is empty.
        begun: () bool: whether the next step is told a unit, and not BOS.
    """

    log_probs: Array
    blank: Array
    unit: Array
    prefix: Array
    last: Array
    begun: Array

    @classmethod
    def start(cls, logits: Array, lengths: Array, *, hypotheses: int) -> "PrefixCache":
        """Z empty hypotheses of each row, from logits (B, T, V) of lengths (B,) frames."""
        B, T, V = logits.shape
        inside = (jnp.arange(T)[None] < lengths[:, None])[..., None]
        sure = jnp.where(jnp.arange(V) == 0, 0.0, LOG_ZERO)[None, None]
        log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
        log_probs = jnp.where(inside, log_probs, sure)
        silent = jnp.pad(jnp.cumsum(log_probs[..., 0], axis=1), ((0, 0), (1, 0)))
        shape = (B, hypotheses, T + 1)
        return cls(
            log_probs=log_probs,
            blank=jnp.broadcast_to(silent[:, None], shape),
            unit=jnp.full(shape, LOG_ZERO),
            prefix=jnp.zeros((B, hypotheses)),
            last=jnp.zeros((B, hypotheses), jnp.int32),
            begun=jnp.zeros((), bool),
        )

    def reorder(self, parents: Array) -> "PrefixCache":
        """New hypothesis z of row b continues old hypothesis parents[b, z]; (B, Z) int32."""

        def taken(x: Array) -> Array:
            return jax.vmap(lambda row, index: row[index])(x, parents)

        return replace(
            self,
            blank=taken(self.blank),
            unit=taken(self.unit),
            prefix=taken(self.prefix),
            last=taken(self.last),
        )

    def told(self, units: Array) -> "PrefixCache":
        """The cache after units (B, Z) were added to the hypotheses; in the first step, as it is."""
        longer = replace(self._longer(units), begun=jnp.ones((), bool))
        first = replace(self, begun=jnp.ones((), bool))
        return jax.tree.map(
            lambda new, old: jnp.where(self.begun, new, old), longer, first
        )

    def _longer(self, units: Array) -> "PrefixCache":
        at = jnp.swapaxes(self.log_probs, 1, 2)  # (B, V, T)
        at = jax.vmap(lambda row, index: row[index])(at, units)
        silent = self.log_probs[:, None, :, 0]
        starts = self._before(units) + at

        def frame(paths: tuple[Array, Array], now) -> tuple[Any, Any]:
            blank, unit = paths
            start, at, silent = now
            paths = (
                jnp.logaddexp(blank, unit) + silent,
                jnp.logaddexp(unit + at, start),
            )
            return paths, paths

        none = jnp.full(units.shape, LOG_ZERO)
        frames = (starts, at, jnp.broadcast_to(silent, at.shape))
        over = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), frames)
        _, paths = lax.scan(frame, (none, none), over)
        blank, unit = (
            jnp.concatenate([none[..., None], jnp.moveaxis(x, 0, 2)], axis=2)
            for x in paths
        )
        prefix = jax.nn.logsumexp(starts, axis=2)
        return replace(
            self, blank=blank, unit=unit, prefix=prefix, last=units.astype(jnp.int32)
        )

    def _before(self, units: Array) -> Array:
        """(B, Z, T): paths after which units (B, Z) can begin at each frame."""
        either = jnp.logaddexp(self.blank, self.unit)
        same = (units == self.last)[..., None]
        return jnp.where(same, self.blank, either)[..., :-1]

    def gains(self, eos: int) -> Array:
        """(B, Z, V): what each unit adds to the log-probability of the prefix; EOS: the end."""
        either = jnp.logaddexp(self.blank, self.unit)
        units = jnp.arange(self.log_probs.shape[2])
        repeated = _begins(self.blank[..., :-1], self.log_probs)
        totals = jnp.where(
            units[None, None] == self.last[..., None],
            repeated,
            _begins(either[..., :-1], self.log_probs),
        )
        totals = totals.at[..., eos].set(either[..., -1])
        return totals - self.prefix[..., None]


def _begins(before: Array, log_probs: Array) -> Array:
    """log sum over t of exp(before (B, Z, T) + log_probs (B, T, V)): (B, Z, V)."""
    top = before.max(axis=2, keepdims=True)
    sums = jnp.einsum("BZT,BTV->BZV", jnp.exp(before - top), jnp.exp(log_probs))
    return jnp.where(sums > 0, jnp.log(sums) + top, LOG_ZERO)


def prefix_step(*, eos: int) -> Step:
    """A step over `PrefixCache`: with it `beam_search` is prefix beam search of CTC alone.

    Source: the scores are those of Watanabe et al. 2017, "Hybrid CTC/attention architecture for
    end-to-end speech recognition", algorithm 2, for all units at once.
    """

    def step(tokens: Array, cache: PrefixCache) -> tuple[LogProbs, PrefixCache]:
        cache = cache.told(tokens)
        return LogProbs(cache.gains(eos)), cache

    return step


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class JointCache:
    """The caches of CTC and of a decoder."""

    prefixes: PrefixCache
    decoder: Any

    def reorder(self, parents: Array) -> "JointCache":
        """As `ReorderableCache`."""
        decoder: ReorderableCache = self.decoder
        return JointCache(
            prefixes=self.prefixes.reorder(parents), decoder=decoder.reorder(parents)
        )


def joint_step(step: Step, *, weight: float, eos: int) -> Step:
    """A step over `JointCache`: weight * CTC's gain + (1 - weight) * the decoder's log-probability.

    Args:
        step: the decoder's.
        weight: of CTC, in [0, 1].
        eos: ends a target.

    Source: one-pass decoding of Watanabe et al. 2017, eq. 40.
    """
    if not 0.0 <= weight <= 1.0:
        raise ValueError(f"weight must be in [0, 1]; got {weight}.")

    def joint(tokens: Array, cache: JointCache) -> tuple[LogProbs, JointCache]:
        prefixes = cache.prefixes.told(tokens)
        logits, decoder = step(tokens, cache.decoder)
        values, normaliser = normalise(logits)
        own = values - normaliser[..., None]
        total = weight * prefixes.gains(eos) + (1.0 - weight) * own
        return LogProbs(total), JointCache(prefixes=prefixes, decoder=decoder)

    return joint
