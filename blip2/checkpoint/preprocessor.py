"""``preprocessor_config.json``: how pictures become pixels. Read and written."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip2.checkpoint.bounds import AGAIN, LARGEST_IMAGE, check_value
from blip2.checkpoint.settings import read_json
from blip2.config import CLIP_MEAN, CLIP_STD, Blip2Config, MatcherConfig
from blip2.errors import CheckpointError

# What is done to a picture in one way only: the published field, the value that means that way.
ONLY: tuple[tuple[str, Any], ...] = (
    ("do_resize", True),
    ("do_rescale", True),
    ("do_normalize", True),
    ("do_convert_rgb", True),
    ("do_center_crop", False),
    ("do_pad", False),
    ("resample", 3),
    ("rescale_factor", 1 / 255),
)


@dataclass(frozen=True)
class ImageSettings:
    """How pictures become pixels: ``size`` (side, pixels), ``mean`` and ``std`` per channel."""

    size: int = 224
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD


def image_settings(folder: Path, config: Blip2Config | MatcherConfig | None = None) -> ImageSettings:
    """The image settings of the model in a folder, from ``preprocessor_config.json`` or where newer ones keep it.

    Raises `CheckpointError` for settings that make no sense, and with ``config`` for those of another model.
    """
    path, newer = folder / "preprocessor_config.json", folder / "processor_config.json"
    together = read_json(newer).get("image_processor") if newer.exists() and not path.exists() else None
    where, content = (newer, together) if isinstance(together, dict) else (path, read_json(path))
    said = {key: value for key, value in content.items() if value is not None}
    try:
        _check_only(said)
        settings = ImageSettings(
            size=_square(said.get("size", 224)),
            mean=_three("image_mean", said.get("image_mean", CLIP_MEAN), (0, 1), CLIP_MEAN),
            std=_three("image_std", said.get("image_std", CLIP_STD), (1e-3, 1), CLIP_STD),
        )
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from None
    if config is not None and settings.size != config.vision.image_size:
        raise CheckpointError(
            f"{where}: size is {settings.size}, and the model sees pictures of {config.vision.image_size} pixels "
            f"(image_size in config.json); set size to {config.vision.image_size}, or fetch the files again"
        )
    return settings


def preprocessor_json(settings: ImageSettings) -> dict[str, Any]:
    """``preprocessor_config.json``: a square resize (bicubic, no crop), 0 to 1, CLIP's mean and deviation."""
    return {
        "image_processor_type": "BlipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": settings.size, "width": settings.size},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(settings.mean),
        "image_std": list(settings.std),
    }


def _check_only(content: Mapping[str, Any]) -> None:
    """Pictures are resized (bicubic) to a square, scaled to 0 to 1 and normalised; nothing else is done here."""
    for name, only in ONLY:
        value = content.get(name)
        is_near = isinstance(only, float) and isinstance(value, float) and math.isclose(value, only, rel_tol=1e-3)
        is_same = value is None or is_near or (value == only and isinstance(value, bool) == isinstance(only, bool))
        if not is_same:
            raise ValueError(
                f"{name} is {reprlib.repr(value)}, and this package only does {only!r:.8}; the model would see other "
                f"pictures than it learnt from: set it to {only!r:.8}, or {AGAIN}"
            )


def _square(size: Any) -> int:
    """The side, from any of the ways to write it: 224, or an object with height and width, or with shortest_edge."""
    sides = [size]
    if isinstance(size, dict):
        sides = [size[key] for key in ("height", "width", "shortest_edge") if size.get(key) is not None]
    for side in sides:
        check_value("size", side, 224, bounds=(1, LARGEST_IMAGE))
    if len(set(sides)) != 1:
        raise ValueError(
            f'size is {reprlib.repr(size)}; it should be like {{"height": 224, "width": 224}}, a square; {AGAIN}'
        )
    return int(sides[0])


def _three(name: str, values: Any, bounds: tuple[float, float], like: Sequence[float]) -> tuple[float, float, float]:
    """A number for each of red, green and blue."""
    if not isinstance(values, list | tuple) or len(values) != 3:
        raise ValueError(f"{name} is {reprlib.repr(values)}; it should be three numbers, such as {list(like)}; {AGAIN}")
    red, green, blue = (float(check_value(name, value, 0.5, bounds=bounds)) for value in values)
    return red, green, blue
