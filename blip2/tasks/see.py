"""Pictures of any source to what the language model sees of them; decoded by threads ahead of the model."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import islice, repeat
from typing import TypeVar

import torch
from torch import Tensor

from blip2.errors import ImageError
from blip2.image import Source, load_image, to_pixels
from blip2.model import Blip2, EncodedImage
from blip2.tasks.speaker import chunks

NUM_THREADS = 4
CACHE_BYTES = 4_000_000  # on two cores, a quarter faster than 16 images at a time
Seen = EncodedImage | ImageError
Images = Generator[Seen, None, None]
Result = TypeVar("Result")


class Eye:
    """A model's image half with its image settings: side in pixels, mean and deviation of each channel."""

    def __init__(self, model: Blip2, *, size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        self._model = model
        self._size = size
        self._mean = mean
        self._std = std

    def see(self, images: Sequence[Source | EncodedImage], batch_size: int) -> Images:
        """Each image encoded, in order; what cannot be read gives its ImageError in its place.

        An image that is encoded already passes through. While the model works on a batch, the next one is read;
        of those beyond nothing is in memory.
        """
        if len(images) == 1:
            yield from self._encode([lambda: self._pixels(images[0])])
            return
        pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="blip2 pictures")
        try:
            waiting: deque[list[Future]] = deque()
            for batch in chunks(images, batch_size):
                waiting.append([pool.submit(self._pixels, image) for image in batch])
                if len(waiting) > 1:
                    yield from self._encode([future.result for future in waiting.popleft()])
            for futures in waiting:
                yield from self._encode([future.result for future in futures])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _pixels(self, image: Source | EncodedImage) -> Tensor | Seen:
        """Pixels ``float[3, size, size]``, an image that is encoded already, or what is wrong with it."""
        if isinstance(image, EncodedImage):
            return image
        try:
            return to_pixels([load_image(image)], size=self._size, mean=self._mean, std=self._std)[0]
        except ImageError as error:
            return error

    def _images_at_a_time(self, device: torch.device) -> int:
        """All of a batch on a GPU; on a CPU so many that what a layer computes stays in its cache."""
        vision = self._model.vision
        tokens = vision.config.num_patches + 1
        layer_bytes = tokens * vision.config.intermediate_size * vision.position_embedding.itemsize
        return sys.maxsize if device.type != "cpu" else max(1, CACHE_BYTES // layer_bytes)

    @torch.no_grad()
    def _encode(self, loads: list[Callable[[], Tensor | Seen]]) -> list[Seen]:
        loaded = [load() for load in loads]
        fresh = [pixels_CHW for pixels_CHW in loaded if isinstance(pixels_CHW, Tensor)]
        device = self._model.vision.position_embedding.device
        # A copy each, so that who keeps one image does not keep its batch.
        prompts = (
            prompt_QD.clone()
            for some in chunks(fresh, self._images_at_a_time(device))
            for prompt_QD in self._model.encode(torch.stack(list(some)).to(device))
        )
        return [EncodedImage(next(prompts)) if isinstance(seen, Tensor) else seen for seen in loaded]


# ---- streams of images: each closes what it reads from, so that no thread goes on after an error ----------


def in_batches(
    task: Callable[[list[EncodedImage], list[str]], list[Result]], seen: Images, texts: list[str], batch_size: int
) -> Generator[Result | ImageError, None, None]:
    """The task's result for each image with its text, in order; an ImageError stays in its place."""
    with closing(seen):
        for some in chunks(texts, batch_size):
            batch = list(zip(islice(seen, len(some)), some, strict=True))
            sound = [(image, text) for image, text in batch if isinstance(image, EncodedImage)]
            results = iter(task([image for image, _ in sound], [text for _, text in sound]) if sound else [])
            for image, _ in batch:
                yield image if isinstance(image, ImageError) else next(results)


def raising(seen: Images) -> Images:
    """The images, or the first ImageError."""
    with closing(seen):
        for image in seen:
            if isinstance(image, ImageError):
                raise image
            yield image


def repeated(seen: Images, number: int) -> Images:
    """The one image there is, so many times."""
    with closing(seen):
        yield from repeat(next(seen), number)
