"""The frozen image encoder's output on disk: computed once, read by every epoch of both stages.

Next to each other in one folder, for each set of pictures:

    <name>.bin    float16[N, 1 + P, D], the features of picture n at n
    <name>.seen   a `RECORD` of each picture: how its file was when it was seen, and the checksum of its features
    <name>.json   the shape, how pictures become pixels, and fingerprints of the image encoder and the pictures' names

While they are being made the first ends in ``.partial`` and grows picture by picture, so that what was interrupted
goes on where it stopped. Features belong to a picture's content: of one that has changed they are computed again.
N pictures, P patches, D width, B pictures at a time.
"""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from blip2 import disk
from blip2.data.loader import Pictures
from blip2.disk import Stamp, digest_since, stamp_of
from blip2.errors import ImageError, RecipeError
from blip2.finite import first_not_finite
from blip2.image import PIXELS_VERSION
from blip2.model import Vision

RECORD = np.dtype([
    ("stamp", "<i8", 3), ("digest", "u1", 16), ("features_crc32", "<u4"), ("crc32", "<u4"),
])  # fmt: skip
"""``stamp`` and ``digest`` of the picture's file (see `disk`), ``crc32`` of its number and of all before."""
UNKNOWN = Stamp(-1, -1, -1)
KEEP_SECONDS = 5.0
"""After so long what was computed is put on the disk, and then its records: that is what a killed run may lose."""

Report = Callable[[int, int], None]
OnBad = Callable[[str, ImageError], None]


class FeatureFile:
    """``float16[N, 1 + P, D]`` on disk; rows are read, and compared with their checksums, when they are asked for."""

    def __init__(self, path: Path, shape: Sequence[int], crc32_N: np.ndarray) -> None:
        self._file, self._shape, self._crc32_N = disk.OpenFile(path), tuple(shape), crc32_N

    def __len__(self) -> int:
        return self._shape[0]

    def read(self, numbers: np.ndarray) -> Tensor:
        """``float16[B, 1 + P, D]`` of the pictures with these numbers, NaN for one that could not be read.

        Raises RecipeError for what is damaged.
        """
        features_BPD = torch.empty(len(numbers), *self._shape[1:], dtype=torch.float16)
        for place, number in enumerate(numbers.tolist()):
            content = memoryview(features_BPD[place].view(-1).numpy()).cast("B")  # type: ignore[arg-type]
            try:
                self._file.read(number * len(content), content)
                if zlib.crc32(content) != self._crc32_N[number]:
                    raise OSError(f"what it holds of picture {number} is not what was written")
            except OSError as error:
                raise RecipeError(
                    f"{self._file.path}: is damaged ({error.strerror or error}); delete it, and start again: it is "
                    "made anew"
                ) from None
        return features_BPD


def frozen_features(
    vision: Vision,
    pictures: Pictures,
    folder: Path,
    name: str,
    *,
    batch_size: int = 64,
    report: Report | None = None,
    on_bad: OnBad | None = None,
) -> FeatureFile:
    """The features of all pictures: opened if they are there, else computed (`VisionTransformer.features`).

    These are the values before the encoder's last layer norm, which is trained. ``report(done, total)`` is
    called now and then. A picture that cannot be read is told to ``on_bad`` by its path, and its features are NaN until
    it has changed; without ``on_bad`` its ImageError is raised. Raises RecipeError if what is there belongs to another
    encoder or other pictures, if it is damaged or cannot be written, if another run is
    at work on it, or if the features do not fit into half precision.
    """
    header: dict[str, object] = {
        "shape": [len(pictures), vision.config.num_tokens, vision.config.hidden_size],
        "dtype": "float16",
        "pixels": PIXELS_VERSION,
        "vision": fingerprint(vision),
        "pictures": _fingerprint_of_names(pictures),
    }
    try:
        with disk.locked(folder / f"{name}.lock"):
            return _Cache(folder, name, header).brought_up_to_date(vision, pictures, batch_size, report, on_bad)
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


def _fingerprint_of_names(pictures: Pictures) -> str:
    resizing = () if pictures.resizing == ("bicubic", None) else pictures.resizing
    digest = hashlib.sha256(repr((pictures.size, pictures.mean, pictures.std, *resizing)).encode())
    digest.update("\n".join(pictures.paths).encode())
    return digest.hexdigest()


class _Cache:
    """The three files of a set of pictures."""

    def __init__(self, folder: Path, name: str, header: dict[str, object]) -> None:
        """Raises RecipeError if what is there belongs to another header, OSError if nothing can be written."""
        self._whole, self._partial = folder / f"{name}.bin", folder / f"{name}.bin.partial"
        self._seen, self._description = folder / f"{name}.seen", folder / f"{name}.json"
        self._shape: list[int] = header["shape"]  # type: ignore[assignment]
        self._row_bytes = 2 * self._shape[1] * self._shape[2]
        folder.mkdir(parents=True, exist_ok=True)
        if not self._description.exists() or _check(self._description, header) != PIXELS_VERSION:
            # Nobody knows whose they are; or they are of other pixels than these files give now.
            for path in (self._whole, self._partial, self._seen):
                path.unlink(missing_ok=True)
            disk.write_text(self._description, json.dumps(header, indent=1))
        self._path = self._whole if self._whole.exists() else self._partial
        if self._path == self._whole and self._whole.stat().st_size != self._shape[0] * self._row_bytes:
            raise RecipeError(
                f"{self._whole}: not of the size that {self._description.name} promises; delete both, and start again"
            )

    def brought_up_to_date(
        self,
        vision: Vision,
        pictures: Pictures,
        batch_size: int,
        report: Report | None,
        on_bad: OnBad | None,
    ) -> FeatureFile:
        records = self._records()
        stale = [number for number, path in enumerate(pictures.paths) if not self._is_current(records, number, path)]
        self._write(records)
        if stale:
            self._compute(vision, pictures, records, stale, batch_size, report, on_bad)
        if self._path == self._partial:
            with self._partial.open("r+b") as file:
                file.truncate(self._shape[0] * self._row_bytes)
            disk.replace([(self._partial, self._whole)])
        return FeatureFile(self._whole, self._shape, records["features_crc32"].copy())

    def _records(self) -> np.ndarray:
        """`RECORD` of each picture; all zero, which is none, where there is no whole one, or no features."""
        num_rows = self._path.stat().st_size // self._row_bytes if self._path.exists() else 0
        records = np.zeros(self._shape[0], RECORD)
        content = self._seen.read_bytes() if self._seen.exists() else b""
        size = RECORD.itemsize
        for number in range(min(num_rows, len(records), len(content) // size)):
            record = content[number * size : (number + 1) * size]
            if _crc32(number, record) == int.from_bytes(record[-4:], "little"):
                records[number] = np.frombuffer(record, RECORD)[0]
        return records

    def _is_current(self, records: np.ndarray, number: int, path: str) -> bool:
        """Whether the features are of what is in the picture's file now; of a file that is gone, of what was in it."""
        if records[number]["crc32"] == 0:
            return False
        seen, now = Stamp(*records[number]["stamp"].tolist()), stamp_of(path)
        if now is None or seen.is_still(now):
            return seen != UNKNOWN
        digest = records[number]["digest"].tobytes().hex()
        if seen.size != now.size or digest_since(path, now) != digest:
            return False
        records[number]["stamp"] = now  # copied, or only touched
        records[number]["crc32"] = _crc32(number, records[number].tobytes())
        return True

    def _write(self, records: np.ndarray) -> None:
        content = records.tobytes()
        if not self._seen.exists() or self._seen.read_bytes() != content:
            disk.write_bytes(self._seen, content)

    @torch.no_grad()
    def _compute(
        self,
        vision: Vision,
        pictures: Pictures,
        records: np.ndarray,
        stale: list[int],
        batch_size: int,
        report: Report | None,
        on_bad: OnBad | None,
    ) -> None:
        device = vision.patch_embedding.weight.device
        total, keep_at = len(pictures), time.monotonic() + KEEP_SECONDS
        self._path.touch()
        with self._path.open("r+b") as file, ThreadPoolExecutor(4) as pool:

            def keep() -> None:
                # In this order: what has a record is on the disk.
                file.flush()
                disk.sync(self._path)
                self._write(records)

            try:
                for start in range(0, len(stale), batch_size):
                    numbers = stale[start : start + batch_size]
                    paths = [pictures.paths[number] for number in numbers]
                    stamps = list(pool.map(stamp_of, paths))
                    read = pictures.read(numbers)
                    for path, found in zip(paths, read, strict=True):
                        if isinstance(found, ImageError):
                            if on_bad is None:
                                raise found
                            on_bad(path, found)
                    features_BPD = torch.full((len(numbers), *self._shape[1:]), torch.nan, dtype=torch.float16)
                    is_sound_B = torch.tensor([isinstance(found, Tensor) for found in read])
                    if is_sound_B.any():
                        pixels_BCHW = torch.stack([found for found in read if isinstance(found, Tensor)])
                        features_BPD[is_sound_B] = vision.features(pixels_BCHW.to(device)).to("cpu", torch.float16)
                    if not torch.isfinite(features_BPD[is_sound_B]).all():
                        if (name := first_not_finite(vision)) is not None:
                            raise RecipeError(
                                f"{name} of the image encoder is NaN or infinite; start from another model"
                            )
                        raise RecipeError(
                            f"the features of {paths[0]} or one of the next {len(numbers) - 1} pictures "
                            "do not fit into half precision; train without data.features"
                        )
                    rows = [features_PD.numpy().tobytes() for features_PD in features_BPD]
                    for number, row in zip(numbers, rows, strict=True):
                        file.seek(number * self._row_bytes)
                        file.write(row)
                    for number, record in zip(numbers, pool.map(_record, numbers, paths, stamps, rows), strict=True):
                        records[number] = record
                    if (now := time.monotonic()) > keep_at:
                        keep()
                        taken = time.monotonic() - now
                        keep_at = now + max(KEEP_SECONDS, 20 * taken)
                    if report is not None:
                        report(total - len(stale) + start + len(numbers), total)
            except BaseException:
                with suppress(OSError):  # what went wrong first is what is told
                    keep()
                raise
            keep()


def _record(number: int, path: str, stamp: Stamp | None, features: bytes) -> np.ndarray:
    """Of a picture that was stamped before it was seen. Where it changed meanwhile, it will be seen again."""
    record = np.zeros((), RECORD)
    digest = digest_since(path, stamp)
    record["stamp"] = stamp if stamp is not None and digest else UNKNOWN
    record["digest"] = np.frombuffer(bytes.fromhex(digest or "00" * 16), np.uint8)
    record["features_crc32"] = zlib.crc32(features)
    record["crc32"] = _crc32(number, record.tobytes())
    return record


def _crc32(number: int, record: bytes) -> int:
    """Of all but itself, which comes last. Never 0, which is where there is no record."""
    return zlib.crc32(record[:-4], number) or 1


def _check(description: Path, header: dict[str, object]) -> object:
    """Raises RecipeError for what belongs to another header; returns by which `PIXELS_VERSION` it was made."""
    try:
        found = json.loads(description.read_text("utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise RecipeError(f"{description}: is damaged; delete it, and start again: the features are made anew")
    for key, meaning in (("vision", "another image encoder"), ("pictures", "other pictures")):
        if found.get(key) != header[key]:
            raise RecipeError(
                f"{description}: these features were made by or for {meaning}; delete them or name another "
                "folder as data.features"
            )
    return found.get("pixels")
