"""BLEU, ROUGE-L and CIDEr-D: the official program's numbers."""

from __future__ import annotations

import random

import pytest

from blip2.scores import bleu, cider, rouge_l

REFERENCES = [
    ["two cats laying on a couch", "two cats sleeping on a pink blanket"],
    ["a man riding a horse", "a person on a horse"],
    ["a red bus on the street", "a bus"],
]
CAPTIONS = ["two cats lying on a couch", "a man on a horse", "a red bus"]


def split(texts):
    return [[text.split() for text in own] if isinstance(own, list) else own.split() for own in texts]


def test_the_numbers_of_pycocoevalcap() -> None:
    captions, references = split(CAPTIONS), split(REFERENCES)
    assert bleu(captions, references) == pytest.approx([0.92857, 0.82178, 0.63268, 8.436e-05], rel=1e-4)
    assert rouge_l(captions, references) == pytest.approx([0.8333, 0.8, 1.0], abs=1e-4)
    found = cider(captions, references)
    assert found == pytest.approx([2.75077784, 3.22098921, 2.90095223], abs=1e-8)
    assert sum(found) / 3 == pytest.approx(2.957573, abs=1e-6)


def test_of_one_picture_every_ngram_is_common() -> None:
    assert cider([["a", "dog"]], [[["a", "dog"]]]) == [0.0]


def test_an_empty_caption_scores_nothing() -> None:
    references = split(REFERENCES)
    assert cider([[], [], []], references) == [0, 0, 0]
    assert rouge_l([[], [], []], references) == [0, 0, 0]
    assert max(bleu([[], [], []], references)) < 1e-6


def test_other_numbers_of_captions_and_references_are_an_error() -> None:
    for score in (bleu, cider, rouge_l):
        with pytest.raises(ValueError):
            score([["a"]], [])


@pytest.mark.slow
def test_five_thousand_pictures_beside_the_program_itself() -> None:
    """Needs ``pip install --no-deps pycocoevalcap``."""
    official = pytest.importorskip("pycocoevalcap.cider.cider")
    official_bleu = pytest.importorskip("pycocoevalcap.bleu.bleu")
    official_rouge = pytest.importorskip("pycocoevalcap.rouge.rouge")
    chance = random.Random(0)
    words = [f"w{number}" for number in range(300)] + ["a", "the", "of", "on"] * 30

    def changed(text):
        text = list(text)
        for _ in range(chance.randint(0, 4)):
            place = chance.randrange(len(text))
            way = chance.random()
            if way < 0.4:
                text[place] = chance.choice(words)
            elif way < 0.7 and len(text) > 1:
                del text[place]
            else:
                text.insert(place, chance.choice(words))
        return text

    references, captions = [], []
    for _ in range(5000):
        said = [chance.choice(words) for _ in range(chance.randint(1, 16))]
        references.append([changed(said) for _ in range(5)])
        captions.append(changed(said) if chance.random() > 0.02 else [])
    theirs = {place: [" ".join(text) for text in own] for place, own in enumerate(references)}
    ours = {place: [" ".join(text)] for place, text in enumerate(captions)}
    expected = official_bleu.Bleu(4).compute_score(theirs, ours, verbose=0)[0]
    assert bleu(captions, references) == pytest.approx(expected, abs=1e-9)
    _, each = official.Cider().compute_score(theirs, ours)
    assert cider(captions, references) == pytest.approx(list(each), abs=1e-9)
    _, each = official_rouge.Rouge().compute_score(theirs, ours)
    assert rouge_l(captions, references) == pytest.approx(list(each), abs=1e-9)
