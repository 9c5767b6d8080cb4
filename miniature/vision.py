"""The miniature's image encoder, a small vision transformer taught with what the world knows of each image."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2 import checkpoint
from blip2.config import CLIP_MEAN, CLIP_STD, VisionConfig
from blip2.image import load_image, to_pixels
from blip2.vision import VisionTransformer
from miniature import texts, world
from miniature.glyphs import STRANGERS
from miniature.schedule import autocast, train

VISION = VisionConfig(hidden_size=192, num_layers=6, num_heads=3, intermediate_size=768, image_size=112)
KINDS = list(texts.KINDS)
NAMES = [*KINDS, *STRANGERS]  # what a patch may show
BACKGROUNDS = list(world.BACKGROUNDS)
SIDES = (None, "left", "right")
HEIGHTS = (None, "top", "bottom")
PATCH_ANSWERS = {"kind": len(NAMES) + 1, "count": 4, "side": len(SIDES), "height": len(HEIGHTS), "centre": 2}


class DenseHeads(nn.Module):
    """The image encoder with the heads that teach it; only the encoder is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = VisionTransformer(VISION)
        self.patch = nn.Linear(VISION.hidden_size, sum(PATCH_ANSWERS.values()))
        self.scene = nn.Linear(VISION.hidden_size, len(BACKGROUNDS) + 5 * len(KINDS))

    def forward(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        encoded_BPD = self.encoder(pixels_BCHW)
        return self.patch(encoded_BPD[:, 1:]), self.scene(encoded_BPD[:, 0])


def patch_labels(row: dict) -> tuple[np.ndarray, np.ndarray]:
    """What a row's patches and its whole scene are to say.

    Patches ``uint8[P, 5]``: kind (0: none), count - 1, side, height, and 1 where an object has its centre, so
    that objects can be counted whatever their size. Scene ``uint8[1 + K]``: background, counts.
    """
    grid = VISION.image_size // VISION.patch_size
    centres = (np.arange(grid) + 0.5) / grid
    patches = np.zeros((grid, grid, len(PATCH_ANSWERS)), np.uint8)
    scene = np.zeros(1 + len(KINDS), np.uint8)
    scene[0] = BACKGROUNDS.index(row["background"])
    boxes, middles = defaultdict(list), []
    for thing in row["objects"]:
        x0, y0, x1, y1 = thing["box"]
        boxes[thing["kind"]].append((x0 / row["width"], y0 / row["height"], x1 / row["width"], y1 / row["height"]))
    for kind, places in boxes.items():
        xs = [(x0 + x1) / 2 for x0, _, x1, _ in places]
        ys = [(y0 + y1) / 2 for _, y0, _, y1 in places]
        side = 1 if max(xs) < 0.45 else 2 if min(xs) > 0.55 else 0
        height = 1 if max(ys) < 0.45 else 2 if min(ys) > 0.55 else 0
        if kind in KINDS:
            scene[1 + KINDS.index(kind)] = len(places)
        label = (NAMES.index(kind) + 1, len(places) - 1, side, height)
        for (x0, y0, x1, y1), x, y in zip(places, xs, ys, strict=True):
            inside = np.ix_((centres > y0) & (centres < y1), (centres > x0) & (centres < x1))
            patches[inside] = (*label, 0)
            middles.append((int(y * grid), int(x * grid), (*label, 1)))
    for row_number, column, label_and_centre in middles:  # last, so that no neighbour covers a centre
        patches[row_number, column] = label_and_centre
    return patches.reshape(grid * grid, -1), scene


def load_small(path: str) -> np.ndarray:
    """An image as the model's processor makes it, in 8 bits: ``uint8[3, size, size]``."""
    pixels = to_pixels([load_image(path)], size=VISION.image_size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return (pixels[0] * 255).round().to(torch.uint8).numpy()


def load_pictures(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All images of a folder and their labels, kept beside them for the next start."""
    rows = [json.loads(line) for line in (folder / "rows.jsonl").open()]
    cache = folder / f"pixels-{VISION.image_size}.npy"
    if not cache.exists():
        pixels = np.lib.format.open_memmap(
            cache.with_suffix(".tmp"), "w+", np.uint8, (len(rows), 3, VISION.image_size, VISION.image_size)
        )
        with ProcessPoolExecutor(2) as pool:
            paths = (str(folder / row["image"]) for row in rows)
            for index, picture in enumerate(pool.map(load_small, paths, chunksize=256)):
                pixels[index] = picture
        pixels.flush()
        os.replace(cache.with_suffix(".tmp"), cache)
    patches, scenes = zip(*map(patch_labels, rows), strict=True)
    return np.load(cache, mmap_mode="r"), np.stack(patches), np.stack(scenes)


def normalized(pixels: np.ndarray) -> Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (torch.from_numpy(pixels).float() / 255 - mean) / std


def vision_losses(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor], *, counts_weight: float) -> dict[str, Tensor]:
    pixels, patches, scenes = batch
    patch_logits, scene_logits = model(pixels)
    shown = patches[..., 0] > 0
    losses = {}
    for index, logits in enumerate(patch_logits.float().split(list(PATCH_ANSWERS.values()), dim=-1)):
        name = list(PATCH_ANSWERS)[index]
        of = shown if name in ("count", "side", "height") else torch.ones_like(shown)
        losses[name] = F.cross_entropy(logits[of], patches[..., index][of])
    background, counts = scene_logits.float().split([len(BACKGROUNDS), 5 * len(KINDS)], dim=-1)
    return losses | {
        "background": F.cross_entropy(background, scenes[:, 0]),
        "scene": counts_weight * F.cross_entropy(counts.unflatten(1, (-1, 5)).flatten(0, 1), scenes[:, 1:].flatten()),
    }


@torch.no_grad()
def vision_accuracy(model: nn.Module, pictures: tuple[np.ndarray, np.ndarray, np.ndarray]) -> dict[str, float]:
    """On images with unseen pairs: patches, and the counts of the kinds that are there."""
    right: dict[str, list[float]] = defaultdict(list)
    for start in range(0, len(pictures[0]), 200):
        pixels, patches, scenes = (part[start : start + 200] for part in pictures)
        patch_logits, scene_logits = model(normalized(pixels))
        wanted = torch.from_numpy(patches).long()
        shown = wanted[..., 0] > 0
        for index, logits in enumerate(patch_logits.split(list(PATCH_ANSWERS.values()), dim=-1)):
            right[list(PATCH_ANSWERS)[index]] += (logits.argmax(-1) == wanted[..., index])[shown].float().tolist()
        counts = scene_logits[:, len(BACKGROUNDS) :].unflatten(1, (-1, 5)).argmax(-1)
        wanted_counts = torch.from_numpy(scenes[:, 1:]).long()
        there = wanted_counts > 0
        right["scene counts"] += (counts == wanted_counts)[there].float().tolist()
        right["whole scene"] += (counts == wanted_counts).all(1).float().tolist()
        right["background"] += (
            (scene_logits[:, : len(BACKGROUNDS)].argmax(-1) == torch.from_numpy(scenes[:, 0]).long()).float().tolist()
        )
    return {name: round(float(np.mean(values)), 4) for name, values in right.items()}


def mirrored(pixels: np.ndarray, patches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An image and its patch labels seen in a mirror: left is right."""
    grid = VISION.image_size // VISION.patch_size
    patches = patches.reshape(len(patches), grid, grid, -1)[:, :, ::-1].reshape(patches.shape).copy()
    patches[..., 2] = np.array([0, 2, 1], np.uint8)[patches[..., 2]]
    return pixels[..., ::-1].copy(), patches


def teach_heads(model: DenseHeads, batches: Iterator[tuple[Tensor, Tensor, Tensor]], steps: int = 150) -> None:
    """New heads for an image encoder that knows already, so that they do not spoil it at first."""
    optimizer = torch.optim.AdamW([*model.patch.parameters(), *model.scene.parameters()], lr=3e-3)
    model.encoder.requires_grad_(False)
    for _ in range(steps):
        with autocast():
            loss = sum(vision_losses(model, next(batches), counts_weight=0.0).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"new heads: loss {loss.item():.3f}", flush=True)
    model.encoder.requires_grad_(True)


def train_vision(data: list[Path], test: Path, out: Path, *, steps: int, batch_size: int, start: Path | None) -> None:
    """The first pass, or (with ``start``) a later one: after the pass before, or after a checkpoint's image encoder.

    Later passes leave out what the class token says of the counts: that teaches fast, but teaches along with it
    which kinds never meet, and on the pairs that are kept for the test it is wrong. They mirror half of the images.
    """
    folders = [load_pictures(folder) for folder in data]
    unseen = load_pictures(test)
    owner = np.repeat(np.arange(len(folders)), [len(folder[0]) for folder in folders])
    place = np.concatenate([np.arange(len(folder[0])) for folder in folders])

    def batches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        chance = np.random.default_rng(len(data))
        while True:
            order = chance.permutation(len(owner))
            for first in range(0, len(order) - batch_size + 1, batch_size):
                chosen = order[first : first + batch_size]
                parts = [
                    tuple(part[np.sort(place[chosen[owner[chosen] == number]])] for part in folder)
                    for number, folder in enumerate(folders)
                ]
                pixels, patches, scenes = (np.concatenate(column) for column in zip(*parts, strict=True))
                if start is not None:
                    flip = chance.random(len(pixels)) < 0.5
                    pixels[flip], patches[flip] = mirrored(pixels[flip], patches[flip])
                yield normalized(pixels), torch.from_numpy(patches).long(), torch.from_numpy(scenes).long()

    model = DenseHeads()
    if start is not None and start.is_dir() and not out.exists():
        model.encoder = checkpoint.load(start).vision
        teach_heads(model, batches())
    elif start is not None and not out.exists():
        model.load_state_dict(torch.load(start, weights_only=True)["model"])
    train(
        model,
        batches(),
        partial(vision_losses, counts_weight=3.0 if start is None else 0.0),
        steps=steps,
        peak=1e-3 if start is None else 6e-4,
        checkpoint=out,
        evaluate=lambda model: vision_accuracy(model, unseen),
    )
