"""What models make of records does not hang on how many are seen at a time."""

from pathlib import Path

import pytest
from PIL import Image

import blip2
from blip2.api.work import by_match, matches
from blip2.collection.record import Record
from blip2.collection.run import Outcome

EXAMPLES = Path(__file__).parents[2] / "examples"
TEXTS = ["a car", "two dogs and a boat", "four cats, two dogs and a flower", "two cats", "a boat and two dogs"] * 4


@pytest.fixture(scope="module")
def matcher():
    return blip2.load("miniature-itm")


@pytest.fixture
def records(tmp_path):
    """The bundled images, each turned a little several times."""
    found = []
    for name in ("cats", "flowers", "picture"):
        for turn in range(6):
            path = tmp_path / f"{name}{turn}.png"
            Image.open(EXAMPLES / f"{name}.png").convert("RGB").rotate(7 * turn).save(path)
            found.append(Record(path.name, str(path), str(path), ""))
    return found


@pytest.fixture
def read(matcher, monkeypatch):
    """How many texts of which length were read together with an image, each time."""
    shapes, match = [], matcher.model.match

    def noted(patches_BPD, text_BT, mask_BT):
        shapes.append(tuple(text_BT.shape))
        return match(patches_BPD, text_BT, mask_BT)

    monkeypatch.setattr(matcher.model, "match", noted)
    return shapes


def test_matches_are_the_same_in_any_batch(matcher, records, read):
    found = {}
    for batch_size in (1, 4, 16):
        read.clear()
        found[batch_size] = [*matches(matcher, TEXTS, "{}", len(TEXTS), len(TEXTS), batch_size)(iter(records))]
        assert [number for number, _ in read] == [16, 4] * len(records) and len({*read}) == 2
    assert found[1] == found[4] == found[16]
    scores = [score for outcome in found[1] for score in outcome.scores]
    assert scores == [round(score, 4) for score in scores] and len({*scores}) >= 8
    assert found[1][0].captions[0] == TEXTS[2]


def test_captions_that_fit_alike_stay_in_their_order(matcher):
    features = matcher.encode(str(EXAMPLES / "cats.png"))
    told = Outcome(["a car", "a  car", "four cats, two dogs and a flower", "a car"], [-1, -2, -3, -4], [1, 2, 3, 4])
    assert by_match(matcher, features, told, "").tokens == [3, 1, 2, 4]
