"""Asked by an index, the bundled model answers as it does on the images."""

import time

import pytest

import blip2
from miniature import world

pytestmark = pytest.mark.skipif(not world.FONT_PATH.exists(), reason="needs fonts-noto-color-emoji")

QUESTIONS = (
    "is there a dog?", "how many cats are there?", "what is in the picture?", "what color is the background?",
    "how many boats are in the picture?",
)  # fmt: skip


@pytest.mark.parametrize("number", [16, pytest.param(200, marks=pytest.mark.slow)])
def test_answers_from_half_precision_are_those_on_the_pictures(number, tmp_path):
    """Rounding to half precision may turn a near tie; pytest -s prints how many it did turn."""
    blip = blip2.load(dtype="float32")
    photos = tmp_path / "photos"
    photos.mkdir()
    for row in range(number):
        world.render(world.make_scene(77, "test", row)).save(photos / f"{row:03}.png")
    blip2.Index.update(tmp_path / "seen.index", photos, blip)
    index = blip2.Index.open(tmp_path / "seen.index")
    answers, taken = {}, {}
    for name, images in (("pictures", index.paths), ("index", index[:])):
        started = time.perf_counter()
        answers[name] = [text for question in QUESTIONS for text in blip.ask(images, question)]
        taken[name] = time.perf_counter() - started
    turned = sum(one != other for one, other in zip(answers["pictures"], answers["index"], strict=True))
    print(f"{turned} of {number * len(QUESTIONS)} answers differ; pictures {taken['pictures']:.1f} s, "
          f"index {taken['index']:.1f} s")  # fmt: skip
    assert turned <= number * len(QUESTIONS) // 100
