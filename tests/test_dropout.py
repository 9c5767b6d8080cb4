"""Dropout by rows: the masks are a row's own, and random."""

import pytest
import torch

from blip2.dropout import drop, dropout_by_rows

ROWS = torch.arange(40)


def kept(rows=ROWS, key=(1,), width=20_000, calls=1, probability=0.1):
    """Which values of each row stay, as float[B, width], in the last of so many calls."""
    with dropout_by_rows(key, rows):
        for _ in range(calls):
            out = drop(torch.ones(len(rows), width), probability)
    assert ((out == 0) | torch.isclose(out, torch.tensor(1 / (1 - probability)))).all()
    return (out != 0).double()


def test_a_row_is_the_same_in_any_batch():
    whole = kept(calls=3)
    for rows in (ROWS[:7], ROWS[7:], ROWS.flip(0), torch.tensor([5, 5, 39])):
        assert torch.equal(kept(rows, calls=3), whole[rows])


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_the_share_that_is_dropped(probability):
    dropped = 1 - kept(probability=probability)
    spread = (probability * (1 - probability) / dropped.shape[1]) ** 0.5
    assert ((dropped.mean(1) - probability).abs() < 5 * spread).all()


def test_rows_calls_and_keys_have_nothing_to_do_with_one_another():
    def normal(share):
        return (share - 0.9) / 0.3

    one = normal(kept())
    noise = one.shape[1] ** -0.5
    among = one @ one.T / one.shape[1]
    assert (among - among.diag().diag()).abs().max() < 6 * noise
    for other in (kept(calls=2), kept(key=(2,)), kept(key=(1, 0)), kept(ROWS + 40)):
        assert (one @ normal(other).T / one.shape[1]).abs().max() < 6 * noise
    assert (one[:, 1:] * one[:, :-1]).mean(1).abs().max() < 6 * noise  # neighbours within a row


def test_the_gradient_goes_where_values_stayed():
    x = torch.ones(4, 50, dtype=torch.bfloat16, requires_grad=True)
    with dropout_by_rows((1,), torch.arange(4)):
        out = drop(x, 0.5)
    out.sum().backward()
    assert out.dtype == torch.bfloat16 and torch.equal(x.grad, out.detach())


def test_elsewhere_it_is_that_of_torch():
    x = torch.ones(3, 50)
    torch.manual_seed(1)
    found = drop(x, 0.5)
    torch.manual_seed(1)
    assert torch.equal(found, torch.nn.functional.dropout(x, 0.5))
    with dropout_by_rows((1,), torch.arange(3)):
        assert drop(x, 0.5, training=False) is x or torch.equal(drop(x, 0.5, training=False), x)
        assert torch.equal(drop(x, 0.0), x)
