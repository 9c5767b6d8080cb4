"""Answers as they are: questions drawn by a seed, about scenes with pairs of kinds that no training saw.

    python -m miniature.answers --model FOLDER [--against NAME=FOLDER ...] [--count 20] [--seed 0]

Every other question is one of the world's own (`miniature.texts`); those between are of `FREE`, which are like nothing
in the training texts, and for which nothing here knows the right answer. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse

import blip2
from miniature import texts, world

SEED = 95_000_000  # scenes of no training, and not those of evaluate.py
FREE = (
    "describe the picture in one sentence.", "are there more animals or more vehicles?", "which animals do you see?",
    "is there anything to eat?", "what could a person ride on here?", "how many things are there in all?",
    "what is the largest thing in the picture?", "is it day or night?", "what is the capital of France?",
    "why is the sky blue?", "name something that is not in the picture.", "is this a photograph or a drawing?",
    "can any of these things fly?", "what sound does it make?", "tell me a short story about the picture.",
    "which of these are alive?", "how many legs do you see?", "what is behind everything?",
    "does anything here have wheels?", "what would a child like most in it?",
)  # fmt: skip


def drawn(count: int, seed: int) -> list[tuple[world.Scene, texts.Question]]:
    """Scenes, each with one question; the same for the same seed. A free question has no answer: ""."""
    rng = world.make_rng(seed, "answers")
    free = rng.sample(FREE, len(FREE))
    pairs = []
    for number in range(count):
        scene = world.make_scene(SEED + seed * 10_000 + number, "test")
        if number % 2:
            question = texts.Question("free", free[number // 2 % len(free)], "")
        else:
            question = rng.choice(texts.questions(scene, rng))
        pairs.append((scene, question))
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a generative checkpoint; the bundled miniature if not given")
    parser.add_argument("--against", nargs="*", default=[], metavar="NAME=FOLDER", help="others, in columns beside it")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    pairs = drawn(options.count, options.seed)
    columns = {}
    for name, folder in [("answer", options.model), *(pair.split("=", 1) for pair in options.against)]:
        pipeline = blip2.load(folder)
        encoded = pipeline.encode([world.render(scene) for scene, _ in pairs])
        columns[name] = pipeline.ask(encoded, [question.question for _, question in pairs], max_new_tokens=30)
    print(f"| picture | question | right | {' | '.join(columns)} |")
    print("|---|---|---|" + "---|" * len(columns))
    for number, (scene, question) in enumerate(pairs):
        shown = f"{texts.plain_caption(scene, world.make_rng(number))}, on {scene.background}"
        said = " | ".join(answers[number].replace("|", "\\|").replace("\n", " ") for answers in columns.values())
        print(f"| {shown} | {question.question} | {question.answer} | {said} |")


if __name__ == "__main__":
    main()
