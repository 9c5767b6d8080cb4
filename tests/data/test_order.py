"""Orders: nothing left out, shares as the weights say, and nothing but the step to know."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blip2.data import order
from blip2.data.order import BLOCK_STEPS, Order, indices_of_step, permuted


@given(count=st.integers(1, 300), key=st.tuples(st.integers(0, 9), st.integers(0, 9)))
def test_a_computed_order_is_a_permutation(count, key):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "LARGEST_LISTED", 0)
        assert sorted(permuted(np.arange(count), count, key)) == list(range(count))


def test_a_computed_order_looks_drawn(monkeypatch):
    """Neighbours are far apart, and the order of another epoch is another one."""
    monkeypatch.setattr(order, "LARGEST_LISTED", 0)
    first, second = (permuted(np.arange(10_000), 10_000, (0, epoch)) for epoch in (0, 1))
    assert abs(np.corrcoef(first, np.arange(10_000))[0, 1]) < 0.05
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.05
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05


def test_an_order_of_a_billion_rows_takes_no_memory():
    tracemalloc.start()
    rows = indices_of_step(10**6, num_rows=10**9, batch_size=1024, seed=0)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
    assert len(set(rows.tolist())) == 1024 and rows.min() >= 0 and rows.max() < 10**9


@given(sizes=st.lists(st.integers(4, 12), min_size=1, max_size=3), seed=st.integers(0, 3))
def test_each_data_set_goes_epoch_by_epoch(sizes, seed):
    """Each draw comes once; of each data set no row comes again before all others did."""
    order = Order(tuple(sizes), seed, 4)
    draws = np.concatenate([order.draws(step) for step in range(40)])
    assert len(set(draws.tolist())) == len(draws)
    epochs, numbers = np.divmod(draws, sum(sizes))
    first = 0
    for size in sizes:
        own = [(epoch, number) for epoch, number in zip(epochs, numbers, strict=True) if first <= number < first + size]
        assert [epoch for epoch, _ in own] == [place // size for place in range(len(own))]
        first += size


def test_shares_are_as_the_weights_say():
    order = Order((100, 50, 7), 3, 4, (6.0, 3.999, 0.001))
    firsts = [order.draws(step)[0] % 157 for step in range(2 * BLOCK_STEPS)]
    for block in (firsts[:BLOCK_STEPS], firsts[BLOCK_STEPS:]):
        counts = np.histogram(block, [0, 100, 150, 157])[0]
        assert counts.tolist() == [600, 399, 1]  # the smallest is not forgotten
    assert len({first >= 100 for first in firsts[:20]}) == 2  # in no run of their own


def test_a_batch_is_of_one_data_set_and_needs_no_past():
    order = Order((40, 30), 0, 8, (1.0, 2.0))
    for step in (0, 999, 1000, 123_456):
        numbers = order.draws(step) % 70
        assert (numbers < 40).all() or (numbers >= 40).all()
        assert (Order((40, 30), 0, 8, (1.0, 2.0)).draws(step) == order.draws(step)).all()


def test_one_data_set_comes_in_the_order_that_rows_always_had():
    draws = [Order((50,), 7, 20).draws(step) % 50 for step in range(5)]
    expected = [indices_of_step(step, num_rows=50, batch_size=20, seed=7) for step in range(5)]
    assert np.array_equal(draws, expected)
    assert indices_of_step(0, num_rows=50, batch_size=50, seed=7).tolist() == (
        np.random.default_rng([7, 0]).permutation(50).tolist()
    )
