"""The clients that people have, against a real server: the official library, the `llm` command, curl."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import openai
import pytest

from tests.serve.conftest import PICTURES, Running, data_url, user

QUESTION = "how many dogs are in the picture?"


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_a_question_is_answered_as_the_pipeline_answers_it(client, models) -> None:
    blip = models.pipeline
    for picture in PICTURES:
        for question in (QUESTION, "what color is the background?"):
            found = client.chat.completions.create(model="miniature", messages=[user(question, picture)])
            assert found.choices[0].message.content == blip.ask(picture, question)
            assert (found.choices[0].finish_reason, found.object, found.model) == (
                "stop", "chat.completion", "miniature",
            )  # fmt: skip


def test_a_picture_alone_gets_its_caption(client, models) -> None:
    found = client.chat.completions.create(model="blip2", messages=[user("", PICTURES[0])])
    assert found.choices[0].message.content == models.pipeline.caption(PICTURES[0])
    assert found.usage is not None and found.usage.prompt_tokens > found.usage.completion_tokens > 0
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens


def test_several_turns_are_a_chat(client, models) -> None:
    chat = models.pipeline.chat(PICTURES[0])
    messages = []
    asked = ("how many dogs are there?", "and boats?", "and cats?")
    first = models.pipeline.ask(PICTURES[0], asked[0])
    chat.history.append((asked[0], first))
    messages = [user(asked[0], PICTURES[0]), {"role": "assistant", "content": first}]
    for question in asked[1:]:
        messages.append(user(question))
        found = client.chat.completions.create(model="miniature", messages=messages)
        answer = found.choices[0].message.content
        assert answer == chat.say(question)
        messages.append({"role": "assistant", "content": answer})


def test_a_stream_is_what_the_whole_answer_is_without_beams(client, models) -> None:
    stream = client.chat.completions.create(
        model="miniature", messages=[user("", PICTURES[0])], stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert "".join(pieces) == models.pipeline.caption(PICTURES[0], num_beams=1) and len(pieces) > 2
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == len(pieces)


def test_options_mean_what_they_mean_in_python(client, models) -> None:
    blip, messages = models.pipeline, [user("", PICTURES[2])]

    def said(**fields) -> list[str]:
        found = client.chat.completions.create(model="miniature", messages=messages, **fields)
        return [choice.message.content for choice in found.choices]

    assert said(temperature=0) == [blip.caption(PICTURES[2], num_beams=1)]
    sampled = blip.caption(PICTURES[2], num_captions=3, sample=True, temperature=1.5, top_p=0.9, seed=7)
    assert said(temperature=1.5, top_p=0.9, seed=7, n=3) == sampled
    assert said(n=3) == blip.caption(PICTURES[2], num_captions=3)
    assert said(extra_body={"num_beams": 2, "length_penalty": 2.0, "min_new_tokens": 9}) == [
        blip.caption(PICTURES[2], num_beams=2, length_penalty=2.0, min_new_tokens=9)
    ]
    stop = blip.caption(PICTURES[2], num_beams=1).split()[2]
    assert said(stop=[stop]) == [blip.caption(PICTURES[2], stop=(stop,))] == said(stop=stop)
    assert stop not in said(stop=stop, temperature=0)[0]
    short = client.chat.completions.create(model="miniature", messages=messages, max_completion_tokens=2)
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 2


def test_logprobs_are_those_of_the_model(client, models) -> None:
    found = client.chat.completions.create(model="miniature", messages=[user("", PICTURES[0])], logprobs=True)
    [choice] = found.choices
    [answers] = models.pipeline.each_caption(PICTURES[0], num_beams=1)
    content = choice.logprobs.content
    assert [len(answers[0].tokens)] == [len(content)]
    assert 0 > sum(entry.logprob for entry in content) >= answers[0].score - 1e-3  # the end token's is not shown
    stream = client.chat.completions.create(
        model="miniature", messages=[user("", PICTURES[0])], logprobs=True, stream=True
    )
    streamed = [entry for chunk in stream if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert [entry.token for entry in streamed] == [entry.token for entry in content]
    assert np.allclose([entry.logprob for entry in streamed], [entry.logprob for entry in content], atol=1e-4)
    with pytest.raises(openai.BadRequestError, match="logprobs are not available with beam search"):
        client.chat.completions.create(
            model="miniature", messages=[user("", PICTURES[0])], logprobs=True, extra_body={"num_beams": 3}
        )


def test_the_most_likely_tokens_are_told_at_each_place(client) -> None:
    asked = {"model": "miniature", "messages": [user("", PICTURES[0])], "logprobs": True, "top_logprobs": 3}
    entries = client.chat.completions.create(**asked).choices[0].logprobs.content
    for entry in entries:
        best = [other.logprob for other in entry.top_logprobs]
        assert len(best) == 3 and best == sorted(best, reverse=True)
        # Greedy: what is written is the best one.
        assert (entry.top_logprobs[0].token, best[0]) == (entry.token, pytest.approx(entry.logprob, abs=1e-5))
    stream = client.chat.completions.create(**asked, stream=True)
    streamed = [entry for chunk in stream if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert [[other.token for other in entry.top_logprobs] for entry in streamed] == [
        [other.token for other in entry.top_logprobs] for entry in entries
    ]


def test_the_asynchronous_client(server, models) -> None:
    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:

            async def ask(picture: Path) -> str:
                messages = [user("what is in the picture?", picture)]
                stream = await client.chat.completions.create(model="miniature", messages=messages, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*map(ask, PICTURES))

    expected = [models.pipeline.ask(picture, "what is in the picture?", num_beams=1) for picture in PICTURES]
    assert asyncio.run(ask_all()) == expected


def test_models_and_embeddings(client, models) -> None:
    assert [model.id for model in client.models.list()] == ["miniature", "miniature-itm"]
    assert client.models.retrieve("miniature").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")
    texts = ["two dogs and a boat", "a cat"]
    for encoding in ("float", "base64", openai.omit):
        found = client.embeddings.create(model="miniature-itm", input=texts, encoding_format=encoding)
        packed = [entry.embedding for entry in found.data]
        if encoding == "base64":  # who asks for it decodes it; who asks for nothing gets it from the library
            packed = [np.frombuffer(base64.b64decode(each), "<f4") for each in packed]
        vectors = np.array(packed)
        assert np.allclose(vectors, models.matcher.embed_texts(texts), atol=1e-5)
    found = client.embeddings.create(model="miniature-itm", input=[{"image": data_url(PICTURES[0])}])
    shape = found.data[0].model_extra["shape"]
    expected = models.matcher.embed_images(PICTURES[0])
    assert np.allclose(np.array(found.data[0].embedding).reshape(shape), expected, atol=1e-5)


def test_errors_have_the_shape_that_the_library_knows(client) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-4o", messages=[user(QUESTION, PICTURES[0])])
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as blind:
        client.chat.completions.create(model="miniature", messages=[user("write me a poem")])
    assert blind.value.code == "image_required"


def test_the_llm_command_asks_about_a_file(server, models, tmp_path) -> None:
    """As its documentation tells it: no configuration, only the address."""
    llm = Path(sys.executable).with_name("llm")
    environment = {**os.environ, "HOME": str(tmp_path), "LLM_USER_PATH": str(tmp_path)}
    command = [llm, "openai", "endpoint", f"{server.url}/v1", "-m", "miniature", "-a", PICTURES[0], QUESTION]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == models.pipeline.ask(PICTURES[0], QUESTION, num_beams=1)  # it streams


def test_curl_sends_files_and_json(server, models) -> None:
    def curl(*arguments: str, text: str | None = None) -> dict:
        command = ["curl", "-sS", "--max-time", "30", *arguments]
        return json.loads(subprocess.run(command, capture_output=True, check=True, text=True, input=text).stdout)

    blip, picture = models.pipeline, PICTURES[0]
    image = f"image=@{picture}"
    assert curl("-F", image, f"{server.url}/caption")["text"] == blip.caption(picture)
    begun = curl("-F", image, "-F", "prompt=a boat", "-F", "num_beams=3", f"{server.url}/caption")
    assert begun["text"] == blip.caption(picture, prompt="a boat", num_beams=3)
    assert curl("-F", image, "-F", f"question={QUESTION}", f"{server.url}/ask")["text"] == blip.ask(picture, QUESTION)
    texts = ["two dogs", "a cat", "a boat"]
    fields = [argument for text in texts for argument in ("-F", f"texts={text}")]
    results = curl("-F", image, *fields, f"{server.url}/match")["results"]
    assert [row["text"] for row in results] == texts
    expected = models.matcher.match(picture, texts)
    assert np.allclose([row["itm_probability"] for row in results], expected.itm_probability[0], atol=1e-5)
    assert np.allclose([row["itc_probability"] for row in results], expected.itc_probability[0], atol=1e-5)
    as_json = ("-H", "content-type: application/json", "--data-binary", "@-", f"{server.url}/ask")
    for written in (data_url(picture), data_url(picture).partition(",")[2]):
        body = {"image": written, "question": QUESTION, "n": 2}
        assert curl(*as_json, text=json.dumps(body))["texts"] == blip.ask(picture, QUESTION, num_return=2)
