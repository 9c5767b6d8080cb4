"""``preprocessor_config.json``: the image preprocessing. Reading and writing."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip2.checkpoint.bounds import AGAIN, LARGEST_IMAGE, check_value
from blip2.checkpoint.settings import read_json
from blip2.config import CLIP_MEAN, CLIP_STD, Blip2Config, MatcherConfig
from blip2.errors import CheckpointError

# Features with only one supported value: the published field, and that value.
ONLY: tuple[tuple[str, Any], ...] = (
    ("do_resize", True),
    ("do_rescale", True),
    ("do_normalize", True),
    ("do_convert_rgb", True),
    ("do_pad", False),
    ("rescale_factor", 1 / 255),
)
FILTERS = {3: "bicubic", 2: "bilinear", 1: "lanczos"}
HALVES, IMAGENET_MEAN, IMAGENET_STD = (0.5, 0.5, 0.5), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROPPED = {"do_center_crop": True, "crop_size": 224, "size": {"shortest_edge": 224}}
# Values of absent fields for the image processors of other encoders than BLIP-2's, by class.
KINDS: dict[str, dict[str, Any]] = {
    "CLIP": CROPPED,
    "Bit": CROPPED,
    "Siglip": {"image_mean": HALVES, "image_std": HALVES},
    "ViT": {"image_mean": HALVES, "image_std": HALVES, "resample": 2},
    "DINOv3ViT": {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD, "resample": 2},
}


@dataclass(frozen=True)
class ImageSettings:
    """The image preprocessing: ``size`` (side, pixels), ``mean`` and ``std`` per channel.

    ``resample`` is Pillow's filter. ``shortest_edge``: the shorter side is resized to this many pixels before the
    centre crop; None: the whole image is resized to the square. See `image.to_pixels`.
    """

    size: int = 224
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    resample: str = "bicubic"
    shortest_edge: int | None = None


def image_settings(folder: Path, config: Blip2Config | MatcherConfig | None = None) -> ImageSettings:
    """The preprocessing of the model in a folder, from ``preprocessor_config.json`` or its newer replacement.

    Raises `CheckpointError` for invalid settings, and with ``config`` for those of another model.
    """
    path, newer = folder / "preprocessor_config.json", folder / "processor_config.json"
    together = read_json(newer).get("image_processor") if newer.exists() and not path.exists() else None
    where, content = (newer, together) if isinstance(together, dict) else (path, read_json(path))
    fields = {key: value for key, value in content.items() if value is not None}
    fields = KINDS.get(_kind(fields), {}) | fields
    try:
        _check_only(fields)
        size, shortest_edge = _sizes(fields)
        settings = ImageSettings(
            size=size,
            shortest_edge=shortest_edge,
            resample=_filter(fields.get("resample", 3)),
            mean=_three("image_mean", fields.get("image_mean", CLIP_MEAN), (0, 1), CLIP_MEAN),
            std=_three("image_std", fields.get("image_std", CLIP_STD), (1e-3, 1), CLIP_STD),
        )
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from None
    if config is not None and settings.size != config.vision.image_size:
        raise CheckpointError(
            f"{where}: size is {settings.size}, but the model takes images of {config.vision.image_size} pixels "
            f"(image_size in config.json); set size to {config.vision.image_size}, or fetch the files again"
        )
    return settings


def preprocessor_json(settings: ImageSettings) -> dict[str, Any]:
    """``preprocessor_config.json``: resizing to a square (or a centre crop), scaling to 0 to 1, mean and standard
    deviation."""
    square = {"height": settings.size, "width": settings.size}
    is_cropped = settings.shortest_edge is not None
    return {
        "image_processor_type": "CLIPImageProcessor" if is_cropped else "BlipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        **({"do_center_crop": True, "crop_size": square} if is_cropped else {}),
        "size": {"shortest_edge": settings.shortest_edge} if is_cropped else square,
        "resample": next(number for number, name in FILTERS.items() if name == settings.resample),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(settings.mean),
        "image_std": list(settings.std),
    }


def _kind(fields: Mapping[str, Any]) -> str:
    """CLIPImageProcessorFast, and CLIPFeatureExtractor as it was called earlier, are of the kind CLIP."""
    name = fields.get("image_processor_type", fields.get("feature_extractor_type"))
    return re.sub(r"(ImageProcessor(Fast|Pil)?|FeatureExtractor)$", "", name) if isinstance(name, str) else ""


def _sizes(fields: Mapping[str, Any]) -> tuple[int, int | None]:
    """The side of the square, and the size of the shorter side before a centre crop, if there is one."""
    is_cropped = fields.get("do_center_crop", False)
    if not isinstance(is_cropped, bool) or (is_cropped and "crop_size" not in fields):
        raise _is_other("do_center_crop", is_cropped, "False")
    if not is_cropped:
        return _square(fields.get("size", 224)), None
    size, resized = _square(fields["crop_size"], "crop_size"), _square(fields.get("size", 224))
    is_by_edge = not isinstance(fields.get("size"), dict) or "shortest_edge" in fields["size"]
    if size > resized or not (is_by_edge or size == resized):
        raise ValueError(
            f"crop_size is {reprlib.repr(fields['crop_size'])} and size {reprlib.repr(fields.get('size'))}; size has "
            f"to have a shortest_edge of at least crop_size; {AGAIN}"
        )
    return size, resized if is_by_edge else None


def _filter(number: Any) -> str:
    if not isinstance(number, int) or isinstance(number, bool) or number not in FILTERS:
        raise _is_other("resample", number, " or ".join(map(str, FILTERS)))
    return FILTERS[number]


def _is_other(name: str, value: Any, only: str) -> ValueError:
    return ValueError(
        f"{name} is {reprlib.repr(value)}, but only {only} is supported; the model would get other images than in "
        f"training: set it to {only}, or {AGAIN}"
    )


def _check_only(content: Mapping[str, Any]) -> None:
    """Check that images are resized to a square, scaled to 0 to 1 and normalised, and nothing else."""
    for name, only in ONLY:
        value = content.get(name)
        is_near = isinstance(only, float) and isinstance(value, float) and math.isclose(value, only, rel_tol=1e-3)
        is_same = value is None or is_near or (value == only and isinstance(value, bool) == isinstance(only, bool))
        if not is_same:
            raise _is_other(name, value, f"{only!r:.8}")


def _square(size: Any, name: str = "size") -> int:
    """The side, in any of its forms: 224, or an object with height and width, or with shortest_edge."""
    sides = [size]
    if isinstance(size, dict):
        sides = [size[key] for key in ("height", "width", "shortest_edge") if size.get(key) is not None]
    for side in sides:
        check_value(name, side, 224, bounds=(1, LARGEST_IMAGE))
    if len(set(sides)) != 1:
        raise ValueError(
            f'{name} is {reprlib.repr(size)}; it should be a square like {{"height": 224, "width": 224}}; {AGAIN}'
        )
    return int(sides[0])


def _three(name: str, values: Any, bounds: tuple[float, float], like: Sequence[float]) -> tuple[float, float, float]:
    """A number for each of red, green and blue."""
    if not isinstance(values, list | tuple) or len(values) != 3:
        raise ValueError(f"{name} is {reprlib.repr(values)}; it should be three numbers, such as {list(like)}; {AGAIN}")
    red, green, blue = (float(check_value(name, value, 0.5, bounds=bounds)) for value in values)
    return red, green, blue
