"""Sparse patterns: pair by pair, of blocks of any size, and through attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax.ops import blockwise, dot_product_attention, masks, patterns
from qkv_jax.ops.masks import Blocks
from tests.ops.cases import Case
from tests.ops.test_attention import close, expected, pull, qkv
from tests.ops.test_blockwise import arrays_of, looked_at
from tests.ops.test_flex import FAST
from tests.ops.test_masks import grid, whole

RNG = np.random.default_rng(11)
LAYOUT = RNG.random((5, 8)) < 0.5  # in blocks of 3: T up to 15, S up to 24
LAYOUTS = RNG.random((2, 2, 8, 8)) < 0.5
GLOBAL = RNG.random((2, 24)) < 0.3


def pixels(height, width, near):
    """The rule of an image: `near(rows apart, columns apart)`."""

    def rule(b, h, q, k):
        (row, column), (row_k, column_k) = divmod(q, width), divmod(k, width)
        inside = max(q, k) < height * width
        return inside and near(abs(row - row_k), abs(column - column_k))

    return rule


def case(name, mask, rule):
    return Case(name=name, mask=mask, rule=rule, B=2, N=2, T=11, S=13)


EXACT = [
    case(
        "dilated",
        lambda: patterns.dilated(2, 1, 3),
        lambda b, h, q, k: k in (q - 6, q - 3, q, q + 3),
    ),
    case(
        "dilated, strictly before",
        lambda: patterns.dilated(3, -1, 2),
        lambda b, h, q, k: k in (q - 6, q - 4, q - 2),
    ),
    case(
        "dilated, unbounded after",
        lambda: patterns.dilated(1, None, 4),
        lambda b, h, q, k: k >= q - 4 and (k - q) % 4 == 0,
    ),
    case(
        "dilated, nothing within the bounds",
        lambda: patterns.dilated(-2, 1, 2),
        lambda b, h, q, k: False,
    ),
    case(
        "dilated by one step",
        lambda: patterns.dilated(2, 3, 1),
        lambda b, h, q, k: q - 2 <= k <= q + 3,
    ),
    case(
        "chunked",
        lambda: patterns.chunked(4),
        lambda b, h, q, k: q // 4 == k // 4,
    ),
    case(
        "layout of numpy",
        lambda: patterns.block_sparse(LAYOUT, 3),
        lambda b, h, q, k: LAYOUT[q // 3, k // 3],
    ),
    case(
        "layout of JAX, a row and a head",
        lambda: patterns.block_sparse(jnp.asarray(LAYOUTS), 4),
        lambda b, h, q, k: LAYOUTS[b, h, q // 4, k // 4],
    ),
    case(
        "layout of numpy, a head",
        lambda: patterns.block_sparse(LAYOUTS[0], 5),
        lambda b, h, q, k: LAYOUTS[0, h, q // 5, k // 5],
    ),
    case(
        "global tokens",
        lambda: patterns.global_tokens((1, 7, 8)),
        lambda b, h, q, k: q in (1, 7, 8) or k in (1, 7, 8),
    ),
    case(
        "global tokens of JAX",
        lambda: patterns.global_tokens(jnp.asarray(GLOBAL)),
        lambda b, h, q, k: GLOBAL[b, q] or GLOBAL[b, k],
    ),
    case(
        "local in an image",
        lambda: patterns.local_2d(2, 5, 1),
        pixels(2, 5, lambda rows, columns: max(rows, columns) <= 1),
    ),
    case(
        "local in a larger image",
        lambda: patterns.local_2d(7, 3, (2, 1)),
        pixels(7, 3, lambda rows, columns: rows <= 2 and columns <= 1),
    ),
    case(
        "columns of an image",
        lambda: patterns.axial(6, 4, 0),
        pixels(6, 4, lambda rows, columns: columns == 0),
    ),
    case(
        "rows of an image",
        lambda: patterns.axial(3, 4, 1),
        pixels(3, 4, lambda rows, columns: rows == 0),
    ),
]
SOUND = [
    case(
        "strided",
        lambda: patterns.strided(3),
        lambda b, h, q, k: k <= q and (k >= q - 3 or (q - k) % 3 == 0),
    ),
    case(
        "fixed",
        lambda: patterns.fixed(4, 1),
        lambda b, h, q, k: k <= q and (q // 4 == k // 4 or k % 4 == 3),
    ),
    case(
        "longformer",
        lambda: patterns.longformer(4, (0, 6)),
        lambda b, h, q, k: abs(q - k) <= 2 or not {0, 6}.isdisjoint((q, k)),
    ),
    case(
        "longformer, tokens of numpy",
        lambda: patterns.longformer(2, GLOBAL),
        lambda b, h, q, k: abs(q - k) <= 1 or GLOBAL[b, q] or GLOBAL[b, k],
    ),
    case(
        "causal rows of an image",
        lambda: patterns.axial(3, 5, 1) & masks.causal(),
        lambda b, h, q, k: q // 5 == k // 5 and k <= q,
    ),
]
PATTERNS = EXACT + SOUND


def parametrized(cases):
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


@parametrized(PATTERNS)
@pytest.mark.parametrize("lengths", [(13, 11), (1, 15)])
def test_a_pattern_equals_its_rule(case, lengths):
    shape = (2, 2, *lengths)
    np.testing.assert_array_equal(whole(case.mask(), shape), grid(case.rule, shape))


def states(mask, pairs, size):
    """What a mask says of blocks, (2, B, N, count, count), and what is true of their pairs."""
    blocks = Blocks(pairs.shape, size)
    shape = (*pairs.shape[:2], *blocks.count)
    said = mask.fill(blocks).blocks(blocks)
    true = np.zeros((2, *shape), bool)
    for at in np.ndindex(blocks.count):
        rows, columns = (slice(i * n, (i + 1) * n) for i, n in zip(at, size))
        block = pairs[:, :, rows, columns]
        true[:, :, :, *at] = block.any((2, 3)), block.all((2, 3))
    return np.stack([np.broadcast_to(x, shape) for x in said]), true


@parametrized(PATTERNS)
def test_what_a_pattern_says_of_blocks_is_true_of_their_pairs(case):
    mask, shape = case.mask(), (2, 2, 12, 24)
    pairs = whole(mask, shape)
    for size in [(1, 1), (2, 3), (3, 2), (3, 8), (4, 4), (12, 6), (5, 7), (16, 16)]:
        said, true = states(mask, pairs, size)
        assert not (true[0] & ~said[0]).any(), size
        assert not (said[1] & ~true[1]).any(), size
        if case in EXACT and 12 % size[0] == 24 % size[1] == 0:
            np.testing.assert_array_equal(said, true, err_msg=str(size))


@pytest.mark.parametrize("width", [3, 4, 7, 24, 50])
def test_an_image_cut_in_any_way_knows_its_blocks(width):
    for radius in (0, 1, (0, 2), (3, 1)):
        mask = patterns.local_2d(-(-48 // width), width, radius)
        pairs = whole(mask, (1, 1, 48, 48))
        for size in [(12, 4), (6, 3), (16, 8), (24, 48), (2, 1)]:
            np.testing.assert_array_equal(*states(mask, pairs, size), err_msg=str(size))


@parametrized(PATTERNS)
def test_attention_in_blocks_equals_the_oracle(case, monkeypatch):
    monkeypatch.setattr(blockwise, "choose_blocks", lambda *_: (4, 4))
    run = functools.partial(pull, implementation="blockwise")
    with jax.enable_x64(True):
        arrays = case.arrays(np.float64)
        compiled = jax.jit(run, compiler_options=FAST)
        out, logsumexp, gradients = compiled(arrays, mask=case.mask())
    truth = expected(arrays, case)
    close(out, truth.out, "float64")
    close(logsumexp, truth.logsumexp, "float64")
    for got, want in zip(gradients, truth.gradients):
        close(got, want, "float64")


def test_few_blocks_are_looked_at():
    """All of, and in doubt of, 64 x 64 blocks of 64 x 64 pairs."""

    def count(mask):
        return looked_at(mask, (1, 1, 4096, 4096), (64, 64))

    assert count(patterns.big_bird(4096, 64, seed=0))[0] <= 64 * (3 + 3 + 2 + 2)
    assert count(patterns.big_bird(4096, 64, seed=0))[1] == 0
    assert count(patterns.chunked(256)) == (16 * 16, 0)
    assert count(patterns.longformer(128, (0,))) == (
        64 * 3 - 2 + 2 * 62,
        2 * 64 - 2 + 124,
    )
    assert count(patterns.axial(64, 64, 1)) == (64, 0)
    assert count(patterns.axial(64, 64, 0)) == (64 * 64, 64 * 64)
    assert count(patterns.local_2d(64, 64, 3))[0] == 7 * 64 - 12
    assert count(patterns.dilated(4, 0, 64)) == (5 * 64 - 10, 5 * 64 - 10)


def test_numpy_is_known_at_trace_time_and_jax_is_not():
    def known(mask):
        seen = []
        blocks = Blocks((2, 2, 12, 24), (4, 4))
        jax.eval_shape(lambda mask: seen.append(mask.blocks(blocks)), mask)
        return all(isinstance(x, np.ndarray) for x in seen[0])

    assert all(known(case.mask()) == ("JAX" not in case.name) for case in PATTERNS)


def test_masks_of_equal_tables_are_one_program():
    first, same, other = (
        jax.tree.structure(patterns.big_bird(64, 4, seed=seed)) for seed in (1, 1, 2)
    )
    assert first == same and hash(first) == hash(same) and first != other


def test_layouts_of_jax_are_mapped():
    arrays = qkv(B=2, T=11, S=13, N=2, K=2)

    def run(layout):
        mask = patterns.block_sparse(layout, 4)
        return dot_product_attention(*arrays, mask=mask, implementation="blockwise")

    mapped = jax.jit(jax.vmap(run))(jnp.asarray(LAYOUTS[0]))
    for got, layout in zip(mapped, LAYOUTS[0]):
        close(got, run(layout))


@pytest.mark.parametrize(
    "mask",
    [
        lambda: patterns.big_bird(4096, 64, seed=0),
        lambda: patterns.longformer(64, jnp.zeros((1, 4096), bool)),
        lambda: patterns.local_2d(64, 64, 3) | patterns.strided(64),
    ],
)
def test_no_array_has_the_elements_of_the_matrix(mask):
    shape = jax.ShapeDtypeStruct((1, 4096, 2, 8), jnp.float32)

    def run(*arrays):
        return dot_product_attention(*arrays, mask=mask(), implementation="blockwise")

    sizes = [
        np.prod(shape) for shape in arrays_of(jax.make_jaxpr(run)(*3 * [shape]).jaxpr)
    ]
    assert max(sizes) < 4096 * 4096 / 16
    assert len(sizes) > 50  # the walk did look into the loops


def test_big_bird_has_a_window_globals_and_random_blocks_of_each_head():
    mask = patterns.big_bird(
        95, 5, window_blocks=5, global_blocks=1, random_blocks=3, heads=2, seed=4
    )
    layout = whole(mask, (1, 2, 95, 95))[0, :, ::5, ::5]
    at = np.arange(19)
    structure = (abs(at[:, None] - at) <= 2) | (at[:, None] == 0) | (at == 0)
    assert layout[:, structure].all()
    assert ((layout & ~structure).sum(-1)[:, 1:] == 3).all()
    assert (layout[0] != layout[1]).any()


def test_big_bird_is_the_same_for_a_seed():
    first, same, other = (
        whole(patterns.big_bird(60, 3, seed=seed), (1, 1, 60, 60)) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, same)
    assert (first != other).any()


def test_big_bird_of_few_blocks_is_whole():
    assert whole(patterns.big_bird(7, 2, seed=0), (1, 1, 7, 7)).all()


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: patterns.dilated(1, 1, 0),
            "dilated: step must be an int, 1 or more; got 0",
        ),
        (lambda: patterns.chunked(0), "chunked: width must"),
        (lambda: patterns.strided(2.5), "strided: stride must be an int, .* got 2.5"),
        (
            lambda: patterns.fixed(4, 5),
            "fixed: summary must be at most stride = 4; got 5",
        ),
        (lambda: patterns.fixed(4, 0), "fixed: summary must be an int, 1 or more"),
        (lambda: patterns.block_sparse(LAYOUT, 0), "block_size must"),
        (lambda: patterns.block_sparse(LAYOUT[0], 3), r"got shape \(8,\)"),
        (lambda: patterns.block_sparse(LAYOUT.astype(int), 3), "bool array; got int64"),
        (lambda: patterns.block_sparse([[True]], 3), "bool array; got list"),
        (
            lambda: whole(patterns.block_sparse(LAYOUT, 3), (1, 1, 16, 9)),
            "cover .*16, 9",
        ),
        (lambda: whole(patterns.block_sparse(LAYOUTS, 9), (2, 3, 9, 9)), r"\(2, 3\)"),
        (lambda: patterns.big_bird(9, 3, window_blocks=2, seed=0), "odd; got 2"),
        (
            lambda: patterns.big_bird(9, 3, random_blocks=-1, seed=0),
            "random_blocks must",
        ),
        (lambda: patterns.global_tokens((3, -1)), r"tokens\[1\] must be an int, 0 or"),
        (lambda: patterns.global_tokens(GLOBAL[0]), r"\(B, length\); got shape"),
        (
            lambda: patterns.global_tokens(np.array([1, 2])),
            "tokens must be a bool array",
        ),
        (
            lambda: whole(patterns.global_tokens(GLOBAL), (3, 1, 5, 5)),
            "with B = 3; got",
        ),
        (lambda: patterns.longformer(3, ()), "window must be even; got 3"),
        (lambda: patterns.local_2d(0, 3, 1), "local_2d: height must"),
        (lambda: patterns.local_2d(3, 3, (1, -1)), r"radius \(columns\) must"),
        (lambda: patterns.axial(3, 3, 2), r"axis must be 0 .* got 2"),
    ],
)
def test_a_bad_argument_is_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
