"""Pictures found by their captions: the task is what it says, and the bundled model does it."""

import pytest

import blip2
from miniature import retrieval, texts, world

pytestmark = pytest.mark.skipif(not world.FONT_PATH.exists(), reason="needs fonts-noto-color-emoji")


def test_each_caption_is_true_of_its_scene_alone():
    scenes, captions = retrieval.scenes_with_captions(60)
    facts = [set(texts.read_caption(caption).items()) for caption in captions]
    for at, scene in enumerate(scenes):
        assert facts[at] == set(scene.counts().items())
        assert not any(facts[at] <= set(other.counts().items()) for other in scenes if other is not scene)


def test_the_bundled_model_finds_and_reading_helps():
    """Far from the measured figures (miniature/README.md), so that only a broken model fails."""
    scenes, captions = retrieval.scenes_with_captions(40)
    found = retrieval.recalls(blip2.load("miniature-itm"), scenes, captions, candidates=10)
    right = {name: recall[1] for name, recall in found.items()}
    assert right["text to image, ITC"] >= 80 and right["image to text, ITC"] >= 80
    assert all(right[f"{name}, re-ranked"] >= right[name] - 2.5 for name in retrieval.NAMES.values())
