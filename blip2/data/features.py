"""The frozen image encoder's output on disk: computed once, read by every epoch of both stages.

Next to each other in one folder, for each set of pictures:

    <name>.bin    float16[N, 1 + P, D], the features of picture n at n, as one memory map
    <name>.json   the shape, and fingerprints of the image encoder and of the pictures

While it is being made the file ends in ``.partial`` and grows picture by picture, so that what was interrupted
goes on where it stopped. N pictures, P patches, D width, B pictures at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from blip2.data.loader import Pictures
from blip2.errors import RecipeError
from blip2.finite import first_not_finite
from blip2.vision import VisionTransformer


class FeatureFile:
    """``float16[N, 1 + P, D]`` on disk; rows are read when they are asked for."""

    def __init__(self, path: Path, shape: Sequence[int]) -> None:
        self._features_NPD = np.memmap(path, np.float16, mode="r", shape=tuple(shape))

    def __len__(self) -> int:
        return len(self._features_NPD)

    def read(self, numbers: np.ndarray) -> Tensor:
        """``float16[B, 1 + P, D]`` of the pictures with these numbers."""
        return torch.from_numpy(self._features_NPD[numbers])


def frozen_features(
    vision: VisionTransformer,
    pictures: Pictures,
    folder: Path,
    name: str,
    *,
    batch_size: int = 64,
    report: Callable[[int, int], None] | None = None,
) -> FeatureFile:
    """The features of all pictures: opened if they are there, else computed (`VisionTransformer.features`).

    These are the values before the encoder's last layer norm, which is trained. ``report(done, total)`` is
    called now and then. Raises RecipeError if what is there belongs to another encoder or other pictures, or
    if the features do not fit into half precision.
    """
    shape = [len(pictures), vision.config.num_patches + 1, vision.config.hidden_size]
    header: dict[str, object] = {
        "shape": shape,
        "dtype": "float16",
        "vision": fingerprint(vision),
        "pictures": _fingerprint_of_pictures(pictures),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path, description = folder / f"{name}.bin", folder / f"{name}.json"
    partial = folder / f"{name}.bin.partial"
    if description.exists():
        _check(description, header)
    else:
        temporary = description.with_suffix(".json.tmp")
        temporary.write_text(json.dumps(header, indent=1))
        os.replace(temporary, description)
        partial.unlink(missing_ok=True)
    if not path.exists():
        _compute(vision, pictures, partial, shape, batch_size, report)
        os.replace(partial, path)
    if path.stat().st_size != int(np.prod(shape)) * 2:
        raise RecipeError(f"{path}: not of the size that {description.name} promises; delete both")
    return FeatureFile(path, shape)


def fingerprint(vision: VisionTransformer) -> str:
    """Of the frozen weights: equal for encoders that give equal features, whatever their last layer norm."""
    digest = hashlib.sha256(repr(vision.config).encode())
    for name, value in sorted(vision.state_dict().items()):
        if not name.startswith("post_norm"):
            digest.update(name.encode())
            # Checkpoints may be stored in half precision and trained in full: equal values count.
            digest.update(value.detach().cpu().to(torch.float32).numpy().tobytes())
    return digest.hexdigest()


def _fingerprint_of_pictures(pictures: Pictures) -> str:
    digest = hashlib.sha256(repr((pictures.size, pictures.mean, pictures.std)).encode())
    digest.update("\n".join(pictures.paths).encode())
    return digest.hexdigest()


def _check(description: Path, header: dict[str, object]) -> None:
    try:
        found = json.loads(description.read_text("utf-8"))
    except (OSError, json.JSONDecodeError):
        found = {}
    for key, meaning in (("vision", "another image encoder"), ("pictures", "other pictures")):
        if found.get(key) != header[key]:
            raise RecipeError(
                f"{description}: these features were made by or for {meaning}; delete them or name another "
                "folder as data.features"
            )


@torch.no_grad()
def _compute(
    vision: VisionTransformer,
    pictures: Pictures,
    partial: Path,
    shape: Sequence[int],
    batch_size: int,
    report: Callable[[int, int], None] | None,
) -> None:
    device = vision.class_embedding.device
    row_bytes = 2 * shape[1] * shape[2]
    with partial.open("ab") as file:
        done = file.tell() // row_bytes
        file.truncate(done * row_bytes)  # the last picture may have been cut
        file.seek(0, os.SEEK_END)
        while done < len(pictures):
            numbers = range(done, min(done + batch_size, len(pictures)))
            features_BPD = vision.features(pictures.pixels(numbers).to(device)).to(torch.float16)
            if not torch.isfinite(features_BPD).all():
                if (name := first_not_finite(vision)) is not None:
                    raise RecipeError(f"{name} of the image encoder is NaN or infinite; start from another model")
                raise RecipeError(
                    f"the features of {pictures.paths[done]} or one of the next {len(numbers) - 1} pictures "
                    "do not fit into half precision; train without data.features"
                )
            file.write(features_BPD.cpu().numpy().tobytes())
            done += len(numbers)
            if report is not None:
                report(done, len(pictures))
