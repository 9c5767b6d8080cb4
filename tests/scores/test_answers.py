"""VQA accuracy, beside the rules of the official program written out step by step."""

from __future__ import annotations

import random
import re
import time

import pytest

from blip2.scores import VQA_RULES, vqa_accuracy
from blip2.scores.answers import DIGITS, WITH_APOSTROPHE, normalised

SIGNS = [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!"]


def step_by_step(answer: str, given: list[str]) -> float:
    """The official program's evaluate(), a step a line, with its two slips."""

    def punctuation(text):
        out = text
        for sign in SIGNS:
            if (sign + " " in text or " " + sign in text) or re.search(r"(\d)(,)(\d)", text) is not None:
                out = out.replace(sign, "")
            else:
                out = out.replace(sign, " ")
        return re.compile(r"(?!<=\d)(\.)(?!\d)").sub("", out, 32)

    def digits_and_articles(text):
        words = []
        for word in text.lower().split():
            word = DIGITS.setdefault(word, word)
            if word not in ["a", "an", "the"]:
                words.append(word)
        for place, word in enumerate(words):
            if word in WITH_APOSTROPHE:
                words[place] = WITH_APOSTROPHE[word]
        return " ".join(words)

    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    given = [text.replace("\n", " ").replace("\t", " ").strip() for text in given]
    people = [{"answer": text, "id": place} for place, text in enumerate(given)]
    if len({each["answer"] for each in people}) > 1:
        for each in people:
            each["answer"] = digits_and_articles(punctuation(each["answer"]))
        answer = digits_and_articles(punctuation(answer))
    verdicts = []
    for one in people:
        others = [other for other in people if other != one]
        verdicts.append(min(1, float(len([other for other in others if other["answer"] == answer])) / 3))
    return float(sum(verdicts)) / len(verdicts)


ODD = [
    "Yes", "yes.", "a dog", "the dog", "dog", "dogs", "two", "2", "none", "0", "zero", "ten", "10", "1,000", "1000",
    "1, 000", "dont know", "don't know", "dont", "can't", "cant", "somebody'd", "somebodyd", "youre", "you're", "a",
    "an", "the", "", " ", ".", "...", "3.5", "3.", ".5", "3 .5", "black/white", "black / white", "black and white",
    "t-shirt", "t shirt", "tshirt", "it's", "its", "U.S.", "us", "U.S.A", "50%", "$5", "#1", "(left)", "left",
    "left ", "left\n", "on\tleft", "what?", "what ?", "no!", "no !", "red, white", "red,white", "red white",
    "one dog", "1 dog", "a 2nd", "2nd", "A", "THE CAT", "Oclock", "o'clock", "oclock", "5 oclock", "y'allll",
    "hed've", "Id've", "I'd've", "_x_", "a_b", "x=y", "x = y", "<b>", "caf\u00e9", "\u65e5\u672c", "dog;cat",
    "dog; cat", "[dog]", "dog\\cat", "`dog`", '"dog"', "dog@cat", "a.b.c", "www.a.com", "1.2.3", "4:30", "4-5",
    "4 - 5", "-5", "+5", "3,4,5", "3,4 apples", "a,the", "nine", "nine lives",
]  # fmt: skip


def answers_of(chance: random.Random) -> tuple[str, list[str]]:
    some = chance.sample(ODD, chance.randint(1, 4))
    given = [chance.choice(some) for _ in range(10)]
    return chance.choice([*some, chance.choice(ODD)]), given


def test_the_official_rules_for_many_odd_answers() -> None:
    chance = random.Random(0)
    cases = [answers_of(chance) for _ in range(20_000)]
    assert len({answer for answer, _ in cases}) > 90
    for answer, given in cases:
        assert vqa_accuracy(answer, given) == pytest.approx(step_by_step(answer, given), abs=1e-12), (answer, given)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Two dogs.", "2 dogs"), ("the t-shirt", "t shirt"), ("dont know!", "don't know"), ("1,000", "1000"), ("a", "")],
)
def test_what_is_left_of_an_answer(text: str, expected: str) -> None:
    assert normalised(text) == expected


def test_where_all_agree_the_official_program_compares_letter_by_letter() -> None:
    assert vqa_accuracy("Yes", ["yes"] * 10) == 0
    assert vqa_accuracy("Yes", ["yes"] * 10, "lmms-eval") == 1
    assert vqa_accuracy("Yes", ["yes"] * 10, "lavis") == 1
    assert vqa_accuracy("Yes", ["yes"] * 9 + ["no"]) == pytest.approx(1)


def test_who_leaves_nobody_out_finds_more_right() -> None:
    given = ["yes"] * 3 + ["no"] * 7
    assert vqa_accuracy("yes", given) == pytest.approx(0.9)
    assert vqa_accuracy("yes", given, "all-ten") == 1


def test_nobody_to_compare_with_is_an_error() -> None:
    for rule in VQA_RULES:
        with pytest.raises(ValueError):
            vqa_accuracy("yes", [], rule)


@pytest.mark.slow
def test_two_hundred_thousand_answers() -> None:
    chance = random.Random(1)
    cases = [answers_of(chance) for _ in range(200_000)]
    started = time.perf_counter()
    mean = sum(vqa_accuracy(answer, given) for answer, given in cases) / len(cases)
    print(f"\n200,000 answers in {time.perf_counter() - started:.1f} s, mean {mean:.3f}")
    assert 0 < mean < 1
