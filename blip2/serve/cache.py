"""What a model keeps of the pictures seen last, found again by their files or by their pixels."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

from torch import Tensor

from blip2.image import RgbImage
from blip2.tasks.see import Eye

Kept = TypeVar("Kept")
STRIP_PIXELS = 4_000_000


@dataclass(frozen=True)
class Look(Generic[Kept]):
    """A picture that was read: what the image encoder is given of it, or what is kept of it if it was seen before."""

    digest: str
    """Of its decoded pixels."""
    pixels_CHW: Tensor | None
    kept: Kept | None = None


class ImageCache(Generic[Kept]):
    """At most so many entries and bytes; what was not used for longest goes first.

    ``hits`` and ``misses`` count requests: whether the image encoder was spared; ``num_encoded`` its pictures.
    """

    def __init__(self, eye: Eye[Kept], max_entries: int, max_bytes: int) -> None:
        self.max_entries = max_entries
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.hits = 0
        self.misses = 0
        self.num_encoded = 0
        self._eye = eye
        self._entries: OrderedDict[str, Kept] = OrderedDict()
        self._digests: OrderedDict[bytes, str] = OrderedDict()  # of the pixels, by the digest of the file
        self._lock = threading.Lock()

    def look(self, content: bytes, load: Callable[[bytes], RgbImage]) -> Look[Kept]:
        """The picture in a file's bytes; by any thread. A file that was seen before is not even decoded."""
        file = hashlib.sha256(content).digest()
        with self._lock:
            digest = self._digests.get(file)
        if digest is not None and (kept := self.get(digest)) is not None:
            return Look(digest, None, kept)
        image = load(content)
        digest = digest_of(image)
        with self._lock:
            self._digests[file] = digest
            self._digests.move_to_end(file)
            while len(self._digests) > self.max_entries:
                self._digests.popitem(last=False)
        kept = self.get(digest)
        return Look(digest, self._eye.pixels(image) if kept is None else None, kept)

    def see(self, looks: Sequence[Look[Kept]]) -> list[Kept | Exception]:
        """What the model keeps of each picture; each is encoded once, those that are new together.

        By the models' thread alone. A picture that cannot be encoded has its error in its place.
        """
        found: dict[str, Kept | Exception | None] = {}
        for look in looks:
            is_known = look.digest in found
            if not is_known:
                found[look.digest] = self.get(look.digest) if look.kept is None else look.kept
                is_known = found[look.digest] is not None
            self.hits += is_known
            self.misses += not is_known
        new = [look for look in {look.digest: look for look in looks}.values() if found[look.digest] is None]
        for look, seen in zip(new, self._encode_all(new), strict=True):
            found[look.digest] = seen
            if not isinstance(seen, Exception):
                self.num_encoded += 1
                self.put(look.digest, seen)
        return [kept for look in looks if (kept := found[look.digest]) is not None]

    def _encode_all(self, looks: Sequence[Look[Kept]]) -> Sequence[Kept | Exception]:
        """Together if it can be, else each by itself, to find the one at fault."""
        if not looks:
            return []
        try:
            return self._eye.encode([look.pixels_CHW for look in looks if look.pixels_CHW is not None])
        except Exception as error:
            if len(looks) == 1:
                return [error]
            return [kept for look in looks for kept in self._encode_all([look])]

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, digest: str) -> Kept | None:
        with self._lock:
            kept = self._entries.get(digest)
            if kept is not None:
                self._entries.move_to_end(digest)
            return kept

    def put(self, digest: str, kept: Kept) -> None:
        """What is larger than the whole cache is not kept."""
        size = num_bytes(kept)
        if size > self.max_bytes or self.max_entries < 1:
            return
        with self._lock:
            if (old := self._entries.pop(digest, None)) is not None:
                self.num_bytes -= num_bytes(old)
            self._entries[digest] = kept
            self.num_bytes += size
            while len(self._entries) > self.max_entries or self.num_bytes > self.max_bytes:
                _, oldest = self._entries.popitem(last=False)
                self.num_bytes -= num_bytes(oldest)


def digest_of(image: RgbImage) -> str:
    """Of the pixels that people see, whatever file they came in."""
    found = hashlib.sha256(f"{image.width}x{image.height}:".encode())
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):  # not all of them once more in memory
        found.update(image.crop((0, top, image.width, min(top + rows, image.height))).tobytes())
    return found.hexdigest()


def num_bytes(kept: Any) -> int:
    """Of the tensors of a dataclass."""
    values = (getattr(kept, field.name) for field in fields(kept))
    return sum(value.nbytes for value in values if isinstance(value, Tensor))
