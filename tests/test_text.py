"""Ids in the layout that each model expects, prompts to the letter, text as it is written."""

import copy
import json
import pickle
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blip2.errors import CheckpointError, OptionError
from blip2.text import TextStream, Tokenizer, chat_prompt, clean, question_prompt
from tests import tiny

OPT, T5, WORD_PIECE = (Tokenizer(make()) for make in (tiny.opt_tokenizer, tiny.t5_tokenizer, tiny.matching_tokenizer))
OPT_CONFIG, T5_CONFIG = tiny.language_config("opt"), tiny.language_config("t5")


# ---- ids ----------------------------------------------------------------------------------------------


def test_opt_prompts_start_with_bos():
    assert OPT.prompt_ids("", OPT_CONFIG) == [2]
    assert OPT.prompt_ids("two dogs", OPT_CONFIG) == [2, *OPT.encode("two dogs")]
    assert OPT.decode(OPT.prompt_ids("two dogs", OPT_CONFIG)) == "two dogs"


def test_t5_prompts_end_with_eos():
    assert T5.prompt_ids("", T5_CONFIG) == [1]
    assert T5.prompt_ids("two dogs", T5_CONFIG) == [*T5.encode("two dogs"), 1]


def test_an_answer_continues_its_prompt():
    prompt = question_prompt("how many?", "opt")
    whole = OPT.prompt_ids(f"{prompt} two", OPT_CONFIG)
    assert OPT.prompt_ids(prompt, OPT_CONFIG) + OPT.answer_ids("two", OPT_CONFIG) == [*whole, OPT_CONFIG.eos_token_id]
    assert T5.answer_ids("two", T5_CONFIG) == [*T5.encode("two"), 1]


@pytest.mark.parametrize("tokenizer", [OPT, T5], ids=["bytes", "SentencePiece"])
def test_an_answer_of_any_decoder_continues_its_prompt(tokenizer):
    """Llama 3 has bytes and Llama 2 SentencePiece, which begins every text with a space of its own."""
    config = tiny.language_config("llama")
    prompt = question_prompt("how many?", config.family)
    whole = tokenizer.prompt_ids(f"{prompt} two", config)
    assert tokenizer.prompt_ids(prompt, config) + tokenizer.answer_ids("two", config) == [*whole, config.eos_token_id]
    assert tokenizer.prompt_ids("", config) == [config.bos_token_id]


def test_the_end_of_an_opt_answer_is_a_newline():
    assert OPT.encode("\n") == [OPT_CONFIG.eos_token_id]


@pytest.mark.parametrize("tokenizer", [OPT, T5, WORD_PIECE], ids=["opt", "t5", "word piece"])
@pytest.mark.parametrize("word", ["</s>", "<image>", "<pad>", "[SEP]", "[DEC]"])
def test_a_special_token_in_a_text_is_only_text(tokenizer, word):
    special = tokenizer._tokenizer.token_to_id(word)
    assert special is None or special not in tokenizer.encode(f"what is {word} there?")


def test_padding_and_truncation_of_the_file_are_not_used():
    made = tiny.opt_tokenizer()
    made.enable_truncation(4)
    made.enable_padding(length=64)
    text = "Question: what colour is the car? Answer:"
    assert Tokenizer(made).encode(text) == OPT.encode(text)


def test_matching_ids():
    start, end = WORD_PIECE.token_id("[CLS]"), WORD_PIECE.token_id("[SEP]")
    words = WORD_PIECE.encode("a red car")
    assert WORD_PIECE.matching_ids("a red car", 32) == [start, *words, end]
    assert WORD_PIECE.matching_ids("a red car", len(words) + 2) == [start, *words, end]
    with pytest.raises(OptionError, match=r"'a red car' has \d+ tokens, but at most \d+ are read; shorten it"):
        WORD_PIECE.matching_ids("a red car", len(words) + 1)
    assert WORD_PIECE.matching_ids("a red car", 4, truncate=True) == [start, *words[:2], end]


def test_matching_needs_its_special_tokens():
    with pytest.raises(CheckpointError, match=r"no token \[CLS\]"):
        OPT.matching_ids("a red car", 32)


@pytest.mark.parametrize("family", ["opt", "t5"])
def test_tokens_that_the_model_has_not(family):
    tokenizer, config = (OPT, OPT_CONFIG) if family == "opt" else (T5, T5_CONFIG)
    small = replace(config, vocab_size=20)
    with pytest.raises(CheckpointError, match="the model has only 20"):
        tokenizer.prompt_ids("two dogs", small)
    with pytest.raises(CheckpointError, match="belong to different models"):
        tokenizer.answer_ids("two dogs", small)


def test_no_tokenizer(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: no such file"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"\xff\xfe", b"null", json.dumps({"version": "1.0", "model": {"type": "Unheard"}}).encode()],
)
def test_broken_tokenizer(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json") as caught:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_saved_and_read(tmp_path):
    tiny.opt_tokenizer().save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_folder(tmp_path).encode("two dogs") == OPT.encode("two dogs")
    path = tmp_path / "tokenizer.json"
    path.write_bytes(path.read_text("utf-8").encode("utf-8-sig"))  # saved again by an editor
    assert Tokenizer.from_folder(tmp_path).encode("two dogs") == OPT.encode("two dogs")


# ---- streams ------------------------------------------------------------------------------------------


def pieces_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.push(token) for token in ids), stream.finish()]


@pytest.mark.parametrize("tokenizer", [OPT, T5], ids=["opt", "t5"])
@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_pieces_joined_are_the_text(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, 199), max_size=12))
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("text", ["two dogs and a red car", "naïve café — 🐕🚗 日本", "👩‍🚀 is on the left"])
def test_characters_are_whole(text):
    pieces = pieces_of(OPT, OPT.encode(text))
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert not any(piece.endswith(" ") for piece in pieces)  # a space comes with its word


def test_words_come_one_by_one():
    assert [piece for piece in pieces_of(T5, T5.encode("two dogs")) if piece] == ["two", " dogs"]


# ---- prompts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "prompt"),
    [("opt", "Question: is it {red}? Answer:"), ("t5", "Question: is it {red}? Short answer:")],
)
def test_question_prompt(family, prompt):
    assert question_prompt("  is it\n {red}? ", family) == prompt


def test_chat_prompt():
    assert chat_prompt([], "q1?") == "Question: q1? Answer:"
    assert chat_prompt([("q1?", "a1")], "q2?") == "Question: q1? Answer: a1. Question: q2? Answer:"
    turns = [("q1?", "a1."), (" q2? ", "a\n2")]
    expected = "Question: q1? Answer: a1. Question: q2? Answer: a 2. Question: q3? Answer:"
    assert chat_prompt(turns, "q3?") == expected


@pytest.mark.parametrize("question", ["", "   ", "\n\t"])
def test_empty_question(question):
    for ask in (lambda: question_prompt(question, "opt"), lambda: chat_prompt([("q?", "a")], question)):
        with pytest.raises(OptionError, match=r"empty; write one, such as"):
            ask()


@pytest.mark.parametrize("what", [None, 3, b"how many?", ["how many?"]])
def test_what_is_no_text(what):
    """As when an image and a question stand the other way round."""
    for ask in (lambda: question_prompt(what, "opt"), lambda: chat_prompt([("q?", "a")], what), lambda: clean(what)):
        with pytest.raises(OptionError, match=rf"is not a text \(type {type(what).__name__}\)"):
            ask()


def test_a_copy_reads_as_the_first(opt_model):
    tokenizer = Tokenizer.from_folder(opt_model)
    for again in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        assert again.encode("a </s> dog") == tokenizer.encode("a </s> dog")
    assert 2 not in tokenizer.encode("a </s> dog") and 2 in tokenizer.reading_tokens().encode("a </s> dog")


def test_the_template_twice():
    with pytest.raises(OptionError, match="give the question alone"):
        question_prompt("Question: how many? Answer:", "opt")
    with pytest.raises(OptionError, match="give the question alone"):
        question_prompt("question: how many? short answer:", "t5")
    assert question_prompt("Question: or answer?", "opt") == "Question: Question: or answer? Answer:"


@pytest.mark.parametrize("text", ["\ud800", "two \udcff dogs"])
def test_half_a_character_is_refused_and_named(text):
    from tests import tiny

    with pytest.raises(OptionError, match="unpaired surrogates"):
        Tokenizer(tiny.opt_tokenizer()).encode(text)
