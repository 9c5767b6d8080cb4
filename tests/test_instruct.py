"""An InstructBLIP wherever a BLIP-2 can be: kept images, collections, the command line, the server, an index."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

import blip2
from blip2.checkpoint import describe
from blip2.errors import ImageError, OptionError
from blip2.generation import GenerateOptions
from blip2.published import PUBLISHED
from blip2.serve.service import Models
from blip2.tasks.defaults import INSTRUCT
from blip2.text import CAPTION_INSTRUCTION, chat_prompt, question_prompt
from tests import tiny
from tests.cli.conftest import run  # noqa: F401
from tests.serve.conftest import serving, user

QUESTIONS = ["how many dogs are there?", "what colour is the car?"]
SHORT = {"max_new_tokens": 8}


@pytest.fixture(scope="session", params=["t5", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_instructed(request.param, tmp_path_factory.mktemp("instructed"))


@pytest.fixture(scope="session")
def blip(folder: Path) -> blip2.Pipeline:
    return blip2.load(folder)


def test_the_authors_settings() -> None:
    """Of ``generate`` in blip2_t5_instruct.py and blip2_vicuna_instruct.py; a conversation is told as it is written."""
    expected = GenerateOptions(
        num_beams=5, max_new_tokens=256, min_new_tokens=1, length_penalty=1.0, repetition_penalty=1.5
    )
    assert INSTRUCT.ask == INSTRUCT.caption == expected
    assert INSTRUCT.chat.num_beams == 1 and INSTRUCT.chat.repetition_penalty == 1.5


def test_words_are_used_as_they_are() -> None:
    assert question_prompt(" Question: is it  red? Short answer:", "instruct") == "Question: is it red? Short answer:"
    with pytest.raises(OptionError, match="which are added automatically"):
        question_prompt("Question: is it red? Short answer:", "t5")
    turns = [("is it red?", "no."), ("where is it?", "left")]
    said = "dialog history: Question: is it red? Answer: no. Question: where is it? Answer: left.\nwhy?"
    assert chat_prompt(turns, "why?", "instruct") == said
    assert chat_prompt([], "why?", "instruct") == "why?"


def test_a_chat_template_is_refused(folder) -> None:
    with pytest.raises(OptionError, match=r"chat_template is not for an InstructBLIP such as .*leave it out"):
        blip2.load(folder, chat_template=True)


def test_what_is_kept_of_a_picture_answers_every_question(blip, tmp_path) -> None:
    kept = blip.encode(tiny.picture(1))
    kept.save(tmp_path / "kept.safetensors")
    again = blip2.EncodedImage.load(tmp_path / "kept.safetensors")
    for question in QUESTIONS:
        asked = blip.ask(tiny.picture(1), question, **SHORT)
        assert blip.ask(kept, question, **SHORT) == blip.ask(again, question, **SHORT) == asked
    speaker = blip.speaker
    assert not torch.allclose(*(speaker.queries(kept, question) for question in QUESTIONS), atol=0.05)


def test_the_queries_of_another_model_are_refused(blip, opt_model) -> None:
    other = blip2.load(opt_model)
    for asked, seen in ((blip, other.encode(tiny.picture(1))), (other, blip.encode(tiny.picture(1)))):
        with pytest.raises(OptionError, match="comes from another model"):
            asked.ask(seen, QUESTIONS[0])


def test_without_a_prompt_a_caption_is_asked_for(blip) -> None:
    asked = blip.caption(tiny.picture(1), prompt=CAPTION_INSTRUCTION, **SHORT)
    assert blip.caption(tiny.picture(1), **SHORT) == asked


def test_choices_that_are_compared_together_or_alone(blip) -> None:
    """The image is looked at once for a question, whatever the number of choices."""
    calls, look = [], blip.speaker.model.look
    choices = ["two", "a red car", "on the left", "no"]
    blip.speaker.model.look = lambda *given, **named: calls.append(1) or look(*given, **named)
    try:
        together = blip.rank(tiny.picture(1), QUESTIONS[0], choices)
    finally:
        del blip.speaker.model.look
    assert len(calls) == 1
    alone = blip.rank(tiny.picture(1), QUESTIONS[0], choices, batch_size=1)
    assert [each.text for each in together] == [each.text for each in alone]
    assert [each.score for each in together] == pytest.approx([each.score for each in alone], abs=1e-4)


def test_a_conversation(blip) -> None:
    chat = blip.chat(tiny.picture(1), **SHORT)
    first, second = chat.say(QUESTIONS[0]), chat.say(QUESTIONS[1])
    said = f"dialog history: Question: {QUESTIONS[0]} Answer: {blip2.text.clean(first).removesuffix('.')}."
    given = {**SHORT, "num_beams": 1, "min_new_tokens": 1}
    [[answer]] = blip.speaker.answers(
        [chat.image], [f"{said}\n{QUESTIONS[1]}"], GenerateOptions(**given, repetition_penalty=1.5)
    )
    assert second == answer.text and chat.history == [(QUESTIONS[0], first), (QUESTIONS[1], second)]


def test_a_collection(blip, folder, pictures, tmp_path) -> None:
    """With the options of the model's authors, too."""
    source = str(Path(pictures[0]).parent)
    blip2.ask_collection(source, QUESTIONS, tmp_path / "answers.jsonl", model=folder, **SHORT)
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    found = [row["caption"] for row in rows]
    paths = sorted(pictures)
    expected = [blip.ask(path, question, **SHORT) for path in paths for question in QUESTIONS]
    assert found == expected


def test_an_index_keeps_the_patches(blip, pictures, tmp_path) -> None:
    place = tmp_path / "photos.index"
    blip2.Index.update(place, str(Path(pictures[0]).parent), blip)
    opened = blip2.Index.open(place)
    assert tuple(opened[0].queries_QD.shape) == blip.speaker.model.config.kept_shape
    answers = blip.ask(opened[:], QUESTIONS[0], **SHORT)
    assert answers == [blip.ask(path, QUESTIONS[0], **SHORT) for path in opened.paths]


def test_where_it_looks_depends_on_the_question(blip) -> None:
    maps = [blip.explain(tiny.picture(1), question=question, answer="two").heat for question in QUESTIONS]
    assert not torch.equal(*maps)
    with pytest.raises(ImageError, match="has no pixels"):
        blip.explain(blip.encode(tiny.picture(1)), question=QUESTIONS[0])


def test_it_can_be_pickled(blip) -> None:
    again = pickle.loads(pickle.dumps(blip))
    assert again.ask(tiny.picture(1), QUESTIONS[0], **SHORT) == blip.ask(tiny.picture(1), QUESTIONS[0], **SHORT)


def test_the_command_line(run, blip, folder, pictures) -> None:  # noqa: F811
    model = ["--model", folder, "--max-new-tokens", "8"]
    assert run("ask", pictures[0], QUESTIONS[0], *model).stdout == f"{blip.ask(pictures[0], QUESTIONS[0], **SHORT)}\n"
    caption = run("caption", pictures[0], "--prompt", QUESTIONS[1], *model)
    assert caption.stdout == f"{blip.caption(pictures[0], prompt=QUESTIONS[1], **SHORT)}\n"
    talk = run("chat", pictures[0], *model, input=f"{QUESTIONS[0]}\n")
    assert talk.stdout == f"{blip.chat(pictures[0], **SHORT).say(QUESTIONS[0])}\n"
    told = run("info", folder)
    assert told.exit_code == 0 and "reads the prompt" in told.stdout
    refused = run("match", pictures[0], "a dog", "--model", folder)
    assert refused.exit_code and "cannot compare images with texts" in refused.stderr


def test_the_server(blip, folder, tmp_path) -> None:
    """An image is encoded once, and seen anew by each question."""
    path = tmp_path / "picture.png"
    tiny.picture(1).save(path)
    with serving(lambda: Models(blip2.load(folder), None)) as server:
        for question in [*QUESTIONS, *QUESTIONS]:
            told = server.chat(user(question, path), max_tokens=8).json()
            assert told["choices"][0]["message"]["content"] == blip.ask(path, question, **SHORT)
        assert server.service.worker.images.num_encoded == 1
        told = server.chat(user("", path), max_tokens=8).json()
        assert told["choices"][0]["message"]["content"] == blip.caption(path, **SHORT)
        turns = [user(QUESTIONS[0], path), {"role": "assistant", "content": "two"}, user(QUESTIONS[1])]
        told = server.chat(*turns, max_tokens=8).json()
        chat = blip.chat(path, **SHORT)
        chat.history.append((QUESTIONS[0], "two"))
        assert told["choices"][0]["message"]["content"] == chat.say(QUESTIONS[1])
        fields = {"image": user("", path)["content"][0]["image_url"]["url"], "question": QUESTIONS[0]}
        told = server.http.post("/ask", json=fields | {"choices": ["two", "no"]}).json()
        assert told["text"] == blip.ask(path, QUESTIONS[0], choices=["two", "no"])


@pytest.mark.parametrize("name", [name for name in PUBLISHED if "instructblip" in name])
def test_the_published_ones_have_their_size(name: str) -> None:
    found = describe.describe(PUBLISHED[name].config)
    assert found.num_parameters * 4 == pytest.approx(PUBLISHED[name].size_gb * 1e9, rel=0.005)


def test_whose_questions_may_have_words_around_them(run, folder, opt_model, pictures, tmp_path) -> None:  # noqa: F811
    """Those to an InstructBLIP, which may have been trained with them, on the command line too."""
    words = "Question: is it red? Answer:"
    for more in (lambda name: [], lambda name: ["-o", tmp_path / f"{name}.jsonl"]):
        options = ["--max-new-tokens", "3", "--model"]
        assert run("ask", pictures[0], words, *options, folder, *more("one")).exit_code == 0
        refused = run("ask", pictures[0], words, *options, opt_model, *more("other"))
        assert refused.exit_code == 2 and "which are added automatically" in refused.stderr
