"""/explain gives the maps of `Pipeline.explain` and `Matcher.explain`, small enough for a page."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from tests.serve.conftest import PICTURES, data_url

CATS = PICTURES[2]


def map_of(told) -> np.ndarray:
    header, _, payload = told["heat"].partition(",")
    assert header == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(payload))) as image:
        assert image.mode == "L" and max(image.size) <= 512
        return np.asarray(image) / 255


@pytest.mark.parametrize(
    "asked",
    [
        {"question": "how many cats are there?"},
        {"question": "how many cats are there?", "answer": "two"},
        {"word": "dogs", "caption": "four cats and two dogs"},
        {"caption": "four cats"},
        {},
        {"text": "four cats"},
    ],
    ids=str,
)
def test_the_map_is_that_of_python(server, asked) -> None:
    told = server.http.post("/explain", json={"image": data_url(CATS), **asked})
    assert told.status_code == 200, told.text
    told = told.json()
    if "text" in asked:
        expected = server.service.matcher.explain(CATS, asked["text"])
    else:
        expected = server.service.pipeline.explain(CATS, **asked)
    assert told["text"] == expected.text
    assert told["score"] == pytest.approx(expected.score, abs=1e-4)
    height, width = expected.heat.shape
    assert told["strongest"] == pytest.approx([expected.strongest[0] / width, expected.strongest[1] / height], abs=0.02)
    assert np.abs(map_of(told) - expected.heat.numpy()).max() < 0.02  # the image is smaller than the limit


def test_a_large_picture_gives_a_small_map(server) -> None:
    stream = io.BytesIO()
    Image.open(CATS).resize((1500, 700)).save(stream, "PNG")
    told = server.http.post("/explain", data={"text": "four cats"}, files={"image": stream.getvalue()}).json()
    assert map_of(told).shape == (239, 512)
    assert all(0 <= share <= 1 for share in told["strongest"])


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"text": "four cats", "question": "how many?"}, "leave out question"),
        ({"answer": "two"}, "needs a question"),
        ({"question": "how many?", "word": "cats"}, "leave out word and caption"),
        ({"word": "boat", "caption": "four cats"}, "not in the caption"),
        ({"text": " "}, "empty"),
        ({"question": ""}, "question is empty"),
    ],
    ids=str,
)
def test_what_cannot_be_explained(server, asked, words) -> None:
    told = server.http.post("/explain", json={"image": data_url(CATS), **asked})
    assert told.status_code == 400
    assert words in told.json()["error"]["message"]
