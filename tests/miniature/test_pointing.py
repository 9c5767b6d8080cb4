"""Maps of the bundled models point at what they are asked about; miniature/README.md has the measured figures."""

from __future__ import annotations

import pytest

import blip2
from miniature import pointing, world

NUM_SCENES = 25

needs_font = pytest.mark.skipif(not world.FONT_PATH.exists(), reason="the pictures need fonts-noto-color-emoji")


@needs_font
@pytest.mark.parametrize(
    ("way", "least"),
    [('matcher, "two dogs" (the right count)', 90), ('"how many dogs are there?", the answer', 85)],
)
def test_maps_point_at_what_is_asked_about(way, least):
    explain = pointing.ways(blip2.load("miniature-itm"), blip2.load())[way]
    tally = pointing.play(explain, NUM_SCENES, seed=60_000_000)
    assert tally.percent("hit") > least
    assert tally.percent("other kind") < 15
    assert tally.percent("centre") < 30


def test_a_point_is_judged_by_the_boxes():
    things = (world.Object("dog", (0, 0, 10, 20), 0, False), world.Object("cat", (50, 50, 60, 60), 0, False))
    scene = world.Scene(100, 80, "white", "plain", ((255,) * 3,) * 2, 1, things)
    assert pointing.points_at(scene, (9, 19), "dog") and not pointing.points_at(scene, (10, 0), "dog")
    assert pointing.points_at(scene, (50, 59), "cat") and not pointing.points_at(scene, (5, 5), "cat")
    assert not pointing.points_at(scene, None, "dog")
    assert pointing.covered(scene, "dog") == pytest.approx(200 / 8000)
