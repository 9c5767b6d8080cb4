"""A synthetic image world: emoji on coloured backgrounds, with texts that are right by construction.

A scene holds one to three kinds of things, each one to four times, on a canvas of varying size. Some pairs of
kinds never share a `train` scene; `test` scenes each show such a pair, so they measure composition, and
`familiar` scenes are fresh ones like the training scenes. Everything follows from (seed, split, index). Two more
splits are for training alone: `crowd`, for the image encoder (more kinds a scene, strangers among them, no texts), and
`varied`, for the Q-Former (other drawings of the kinds, more of them on one side). `glyphs` are test scenes with other
drawings.

    python -m miniature.world --split train --count 60000 --seed 1 --out DIR --workers 2
    python -m miniature.world --split test --sheet sheet.png

The sprites come from Noto Color Emoji (`miniature.glyphs`).
"""

from __future__ import annotations

import argparse
import colorsys
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image, ImageDraw

from miniature.glyphs import FONT_PATH as FONT_PATH
from miniature.glyphs import OTHERS, STRANGERS, sprite
from miniature.texts import KINDS, Kind, as_typed, captions, description, dialogues, sample_questions


@dataclass(frozen=True)
class Mix:
    """What the scenes of a split are made of."""

    numbers: tuple[int, ...]  # how often one kind, two kinds, ... stand in a scene
    most: int = 8  # things in a scene
    unseen_pair: bool = False  # one in every scene; otherwise in none
    strangers: float = 0.0  # how often a kind is one that has no name here
    others: float = 0.0  # how often a kind is not drawn by its own glyph alone
    scattered: float = 0.5  # how often the things stand anywhere
    as_typed: float = 0.0  # how often a question is written as people also type it
    has_texts: bool = True


SPLITS = {
    "train": Mix((25, 45, 30)),
    "test": Mix((0, 45, 30), unseen_pair=True),
    "familiar": Mix((0, 45, 30)),
    "crowd": Mix((15, 25, 25, 15, 12, 8), most=10, strangers=0.3, others=0.4, has_texts=False),
    "varied": Mix((25, 45, 30), others=0.3, scattered=0.3, as_typed=0.5),
    "glyphs": Mix((0, 45, 30), unseen_pair=True, others=1.0),
}
STYLES = ("plain", "gradient", "noise", "stripes")

# Each name: lowest and highest hue (degrees), saturation and value. The hues stand far apart, and the shades
# stay pastel so that no sprite melts into its background.
BACKGROUNDS = {
    "white": ((0, 360), (0.00, 0.02), (0.96, 1.00)),
    "black": ((0, 360), (0.00, 0.10), (0.03, 0.12)),
    "gray": ((0, 360), (0.00, 0.03), (0.46, 0.56)),
    "green": ((108, 135), (0.35, 0.55), (0.65, 0.82)),
    "blue": ((212, 224), (0.38, 0.52), (0.86, 0.98)),
    "yellow": ((49, 56), (0.45, 0.65), (0.95, 1.00)),
    "pink": ((332, 345), (0.25, 0.40), (0.95, 1.00)),
    "purple": ((267, 276), (0.34, 0.48), (0.74, 0.88)),
}

SMALLEST, LARGEST = 0.17, 0.34  # longest side of an object over the shorter side of the canvas
SIZE_SPREAD = 1.55
LOW, HIGH = 0.45, 0.55  # centres between these fractions of the canvas are on no clear side
ANGLES = tuple(range(-20, 21, 4))  # in steps, so that turned sprites can be cached
Color = tuple[int, int, int]


@dataclass(frozen=True)
class Object:
    """One thing in a scene; the box (x0, y0, x1, y1, in pixels) is what its turned sprite covers."""

    kind: str
    box: tuple[int, int, int, int]
    angle: int
    flip: bool
    glyph: str = ""  # the drawing, if not the kind's own


@dataclass(frozen=True)
class Scene:
    """All that an image and its texts are made from."""

    width: int
    height: int
    background: str
    style: str
    shades: tuple[Color, Color]
    texture_seed: int
    objects: tuple[Object, ...]
    kinds: ClassVar[dict[str, Kind]] = KINDS

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


def clear_half(boxes: list[tuple[int, int, int, int]], axis: int, extent: int, names: tuple[str, str]) -> str | None:
    """Which half of an image, along an axis of so many pixels, clearly holds all of the boxes, or None."""
    centres = [(box[axis] + box[axis + 2]) / 2 / extent for box in boxes]
    if max(centres) < LOW:
        return names[0]
    return names[1] if min(centres) > HIGH else None


def make_rng(*parts: object) -> random.Random:
    """A generator seeded by the parts alone, the same in every process."""
    return random.Random(hashlib.sha256(":".join(map(str, parts)).encode()).digest())


@functools.cache
def held_out_pairs() -> frozenset[frozenset[str]]:
    """The pairs of kinds kept from training: a tenth of all, each kind in one to four of them."""
    rng = make_rng("held-out pairs")
    kinds = rng.sample(list(KINDS), len(KINDS))
    pairs = {frozenset(pair) for pair in zip(kinds[::2], kinds[1::2], strict=True)}
    uses = Counter(kinds)
    while len(pairs) < round(math.comb(len(kinds), 2) / 10):
        pair = frozenset(rng.sample(kinds, 2))
        if pair not in pairs and all(uses[kind] < 4 for kind in pair):
            pairs.add(pair)
            uses.update(pair)
    return frozenset(pairs)


def has_held_out_pair(kinds: list[str]) -> bool:
    """Whether two of the kinds are a held-out pair."""
    return any(frozenset(pair) in held_out_pairs() for pair in itertools.combinations(kinds, 2))


def _choose_kinds(rng: random.Random, mix: Mix) -> list[str]:
    number = rng.choices(range(1, len(mix.numbers) + 1), mix.numbers)[0]
    if mix.unseen_pair:
        pair = rng.choice(sorted(sorted(pair) for pair in held_out_pairs()))
        others = rng.sample([kind for kind in KINDS if kind not in pair], number - 2)
        return rng.sample([*pair, *others], number)
    strangers = sum(rng.random() < mix.strangers for _ in range(number)) if mix.strangers else 0
    while has_held_out_pair(kinds := rng.sample(list(KINDS), number - strangers)):
        pass
    return kinds + rng.sample(STRANGERS, strangers)


def _choose_counts(rng: random.Random, kinds: list[str], most: int) -> list[int]:
    while sum(counts := [rng.randint(1, 4) for _ in kinds]) > most:
        pass
    return counts


def _choose_glyphs(rng: random.Random, kind: str, count: int, mix: Mix) -> list[str]:
    """For each thing of a kind its drawing, or "" for the kind's own: one drawing for all of them, or a mixture."""
    choices = OTHERS.get(kind, "")
    if not choices or not mix.others or rng.random() > mix.others:
        return [""] * count
    return rng.choices(["", *choices], k=count) if rng.random() < 0.3 else [rng.choice(choices)] * count


Region = tuple[tuple[float, float], tuple[float, float]]  # where centres may lie, as fractions of the canvas
ANYWHERE: Region = ((0, 1), (0, 1))


def choose_regions(rng: random.Random, kinds: list[str], scattered: float) -> list[Region]:
    """Some scenes scatter freely; the others keep each kind to a half or a quarter of the canvas."""
    if rng.random() < scattered:
        return [ANYWHERE] * len(kinds)
    halves = ((0, LOW - 0.01), (HIGH + 0.01, 1))  # a little inside, so that rounding keeps the side clear
    layout = rng.choices(("sides", "heights", "quarters"), (45, 35, 20))[0]
    if layout == "sides":
        return [(rng.choice(halves), (0, 1)) for _ in kinds]
    if layout == "heights":
        return [((0, 1), rng.choice(halves)) for _ in kinds]
    quarters = list(itertools.product(halves, halves))
    return rng.sample(quarters, len(kinds)) if len(kinds) <= 4 else rng.choices(quarters, k=len(kinds))


@dataclass(frozen=True)
class _Wish:
    kind: str
    fraction: float
    angle: int
    flip: bool
    region: Region
    glyph: str


def _overlap(first: tuple[int, int, int, int], second: tuple[int, int, int, int], gap: int) -> bool:
    return (
        first[0] < second[2] + gap
        and second[0] < first[2] + gap
        and first[1] < second[3] + gap
        and second[1] < first[3] + gap
    )


def _place(rng: random.Random, size: tuple[int, int], wishes: list[_Wish]) -> tuple[Object, ...] | None:
    """Put every object at a random free spot of its region, or give up with None."""
    placed: list[Object] = []
    gap = max(1, round(min(size) / 100))
    for wish in wishes:
        shape = sprite(wish.glyph or wish.kind, wish.angle, wish.flip).size
        scale = wish.fraction * min(size) / max(shape)
        extents = [max(1, round(side * scale)) for side in shape]
        spans = [
            (max(0.0, low * whole - extent / 2), min(whole - extent, high * whole - extent / 2))
            for (low, high), whole, extent in zip(wish.region, size, extents, strict=True)
        ]
        for _ in range(60):
            x, y = (round(rng.uniform(low, high)) for low, high in spans)
            box = (x, y, x + extents[0], y + extents[1])
            if not any(_overlap(box, other.box, gap) for other in placed):
                placed.append(Object(wish.kind, box, wish.angle, wish.flip, wish.glyph))
                break
        else:
            return None
    return tuple(placed)


def _choose_objects(rng: random.Random, mix: Mix, size: tuple[int, int]) -> tuple[Object, ...]:
    kinds = _choose_kinds(rng, mix)
    counts = _choose_counts(rng, kinds, mix.most)
    regions = choose_regions(rng, kinds, mix.scattered)
    crowd = (sum(counts) - 1) / (mix.most - 1)
    ceiling = LARGEST - 0.1 * crowd
    base = rng.uniform(SMALLEST, ceiling / 1.15)
    fraction = functools.partial(rng.uniform, base, min(ceiling, base * SIZE_SPREAD))
    wishes = [
        _Wish(kind, fraction(), rng.choice(ANGLES), rng.random() < 0.5, region, glyph)
        for kind, count, region in zip(kinds, counts, regions, strict=True)
        for glyph in _choose_glyphs(rng, kind, count, mix)
    ]
    for attempt in range(200):
        shrink = 0.95**attempt
        tight = [replace(wish, fraction=max(SMALLEST, wish.fraction * shrink)) for wish in wishes]
        if attempt >= 30:  # a half of the canvas may be too small for its objects at any size
            tight = [replace(wish, region=ANYWHERE) for wish in tight]
        if objects := _place(rng, size, tight):
            return objects
    raise RuntimeError(f"no room for {counts} objects on a canvas of {size}")


def _shade(rng: random.Random, background: str) -> Color:
    hue, saturation, value = (rng.uniform(*span) for span in BACKGROUNDS[background])
    red, green, blue = colorsys.hsv_to_rgb(hue / 360, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def make_scene(seed: int, split: str = "train", index: int = 0) -> Scene:
    """Scene number `index` of a split; the splits draw from separate random streams."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is none of {tuple(SPLITS)}")
    rng = make_rng(seed, split, index, "scene")
    ratio = math.exp(rng.uniform(0, math.log(1.33)))
    short = math.exp(rng.uniform(math.log(112), math.log(448 / ratio)))
    size = (round(short), round(short * ratio))
    size = size if rng.random() < 0.5 else size[::-1]
    background = rng.choice(list(BACKGROUNDS))
    style = rng.choice(STYLES)
    shades = (_shade(rng, background), _shade(rng, background))
    texture_seed = rng.getrandbits(32)
    return Scene(*size, background, style, shades, texture_seed, _choose_objects(rng, SPLITS[split], size))


def _background(scene: Scene) -> Image.Image:
    size = (scene.width, scene.height)
    rng = np.random.default_rng(scene.texture_seed)
    if scene.style == "plain":
        return Image.new("RGB", size, scene.shades[0])
    if scene.style == "noise":
        noise = rng.integers(-9, 10, (scene.height, scene.width, 1), dtype=np.int16)
        return Image.fromarray(np.clip(noise + np.array(scene.shades[0]), 0, 255).astype(np.uint8))
    turn = rng.uniform(0, 2 * math.pi)
    across = np.arange(scene.width, dtype=np.float32) * math.cos(turn)
    position = across + np.arange(scene.height, dtype=np.float32)[:, None] * math.sin(turn)
    if scene.style == "gradient":
        low, high = position.min(), position.max()
        mask = ((position - low) * (255 / (high - low))).astype(np.uint8)
    else:
        period = rng.uniform(0.05, 0.2) * min(size)
        mask = (np.floor(position / period).astype(np.int32) % 2 * 255).astype(np.uint8)
    first, second = (Image.new("RGB", size, shade) for shade in scene.shades)
    return Image.composite(first, second, Image.fromarray(mask))


def render(scene: Scene) -> Image.Image:
    """Draw the scene at its own size (RGB)."""
    image = _background(scene)
    for thing in scene.objects:
        x0, y0, x1, y1 = thing.box
        drawn = sprite(thing.glyph or thing.kind, thing.angle, thing.flip)
        drawn = drawn.resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR)
        image.paste(drawn, (x0, y0), drawn)
    return image


def type_questions(turns: list[dict[str, str]], share: float, rng: random.Random) -> None:
    """Write so many of the questions as people also type them, in place."""
    for turn in turns:
        if rng.random() < share:
            turn["question"] = as_typed(turn["question"], rng)


def _write_row(job: tuple[str, str, int, int]) -> str:
    """Draw and save one scene; returns its line of rows.jsonl."""
    folder, split, seed, index = job
    scene = make_scene(seed, split, index)
    rng = make_rng(seed, split, index, "texts")
    file_rng = make_rng(seed, split, index, "file")
    is_jpeg = file_rng.random() < 0.6
    name = f"images/{index // 1000:02d}/{index:06d}.{'jpg' if is_jpeg else 'png'}"
    if is_jpeg:
        render(scene).save(Path(folder, name), quality=file_rng.randint(85, 95))
    else:
        render(scene).save(Path(folder, name), compress_level=1)
    row: dict[str, Any] = {"image": name}
    if SPLITS[split].has_texts:
        row |= {
            "captions": captions(scene, rng),
            "questions": [asdict(question) for question in sample_questions(scene, rng, rng.randint(8, 12))],
            "dialogues": [[asdict(turn) for turn in turns] for turns in dialogues(scene, rng)[:3]],
            "description": description(scene, rng),
        }
        if SPLITS[split].as_typed:
            type_questions([*row["questions"], *itertools.chain(*row["dialogues"])], SPLITS[split].as_typed, rng)
    row |= {
        "background": scene.background,
        "objects": [{"kind": thing.kind, "box": thing.box} for thing in scene.objects],
        "width": scene.width,
        "height": scene.height,
    }
    return json.dumps(row)


Job = tuple[str, str, int, int]
"""A folder, a split, a seed and the number of a scene."""


def write_split(
    folder: str | Path,
    split: str,
    count: int,
    seed: int,
    workers: int = 2,
    write_row: Callable[[Job], str] = _write_row,
) -> None:
    """Write `count` images under folder/images and their texts to folder/rows.jsonl, which appears last.

    ``write_row``: draws and saves one, and gives its line.
    """
    folder = Path(folder)
    for start in range(0, count, 1000):
        (folder / f"images/{start // 1000:02d}").mkdir(parents=True, exist_ok=True)
    jobs = ((str(folder), split, seed, index) for index in range(count))
    unfinished, begin = folder / "rows.jsonl.part", time.monotonic()
    with multiprocessing.Pool(workers) as pool, unfinished.open("w", encoding="utf-8") as rows:
        for done, line in enumerate(pool.imap(write_row, jobs, chunksize=32), start=1):
            rows.write(line + "\n")
            if done % 500 == 0 or done == count:
                rate = done / (time.monotonic() - begin)
                left = (count - done) / rate
                print(f"\r{split} {done}/{count}  {rate:.0f}/s  {left:.0f} s left ", end="", file=sys.stderr)
    print(file=sys.stderr)
    os.replace(unfinished, folder / "rows.jsonl")


def draw_sheet(path: str | Path, split: str, seed: int, columns: int = 6, rows: int = 5) -> None:
    """Draw a contact sheet of sample scenes, each with its caption and background below it."""
    cell, line = 230, 40
    sheet = Image.new("RGB", (columns * cell, rows * (cell + line)), "white")
    pen = ImageDraw.Draw(sheet)
    for index in range(columns * rows):
        scene = make_scene(seed, split, index)
        image = render(scene)
        image.thumbnail((cell - 10, cell - 10))
        x, y = index % columns * cell, index // columns * (cell + line)
        sheet.paste(image, (x + 5, y + 5))
        has_texts = SPLITS[split].has_texts
        caption = captions(scene, make_rng(seed, split, index, "texts"))[0] if has_texts else ""
        words = f"{caption}\n{scene.background}, {scene.style}, {scene.width} x {scene.height}"
        pen.text((x + 5, y + cell), words, fill="black")
    sheet.save(path)


def main() -> None:
    """Write a split, or a contact sheet of it."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--count", type=int, default=1000, help="scenes to write")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder for the images and rows.jsonl")
    parser.add_argument("--sheet", type=Path, help="contact sheet to draw, a PNG file")
    arguments = parser.parse_args()
    if not (arguments.out or arguments.sheet):
        parser.error("give --out, --sheet or both")
    if arguments.sheet:
        draw_sheet(arguments.sheet, arguments.split, arguments.seed)
    if arguments.out:
        write_split(arguments.out, arguments.split, arguments.count, arguments.seed, arguments.workers)


if __name__ == "__main__":
    main()
