"""Attention in blocks: blocks of any size, what is skipped, and what never stands in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax.ops import (
    block_loops,
    blockwise,
    dot_product_attention,
    explain,
    masks,
    scores,
)
from qkv_jax.ops.masks import Blocks
from qkv_jax.ops.parts import Plan
from tests.jaxprs import equations
from tests.ops.cases import CASES, Case, ints
from tests.ops.test_attention import close, expected, normal, pulled, qkv


@pytest.fixture
def blocks_of_three(monkeypatch):
    monkeypatch.setattr(blockwise, "choose_blocks", lambda *_: (3, 3))


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_small_blocks_equal_the_oracle(case, blocks_of_three):
    with jax.enable_x64(True):
        arrays = case.arrays(np.float64)
        out, logsumexp, gradients = pulled(arrays, case, "blockwise")
    truth = expected(arrays, case)
    close(out, truth.out, "float64")
    close(logsumexp, truth.logsumexp, "float64")
    for got, want in zip(gradients, truth.gradients):
        close(got, want, "float64")


def parts(score):
    """The floating arrays of a rule."""
    return [x for x in jax.tree.leaves(score) if jnp.issubdtype(x.dtype, jnp.floating)]


@pytest.mark.parametrize(
    "score",
    [
        lambda: scores.bias(normal(2, 4, 11, 13)),
        lambda: scores.bias(normal(1, 4, 1, 13)),
        lambda: scores.chain(
            scores.modifier(
                lambda s, b, h, q, k, table, at: s + table[h, at[(q - k) % 7]],
                normal(4, 3),
                ints(0, 1, 2, 1, 0, 2, 2),
            ),
            scores.bias(normal(1, 1, 11, 1, seed=4)),
            scores.soft_cap(1.5),
        ),
    ],
    ids=["bias", "bias of keys", "table, bias of queries, cap"],
)
def test_gradients_of_captured_arrays_equal_those_of_the_reference(
    score, blocks_of_three
):
    arrays, mask = qkv(T=11, S=13), masks.causal(3) & masks.lengths(key=ints(12, 7))

    def gradient(implementation):
        def loss(rule):
            out = dot_product_attention(
                *arrays, mask=mask, score=rule, implementation=implementation
            )
            return jnp.sum(jnp.sin(out))

        return jax.jit(jax.grad(loss, allow_int=True))(score())

    found, wanted = parts(gradient("blockwise")), parts(gradient("reference"))
    assert len(found) == len(wanted) > 0
    jax.tree.map(close, found, wanted)
    assert all(np.abs(x).max() > 1e-3 for x in wanted)


def test_dropout_does_not_depend_on_blocks(monkeypatch):
    arrays, rng = qkv(T=11, S=13), jax.random.key(5)
    outs = []
    for size in (3, 5, 16):
        monkeypatch.setattr(
            blockwise, "choose_blocks", lambda *_, size=size: (size, size)
        )
        outs.append(
            dot_product_attention(
                *arrays, dropout_rate=0.4, dropout_rng=rng, implementation="blockwise"
            )
        )
    wanted = dot_product_attention(
        *arrays, dropout_rate=0.4, dropout_rng=rng, implementation="reference"
    )
    for out in outs:
        close(out, wanted)


STATES = [
    masks.causal(),
    masks.causal(-3),
    masks.window(4, 1),
    masks.prefix(7),
    masks.causal() | masks.prefix(6),
    ~masks.window(3, 3),
    masks.lengths(query=ints(9, 3), key=ints(4, 11)),
    masks.segments(np.sort(normal(2, 12) > 0).astype(np.int32), np.ones((2, 15), int)),
    masks.dense(np.tri(12, 15, dtype=bool)[None, None]) & masks.causal(-4),
    masks.predicate(lambda b, h, q, k: (q + k) % 2 == 0) | masks.causal(),
]


@pytest.mark.parametrize("mask", STATES, ids=[type(mask).__name__ for mask in STATES])
def test_what_a_mask_says_of_blocks_is_true_of_their_pairs(mask):
    shape = (2, 2, 12, 15)
    grid = Blocks(shape, (4, 5))
    pairs = np.broadcast_to(mask.materialise(shape), shape)
    pairs = pairs.reshape(2, 2, 3, 4, 3, 5)
    some, every = (
        np.broadcast_to(x, (2, 2, 3, 3)) for x in mask.fill(grid).blocks(grid)
    )
    assert not (pairs.any((3, 5)) & ~some).any()
    assert not (every & ~pairs.all((3, 5))).any()
    if "Predicate" not in repr(mask):  # the others know, and do not only allow for
        np.testing.assert_array_equal(some, pairs.any((3, 5)))
        np.testing.assert_array_equal(every, pairs.all((3, 5)))


def looked_at(mask, shape, size):
    """Blocks looked at, and how many of them with the mask, over all rows and heads."""
    plan = Plan(shape, size, 1.0, 0.0)
    arrays = (jnp.zeros((shape[0], n, 1, 1)) for n in (shape[2], shape[3], shape[3]))
    inputs = blockwise.filled(*arrays, mask, None, None, plan)
    ranks = block_loops.block_ranks(inputs, plan)
    lists = block_loops._lists(ranks, *inputs[:3])
    full, some, _ = (
        np.broadcast_to(x, (*shape[:2], plan.grid.count[0])).sum() for x in lists.ends
    )
    return some, some - full


def test_blocks_that_a_mask_rules_out_are_not_looked_at():
    shape, size = (1, 1, 1024, 1024), (128, 128)  # 8 x 8 blocks
    assert looked_at(masks.causal(), shape, size) == (36, 8)
    assert looked_at(masks.window(127, 0), shape, size) == (15, 15)
    assert looked_at(masks.prefix(256), shape, size) == (16, 0)
    documents = np.repeat(np.arange(4), 256)[None]
    assert looked_at(masks.segments(documents), shape, size) == (16, 0)
    assert looked_at(masks.segments(documents) & masks.causal(), shape, size) == (12, 8)
    lengths = masks.lengths(query=ints(256), key=ints(300))
    assert looked_at(lengths, shape, size) == (6, 2)


def test_lengths_do_not_hide_a_window_from_the_choice_of_blocks():
    shape, window = (1, 2, 2048, 2048), masks.window(64, 64)
    padded = masks.lengths(key=ints(700)) & (window | masks.prefix(1))
    assert blockwise.choose_limits(window, shape) == (128, 128)
    assert blockwise.choose_limits(padded, shape) == (128, 128)
    assert blockwise.choose_limits(masks.lengths(key=ints(700)), shape) == (512, 512)


def test_a_block_that_is_skipped_is_not_read():
    """Were a masked block of NaNs read, in doubt or not, its rows would be NaN or it would loop."""
    query, key, value = (jnp.asarray(x) for x in qkv(B=1, T=512, S=512))
    mask = masks.causal()
    run = jax.jit(
        lambda k, v: dot_product_attention(
            query, k, v, mask=mask, implementation="blockwise"
        )
    )
    clean = run(key, value)
    poisoned = run(key.at[:, 256:].set(jnp.nan), value.at[:, 256:].set(jnp.inf))
    close(poisoned[:, :256], clean[:, :256])
    assert np.all(np.isnan(poisoned[:, 256:]))


def arrays_of(jaxpr):
    """Shapes of all arrays that a jaxpr and those within it make."""
    for equation in equations(jaxpr):
        for variable in equation.outvars:
            yield getattr(variable.aval, "shape", ())


@pytest.mark.parametrize(
    "mask",
    [
        lambda: None,
        masks.causal,
        lambda: masks.window(99, 99) & masks.segments(jnp.zeros((1, 4096), jnp.int32)),
        lambda: masks.predicate(lambda b, h, q, k: (q + k) % 3 == 0),
    ],
)
def test_no_array_has_the_elements_of_the_matrix(mask):
    shape = jax.ShapeDtypeStruct((1, 4096, 2, 8), jnp.float32)
    score = scores.chain(scores.soft_cap(3.0), scores.bias(jnp.zeros((1, 2, 1, 4096))))

    def loss(*arrays):
        out, lse = dot_product_attention(
            *arrays, mask=mask(), score=score, return_residuals=True
        )
        return jnp.sum(out) + jnp.sum(lse)

    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*3 * (shape,))
    sizes = [np.prod(shape) for shape in arrays_of(jaxpr.jaxpr)]
    assert max(sizes) < 4096 * 4096 / 16
    assert len(sizes) > 50  # the walk did look into the loops


LONG = (1, 1, 49_152, 245_760)


def test_block_states_of_a_long_sequence_are_small():
    grid = Blocks(LONG, (256, 256))
    some, every = (masks.causal(196_608) & masks.window(4096, 0)).blocks(grid)
    assert some.nbytes + every.nbytes < 1_000_000
    assert isinstance(some, np.ndarray) and 0 < some.sum() < 192 * 20


@pytest.mark.parametrize(
    "mask",
    [
        lambda: masks.causal(196_608) & masks.window(4096, 0),
        lambda: masks.lengths(key=ints(200_000)),
        lambda: masks.segments(
            np.arange(49_152)[None] // 3000, np.arange(245_760)[None] // 15_000
        ),
        lambda: masks.predicate(lambda b, h, q, k: (q + k) % 3 == 0),
    ],
    ids=["static", "lengths", "documents", "predicate"],
)
def test_all_that_a_mask_of_a_long_sequence_takes_is_under_ten_megabytes(mask):
    mask = mask()
    plan = Plan(LONG, blockwise.choose_blocks(mask, LONG), 1.0, 0.0)
    arrays = [jnp.zeros((1, n, 1, 1)) for n in (LONG[2], LONG[3], LONG[3])]

    @jax.jit
    def lists(arrays, mask):
        inputs = blockwise.filled(*arrays, mask, None, None, plan)
        ranks = block_loops.block_ranks(inputs, plan)
        return block_loops._lists(ranks, *inputs[:3])

    compiled = lists.lower(arrays, mask).compile()
    sizes = compiled.memory_analysis()
    assert sizes.output_size_in_bytes + sizes.temp_size_in_bytes < 10_000_000
    assert compiled(arrays, mask).order.shape[2] >= 96


def test_long_sequences_choose_blocks_and_short_ones_the_dense_form():
    shape = jax.ShapeDtypeStruct
    short, long = (shape((1, n, 2, 4), jnp.float32) for n in (64, 1024))
    assert explain(short, short, short).implementation == "reference"
    found = explain(long, long, long)
    assert found.implementation == "blockwise"
    assert "-> blockwise: O(T + S) memory" in str(found)
    assert "1024 x 1024 pairs" in found.reasons["reference"]
    forced = explain(long, long, long, implementation="reference")
    assert forced.implementation == "reference"
    assert forced.reasons["reference"] == "asked for by name"
    assert list(forced.reasons) == ["reference", "blockwise", "cudnn", "tokamax"]


def test_grouped_heads_of_other_sizes_in_bfloat16_equal_the_reference(blocks_of_three):
    case = Case(name="", T=10, S=8, N=6, K=2, H=5, E=7, mask=lambda: masks.causal(2))
    arrays = case.arrays(jnp.bfloat16)
    found, wanted = (pulled(arrays, case, name) for name in ("blockwise", "reference"))
    jax.tree.map(
        lambda x, y: close(x, np.asarray(y, np.float64), "bfloat16"), found, wanted
    )
