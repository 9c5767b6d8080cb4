"""What a model keeps of recent images, looked up by file or by pixels."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

from torch import Tensor

from blip2.tasks.see import ImageFrontend

Kept = TypeVar("Kept")


@dataclass(frozen=True)
class Look(Generic[Kept]):
    """A parsed image: the image encoder's input, or what is kept of it from an earlier request."""

    digest: str
    """Digest of its decoded pixels."""
    pixels_CHW: Tensor | None
    kept: Kept | None = None


class ImageCache(Generic[Kept]):
    """A least-recently-used cache with a maximum number of entries and bytes.

    ``hits`` and ``misses`` count requests: whether the image encoder was needed. ``num_encoded`` counts its images.
    """

    def __init__(self, frontend: ImageFrontend[Kept], max_entries: int, max_bytes: int) -> None:
        self.max_entries = max_entries
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.hits = 0
        self.misses = 0
        self.num_encoded = 0
        self.frontend = frontend
        self._entries: OrderedDict[str, Kept] = OrderedDict()
        self._digests: OrderedDict[str, str] = OrderedDict()  # digest of the file -> digest of the pixels
        self._lock = threading.Lock()

    def known(self, file: str) -> Look[Kept] | None:
        """What is kept of an earlier image, by the digest of its file."""
        with self._lock:
            digest = self._digests.get(file)
        if digest is None or (kept := self.get(digest)) is None:
            return None
        return Look(digest, None, kept)

    def look(self, file: str, digest: str, pixels_CHW: Tensor) -> Look[Kept]:
        """A decoded image. ``file``: digest of its file. ``digest``: digest of its decoded pixels."""
        with self._lock:
            self._digests[file] = digest
            self._digests.move_to_end(file)
            while len(self._digests) > self.max_entries:
                self._digests.popitem(last=False)
        kept = self.get(digest)
        return Look(digest, pixels_CHW if kept is None else None, kept)

    def see(self, looks: Sequence[Look[Kept]]) -> list[Kept | Exception]:
        """What the model keeps of each image. Each image is encoded once, the new ones as a batch.

        Only called in the models' thread. An image that cannot be encoded is replaced by its error.
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
        """Encode as a batch; if that fails, one by one, to find the faulty image."""
        if not looks:
            return []
        try:
            return self.frontend.encode([look.pixels_CHW for look in looks if look.pixels_CHW is not None])
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
        """An entry larger than the whole cache is not kept."""
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


def num_bytes(kept: Any) -> int:
    """Bytes of the tensors of a dataclass."""
    values = (getattr(kept, field.name) for field in fields(kept))
    return sum(value.nbytes for value in values if isinstance(value, Tensor))
