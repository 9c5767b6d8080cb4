"""The engine over real (tiny, random) language models of both families."""

import pytest
import torch

from blip2.errors import OptionError
from blip2.generation import Engine, GenerateOptions
from blip2.language import T5, pad_rows

EOS = 0
ENDS = [EOS, 9, 28, 37]

WAYS = {
    "greedy": GenerateOptions(max_new_tokens=12),
    "greedy, all filters": GenerateOptions(
        max_new_tokens=12, min_new_tokens=4, repetition_penalty=1.5, no_repeat_ngram_size=2
    ),
    "beams": GenerateOptions(max_new_tokens=12, num_beams=4),
    "beams, short and several": GenerateOptions(max_new_tokens=12, num_beams=4, num_return=3, length_penalty=-1.0),
    "beams, early": GenerateOptions(max_new_tokens=12, num_beams=3, early_stopping=True, min_new_tokens=2),
    "sampling": GenerateOptions(max_new_tokens=12, sample=True, seed=3),
    "sampling, all filters": GenerateOptions(
        max_new_tokens=12, sample=True, seed=4, temperature=1.3, top_k=12, top_p=0.9, num_return=3
    ),
}


@pytest.fixture
def engine(language):
    # Several of forty tokens end an answer, so that rows end at different times.
    return Engine(language, eos_token_ids=ENDS, suppress_token_ids=[39])


def logits_of_whole_text(language, prompt, tokens):
    """Without any cache: the logits after each part of the text, ``float[1 + T, V]``."""
    with torch.inference_mode():
        tokens_1T = torch.tensor([tokens], dtype=torch.long)
        if isinstance(language, T5):
            start_11 = torch.tensor([[language.config.decoder_start_token_id]])
            hidden = language(prompt[None], torch.tensor([len(prompt)]), torch.cat([start_11, tokens_1T], dim=1))
            return language.logits(hidden)[0]
        hidden = language(torch.cat([prompt[None], language.embed(tokens_1T)], dim=1))
        return language.logits(hidden)[0, len(prompt) - 1 :]


@pytest.mark.parametrize("way", WAYS)
def test_alone_or_in_company_the_same_answer(engine, prompts, way):
    together = engine.generate(prompts, WAYS[way])
    assert len({len(answers[0].tokens) for answers in together}) > 1, "rows should end at different times"
    for prompt, answers in zip(prompts, together, strict=True):
        (alone,) = engine.generate([prompt], WAYS[way])
        assert [answer.tokens for answer in alone] == [answer.tokens for answer in answers]
        assert [answer.finish_reason for answer in alone] == [answer.finish_reason for answer in answers]
        assert [answer.score for answer in alone] == pytest.approx([answer.score for answer in answers], rel=1e-5)


def test_the_cache_changes_nothing(language, prompts):
    texts = torch.randint(1, 39, (len(prompts), 6), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits_BV, state = language.prefill(*pad_rows(prompts), 6)
        stepped = [logits_BV] + [language.step(token_B, state) for token_B in texts[:, :5].T]
    for row, (prompt, tokens) in enumerate(zip(prompts, texts.tolist(), strict=True)):
        whole = logits_of_whole_text(language, prompt, tokens)[:6]
        torch.testing.assert_close(torch.stack([step[row] for step in stepped]), whole, atol=1e-4, rtol=0)


def test_selected_rows_go_on_as_they_were(language, prompts):
    texts = torch.randint(1, 39, (len(prompts), 6), generator=torch.Generator().manual_seed(1))
    rows = torch.tensor([6, 1, 1, 4])
    with torch.inference_mode():
        _, state = language.prefill(*pad_rows(prompts), 6)
        language.step(texts[:, 0], state)
        state.select(rows)
        logits_BV = language.step(texts[rows, 1], state)
    for row, logits in zip(rows.tolist(), logits_BV, strict=True):
        whole = logits_of_whole_text(language, prompts[row], texts[row, :2].tolist())
        torch.testing.assert_close(logits, whole[-1], atol=1e-4, rtol=0)


def test_greedy_takes_the_most_likely_token_of_the_whole_text(engine, language, prompts):
    for prompt, (answer,) in zip(prompts, engine.generate(prompts, WAYS["greedy"]), strict=True):
        tokens = []
        while len(tokens) < 12:
            logits = logits_of_whole_text(language, prompt, tokens)[-1].clone()
            logits[39] = float("-inf")
            tokens.append(int(logits.argmax()))
            if tokens[-1] in ENDS:
                break
        expected = tokens[:-1] if tokens[-1] in ENDS else tokens
        assert answer.tokens == expected
        assert answer.finish_reason == ("eos" if expected != tokens else "length")


def test_score_is_the_log_probability_of_the_whole_text(engine, language, prompts):
    generator = torch.Generator().manual_seed(2)
    answers = [torch.randint(0, 39, (length,), generator=generator).tolist() for length in (4, 1, 7, 0, 2, 4, 3, 1)]
    scores = engine.score(prompts, answers)
    for prompt, answer, score in zip(prompts, answers, scores, strict=True):
        log_probs = logits_of_whole_text(language, prompt, answer).log_softmax(-1)
        expected = sum(log_probs[place, token].item() for place, token in enumerate(answer))
        assert score == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("way", ["greedy", "greedy, all filters", "sampling, all filters"])
def test_a_row_scores_what_the_model_gives_it(engine, language, prompts, way):
    engine = Engine(language, eos_token_ids=[EOS])  # one end token, so that it is known which one was written
    for prompt, answers in zip(prompts, engine.generate(prompts, WAYS[way]), strict=True):
        whole = [answer.tokens + [EOS] * (answer.finish_reason == "eos") for answer in answers]
        scores = engine.score([prompt] * len(whole), whole)
        assert [answer.score for answer in answers] == pytest.approx(scores, abs=1e-4)


def test_beams_score_by_length(language, prompts):
    engine = Engine(language, eos_token_ids=[EOS])
    for penalty in (-1.0, 0.0, 1.0):
        options = GenerateOptions(max_new_tokens=8, num_beams=4, num_return=4, length_penalty=penalty)
        for prompt, answers in zip(prompts, engine.generate(prompts, options), strict=True):
            whole = [answer.tokens + [EOS] * (answer.finish_reason == "eos") for answer in answers]
            totals = engine.score([prompt] * len(whole), whole)
            expected = [total / len(tokens) ** penalty for total, tokens in zip(totals, whole, strict=True)]
            assert [answer.score for answer in answers] == pytest.approx(expected, abs=1e-3)
            assert expected == sorted(expected, reverse=True)


def test_a_text_longer_than_the_model_reads_is_refused(engine, language, prompts):
    if not isinstance(language, T5):  # whose positions have no end
        engine.generate(prompts[:1], GenerateOptions(max_new_tokens=61))
        with pytest.raises(OptionError, match="a prompt of 3 tokens with 62 new ones"):
            engine.generate(prompts[:1], GenerateOptions(max_new_tokens=62))
