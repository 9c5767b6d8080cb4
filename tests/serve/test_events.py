"""The bytes of a stream: the sequence of events that clients expect, to the letter."""

from __future__ import annotations

import json

import blip2
from blip2.serve.service import Models
from tests import tiny
from tests.serve.conftest import LONG, PICTURES, serving, user


def events(response) -> list:
    text = response.content.decode()
    assert text.endswith("\n\n")
    lines = text.removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    assert lines[-1] == "data: [DONE]" and lines.count("data: [DONE]") == 1
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_the_sequence_of_events(server) -> None:
    response = server.chat(user("", PICTURES[0]), stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    chunks = events(response)
    assert {(chunk["id"], chunk["object"], chunk["model"]) for chunk in chunks} == {
        (chunks[0]["id"], "chat.completion.chunk", "miniature")
    }
    assert chunks[0]["id"] and all(isinstance(chunk["created"], int) for chunk in chunks)
    assert all(len(chunk["choices"]) == 1 and chunk["choices"][0]["index"] == 0 for chunk in chunks)
    assert not any("usage" in chunk for chunk in chunks)  # nobody asked for it
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert all(list(delta) == ["content"] and delta["content"] for delta in deltas[1:-1]) and len(deltas) > 4
    assert deltas[-1] == {}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]


def test_the_usage_comes_once_and_last_if_asked_for(server) -> None:
    for fields in ({}, {"num_beams": 3}):
        asked = user("what is in the picture?", PICTURES[0])
        response = server.chat(asked, stream=True, stream_options={"include_usage": True}, **fields)
        *others, last = events(response)
        assert last["choices"] == [] and last["usage"]["total_tokens"] > last["usage"]["completion_tokens"] > 0
        assert all(chunk["choices"] and chunk["usage"] is None for chunk in others)


def test_several_answers_and_beams_come_in_one_piece_each(server, models) -> None:
    whole = models.pipeline.caption(PICTURES[0], num_captions=2)
    chunks = events(server.chat(user("", PICTURES[0]), stream=True, n=2))
    for index in (0, 1):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert [choice["delta"] for choice in own] == [
            {"role": "assistant", "content": ""}, {"content": whole[index]}, {},
        ]  # fmt: skip
        assert own[-1]["finish_reason"] == "stop"


def test_no_character_is_split_and_the_pieces_are_the_text(any_model) -> None:
    """The tiny models write bytes that are no whole characters, and characters of several tokens."""
    blip = blip2.load(any_model)
    with serving(lambda: Models(blip)) as server:
        for seed in range(6):
            image = tiny.picture(seed)
            path = any_model / "asked.png"
            image.save(path)
            drawn = {"temperature": 2.0, "seed": seed, "max_tokens": 40, "min_new_tokens": 40}
            whole = server.chat(user("", path), **drawn).json()["choices"][0]["message"]["content"]
            chunks = events(server.chat(user("", path), stream=True, **drawn))
            pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
            assert "".join(pieces) == whole
            expected = blip.caption(
                image, sample=True, temperature=2.0, seed=seed, max_new_tokens=40, min_new_tokens=40
            )
            assert whole == expected


def test_what_goes_wrong_before_the_first_token_has_its_status(server) -> None:
    response = server.chat(user("", b"no picture"), stream=True)
    assert response.status_code == 415 and response.json()["error"]["code"] == "unsupported_image"


def test_what_goes_wrong_later_is_an_event(tiny_models) -> None:
    language = tiny_models.pipeline.speaker.engine.language
    plain_step = language.step
    steps = 0

    def step(tokens_B, state):
        nonlocal steps
        steps += 1
        if steps == 20:
            raise RuntimeError("a device fell over")
        return plain_step(tokens_B, state)

    language.step = step
    with serving(lambda: tiny_models) as server:
        response = server.chat(user("", PICTURES[0]), stream=True, **LONG)
        last = json.loads(response.text.strip().split("\n\n")[-1].removeprefix("data: "))
        assert response.status_code == 200 and last["error"]["code"] == "internal_error"
        assert "device" not in response.text  # what happened inside is for the log
        again = server.chat(user("", PICTURES[0]), **LONG)  # and the next one is answered
        assert again.json()["choices"][0]["finish_reason"] == "length"
