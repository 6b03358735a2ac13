"""Rows of test_flex.py: the rules that PyTorch tests its own with, said as masks and scores.

Each row says a rule as a function of indices, by what is built in where there is such a thing, and
once more for the numpy oracle, with the slope of the new score in the old one.

Source: test/inductor/test_flex_attention.py and test_flex_decoding.py of PyTorch, and the masks and
mods of attention-gym; Dong et al. 2024, arXiv 2412.05496.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from qkv_jax.ops import masks, patterns, scores
from tests.ops.cases import everyone, ints

B, T, S, N, K, H, E = 2, 5, 7, 4, 2, 3, 2
RNG = np.random.default_rng(5)


def normal(*shape):
    return RNG.normal(size=shape)


ARRAYS = tuple(
    normal(*shape)
    for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, E), (B, T, N, E), (B, T, N))
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """Attributes:
    name: PyTorch's, or what it says.
    forms: by name, functions of the captured arrays that give the options of attention.
    rule: who may attend.
    curve: (score, b, h, q, k, *arrays) -> (new score, slope).
    arrays: captured arrays that gradients reach.
    """

    name: str
    forms: dict[str, Callable]
    rule: Callable = everyone
    curve: Callable = lambda s, b, h, q, k: (s, 1.0)
    arrays: tuple[np.ndarray, ...] = field(default=())


def modifier(fn, *constants):
    """The form of a score rule; constants are captured after the arrays."""
    constants = tuple(map(jnp.asarray, constants))
    return {"modifier": lambda *x: {"score": scores.modifier(fn, *x, *constants)}}


def admits(fn, *constants):
    """The forms of a mask: a score of -inf, and a predicate."""

    def hide(score, b, h, q, k, *constants):
        return jnp.where(fn(b, h, q, k, *constants), score, -jnp.inf)

    predicate = {"mask": masks.predicate(fn, *constants)}
    return modifier(hide, *constants) | {"predicate": lambda *x: predicate}


def built_in(mask=None, score=None):
    """The form by what the package has; mask is a Mask, score a function of the arrays."""
    return {
        "built in": lambda *x: {"mask": mask, "score": score and score(*x)},
    }


def added(term, slope=1.0):
    """The curve that adds term(b, h, q, k, *arrays)."""
    return lambda s, b, h, q, k, *x: (s + term(b, h, q, k, *x), slope)


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def cap(s, value):
    return value * np.tanh(s / value), 1.0 - np.tanh(s / value) ** 2


def bucket(distance):
    """T5's, both ways: 8 buckets for distances up to 6, written for one distance k - q."""
    start, distance = (4 if distance > 0 else 0), abs(distance)
    far = 2 + int(np.log(max(distance, 1) / 2) / np.log(6 / 2) * 2)
    return start + (distance if distance < 2 else min(far, 3))


def buckets(q, k):
    distance = jnp.abs(k - q)
    log = jnp.log(jnp.maximum(distance, 1) / 2) / np.log(6 / 2) * 2
    far = jnp.minimum(2 + log.astype(jnp.int32), 3)
    return jnp.where(k > q, 4, 0) + jnp.where(distance < 2, distance, far)


OFFSETS = ints(0, 2, 3, 7)  # of three documents in a row of 7
DOCUMENTS = ints(0, 0, 1, 2, 2, 2, 2)
IDS = masks.segments(np.tile(DOCUMENTS[:T], (B, 1)), np.tile(DOCUMENTS, (B, 1)))
BOTH_WAYS = ints(3, 1)  # the last position, in each row, that is seen both ways
LEADING = masks.lengths(query=BOTH_WAYS + 1, key=BOTH_WAYS + 1)
HEADS = np.array([False, True, True, False])
INDIRECT = ints(3, 0, 3, 1, 2)
SLOPES = 2.0 ** -np.arange(2, 10, 2)


def document_of(at, offsets):
    return jnp.searchsorted(offsets, at, side="right")


SCORES = [
    Row(name="identity", forms=modifier(lambda s, b, h, q, k: s)),
    Row(
        name="times two",
        forms=modifier(lambda s, b, h, q, k: s * 2),
        curve=lambda s, b, h, q, k: (2 * s, 2.0),
    ),
    Row(
        name="squared",
        forms=modifier(lambda s, b, h, q, k: s * s),
        curve=lambda s, b, h, q, k: (s**2, 2 * s),
    ),
    Row(
        name="times two of squared",
        forms={
            "chain": lambda: {
                "score": scores.chain(
                    scores.modifier(lambda s, b, h, q, k: s * s),
                    scores.modifier(lambda s, b, h, q, k: s * 2),
                )
            }
        },
        curve=lambda s, b, h, q, k: (2 * s**2, 4 * s),
    ),
    Row(
        name="relative bias",
        forms=modifier(lambda s, b, h, q, k: s + (q - k)),
        curve=added(lambda b, h, q, k: q - k),
    ),
    Row(
        name="trigonometric",
        forms=modifier(
            lambda s, b, h, q, k: jnp.sin(jnp.cos(s)) + jnp.tan(b.astype(s.dtype))
        ),
        curve=lambda s, b, h, q, k: (
            np.sin(np.cos(s)) + np.tan(b),
            -np.cos(np.cos(s)) * np.sin(s),
        ),
    ),
    Row(
        name="trigonometric, branching",
        forms=modifier(
            lambda s, b, h, q, k: jnp.cos(s) * jnp.sin(s) + jnp.tan(b.astype(s.dtype))
        ),
        curve=lambda s, b, h, q, k: (
            np.cos(s) * np.sin(s) + np.tan(b),
            np.cos(2 * s),
        ),
    ),
    Row(
        name="silu",
        forms=modifier(lambda s, b, h, q, k: jax.nn.silu(s)),
        curve=lambda s, b, h, q, k: (
            s * sigmoid(s),
            sigmoid(s) * (1 + s * (1 - sigmoid(s))),
        ),
    ),
    Row(
        name="floor division of indices",
        forms=modifier(lambda s, b, h, q, k: s - q // (1 + k)),
        curve=added(lambda b, h, q, k: -(q // (1 + k))),
    ),
    Row(
        name="captured integer",
        forms=modifier(lambda s, b, h, q, k, scale: s + scale, np.int32(1)),
        curve=added(lambda b, h, q, k: 1),
    ),
    Row(
        name="soft cap",
        forms=modifier(lambda s, b, h, q, k, cap: cap * jnp.tanh(s / cap))
        | built_in(score=scores.soft_cap),
        curve=lambda s, b, h, q, k, value: cap(s, value),
        arrays=(np.array(0.7),),
    ),
]

MASKS = [
    Row(
        name="no mask",
        forms=admits(lambda b, h, q, k: jnp.ones_like(q * k, bool)),
    ),
    Row(
        name="causal",
        forms=admits(lambda b, h, q, k: q >= k) | built_in(masks.causal()),
        rule=lambda b, h, q, k: k <= q,
    ),
    Row(
        name="inverse causal",
        forms=admits(lambda b, h, q, k: q <= k) | built_in(~masks.causal(-1)),
        rule=lambda b, h, q, k: k >= q,
    ),
    Row(
        name="causal with a captured offset",
        forms=admits(lambda b, h, q, k, offset: q + offset >= k, np.int32(2))
        | built_in(masks.causal(2)),
        rule=lambda b, h, q, k: k <= q + 2,
    ),
    Row(
        name="causal & sliding window",
        forms=built_in(masks.causal() & masks.window(2, 2))
        | {
            "predicates": lambda: {
                "mask": masks.predicate(lambda b, h, q, k: q >= k)
                & masks.predicate(lambda b, h, q, k: q - k <= 2)
            }
        },
        rule=lambda b, h, q, k: q - 2 <= k <= q,
    ),
    Row(
        name="dilated sliding window",
        forms=admits(lambda b, h, q, k: (q - k >= 0) & (q - k < 6) & ((q - k) % 2 == 0))
        | built_in(patterns.dilated(2, 0, 2)),
        rule=lambda b, h, q, k: k in (q, q - 2, q - 4),
    ),
    Row(
        name="attention sink",
        forms=admits(lambda b, h, q, k: (q >= k) & ((q - k <= 1) | (k < 1)))
        | built_in(masks.causal() & (masks.window(1, 0) | masks.prefix(1))),
        rule=lambda b, h, q, k: k <= q and (k >= q - 1 or k == 0),
    ),
    Row(
        name="prefix LM",
        forms=admits(lambda b, h, q, k: (k < 3) | (q >= k))
        | built_in(masks.prefix(3) | masks.causal()),
        rule=lambda b, h, q, k: k < 3 or k <= q,
    ),
    Row(
        name="causal, and both ways up to a position of each row",
        forms=admits(
            lambda b, h, q, k, n: (q >= k) | ((q <= n[b]) & (k <= n[b])), BOTH_WAYS
        )
        | built_in(masks.causal() | LEADING),
        rule=lambda b, h, q, k: k <= q or max(q, k) <= BOTH_WAYS[b],
    ),
    Row(
        name="documents by ids",
        forms=admits(lambda b, h, q, k, ids: ids[q] == ids[k], DOCUMENTS)
        | built_in(IDS),
        rule=lambda b, h, q, k: DOCUMENTS[q] == DOCUMENTS[k],
    ),
    Row(
        name="causal documents by offsets",
        forms=admits(
            lambda b, h, q, k, offsets: (
                (document_of(q, offsets) == document_of(k, offsets)) & (q >= k)
            ),
            OFFSETS,
        )
        | built_in(IDS & masks.causal()),
        rule=lambda b, h, q, k: DOCUMENTS[q] == DOCUMENTS[k] and k <= q,
    ),
    Row(
        name="odd keys are skipped",
        forms=admits(lambda b, h, q, k: k % 2 == 0),
        rule=lambda b, h, q, k: k in (0, 2, 4, 6),
    ),
    Row(
        name="causal in some heads, nothing in others",
        forms=admits(lambda b, h, q, k, on: on[h] & (q >= k), HEADS),
        rule=lambda b, h, q, k: HEADS[h] and k <= q,
    ),
    Row(
        name="neighbours in an image",
        forms=admits(
            lambda b, h, q, k: (
                (jnp.abs(q // 3 - k // 3) <= 1) & (jnp.abs(q % 3 - k % 3) <= 1)
            )
        )
        | built_in(patterns.local_2d(3, 3, 1)),
        rule=lambda b, h, q, k: max(abs(q // 3 - k // 3), abs(q % 3 - k % 3)) <= 1,
    ),
    Row(
        name="near rows or near columns of an image",
        forms=admits(
            lambda b, h, q, k: (
                (jnp.abs(q // 3 - k // 3) <= 0) | (jnp.abs(q % 3 - k % 3) <= 0)
            )
        )
        | built_in(patterns.axial(3, 3, 0) | patterns.axial(3, 3, 1)),
        rule=lambda b, h, q, k: q // 3 == k // 3 or q % 3 == k % 3,
    ),
]

CAPTURED = [
    Row(
        name="a factor of heads",
        forms=modifier(lambda s, b, h, q, k, scale: s * scale[h]),
        curve=lambda s, b, h, q, k, scale: (s * scale[h], scale[h]),
        arrays=(normal(N),),
    ),
    Row(
        name="a bias of heads",
        forms=modifier(lambda s, b, h, q, k, offset: s + offset[h]),
        curve=added(lambda b, h, q, k, offset: offset[h]),
        arrays=(normal(N),),
    ),
    Row(
        name="biases of all axes",
        forms=modifier(
            lambda s, b, h, q, k, row, head, query, key: (
                s + row[b] + head[h] + query[q] + key[k]
            )
        ),
        curve=added(
            lambda b, h, q, k, row, head, query, key: (
                row[b] + head[h] + query[q] + key[k]
            )
        ),
        arrays=(normal(B), normal(N), normal(T), normal(S)),
    ),
    Row(
        name="a reduction of what is captured",
        forms=modifier(lambda s, b, h, q, k, x: s * x[b].sum(-1)),
        curve=lambda s, b, h, q, k, x: (s * x[b].sum(), x[b].sum()),
        arrays=(normal(B, 3),),
    ),
    Row(
        name="ALiBi",
        forms=modifier(lambda s, b, h, q, k, slopes: s + (k - q) * slopes[h]),
        curve=added(lambda b, h, q, k, slopes: (k - q) * slopes[h]),
        arrays=(SLOPES,),
    ),
    Row(
        name="bias of queries and keys",
        forms=modifier(lambda s, b, h, q, k, bias: s + bias[q, k])
        | built_in(score=lambda bias: scores.bias(bias[None, None])),
        curve=added(lambda b, h, q, k, bias: bias[q, k]),
        arrays=(normal(T, S),),
    ),
    Row(
        name="bias of all pairs",
        forms=modifier(lambda s, b, h, q, k, bias: s + bias[b, h, q, k])
        | built_in(score=scores.bias),
        curve=added(lambda b, h, q, k, bias: bias[b, h, q, k]),
        arrays=(normal(B, N, T, S),),
    ),
    Row(
        name="bias that is transposed",
        forms=modifier(lambda s, b, h, q, k, bias: s + bias[h, k, q]),
        curve=added(lambda b, h, q, k, bias: bias[h, k, q]),
        arrays=(normal(N, S, T),),
    ),
    Row(
        name="bias by difference",
        forms=modifier(lambda s, b, h, q, k, bias: s + bias[q - k + S]),
        curve=added(lambda b, h, q, k, bias: bias[q - k + S]),
        arrays=(normal(2 * S),),
    ),
    Row(
        name="bias by distance",
        forms=modifier(lambda s, b, h, q, k, bias: s + bias[jnp.abs(q - k)]),
        curve=added(lambda b, h, q, k, bias: bias[abs(q - k)]),
        arrays=(normal(2 * S),),
    ),
    Row(
        name="bias by sum",
        forms=modifier(lambda s, b, h, q, k, bias: s + bias[q + k]),
        curve=added(lambda b, h, q, k, bias: bias[q + k]),
        arrays=(normal(T + S),),
    ),
    Row(
        name="bias by clipped difference",
        forms=modifier(lambda s, b, h, q, k, bias: s + bias[jnp.clip(q - k + 2, 0, 4)]),
        curve=added(lambda b, h, q, k, bias: bias[min(max(q - k + 2, 0), 4)]),
        arrays=(normal(5),),
    ),
    Row(
        name="bias by bucket, of T5",
        forms=modifier(lambda s, b, h, q, k, table: s + table[buckets(q, k), h])
        | built_in(score=lambda table: scores.relative_bias(table, True, 6)),
        curve=added(lambda b, h, q, k, table: table[bucket(k - q), h]),
        arrays=(normal(8, N),),
    ),
    Row(
        name="bias by a captured index",
        forms=modifier(lambda s, b, h, q, k, bias, at: s + bias[at[q]], INDIRECT),
        curve=added(lambda b, h, q, k, bias: bias[INDIRECT[q]]),
        arrays=(normal(T),),
    ),
    Row(
        name="bias looked up twice",
        forms=modifier(lambda s, b, h, q, k, bias: s + bias[q] + bias[k]),
        curve=added(lambda b, h, q, k, bias: bias[q] + bias[k]),
        arrays=(normal(S),),
    ),
    Row(
        name="bias of one entry of an axis",
        forms=modifier(
            lambda s, b, h, q, k, bias, which: s + bias[b, h, which, q], np.int32(1)
        ),
        curve=added(lambda b, h, q, k, bias: bias[b, h, 1, q]),
        arrays=(normal(B, N, 3, T),),
    ),
    Row(
        name="bias of a query and a row of keys, decomposed",
        forms=modifier(lambda s, b, h, q, k, bias: s + bias[b, h, q, k // 3]),
        curve=added(lambda b, h, q, k, bias: bias[b, h, q, k // 3]),
        arrays=(normal(B, N, T, 3),),
    ),
    Row(
        name="a factor of queries",
        forms=modifier(lambda s, b, h, q, k, scale: s * scale[q]),
        curve=lambda s, b, h, q, k, scale: (s * scale[q], scale[q]),
        arrays=(normal(T),),
    ),
    Row(
        name="gated heads",
        forms=modifier(lambda s, b, h, q, k, gate: s * jax.nn.sigmoid(gate[h])),
        curve=lambda s, b, h, q, k, gate: (s * sigmoid(gate[h]), sigmoid(gate[h])),
        arrays=(normal(N),),
    ),
    Row(
        name="latent attention: positions apart",
        forms=modifier(
            lambda s, b, h, q, k, query, key: s + (query[b, h, q] * key[b, k]).sum(-1)
        ),
        curve=added(lambda b, h, q, k, query, key: query[b, h, q] @ key[b, k]),
        arrays=(normal(B, N, T, 2), normal(B, S, 2)),
    ),
]

COMPOSED = [
    Row(
        name="ALiBi, causal",
        forms=modifier(
            lambda s, b, h, q, k, slopes: jnp.where(
                q >= k, s + (k - q) * slopes[h], -jnp.inf
            )
        )
        | built_in(masks.causal(), scores.alibi),
        rule=lambda b, h, q, k: k <= q,
        curve=added(lambda b, h, q, k, slopes: (k - q) * slopes[h]),
        arrays=(SLOPES,),
    ),
    Row(
        name="relative bias, causal",
        forms=modifier(lambda s, b, h, q, k: jnp.where(q >= k, s + (q - k), -jnp.inf)),
        rule=lambda b, h, q, k: k <= q,
        curve=added(lambda b, h, q, k: q - k),
    ),
    Row(
        name="relative bias, then inverse causal",
        forms={
            "chain": lambda: {
                "score": scores.chain(
                    scores.modifier(lambda s, b, h, q, k: s + (q - k)),
                    scores.modifier(
                        lambda s, b, h, q, k: jnp.where(q <= k, s, -jnp.inf)
                    ),
                )
            }
        },
        rule=lambda b, h, q, k: q <= k,
        curve=added(lambda b, h, q, k: q - k),
    ),
    Row(
        name="causal scores up to a bound of each row",
        forms=modifier(
            lambda s, b, h, q, k, bound: jnp.where(
                (s <= bound[b]) & (q >= k), s, -jnp.inf
            ),
            ints(1, 2),
        ),
        rule=lambda b, h, q, k: k <= q,
        curve=lambda s, b, h, q, k: (s, 1.0) if s <= 1 + b else (-np.inf, 0.0),
    ),
    Row(
        name="keys from an offset on, with a bias",
        forms={
            "predicate": lambda bias: {
                "mask": masks.predicate(lambda b, h, q, k, n: k >= q + n, np.int32(4)),
                "score": scores.modifier(lambda s, b, h, q, k, x: s + x[k], bias),
            }
        },
        rule=lambda b, h, q, k: k >= q + 4,
        curve=added(lambda b, h, q, k, bias: bias[k]),
        arrays=(normal(S),),
    ),
    Row(
        name="ALiBi, then soft cap, causal & window & documents",
        forms={
            "built in": lambda slopes, cap: {
                "mask": masks.causal() & masks.window(2, 0) & IDS,
                "score": scores.chain(scores.alibi(slopes), scores.soft_cap(cap)),
            }
        },
        rule=lambda b, h, q, k: q - 2 <= k <= q and DOCUMENTS[q] == DOCUMENTS[k],
        curve=lambda s, b, h, q, k, slopes, value: cap(s + (k - q) * slopes[h], value),
        arrays=(SLOPES, np.array(0.7)),
    ),
]

ROWS = SCORES + MASKS + CAPTURED + COMPOSED
