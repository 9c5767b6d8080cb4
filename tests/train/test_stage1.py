"""Stage 1 against values recorded from the authors' code, and what its losses have to be."""

from contextlib import nullcontext

import pytest
import torch

from blip2.errors import RecipeError
from blip2.train import stage1
from blip2.train.group import Group, Step
from tests.recorded import recorded, recorded_model


@pytest.fixture(scope="module")
def golden():
    return recorded()


@pytest.fixture
def model(golden):
    return recorded_model(*golden)


def recorded_losses(model, values, **changes):
    given = {
        "features_BPD": values["image_embeds"],
        "text_BT": values["input_ids"],
        "text_mask_BT": values["attention_mask"],
        "negatives": (values["itm_negative_image"], values["itm_negative_text"]),
    }
    return stage1.losses(model, **(given | changes))


def test_the_three_passes_are_the_authors(golden, model):
    values, _ = golden
    patches_BPD = model.vision.post_norm(values["image_embeds"])
    text = {"text_BT": values["input_ids"], "text_mask_BT": values["attention_mask"].bool()}
    for name, found in (
        ("query_output", model.qformer(image_BPD=patches_BPD)),
        ("text_output", model.qformer(**text)),
        ("multimodal_output", model.qformer(image_BPD=patches_BPD, **text)),
    ):
        torch.testing.assert_close(found.hidden_BSD, values[name], rtol=0, atol=1e-5, msg=name)


def test_the_losses_are_the_authors(golden, model):
    values, _ = golden
    found = recorded_losses(model, values)
    for name in ("itc", "itm", "lm"):
        assert getattr(found, name).item() == pytest.approx(values[f"loss_{name}"].item(), abs=1e-5), name
    assert (found.itc + found.itm + found.lm).item() == pytest.approx(values["loss"].item(), abs=1e-5)
    torch.testing.assert_close(found.similarity_BB, values["itc_similarity"], rtol=0, atol=1e-5)
    torch.testing.assert_close(found.matching_N2[:4], values["itm_logits"], rtol=0, atol=1e-5)


def test_the_gradients_are_the_authors(golden, model):
    values, _ = golden
    found = recorded_losses(model, values)
    (found.itc + found.itm + found.lm).backward()
    for name, parameter in (
        ("query_tokens", model.qformer.query_tokens),
        ("temp", model.temperature),
        ("ln_vision.weight", model.vision.post_norm.weight),
        ("word_embeddings", model.qformer.word_embedding.weight),
        ("crossattention.key", model.qformer.layers[0].cross_attention.key.weight),
    ):
        wanted = values[f"grad.{name}"]
        assert (parameter.grad - wanted).norm() / wanted.norm() < 1e-4, name


@pytest.mark.parametrize("num_parts", [2, 3, 9])
def test_parts_change_nothing(golden, model, num_parts):
    values, _ = golden
    whole, parts = recorded_losses(model, values), recorded_losses(model, values, num_parts=num_parts)
    for found, wanted in zip(parts, whole, strict=True):
        torch.testing.assert_close(found, wanted)


def test_padding_changes_nothing(golden, model):
    values, _ = golden
    found = recorded_losses(model, values)
    wider = {
        "text_BT": torch.nn.functional.pad(values["input_ids"], (0, 5), value=7),
        "text_mask_BT": torch.nn.functional.pad(values["attention_mask"], (0, 5)),
    }
    for ours, padded in zip(found[:3], recorded_losses(model, values, **wider)[:3], strict=True):
        torch.testing.assert_close(ours, padded)


def test_equal_texts_and_shared_pictures_are_no_negatives(golden, model):
    values, _ = golden
    text_BT, mask_BT = values["input_ids"].clone(), values["attention_mask"].clone()
    text_BT[3], mask_BT[3] = text_BT[2], mask_BT[2]
    drawn = []
    original = model.match
    model.match = lambda patches, text, mask, **keys: drawn.append(text) or original(patches, text, mask, **keys)
    stage1.losses(
        model,
        values["image_embeds"],
        text_BT,
        mask_BT,
        image_B=torch.tensor([0, 0, 1, 2]),
        generator=torch.Generator().manual_seed(0),
    )
    wrong_BT = drawn[0][8:]
    assert not (wrong_BT == text_BT).all(dim=1).any()
    assert not (wrong_BT[0] == text_BT[1]).all() and not (wrong_BT[1] == text_BT[0]).all()


def test_one_pair_is_refused(golden, model):
    values, _ = golden
    with pytest.raises(RecipeError, match="at least two pairs"):
        stage1.losses(model, values["image_embeds"][:1], values["input_ids"][:1], values["attention_mask"][:1])


def test_every_trained_parameter_gets_a_gradient_and_no_frozen_one(golden, model):
    values, _ = golden
    found = recorded_losses(model, values)
    (found.itc + found.itm + found.lm).backward()
    for name, parameter in model.named_parameters():
        is_trained = not name.startswith("vision.") or name.startswith("vision.post_norm")
        assert parameter.requires_grad == is_trained, name
        # A bias that all keys share moves no attention: its gradient is nothing but rounding.
        has_gradient = parameter.grad is not None and (name.endswith("key.bias") or bool(parameter.grad.any()))
        assert has_gradient == is_trained, name


def test_scores(golden, model):
    values, _ = golden
    found = recorded_losses(model, values)
    right = found._replace(similarity_BB=torch.eye(4), matching_N2=torch.tensor([[0.0, 1.0]] * 4 + [[1.0, 0.0]] * 8))
    assert stage1.scores(right) == {"image_to_text": 1.0, "text_to_image": 1.0, "matching": 1.0}


def test_what_is_looked_at_in_a_picture_is_computed_once(golden, model):
    values, _ = golden
    texts, masks = values["input_ids"], values["attention_mask"].bool()
    place_B = torch.arange(len(texts))
    rows = []
    model.qformer.layers[0].cross_attention.key.register_forward_hook(lambda *call: rows.append(len(call[2])))
    step = Step(0, len(texts), nullcontext, torch.Generator().manual_seed(0), Group())
    part = stage1.Part(values["image_embeds"], texts, masks, place_B, place_B)
    found = stage1.backward(model, [part], step, label_smoothing=0.1, itc="exact")
    assert rows == [len(texts)], "the pass of the queries, matching, and matching with wrong pictures share it"
    assert set(found) == {"itc", "itm", "lm"} and all(loss.isfinite() for loss in found.values())
