"""The names of other programs: done, passed over because they change nothing, or refused in the caller's own words."""

from __future__ import annotations

import json
import re

import pytest

from blip2.serve import dialect
from blip2.serve.body import read
from blip2.serve.errors import ApiError
from blip2.serve.limits import Limits
from tests.serve.conftest import PICTURES, data_url, serving, user

CHAT, EMBEDDINGS = "/v1/chat/completions", "/v1/embeddings"
IMAGE = "data:image/png;base64,AAAA"
PART, TEXT = {"type": "image_url", "image_url": {"url": IMAGE}}, {"type": "text", "text": "what?"}
GOOD = {
    CHAT: {"messages": [{"role": "user", "content": [TEXT, PART]}]}, EMBEDDINGS: {"input": "a dog"},
    "/caption": {"image": IMAGE}, "/ask": {"image": IMAGE, "question": "what?"},
    "/match": {"image": IMAGE, "texts": ["a dog"]}, "/explain": {"image": IMAGE},
}  # fmt: skip


def fields(route: str, body: object, kind: str = "application/json") -> dict:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return read(route, kind, content, Limits()).fields


def told(route: str, body: object, kind: str = "application/json") -> ApiError:
    with pytest.raises(ApiError) as refused:
        fields(route, body, kind)
    return refused.value


def messages(content: object) -> dict:
    return {"messages": [{"role": "user", "content": content}]}


@pytest.mark.parametrize("route", ["/caption", "/ask", CHAT])
def test_the_names_of_python_and_of_the_command_line(route) -> None:
    for own, others in dialect.ALIASES.items():
        if own == "texts":
            continue
        value = {"sample": True, "stop": ["a", "b"], "typical_p": 0.5}.get(own, 3)
        for name in (own, *others):
            assert fields(route, {**GOOD[route], name: value})[own] == value
        error = told(route, {**GOOD[route], own: value, others[0]: "another"})
        assert error.param == others[0] and f"{own} and {others[0]} mean the same" in error.message
    # In the words of the caller.
    assert told(route, {**GOOD[route], "max_new_tokens": "x"}).message == "max_new_tokens: give a whole number"


@pytest.mark.parametrize("route", ["/caption", "/ask", CHAT])
@pytest.mark.parametrize("name", [*dialect.OFF, "n", "num_beams", "temperature", "top_p", "min_p", "sample"])
def test_values_that_mean_that_nothing_was_said(route, name) -> None:
    if name == "dimensions":
        return
    for value in (None, *dialect.OFF.get(name, ())):
        assert fields(route, {**GOOD[route], name: value})[name] is None
        if route == "/caption" and isinstance(value, int):
            form = f"image=AAAA&{name}={value}".encode()
            assert fields(route, form, "application/x-www-form-urlencoded")[name] is None


@pytest.mark.parametrize(
    ("route", "name", "words"),
    [
        ("/caption", "promt", "did you mean 'prompt'?"), ("/caption", "num_beam", "did you mean 'num_beams'?"),
        ("/ask", "choises", "did you mean 'choices'?"), ("/ask", "Question", "did you mean 'question'?"),
        ("/ask", "temp", "did you mean 'temperature'?"), ("/match", "txts", "did you mean 'texts'?"),
        ("/explain", "wrd", "did you mean 'word'?"), ("/caption", "question", "/ask and /explain have it"),
        ("/caption", "stream", f"{CHAT} has it"), ("/match", "num_beams", f"/caption and /ask and {CHAT} have it"),
        ("/explain", "xyz", "it has image, text, question, answer, word, caption"),
        (CHAT, "temprature", "did you mean 'temperature'?"), (CHAT, "max_token", "did you mean 'max_tokens'?"),
        (CHAT, "maxTokens", "did you mean 'max_tokens'?"), (CHAT, "topp", "did you mean 'top_p'?"),
        (CHAT, "responseFormat", "did you mean 'response_format'?"), (CHAT, "messges", "did you mean 'messages'?"),
        (CHAT, "choices", "/ask has it"), (CHAT, "choice", "did you mean 'choices'? (/ask has it)"),
        (CHAT, "question", "put the question into a message"), (CHAT, "image", "an image_url part of a message"),
        (CHAT, "input", f"{EMBEDDINGS} has it"), (EMBEDDINGS, "texts", "put texts into input"),
        (EMBEDDINGS, "dimension", "did you mean 'dimensions'?"), (EMBEDDINGS, "image", 'as {"image": "data:image'),
    ],
)  # fmt: skip
def test_a_field_that_nobody_knows_is_refused_with_the_nearest(route, name, words) -> None:
    error = told(route, {**GOOD[route], name: 1})
    assert (error.status, error.code, error.param) == (400, "unknown_field", name)
    assert error.message == f"{route} has no field {name!r}; {words}" or words in error.message


def test_what_changes_no_answer_is_passed_over_and_what_is_strange_is_told() -> None:
    for route, names in dialect.IGNORED_FIELDS.items():
        assert fields(route, {**GOOD[route], **dict.fromkeys(names, 1)})["ignored"] == []
        assert fields(route, {**GOOD[route], "x_y": 1, "über": 1})["ignored"] == ["x_y"]
    for name, (harmless, _) in dialect.REFUSED.items():
        for value in (None, *harmless):
            assert fields(CHAT, {**GOOD[CHAT], name: value})["ignored"] == []
        error = told(CHAT, {**GOOD[CHAT], name: ["something"]})
        assert (error.code, error.param) == ("unsupported_parameter", name)


@pytest.mark.parametrize(
    ("route", "body", "message"),
    [
        (CHAT, messages([TEXT, {"image_url": {"url": IMAGE}}]),
         "messages[0].content[1].type is missing; say 'text' or "),
        (CHAT, messages([{"type": "image_url", "image_url": {"url": None}}]),
         "messages[0].content[0].image_url.url: give data"),
        (CHAT, messages([{"type": "image_url", "image_url": {}}]),
         "messages[0].content[0].image_url.url is missing; give data"),
        (CHAT, messages([{"type": "image_url"}]), 'messages[0].content[0].image_url: give {"url": '),
        (CHAT, messages([{"type": "image_url", "image_url": ["x"]}]),
         'messages[0].content[0].image_url: give {"url": '),
        (CHAT, messages([{"type": "text"}]), "messages[0].content[0].text: give a text"),
        (CHAT, messages([{"type": "text", "text": 5}]), "messages[0].content[0].text: give a text"),
        (CHAT, messages([{"type": "video_url"}]),
         "messages[0].content[0].type: unknown part type 'video_url'"),
        (CHAT, messages(["x"]), "messages[0].content[0]: give an object, {...}"),
        (CHAT, messages(5), "messages[0].content: give a text, or a list of parts"),
        (CHAT, messages(None), "messages[0].content: give a text, or a list of parts"),
        (CHAT, {"messages": [{"role": "user", "contnet": "x"}]},
         "messages[0].content: give a text, or a list of parts"),
        (CHAT, {"messages": [{"role": "bot", "content": "x"}]}, "messages[0].role: give 'system', 'developer', 'user'"),
        (CHAT, {"messages": [{"content": "x"}]}, "messages[0].role is missing; give 'user'"),
        (CHAT, {"messages": [{"role": "user", "content": "x", "image": IMAGE}]},
         "messages[0].image: the content holds an image"),
        (CHAT, {**GOOD[CHAT], "stream_options": {"include_usages": True}},
         "there is no field 'include_usages' of stream_options; did you mean 'include_usage'?"),
        (CHAT, {**GOOD[CHAT], **{f"x{number}": 1 for number in range(400)}}, "the body has 401 fields; at most 300"),
        (CHAT, {"messages": []}, "messages: it is empty; give at least one"),
        (CHAT, {"messages": {}}, "messages: give a list of messages"),
        (CHAT, {}, "messages is missing; give a list of messages"),
        (CHAT, [], "the body is a list; send JSON such as"),
        (CHAT, messages(f"what is this? {IMAGE}"),
         "messages[0].content: an image stands where a text belongs; send it as"),
        (CHAT, messages([{"type": "text", "text": f"![]({IMAGE})"}]),
         "messages[0].content[0].text: an image stands"),
        (CHAT, {**GOOD[CHAT], "stop": [""]}, "stop[0]: it is empty"),
        (CHAT, {**GOOD[CHAT], "stop": 5}, "stop: give a text, or a list of texts"),
        (CHAT, {**GOOD[CHAT], "stream": "x"}, "stream: give true or false"),
        (CHAT, {**GOOD[CHAT], "stream_options": True}, "stream_options: give an object, {...}"),
        (CHAT, {**GOOD[CHAT], "n": 0}, "n: give 1 or more"),
        (CHAT, {**GOOD[CHAT], "num_captions": 0}, "num_captions: give 1 or more"),
        (CHAT, {**GOOD[CHAT], "temperature": 3}, "temperature: give 2 or less"),
        (CHAT, {**GOOD[CHAT], "seed": 2**63}, "seed: give less than 2^63"),
        (CHAT, {**GOOD[CHAT], "seed": 1.5}, "seed: give a whole number"),
        (CHAT, {**GOOD[CHAT], "early_stopping": "soon"}, "early_stopping: give true, false or 'never'"),
        (CHAT, {**GOOD[CHAT], "model": 5}, "model: give a text"),
        (EMBEDDINGS, {"input": [[2028, 374]]},
         "input: these are token ids of another model's tokenizer; send the texts"),
        (EMBEDDINGS, {"input": [2028, 374]}, "input: these are token ids"),
        (EMBEDDINGS, {"input": []}, "input: it is empty; give at least one"),
        (EMBEDDINGS, {"input": ""}, "input: it is empty; write something"),
        (EMBEDDINGS, {"input": [{"image": IMAGE}, " "]}, "input[1]: it is empty; write something"),
        (EMBEDDINGS, {"input": ["a", "x" * 99_999]}, "input[1] has 99999 characters; the limit is 2048 tokens"),
        (EMBEDDINGS, {"input": 5}, "input: give a text, or a list of texts"),
        (EMBEDDINGS, {"input": ["a", None]}, 'input[1]: give a text, or {"image": '),
        (EMBEDDINGS, {"input": [{"img": IMAGE}]}, "input[0].image is missing; give data"),
        (EMBEDDINGS, {"input": ["a", IMAGE]}, "input[1]: an image stands where a text belongs; send it as"),
        (EMBEDDINGS, {"input": "a", "encoding_format": "hex"}, "encoding_format: give 'float' or 'base64'"),
        ("/ask", {"image": IMAGE, "question": IMAGE},
         "question: an image stands where a text belongs; send it in the field"),
        ("/ask", {**GOOD["/ask"], "choices": "a,,b"}, "choices[1]: it is empty"),
        ("/ask", {"image": IMAGE}, "question is missing; give a question"),
        ("/ask", {**GOOD["/ask"], "choices": ["a", 5]}, "choices[1]: give a text"),
        ("/ask", {**GOOD["/ask"], "choices": [IMAGE]}, "choices[0]: an image stands"),
        ("/match", {"image": IMAGE, "labels": []}, "labels: it is empty; give at least one"),
        ("/match", {"image": IMAGE}, "texts is missing; give a list of texts"),
        ("/caption", {"image": 5}, "image: give data:image/...;base64"),
        ("/caption", {}, "image is missing; give data:image/...;base64"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_by_the_callers_names(route, body, message) -> None:
    error = told(route, body)
    assert error.status == 400 and error.message.startswith(message)
    where = re.match(r"[a-z_]+(\[\d+\]|\.[a-z_]+)*(?=:| is missing)", message)
    assert where is None or error.param == where[0]


GOOD_FORM = b"image=AAAA&question=what%3f"
URLENCODED = "application/x-www-form-urlencoded"


@pytest.mark.parametrize("kind", ["", URLENCODED, "text/plain", "application/octet-stream", "application/ld+json"])
def test_json_is_read_whatever_it_is_called(kind) -> None:
    for route, good in GOOD.items():
        expected = fields(route, good)
        assert fields(route, b" \n" + json.dumps(good).encode(), kind) == expected
        assert fields(route, b"\xef\xbb\xbf" + json.dumps(good).encode(), kind) == expected
        assert fields(route, json.dumps(good).encode("utf-16"), "application/json") == expected


@pytest.mark.parametrize(
    ("route", "content", "kind", "words"),
    [
        (CHAT, b"a=b", URLENCODED, "not JSON; send JSON such as"), (CHAT, b"", "", "the body is empty; send JSON"),
        (CHAT, b"", "application/json", "the body is empty; send JSON"),
        (CHAT, b"--x", "multipart/form-data; boundary=x", "send JSON such as"),
        (CHAT, b'{"n": 1, "n": 2}', "", "'n' occurs twice"), (CHAT, b'{"n": NaN}', "", "NaN is not a JSON number"),
        (CHAT, b'{"user": "\xe4"}', "", "it is not UTF-8"), (CHAT, b'{"n": 1', "", "the body is not valid JSON"),
        ("/caption", b"\x89PNG\r\n\x1a\n", URLENCODED, "the body is an image by itself; send a form"),
        ("/caption", b"\xff\xd8\xff", "image/jpeg", "curl -F image=@FILE"),
        ("/caption", b"x", "text/html", "send a form"),
        ("/caption", b"", "multipart/form-data", "let the client set that header"),
        ("/ask", GOOD_FORM + b"&question=x", URLENCODED, "'question' occurs more than once"),
        ("/ask", GOOD_FORM + b"&qestion=x", URLENCODED, "did you mean 'question'?"),
    ],
)  # fmt: skip
def test_who_sends_something_else_is_told_what_to_send(route, content, kind, words) -> None:
    error = told(route, content, kind)
    assert error.status in (400, 415) and words in error.message


def test_forms_say_what_json_says() -> None:
    given = {"max_new_tokens": 5, "sample": True, "top_k": 3, "stop": ["a", "b"], "early_stopping": False}
    form = b"image=AA+A&max_new_tokens=5&sample=true&top_k=3&stop=a&stop=b&early_stopping=false"
    assert fields("/caption", form, URLENCODED) == fields("/caption", {**GOOD["/caption"], **given})
    for form in (b"&choices=one,two", b"&choices=one&choices=two"):
        assert fields("/ask", GOOD_FORM + form, URLENCODED)["choices"] == ["one", "two"]
    assert fields("/match", b"image=AAAA&text=a, b", URLENCODED)["texts"] == ["a, b"]
    assert fields("/match", b"image=AAAA&text=a&text=b", URLENCODED)["texts"] == ["a", "b"]
    assert read("/caption", URLENCODED, b"image=+++/", Limits()).images == [b"\xfb\xef\xbf"]


# ---- with a model ----


def test_options_mean_on_the_server_what_they_mean_in_python(server, models) -> None:
    blip, picture = models.pipeline, PICTURES[0]
    files = {"image": picture.read_bytes()}

    def caption(**data: object) -> list[str]:
        response = server.http.post("/caption", files=files, data=data)
        assert response.status_code == 200, response.text
        return response.json()["texts"]

    assert caption(max_new_tokens=2) == [blip.caption(picture, max_new_tokens=2)]
    assert caption(num_captions=3) == blip.caption(picture, num_captions=3)
    assert caption(temperature=2, seed=1, top_k=1) == [blip.caption(picture, num_beams=1)]
    assert caption(top_p=0) == [blip.caption(picture, num_beams=1)]
    assert caption(beams=3, no_repeat_ngram=1) == [blip.caption(picture, num_beams=3, no_repeat_ngram_size=1)]
    drawn = {"temperature": 1.5, "top_k": 20, "min_p": 0.01, "typical_p": 0.95, "seed": 7, "sample": True}
    assert caption(**drawn) == [blip.caption(picture, **drawn)]
    asked = server.chat(user("", picture), **drawn, max_new_tokens=3).json()["choices"][0]["message"]["content"]
    assert asked == blip.caption(picture, **drawn, max_new_tokens=3)
    for wrong, words in (
        ({"min_tokens": 9, "max_new_tokens": 5}, "min_tokens is 9, but max_new_tokens only 5; raise the latter"),
        ({"do_sample": True, "beams": 3}, "do_sample needs beams=1, not 3: beam search looks for the most likely "
         "text; set beams to 1, or leave out do_sample"),
        ({"top_k": 5, "num_beams": 3}, "top_k needs num_beams=1, not 3: beam search looks for the most likely "
         "text; set num_beams to 1, or leave out top_k"),
        ({"num_captions": 65}, "num_captions is 65; this server runs at most 64 answers or beams at once"),
    ):  # fmt: skip
        response = server.http.post("/caption", files=files, data=wrong)
        assert (response.status_code, response.json()["error"]["message"]) == (400, words)


def test_choices_are_ranked_as_in_python(server, models) -> None:
    question = "how many dogs are in the picture?"
    choices = ["one", "two", "three", "a very long answer that nobody gives", *map(str, range(4, 20))]
    form = {"question": question, "choices": ",".join(choices)}
    found = server.http.post("/ask", files={"image": PICTURES[0].read_bytes()}, data=form).json()
    expected = models.pipeline.rank(PICTURES[0], question, choices)
    assert found["text"] == models.pipeline.ask(PICTURES[0], question, choices=choices) == found["choices"][0]["text"]
    assert found["texts"] == [each["text"] for each in found["choices"]] == [each.text for each in expected]
    assert [each["probability"] for each in found["choices"]] == pytest.approx(
        [each.probability for each in expected], rel=1e-3
    )
    assert found["finish_reason"] == "choice"
    body = {"image": data_url(PICTURES[0]), "question": question, "choices": choices}
    assert server.http.post("/ask", json=body).json()["text"] == found["text"]
    for wrong, words in (
        ({"choices": "one"}, "give at least two"), ({"choices": ["a", "a"]}, "more than once"),
        ({"max_new_tokens": 5}, "max_new_tokens has no effect with choices"), ({"choices": ["a"] * 257}, "at most 256"),
        ({"choices": ["a", "dog " * 600]}, "the limit is 512"),
    ):  # fmt: skip
        response = server.http.post("/ask", json={**body, **wrong})
        assert response.status_code == 400 and words in response.json()["error"]["message"]


def test_programs_that_ask_for_thousands_of_tokens_get_their_answer(server, models) -> None:
    history = [("how many dogs are there?", "two"), ("and boats?", "one")]
    turns = [user(history[0][0], PICTURES[0]), {"role": "assistant", "content": "two"}, user(history[1][0])]
    turns += [{"role": "assistant", "content": "one"}, user("and cats?")]
    chat = models.pipeline.chat(PICTURES[0])
    chat.history = list(history)
    expected = chat.say("and cats?")
    for most in (300, 1000, 4096, -1, None):
        response = server.chat(*turns, max_tokens=most)
        assert response.json()["choices"][0]["message"]["content"] == expected
        assert "x-blip2-forgotten-turns" not in response.headers
    response = server.http.post("/caption", files={"image": PICTURES[0].read_bytes()}, data={"max_tokens": 99_999})
    assert response.json()["text"] == models.pipeline.caption(PICTURES[0])


def test_what_is_passed_over_is_told_in_a_header(server, models) -> None:
    assert "x-blip2-ignored" not in server.chat(user("", PICTURES[0]), user="me").headers
    assert server.chat(user("", PICTURES[0]), x_y=1, stream=True).headers["x-blip2-ignored"] == "x_y"
    response = server.http.post("/v1/embeddings", json={"input": "a dog", "normalise": True})
    assert response.headers["x-blip2-ignored"] == "normalise"
    system = {"role": "system", "content": "You are a helpful assistant."}
    with serving(lambda: models, limits=Limits(system_prompt="ignore")) as lenient:
        response = lenient.chat(system, user("", PICTURES[0]), x_y=1)
    assert response.headers["x-blip2-ignored"] == "system, x_y"
    assert response.json()["choices"][0]["message"]["content"] == models.pipeline.caption(PICTURES[0])


def test_who_asks_at_another_path_is_told_where(server) -> None:
    for path, words in (
        ("/v1/responses", "offers OpenAI's chat completions at /v1/chat/completions"),
        ("/v1/completions", "at /v1/chat/completions"),
        ("/chat/completions", "at /v1/chat/completions"), ("/v1/embedding", "did you mean /v1/embeddings?"),
        ("/captions", "did you mean /caption?"), ("/xyz", "/openapi.json lists the routes"),
    ):  # fmt: skip
        response = server.http.post(path, json={})
        assert response.status_code == 404 and words in response.json()["error"]["message"]


def test_a_packed_body_is_refused_with_what_to_send(server) -> None:
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    for path in (CHAT, "/caption"):
        response = server.http.post(path, content=b"\x1f\x8b\x08", headers=headers)
        assert response.status_code == 415 and response.headers["accept-encoding"] == "identity"
        assert "without Content-Encoding" in response.json()["error"]["message"]


def test_the_interface_is_described_with_all_its_names(server) -> None:
    told = server.http.get("/openapi.json")
    paths = told.json()["paths"]
    assert "$defs" not in told.text  # what refers to them is read as a place in the whole document
    for route, names in dialect.NAMES.items():
        for kind, described in paths[route]["post"]["requestBody"]["content"].items():
            schema = described["schema"]
            assert set(schema["properties"]) == set(names) and set(schema["required"]) <= set(names)
            assert schema["additionalProperties"] == (route in dialect.IGNORED_FIELDS)
            if kind == "multipart/form-data":
                assert schema["properties"]["image"] == {"type": "string", "format": "binary"}
