"""A result never depends on what else is in the batch: 1,000 answers of the bundled miniature, in every precision."""

from __future__ import annotations

import pytest

import blip2
from blip2.tasks.defaults import ASK
from blip2.tasks.speaker import Speaker
from blip2.text import question_prompt
from miniature import texts, world

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not world.FONT_PATH.exists(), reason="the pictures need fonts-noto-color-emoji"),
]
NUM_ANSWERS = 1000


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8", "int4", "vision int8"])
def test_a_batch_of_eight_answers_as_eight_times_one(precision: str) -> None:
    if precision == "vision int8":
        pipeline = blip2.load(vision="int8")
    else:
        pipeline = blip2.load(quantize=precision) if precision.startswith("int") else blip2.load(dtype=precision)
    speaker = pipeline.speaker
    scenes = [world.make_scene(80_000_000 + index, "test") for index in range(NUM_ANSWERS // 5)]
    pictures = [world.render(scene) for scene in scenes]
    together = pipeline.encode(pictures, batch_size=8)
    alone = [pipeline.encode(picture) for picture in pictures]
    asked = []
    for index, scene in enumerate(scenes):
        rng = world.make_rng(80_000_000, index, "company")
        asked += [(index, texts.sample_questions(scene, rng, 5)[number].question) for number in range(5)]
    prompts = [question_prompt(question, "opt") for _, question in asked]
    in_company = [
        best for best, *_ in speaker.answers([together[index] for index, _ in asked], prompts, ASK, batch_size=8)
    ]
    by_itself = [
        speaker.answers([alone[index]], [prompt], ASK)[0][0] for (index, _), prompt in zip(asked, prompts, strict=True)
    ]
    differing = [number for number in range(len(asked)) if in_company[number].tokens != by_itself[number].tokens]
    print(f"\n{precision}: {len(differing)} of {len(asked)} answers differ between a batch of 8 and one alone")
    if precision == "float32":
        assert not differing
        return
    assert len(differing) <= 0.005 * len(asked)
    for number in differing:
        gap = likelihood_gap(speaker, alone[asked[number][0]], prompts[number], by_itself[number], in_company[number])
        print(f"  {asked[number][1]} {by_itself[number].text!r} / {in_company[number].text!r}: gap {gap:.3f}")
        assert gap < 0.1, "not a near-tie"


def likelihood_gap(speaker: Speaker, image, prompt: str, first, second) -> float:
    """How far apart two answers to one prompt are, in log-probability for each token (end included)."""
    language = speaker.model.config.language
    ends = [[*answer.tokens, language.eos_token_id] for answer in (first, second)]
    row = speaker.prompt(image, prompt, 12)
    one, other = speaker.engine.score([row, row], ends)
    return abs(one / len(ends[0]) - other / len(ends[1]))
