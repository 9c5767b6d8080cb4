"""``BlipImageProcessor``: images to ``pixel_values``, in steps, each of which may be left out.

image     path, URL, bytes, PIL image        image.load_image   upright, on white          uint8[H, W, 3]
          array or tensor, either layout                        as it is, grey repeated    uint8 or float[H, W, 3]
resize    to the model's size, by Pillow, on 8 bits
rescale   times 1/255
normalize minus the mean, divided by the standard deviation
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from blip2 import checkpoint
from blip2.checkpoint import ImageSettings
from blip2.checkpoint.preprocessor import FILTERS
from blip2.checkpoint.settings import read_json
from blip2.compat.loading import check_names, find_folder
from blip2.compat.records import BatchFeature
from blip2.disk import write_text
from blip2.errors import CheckpointError, ImageError, OptionError
from blip2.image import Source, load_image

BICUBIC = 3  # Pillow's number
LARGEST = 2**14  # pixels of a side; more than any image encoder
STEPS = ("do_resize", "size", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
USUAL = (
    ("do_resize", True),
    ("resample", BICUBIC),
    ("do_rescale", True),
    ("rescale_factor", 1 / 255),
    ("do_normalize", True),
)
# No effect: images are always RGB, on the CPU, channels first; padding sizes do not matter.
WITHOUT_EFFECT = (
    "do_convert_rgb", "device", "disable_grouping", "default_to_square", "image_seq_length", "use_fast",
    "crop_size", "pad_size",
)  # fmt: skip
# Not supported; values that switch it off are accepted.
NOT_DONE = ("do_center_crop", "do_pad")
ARGUMENTS = (*STEPS, *WITHOUT_EFFECT, *NOT_DONE, "input_data_format", "data_format")
LAYOUTS = ("channels_first", "channels_last", None)


def _files(folder: Path) -> tuple[Path, Path]:
    return folder / "preprocessor_config.json", folder / "processor_config.json"


def preprocessor_in(folder: Path) -> dict[str, Any] | None:
    """The image processor settings in a model's files; None if there are none."""
    path, newer = _files(folder)
    if path.exists():
        return read_json(path)
    content = read_json(newer).get("image_processor") if newer.exists() else None
    return content if isinstance(content, dict) else None


class BlipImageProcessor:
    """The preprocessing of images; its attributes may be set at any time."""

    model_input_names = ("pixel_values",)

    def __init__(self, settings: ImageSettings | None = None, **steps: Any) -> None:
        settings = settings or ImageSettings(size=384)
        self.do_resize = True
        square = {"height": settings.size, "width": settings.size}
        self.do_center_crop = settings.shortest_edge is not None  # decided by the image encoder's family; cannot be set
        self.crop_size = square if self.do_center_crop else None
        self.size: Any = {"shortest_edge": settings.shortest_edge} if self.do_center_crop else square
        self.resample = next(number for number, name in FILTERS.items() if name == settings.resample)
        self.do_rescale = True
        self.rescale_factor = 1 / 255
        self.do_normalize = True
        self.image_mean: Any = settings.mean
        self.image_std: Any = settings.std
        self.do_convert_rgb = True
        for name, value in self._checked(steps).items():
            if value is not None and name in STEPS:
                setattr(self, name, value)
        self.size = _size(self.size)
        self._check()

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> BlipImageProcessor:
        """The image processor of a model's folder or on the hub; steps may be given beside ``revision`` and the
        like."""
        steps = {each: options.pop(each) for each in ARGUMENTS if each in options and each != "use_fast"}
        return cls.from_folder(find_folder(name, options), **steps)

    @classmethod
    def from_folder(cls, folder: Path, **steps: Any) -> BlipImageProcessor:
        """The image processor of the model in a folder. Raises CheckpointError for a missing or invalid file."""
        content = preprocessor_in(folder)
        size = content.get("size") if isinstance(content, dict) else None
        if isinstance(content, dict) and content.get("do_center_crop"):
            return cls(checkpoint.image_settings(folder), **steps)
        is_square = not isinstance(size, dict) or size.get("height") == size.get("width")
        if not isinstance(content, dict) or (is_square and all(content.get(key, each) == each for key, each in USUAL)):
            return cls(checkpoint.image_settings(folder), **steps)
        try:
            return cls.from_dict(content, **steps)  # saved with changed settings
        except OptionError as error:
            path = next(path for path in _files(folder) if path.exists())
            raise CheckpointError(f"{path}: {error}") from None

    @classmethod
    def of(cls, image_processor: Any) -> BlipImageProcessor:
        """Convert an image processor of this class or of transformers."""
        if isinstance(image_processor, cls):
            return image_processor
        if not hasattr(image_processor, "image_mean"):
            raise OptionError(f"image_processor is a {type(image_processor).__name__}; give a BlipImageProcessor")
        return cls.from_dict(image_processor.to_dict())

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], **steps: Any) -> BlipImageProcessor:
        """From the content of ``preprocessor_config.json``; ``steps`` take precedence."""
        held = {name: content[name] for name in (*STEPS, *NOT_DONE) if content.get(name) is not None}
        return cls(**held | steps)

    def __call__(
        self,
        images: Source | Sequence[Source],
        *,
        return_tensors: Literal["pt", "np"] | None = None,
        **steps: Any,
    ) -> BatchFeature:
        """``pixel_values`` float32[N, 3, height, width] of one or more images; without ``return_tensors`` a list.

        ``steps`` for this call: do_resize, size, resample, do_rescale, rescale_factor, do_normalize, image_mean,
        image_std. ``input_data_format`` says where an array's channels are ("channels_first", "channels_last").

        Raises ImageError for an unreadable image, OptionError for an unsupported option.
        """
        given = {name: value for name, value in self._checked(steps).items() if value is not None}
        chosen = {name: getattr(self, name) for name in STEPS} | given
        flat_images = _flat(images)
        if not flat_images:
            raise OptionError("the list of images is empty; give at least one, or leave images out")
        arrays = [self._pixels(image, chosen, steps.get("input_data_format")) for image in flat_images]
        if return_tensors is not None and len({array.shape for array in arrays}) > 1:
            sizes = sorted({f"{array.shape[2]}x{array.shape[1]}" for array in arrays})
            raise OptionError(f"the images are {', '.join(sizes)}, which cannot be stacked; leave do_resize=True")
        if return_tensors is None:
            return BatchFeature(pixel_values=arrays)
        array = np.stack(arrays)
        return BatchFeature(pixel_values=torch.from_numpy(array) if return_tensors == "pt" else array)

    preprocess = __call__

    def to_dict(self) -> dict[str, Any]:
        """The content of ``preprocessor_config.json``."""
        values = {name: getattr(self, name) for name in ("do_convert_rgb", *STEPS)}
        if self.do_center_crop:
            values |= {"do_center_crop": True, "crop_size": self.crop_size}
        lists = {name: list(each) for name, each in values.items() if isinstance(each, tuple)}
        kind = "CLIPImageProcessor" if self.do_center_crop else "BlipImageProcessor"
        return {"image_processor_type": kind, **values, **lists}

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``preprocessor_config.json``."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_text(Path(folder) / "preprocessor_config.json", self.to_json_string())

    def __repr__(self) -> str:
        return f"BlipImageProcessor {self.to_json_string()}"

    def _check(self) -> None:
        """OptionError for an invalid setting."""
        for name in ("do_resize", "do_rescale", "do_normalize"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name} is {getattr(self, name)!r}; use True or False")
        if self.resample is not None and self.resample not in range(6):
            raise OptionError(f"resample is {self.resample!r}; give Pillow's number of a filter, such as 3, bicubic")
        if not isinstance(self.rescale_factor, int | float) or not math.isfinite(self.rescale_factor):
            raise OptionError(f"rescale_factor is {self.rescale_factor!r}; give a number, such as 1 / 255")
        _per_channel("image_mean", self.image_mean, np.float64)
        if not (_per_channel("image_std", self.image_std, np.float64) > 0).all():
            raise OptionError(f"image_std is {self.image_std!r}; a standard deviation is above 0")

    def _checked(self, steps: Mapping[str, Any]) -> dict[str, Any]:
        """The steps that have an effect."""
        check_names("the image processor", steps, ARGUMENTS)
        for name in NOT_DONE:
            if steps.get(name):
                raise OptionError(f"{name} is {steps[name]!r}; images are always resized as a whole, leave it out")
        where = steps.get("input_data_format")
        if where not in LAYOUTS or steps.get("data_format") not in ("channels_first", None):
            raise OptionError(
                f"input_data_format is {where!r}, data_format {steps.get('data_format')!r}; the former has to be "
                "'channels_first' or 'channels_last', pixel_values are always 'channels_first'"
            )
        return {name: value for name, value in steps.items() if name in STEPS}

    def _pixels(self, image: Any, chosen: Mapping[str, Any], layout: str | None) -> np.ndarray:
        """One image, step by step, as ``[3, height, width]``."""
        if isinstance(image, np.ndarray | Tensor):
            array_HWC = _rgb(_channels_last(image, layout))
        else:
            array_HWC = np.asarray(load_image(image))
        if chosen["do_rescale"] and not _is_whole(array_HWC) and array_HWC.max() <= 1:
            warnings.warn(
                "the image's values are already 0 to 1, and are scaled again; pass do_rescale=False", stacklevel=4
            )
        if chosen["do_resize"]:
            array_HWC = _resized(array_HWC, _size(chosen["size"]), chosen["resample"])
            if self.crop_size is not None:
                array_HWC = _middle(array_HWC, self.crop_size["height"])
        if chosen["do_rescale"]:
            array_HWC = (array_HWC.astype(np.float64) * chosen["rescale_factor"]).astype(np.float32)
        if chosen["do_normalize"]:
            if not np.issubdtype(array_HWC.dtype, np.floating):
                array_HWC = array_HWC.astype(np.float32)
            mean_C, std_C = (_per_channel(name, chosen[name], array_HWC.dtype) for name in ("image_mean", "image_std"))
            array_HWC = (array_HWC - mean_C) / std_C
        return np.ascontiguousarray(np.moveaxis(array_HWC, -1, 0))


def _flat(images: Any) -> list[Any]:
    """A flat list of images, from a list, a tuple, nested lists, or an array with one more dimension than an image."""
    if isinstance(images, list | tuple):
        return [each for some in images for each in _flat(some)]
    if isinstance(images, np.ndarray | Tensor) and images.ndim == 4:
        return list(images)
    return [images]


def _channels_last(image: np.ndarray | Tensor, layout: str | None) -> np.ndarray:
    """An array or tensor as ``[H, W, 1 | 3 | 4]``; if both ends could be channels, the first one is."""
    array = image.numpy(force=True) if isinstance(image, Tensor) else image
    name = f"{type(image).__name__} {image.dtype}{list(image.shape)}"
    if array.size == 0:
        raise ImageError(f"{name}: has no pixels; give an image of at least 1x1")
    if array.dtype == np.bool_ or not np.issubdtype(array.dtype, np.number):
        raise ImageError(f"{name}: not pixels; give integers of 0 to 255, or floats of 0 to 1")
    if array.ndim == 2:
        return array[:, :, None]
    if array.ndim == 3 and layout != "channels_last" and array.shape[0] in (1, 3, 4):
        return np.moveaxis(array, 0, -1)
    if array.ndim == 3 and layout != "channels_first" and array.shape[2] in (1, 3, 4):
        return array
    raise ImageError(f"{name}: not one image, which is [H, W], [1 | 3 | 4, H, W] or [H, W, 1 | 3 | 4]")


def _rgb(array_HWC: np.ndarray) -> np.ndarray:
    """Grey is repeated, transparency is put on white."""
    channels = array_HWC.shape[-1]
    if channels == 1:
        return np.repeat(array_HWC, 3, axis=-1)
    if channels == 3:
        return array_HWC
    is_float = np.issubdtype(array_HWC.dtype, np.floating)
    white = 1.0 if is_float else 255
    if is_float and not (array_HWC.min() >= 0 and array_HWC.max() <= 1):
        raise ImageError(f"an image of floats with transparency holds {_range(array_HWC)}; give values of 0 to 1")
    alpha = array_HWC[..., 3:] / white
    flat = alpha * array_HWC[..., :3] + (1 - alpha) * white
    return (flat if is_float else np.round(flat)).astype(array_HWC.dtype)


def _resized(array_HWC: np.ndarray, size: Mapping[str, int], resample: Any) -> np.ndarray:
    """With Pillow, on 8 bits; floats of 0 to 1 are converted and back."""
    is_scaled = not _is_whole(array_HWC)
    if not (array_HWC.min() >= 0 and array_HWC.max() <= (1 if is_scaled else 255)):
        raise ImageError(
            f"the image's values are {_range(array_HWC)}; give integers of 0 to 255, or floats of 0 to 1, "
            "or pass do_resize=False"
        )
    if is_scaled:
        array_HWC = (array_HWC.astype(np.float64) * 255).astype(np.float32)
    height, width = _target(array_HWC.shape[:2], size)
    image = load_image(np.ascontiguousarray(array_HWC.astype(np.uint8)))
    resized = np.asarray(image.resize((width, height), 2 if resample is None else int(resample)))
    return (resized.astype(np.float64) * (1 / 255)).astype(np.float32) if is_scaled else resized


def _middle(array_HWC: np.ndarray, side: int) -> np.ndarray:
    """The square in the middle of an image that is at least as large."""
    height, width = array_HWC.shape[:2]
    if min(height, width) < side:
        raise OptionError(
            f"size makes the image {width}x{height}, too small for a crop of {side}; leave it out"
        )
    top, left = (height - side) // 2, (width - side) // 2
    return array_HWC[top : top + side, left : left + side]


def _target(shape: Sequence[int], size: Mapping[str, int]) -> tuple[int, int]:
    """Height and width for ``size``."""
    if "shortest_edge" not in size:
        return size["height"], size["width"]
    height, width = shape
    edge = size["shortest_edge"]
    longer = int(edge * max(height, width) / min(height, width))
    return (edge, longer) if height <= width else (longer, edge)


def _size(size: Any) -> dict[str, int]:
    """``{"height", "width"}`` or ``{"shortest_edge"}``, from one number, a pair, or such a dictionary."""
    if isinstance(size, int):
        size = {"height": size, "width": size}
    elif isinstance(size, list | tuple) and len(size) == 2:
        size = {"height": size[0], "width": size[1]}
    given = {name: each for name, each in dict(size).items() if each is not None} if isinstance(size, Mapping) else {}
    is_known = set(given) in ({"height", "width"}, {"shortest_edge"})
    if not is_known or not all(isinstance(each, int) and 0 < each <= LARGEST for each in given.values()):
        raise OptionError(f'size is {size!r}; give one number of pixels, or {{"height": 224, "width": 224}}')
    return given


def _per_channel(name: str, values: Any, dtype: Any) -> np.ndarray:
    try:
        array = np.array(values, dtype=dtype).reshape(-1)
    except (TypeError, ValueError):
        array = np.empty(0)
    if len(array) not in (1, 3) or not np.isfinite(array).all():
        raise OptionError(f"{name} is {values!r}; give one number, or three")
    return array


def _is_whole(array: np.ndarray) -> bool:
    """Whether all values are integers, also as floats."""
    if np.issubdtype(array.dtype, np.integer):
        return True
    return bool(np.isfinite(array).all()) and np.allclose(array, array.astype(int))


def _range(array: np.ndarray) -> str:
    return f"{array.min():g} to {array.max():g}"
