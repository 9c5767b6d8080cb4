"""The pointing game: does the strongest point of a map of `explain` lie on what was asked about?

    python -m miniature.pointing --count 500 [--markdown FILE]

Scenes with pairs of kinds that no training saw, two or three kinds each, so that it matters which is asked about. For
each kind of each scene the map of a text must point into a box of that kind. Beside the share that does, in percent:

- *other kind*: the same map, judged by the next kind's boxes. A map that shows whatever is there would be as good;
- *centre*: the image's centre in the place of the map's point;
- *chance*: the share of the image that the boxes cover.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import blip2
from blip2.api import Matcher, Pipeline
from blip2.tasks.explain import Explanation
from miniature import texts, world
from miniature.evaluate import Tally

SEED = 70_000_000  # far from all training seeds, from `evaluate`'s, and from those that the method was chosen by
Point = tuple[int, int]
Explain = Callable[[world.Scene, object, str], Explanation]


def ways(matcher: Matcher, pipeline: Pipeline) -> dict[str, Explain]:
    """What is asked, by name: a map of a scene, its image and a kind."""

    def caption(scene: world.Scene) -> str:
        return texts.plain_caption(scene, world.make_rng(scene.texture_seed, "pointing"))

    def counted(scene: world.Scene, kind: str) -> str:
        number = scene.counts()[kind]
        return f"{texts.NUMBERS[number]} {texts.KINDS[kind].plural}" if number > 1 else texts.with_article(kind)

    def word(scene: world.Scene, kind: str) -> str:
        return texts.KINDS[kind].plural if scene.counts()[kind] > 1 else kind

    return {
        'matcher, "a dog"': lambda scene, picture, kind: matcher.explain(picture, texts.with_article(kind)),
        'matcher, "two dogs" (the right count)': lambda scene, picture, kind: matcher.explain(
            picture, counted(scene, kind)
        ),
        '"how many dogs are there?", the answer': lambda scene, picture, kind: pipeline.explain(
            picture, question=f"how many {texts.KINDS[kind].plural} are there?"
        ),
        '"is there a dog?", the answer': lambda scene, picture, kind: pipeline.explain(
            picture, question=f"is there {texts.with_article(kind)}?"
        ),
        'the word "dogs" of a right caption': lambda scene, picture, kind: pipeline.explain(
            picture, word=word(scene, kind), caption=caption(scene)
        ),
    }


def points_at(scene: world.Scene, point: Point | None, kind: str) -> bool:
    """Whether the point, x and y in pixels, is in a box of the kind."""
    if point is None:
        return False
    x, y = point
    boxes = [thing.box for thing in scene.objects if thing.kind == kind]
    return any(x0 <= x < x1 and y0 <= y < y1 for x0, y0, x1, y1 in boxes)


def covered(scene: world.Scene, kind: str) -> float:
    """The share of the image in boxes of the kind; boxes do not overlap."""
    boxes = [thing.box for thing in scene.objects if thing.kind == kind]
    return sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in boxes) / (scene.width * scene.height)


def play(explain: Explain, count: int, seed: int = SEED) -> Tally:
    """Point at every kind of ``count`` scenes; the Tally's kinds are "hit", "other kind" and "centre"."""
    tally = Tally()
    for index in range(count):
        scene = world.make_scene(seed + index, "test")
        picture = world.render(scene)
        kinds = list(scene.counts())
        for number, kind in enumerate(kinds):
            point = explain(scene, picture, kind).strongest
            tally.add("hit", points_at(scene, point, kind))
            tally.add("other kind", points_at(scene, point, kinds[number - 1]))
            tally.add("centre", points_at(scene, (scene.width // 2, scene.height // 2), kind))
    return tally


def chance(count: int, seed: int = SEED) -> float:
    """What a point anywhere would hit, in percent."""
    scenes = [world.make_scene(seed + index, "test") for index in range(count)]
    shares = [covered(scene, kind) for scene in scenes for kind in scene.counts()]
    return 100 * sum(shares) / len(shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500, help="scenes (default 500)")
    parser.add_argument("--seed", type=int, default=SEED, help="of the first scene; another one to choose a method by")
    parser.add_argument("--markdown", type=Path, help="write the table here too")
    options = parser.parse_args()
    by_chance = chance(options.count, options.seed)
    lines = ["| explained | asked | points at it | 95 % interval | other kind | centre | chance |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for name, explain in ways(blip2.load("miniature-itm"), blip2.load()).items():
        start = time.perf_counter()
        tally = play(explain, options.count, options.seed)
        low, high = tally.interval("hit")
        share = f"**{tally.percent('hit'):.1f}** | {low:.1f} to {high:.1f}"
        rest = f"{tally.percent('other kind'):.1f} | {tally.percent('centre'):.1f} | {by_chance:.1f}"
        lines.append(f"| {name} | {tally.asked['hit']} | {share} | {rest} |")
        milliseconds = 1000 * (time.perf_counter() - start) / tally.asked["hit"]
        print(f"{name}: {milliseconds:.0f} ms a map", file=sys.stderr)
    text = "\n".join(lines) + "\n"
    print(text)
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
