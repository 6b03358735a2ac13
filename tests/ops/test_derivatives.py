"""Forward mode and second order of attention in blocks equal those of the dense definition."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax.ops import (
    blockwise,
    context_parallel_attention,
    dot_product_attention,
    masks,
    scores,
)
from tests.ops.cases import ints, named
from tests.ops.test_attention import expected
from tests.ops.test_context_parallel import mesh_of

# Tiny programs, whose compilation is what takes long.
FAST = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
compiled = functools.partial(jax.jit, compiler_options=FAST)

RULES = {
    "plain": lambda bias: {},
    "causal, empty rows": lambda bias: {"mask": masks.causal(-2)},
    "lengths, bias, cap": lambda bias: {
        "mask": masks.causal() & masks.lengths(key=ints(7, 4)),
        "score": scores.chain(scores.bias(bias), scores.soft_cap(1.5)),
    },
    "a rule that is not linear": lambda bias: {
        "mask": masks.segments(
            np.array([[0] * 3 + [1] * 5, [0] * 8]), np.zeros((2, 7), int)
        ),
        "score": scores.modifier(
            lambda s, b, h, q, k, table: jnp.sin(s) * table[0, h, 0, k], bias
        ),
    },
    "dropout": lambda bias: {"dropout_rate": 0.3, "dropout_rng": jax.random.key(0)},
}


def normal(*shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def arrays(seed=0):
    """query, key, value and a bias."""
    shapes = (2, 8, 4, 3), (2, 7, 2, 3), (2, 7, 2, 5), (1, 4, 1, 7)
    return tuple(normal(*shape, seed=seed + i) for i, shape in enumerate(shapes))


def loss(implementation, rule="lengths, bias, cap"):
    def run(x):
        options = RULES[rule](x[3]) | {"implementation": implementation}
        out, residual = dot_product_attention(*x[:3], return_residuals=True, **options)
        seen = jnp.where(residual == -jnp.inf, 0.0, residual)
        return jnp.sum(jnp.sin(out)) + jnp.sum(seen**2)

    return run


def inner(one, other):
    return sum(map(jnp.vdot, one, other))


MODES = {
    "forward": lambda f, x, t: jax.jvp(f, (x,), (t,)),
    "forward twice": lambda f, x, t: jax.jvp(
        lambda x: jax.jvp(f, (x,), (t,))[1], (x,), (t,)
    ),
    "forward over reverse": lambda f, x, t: jax.jvp(jax.jit(jax.grad(f)), (x,), (t,)),
    "reverse over forward": lambda f, x, t: jax.grad(
        lambda x: jax.jvp(f, (x,), (t,))[1]
    )(x),
    "reverse over reverse": lambda f, x, t: jax.grad(
        lambda x: inner(jax.jit(jax.grad(f))(x), t)
    )(x),
    "through remat": lambda f, x, t: jax.grad(
        lambda x: inner(jax.grad(jax.checkpoint(f))(x), t)
    )(x),
    "mapped": lambda f, x, t: jax.vmap(
        lambda s: jax.jvp(jax.grad(f), (x,), (jax.tree.map(lambda t: s * t, t),))
    )(jnp.arange(2.0)),
    "of a mapped gradient": lambda f, x, t: jax.grad(
        lambda s: jnp.sum(
            jax.vmap(lambda s: inner(jax.grad(f)(tuple(s * x for x in x)), t))(s)
        )
    )(jnp.array([1.0, 0.5])),
    "through a scan": lambda f, x, t: jax.grad(
        lambda x: jnp.sum(
            jax.lax.scan(
                lambda q, _: (0.1 * jax.grad(f)((q, *x[1:]))[0], None), x[0], length=2
            )[0]
        )
    )(x),
}


@pytest.fixture
def blocks_of_three(monkeypatch):
    monkeypatch.setattr(blockwise, "choose_blocks", lambda *_: (3, 3))


def alike(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
        np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-11)


def check(mode, rule):
    with jax.enable_x64(True):
        x, tangents = arrays(), arrays(seed=9)
        found, wanted = (
            compiled(functools.partial(MODES[mode], loss(name, rule)))(x, tangents)
            for name in ("blockwise", "reference")
        )
        alike(found, wanted)
        assert all(np.abs(y).max() > 1e-3 for y in jax.tree.leaves(wanted)[:3])


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_equals_the_reference(mode, blocks_of_three):
    check(mode, "lengths, bias, cap")


@pytest.mark.parametrize("rule", [rule for rule in RULES if "bias" not in rule])
@pytest.mark.parametrize("mode", ["forward over reverse", "reverse over reverse"])
def test_each_rule_equals_the_reference(mode, rule, blocks_of_three):
    check(mode, rule)


def test_without_a_compiled_function_it_is_the_same(blocks_of_three):
    with jax.enable_x64(True):
        x, tangents = arrays(), arrays(seed=9)
        mode = functools.partial(MODES["reverse over reverse"], x=x, t=tangents)
        alike(mode(loss("blockwise")), mode(loss("reference")))


@pytest.mark.parametrize("name", ["causal, empty rows", "grouped heads", "soft cap"])
def test_tangents_equal_differences_of_the_oracle(name, blocks_of_three):
    case, step = named(name), 1e-6
    with jax.enable_x64(True):
        x = case.arrays(np.float64)
        tangents = tuple(
            np.asarray(normal(*y.shape, seed=i)) for i, y in enumerate(x[:3])
        )
        run = functools.partial(
            dot_product_attention,
            mask=case.mask(),
            score=case.score(),
            scale=case.scale,
            implementation="blockwise",
        )
        push = jax.jit(lambda x, t: jax.jvp(run, x, t)[1])
        found = push(tuple(x[:3]), tangents)
    up, down = (
        expected([*(y + s * t for y, t in zip(x, tangents)), *x[3:]], case).out
        for s in (step, -step)
    )
    np.testing.assert_allclose(found, (up - down) / (2 * step), atol=1e-8)


def test_a_nan_behind_a_mask_reaches_no_tangent(blocks_of_three):
    query, key, value = (jnp.float32(x) for x in arrays()[:3])
    t = arrays(seed=9)[:3]
    mask = masks.lengths(key=ints(5, 5))

    def run(query, key, value):
        return jnp.sum(
            dot_product_attention(
                query, key, value, mask=mask, implementation="blockwise"
            )
            ** 2
        )

    t = tuple(jnp.float32(x) for x in t)
    product = jax.jit(lambda *x: jax.jvp(jax.grad(run, (0, 1, 2)), x, t)[1])
    clean = product(query, key, value)
    bad = product(query, key.at[:, 5:].set(jnp.nan), value.at[:, 6].set(jnp.inf))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), bad, clean)


@pytest.mark.parametrize("mode", ["forward over reverse", "reverse over reverse"])
@pytest.mark.parametrize("method", ["ring", "ulysses"])
@pytest.mark.parametrize("check_vma", [True, False])
def test_shared_out_over_devices_it_is_the_same(mode, method, check_vma, monkeypatch):
    monkeypatch.setattr(blockwise, "choose_limits", lambda *_: (3, 3))
    mesh = mesh_of(data=2, context=2)

    def shared(x):
        options = RULES["lengths, bias, cap"](x[3])
        out, residual = context_parallel_attention(
            *x[:3],
            mesh=mesh,
            method=method,
            check_vma=check_vma,
            return_residuals=True,
            **options,
        )
        return jnp.sum(jnp.sin(out)) + jnp.sum(residual**2)

    with jax.enable_x64(True):
        x, tangents = arrays(), arrays(seed=9)
        found, wanted = (
            compiled(functools.partial(MODES[mode], f))(x, tangents)
            for f in (shared, loss("reference"))
        )
        alike(found, wanted)


def largest(lowered):
    """The elements of the largest array of a program, before XLA has looked at it."""
    shapes = re.findall(r"tensor<((?:\d+x)+)[a-z]", lowered.as_text())
    assert len(shapes) > 100
    return max(np.prod([int(n) for n in shape.split("x")[:-1]]) for shape in shapes)


@pytest.mark.parametrize("mode", ["forward over reverse", "reverse over reverse"])
def test_memory_is_linear_in_length(mode):
    shape = jax.ShapeDtypeStruct((1, 4096, 2, 8), jnp.float32)

    def run(x):
        return jnp.sum(dot_product_attention(*x, mask=masks.causal()) ** 2)

    product = jax.jit(functools.partial(MODES[mode], run))
    lowered = product.lower(3 * (shape,), 3 * (shape,))
    assert largest(lowered) <= 512 * 512
    # Of 14 arrays of 256 KiB; a matrix of 4096 x 4096 would take 64 MiB.
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 16 * 2**20


def test_third_order_is_refused_in_reverse_and_goes_in_forward_mode(blocks_of_three):
    with jax.enable_x64(True):
        x, t = arrays(), arrays(seed=9)

        def product(f):
            return lambda x: inner(MODES["forward over reverse"](f, x, t)[1], t)

        found, wanted = (
            compiled(lambda x, name=name: jax.jvp(product(loss(name)), (x,), (t,)))(x)
            for name in ("blockwise", "reference")
        )
        alike(found, wanted)
        with pytest.raises(NotImplementedError, match="implementation='reference'"):
            jax.grad(lambda x: jax.grad(product(loss("blockwise")))(x)[0].sum())(x)
