"""Where the model has no numbers for a request, that request is told so, and no other."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from blip2 import EncodedImage
from tests.serve.conftest import PICTURES, serving, user


def test_an_answer_of_no_numbers_is_an_error_of_its_own(tiny_models) -> None:
    """An image that the model sees as NaN, among others that are answered in the same batch."""
    frontend = tiny_models.pipeline.frontend
    plain, bad = frontend._encode_pixels, frontend.pixels(PICTURES[1])

    def encode(pixels_BCHW):
        for pixels_CHW, kept in zip(pixels_BCHW, plain(pixels_BCHW), strict=True):
            yield replace(kept, queries_QD=kept.queries_QD * math.nan) if torch.equal(pixels_CHW, bad) else kept

    frontend._encode_pixels = encode
    with serving(lambda: tiny_models) as server, ThreadPoolExecutor(6) as pool:
        ways = [{"num_beams": 3}, {"temperature": 0}, {"temperature": 1, "seed": 3}]
        asked = [(picture, fields) for fields in ways for picture in PICTURES[:2]]
        found = list(pool.map(lambda each: server.chat(user("", each[0]), max_tokens=5, **each[1]), asked))
        for (picture, _), response in zip(asked, found, strict=True):
            assert response.status_code == (200 if picture == PICTURES[0] else 500), response.text
            if picture == PICTURES[1]:
                error = response.json()["error"]
                assert (error["code"], error["type"]) == ("not_finite", "server_error")
                assert "NaN or infinite: numbers overflow" in error["message"]

        # An encoded image that is NaN all the same, as a language model that overflows would make of any.
        cache = server.service.worker.images
        cache._encode_all = lambda looks: [
            EncodedImage(torch.full((4, 16), math.nan), tiny_models.pipeline.speaker.identity) for _ in looks
        ]
        found = list(pool.map(lambda each: server.chat(user("", each[0]), max_tokens=5, **each[1]), asked))
        for (picture, _), response in zip(asked, found, strict=True):
            assert response.status_code == (200 if picture == PICTURES[0] else 500), response.text
            if picture == PICTURES[1]:
                assert response.json()["error"]["message"].startswith("the scores of the next token are NaN")
        stream = server.chat(user("", PICTURES[1]), max_tokens=5, stream=True)
        assert "not_finite" in stream.text
        assert server.http.get("/health").status_code == 200


def test_matching_and_vectors_of_no_numbers(tiny_models) -> None:
    matcher = tiny_models.matcher.model
    matcher.itm_head.bias.data[0] = math.nan
    with serving(lambda: tiny_models) as server:
        found = server.http.post("/match", files={"image": PICTURES[0].read_bytes()}, data={"texts": ["a dog"]})
        assert (found.status_code, found.json()["error"]["code"]) == (500, "not_finite")
        assert "itm_head.bias has such values" in found.json()["error"]["message"]
        assert server.http.post("/v1/embeddings", json={"input": "a dog"}).status_code == 200
        matcher.text_projection.bias.data[0] = math.nan
        found = server.http.post("/v1/embeddings", json={"input": "a dog"})
        assert (found.status_code, found.json()["error"]["code"]) == (500, "not_finite")
