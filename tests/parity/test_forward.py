"""Every station of an image's path gives the reference's numbers, in fp32 and to 1e-4."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from blip2 import checkpoint
from blip2.language import T5, pad_rows
from blip2.model import similarity

TOLERANCE = {"atol": 1e-4, "rtol": 0.0}


def assert_same(ours, theirs):
    assert theirs.std() > 0.05, "values that do not vary prove nothing"
    assert_close(ours, theirs, **TOLERANCE)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def test_the_output_table_of_t5_is_its_own(pair):
    if pair.family == "t5":
        language = pair.theirs.language_model
        assert not language.config.scale_decoder_outputs
        assert not torch.equal(language.lm_head.weight, language.shared.weight)
        assert torch.equal(language.lm_head.weight, pair.ours.language.output.weight)


def test_vision(pair):
    theirs = pair.theirs.vision_model(pixel_values=pair.pixels_BCHW).last_hidden_state
    assert_same(pair.ours.vision(pair.pixels_BCHW), theirs)
    assert_same(pair.ours.vision(pair.pixels_BCHW[1:2]), theirs[1:2])


@pytest.mark.parametrize("grid", [(2, 5), (6, 6), (1, 3)])
def test_vision_of_another_size(pair, grid):
    patch = pair.theirs.config.vision_config.patch_size
    pixels_BCHW = torch.randn(2, 3, grid[0] * patch, grid[1] * patch, generator=torch.Generator().manual_seed(0))
    theirs = pair.theirs.vision_model(pixel_values=pixels_BCHW, interpolate_pos_encoding=True).last_hidden_state
    assert_same(pair.ours.vision(pixels_BCHW), theirs)


def test_qformer_and_prompt(pair):
    theirs = pair.theirs.get_image_features(pair.pixels_BCHW, return_dict=True)
    queries_BQD = pair.ours.qformer(image_BPD=pair.ours.vision(pair.pixels_BCHW)).hidden_BSD
    assert_same(queries_BQD, theirs.qformer_outputs.last_hidden_state)
    assert_same(pair.ours.prompt(pair.ours.encode(pair.pixels_BCHW)), theirs.pooler_output)
    assert queries_BQD.std(dim=0).mean() > 0.1, "different pictures, different queries"


def test_logits_of_the_whole_text(pair, texts, our_prompts, their_inputs):
    """Rows of the padded batch are compared with rows that stand alone."""
    starts = torch.tensor([[0, 14, 3, 20]]).expand(3, -1)
    decoder = {} if pair.family == "opt" else {"decoder_input_ids": starts}
    theirs_BSV = pair.theirs(pixel_values=pair.pixels_BCHW, **their_inputs, **decoder).logits
    for row, prompt in enumerate(our_prompts):
        language = pair.ours.language
        if isinstance(language, T5):
            ours = language.logits(language(prompt[None], torch.tensor([len(prompt)]), starts[:1]))[0]
            theirs = theirs_BSV[row]
        else:
            ours = language.logits(language(prompt[None]))[0]
            theirs = theirs_BSV[row][their_inputs["attention_mask"][row].bool()]
        assert_same(ours, theirs)


def test_logits_of_a_padded_batch(pair, texts, our_prompts, their_inputs):
    """Prompts of mixed length in one right-padded batch, and some steps from there."""
    steps = torch.tensor([[14, 3, 20], [8, 8, 50], [33, 2, 6]])
    if pair.family == "opt":
        ids = torch.cat([their_inputs["input_ids"], steps], dim=1)
        mask = torch.cat([their_inputs["attention_mask"], torch.ones_like(steps)], dim=1)
        theirs = pair.theirs(pixel_values=pair.pixels_BCHW, input_ids=ids, attention_mask=mask).logits[:, -4:]
    else:
        starts = torch.cat([torch.zeros(3, 1, dtype=torch.long), steps], dim=1)
        theirs = pair.theirs(pixel_values=pair.pixels_BCHW, **their_inputs, decoder_input_ids=starts).logits
    logits_BV, state = pair.ours.language.prefill(*pad_rows(our_prompts), 4)
    ours = [logits_BV] + [pair.ours.language.step(token_B, state) for token_B in steps.T]
    assert_same(torch.stack(ours, dim=1), theirs)


def test_what_is_saved_the_reference_reads(pair, their_inputs, tmp_path):
    checkpoint.save(pair.ours, tmp_path)
    read = type(pair.theirs).from_pretrained(tmp_path).eval()
    decoder = {} if pair.family == "opt" else {"decoder_input_ids": torch.tensor([[0, 14]]).expand(3, -1)}
    inputs = {"pixel_values": pair.pixels_BCHW, **their_inputs, **decoder}
    assert_close(read(**inputs).logits, pair.theirs(**inputs).logits, **TOLERANCE)


# --- Matching ----------------------------------------------------------------------------------------------------

TEXT_BT = torch.tensor([[40, 3, 9, 22, 41], [40, 17, 41, 0, 0], [40, 5, 6, 41, 0]])
MASK_BT = (TEXT_BT != 0).long()


@pytest.fixture
def their_text(matching_pair):
    """With an image token in its configuration the reference cuts off that many tokens, so they must be there."""
    if matching_pair.image_token is None:
        return {"input_ids": TEXT_BT, "attention_mask": MASK_BT}
    queries_BQ = torch.full((3, 8), matching_pair.image_token)
    return {
        "input_ids": torch.cat([queries_BQ, TEXT_BT], dim=1),
        "attention_mask": torch.cat([torch.ones_like(queries_BQ), MASK_BT], dim=1),
    }


def test_matching(matching_pair, their_text):
    ours, pixels_BCHW = matching_pair.ours, matching_pair.pixels_BCHW
    theirs = matching_pair.theirs(pixel_values=pixels_BCHW, **their_text, use_image_text_matching_head=True)
    logits_B2 = ours.match(ours.encode(pixels_BCHW), TEXT_BT, MASK_BT.bool())
    assert_same(logits_B2, theirs.logits_per_image)
    for row in range(3):
        length = int(MASK_BT[row].sum())
        alone_12 = ours.match(ours.encode(pixels_BCHW[row : row + 1]), TEXT_BT[row : row + 1, :length], None)
        assert_close(alone_12, logits_B2[row : row + 1], **TOLERANCE)


def test_contrast(matching_pair, their_text):
    ours = matching_pair.ours
    theirs = matching_pair.theirs(pixel_values=matching_pair.pixels_BCHW, **their_text)
    images_NQE, _ = ours.embed_image(ours.encode(matching_pair.pixels_BCHW))
    texts_ME = ours.embed_text(TEXT_BT, MASK_BT.bool())
    assert_same(images_NQE, theirs.image_embeds)
    assert_same(texts_ME, theirs.text_embeds)
    assert_same(similarity(images_NQE, texts_ME), theirs.logits_per_image)


def test_the_matching_model_saved_is_read_by_the_reference(matching_pair, their_text, tmp_path):
    checkpoint.save(matching_pair.ours, tmp_path)
    read = type(matching_pair.theirs).from_pretrained(tmp_path).eval()
    inputs = {"pixel_values": matching_pair.pixels_BCHW, **their_text}
    assert_close(read(**inputs).logits_per_image, matching_pair.theirs(**inputs).logits_per_image, **TOLERANCE)
