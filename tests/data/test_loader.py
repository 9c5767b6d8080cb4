"""The order of rows, images that are shared, and batches made ahead."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blip2.config import CLIP_MEAN, CLIP_STD
from blip2.data import Row, RowImages, indices_of_step, prefetch
from blip2.image import load_image, to_pixels


@given(num_rows=st.integers(1, 30), batch_size=st.integers(1, 40), seed=st.integers(0, 5))
def test_each_epoch_has_every_row_once(num_rows, batch_size, seed):
    steps = -(-3 * num_rows // batch_size)
    order = np.concatenate(
        [indices_of_step(s, num_rows=num_rows, batch_size=batch_size, seed=seed) for s in range(steps)]
    )
    for epoch in range(3):
        assert sorted(order[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))


def test_epochs_and_seeds_differ_and_steps_do_not_depend_on_what_was_asked_before():
    def first(seed, step):
        return indices_of_step(step, num_rows=50, batch_size=50, seed=seed).tolist()

    assert first(0, 0) != first(0, 1)
    assert first(0, 0) != first(1, 0)
    late = first(0, 7)
    assert [first(0, step) for step in range(8)][7] == late


def test_rows_that_share_a_picture_share_its_number(pictures):
    rows = [Row(path, captions=("x",)) for path in (pictures[1], pictures[0], pictures[1])]
    shown = RowImages(rows, size=32, mean=CLIP_MEAN, std=CLIP_STD)
    assert shown.number_of_row.tolist() == [0, 1, 0]
    assert shown.paths == [pictures[1], pictures[0]]
    wanted = to_pixels([load_image(pictures[0]), load_image(pictures[1])], size=32, mean=CLIP_MEAN, std=CLIP_STD)
    torch.testing.assert_close(shown.pixels([1, 0]), wanted, rtol=0, atol=0)


def test_batches_come_in_order_from_another_thread():
    threads = set()

    def make(step):
        threads.add(threading.current_thread())
        return step

    assert list(prefetch(make, range(3, 9))) == [3, 4, 5, 6, 7, 8]
    assert threading.current_thread() not in threads


def test_an_error_of_the_other_thread_arrives():
    def make(step):
        if step == 2:
            raise ValueError("the third")
        return step

    batches = prefetch(make, range(10))
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(ValueError, match="the third"):
        next(batches)


def test_closing_early_makes_no_more():
    made = []
    batches = prefetch(lambda step: made.append(step) or step, range(1000))
    next(batches)
    batches.close()
    assert len(made) <= 4
