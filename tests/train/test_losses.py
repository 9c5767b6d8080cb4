"""The losses as functions of tensors, and the optimiser's schedule."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from blip2.train.losses import contrast, hard_negatives
from blip2.train.optim import build_optimizer, learning_rate
from blip2.train.recipes import OptimRecipe


def test_contrast_is_cross_entropy_both_ways():
    torch.manual_seed(0)
    logits_BB, label_B = torch.randn(5, 5), torch.arange(5)
    wanted = (
        F.cross_entropy(logits_BB, label_B, label_smoothing=0.1)
        + F.cross_entropy(logits_BB.t(), label_B, label_smoothing=0.1)
    ) / 2
    torch.testing.assert_close(contrast(logits_BB, torch.eye(5).bool(), 0.1), wanted)


def test_equal_pairs_are_right_answers_as_much_as_each_other():
    equal_BB = torch.eye(4).bool()
    equal_BB[0, 2] = equal_BB[2, 0] = True
    logits_BB = torch.zeros(4, 4).masked_fill(equal_BB, 20.0)
    assert contrast(logits_BB, equal_BB, 0.0) == pytest.approx(0.5 * torch.tensor(2.0).log().item(), abs=1e-4)
    assert contrast(logits_BB, torch.eye(4).bool(), 0.0) > contrast(logits_BB, equal_BB, 0.0) - 1e-6


def test_hard_negatives_can_be_drawn_of_what_is_no_number():
    """The loss is NaN then, and the loop says so."""
    logits_BB = torch.randn(4, 4)
    logits_BB[2, 1], logits_BB[0, 3] = float("nan"), float("inf")
    image_B, text_B = hard_negatives(logits_BB, torch.eye(4).bool(), torch.Generator().manual_seed(0))
    assert (image_B != torch.arange(4)).all() and (text_B != torch.arange(4)).all()


def test_hard_negatives_are_wrong_and_like_the_right_ones():
    equal_BB = torch.eye(4).bool()
    equal_BB[0, 1] = equal_BB[1, 0] = True
    logits_BB = torch.randn(4, 4)
    logits_BB[3, 2] = 50.0  # image 3 resembles text 2
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        image_B, text_B = hard_negatives(logits_BB, equal_BB, generator)
        assert not equal_BB[torch.arange(4), image_B].any()
        assert not equal_BB[torch.arange(4), text_B].any()
        assert image_B[2] == 3 and text_B[3] == 2


def test_a_batch_of_equals_still_has_negatives():
    image_B, text_B = hard_negatives(torch.randn(3, 3), torch.ones(3, 3).bool(), None)
    assert (image_B != torch.arange(3)).all() and (text_B != torch.arange(3)).all()


def test_negatives_follow_the_generator():
    def draw(seed):
        return hard_negatives(torch.zeros(64, 64), torch.eye(64).bool(), torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1)[0], draw(1)[0])
    assert not torch.equal(draw(1)[0], draw(2)[0])


def test_the_learning_rate():
    recipe = OptimRecipe(steps=101, batch_size=1, peak_lr=1.0, min_lr=0.1, warmup_steps=10)
    assert learning_rate(0, recipe) == pytest.approx(0.1)
    assert learning_rate(9, recipe) == learning_rate(10, recipe) == 1.0
    assert learning_rate(55, recipe) == pytest.approx(0.55)
    assert learning_rate(100, recipe) == pytest.approx(0.1)
    rates = [learning_rate(step, recipe) for step in range(10, 101)]
    assert rates == sorted(rates, reverse=True)


def test_all_steps_may_be_warm_up():
    recipe = OptimRecipe(steps=4, batch_size=1, peak_lr=1.0, warmup_steps=10)
    assert [round(learning_rate(step, recipe), 3) for step in range(4)] == [0.1, 0.2, 0.3, 0.4]


def test_only_matrices_decay():
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Embedding(2, 3))
    decaying, others = build_optimizer(dict(model.named_parameters()), OptimRecipe(steps=1, batch_size=1)).param_groups
    assert [p.shape for p in decaying["params"]] == [(3, 2), (2, 3)]
    assert len(others["params"]) == 3
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.05, 0.0)
    assert decaying["betas"] == (0.9, 0.98)
