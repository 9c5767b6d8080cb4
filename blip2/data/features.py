"""The output of the frozen image encoder on disk: computed once, read in every epoch of both stages.

Features belong to the content of an image, wherever it is stored; if it changes, they are computed again. Several
processes divide the batches, and the result does not depend on the division. N images, P patches, D width, B images at
a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from blip2 import disk
from blip2.data.coding import Coding, FeaturesDtype
from blip2.data.kept import FeatureFile, Kept
from blip2.data.loader import LoadedImage, RowImages, prefetch
from blip2.data.reuse import Elsewhere
from blip2.errors import ImageError, RecipeError
from blip2.finite import first_not_finite
from blip2.image import PIXELS_VERSION
from blip2.model import Vision

Report = Callable[[int, int], None]
OnBad = Callable[[str, ImageError], None]


class Workers(Protocol):
    """The processes that compute features together, see `blip2.train.group.Group`."""

    @property
    def is_first(self) -> bool: ...

    def share(self, count: int) -> range:
        """The share of ``count`` items that this process has."""

    def in_turn(self, name: str, *, is_one_enough: bool) -> AbstractContextManager[None]:
        """The first process, then all others."""

    def at_once(self, name: str) -> AbstractContextManager[Callable[[int], int]]:
        """Until all are done. Yields a function that adds to a sum over all processes and returns it."""


class SingleProcess:
    """A single process."""

    is_first = True

    def share(self, count: int) -> range:
        return range(count)

    def in_turn(self, name: str, *, is_one_enough: bool) -> AbstractContextManager[None]:
        return nullcontext()

    @contextmanager
    def at_once(self, name: str) -> Iterator[Callable[[int], int]]:
        total = 0

        def add(number: int) -> int:
            nonlocal total
            total += number
            return total

        yield add


def frozen_features(
    vision: Vision,
    row_images: RowImages,
    folder: Path,
    name: str,
    *,
    dtype: FeaturesDtype = "fp16",
    batch_size: int = 64,
    workers: Workers | None = None,
    report: Report | None = None,
    on_bad: OnBad | None = None,
) -> FeatureFile:
    """Open the features of all images, or compute them (`Vision.features`).

    They are the values before the encoder's last layer norm, which is trained. ``dtype``: how they are stored, see
    `Coding`. All ``workers`` call this together, each with its own ``vision``; ``report(done, total)`` counts over all
    of them. ``on_bad`` receives the name and error of each unreadable image, whose features are NaN until it changes;
    without ``on_bad`` its ImageError is raised. Raises RecipeError if existing features belong to another encoder or
    other images, if they are damaged or cannot be written, if another run is computing them, or if the features do not
    fit into half precision.
    """
    workers = workers or SingleProcess()
    name = name if dtype == "fp16" else f"{name}-{dtype}"
    shape = len(row_images), vision.config.num_tokens, vision.config.hidden_size
    header = {
        "shape": list(shape),
        "dtype": "float16" if dtype == "fp16" else dtype,
        "pixels": PIXELS_VERSION,
        "vision": fingerprint(vision),
        "settings": repr(_settings(row_images)),
        "pictures": _fingerprint_of_names(row_images),
    }
    coding = Coding(dtype, *shape[1:])
    kept = Kept(folder, name, header, coding)
    try:
        with ExitStack() as stack:
            with workers.in_turn(f"features {name} begin", is_one_enough=True):
                if workers.is_first:
                    stack.enter_context(disk.locked(folder / f"{name}.lock"))
                    kept.begin(row_images)
            with workers.at_once(f"features {name} missing"):  # nobody writes before all have read
                missing = kept.missing()
            with workers.at_once(f"features {name}") as add:
                batches = _batches(missing, batch_size)
                own = [batches[number] for number in workers.share(len(batches))]
                if own:
                    elsewhere = Elsewhere(folder, name, header, coding.row_bytes)
                for numbers, images in _loaded(row_images, own, on_bad):
                    kept.write(numbers, _rows(vision, row_images, coding, elsewhere, numbers, images), images)
                    done = len(row_images) - len(missing) + add(len(numbers))
                    if report is not None:
                        report(done, len(row_images))
            with workers.in_turn(f"features {name} end", is_one_enough=True):
                if workers.is_first:
                    kept.finish()
                return kept.opened()
    except BlockingIOError:
        raise RecipeError(
            f"{folder / name}: another run is computing these features; wait until it ends, or name another folder as "
            "data.features"
        ) from None
    except OSError as error:
        raise RecipeError(
            f"{folder / name}: the features cannot be written ({error.strerror or error}); free some space, or name "
            "another folder as data.features"
        ) from None


def fingerprint(vision: Vision) -> str:
    """Hash of the frozen weights: equal for encoders that give equal features, whatever their last layer norm."""
    digest = hashlib.sha256(repr(vision.config).encode())
    for name, value in sorted(vision.state_dict().items()):
        if not name.startswith("post_norm"):
            digest.update(name.encode())
            # The same weights may be stored in half precision or in float32: only their values count.
            digest.update(value.detach().cpu().to(torch.float32).numpy().tobytes())
    return digest.hexdigest()


def _settings(images: RowImages) -> tuple[object, ...]:
    """The image preprocessing."""
    resizing = () if images.resizing == ("bicubic", None) else images.resizing
    return images.size, images.mean, images.std, *resizing


def _fingerprint_of_names(images: RowImages) -> str:
    digest = hashlib.sha256(repr(_settings(images)).encode())
    digest.update("\n".join(images.paths).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _batches(missing: Sequence[int], size: int) -> list[list[int]]:
    """Batches of images ``size * k`` to ``size * (k + 1)``, without those that exist already; small batches are merged.

    Batches after an interruption are therefore mostly the same, and their features identical.
    """
    blocks: dict[int, list[int]] = {}
    for number in missing:
        blocks.setdefault(number // size, []).append(number)
    batches: list[list[int]] = []
    for block in blocks.values():
        if batches and len(batches[-1]) + len(block) <= size:
            batches[-1] += block
        else:
            batches.append(block)
    return batches


def _loaded(
    row_images: RowImages, batches: Sequence[list[int]], on_bad: OnBad | None
) -> Iterator[tuple[list[int], list[LoadedImage]]]:
    """Load the images of each batch, and the next batch meanwhile. Raises ImageError."""
    with closing(prefetch(lambda number: row_images.load(batches[number]), range(len(batches)), ahead=1)) as loaded:
        for numbers, images in zip(batches, loaded, strict=True):
            for number, image in zip(numbers, images, strict=True):
                if isinstance(image.pixels, ImageError):
                    if on_bad is None:
                        raise image.pixels
                    on_bad(row_images.name(number), image.pixels)
            yield numbers, images


@torch.no_grad()
def _rows(
    vision: Vision,
    row_images: RowImages,
    coding: Coding,
    elsewhere: Elsewhere,
    numbers: Sequence[int],
    images: Sequence[LoadedImage],
) -> list[bytes]:
    """The stored features of a batch: NaN for an unreadable image, those of another set for an image that it has, else
    the output of the encoder. Raises RecipeError."""
    none_1PD = torch.full((1, coding.num_tokens, coding.width), torch.nan)
    nothing = coding.encode(none_1PD)[0].numpy().tobytes()
    rows = [elsewhere.row(each.digest) if isinstance(each.pixels, Tensor) else nothing for each in images]
    new = [place for place, row in enumerate(rows) if row is None]
    if not new:
        return [row for row in rows if row is not None]
    pixels_BCHW = torch.stack([found for place in new if isinstance(found := images[place].pixels, Tensor)])
    device = vision.post_norm.weight.device
    features_BPD = vision.features(pixels_BCHW.to(device)).to("cpu", torch.float32)
    if not torch.isfinite(features_BPD.half()).all():
        if (name := first_not_finite(vision)) is not None:
            raise RecipeError(f"{name} of the image encoder is NaN or infinite; start from another model")
        raise RecipeError(
            f"the features of {row_images.name(numbers[new[0]])} or one of the next {len(new) - 1} images overflow in "
            "half precision; train without data.features"
        )
    for place, row_R in zip(new, coding.encode(features_BPD), strict=True):
        rows[place] = row_R.numpy().tobytes()
    return [row for row in rows if row is not None]
