"""GAT and GATv2: the dense form, what a node sees, and one graph learnt by heart."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from qkv_jax.data.citations import CitationGraph
from qkv_jax.models import gat
from tests.data.test_citations import write_graph

SMALL = gat.Config(features=13, classes=3, heads=2, head_size=5, l2=0.0)
kinds = pytest.mark.parametrize("kind", ["gat", "gatv2"])


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return CitationGraph(directory=write_graph(tmp_path_factory.mktemp("graph"))).load()


def batch(part, weight=1.0):
    return dict(part) | {"weight": np.full(1, weight, np.float32)}


def model(**changes):
    return gat.Model(dataclasses.replace(SMALL, **changes), rngs=nnx.Rngs(0))


def logits(network, part, **changes):
    arrays = {"features": None, "receivers": None, "senders": None}
    arrays = {name: part[name][0] for name in arrays} | changes
    return _run(network, *map(jnp.asarray, arrays.values()))


@nnx.jit
def _run(network, *arrays):
    return network(*arrays)


@kinds
def test_the_dense_form_gives_the_same_values_and_gradients(splits, kind):
    network = model(attention=kind)
    graph, params = nnx.split(network)
    # A node that receives nothing, and an arc that is not there.
    receivers = np.append(splits.train["receivers"][0], -1)
    senders = np.append(splits.train["senders"][0], 5)
    kept = receivers != 4
    arcs = {"receivers": receivers[kept], "senders": senders[kept]}

    @functools.partial(jax.jit, static_argnums=0)
    def run(form, params):
        def total(params):
            network = nnx.merge(graph, params)
            for layer in network.layers:
                layer.config = dataclasses.replace(SMALL, attention=kind, form=form)
            out = logits(network, splits.train, **arcs)
            return jnp.sum(jnp.sin(out)), out

        return jax.grad(total, has_aux=True)(params)

    sparse, dense = run("arcs", params), run("dense", params)
    assert np.std(sparse[1]) > 0.01
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), sparse, dense
    )


@kinds
def test_nodes_see_as_far_as_there_are_layers(splits, kind):
    network = model(attention=kind)
    features = splits.train["features"][0]
    changed = features.copy()
    changed[0] += 1.0
    before = logits(network, splits.train)
    after = logits(network, splits.train, features=changed)
    # Node i has arcs to i - 3, i and i + 3.
    moved = np.flatnonzero(np.abs(before - after).max(1) > 1e-6)
    assert moved.tolist() == [0, 3, 6]


def test_the_loss_is_over_the_nodes_that_count_and_l2_is_of_training(splits):
    network, rng = model(l2=0.5), jax.random.key(0)
    valid = jax.jit(lambda rows: network.loss(rows, rng=None))
    total, sums = valid(batch(splits.valid))
    assert float(sums["tokens"]) == 9.0 and float(total) == float(sums["nll_sum"])
    none, sums = valid(batch(splits.valid, 0.0))
    assert float(none) == float(sums["tokens"]) == float(sums["accuracy_sum"]) == 0.0
    squares = sum(
        float(jnp.sum(part**2))
        for part in jax.tree.leaves(nnx.state(network))
        if jnp.any(part != 0)  # Biases are.
    )
    total, sums = jax.jit(lambda rows: network.loss(rows, rng=rng))(batch(splits.train))
    more = float(total - sums["nll_sum"])
    assert more == pytest.approx(6 * 0.5 * 0.5 * squares, rel=1e-4)


@kinds
def test_a_graph_is_learnt_by_heart_and_its_other_nodes_follow(splits, kind):
    network = model(attention=kind, dropout=0.2, attention_dropout=0.2)
    graph, params = nnx.split(network)
    optimizer = optax.adam(0.03)

    @jax.jit
    def step(params, state, rng):
        loss = lambda p: nnx.merge(graph, p).loss(batch(splits.train), rng=rng)[0]
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for i in range(30):
        params, state = step(params, state, jax.random.key(i))
    network = nnx.merge(graph, params)
    for part in (splits.train, splits.test):
        _, sums = network.loss(batch(part), rng=None)
        assert float(sums["accuracy_sum"]) == float(sums["tokens"])


@pytest.mark.parametrize(
    "changes",
    [
        {"attention": "gatv2"},
        {"attention": "gatv2", "share": True},
        {"heads": 3},
        {"head_size": 4},
        {"output_heads": 2},
        {"layers": 3},
        {"negative_slope": 0.5},
        {"dropout": 0.1},
        {"attention_dropout": 0.1},
        {"l2": 0.1},
    ],
)
def test_every_choice_changes_what_is_computed(splits, changes):
    def program(**changes):
        graph, params = nnx.split(model(**changes))
        loss = lambda p, rng: nnx.merge(graph, p).loss(batch(splits.train), rng=rng)
        return str(jax.make_jaxpr(loss)(params, jax.random.key(3)))

    first = {k: v for k, v in changes.items() if len(changes) > 1 and k != "share"}
    assert program(**first) != program(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "gcn"}, "attention must be one of"),
        ({"form": "sparse"}, "form must be one of"),
        ({"heads": 0}, "heads must be positive"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"l2": -1.0}, "l2 must not be negative"),
        ({"share": True}, "share is of attention='gatv2'"),
        ({"classes": 0}, "classes must be positive"),
    ],
)
def test_errors_name_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        model(**changes)
