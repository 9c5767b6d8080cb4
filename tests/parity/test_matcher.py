"""`Matcher`'s numbers against the reference's retrieval and projection classes, and against the authors' values."""

from types import SimpleNamespace

import pytest
import torch

from blip2.tasks.match import ImageFeatures, Reader
from tests.parity.conftest import SIZES, load, matching
from tests.recorded import recorded, recorded_model

transformers = pytest.importorskip("transformers")

TOLERANCE = {"atol": 1e-4, "rtol": 0}
TEXTS = [[3, 9, 12, 4], [3, 44, 7, 21, 30, 8, 19, 4], [3, 5, 4], [3, 17, 17, 2, 4]]  # of different lengths


@pytest.fixture(scope="module", params=SIZES)
def both(request, tmp_path_factory):
    """Their model, our features of three images, and our reader, with the same weights."""
    sizes = SIZES[request.param]
    theirs = matching(seed=11, sizes=sizes, shared=6)
    folder = tmp_path_factory.mktemp("matching")
    ours = load(theirs, folder)
    side = sizes["vision"][4]
    pixels_BCHW = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        patches_BPD = ours.encode(pixels_BCHW)
        vectors_BQE, _ = ours.embed_image(patches_BPD)
    features = [ImageFeatures(*row) for row in zip(patches_BPD, vectors_BQE, strict=True)]
    return SimpleNamespace(
        theirs=theirs, folder=folder, pixels_BCHW=pixels_BCHW, features=features, reader=Reader(ours, None)
    )


@torch.no_grad()
def test_every_pair(both):
    """N x M in one call here; there, where one image with two texts is an error, pair by pair."""
    found = both.reader.compare(both.features, TEXTS, both.reader.embed_texts(TEXTS, 3))
    for row in range(3):
        for column, ids in enumerate(TEXTS):
            text = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
            inputs = {"pixel_values": both.pixels_BCHW[row : row + 1], **text}
            matched = both.theirs(**inputs, use_image_text_matching_head=True).logits_per_image[0]
            torch.testing.assert_close(found.itm_logits[row, column], matched, **TOLERANCE)
            cosine = both.theirs(**inputs).logits_per_image[0, 0]
            torch.testing.assert_close(found.itc_cosine[row, column], cosine, **TOLERANCE)
    assert found.itm_logits.std() > 0.05 and found.itc_cosine.std() > 0.01  # it is not that all are alike


@torch.no_grad()
def test_the_projected_features(both):
    vision = transformers.Blip2VisionModelWithProjection.from_pretrained(both.folder).eval()
    theirs = vision(pixel_values=both.pixels_BCHW).image_embeds
    torch.testing.assert_close(torch.stack([image.vectors_QE for image in both.features]), theirs, **TOLERANCE)
    text = transformers.Blip2TextModelWithProjection.from_pretrained(both.folder).eval()
    for ids in TEXTS:
        ours = both.reader.embed_texts([ids])
        theirs = text(input_ids=torch.tensor([ids])).text_embeds[:, 0]  # of every token there; the first one's counts
        torch.testing.assert_close(ours, theirs, **TOLERANCE)


@torch.no_grad()
def test_the_authors_values():
    """With the learned temperature, which the reference lost."""
    values, config = recorded()
    model = recorded_model(values, config).eval()
    reader = Reader(model, None)
    patches_BPD = model.vision.post_norm(values["image_embeds"])
    vectors_BQE, _ = model.embed_image(patches_BPD)
    features = [ImageFeatures(*row) for row in zip(patches_BPD, vectors_BQE, strict=True)]
    ids = [row[mask.bool()].tolist() for row, mask in zip(values["input_ids"], values["attention_mask"], strict=True)]
    found = reader.compare(features, ids, reader.embed_texts(ids))
    torch.testing.assert_close(found.itc_cosine, values["itc_similarity"], **TOLERANCE)
    expected = (values["itc_similarity"] / values["weights.temp"]).softmax(dim=1)
    torch.testing.assert_close(found.itc_probability, expected, **TOLERANCE)
    torch.testing.assert_close(found.itm_logits.diagonal(dim1=0, dim2=1).T, values["itm_logits"], **TOLERANCE)
    queries = config["num_query_tokens"]
    for row in range(4):
        fused = model.qformer(image_BPD=patches_BPD[row : row + 1], text_BT=torch.tensor([ids[row]])).hidden_BSD
        torch.testing.assert_close(fused[0, :queries], values["multimodal_output"][row, :queries], **TOLERANCE)
