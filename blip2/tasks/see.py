"""Images of any source to what a model keeps of them; decoded by threads ahead of the model."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import islice, repeat
from typing import Any, Generic, Literal, TypeVar, cast

import torch
from torch import Tensor

from blip2 import threads
from blip2.errors import ImageError, ImageNotFiniteError, NotFiniteError, OptionError
from blip2.finite import overflow
from blip2.image import DEFAULT_READING, Reading, RgbImage, Source, name_of, seen_box
from blip2.model import Vision
from blip2.tasks.speaker import check_batch_size, chunks

NUM_THREADS, MOST_THREADS = 4, 16
"""Threads that read images: for a model on a CPU, and at most for one on a GPU, which is faster than a few threads."""
CACHE_BYTES = 4_000_000  # on two cores a quarter faster than batches of 16 images
OnError = Literal["raise", "return"]
Result = TypeVar("Result")
Kept = TypeVar("Kept")
"""What a model keeps of an image: an `EncodedImage`, or `ImageFeatures`."""


class ImageFrontend(Generic[Kept]):
    """The image half of a model with its image settings: size in pixels, mean and standard deviation per channel, and
    the way of resizing (see `image.to_pixels`).

    ``encode``: pixels float[B, 3, size, size] on the image encoder's device to what is kept of each, of type ``kind``,
    without NaN or infinite values. ``damage``: names faulty weights, only called if there are such values. ``reading``:
    limits for reading images.
    """

    def __init__(
        self,
        vision: Vision,
        encode: Callable[[Tensor], Iterable[Kept]],
        kind: type[Kept],
        *,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        resample: str = "bicubic",
        shortest_edge: int | None = None,
        damage: Callable[[], str | None] = lambda: None,
        reading: Reading = DEFAULT_READING,
    ) -> None:
        self.reading = reading
        self.look: dict[str, Any] = {"size": size, "mean": tuple(mean), "std": tuple(std)}
        """Options of `image.to_pixels` that differ from the defaults."""
        if resample != "bicubic":
            self.look["resample"] = resample
        if shortest_edge is not None:
            self.look["shortest_edge"] = shortest_edge
        self._vision = vision
        self._damage = damage
        self._num_threads = threads.num_useful(vision)
        self._encode_pixels = encode
        self._kind = kind
        self.size = size

    @property
    def normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation per channel, as a part of the preprocessing's identity."""
        return self.look["mean"], self.look["std"]

    def see(self, images: Iterable[Source | Kept], batch_size: int) -> Generator[Kept | ImageError, None, None]:
        """Each image encoded, in order; an unreadable one gives its ImageError in its place.

        Encoded images pass through. While the model processes a batch, the next one is read; nothing beyond that is in
        memory.
        """
        if isinstance(images, Sequence) and len(images) == 1:
            yield from self._encode(images, [lambda: self._pixels(images[0])])
            return
        yield from self.see_batches(chunks(images, batch_size))

    def see_batches(
        self, batches: Iterable[Sequence[Source | Kept]]
    ) -> Generator[Kept | ImageError, None, None]:
        """As `see`, for given batches, which are read and encoded as they are."""
        pool = ThreadPoolExecutor(self._num_readers, thread_name_prefix="blip2 images")
        try:
            waiting: deque[tuple[Sequence[Source | Kept], list[Future]]] = deque()
            for batch in batches:
                waiting.append((batch, [pool.submit(self._pixels, image) for image in batch]))
                if len(waiting) > 1:
                    batch, futures = waiting.popleft()
                    yield from self._encode(batch, [future.result for future in futures])
            for batch, futures in waiting:
                yield from self._encode(batch, [future.result for future in futures])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    @property
    def _num_readers(self) -> int:
        is_on_cpu = self._vision.patch_embedding.weight.device.type == "cpu"
        return NUM_THREADS if is_on_cpu else min(max(NUM_THREADS, os.cpu_count() or 1), MOST_THREADS)

    @torch.no_grad()
    def with_blank(self, pixels_CHW: Tensor, patches_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Patches ``float[1 + P, D]`` of an image and of a blank one in the mean colour."""
        pixels_2CHW = torch.stack([pixels_CHW, torch.zeros_like(pixels_CHW)])
        patches_PD, blank_PD = patches_of(pixels_2CHW.to(self._vision.patch_embedding.weight.device))
        return patches_PD, blank_PD

    def box(self, image: RgbImage) -> tuple[float, float, float, float] | None:
        """The part of an image that the model gets, as in `image.seen_box`; None is all of it."""
        return seen_box(*image.size, self.size, self.look.get("shortest_edge"))

    def pixels(self, image: Source) -> Tensor:
        """The image encoder's input for an image: ``float[3, size, size]`` on the CPU. Raises ImageError."""
        return self.reading.pixels(image, **self.look)

    def encode(self, pixels: Sequence[Tensor], names: Sequence[str] = ()) -> list[Kept | ImageNotFiniteError]:
        """What is kept of images read by `pixels`, in order. ``names``: for error messages.

        An image for which the model computes NaN or infinite numbers gives an error in its place. Raises NotFiniteError
        if the model's weights are the cause.
        """
        return list(self._each_encoded(pixels, names or ["the image"] * len(pixels)))

    def _each_encoded(self, pixels: Sequence[Tensor], names: Sequence[str]) -> Iterator[Kept | ImageNotFiniteError]:
        """As `encode`, yielding one by one, so that the caller can keep each however slow the next is."""
        device = self._vision.patch_embedding.weight.device
        at_a_time = self.images_at_a_time
        for some, called in zip(chunks(pixels, at_a_time), chunks(names, at_a_time), strict=True):
            with threads.at_most(self._num_threads), torch.no_grad():
                seen = list(self._encode_pixels(torch.stack(list(some)).to(device)))
            for name, kept, is_sound in zip(called, seen, are_finite(seen), strict=True):
                yield kept if is_sound else self._not_finite(name)

    def _not_finite(self, name: str) -> ImageNotFiniteError:
        """The error for an image with non-finite features. Raises NotFiniteError if the model is the cause."""
        what = "its features are NaN or infinite"
        if (damage := self._damage()) is not None:
            raise NotFiniteError(f"{name}: {what}: {damage}")
        return ImageNotFiniteError(f"{name}: {what}: {overflow(self._vision.patch_embedding.weight.dtype)}")

    def _pixels(self, image: Source | Kept) -> Tensor | Kept | ImageError:
        """Pixels ``float[3, size, size]``, an encoded image, or the error."""
        if isinstance(image, self._kind):
            return image
        try:
            return self.pixels(cast("Source", image))
        except ImageError as error:
            return error

    @property
    def images_at_a_time(self) -> int:
        """The whole batch on a GPU; on a CPU as many as keep a layer's activations in the cache."""
        config, device = self._vision.config, self._vision.patch_embedding.weight.device
        layer_bytes = (config.num_patches + 1) * config.intermediate_size * self._vision.patch_embedding.weight.itemsize
        return sys.maxsize if device.type != "cpu" else max(1, CACHE_BYTES // layer_bytes)

    def _encode(
        self, images: Sequence[Source | Kept], loads: list[Callable[[], Tensor | Kept | ImageError]]
    ) -> Iterator[Kept | ImageError]:
        loaded = [load() for load in loads]
        new = [
            (pixels_CHW, name_of(image))
            for pixels_CHW, image in zip(loaded, images, strict=True)
            if isinstance(pixels_CHW, Tensor)
        ]
        kept = self._each_encoded([pixels_CHW for pixels_CHW, _ in new], [name for _, name in new])
        return (next(kept) if isinstance(seen, Tensor) else seen for seen in loaded)


def are_finite(seen: Sequence[Any]) -> list[bool]:
    """Whether each of some dataclasses of tensors has only finite values. Waits for a GPU once."""
    each = [[value for value in vars(kept).values() if isinstance(value, Tensor)] for kept in seen]
    if not each:
        return []
    return torch.stack([torch.stack([value.isfinite().all() for value in values]).all() for values in each]).tolist()


# ---- streams of images: each closes its source, so that no thread continues after an error ----------

Seen = Generator[Kept | ImageError, None, None]


def in_batches(
    task: Callable[[list[Kept], list[str]], list[Result]], seen: Seen[Kept], texts: list[str], batch_size: int
) -> Generator[Result | ImageError, None, None]:
    """The task's result for each image with its text, in order; an ImageError stays in its place."""
    with closing(seen):
        for some in chunks(texts, batch_size):
            batch = list(zip(islice(seen, len(some)), some, strict=True))
            sound = [(image, text) for image, text in batch if not isinstance(image, ImageError)]
            results = iter(task([image for image, _ in sound], [text for _, text in sound]) if sound else [])
            for image, _ in batch:
                yield image if isinstance(image, ImageError) else next(results)


def checked(
    see: Callable[[Sequence[Any], int], Seen[Kept]], images: Sequence[Any], on_error: OnError, batch_size: int
) -> Seen[Kept]:
    """The images, with errors handled as ``on_error`` says. OptionError at once for an invalid value."""
    check_batch_size(batch_size)
    if on_error not in ("raise", "return"):
        raise OptionError(f"on_error is {on_error!r}; use 'raise' or 'return'")
    seen = see(images, batch_size)
    return seen if on_error == "return" else raising(seen)


def raising(seen: Seen[Kept]) -> Generator[Kept, None, None]:
    """The images, or the first ImageError."""
    with closing(seen):
        for image in seen:
            if isinstance(image, ImageError):
                raise image
            yield image


def repeated(seen: Seen[Kept], number: int) -> Seen[Kept]:
    """The only image, ``number`` times."""
    with closing(seen):
        yield from repeat(next(seen), number)
