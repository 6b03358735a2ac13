"""SASRec and BERT4Rec: who sees whom, what is asked, and a rule of succession learnt."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from qkv_jax.data.ratings import Ratings
from qkv_jax.models import recommender
from qkv_jax.models.recommender import bert4rec, sasrec
from qkv_jax.tasks.ranking import Ranking
from tests.data.test_ratings import write_ratings

SMALL = {"items": 11, "longest": 7, "d_model": 8, "d_ff": 16, "layers": 1}
DRY = {"dropout": 0.0, "attention_dropout": 0.0}
presets = pytest.mark.parametrize("preset", [sasrec, bert4rec])


def model(preset, **changes):
    return recommender.Model(preset(**SMALL | changes), rngs=nnx.Rngs(0))


def run(network, batch, rng=None):
    total, sums = jax.jit(lambda batch: network.loss(batch, rng=rng))(batch)
    return float(total), {name: float(value) for name, value in sums.items()}


def predict(network, batch):
    return np.asarray(jax.jit(network.predict)(batch)["scores"])


ROWS = {
    "items": np.array([[3, 1, 4, 1, 5, 9, 0], [2, 7, 0, 0, 0, 0, 0]], np.int32),
    "segments": np.array([[1, 1, 1, 2, 2, 2, 0], [1, 1, 0, 0, 0, 0, 0]], np.int32),
    "weight": np.ones(2, np.float32),
}
HELD_OUT = {
    "items": ROWS["items"],
    "segments": (ROWS["items"] > 0).astype(np.int32),
    "target": np.array([6, 8], np.int32),
    "weight": np.ones(2, np.float32),
}


def test_a_causal_state_sees_what_precedes_it_in_its_own_history():
    network = model(sasrec, **DRY)
    changed = ROWS["items"].copy()
    changed[0, 1] = 6
    states = jax.jit(lambda items: network(items, jnp.asarray(ROWS["segments"])))
    before, after = states(ROWS["items"]), states(changed)
    moved = np.abs(before - after).max(-1) > 1e-6
    np.testing.assert_array_equal(np.argwhere(moved), [[0, 1], [0, 2]])


@presets
def test_what_fills_a_row_up_and_who_shares_it_change_nothing(preset):
    network = model(preset, **DRY)
    packed = run(network, ROWS)
    apart = {
        "items": np.array([[3, 1, 4], [1, 5, 9], [2, 7, 0], [0, 0, 0]], np.int32),
        "weight": np.ones(4, np.float32),
    }
    apart["segments"] = (apart["items"] > 0).astype(np.int32)
    assert run(network, apart)[1] == pytest.approx(packed[1], rel=1e-5)
    whole, weighed = run(network, HELD_OUT), HELD_OUT | {"weight": np.float32([1, 0])}
    first = {name: array[:1] for name, array in HELD_OUT.items()}
    assert run(network, weighed)[1] == pytest.approx(run(network, first)[1], rel=1e-5)
    assert whole[1]["tokens"] == 2.0


@presets
def test_held_out_scores_are_those_of_the_loss(preset):
    network = model(preset, **DRY)
    scores = predict(network, HELD_OUT)
    assert scores.shape == (2, 12) and np.all(scores[:, 0] == -np.inf)
    nll = -jax.nn.log_softmax(scores)[np.arange(2), HELD_OUT["target"]]
    assert run(network, HELD_OUT)[0] == pytest.approx(float(nll.sum()), rel=1e-5)


def test_a_full_row_makes_room_for_the_mask_by_its_first_item():
    network = model(bert4rec, **DRY)
    full = {name: array[:1] for name, array in HELD_OUT.items()}
    full["items"] = np.arange(1, 8, dtype=np.int32)[None]
    full["segments"] = np.ones((1, 7), np.int32)
    cut = full | {"items": np.array([[2, 3, 4, 5, 6, 7, 0]], np.int32)}
    cut["segments"] = (cut["items"] > 0).astype(np.int32)
    np.testing.assert_array_equal(predict(network, full), predict(network, cut))


def test_rows_longer_than_the_model_s_are_refused():
    rows = {name: np.tile(HELD_OUT[name], (1, 2)) for name in ("items", "segments")}
    with pytest.raises(
        ValueError, match="rows have 14 items; the model's longest is 7"
    ):
        model(sasrec).predict(HELD_OUT | rows)


def test_masked_items_are_drawn_anew_and_cannot_be_seen():
    network = model(bert4rec, mask_rate=0.3, last_rate=0.5, **DRY)
    rows = {name: jnp.asarray(np.repeat(array, 40, 0)) for name, array in ROWS.items()}
    asked = jax.jit(network._ask)(rows, jax.random.key(0))
    assert asked.at.shape == (80, 2)
    seen = np.take_along_axis(asked.items, asked.at, 1)
    was = np.take_along_axis(rows["items"], asked.at, 1)
    real = np.asarray(asked.weights) > 0
    assert np.all(seen[real] == 12) and np.all(was[real] == asked.labels[real])
    assert np.all(was[~real] == seen[~real])
    # Of the second history, either both items are masked, or the last.
    second = real[40:].sum(1)
    assert set(second) == {1, 2} and np.all(asked.at[40:][second == 1, 0] == 1)
    again = jax.jit(network._ask)(rows, jax.random.key(1))
    assert np.any(np.asarray(asked.at) != again.at)


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    directory = write_ratings(tmp_path_factory.mktemp("ratings"), users=60)
    return Ratings(directory=directory, longest=7).load()


def weighted(part):
    part = {name: jnp.asarray(array) for name, array in part.items()}
    return part | {"weight": jnp.ones(len(part["items"]))}


@presets
def test_items_that_follow_each_other_are_learnt(preset, splits):
    sizes = {"d_model": 16, "d_ff": 32, "mask_rate": 0.3, "last_rate": 0.5}
    graph, params = nnx.split(model(preset, **sizes, **DRY))
    rows, optimizer = weighted(splits.train), optax.adam(0.02)

    @jax.jit
    def step(params, state, rng):
        loss = lambda p: nnx.merge(graph, p).loss(rows, rng=rng)[0]
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for i in range(120):
        params, state = step(params, state, jax.random.key(i))
    test = weighted(splits.test)
    outputs = {"scores": predict(nnx.merge(graph, params), test)}
    assert Ranking(at=(1,), exclude_seen=False)(outputs, test)["hr@1"] > 0.8


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": "masked"},
        {"d_model": 12},
        {"d_ff": 8},
        {"heads": 1},
        {"layers": 2},
        {"activation": "relu"},
        {"norm": "post"},
        {"dropout": 0.5},
        {"attention_dropout": 0.5},
        {"activation_dropout": 0.5},
        {"objective": "masked", "mask_rate": 0.6},
        {"objective": "masked", "last_rate": 1.0},
    ],
)
def test_every_choice_changes_what_is_computed(changes):
    def program(**changes):
        graph, params = nnx.split(model(sasrec, **changes))
        loss = lambda p, rng: nnx.merge(graph, p).loss(dict(ROWS), rng=rng)
        return str(jax.make_jaxpr(loss)(params, jax.random.key(0)))

    first = {k: v for k, v in changes.items() if len(changes) > 1 and k == "objective"}
    assert program(**first) != program(**changes)


def test_the_bias_of_an_item_moves_its_score_alone():
    network = model(sasrec)
    before = predict(network, HELD_OUT)
    network.bias[...] = network.bias[...].at[4].set(2.0)
    moved = predict(network, HELD_OUT)[:, 1:] - before[:, 1:]
    np.testing.assert_allclose(moved, np.tile(np.eye(11)[4] * 2, (2, 1)), atol=1e-5)
    assert model(sasrec, output_bias=False).bias is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "sampled"}, "objective must be"),
        ({"layers": 0}, "layers must be positive"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"mask_rate": 0.0}, "mask_rate must be in"),
        ({"last_rate": 2.0}, "last_rate must be in"),
        ({"items": 0}, "items must be positive"),
    ],
)
def test_errors_name_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        model(sasrec, **changes)
