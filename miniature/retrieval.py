"""How well the matching miniature finds the image of a caption, and the caption of an image.

    python -m miniature.retrieval --count 500 [--candidates 128] [--model FOLDER]

Draws scenes with pairs of kinds that no training saw, each with one caption that is true of it alone: what the caption
says (so many of each kind) is not said by, and not part of, any other scene's. Recall at 1 and 5, by the vectors alone
(ITC), and after the ``candidates`` nearest were read together (ITM logit + cosine), as the authors rank: that of
``blip2 evaluate`` (`blip2.evaluate.matching`).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import blip2
from blip2.evaluate import evaluating
from miniature import texts, world
from miniature.evaluate import wilson

SEED = 91_000_000  # far from all training seeds, and from those of `miniature.evaluate`
NAMES = {"image": "text to image, ITC", "text": "image to text, ITC"}


def scenes_with_captions(count: int, seed: int = SEED) -> tuple[list[world.Scene], list[str]]:
    """Scenes of the test split, and for each the caption that is true of it alone."""
    scenes: list[world.Scene] = []
    said: list[set[tuple[str, int]]] = []
    number = seed
    while len(scenes) < count:
        scene = world.make_scene(number, "test")
        number += 1
        facts = set(scene.counts().items())
        if not any(facts <= others or others <= facts for others in said):
            scenes.append(scene)
            said.append(facts)
    captions = [texts.plain_caption(scene, world.make_rng(seed, at, "retrieval")) for at, scene in enumerate(scenes)]
    return scenes, captions


def recalls(
    matcher: blip2.Matcher, scenes: list[world.Scene], captions: list[str], candidates: int
) -> dict[str, dict[int, float]]:
    """For each way of scoring the recall at 1 and at 5, in percent."""

    def told(done: int, total: int | None) -> None:
        print(f"\r{done}/{total} ", end="" if done != total else "\n", file=sys.stderr)

    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows: list[dict[str, Any]] = []
        for at, (scene, caption) in enumerate(zip(scenes, captions, strict=True)):
            rows.append({"image": f"{at:06}.png", "captions": [caption]})
            world.render(scene).save(folder / rows[-1]["image"])
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        evaluation = evaluating(folder / "rows.jsonl", folder / "out", model=matcher, candidates=candidates)
        evaluation.see(told)
        evaluation.run.run(lambda summary, results: told(summary.done, summary.total))
        scores = evaluation.scores()["scores"]
    return {
        f"{name}{suffix}": {k: scores[f"{side} R@{k}{way}"]["score"] for k in (1, 5)}
        for side, name in NAMES.items() for suffix, way in ((", re-ranked", ""), ("", ", by vectors"))
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="miniature-itm", help="a matching checkpoint (default: the bundled one)")
    parser.add_argument("--count", type=int, default=500, help="scenes (default 500)")
    parser.add_argument("--candidates", type=int, default=128, help="read together with a query (default 128)")
    options = parser.parse_args()
    scenes, captions = scenes_with_captions(options.count)
    found = recalls(blip2.load(options.model), scenes, captions, min(options.candidates, options.count))
    print(f"| {options.count} scenes | R@1 | 95 % interval | R@5 |\n|---|---:|---:|---:|")
    for name, recall in sorted(found.items()):
        low, high = wilson(round(recall[1] * options.count / 100), options.count)
        print(f"| {name} | **{recall[1]:.1f}** | {low:.1f} to {high:.1f} | {recall[5]:.1f} |")


if __name__ == "__main__":
    main()
