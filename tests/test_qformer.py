"""The Q-Former by itself: one image for many texts, and patches that are hidden or asked after."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from blip2.qformer import QFormer
from tests.tiny import QFORMER

PATCHES = 7


@pytest.fixture
def qformer() -> QFormer:
    torch.manual_seed(0)
    model = QFormer(replace(QFORMER, num_layers=3, has_text=True, vocab_size=50, max_position_embeddings=12)).eval()
    model.reset_parameters(std=0.3)
    return model.requires_grad_(False)


def image(rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, PATCHES, QFORMER.encoder_hidden_size, generator=torch.Generator().manual_seed(1))


def test_one_picture_for_many_texts_is_the_picture_repeated(qformer: QFormer) -> None:
    text_BT = torch.randint(50, (3, 5))
    mask_BT = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]).bool()
    once = qformer(image_BPD=image(), text_BT=text_BT, text_mask_BT=mask_BT).hidden_BSD
    repeated = qformer(image_BPD=image().expand(3, -1, -1), text_BT=text_BT, text_mask_BT=mask_BT).hidden_BSD
    torch.testing.assert_close(once, repeated, atol=1e-6, rtol=0)


def test_a_hidden_patch_is_as_one_that_is_not_there(qformer: QFormer) -> None:
    bias = torch.zeros(2, 1, 1, 1, PATCHES)
    bias[..., [2, 5]] = float("-inf")
    kept = [0, 1, 3, 4, 6]
    hidden = qformer(image_BPD=image(2), image_bias=bias).hidden_BSD
    torch.testing.assert_close(hidden, qformer(image_BPD=image(2)[:, kept]).hidden_BSD, atol=1e-6, rtol=0)


def test_every_layer_that_looks_takes_its_own_bias(qformer: QFormer) -> None:
    """Its gradient is there for each layer, head, query and patch, and sums to nothing over the patches."""
    bias = torch.zeros(2, 1, QFORMER.num_heads, QFORMER.num_query_tokens, PATCHES, requires_grad=True)
    qformer(image_BPD=image(), image_bias=bias).hidden_BSD.square().sum().backward()
    assert bias.grad is not None and (bias.grad.abs().amax(dim=-1) > 0).all()
    torch.testing.assert_close(bias.grad.sum(-1), torch.zeros(bias.shape[:-1]), atol=1e-4, rtol=0)
