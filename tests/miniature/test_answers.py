"""Questions that are drawn to show answers as they are."""

import pytest

from miniature import answers, world


@pytest.mark.skipif(not world.FONT_PATH.exists(), reason="needs fonts-noto-color-emoji")
def test_the_same_seed_draws_the_same_questions_half_of_them_unheard_of():
    pairs = answers.drawn(20, 3)
    assert pairs == answers.drawn(20, 3) != answers.drawn(20, 4)
    free = [question for _, question in pairs if question.type == "free"]
    assert len(free) == 10 and len({question.question for question in free}) == 10
    assert all(scene.counts() for scene, _ in pairs)
