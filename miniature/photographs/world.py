"""Scenes of cut-out photographs on photographs, with texts that are right by construction (`miniature.texts`).

    python -m miniature.photographs.world --packages DIR --split train --count 16000 --seed 1 --out DIR
    python -m miniature.photographs.world --packages DIR --split stamps --sheet sheet.jpg

Splits: ``train``; ``large``, also for training, one large thing each, as photographs have it; ``familiar``, new scenes
like those of ``train``; ``pairs``, each with two kinds that meet in no training scene; ``stamps`` and
``large-stamps``, each thing in a cut-out that no training shows. Everything follows from (seed, split, index).

A scene shows one to three kinds, at most six things, of which one may hide up to a quarter of another; or one thing
that fills the picture. Light, colour, blur and JPEG are by chance. One large thing may reach over the edge, and its
proportions and colours are by chance, too: there are few cut-outs of a kind. The pictures come from packages that
`miniature.photographs.packages` fetches; of these, none is in the repository.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import random
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from PIL import Image, ImageEnhance, ImageFilter

from miniature import texts
from miniature.photographs.packages import BACKGROUNDS, STAMPS
from miniature.photographs.stamps import held_out, kinds, stamps
from miniature.texts import Kind
from miniature.world import ANYWHERE, Job, Region, choose_regions, clear_half, make_rng, write_split

SPLITS = ("train", "large", "familiar", "pairs", "stamps", "large-stamps")
LARGE, UNSEEN = ("large", "large-stamps"), ("stamps", "large-stamps")
PACKAGES = "BLIP2_PHOTOGRAPHS"
"""The environment variable that names the folder of the fetched packages."""
MOST_THINGS = 6
HELD_OUT_PAIRS = 0.1
HIDDEN = 0.25
"""Of a thing's box, so much may lie in another's."""
ANGLES = tuple(range(-16, 17, 4))
SHORT_SIDE_PX, LONGEST = (224, 320), 1.5
SCATTERED = 0.5
"""Of the scenes, so many keep no kind to a side."""
BACKDROP_PX = 1200
PLAIN = 0.15
"""Of the scenes, so many are before a plain wall."""
LARGE_FRACTIONS = (0.7, 1.4)
"""How much of the width or height, whichever it would fill first, one large thing takes up."""
AT_LEAST_VISIBLE = 0.6
STRETCH, HUE = 0.25, 14
"""Of one large thing: the largest logarithm of a factor for each side, and the largest turn of its hue, of 256."""


@dataclass(frozen=True)
class Thing:
    """One thing; ``box`` (x0, y0, x1, y1, in pixels) is what its turned cut-out covers of the picture, ``whole`` (of
    one large thing) what it covers with what is beyond the edge. ``light``: 1 is as it came."""

    kind: str
    stamp: str
    box: tuple[int, int, int, int]
    angle: int
    flip: bool
    light: float
    whole: tuple[int, int, int, int] | None = None


@dataclass(frozen=True)
class Scene:
    """All that a picture and its texts are made from; ``backdrop``: the number of a photograph, -1 for a plain wall."""

    width: int
    height: int
    backdrop: int
    look_seed: int
    objects: tuple[Thing, ...]
    background: ClassVar[str] = ""
    """A photograph has no colour that could be asked about."""
    kinds: ClassVar[dict[str, Kind]] = kinds()

    def counts(self) -> dict[str, int]:
        """How often each present kind occurs."""
        return dict(Counter(thing.kind for thing in self.objects))

    def side(self, kind: str) -> str | None:
        """The side, "left" or "right", that clearly holds all of the kind, or None."""
        return self._clear(kind, 0, self.width, ("left", "right"))

    def height_of(self, kind: str) -> str | None:
        """The half, "top" or "bottom", that clearly holds all of the kind, or None."""
        return self._clear(kind, 1, self.height, ("top", "bottom"))

    def _clear(self, kind: str, axis: int, extent: int, names: tuple[str, str]) -> str | None:
        return clear_half([thing.box for thing in self.objects if thing.kind == kind], axis, extent, names)


@functools.cache
def is_held_out(one: str, other: str) -> bool:
    """Whether two kinds are kept from meeting in training: a tenth of all pairs, by chance."""
    return make_rng("pair", *sorted((one, other))).random() < HELD_OUT_PAIRS


def has_held_out_pair(names: list[str]) -> bool:
    return any(is_held_out(*pair) for pair in itertools.combinations(names, 2))


def _choose_kinds(rng: random.Random, split: str) -> list[str]:
    pool = list(held_out() if split in UNSEEN else stamps())
    if split in LARGE:  # the more cut-outs there are, the more there is to learn
        return rng.choices(pool, [len(stamps()[kind]) ** 0.5 for kind in pool])
    weights = (0, 65, 35) if split == "pairs" else (55, 30, 15)
    number = rng.choices((1, 2, 3), weights)[0]
    while has_held_out_pair(names := rng.sample(pool, number)) != (split == "pairs"):
        pass
    return names


def _choose_counts(rng: random.Random, number: int) -> list[int]:
    weights = (60, 20, 12, 8) if number == 1 else (50, 25, 15, 10)
    while sum(counts := [rng.choices((1, 2, 3, 4), weights)[0] for _ in range(number)]) > MOST_THINGS:
        pass
    return counts


def _stamp(rng: random.Random, split: str, kind: str) -> Path:
    apart = held_out().get(kind, [])
    return rng.choice(apart if split in UNSEEN else [file for file in stamps()[kind] if file not in apart])


@functools.cache
def _folder() -> Path:
    return Path(os.environ[PACKAGES])


@functools.lru_cache(4096)
def cut_out(stamp: str, angle: int = 0, flip: bool = False) -> Image.Image:
    """A cut-out, turned and perhaps mirrored, cropped to what is visible (RGBA)."""
    if angle or flip:
        image = cut_out(stamp)
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image
        image = image.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    else:
        image = Image.open(_folder() / STAMPS / stamp).convert("RGBA")
    return image.crop(image.getchannel("A").point(lambda alpha: 255 * (alpha > 16)).getbbox())


@functools.cache
def backdrops() -> list[Image.Image]:
    """The photographs behind the scenes (RGB), the longer side of each at most `BACKDROP_PX`."""
    found = []
    for name in BACKGROUNDS:
        image = Image.open(_folder() / name)
        image.draft("RGB", (BACKDROP_PX, BACKDROP_PX))
        image = image.convert("RGB")
        image.thumbnail((BACKDROP_PX, BACKDROP_PX))
        found.append(image)
    return found


def make_scene(seed: int, split: str = "train", index: int = 0) -> Scene:
    """Scene number `index` of a split; the splits draw from separate random streams."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is none of {SPLITS}")
    rng = make_rng("photographs", seed, split, index)
    short, ratio = rng.randint(*SHORT_SIDE_PX), rng.uniform(1, LONGEST)
    size = (round(short * ratio), short) if rng.random() < 0.7 else (short, round(short * ratio))
    backdrop = -1 if rng.random() < PLAIN else rng.randrange(len(BACKGROUNDS))
    choose = _one_large_thing if split in LARGE else _choose_things
    return Scene(*size, backdrop, rng.getrandbits(32), choose(rng, split, size))


def _one_large_thing(rng: random.Random, split: str, size: tuple[int, int]) -> tuple[Thing, ...]:
    [kind] = _choose_kinds(rng, split)
    stamp, angle, flip = str(_stamp(rng, split, kind)), rng.choice(ANGLES), rng.random() < 0.5
    shape = [side * math.exp(rng.uniform(-STRETCH, STRETCH)) for side in cut_out(stamp, angle, flip).size]
    scale = rng.uniform(*LARGE_FRACTIONS) * min(whole / side for whole, side in zip(size, shape, strict=True))
    spans = []
    for whole, side in zip(size, shape, strict=True):
        extent = max(1, int(side * scale))
        over = int((1 - AT_LEAST_VISIBLE) ** 0.5 * extent / 2) if rng.random() < 0.4 else 0
        low, high = sorted((0, whole - extent))
        start = rng.randint(low - over, high + over)
        spans.append((start, start + extent))
    (x0, x1), (y0, y1) = spans
    box = (max(0, x0), max(0, y0), min(size[0], x1), min(size[1], y1))
    return (Thing(kind, stamp, box, angle, flip, rng.uniform(0.7, 1.3), (x0, y0, x1, y1)),)


def _choose_things(rng: random.Random, split: str, size: tuple[int, int]) -> tuple[Thing, ...]:
    names = _choose_kinds(rng, split)
    counts = _choose_counts(rng, len(names))
    regions = choose_regions(rng, names, SCATTERED)
    wishes = [(name, region) for name, count, region in zip(names, counts, regions, strict=True) for _ in range(count)]
    largest = (1.1, 0.62, 0.5, 0.45, 0.4, 0.36)[len(wishes) - 1]
    base = rng.uniform(0.5 * largest, largest / 1.2)
    for attempt in range(200):
        shrink = 0.95**attempt
        placed: list[Thing] = []
        for name, region in wishes:
            if attempt > 20 or (len(wishes) == 1 and base > 0.55):
                region = ANYWHERE
            fraction = max(0.16, rng.uniform(base, 1.2 * base) * shrink)
            thing = _place(rng, split, name, region, size, fraction, placed)
            if thing is None:
                break
            placed.append(thing)
        else:
            return tuple(placed)
    raise RuntimeError(f"no room for {counts} things on a canvas of {size}")


def _place(
    rng: random.Random,
    split: str,
    kind: str,
    region: Region,
    size: tuple[int, int],
    fraction: float,
    placed: list[Thing],
) -> Thing | None:
    """A thing whose longer side is ``fraction`` of the shorter side of the canvas, at a place of its region that is
    free enough; None if there is none."""
    stamp, angle, flip = str(_stamp(rng, split, kind)), rng.choice(ANGLES), rng.random() < 0.5
    shape = cut_out(stamp, angle, flip).size
    scale = min(fraction * min(size) / max(shape), *(whole / side for whole, side in zip(size, shape, strict=True)))
    extents = [max(1, int(side * scale)) for side in shape]
    spans = [
        (max(0.0, low * whole - extent / 2), max(0.0, min(whole - extent, high * whole - extent / 2)))
        for (low, high), whole, extent in zip(region, size, extents, strict=True)
    ]
    for _ in range(40):
        x, y = (round(rng.uniform(low, max(low, high))) for low, high in spans)
        box = (x, y, x + extents[0], y + extents[1])
        if all(_shared(box, other.box) <= HIDDEN for other in placed):
            return Thing(kind, stamp, box, angle, flip, rng.uniform(0.8, 1.2))
    return None


def _shared(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> float:
    """How much of the smaller box lies in the other, 0 to 1."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return max(0, width) * max(0, height) / min(areas)


def render(scene: Scene) -> Image.Image:
    """Draw the scene at its own size (RGB)."""
    rng = make_rng(scene.look_seed, "look")
    image = _behind(scene, rng)
    for thing in scene.objects:
        x0, y0, x1, y1 = thing.whole or thing.box
        drawn = cut_out(thing.stamp, thing.angle, thing.flip).resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR)
        lit = ImageEnhance.Brightness(drawn.convert("RGB")).enhance(thing.light)
        lit = _tinted(lit, rng) if thing.whole else lit
        image.paste(lit, (x0, y0), drawn.getchannel("A"))
    for kind in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = kind(image).enhance(math.exp(rng.uniform(-0.3, 0.3)))
    if rng.random() < 0.4:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.2)))
    return image


def _tinted(image: Image.Image, rng: random.Random) -> Image.Image:
    """Other colours and contrast, by chance."""
    turn = rng.randint(-HUE, HUE) if rng.random() < 0.5 else 0
    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point(lambda level: (level + turn) % 256)
    image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    image = ImageEnhance.Color(image).enhance(rng.uniform(0.4, 1.5))
    return ImageEnhance.Contrast(image).enhance(rng.uniform(0.7, 1.3))


def _behind(scene: Scene, rng: random.Random) -> Image.Image:
    size = (scene.width, scene.height)
    if scene.backdrop < 0:
        level = rng.choice((255, 255, rng.randint(0, 255)))
        return Image.new("RGB", size, tuple(max(0, level - rng.randint(0, 40)) for _ in range(3)))
    photograph = backdrops()[scene.backdrop]
    fit = min(whole / side for whole, side in zip(photograph.size, size, strict=True))
    width, height = (side * fit * rng.uniform(0.3, 1) ** 0.5 for side in size)
    x, y = rng.uniform(0, photograph.width - width), rng.uniform(0, photograph.height - height)
    image = photograph.resize(size, Image.Resampling.BILINEAR, (x, y, x + width, y + height))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


def _write_row(job: Job) -> str:
    """Draw and save one scene; returns its line of rows.jsonl."""
    folder, split, seed, index = job
    scene = make_scene(seed, split, index)
    rng = make_rng("photographs", seed, split, index, "texts")
    name = f"images/{index // 1000:02d}/{index:06d}.jpg"
    render(scene).save(Path(folder, name), quality=rng.randint(40, 95))
    row = {
        "image": name,
        "captions": texts.captions(scene, rng),
        "questions": [asdict(each) for each in texts.sample_questions(scene, rng, rng.randint(6, 10))],
        "dialogues": [[asdict(turn) for turn in turns] for turns in texts.dialogues(scene, rng)[:3]],
        "objects": [{"kind": thing.kind, "box": thing.box, "stamp": thing.stamp} for thing in scene.objects],
    }
    return json.dumps(row)


def draw_sheet(path: Path, split: str, seed: int, columns: int = 8, rows: int = 6) -> None:
    """A contact sheet of sample scenes."""
    cell = 224
    sheet = Image.new("RGB", (columns * cell, rows * cell), "white")
    for index in range(columns * rows):
        image = render(make_scene(seed, split, index))
        image.thumbnail((cell - 6, cell - 6))
        sheet.paste(image, (index % columns * cell + 3, index // columns * cell + 3))
    sheet.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, help=f"where they were fetched to; else ${PACKAGES}")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--count", type=int, default=1000, help="scenes to write")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder for the images and rows.jsonl")
    parser.add_argument("--sheet", type=Path, help="contact sheet to draw")
    options = parser.parse_args()
    if options.packages:
        os.environ[PACKAGES] = str(options.packages)
    if options.sheet:
        draw_sheet(options.sheet, options.split, options.seed)
    if options.out:
        write_split(options.out, options.split, options.count, options.seed, options.workers, _write_row)


if __name__ == "__main__":
    main()
