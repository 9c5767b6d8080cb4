"""How long an evaluation on VQAv2 would take here: rates that are measured on a few questions, scaled to all.

    python benchmarks/random_checkpoint.py opt-2.7b /tmp/opt-2.7b
    python benchmarks/evaluate.py [/tmp/opt-2.7b --quantize int8] [--count 16]

Without a folder: the bundled miniature. Prints seconds of the processor (one core; what others do on the machine does
not count) for an image seen and a question answered, with 5 beams and 10 tokens as the paper has them; the passes of
the image encoder that all images need in batches of 16; and seconds to score all answers. Images are drawn, and
how many questions each has is drawn from 3 to 8 (VQAv2 has 5.3 on average).
"""

from __future__ import annotations

import argparse
import random
import time

from PIL import Image

import blip2
from blip2.evaluate.compare import by_type, compared
from blip2.evaluate.examples import Example
from blip2.evaluate.prepare import packed
from blip2.tasks.defaults import BATCH_SIZE

PICTURES, QUESTIONS = 40_504, 214_354


def drawn(count: int) -> list[Image.Image]:
    chance = random.Random(0)
    return [Image.effect_noise((256, 256), chance.uniform(20, 90)).convert("RGB") for _ in range(count)]


def rates(model: str | None, quantize: str | None, count: int) -> tuple[float, float]:
    """Seconds an image and a question."""
    blip = blip2.load(model, quantize=quantize)
    blip.ask(blip.encode(drawn(1)), "how many dogs are there?", max_new_tokens=1)  # what is made once is made
    started = time.process_time()
    encoded = blip.encode(drawn(count // 4 or 1))
    see_s = (time.process_time() - started) / len(encoded)
    asked = [encoded[at % len(encoded)] for at in range(count)]
    started = time.process_time()
    blip.ask(asked, [f"what is in the picture, number {at}?" for at in range(count)], batch_size=BATCH_SIZE)
    return see_s, (time.process_time() - started) / count


def passes() -> int:
    """Of the image encoder, for all images."""
    chance = random.Random(0)
    rows = [{"image": str(at)} for at in range(PICTURES) for _ in range(chance.choice([3, 3, 4, 5, 5, 6, 6, 7, 8]))]
    images = [row["image"] for row in packed(rows)]
    return sum(len(set(images[start : start + BATCH_SIZE])) for start in range(0, len(images), BATCH_SIZE))


def scoring() -> float:
    """Seconds to compare all answers, with two rules, intervals and types."""
    chance = random.Random(0)
    words = ["yes", "no", *(f"thing {at}" for at in range(3000)), *map(str, range(30))]
    examples, said = [], []
    for at in range(QUESTIONS):
        right = chance.choice(words)
        people = tuple(right if chance.random() < 0.7 else chance.choice(words) for _ in range(10))
        examples.append(Example(str(at // 5), "?", people, True, ("yes/no", "number", "other")[at % 3], at))
        said.append(right if chance.random() < 0.6 else chance.choice(words))
    started = time.process_time()
    by_type(examples, compared(examples, said, "official", other="lavis").each)
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--quantize", choices=["int8", "int4"])
    parser.add_argument("--count", type=int, default=16, help="questions (default 16)")
    options = parser.parse_args()
    print(f"scoring {QUESTIONS:,} answers: {scoring():.1f} s")
    needed = passes()
    print(f"passes of the image encoder: {needed:,} for {PICTURES:,} pictures")
    see_s, ask_s = rates(options.model, options.quantize, options.count)
    whole_h = (needed * see_s + QUESTIONS * ask_s) / 3600
    print(f"measured: {see_s:.3f} s a picture, {ask_s:.3f} s a question")
    print(f"scaled to VQAv2 validation: {whole_h:.1f} hours of one core")


if __name__ == "__main__":
    main()
