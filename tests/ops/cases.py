"""The cases that every implementation of attention has to get right.

A case states its mask twice: as the package's Mask, and as a plain Python rule that the oracle
asks pair by pair. The same for its score.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from qkv_jax.ops import masks, scores


def everyone(b, h, q, k):
    return True


def identity(score, b, h, q, k):
    return score, 1.0


@dataclass(frozen=True, kw_only=True)
class Case:
    """Attributes:
    name: what is special.
    B, T, S, N, K, H, E: the sizes.
    mask, rule: a function that makes the Mask, and what it means.
    score, curve: a function that makes the Score, and what it means: (new score, slope).
    scale: None: the default.
    poison: (b, k) where key and value are NaN and inf; the rule lets nobody see them.
    bf16: whether the case is run in bfloat16 too.
    """

    name: str
    B: int = 2
    T: int = 5
    S: int = 5
    N: int = 2
    K: int = 2
    H: int = 3
    E: int = 3
    mask: Callable = lambda: None
    rule: Callable = everyone
    score: Callable = lambda: None
    curve: Callable = identity
    scale: float | None = None
    poison: tuple[tuple[int, int], ...] = ()
    bf16: bool = False

    def arrays(self, dtype):
        """query, key, value and the cotangents of output and log-sum-exp, numpy."""
        rng = np.random.default_rng(7)
        B, T, S, N, K, H, E = (getattr(self, name) for name in "BTSNKHE")
        shapes = (B, T, N, H), (B, S, K, H), (B, S, K, E), (B, T, N, E), (B, T, N)
        query, key, value, d_out, d_lse = (rng.normal(size=shape) for shape in shapes)
        for b, k in self.poison:
            key[b, k], value[b, k] = np.nan, np.inf
            key[b, k, 0, 0], value[b, k, 0, 0] = -np.inf, np.nan
        wide = jnp.promote_types(dtype, jnp.float32)
        return *(x.astype(dtype) for x in (query, key, value, d_out)), d_lse.astype(
            wide
        )


def ints(*values):
    return np.array(values, np.int32)


def _random(*shape, seed=3):
    return np.random.default_rng(seed).normal(size=shape)


QUERY_SEGMENTS = ints([1, 1, 2, 2, 3], [4, 5, 5, 5, 9])
KEY_SEGMENTS = ints([1, 1, 1, 2, 2, 3, 3], [4, 4, 5, 5, 5, 5, 7])
PAIRS = _random(2, 2, 5, 7) > 0.0
FULL = {"B": 2, "N": 2, "T": 5, "S": 7}
BIAS = _random(2, 2, 5, 7)
SLOPES = np.array([0.5, 0.25])
TABLE = _random(8, 2)
SPANS = np.array([0.7, 2.4])

SHAPES = [
    Case(name="plain", bf16=True),
    Case(name="T > S", T=7, S=4),
    Case(name="T < S, prime, E != H", B=3, T=11, S=13, H=5, E=7, bf16=True),
    Case(name="grouped heads", N=6, K=2, S=7),
    Case(name="one key head", N=3, K=1, E=2, bf16=True),
    Case(name="one query", T=1, S=7),
    Case(name="one key", S=1),
    Case(name="one of everything", B=1, T=1, S=1, N=1, K=1, H=1, E=1),
    Case(name="no keys", S=0),
    Case(name="no queries", T=0),
    Case(name="scale", scale=0.3),
    Case(name="scale 0", scale=0.0),
    Case(name="scores of hundreds", scale=200.0),
]

MASKS = [
    Case(
        name="causal",
        mask=lambda: masks.causal(),
        rule=lambda b, h, q, k: k <= q,
        bf16=True,
    ),
    Case(
        name="causal, T < S, last aligned",
        S=7,
        mask=lambda: masks.causal(2),
        rule=lambda b, h, q, k: k <= q + 2,
    ),
    Case(
        name="causal, T > S",
        T=7,
        S=4,
        mask=lambda: masks.causal(),
        rule=lambda b, h, q, k: k <= q,
    ),
    Case(
        name="causal, empty rows",
        mask=lambda: masks.causal(-2),
        rule=lambda b, h, q, k: k <= q - 2,
        bf16=True,
    ),
    Case(
        name="key lengths, one of them 0",
        B=3,
        mask=lambda: masks.lengths(key=ints(5, 0, 2)),
        rule=lambda b, h, q, k: k < (5, 0, 2)[b],
    ),
    Case(
        name="query and key lengths",
        mask=lambda: masks.lengths(query=ints(4, 1), key=ints(3, 5)),
        rule=lambda b, h, q, k: q < (4, 1)[b] and k < (3, 5)[b],
    ),
    Case(
        name="segments",
        mask=lambda: masks.segments(QUERY_SEGMENTS),
        rule=lambda b, h, q, k: QUERY_SEGMENTS[b, q] == QUERY_SEGMENTS[b, k],
    ),
    Case(
        name="segments, T != S, one without keys",
        S=7,
        mask=lambda: masks.segments(QUERY_SEGMENTS, KEY_SEGMENTS),
        rule=lambda b, h, q, k: QUERY_SEGMENTS[b, q] == KEY_SEGMENTS[b, k],
    ),
    Case(
        name="dense",
        S=7,
        mask=lambda: masks.dense(PAIRS),
        rule=lambda b, h, q, k: PAIRS[b, h, q, k],
    ),
    Case(
        name="bool array, one for all queries",
        S=7,
        mask=lambda: PAIRS[:, :1, :1],
        rule=lambda b, h, q, k: PAIRS[b, 0, 0, k],
    ),
    Case(
        name="bool array, one for all rows and heads",
        S=7,
        mask=lambda: PAIRS[:1, :1],
        rule=lambda b, h, q, k: PAIRS[0, 0, q, k],
    ),
    Case(
        name="nothing allowed",
        mask=lambda: np.zeros((1, 1, 1, 1), bool),
        rule=lambda b, h, q, k: False,
    ),
    Case(
        name="predicate with arrays, a rule a head",
        S=7,
        N=4,
        mask=lambda: masks.predicate(
            lambda b, h, q, k, width: jnp.abs(q - k) <= width[h], ints(0, 1, 2, 7)
        ),
        rule=lambda b, h, q, k: abs(q - k) <= (0, 1, 2, 7)[h],
    ),
    Case(
        name="causal & lengths, grouped heads",
        N=4,
        mask=lambda: masks.causal() & masks.lengths(key=ints(4, 2)),
        rule=lambda b, h, q, k: k <= q and k < (4, 2)[b],
        bf16=True,
    ),
    Case(
        name="causal | dense",
        S=7,
        mask=lambda: masks.causal() | masks.dense(PAIRS),
        rule=lambda b, h, q, k: k <= q or PAIRS[b, h, q, k],
    ),
    Case(
        name="window",
        S=7,
        mask=lambda: masks.window(1, 2),
        rule=lambda b, h, q, k: q - 1 <= k <= q + 2,
    ),
    Case(
        name="window that leaves rows empty",
        T=7,
        S=4,
        mask=lambda: masks.window(1, -1),
        rule=lambda b, h, q, k: k == q - 1,
    ),
    Case(
        name="causal | prefix",
        S=7,
        mask=lambda: masks.causal() | masks.prefix(3),
        rule=lambda b, h, q, k: k <= q or k < 3,
    ),
    Case(
        name="a prefix a row & ~window",
        S=7,
        mask=lambda: masks.prefix(ints(6, 2)) & ~masks.window(0, 1),
        rule=lambda b, h, q, k: k < (6, 2)[b] and not q <= k <= q + 1,
    ),
    Case(
        name="~causal",
        mask=lambda: ~masks.causal(),
        rule=lambda b, h, q, k: k > q,
    ),
    Case(
        name="~(segments | lengths) & ~dense",
        S=7,
        mask=lambda: (
            ~(
                masks.segments(QUERY_SEGMENTS, KEY_SEGMENTS)
                | masks.lengths(key=ints(2, 1))
            )
            & ~masks.dense(PAIRS)
        ),
        rule=lambda b, h, q, k: (
            not (QUERY_SEGMENTS[b, q] == KEY_SEGMENTS[b, k] or k < (2, 1)[b])
            and not PAIRS[b, h, q, k]
        ),
    ),
    Case(
        name="NaN and inf after the lengths",
        N=4,
        mask=lambda: masks.lengths(key=ints(3, 4)),
        rule=lambda b, h, q, k: k < (3, 4)[b],
        poison=((0, 3), (0, 4), (1, 4)),
        bf16=True,
    ),
    Case(
        name="NaN and inf where nobody may look, empty rows",
        S=7,
        mask=lambda: masks.causal(-1),
        rule=lambda b, h, q, k: k <= q - 1,
        poison=((0, 4), (1, 5), (1, 6)),
    ),
]


def _cap(score, b, h, q, k):
    return 1.5 * np.tanh(score / 1.5), 1.0 - np.tanh(score / 1.5) ** 2


def _distance(score, b, h, q, k, slopes):
    return score - slopes[h].astype(score.dtype) * jnp.abs(q - k)


def _bucket(distance, buckets=8, longest=16):
    """T5's bucket, as its paper and code have it, for a two-sided table."""
    half, back = buckets // 2, abs(distance)
    exact = half // 2
    if back >= exact:
        fold = math.log(back / exact) / math.log(longest / exact)
        back = min(exact + int(fold * (half - exact)), half - 1)
    return back + (half if distance > 0 else 0)


def _fade(score, b, h, q, k):
    return score + math.log(min((2.0 + SPANS[h] - abs(q - k)) / 2.0, 1.0)), 1.0


def _square(score, b, h, q, k):
    return score**2


SCORES = [
    Case(
        name="soft cap",
        scale=2.0,
        score=lambda: scores.soft_cap(1.5),
        curve=_cap,
        bf16=True,
    ),
    Case(
        name="bias",
        S=7,
        score=lambda: scores.bias(BIAS),
        curve=lambda s, b, h, q, k: (s + BIAS[b, h, q, k], 1.0),
    ),
    Case(
        name="bias, one for all rows and queries",
        S=7,
        score=lambda: scores.bias(BIAS[:1, :, :1]),
        curve=lambda s, b, h, q, k: (s + BIAS[0, h, 0, k], 1.0),
    ),
    Case(
        name="modifier with arrays, causal",
        mask=lambda: masks.causal(),
        rule=lambda b, h, q, k: k <= q,
        score=lambda: scores.modifier(_distance, SLOPES),
        curve=lambda s, b, h, q, k: (s - SLOPES[h] * abs(q - k), 1.0),
    ),
    Case(
        name="alibi",
        T=11,
        S=7,
        score=lambda: scores.alibi(SLOPES),
        curve=lambda s, b, h, q, k: (s - SLOPES[h] * abs(q - k), 1.0),
        bf16=True,
    ),
    Case(
        name="relative bias, one query head a key head",
        B=1,
        T=23,
        S=29,
        score=lambda: scores.relative_bias(TABLE, max_distance=16),
        curve=lambda s, b, h, q, k: (s + TABLE[_bucket(k - q), h], 1.0),
    ),
    Case(
        name="adaptive span, causal",
        T=11,
        S=7,
        mask=lambda: masks.causal(),
        rule=lambda b, h, q, k: k <= q and q - k < SPANS[h] + 2.0,
        score=lambda: scores.adaptive_span(SPANS, ramp=2.0),
        curve=_fade,
    ),
    Case(
        name="modifier that is not linear",
        score=lambda: scores.modifier(_square),
        curve=lambda s, b, h, q, k: (s**2, 2 * s),
    ),
    Case(
        name="chain: bias, then soft cap; NaN masked",
        S=7,
        mask=lambda: masks.lengths(key=ints(6, 3)),
        rule=lambda b, h, q, k: k < (6, 3)[b],
        score=lambda: scores.chain(scores.bias(BIAS), scores.soft_cap(1.5)),
        curve=lambda s, b, h, q, k: _cap(s + BIAS[b, h, q, k], b, h, q, k),
        poison=((0, 6), (1, 3)),
    ),
    Case(
        name="a score of -inf masks, without a mask",
        score=lambda: scores.modifier(
            lambda s, b, h, q, k: jnp.where(k < q, s, -jnp.inf)
        ),
        rule=lambda b, h, q, k: k < q,
    ),
]

CASES = SHAPES + MASKS + SCORES


def named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)
