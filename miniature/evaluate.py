"""How good the miniature is: by type of question, with confidence intervals, on scenes whose pairs it never saw.

    python -m miniature.evaluate --count 1000 [--model FOLDER] [--markdown FILE] [--against FOLDER ...]

Draws the scenes from their seeds, asks about each of them one question of every type that applies, lets it caption
and hold one dialogue (with its own earlier answers in the history, right or wrong), and compares to the letter.
Beside the accuracy stand:

- *shuffled*: the same questions, each asked about another scene's image;
- *blind*: the best guess without an image: the most frequent right answer to the same wording of the same type;
- *familiar*: scenes from the training distribution (new scenes, pairs that were seen in training);
- *other drawings* (``--drawings``): unseen pairs of kinds that are drawn by other emoji than their own.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import blip2
from blip2 import scores
from blip2.api import Pipeline
from blip2.tasks.defaults import ASK
from blip2.text import chat_prompt
from miniature import texts, world

SEED = 90_000_000  # far from all training seeds
GOALS = {  # the project's own goals, %
    "count": 95, "count_absent": 97, "exist": 97, "background": 99, "side": 90, "caption": 85, "followup": 90,
}  # fmt: skip


@dataclass
class Tally:
    """Right and asked, by type."""

    right: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, is_right: bool) -> None:
        self.asked[kind] += 1
        self.right[kind] += is_right

    def percent(self, kind: str) -> float:
        return 100 * self.right[kind] / max(self.asked[kind], 1)

    def interval(self, kind: str) -> tuple[float, float]:
        return wilson(self.right[kind], max(self.asked[kind], 1))


def wilson(right: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % confidence interval of a share, in percent."""
    low, high = scores.wilson(right / total, total)
    return 100 * low, 100 * high


def is_right(kind: str, said: str, wanted: str) -> bool:
    """To the letter; a list of things in any order."""
    return texts.read_caption(said) == texts.read_caption(wanted) if kind in ("list", "where") else said == wanted


def evaluate(pipeline: Pipeline, split: str, count: int, *, shuffle: bool = False, seed: int = SEED) -> Tally:
    """Ask everything about ``count`` scenes of a split; with ``shuffle`` about the image of the scene before."""
    scenes = [world.make_scene(seed + index, split) for index in range(count)]
    pictures = [world.render(scene) for scene in scenes]
    encoded = pipeline.encode(pictures, batch_size=32)
    if shuffle:
        encoded = encoded[-1:] + encoded[:-1]
    tally = Tally()

    for scene, said in zip(scenes, pipeline.caption(encoded, batch_size=64), strict=True):
        tally.add("caption", texts.read_caption(said) == Counter(scene.counts()))

    asked = []
    for index, scene in enumerate(scenes):
        rng = world.make_rng(seed, index, "evaluation")
        drawn = [texts.ask(scene, rng, kind) for kind in texts.QUESTION_TYPES]
        asked += [(index, question) for question in drawn if question is not None]
    answers = pipeline.ask([encoded[index] for index, _ in asked], [q.question for _, q in asked], batch_size=128)
    for (_, question), said in zip(asked, answers, strict=True):
        tally.add(question.type, is_right(question.type, said, question.answer))

    dialogues = []
    for index, scene in enumerate(scenes):
        rng = world.make_rng(seed, index, "dialogue")
        dialogues.append((index, rng.choice(texts.dialogues(scene, rng)), []))
    for turn in range(4):
        live = [dialogue for dialogue in dialogues if len(dialogue[1]) > turn]
        prompts = [chat_prompt(history, turns[turn].question) for _, turns, history in live]
        found = pipeline.speaker.answers([encoded[index] for index, _, _ in live], prompts, ASK, 128) if live else []
        for (_, turns, history), [best, *_] in zip(live, found, strict=True):
            history.append((turns[turn].question, best.text))
            if turns[turn].type == "followup":
                tally.add("followup", best.text == turns[turn].answer)
    return tally


def blind_guess(count: int, seed: int = SEED) -> Tally:
    """The best that can be done without an image: for each wording with the noun left out, the commonest answer."""
    answers: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    nouns = re.compile(r"\b(an?|" + "|".join(sorted(texts.KIND_OF, key=len, reverse=True)) + r")\b")
    captions: Counter[str] = Counter()
    for index in range(count):
        scene = world.make_scene(seed + index, "test")
        rng = world.make_rng(seed, index, "evaluation")
        captions[str(sorted(scene.counts().items()))] += 1
        for kind in texts.QUESTION_TYPES:
            question = texts.ask(scene, rng, kind)
            if question is not None:
                # Whether it is there cannot be told from the words, so both kinds of count are one question.
                sort = "count" if kind == "count_absent" else kind
                answers[sort, nouns.sub("", question.question)][question.answer] += 1
        rng = world.make_rng(seed, index, "dialogue")
        for turn in rng.choice(texts.dialogues(scene, rng)):
            if turn.type == "followup":
                answers["followup", nouns.sub("", turn.question)][turn.answer] += 1
    tally = Tally()
    for (kind, _), said in answers.items():
        best, number = said.most_common(1)[0]
        if kind == "count":
            tally.right["count_absent"] += number if best == "zero" else 0
            tally.right["count"] += 0 if best == "zero" else number
            tally.asked["count_absent"] += said["zero"]
            tally.asked["count"] += said.total() - said["zero"]
        else:
            tally.right[kind] += number
            tally.asked[kind] += said.total()
    tally.right["caption"], tally.asked["caption"] = captions.most_common(1)[0][1], count
    return tally


def table(columns: dict[str, Tally], main: str) -> str:
    """Markdown: a row a type, the main column with its interval and the goal."""
    others = [name for name in columns if name != main]
    lines = [f"| type | asked | {main} | 95 % interval | goal | " + " | ".join(others) + " |"]
    lines.append("|---|---:|---:|---:|---:|" + "---:|" * len(others))
    tally = columns[main]
    for kind in ("caption", *texts.QUESTION_TYPES, "followup"):
        low, high = tally.interval(kind)
        goal = f"{GOALS[kind]}" if kind in GOALS else ""
        rest = " | ".join(f"{columns[name].percent(kind):.1f}" for name in others)
        share = f"**{tally.percent(kind):.1f}** | {low:.1f} to {high:.1f}"
        lines.append(f"| {kind} | {tally.asked[kind]} | {share} | {goal} | {rest} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a generative checkpoint; the bundled miniature if not given")
    parser.add_argument("--against", nargs="*", default=[], metavar="NAME=FOLDER", help="others, in columns beside it")
    parser.add_argument("--quantize", nargs="*", default=[], metavar="KIND", help="int8, int4: in columns beside it")
    parser.add_argument("--vision", choices=["int8"], help="an image encoder in 8 bits: in a column beside it")
    parser.add_argument("--count", type=int, default=1000, help="scenes (default 1000)")
    parser.add_argument("--quick", action="store_true", help="the test scenes only")
    parser.add_argument("--no-familiar", action="store_true", help="no scenes of the training distribution")
    parser.add_argument("--drawings", action="store_true", help="other emoji of the same kinds: in a column beside it")
    parser.add_argument("--markdown", type=Path, help="write the table here too")
    options = parser.parse_args()
    pipeline = blip2.load(options.model)
    columns = {"unseen pairs": evaluate(pipeline, "test", options.count)}
    if not options.quick:
        if not options.no_familiar:
            columns["familiar"] = evaluate(pipeline, "familiar", options.count)
        columns["shuffled"] = evaluate(pipeline, "test", options.count, shuffle=True)
        columns["blind"] = blind_guess(options.count)
    if options.drawings:
        columns["other drawings"] = evaluate(pipeline, "glyphs", options.count)
    for pair in options.against:
        name, _, folder = pair.partition("=")
        columns[name] = evaluate(blip2.load(folder), "test", options.count)
    for kind in options.quantize:
        columns[kind] = evaluate(blip2.load(options.model, quantize=kind), "test", options.count)
    if options.vision:
        columns[f"vision {options.vision}"] = evaluate(
            blip2.load(options.model, vision=options.vision), "test", options.count
        )
    text = table(columns, "unseen pairs")
    print(text)
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")
    print(json.dumps({name: dict(tally.right) for name, tally in columns.items()}), file=sys.stderr)


if __name__ == "__main__":
    main()
