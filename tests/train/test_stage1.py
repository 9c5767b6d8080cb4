"""Stage 1 against values recorded from the authors' code, and what its losses have to be."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from blip2.config import MatcherConfig, QFormerConfig, VisionConfig
from blip2.errors import RecipeError
from blip2.model import Blip2Matcher
from blip2.train import stage1

GOLDEN = Path(__file__).parents[1] / "golden" / "lavis_stage1.safetensors"
# Names of the authors' code, longest first where one contains another, to ours.
OURS = (
    ("Qformer.bert.embeddings.word_embeddings", "qformer.word_embedding"),
    ("Qformer.bert.embeddings.position_embeddings", "qformer.position_embedding"),
    ("Qformer.bert.embeddings.LayerNorm", "qformer.embedding_norm"),
    ("Qformer.bert.encoder.layer.", "qformer.layers."),
    ("Qformer.cls.predictions.transform.dense", "lm_head.dense"),
    ("Qformer.cls.predictions.transform.LayerNorm", "lm_head.norm"),
    ("Qformer.cls.predictions.bias", "lm_head.decoder_bias"),
    ("query_tokens", "qformer.query_tokens"),
    ("ln_vision.", "vision.post_norm."),
    ("vision_proj.", "vision_projection."),
    ("text_proj.", "text_projection."),
    ("crossattention.self", "cross_attention"),
    ("crossattention.output.dense", "cross_attention.output"),
    ("crossattention.output.LayerNorm", "cross_attention.norm"),
    (".attention.self", ".self_attention"),
    (".attention.output.dense", ".self_attention.output"),
    (".attention.output.LayerNorm", ".self_attention.norm"),
    (".intermediate_query.dense", ".query_feed_forward.intermediate"),
    (".output_query.dense", ".query_feed_forward.output"),
    (".output_query.LayerNorm", ".query_feed_forward.norm"),
    (".intermediate.dense", ".text_feed_forward.intermediate"),
    (".output.dense", ".text_feed_forward.output"),
    (".output.LayerNorm", ".text_feed_forward.norm"),
)
TIED = {"lm_head.decoder.bias", "lm_head.decoder.weight"}


def our_name(name):
    if name == "temp":
        return "temperature"
    if name.startswith("Qformer.cls.predictions.decoder"):
        return name.replace("Qformer.cls.predictions", "lm_head")
    for theirs, ours in OURS:
        name = name.replace(theirs, ours)
    return name


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN, framework="pt") as file:
        values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return values, json.loads(file.metadata()["config"])


@pytest.fixture
def model(golden):
    """The recorded model. Its image encoder was left out of the recording, and so it is an empty one here."""
    values, config = golden
    qformer = QFormerConfig(
        hidden_size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        intermediate_size=config["intermediate_size"],
        encoder_hidden_size=config["vision_width"],
        cross_attention_frequency=config["cross_attention_frequency"],
        layer_norm_eps=config["layer_norm_eps"],
        num_query_tokens=config["num_query_tokens"],
        vocab_size=config["vocab_size"],
        max_position_embeddings=config["max_position_embeddings"],
        dropout=0.0,
        has_text=True,
    )
    vision = VisionConfig(
        hidden_size=config["vision_width"], num_layers=0, num_heads=1, intermediate_size=1, layer_norm_eps=1e-5
    )
    model = Blip2Matcher(
        MatcherConfig(
            vision=vision,
            qformer=qformer,
            projection_size=config["embed_dim"],
            bos_token_id=config["bos_token_id"],
        )
    )
    weights = {
        our_name(name.removeprefix("weights.")): value for name, value in values.items() if name.startswith("weights.")
    }
    assert torch.equal(weights["lm_head.decoder.weight"], weights["qformer.word_embedding.weight"])
    missing, unexpected = model.load_state_dict(
        {name: value for name, value in weights.items() if name not in TIED}, strict=False
    )
    assert not unexpected and all(name.startswith("vision.") for name in missing)
    assert not any(name.startswith("vision.post_norm") for name in missing)
    model.freeze_pretrained()
    return model


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
    model.match = lambda patches, text, mask: drawn.append(text) or original(patches, text, mask)
    stage1.losses(
        model,
        values["image_embeds"],
        text_BT,
        mask_BT,
        picture_B=torch.tensor([0, 0, 1, 2]),
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
