"""The accuracy of answers to questions about images: VQAv2's, and its variants in other programs.

Ten people answered each question. An answer scores one third for each of them who gave it, up to 1. Before comparison,
punctuation and articles are removed and numbers become digits, by rules that are part of the score.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

# From the official program (GT-Vision-Lab/VQA, BSD-2), one word each: "_" marks a missing apostrophe.
CONTRACTIONS = """
    ain_t aren_t can_t could_ve couldn_t couldn't_ve couldn_t've didn_t doesn_t don_t hadn_t hadn_t've hadn't_ve hasn_t
    haven_t he_d he_d've he'd_ve he_s how_d how_ll how_s I_d've I'd_ve I_m I_ve isn_t it_d it_d've it'd_ve it_ll ma_am
    mightn_t mightn_t've mightn't_ve might_ve mustn_t must_ve needn_t not_ve o_clock oughtn_t _ow's'at 'ow_s'at
    'ow's_at shan_t she_d've she'd_ve should_ve shouldn_t shouldn_t've shouldn't_ve somebody_d've somebody'd_ve
    somebody_ll somebody_s someone_d someone_d've someone'd_ve someone_ll someone_s something_d something_d've
    something'd_ve something_ll that_s there_d there_d've there'd_ve there_re there_s they_d they_d've they'd_ve they_ll
    they_re they_ve _twas wasn_t we_d've we'd_ve we_ve weren_t what_ll what_re what_s what_ve when_s where_d where_s
    where_ve who_d who_d've who'd_ve who_ll who_s who_ve why_ll why_re why_s won_t would_ve wouldn_t wouldn_t've
    wouldn't_ve y_all y_all'll y'all_ll y_all'd've y'all_d've y'all'd_ve you_d you_d've you'd_ve you_ll you_re you_ve
"""
WITH_APOSTROPHE = {word.replace("_", ""): word.replace("_", "'") for word in CONTRACTIONS.split()}
WITH_APOSTROPHE["somebody'd"] = "somebodyd"  # an error of the official program, which is part of the score
DIGITS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
    "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ";/[]\"{}()=+\\_-><@`,?!"
COMMA_OF_A_NUMBER = re.compile(r"\d,\d")
PERIOD = re.compile(r"(?!<=\d)\.(?!\d)")  # the lookbehind is misspelt there; this is its effect
MOST_PERIODS = 32
"""Number of periods that are removed: the official program passes a flag as this argument."""
REMEMBERED = 2**16
"""Cached texts: the same few answers are given again and again."""


@lru_cache(REMEMBERED)
def without_punctuation(text: str) -> str:
    """processPunctuation of the official program."""
    out = text
    has_number = COMMA_OF_A_NUMBER.search(text) is not None
    for sign in PUNCTUATION:
        goes = f"{sign} " in text or f" {sign}" in text or has_number
        out = out.replace(sign, "" if goes else " ")
    return PERIOD.sub("", out, count=MOST_PERIODS)


def plain_words(text: str) -> str:
    """Lower case, digits, no articles, missing apostrophes added (processDigitArticle)."""
    words = (DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(WITH_APOSTROPHE.get(word, word) for word in words if word not in ARTICLES)


@lru_cache(REMEMBERED)
def normalised(text: str) -> str:
    return plain_words(without_punctuation(text))


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _official(answer: str, given: Sequence[str]) -> float:
    """GT-Vision-Lab/VQA since March 2021: nothing is normalised if all ten people agree."""
    answer, given = _one_line(answer), [_one_line(text) for text in given]
    if len(set(given)) > 1:
        answer, given = normalised(answer), [normalised(text) for text in given]
    return _leaving_one_out(answer, given)


def _lavis(answer: str, given: Sequence[str]) -> float:
    """LAVIS, BLIP and the earlier official program: the answer is normalised fully, those of people only by
    punctuation."""
    answer, given = normalised(_one_line(answer)), [_one_line(text) for text in given]
    if len(set(given)) > 1:
        given = [without_punctuation(text) for text in given]
    return _leaving_one_out(answer, given)


def _always(answer: str, given: Sequence[str]) -> float:
    """lmms-eval: everything is normalised."""
    return _leaving_one_out(normalised(_one_line(answer)), [normalised(_one_line(text)) for text in given])


def _of_all_ten(answer: str, given: Sequence[str]) -> float:
    """big_vision (PaliGemma): a third for each of all ten, without leaving one out."""
    answer, given = normalised(_one_line(answer)), [normalised(_one_line(text)) for text in given]
    return min(1.0, sum(text == answer for text in given) / 3)


def _as_given(answer: str, given: Sequence[str]) -> float:
    """A-OKVQA: as `_of_all_ten`, but by exact match."""
    return min(1.0, sum(text == answer for text in given) / 3)


def _leaving_one_out(answer: str, given: Sequence[str]) -> float:
    """The mean of the leave-one-out scores over the people: an answer given by only one person scores 0 for that
    one."""
    same = sum(text == answer for text in given)
    others, own = min(1.0, same / 3), min(1.0, (same - 1) / 3)
    return ((len(given) - same) * others + same * own) / len(given)


VQA_RULES: Mapping[str, Callable[[str, Sequence[str]], float]] = {
    "official": _official, "lavis": _lavis, "lmms-eval": _always, "all-ten": _of_all_ten, "aokvqa": _as_given,
}  # fmt: skip
"""Rules that are used as VQA accuracy, by the program that uses them."""


def vqa_accuracy(answer: str, given: Sequence[str], rule: str = "official") -> float:
    """The accuracy of one answer, 0 to 1. ``given``: people's answers, usually ten. Raises ValueError for none."""
    if not given:
        raise ValueError("there are no reference answers")
    return VQA_RULES[rule](answer, given)
