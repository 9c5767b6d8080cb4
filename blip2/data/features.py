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
from blip2.data.reuse import Elsewhere
from blip2.errors import ImageError, RecipeError
from blip2.finite import first_not_finite
from blip2.image import PIXELS_VERSION
from blip2.model import Vision

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
    vision: Vision,
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
    """The features of all pictures: opened if they are there, else computed (`Vision.features`).

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
    header = {
        "shape": list(shape),
        "dtype": "float16" if dtype == "fp16" else dtype,
        "pixels": PIXELS_VERSION,
        "vision": fingerprint(vision),
        "settings": repr(_settings(pictures)),
        "pictures": _fingerprint_of_names(pictures),
    }
    coding = Coding(dtype, *shape[1:])
    kept = Kept(folder, name, header, coding)
    try:
        with ExitStack() as stack:
            with workers.in_turn(f"features {name} begin", is_one_enough=True):
                if workers.is_first:
                    stack.enter_context(disk.locked(folder / f"{name}.lock"))
                    kept.begin(pictures)
            with workers.at_once(f"features {name} missing"):  # nobody writes before all have looked
                missing = kept.missing()
            with workers.at_once(f"features {name}") as add:
                batches = _batches(missing, batch_size)
                own = [batches[number] for number in workers.share(len(batches))]
                if own:
                    elsewhere = Elsewhere(folder, name, header, coding.row_bytes)
                for numbers, sights in _looked_at(pictures, own, on_bad):
                    kept.write(numbers, _rows(vision, pictures, coding, elsewhere, numbers, sights), sights)
                    done = len(pictures) - len(missing) + add(len(numbers))
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


def fingerprint(vision: Vision) -> str:
    """Of the frozen weights: equal for encoders that give equal features, whatever their last layer norm."""
    digest = hashlib.sha256(repr(vision.config).encode())
    for name, value in sorted(vision.state_dict().items()):
        if not name.startswith("post_norm"):
            digest.update(name.encode())
            # Checkpoints may be stored in half precision and trained in full: equal values count.
            digest.update(value.detach().cpu().to(torch.float32).numpy().tobytes())
    return digest.hexdigest()


def _settings(pictures: Pictures) -> tuple[object, ...]:
    """How pictures become pixels."""
    resizing = () if pictures.resizing == ("bicubic", None) else pictures.resizing
    return pictures.size, pictures.mean, pictures.std, *resizing


def _fingerprint_of_names(pictures: Pictures) -> str:
    digest = hashlib.sha256(repr(_settings(pictures)).encode())
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


def _looked_at(
    pictures: Pictures, batches: Sequence[list[int]], on_bad: OnBad | None
) -> Iterator[tuple[list[int], list[Sight]]]:
    """The pictures of each batch; the next ones are read meanwhile. Raises ImageError."""
    with closing(prefetch(lambda number: pictures.look(batches[number]), range(len(batches)), ahead=1)) as looked:
        for numbers, sights in zip(batches, looked, strict=True):
            for number, sight in zip(numbers, sights, strict=True):
                if isinstance(sight.found, ImageError):
                    if on_bad is None:
                        raise sight.found
                    on_bad(pictures.name(number), sight.found)
            yield numbers, sights


@torch.no_grad()
def _rows(
    vision: Vision,
    pictures: Pictures,
    coding: Coding,
    elsewhere: Elsewhere,
    numbers: Sequence[int],
    sights: Sequence[Sight],
) -> list[bytes]:
    """What is to be stored of the pictures of a batch: NaN for what could not be read, what another set has of the same
    picture, and else what the encoder says. Raises RecipeError."""
    none_1PD = torch.full((1, coding.num_tokens, coding.width), torch.nan)
    nothing = coding.encode(none_1PD)[0].numpy().tobytes()
    rows = [elsewhere.row(each.digest) if isinstance(each.found, Tensor) else nothing for each in sights]
    new = [place for place, row in enumerate(rows) if row is None]
    if not new:
        return [row for row in rows if row is not None]
    pixels_BCHW = torch.stack([found for place in new if isinstance(found := sights[place].found, Tensor)])
    device = vision.post_norm.weight.device
    features_BPD = vision.features(pixels_BCHW.to(device)).to("cpu", torch.float32)
    if not torch.isfinite(features_BPD.half()).all():
        if (name := first_not_finite(vision)) is not None:
            raise RecipeError(f"{name} of the image encoder is NaN or infinite; start from another model")
        raise RecipeError(
            f"the features of {pictures.name(numbers[new[0]])} or one of the next {len(new) - 1} pictures do not fit "
            "into half precision; train without data.features"
        )
    for place, row_R in zip(new, coding.encode(features_BPD), strict=True):
        rows[place] = row_R.numpy().tobytes()
    return [row for row in rows if row is not None]
