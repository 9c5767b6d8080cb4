"""The words of captions: those of the Java program that the official scores use."""

from __future__ import annotations

import random
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blip2.scores.tokens import DROPPED, tokens

# What the Java program gives (Stanford CoreNLP 3.4.1, as `pycocoevalcap` calls it), recorded.
RECORDED = {
    "A man's dog can't run, doesn't it?": "a man 's dog ca n't run does n't it",
    "I cannot go; I'm gonna wanna gotta lemme gimme 'tis 'twas d'ye": "i can not go i 'm gon na wan na got ta lem me "
    "gim me 't is 't was d'ye",
    "$5.00 50% #1 1/2 3/4 1,000 3.5-foot-tall 20's '90s 10:30 12/25/2010": "$ 5.00 50 % # 1\u00a01/2 3/4 1,000 "
    "3.5-foot-tall 20 's '90s 10:30 12/25/2010",
    "t-shirt black/white and/or (in brackets) [x] {y} <b>": "t-shirt black/white and/or -lrb- in brackets -rrb- "
    "-lsb- x "
    "-rsb- -lcb- y -rcb- <b>",
    "U.S. Mr. Smith St. Louis vs. etc. a.m. p.m. 5 p.m. No. 5 Dr.": "u.s. mr. smith st. louis vs. etc. a.m. "
    "p.m. 5 p.m. "
    "no. 5 dr.",
    "it's 5\" tall, 6' 2\" \"quoted\" 'single' `back`": "it 's 5 tall 6 2 quoted single back",
    "end. ... wait.. what... no\u2014yes \u2013 dash--dash": "end wait what no yes dash dash",
    "R2D2 1st 2nd 1990s 4x4 16:9 7-Eleven B&W AT&T rock'n'roll o'clock": "r2d2 1st 2nd 1990s 4x4 16:9 7-eleven "
    "b&w at&t "
    "rock 'n' roll o'clock",
    "y'all ain't won't they've he'd we'll you're who's dogs' James'": "y' all ai n't wo n't they 've he 'd we 'll you "
    "'re who 's dogs james",
    "100% .5 -5 5-6 5\u20136 \u00a35 \u20ac5 5\u00a2 30\u00b0": "100 % .5 -5 5-6 5 6 # 5 $ 5 5 cents 30 \u00b0",
    "na\u00efve caf\u00e9 \u65e5\u672c \U0001f436 dog\U0001f436cat a*b a_b \\ / | &amp; &": "na\u00efve caf\u00e9 "
    "\u65e5\u672c dog cat a * b a_b \\ / | & &",
    "A. B. C. Inc. approx. Jan. Mon. ft. in. lb.": "a. b. c. inc. approx jan. mon. ft. in lb",
    "can\u2019t \u201cquote\u201d \u2018q\u2019 it\u2019s": "ca n't quote q it 's",
    "J.R.R. Tolkien U.K. Ph.D. half-dozen mother-in-law's what?! !!!": "j.r.r. tolkien u.k. ph.d. half-dozen "
    "mother-in-law 's what ?! !!!",
    "": "",
}


@pytest.mark.parametrize("text", RECORDED)
def test_the_words_that_the_official_program_counts(text: str) -> None:
    assert " ".join(tokens([text])[0]) == RECORDED[text]


def test_how_a_text_ends_may_depend_on_how_the_next_begins() -> None:
    assert tokens(["the letter R.", "The letter S."])[0] == ["the", "letter", "r"]
    assert tokens(["the letter R.", "a letter"])[0] == ["the", "letter", "r."]


@given(st.lists(st.text(max_size=80), max_size=6))
def test_any_texts_have_words_without_spaces_and_as_many_lists(texts: list[str]) -> None:
    found = tokens(texts)
    assert len(found) == len(texts)
    assert all(token and token not in DROPPED and " " not in token for words in found for token in words)


@pytest.mark.slow
def test_made_captions_beside_the_program_itself(tmp_path) -> None:
    """Needs Java and ``pip install --no-deps pycocoevalcap``."""
    tokenizer = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    try:
        subprocess.run(["java", "-version"], capture_output=True, check=True)
    except OSError:
        pytest.skip("no Java here")
    chance = random.Random(0)
    captions = [made_caption(chance) for _ in range(25_000)]
    theirs = tokenizer.PTBTokenizer().tokenize({place: [{"caption": text}] for place, text in enumerate(captions)})
    ours = tokens(captions)
    assert [" ".join(words) for words in ours] == [theirs[place][0] for place in range(len(captions))]


def made_caption(chance: random.Random) -> str:
    """Of the words and the punctuation of people's captions."""
    things = ["dog", "t-shirt", "man's hat", "men's room", "fire hydrant", "skate-boarder", "cell phone", "couch",
              "TV", "stop sign", "boy in a #7 jersey", "double-decker bus", "teddy bear", "kid's toy",
              "3-tier cake"]  # fmt: skip
    numbers = ["a", "two", "3", "several", "an", "The", "some", "a couple of", "10", "1,000", "a half-eaten"]
    places = ["on a street", "in New York", "at St. Mary's church", "next to it", "at 5:30 p.m.", "(in the rain)",
              "that doesn't move", "that isn't his", "under a \"No Parking\" sign", "by the U.S. flag", "at 9 o'clock",
              "with Mr. Smith", "and can't see", "for $5.00", "that says 'STOP'", "near 5th Ave."]  # fmt: skip
    ends = [".", " .", "", "!", "...", ",", " ", "?", ". ", ".."]
    parts = [chance.choice(numbers), chance.choice(things)]
    for _ in range(chance.randint(0, 3)):
        joint = chance.choice([" ", ", ", " and ", "; ", " - "])
        parts[-1] += joint + " ".join([chance.choice(numbers), chance.choice(things), chance.choice(places)])
    text = " ".join([*parts, chance.choice(places)]) + chance.choice(ends)
    return text.capitalize() if chance.random() < 0.5 else text
