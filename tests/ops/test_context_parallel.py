"""Attention shared out over the devices of a mesh equals that of one device."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from qkv_jax.ops import (
    blocks_looked_at,
    blockwise,
    context_parallel,
    context_parallel_attention,
    dot_product_attention,
    masks,
    mesh_attention,
    patterns,
    scores,
    shard_attention,
)
from tests.ops.cases import named
from tests.ops.test_attention import close, expected, normal, qkv

METHODS = ("ring", "zigzag", "ulysses", "gather")
NAMES = (
    "plain",
    "T < S, prime, E != H",
    "grouped heads",
    "one query",
    "no keys",
    "scores of hundreds",
    "causal, T > S",
    "causal, empty rows",
    "key lengths, one of them 0",
    "segments, T != S, one without keys",
    "dense",
    "chain: bias, then soft cap; NaN masked",
)
methods = pytest.mark.parametrize("method", METHODS)
# `make test` has the causal cases by every method, and the others by every second.
RUNS = [
    pytest.param(
        name,
        method,
        id=f"{name}-{method}",
        marks=[pytest.mark.slow] if "causal" not in name and (i + j) % 2 else [],
    )
    for i, name in enumerate(NAMES)
    for j, method in enumerate(METHODS)
]


@pytest.fixture(autouse=True, params=["blocks", "dense"])
def kind_of_parts(request, monkeypatch):
    """Parts of a device in small blocks, and at once."""
    monkeypatch.setattr(blockwise, "choose_limits", lambda *_: (3, 3))
    if request.param == "blocks":
        monkeypatch.setattr(context_parallel, "DENSE_PAIRS", 0)


def mesh_of(kind=AxisType.Auto, **sizes):
    count = np.prod(list(sizes.values()))
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(kind,) * len(sizes),
        devices=jax.devices()[:count],
    )


@pytest.mark.parametrize("name, method", RUNS)
def test_values_and_gradients_equal_the_oracle(name, method):
    case = named(name)
    sizes = {"data": 2, "context": 2 if method == "ulysses" else 4}
    if method == "ulysses" and case.N % 2:
        pytest.skip("ulysses shares out heads, of which there is an odd number")
    attention = functools.partial(
        context_parallel_attention,
        mesh=mesh_of(**sizes),
        method=method,
        scale=case.scale,
        return_residuals=True,
    )

    @jax.jit
    def run(arrays, mask, score):
        *inputs, d_out, d_lse = arrays
        found, back = jax.vjp(lambda *x: attention(*x, mask=mask, score=score), *inputs)
        return *found, back((d_out, d_lse))

    with jax.enable_x64(True):
        arrays = case.arrays(np.float64)
        out, logsumexp, gradients = run(arrays, case.mask(), case.score())
        truth = expected(arrays, case)
        close(out, truth.out, "float64")
        close(logsumexp, truth.logsumexp, "float64")
        for got, want in zip(gradients, truth.gradients):
            close(got, want, "float64")


def sloped(score, b, h, q, k, slopes):
    return score - slopes[h] * q


def rules():
    """Rules with arrays of every form, in the default precision."""

    def array(*shape, seed):
        return jnp.asarray(np.random.default_rng(seed).normal(size=shape))

    return scores.chain(
        scores.bias(array(2, 4, 13, 19, seed=5)),
        scores.relative_bias(array(8, 4, seed=6), True, 16),
        scores.modifier(sloped, array(4, seed=7)),
        scores.soft_cap(jnp.asarray(1.5)),
    )


SEEN = masks.causal(6) & masks.lengths(
    key=np.array([17, 9], np.int32)
) & masks.segments(
    np.sort(normal(2, 13) > 0).astype(np.int32), np.ones((2, 19), np.int32)
) | masks.prefix(2)


def pulled(attention):
    """Loss, and the gradients of query, key, value and all arrays of the rule, in float64."""
    dropout = {"dropout_rate": 0.3, "dropout_rng": jax.random.key(1)}

    def loss(arrays, score):
        out, residual = attention(
            *arrays, mask=SEEN, score=score, return_residuals=True, **dropout
        )
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(residual))

    with jax.enable_x64(True):
        arrays = tuple(jnp.asarray(x, jnp.float64) for x in qkv(T=13, S=19, H=5))
        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        return jax.tree.map(np.asarray, run(arrays, rules()))


@pytest.fixture(scope="module")
def dense():
    return pulled(functools.partial(dot_product_attention, implementation="reference"))


def alike(found, wanted):
    assert all(x.dtype == np.float64 for x in jax.tree.leaves(found))
    jax.tree.map(functools.partial(close, dtype="float64"), found, wanted)


@methods
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_any_rule_and_dropout_with_gradients_of_all_arrays(
    method, check_vma, kind, dense
):
    mesh = mesh_of(kind, data=2, context=2, tensor=2)
    attention = functools.partial(
        context_parallel_attention, mesh=mesh, method=method, check_vma=check_vma
    )
    alike(pulled(attention), dense)


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_dropout_and_gradients_are_the_same_on_any_number_of_devices(devices, dense):
    mesh = mesh_of(context=devices)
    alike(pulled(functools.partial(context_parallel_attention, mesh=mesh)), dense)


@methods
@pytest.mark.parametrize("check_vma", [True, False])
def test_within_a_shard_map_of_the_user(method, check_vma):
    mesh = mesh_of(data=2, context=2, tensor=2)
    arrays, slopes = qkv(T=8, S=12), jnp.asarray(normal(4))
    spec = PartitionSpec("data", "context", "tensor")

    def attention(query, key, value, slopes, attend):
        score = scores.alibi(slopes)
        return attend(query, key, value, mask=masks.causal(4), score=score)

    def here(*arrays):
        axes = {"batch_axes": ("data",), "head_axis": "tensor"}
        attend = functools.partial(shard_attention, method=method, **axes)
        return attention(*arrays, attend)[0]

    shared = jax.shard_map(
        here,
        mesh=mesh,
        in_specs=(*(spec,) * 3, PartitionSpec()),
        out_specs=spec,
        check_vma=check_vma,
    )

    def gradients(run):
        loss = lambda *x: jnp.sum(jnp.sin(run(*x)))
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*arrays, slopes)

    wanted = gradients(functools.partial(attention, attend=dot_product_attention))
    jax.tree.map(close, gradients(shared), wanted)


def test_partial_results_of_bfloat16_are_kept_in_float32():
    query, key, value = (jnp.asarray(x, jnp.bfloat16) for x in qkv(T=16, S=64))
    mesh = mesh_of(context=8)
    run = functools.partial(context_parallel_attention, mesh=mesh)
    out = jax.jit(run)(query, key, value)
    wide = (x.astype(jnp.float32) for x in (query, key, value))
    exact = dot_product_attention(*wide)
    once = np.abs(exact.astype(jnp.bfloat16).astype(jnp.float32) - exact).max()
    assert out.dtype == jnp.bfloat16
    assert np.abs(out.astype(jnp.float32) - exact).max() < 2.5 * once


def test_parts_that_the_mask_rules_out_are_not_looked_at(monkeypatch):
    hops = []
    look = blockwise.look

    def counted(*arguments):
        jax.debug.callback(lambda: hops.append(1))
        return look(*arguments)

    monkeypatch.setattr(blockwise, "look", counted)
    monkeypatch.setattr(blockwise, "choose_limits", lambda *_: (4, 4))
    arrays = qkv(T=16, S=16)
    run = functools.partial(context_parallel_attention, mesh=mesh_of(context=4))
    # One compilation each: the list is of this very call.
    for mask, wanted in ((masks.causal(), 10), (masks.window(4, 0), 7), (None, 16)):
        hops.clear()
        jax.block_until_ready(jax.jit(run)(*arrays, mask=mask))
        jax.effects_barrier()
        assert len(hops) == wanted


def test_zigzag_gives_all_devices_the_same_work_under_a_causal_mask():
    for devices in (2, 4, 8):
        worst = {}
        for method in ("ring", "zigzag"):
            work = blocks_looked_at(
                masks.causal(), (1, 1, 16_384, 16_384), devices, method, (512, 512)
            )
            assert work.sum() == 32 * 33 / 2
            worst[method] = work.sum(1).max() / work.sum(1).mean() - 1
            waited = work.max(0).sum() / work.sum(1).mean() - 1
            print(
                f"{devices} devices, {method}: {worst[method]:.1%} over the mean, "
                f"{waited:.1%} with waiting at each hop"
            )
        assert worst["zigzag"] <= 0.05 < worst["ring"]


def test_neither_keys_nor_scores_are_gathered():
    # 64 positions a device: nothing of a device may be as long as the whole, or T x S.
    mesh, spec = mesh_of(context=8), PartitionSpec(None, "context")
    shape = jax.ShapeDtypeStruct(
        (1, 512, 2, 16), jnp.float32, sharding=jax.NamedSharding(mesh, spec)
    )

    def loss(*arrays):
        out = context_parallel_attention(*arrays, mask=masks.causal(), mesh=mesh)
        return jnp.sum(out**2)

    step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    text = step.lower(*[shape] * 3).compile().as_text()
    assert "all-gather" not in text
    assert "collective-permute" in text
    shapes = {tuple(x.split(",")) for x in re.findall(r"\w\[([\d,]+)\]", text)}
    assert any("64" in shape for shape in shapes)
    assert not [shape for shape in shapes if "512" in shape]


def test_long_sequences_on_a_mesh_are_shared_out_by_rows_and_heads(monkeypatch):
    mesh = mesh_of(data=4, tensor=2)
    arrays = qkv(B=4, T=300, S=300, N=4, K=2)
    seen = []
    loops = blockwise.forward_blocks

    def watched(inputs, *rest):
        seen.append(inputs.query.shape)
        return loops(inputs, *rest)

    monkeypatch.setattr(blockwise, "forward_blocks", watched)
    monkeypatch.setattr(blockwise, "choose_limits", lambda *_: (128, 128))
    wanted = dot_product_attention(*arrays, implementation="reference")
    with jax.set_mesh(mesh):
        found = jax.jit(functools.partial(mesh_attention))(*arrays)
    close(found, wanted)
    assert seen == [(1, 312, 2, 3)]


@pytest.mark.parametrize(
    "T, N, sent",
    [(16, 4, "all_to_all"), (16, 3, "all_gather"), (64, 4, "collective_permute")],
)
def test_a_method_is_chosen_by_lengths_and_heads(T, N, sent, monkeypatch):
    monkeypatch.setattr(context_parallel, "DENSE_PAIRS", 16 * 16)
    mesh = mesh_of(context=2)
    run = functools.partial(context_parallel_attention, mesh=mesh, method="auto")
    text = jax.jit(run).lower(*qkv(T=T, S=T, N=N, K=1)).as_text()
    kinds = ("all_to_all", "all_gather", "collective_permute")
    assert [kind for kind in kinds if f"stablehlo.{kind}" in text] == [sent]


def test_patterns_keep_their_meaning():
    run = functools.partial(context_parallel_attention, mesh=mesh_of(context=4))
    run, arrays = jax.jit(run), qkv(B=1, T=20, S=20)
    for mask in (
        patterns.longformer(2, [0, 13]),
        patterns.local_2d(4, 5, 1),
        patterns.block_sparse(np.eye(5, dtype=bool)[::-1].copy(), 4),
    ):
        found = run(*arrays, mask=mask)
        close(found, jax.jit(dot_product_attention)(*arrays, mask=mask))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mesh": None}, "needs a mesh: pass mesh="),
        (
            {"method": "striped"},
            r"one of \['auto', 'ring', 'zigzag', 'ulysses', 'gather'\]; got 'str",
        ),
        ({"method": "ulysses"}, "shares out the 4 query heads .* over the 8 devices"),
        ({"dropout_rate": 0.5}, "dropout_rng must be a jax.random key"),
    ],
)
def test_what_does_not_go_is_one_clear_error(changes, message):
    options = {"mesh": mesh_of(context=8)} | changes
    with pytest.raises(ValueError, match=message):
        context_parallel_attention(*qkv(), **options)


@pytest.mark.parametrize(
    "method, message",
    [
        (
            "striped",
            r"one of \['auto', 'ring', 'zigzag', 'ulysses', 'gather'\]; got 'striped'",
        ),
        ("ulysses", "shares out the 4 query heads of a device over the 8 devices"),
        ("zigzag", "an even number of queries and keys on a device; got 1 and 2"),
    ],
)
def test_within_a_shard_map_it_is_the_same_error(method, message):
    spec = PartitionSpec(None, "context")
    shared = jax.shard_map(
        functools.partial(shard_attention, method=method),
        mesh=mesh_of(context=8),
        in_specs=spec,
        out_specs=spec,
    )
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(shared, *qkv(T=8, S=16))
