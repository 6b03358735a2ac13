import itertools

import numpy as np
import pytest

from qkv_jax.data import Shape, choose_buckets
from qkv_jax.data.buckets import assign_buckets, bucket_rows


def sample_lengths(count, *, seed=0, longest=120):
    """Source and target lengths as translations have them: skewed and correlated."""
    rng = np.random.default_rng(seed)
    source = np.clip(rng.lognormal(2.3, 0.7, count), 1, longest).astype(int)
    target = np.clip(source * rng.normal(1.1, 0.2, count), 1, longest).astype(int)
    return source, target


def cost(source, target, buckets, target_weight):
    shapes = np.array(buckets)[assign_buckets(source, target, buckets)]
    return (shapes * [1, target_weight]).sum()


@pytest.mark.parametrize("count", [1, 2, 5, 8])
@pytest.mark.parametrize("multiple", [1, 4, 8])
def test_every_pair_fits_into_few_shapes_that_grow(count, multiple):
    source, target = sample_lengths(997)
    buckets = choose_buckets(source, target, count=count, multiple=multiple)
    assert 1 <= len(buckets) <= count
    assert assign_buckets(source, target, buckets).max() == len(buckets) - 1
    assert buckets == sorted(buckets)
    assert all(size % multiple == 0 for shape in buckets for size in shape)
    assert buckets[-1].source - source.max() < multiple
    assert buckets[-1].target - target.max() < multiple


def test_no_other_chain_of_shapes_costs_less():
    source, target = sample_lengths(60, longest=6)
    chosen = choose_buckets(source, target, count=3, multiple=1, target_weight=2.5)
    last = Shape(source.max(), target.max())
    grid = list(itertools.product(range(1, last.source + 1), range(1, last.target + 1)))
    least = min(
        cost(source, target, [Shape(*first), Shape(*second), last], 2.5)
        for first, second in itertools.product(grid, grid)
        if first[0] <= second[0] and first[1] <= second[1]
    )
    assert cost(source, target, chosen, 2.5) == least


def test_more_shapes_never_cost_more():
    source, target = sample_lengths(2_000)
    costs = [
        cost(source, target, choose_buckets(source, target, count=count), 2.0)
        for count in range(1, 9)
    ]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < 0.5 * costs[0]


def test_a_heavy_target_buys_less_target_padding():
    source, target = sample_lengths(2_000)
    room = []
    for weight in (0.1, 10.0):
        buckets = choose_buckets(source, target, count=4, target_weight=weight)
        room.append(np.array(buckets)[assign_buckets(source, target, buckets)].sum(0))
    assert room[1][1] < room[0][1] and room[1][0] > room[0][0]


def test_thinning_many_lengths_costs_little(monkeypatch):
    source, target = sample_lengths(3_000)
    full = choose_buckets(source, target, count=6, multiple=4)
    monkeypatch.setattr("qkv_jax.data.buckets._CANDIDATES", 12)
    thin = choose_buckets(source, target, count=6, multiple=4)
    assert thin[-1] == full[-1]
    best = cost(source, target, full, 2.0)
    assert best <= cost(source, target, thin, 2.0) < 1.1 * best


def test_equal_lengths_need_one_shape():
    lengths = np.full(10, 7)
    assert choose_buckets(lengths, lengths, count=5) == [Shape(8, 8)]


def test_limits_leave_longer_pairs_outside():
    source, target = np.array([3, 9, 30]), np.array([3, 40, 9])
    buckets = choose_buckets(source, target, max_source=12, max_target=20)
    assert buckets[-1] == Shape(12, 20)
    assert assign_buckets(source, target, buckets).tolist()[1:] == [len(buckets)] * 2
    longer = choose_buckets(source, target, max_source=1_000, max_target=1_000)
    assert longer[-1] == Shape(32, 40)


@pytest.mark.parametrize(
    "name", ["count", "multiple", "max_source", "max_target", "target_weight"]
)
def test_an_argument_that_is_not_positive_is_named(name):
    with pytest.raises(ValueError, match=f"{name} must be positive; got 0"):
        choose_buckets(np.array([3]), np.array([3]), **{name: 0})


def test_nothing_to_choose_by_is_an_error():
    with pytest.raises(ValueError, match="source_lengths is empty"):
        choose_buckets(np.array([], int), np.array([], int))


def test_rows_keep_both_budgets_and_the_multiple():
    shape = Shape(30, 10)
    assert bucket_rows(shape, target_tokens=100) == 10
    assert bucket_rows(shape, target_tokens=100, source_tokens=150) == 5
    assert bucket_rows(shape, target_tokens=100, rows_multiple=4) == 8
    assert bucket_rows(shape, target_tokens=5, rows_multiple=4) == 4


@pytest.mark.parametrize("name", ["target_tokens", "source_tokens", "rows_multiple"])
def test_a_budget_that_is_not_positive_is_named(name):
    with pytest.raises(ValueError, match=f"{name} must be positive; got 0"):
        bucket_rows(Shape(30, 10), **{"target_tokens": 100, name: 0})
