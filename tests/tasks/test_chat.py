"""Conversations: what the model reads at each turn, and answers as they are written."""

import pytest
import torch

from blip2.encoded import EncodedImage
from blip2.errors import OptionError
from blip2.generation import Engine
from blip2.tasks.chat import Chat
from blip2.tasks.defaults import CHAT, merged
from blip2.tasks.speaker import Speaker
from blip2.text import Tokenizer
from tests import tiny


def new_chat(family="opt", **options):
    model = tiny.generative(family)
    tokenizer = Tokenizer(tiny.tokenizer_of(family))
    eos = model.config.language.eos_token_id
    engine = Engine(model.language, eos_token_ids=[eos], decode=tokenizer.decode)
    torch.manual_seed(5)
    return Chat(Speaker(model, tokenizer, engine), EncodedImage(torch.randn(4, 16)), merged(CHAT, options))


def test_history_stands_in_the_prompt():
    chat = new_chat()
    assert chat.prompt("q1?") == "Question: q1? Answer:"
    chat.history += [("q1?", "a1"), ("q2?", "a2")]
    assert chat.prompt("q3?") == "Question: q1? Answer: a1. Question: q2? Answer: a2. Question: q3? Answer:"
    chat.reset()
    assert chat.history == []
    assert chat.prompt("q1?") == "Question: q1? Answer:"


@pytest.mark.parametrize("family", ["opt", "t5", "llama"])
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"sample": True, "seed": 3, "temperature": 2.0}, {"stop": (" two", "re")}]
)
def test_streamed_or_not_the_same(family, options):
    whole, streamed = (new_chat(family, max_new_tokens=12, **options) for _ in range(2))
    for question in ("what is there?", "and where?"):
        answer = whole.say(question)
        assert "".join(streamed.stream(question)) == answer
    assert streamed.history == whole.history
    assert [question for question, _ in whole.history] == ["what is there?", "and where?"]


def test_pieces_come_while_the_answer_is_written(monkeypatch):
    chat = new_chat("t5")
    steps = []
    step = chat._speaker.model.language.step
    monkeypatch.setattr(chat._speaker.model.language, "step", lambda *given: steps.append(1) or step(*given))
    pieces = list(chat.stream("what is there?"))
    assert len(pieces) > 3
    assert all(pieces)


def test_an_answer_that_nobody_hears_out_is_stopped():
    chat = new_chat("t5")
    pieces = chat.stream("what is there?")
    heard = next(pieces)
    pieces.close()
    assert chat.history == [("what is there?", heard)]


def test_an_error_while_writing_is_raised_and_no_turn(monkeypatch):
    chat = new_chat()

    def fail(*given):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(chat._speaker.model.language, "step", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(chat.stream("what is there?"))
    assert chat.history == []


def test_long_conversations_lose_their_oldest_turns():
    chat = new_chat(max_new_tokens=10)
    for number in range(8):
        chat.history.append((f"what is number {number}?", "a red car"))
    prompt = chat.prompt("and now?")
    assert 0 < chat.num_forgotten < 8
    assert prompt.startswith(f"Question: what is number {chat.num_forgotten}?")
    assert prompt.endswith("a red car. Question: and now? Answer:")
    assert len(chat.history) == 8
    chat.say("and now?")


@pytest.mark.parametrize("ask", [Chat.say, Chat.stream])
def test_questions_that_are_none(ask):
    chat = new_chat()
    with pytest.raises(OptionError, match="empty"):
        ask(chat, " ")
    assert chat.history == []


def test_a_question_longer_than_the_model_reads():
    with pytest.raises(OptionError, match="shorten it"):
        new_chat().say("x" * 300)
