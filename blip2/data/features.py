"""The frozen image encoder's output on disk: computed once, read by every epoch of both stages.

Features belong to a picture's content, wherever it lies: of one that has changed they are computed again. Several
processes compute them together, each its own batches, of which the result is the same whoever computes them.
N pictures, P patches, D width, B pictures at a time.
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
from blip2.data.loader import Pictures, Sight, prefetch
from blip2.errors import ImageError, RecipeError
from blip2.finite import first_not_finite
from blip2.image import PIXELS_VERSION
from blip2.vision import VisionTransformer

Report = Callable[[int, int], None]
OnBad = Callable[[str, ImageError], None]


class Workers(Protocol):
    """The processes that compute together, see `blip2.train.group.Group`."""

    @property
    def is_first(self) -> bool: ...

    def share(self, count: int) -> range:
        """Which of so many are this process's."""

    def in_turn(self, name: str, *, is_one_enough: bool) -> AbstractContextManager[None]:
        """The first, and then all others."""

    def at_once(self, name: str) -> AbstractContextManager[Callable[[int], int]]:
        """Until all are done; gives what adds to a sum of all processes, and tells it."""


class Alone:
    """One process."""

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
    vision: VisionTransformer,
    pictures: Pictures,
    folder: Path,
    name: str,
    *,
    dtype: FeaturesDtype = "fp16",
    batch_size: int = 64,
    workers: Workers | None = None,
    report: Report | None = None,
    on_bad: OnBad | None = None,
) -> FeatureFile:
    """The features of all pictures: opened if they are there, else computed (`VisionTransformer.features`).

    These are the values before the encoder's last layer norm, which is trained. ``dtype``: how they are stored, see
    `Coding`. All ``workers`` call this together, each with its own ``vision``; ``report(done, total)`` tells of all of
    them. A picture that cannot be read is told to ``on_bad`` by its name, and its features are NaN until it has
    changed; without ``on_bad`` its ImageError is raised. Raises RecipeError if what is there belongs to another
    encoder or other pictures, if it is damaged or cannot be written, if another run is at work on it, or if the
    features do not fit into half precision.
    """
    workers = workers or Alone()
    name = name if dtype == "fp16" else f"{name}-{dtype}"
    shape = len(pictures), vision.config.num_tokens, vision.config.hidden_size
    kept = Kept(
        folder,
        name,
        {
            "shape": list(shape),
            "dtype": "float16" if dtype == "fp16" else dtype,
            "pixels": PIXELS_VERSION,
            "vision": fingerprint(vision),
            "pictures": _fingerprint_of_names(pictures),
        },
        Coding(dtype, *shape[1:]),
    )
    try:
        with ExitStack() as stack:
            with workers.in_turn(f"features {name} begin", is_one_enough=True):
                if workers.is_first:
                    stack.enter_context(disk.locked(folder / f"{name}.lock"))
                    kept.begin(pictures)
                missing = kept.missing()
            with workers.at_once(f"features {name}") as add:
                batches = _batches(missing, batch_size)
                own = [batches[number] for number in workers.share(len(batches))]
                for count in _computed(vision, pictures, kept, own, on_bad):
                    done = len(pictures) - len(missing) + add(count)
                    if report is not None:
                        report(done, len(pictures))
            with workers.in_turn(f"features {name} end", is_one_enough=True):
                if workers.is_first:
                    kept.finish()
                return kept.opened()
    except BlockingIOError:
        raise RecipeError(
            f"{folder / name}: another run computes these features; wait for its end, or name another folder as "
            "data.features"
        ) from None
    except OSError as error:
        raise RecipeError(
            f"{folder / name}: the features cannot be kept there ({error.strerror or error}); make room, or name "
            "another folder as data.features"
        ) from None


def fingerprint(vision: VisionTransformer) -> str:
    """Of the frozen weights: equal for encoders that give equal features, whatever their last layer norm."""
    digest = hashlib.sha256(repr(vision.config).encode())
    for name, value in sorted(vision.state_dict().items()):
        if not name.startswith("post_norm"):
            digest.update(name.encode())
            # Checkpoints may be stored in half precision and trained in full: equal values count.
            digest.update(value.detach().cpu().to(torch.float32).numpy().tobytes())
    return digest.hexdigest()


def _fingerprint_of_names(pictures: Pictures) -> str:
    resizing = () if pictures.resizing == ("bicubic", None) else pictures.resizing
    digest = hashlib.sha256(repr((pictures.size, pictures.mean, pictures.std, *resizing)).encode())
    digest.update("\n".join(pictures.paths).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _batches(missing: Sequence[int], size: int) -> list[list[int]]:
    """Pictures ``size * k`` to ``size * (k + 1)`` as far as they are missing; few of several are put together.

    So a batch is mostly the same one after an interruption, and its features are to the bit.
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


@torch.no_grad()
def _computed(
    vision: VisionTransformer, pictures: Pictures, kept: Kept, batches: Sequence[list[int]], on_bad: OnBad | None
) -> Iterator[int]:
    """After each batch, which is on the disk then, of how many pictures it was."""
    with closing(prefetch(lambda number: pictures.look(batches[number]), range(len(batches)), ahead=1)) as looked:
        for numbers, sights in zip(batches, looked, strict=True):
            for number, sight in zip(numbers, sights, strict=True):
                if isinstance(sight.found, ImageError):
                    if on_bad is None:
                        raise sight.found
                    on_bad(pictures.name(number), sight.found)
            kept.write(numbers, _features(vision, pictures, numbers, sights), sights)
            yield len(numbers)


@torch.no_grad()
def _features(
    vision: VisionTransformer, pictures: Pictures, numbers: Sequence[int], sights: Sequence[Sight]
) -> Tensor:
    """``float32[B, 1 + P, D]`` on the CPU, NaN for what could not be read. Raises RecipeError."""
    device, config = vision.position_embedding.device, vision.config
    features_BPD = torch.full((len(numbers), config.num_tokens, config.hidden_size), torch.nan)
    pixels = [sight.found for sight in sights if isinstance(sight.found, Tensor)]
    if not pixels:
        return features_BPD
    seen_BPD = vision.features(torch.stack(pixels).to(device)).to("cpu", torch.float32)
    if not torch.isfinite(seen_BPD.half()).all():
        if (name := first_not_finite(vision)) is not None:
            raise RecipeError(f"{name} of the image encoder is NaN or infinite; start from another model")
        raise RecipeError(
            f"the features of {pictures.name(numbers[0])} or one of the next {len(numbers) - 1} pictures do not fit "
            "into half precision; train without data.features"
        )
    features_BPD[torch.tensor([isinstance(sight.found, Tensor) for sight in sights])] = seen_BPD
    return features_BPD
