"""What OpenAI's messages mean here, and what is refused because it means nothing."""

from __future__ import annotations

import pytest

from blip2.serve.conversation import CAPTION_QUESTION, read
from blip2.serve.errors import ApiError
from blip2.serve.limits import Limits
from blip2.serve.schemas import Message
from tests.serve.conftest import PICTURES, user

A, B = "data:image/png;base64,AAAA", "data:image/png;base64,BBBB"
IMAGE_A, IMAGE_B = b"\0\0\0", b"\4\x10A"


def said(role: str, *parts: str | None) -> Message:
    """Texts, and images by their address."""
    content = [
        {"type": "image_url", "image_url": part}
        if part and part.startswith("data:")
        else {"type": "text", "text": part}
        for part in parts
    ]
    return Message.model_validate({"role": role, "content": content})


def test_what_the_messages_amount_to() -> None:
    def meaning(*messages: Message) -> tuple:
        found = read(messages, Limits())
        return found.image, found.history, found.question

    assert meaning(said("user", "what is it?", A)) == (IMAGE_A, [], "what is it?")
    assert meaning(said("user", A)) == (IMAGE_A, [], "")
    assert meaning(said("user", A, "  what\nis ", "it? ")) == (IMAGE_A, [], "what is it?")
    turns = [said("user", A, "how many?"), said("assistant", "two"), said("user", "of what?")]
    assert meaning(*turns) == (IMAGE_A, [("how many?", "two")], "of what?")
    # A caption is an answer, too.
    assert meaning(said("user", A), *turns[1:]) == (IMAGE_A, [(CAPTION_QUESTION, "two")], "of what?")
    # Another image begins anew.
    assert meaning(*turns, said("assistant", "dogs"), said("user", B, "and here?")) == (IMAGE_B, [], "and here?")
    later = [said("user", B, "and here?"), said("assistant", "one"), said("user", "sure?")]
    assert meaning(*turns, said("assistant", "dogs"), *later) == (IMAGE_B, [("and here?", "one")], "sure?")
    assert meaning(said("user", A, "old"), said("user", B), said("user", "new")) == (IMAGE_B, [], "new")
    # The same one does not, however it is written.
    once_more = "data:image/x;base64,AA%41A"
    again = [said("user", once_more, "of what?"), said("assistant", "dogs"), said("user", "sure?", A, once_more)]
    assert meaning(*turns[:2], *again) == (IMAGE_A, [("how many?", "two"), ("of what?", "dogs")], "sure?")
    web = "https://example.org/a.png"
    part = {"type": "image_url", "image_url": {"url": web, "detail": "high"}}
    shown = [Message.model_validate({"role": "user", "content": [part, {"type": "text", "text": "how many?"}]})] * 2
    assert meaning(shown[0], said("assistant", "two"), shown[1]) == (web, [("how many?", "two")], "how many?")
    # Messages of one side after each other are one.
    assert meaning(said("user", "what"), said("user", A), said("user", "is it?")) == (IMAGE_A, [], "what is it?")
    assert meaning(turns[0], said("assistant", "two"), said("assistant", "dogs"), turns[2])[1] == [
        ("how many?", "two dogs")
    ]
    plain = [Message(role="system", content=""), Message(role="user", content="hello"), said("assistant", "hm")]
    assert meaning(*plain, said("user", A)) == (IMAGE_A, [], "")


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        ([said("user", "hello")], "image_required"),
        ([said("user", A, B)], "one_image_only"),
        ([said("user", A), said("assistant", "a dog")], "invalid_message"),
        ([said("assistant", "hello"), said("user", A)], "invalid_message"),
        ([said("user", A), said("assistant", B), said("user", "what?")], "invalid_message"),
        ([said("system", "you are a pirate"), said("user", A)], "system_message_unsupported"),
        ([said("tool", "42"), said("user", A)], "invalid_message"),
        ([Message.model_validate({"role": "user", "content": [{"type": "input_audio"}]})], "invalid_message"),
    ],
)
def test_what_has_no_meaning_is_refused(messages, code) -> None:
    with pytest.raises(ApiError) as refused:
        read(messages, Limits())
    assert (refused.value.status, refused.value.code) == (400, code)


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]}, {"response_format": {"type": "json_object"}},
        {"functions": [{"name": "f"}]}, {"tool_choice": "required"}, {"frequency_penalty": 0.5},
        {"presence_penalty": -1}, {"logit_bias": {"5": 1}}, {"modalities": ["audio"]}, {"top_logprobs": 3},
        {"logprobs": True, "top_logprobs": 21}, {"logprobs": True, "top_logprobs": -1},
        {"logprobs": True, "num_beams": 2}, {"temperature": 0.7, "num_beams": 2}, {"num_beams": 2, "n": 3},
        {"min_new_tokens": 9, "max_tokens": 8}, {"temperature": 3}, {"top_p": 1.5}, {"n": 0}, {"max_tokens": -3},
        {"seed": -2}, {"stop": [""]}, {"length_penalty": 1e300}, {"repetition_penalty": -1}, {"messages": []},
        {"best_of": 2}, {"mirostat": 2}, {"guided_choice": ["a", "b"]}, {"system": "you are a pirate"},
        {"extra_body": {"top_k": 1}}, {"sample": True, "temperature": 0}, {"do_sample": False, "top_k": 5},
    ],
)  # fmt: skip
def test_what_would_change_the_meaning_is_refused(server, fields) -> None:
    response = server.http.post("/v1/chat/completions", json={"messages": [user("", PICTURES[0])], **fields})
    assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")


def test_what_clients_send_besides_is_ignored(server, models) -> None:
    fields = {
        "user": "me", "store": False, "metadata": {"a": "b"}, "parallel_tool_calls": True, "service_tier": "auto",
        "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "frequency_penalty": 0,
        "presence_penalty": 0.0, "logit_bias": {}, "modalities": ["text"], "reasoning_effort": "low",
        "temperature": None, "stop": None, "max_tokens": None, "stream_options": None,
    }  # fmt: skip
    found = server.chat(user("", PICTURES[0]), **fields).json()
    assert found["choices"][0]["message"]["content"] == models.pipeline.caption(PICTURES[0])


def test_a_conversation_too_long_for_the_model_forgets_its_beginning_and_says_so(server, models) -> None:
    turns = []
    for _ in range(100):
        turns += [user("how many dogs are in the picture?"), {"role": "assistant", "content": "two"}]
    turns[0] = user("how many dogs are in the picture?", PICTURES[0])
    response = server.chat(*turns, user("and boats?"))
    chat = models.pipeline.chat(PICTURES[0])
    chat.history = [("how many dogs are in the picture?", "two")] * 100
    assert response.json()["choices"][0]["message"]["content"] == chat.say("and boats?")
    assert int(response.headers["x-blip2-forgotten-turns"]) == chat.num_forgotten > 0


def test_a_thousand_turns_are_not_read_a_thousand_times(server, models, monkeypatch) -> None:
    speaker, reads = type(models.pipeline.speaker), []
    fits = speaker.fits
    monkeypatch.setattr(speaker, "fits", lambda *given: reads.append(given) or fits(*given))
    turns = [user("what?", PICTURES[0]), *[{"role": "assistant", "content": "two"}, user("what?")] * 999]
    assert server.chat(*turns, max_tokens=2).status_code == 200
    assert 0 < len(reads) < 20


def test_a_question_in_the_words_of_the_template_is_refused(server) -> None:
    response = server.chat(user("Question: how many? Answer:", PICTURES[0]))
    assert response.status_code == 400 and "give the question alone" in response.json()["error"]["message"]


def test_pictures_as_other_programs_send_them() -> None:
    source = {"type": "base64", "media_type": "image/png", "data": "AAAA"}
    for content in (
        [{"type": "input_image", "image_url": A}], [{"type": "image", "image": A}],
        [{"type": "image_url", "image_url": A}],
        [{"type": "image", "source": source, "cache_control": {"type": "ephemeral"}}],
    ):  # fmt: skip
        assert read([Message.model_validate({"role": "user", "content": content})], Limits()).image == IMAGE_A
    ollama = Message.model_validate({"role": "user", "content": "what is it?", "images": ["AAAA"]})
    assert read([ollama], Limits()).image == IMAGE_A


def test_a_picture_that_is_sent_with_each_turn_is_one_picture() -> None:
    turns = [said("user", A, "what?"), said("assistant", "a dog")] * 50
    assert len(read([*turns, said("user", A, "sure?")], Limits(max_images=1)).history) == 50
    with pytest.raises(ApiError, match="more than 2,000 images"):
        read([said("user", *[A] * 2001)], Limits())
    with pytest.raises(ApiError, match="more than 1 images"):
        read([*turns, said("user", B)], Limits(max_images=1))


def test_a_system_message_is_passed_over_if_whoever_runs_the_server_says_so() -> None:
    messages = [said("system", "you are a pirate"), said("user", A), said("assistant", "a dog"), said("user", "sure?")]
    limits = Limits(system_prompt="ignore")
    found = read([*messages[:3], said("developer", "be brief"), messages[3]], limits)
    assert (found.history, found.question) == ([(CAPTION_QUESTION, "a dog")], "sure?") and found.ignored == ["system"]
    assert read([said("system", ""), said("user", A)], limits).ignored == []
    with pytest.raises(ApiError, match="--system-prompt ignore"):
        read(messages, Limits())
