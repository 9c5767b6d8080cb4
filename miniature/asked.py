"""How well models answer the world's questions, by type: of the miniature and of what became of it by fine-tuning.

    python -m miniature.asked --count 500 miniature tuned=miniature/work/tuned ...

The scenes are those of `miniature.evaluate`, of pairs that no training saw, one question of each type about each. A
model whose Q-Former reads the prompt is asked in the words of the others, with which it was tuned.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

import blip2
from blip2.api import Pipeline
from blip2.tasks.defaults import ASK
from blip2.text import question_prompt
from miniature import texts, world
from miniature.evaluate import SEED, Tally, is_right, wilson


def asked(pipeline: Pipeline, count: int) -> Tally:
    """Ask about ``count`` scenes."""
    scenes = [world.make_scene(SEED + index, "test") for index in range(count)]
    encoded = pipeline.encode([world.render(scene) for scene in scenes], batch_size=32)
    questions = []
    for index, scene in enumerate(scenes):
        rng = world.make_rng(SEED, index, "evaluation")
        drawn = [texts.ask(scene, rng, kind) for kind in texts.QUESTION_TYPES]
        questions += [(index, question) for question in drawn if question is not None]
    config = pipeline.speaker.model.config
    manner = config.language.family if config.reads_prompt else "instruct"  # elsewhere it is put so anyway
    words = [question_prompt(each.question, manner) for _, each in questions]
    # An InstructBLIP's own settings punish repetition, which "two dogs and two cats" is.
    options = asdict(ASK)
    answers = pipeline.ask([encoded[index] for index, _ in questions], words, batch_size=128, **options)
    tally = Tally()
    for (_, question), said in zip(questions, answers, strict=True):
        tally.add(question.type, is_right(question.type, said, question.answer))
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER", help="generative checkpoints")
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=FOLDER", help="of the miniature")
    parser.add_argument("--count", type=int, default=500)
    options = parser.parse_args()
    columns = {}
    for each in options.models:
        name, _, folder = each.rpartition("=")
        columns[name or folder] = asked(blip2.load(folder), options.count)
    for each in options.adapter:
        name, _, folder = each.rpartition("=")
        columns[name or folder] = asked(blip2.load("miniature", adapter=folder), options.count)
    print(f"| type | asked | {' | '.join(columns)} |\n|---|---:|{'---:|' * len(columns)}")
    for kind in texts.QUESTION_TYPES:
        shares = [f"{tally.percent(kind):.1f}" for tally in columns.values()]
        print(f"| {kind} | {next(iter(columns.values())).asked[kind]} | {' | '.join(shares)} |")
    told = []
    for tally in columns.values():
        right, number = tally.right.total(), tally.asked.total()
        low, high = wilson(right, number)
        told.append(f"{100 * right / number:.1f} ({low:.1f} to {high:.1f})")
    print(f"| all | {number} | {' | '.join(told)} |")


if __name__ == "__main__":
    main()
