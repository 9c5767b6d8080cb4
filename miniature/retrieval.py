"""How well the matching miniature finds the picture of a caption, and the caption of a picture.

    python -m miniature.retrieval --count 500 [--candidates 128] [--model FOLDER]

Draws scenes with pairs of kinds that no training saw, each with one caption that is true of it alone: what the caption
says (so many of each kind) is not said by, and not part of, any other scene's. Recall at 1 and 5, by the vectors alone
(ITC), and after the ``candidates`` nearest were read together (ITM logit + cosine), as the authors rank.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from torch import Tensor

import blip2
from miniature import texts, world
from miniature.evaluate import wilson

SEED = 91_000_000  # far from all training seeds, and from those of `miniature.evaluate`


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


def recall(score_QC: Tensor, k: int) -> int:
    """How many of the queries have their own candidate, which has their number, among the k best."""
    own_Q1 = torch.arange(len(score_QC))[:, None]
    return int((score_QC.topk(k, dim=1).indices == own_Q1).any(dim=1).sum())


@torch.no_grad()
def scores(
    matcher: blip2.Matcher, scenes: list[world.Scene], captions: list[str], candidates: int
) -> dict[str, Tensor]:
    """Each way of scoring: queries by candidates, minus infinity where a candidate was not read."""
    reader = matcher.reader
    images = matcher.encode([world.render(scene) for scene in scenes], batch_size=32)
    ids = reader.ids(captions)
    cosine_NM = reader.cosines(images, reader.embed_texts(ids, 64))
    found = {"text to image, ITC": cosine_NM.T, "image to text, ITC": cosine_NM}
    reranked = {name: torch.full_like(cosine_NM, float("-inf")) for name in found}
    started = time.monotonic()
    for at in range(len(images)):
        near = cosine_NM[:, at].topk(candidates).indices.tolist()
        logits = reader.itm_logits([images[one] for one in near], [ids[at]], 64)[:, 0, 1]
        reranked["text to image, ITC"][at, near] = logits + cosine_NM[near, at]
        near = cosine_NM[at].topk(candidates).indices.tolist()
        logits = reader.itm_logits([images[at]], [ids[one] for one in near], 64)[0, :, 1]
        reranked["image to text, ITC"][at, near] = logits + cosine_NM[at, near]
        left = (time.monotonic() - started) / (at + 1) * (len(images) - at - 1)
        print(f"\rre-ranked {at + 1}/{len(images)}, {left:.0f} s left ", end="", file=sys.stderr)
    print(file=sys.stderr)
    return found | {f"{name}, re-ranked": score for name, score in reranked.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="miniature-itm", help="a matching checkpoint (default: the bundled one)")
    parser.add_argument("--count", type=int, default=500, help="scenes (default 500)")
    parser.add_argument("--candidates", type=int, default=128, help="read together with a query (default 128)")
    options = parser.parse_args()
    scenes, captions = scenes_with_captions(options.count)
    found = scores(blip2.load(options.model), scenes, captions, min(options.candidates, options.count))
    print(f"| {options.count} scenes | R@1 | 95 % interval | R@5 |\n|---|---:|---:|---:|")
    for name in sorted(found):
        first, five = recall(found[name], 1), recall(found[name], 5)
        low, high = wilson(first, options.count)
        share = f"**{100 * first / options.count:.1f}** | {low:.1f} to {high:.1f}"
        print(f"| {name} | {share} | {100 * five / options.count:.1f} |")


if __name__ == "__main__":
    main()
