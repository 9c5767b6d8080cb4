"""The image encoder alone: images a second in bfloat16 and in 8 bits, beside `transformers`, and what 8 bits change.

    python benchmarks/random_checkpoint.py itm-vit-g /tmp/itm-vit-g        # EVA-CLIP g/14 without a language model
    python benchmarks/images.py /tmp/itm-vit-g [--sides transformers,bfloat16,int8] [--at-once 16,64] [--rounds 3]

A side is `transformers` (bfloat16, its image encoder and Q-Former as they are called there), a precision of ours, or
`int8`: ours with the image encoder in 8 bits, the rest in bfloat16. All are in one process and take turns, round by
round; each encodes the same decoded images, from pixels to query vectors.

Prints the seconds to load and the bytes of the image encoder, and for each number of images at once the medians of
the rounds in images a second, and how many times those of the other sides: by the clock, and by the processors'
time, which tells more where other programs are busy (with ``--threads 1``, most). With ``--exact`` also how far the
query vectors are from those of our float32 (another model in memory): the length of the difference over that of the
vectors, for all of them and for the worst image. The images are noise in large squares and the weights of such a
checkpoint random: the error says what rounding costs there, not what a trained model loses.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

import blip2

Encode = Callable[[list[Tensor]], Tensor]


def pictures(number: int) -> list[Image.Image]:
    squares = np.random.default_rng(0).integers(0, 256, (number, 8, 8, 3), "uint8")
    return [Image.fromarray(picture.repeat(60, 0).repeat(60, 1)) for picture in squares]


def ours(folder: str, side: str) -> tuple[nn.Module, Any]:
    """The model and its image frontend."""
    keywords = {"dtype": "bfloat16", "vision": "int8"} if side == "int8" else {"dtype": side}
    loaded = blip2.load(folder, device="cpu", **keywords)
    return loaded.model if hasattr(loaded, "model") else loaded.speaker.model, loaded.frontend


def reference(folder: str) -> tuple[nn.Module, Encode]:
    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype=torch.bfloat16).eval()

    def encode(pixels: list[Tensor]) -> Tensor:
        patches = model.vision_model(pixel_values=torch.stack(pixels).bfloat16()).last_hidden_state
        queries = model.query_tokens.expand(len(patches), -1, -1)
        return model.qformer(query_embeds=queries, encoder_hidden_states=patches).last_hidden_state

    return model.vision_model, encode


def size(module: nn.Module) -> float:
    """GB of weights."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", help="of a checkpoint")
    parser.add_argument("--sides", default="transformers,bfloat16,int8")
    parser.add_argument("--at-once", default="16,64", help="pictures")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--exact", type=int, default=0, metavar="PICTURES", help="compare so many with float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    numbers = [int(number) for number in args.at_once.split(",")]
    encoders: dict[str, Encode] = {}
    pixels: list[Tensor] = []
    for side in args.sides.split(",") + ["float32"] * bool(args.exact):
        started = time.perf_counter()
        if side == "transformers":
            vision, encoders[side] = reference(args.folder)
        else:
            model, frontend = ours(args.folder, side)
            vision = model.vision
            # As a batch of a collection is seen: so many images at a time as suit the processor.
            encoders[side] = encoder_of(model, frontend)
            pixels = pixels or [frontend.pixels(picture) for picture in pictures(max(*numbers, args.exact))]
        taken_s = time.perf_counter() - started
        print(f"{side}: loaded in {taken_s:.1f} s, image encoder {size(vision):.2f} GB", flush=True)
    with torch.inference_mode():
        if args.exact:
            compare(encoders, pixels[: args.exact])
            del encoders["float32"]
        for number in numbers:
            measure(encoders, pixels[:number], args.rounds)


def encoder_of(model: Any, frontend: Any) -> Encode:
    def encode(pixels: list[Tensor]) -> Tensor:
        at_a_time = frontend.images_at_a_time
        some = [torch.stack(pixels[start : start + at_a_time]) for start in range(0, len(pixels), at_a_time)]
        patches = (model.vision(each).to(model.qformer.query_tokens.dtype) for each in some)
        return torch.cat([model.qformer(image_BPD=each).hidden_BSD for each in patches])

    return encode


def compare(encoders: dict[str, Encode], pixels: list[Tensor]) -> None:
    exact = encoders["float32"](pixels)
    for side, encode in encoders.items():
        difference = encode(pixels).float() - exact
        worst = (difference.flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)).max()
        print(f"{side}: query vectors off by {100 * difference.norm() / exact.norm():.2f} %, of the worst of "
              f"{len(pixels)} pictures {100 * worst:.2f} %", flush=True)  # fmt: skip


def measure(encoders: dict[str, Encode], pixels: list[Tensor], rounds: int) -> None:
    samples: dict[str, dict[str, list[float]]] = {"the clock": {}, "processors' time": {}}
    for _ in range(rounds):
        for side, encode in encoders.items():
            started = time.perf_counter(), time.process_time()
            encode(pixels)
            ended = time.perf_counter(), time.process_time()
            for by_side, before, after in zip(samples.values(), started, ended, strict=True):
                by_side.setdefault(side, []).append(len(pixels) / (after - before))
    for what, by_side in samples.items():
        rates = {side: statistics.median(found) for side, found in by_side.items()}
        for side, rate in rates.items():
            times = [f"{rate / rates[other]:.2f} x {other}" for other in rates if other != side]
            print(f"{len(pixels)} at once, by {what}, {side}: {rate:.3f} pictures/s [{min(by_side[side]):.3f} to "
                  f"{max(by_side[side]):.3f}], {', '.join(times)}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
