"""An image is encoded once, however many ask about it."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image

from blip2.serve.cache import ImageCache, Look
from blip2.serve.limits import Limits
from blip2.serve.tickets import Steps
from tests.serve.conftest import PICTURES, eventually, serving, user


def test_a_second_question_skips_the_image_encoder(models, tmp_path) -> None:
    runs = []
    models.pipeline.frontend.encode, plain = (
        (lambda pixels: runs.append(len(pixels)) or plain(pixels)),
        (models.pipeline.frontend.encode),
    )
    try:
        with serving(lambda: models) as server:
            assert server.chat(user("what is in the picture?", PICTURES[0])).status_code == 200
            hits, misses = (
                server.metric("blip2_image_cache_hits_total"),
                server.metric("blip2_image_cache_misses_total"),
            )
            assert (hits, misses, server.metric("blip2_images_encoded_total")) == (0, 1, 1)
            # The same pixels in another file are the same image.
            Image.open(PICTURES[0]).save(tmp_path / "same.png", compress_level=0)
            server.chat(user("how many dogs are there?", tmp_path / "same.png"))
            server.http.post("/caption", files={"image": PICTURES[0].read_bytes()})
            assert server.metric("blip2_image_cache_hits_total") == 2
            assert server.metric("blip2_images_encoded_total") == 1 and runs == [1]
            server.http.post("/match", files={"image": PICTURES[0].read_bytes()}, data={"texts": ["a dog"]})
            assert server.metric("blip2_images_encoded_total") == 2 and runs == [1]  # by the other model
    finally:
        models.pipeline.frontend.encode = plain


def test_those_who_ask_at_the_same_time_share_one_look(tiny_models) -> None:
    entered, may_go_on = threading.Event(), threading.Event()
    with serving(lambda: tiny_models) as server:

        def hold() -> Steps[None]:
            entered.set()
            may_go_on.wait(60)
            yield

        server.service.worker.call("", hold())
        entered.wait(10)
        threads = [
            threading.Thread(target=server.chat, args=(user("", PICTURES[number % 2]),), kwargs={"max_tokens": 3})
            for number in range(8)
        ]
        for thread in threads:
            thread.start()
        eventually(lambda: server.metric("blip2_requests_waiting") == 9, timeout_s=50)  # with the held one
        may_go_on.set()
        for thread in threads:
            thread.join()
        assert server.metric("blip2_images_encoded_total") == server.metric("blip2_image_cache_misses_total") == 2
        assert server.metric("blip2_image_cache_hits_total") == 6


def test_what_was_used_longest_ago_is_forgotten() -> None:
    encoded: list[int] = []

    def encode(pixels):
        encoded.append(len(pixels))
        return [Look(str(int(each[0])), each) for each in pixels]

    def looks(*numbers: int) -> list[Look]:
        return [Look(str(number), torch.full((4,), float(number))) for number in numbers]

    frontend: Any = SimpleNamespace(encode=encode)
    cache: ImageCache[Look] = ImageCache(frontend, max_entries=2, max_bytes=1000)
    assert [kept.digest for kept in cache.see(looks(1, 2, 1))] == ["1", "2", "1"]
    assert (encoded, cache.hits, cache.misses, cache.num_bytes) == ([2], 1, 2, 32)
    cache.see(looks(1))
    cache.see(looks(3))  # 2 has to go
    cache.see(looks(1))
    assert encoded == [2, 1]
    cache.see(looks(2))
    assert encoded == [2, 1, 1] and len(cache) == 2
    small: ImageCache[Look] = ImageCache(frontend, max_entries=9, max_bytes=40)
    small.see(looks(1, 2, 3))
    assert len(small) == 2 and small.num_bytes == 32
    none: ImageCache[Look] = ImageCache(frontend, max_entries=0, max_bytes=1000)
    assert len(none.see(looks(1, 2))) == 2 and len(none) == 0


def test_a_file_that_was_seen_is_not_even_decoded() -> None:
    frontend: Any = SimpleNamespace(encode=lambda pixels: [Look("kept", each) for each in pixels])
    cache: ImageCache[Look] = ImageCache(frontend, max_entries=1, max_bytes=1000)
    pixels_CHW = torch.zeros(3)
    assert cache.known("red.png") is None
    red = cache.look("red.png", "red", pixels_CHW)
    assert red.pixels_CHW is pixels_CHW and red.kept is None
    assert cache.known("red.png") is None  # decoded, but no model has seen it yet
    [kept] = cache.see([red])
    known = cache.known("red.png")
    assert known is not None and known.kept is kept
    other_file = cache.look("red.gif", "red", pixels_CHW)
    assert other_file.kept is kept and other_file.pixels_CHW is None
    assert cache.see([cache.look("blue.png", "blue", pixels_CHW)])[0] is not kept  # there is room for one
    assert cache.see([known])[0] is kept  # what a request holds already is not lost
    assert cache.known("red.png") is None
    assert (cache.hits, cache.misses, cache.num_encoded) == (1, 2, 2)


def test_without_room_for_pictures_answers_are_the_same(models) -> None:
    with serving(lambda: models, limits=Limits(cache_entries=0)) as server:
        for _ in range(2):
            found = server.chat(user("", PICTURES[0])).json()
            assert found["choices"][0]["message"]["content"] == models.pipeline.caption(PICTURES[0])
        assert server.metric("blip2_images_encoded_total") == 2
