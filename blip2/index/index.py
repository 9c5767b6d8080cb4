"""`Index`: a file of encoded images, to search and to ask."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple, overload

from torch import Tensor

from blip2.api import Matcher, Pipeline
from blip2.disk import stamp_of
from blip2.encoded import EncodedImage
from blip2.errors import ImageError, OptionError, option
from blip2.image import Source
from blip2.index import duplicates
from blip2.index.file import Stored, read
from blip2.index.search import nearest
from blip2.index.update import Changes, check_kind, check_model, current, kind_of, update
from blip2.tasks.defaults import BATCH_SIZE
from blip2.tasks.speaker import chunks
from blip2.text import clean

DUPLICATE = 0.95
"""Default similarity from which images count as near-duplicates."""


class Hit(NamedTuple):
    """A search result.

    ``cosine`` (-1 to 1): similarity to the query. ``score``: the sort key; the cosine, or after reranking the match
    logit plus the cosine. ``row``: the image's row in the index.
    """

    path: str
    score: float
    cosine: float
    row: int
    is_reranked: bool = False


class Group(NamedTuple):
    """Images connected by near-duplicate pairs, and the similarity of the most similar pair."""

    similarity: float
    paths: list[str]


class Index(Sequence[EncodedImage]):
    """Encoded images in one file: N of them, each with Q vectors of D numbers.

    An index to search (``kind`` "search") is made by a `Matcher`, one to ask ("ask") by a `Pipeline`. The latter is a
    sequence of `EncodedImage`: ``index[:]`` can be given to `Pipeline.ask` instead of images.
    """

    def __init__(self, stored: Stored) -> None:
        self._stored = stored

    # ---- the file ----

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Index:
        """Open an index; only reads the list of images. Raises IndexFileError if it is not a complete index."""
        return cls(read(path))

    @staticmethod
    def update(
        path: str | os.PathLike[str],
        folders: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        model: Matcher | Pipeline,
        *,
        batch_size: int = BATCH_SIZE,
        recursive: bool = True,
        exclude: Iterable[str] = (),
        rows: Mapping[str, Any] | None = None,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
        on_problem: Callable[[str], None] = lambda message: None,
    ) -> Changes:
        """Make an index of the images in folders, or update it; see `index.update`."""
        folders = [folders] if isinstance(folders, str | os.PathLike) else folders
        if os.path.isfile(path):
            stored = read(path)
            check_kind(stored, kind_of(model))
            check_model(stored, model)
        return update(
            path, folders, lambda name, kind: model, kind=kind_of(model), model=model.name, batch_size=batch_size,
            recursive=recursive, exclude=exclude, rows=rows, reading=model.frontend.reading, on_progress=on_progress,
            on_problem=on_problem,
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"<Index {self._stored.path} to {self.kind}, {len(self):,} images by {self.model_name}>"

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def kind(self) -> str:
        return self._stored.origin.kind

    @property
    def model_name(self) -> str:
        """The name of the model that made it, for `load`."""
        return self._stored.origin.model

    @property
    def vectors(self) -> Tensor:
        """``float16[N, Q, D]``, memory-mapped, so only accessed parts are read. Read-only.

        Unlike everything else here, these numbers are not checked. Raises IndexFileError if the file is truncated; if
        it is truncated later, during access, the process crashes.
        """
        return self._stored.vectors_NQD

    @cached_property
    def paths(self) -> list[str]:
        """The paths of the images, in order."""
        return [image.path for image in self._stored.images()]

    def changed(self, rows: Iterable[int] | None = None) -> list[str]:
        """The paths of images (of these rows, or all) whose file content has changed since they were encoded.

        The index still describes the earlier content. Files that are gone are not included.
        """
        images = map(self._stored.image, range(len(self)) if rows is None else rows)
        stamped = ((image, stamp_of(image.path)) for image in images)
        return [image.path for image, now in stamped if now is not None and current(image, now) is None]

    # ---- asking ----

    @overload
    def __getitem__(self, row: int) -> EncodedImage: ...
    @overload
    def __getitem__(self, row: slice) -> list[EncodedImage]: ...
    def __getitem__(self, row: int | slice) -> EncodedImage | list[EncodedImage]:
        """The encoded image of a row, as from `Pipeline.encode`, in half precision. Raises IndexFileError."""
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        self.check_kind("ask")
        number = range(len(self))[row]
        identity = self._stored.origin.identity.partition("-")[0]  # without the suffix of `update.identity_of`
        return EncodedImage(self._stored.vectors(number), identity)

    # ---- searching ----

    def search(
        self,
        matcher: Matcher,
        text: str,
        k: int = 10,
        *,
        rerank: int = 0,
        batch_size: int = BATCH_SIZE,
        on_problem: Callable[[str], None] = lambda message: None,
    ) -> list[Hit]:
        """The ``k`` images most similar to a text, best first; exact. See `search_picture` for an image.

        ``rerank``: number of best images to open and score together with the text (ITM), which is slower and more
        accurate; they are sorted by match logit plus cosine, as in the paper. Images that can no longer be opened are
        reported to ``on_problem`` and come after them. Raises OptionError and IndexFileError.
        """
        check_search(k, rerank)
        self.check_kind("search")
        self.check_model(matcher)
        check_text(text)
        found = nearest(self._stored.rows, matcher.embed_texts(text), max(k, rerank))
        hits = self._hits(*found)
        if rerank:
            hits = _reranked(matcher, text, hits[:rerank], batch_size, on_problem) + hits[rerank:]
        return hits[:k]

    def search_picture(self, matcher: Matcher, picture: Source, k: int = 10) -> list[Hit]:
        """The ``k`` images most similar to an image, by the mean cosine of corresponding vectors.

        Raises OptionError, ImageError and IndexFileError.
        """
        check_search(k, 0)
        self.check_kind("search")
        self.check_model(matcher)
        vectors_QE = matcher.embed_images(picture)
        # Each query token asks the same of every image, so the first vector is compared with the first, and so on.
        whole_NRL = self._stored.rows.viewed(1, vectors_QE.numel())
        return self._hits(*nearest(whole_NRL, vectors_QE.flatten(), k, length=len(vectors_QE) ** 0.5))

    def near_duplicates(self, threshold: float = DUPLICATE) -> list[Group]:
        """Groups of near-duplicates; similarity as in `search_picture`. Raises OptionError.

        Exact: no pair above the threshold is missed. A group is connected by such pairs; not all of its pairs need be
        above the threshold.
        """
        if not 0 < threshold <= 1:
            raise OptionError(
                f"{option('threshold')} is {threshold}; a similarity is above 0 and at most 1, such as {DUPLICATE}"
            )
        self.check_kind("search")
        found = duplicates.groups(self._stored.rows.viewed(math.prod(self._stored.rows.shape[1:])), threshold)
        return [Group(similarity, [self._path(row) for row in rows]) for similarity, rows in found]

    def _hits(self, scores: list[float], rows: list[int]) -> list[Hit]:
        return [Hit(self._path(row), score, score, row) for score, row in zip(scores, rows, strict=True)]

    def _path(self, row: int) -> str:
        return self._stored.image(row).path

    def check_kind(self, kind: str) -> None:
        """Raises IndexFileError if the index is of another kind."""
        check_kind(self._stored, kind)

    def check_model(self, model: Matcher | Pipeline) -> None:
        """Raises IndexFileError if another model made it."""
        check_model(self._stored, model)


def check_search(k: int, rerank: int) -> None:
    """Raises OptionError for invalid numbers."""
    if k < 1:
        raise OptionError(f"{option('k')} is {k}; use 1 or more")
    if rerank < 0:
        raise OptionError(
            f"{option('rerank')} is {rerank}; give the number of best images to rerank, or 0 for none"
        )


def check_text(text: str) -> None:
    """Raises OptionError for an empty text."""
    if not clean(text):
        raise OptionError("the text is empty; describe what to find")


def _reranked(
    matcher: Matcher, text: str, hits: list[Hit], batch_size: int, on_problem: Callable[[str], None]
) -> list[Hit]:
    """Score images together with the text and sort them again (section 4.4 of the paper); unreadable ones come last."""
    reader = matcher.reader
    ids = reader.ids([text])
    text_1E = reader.embed_texts(ids)
    seen = matcher.each_encoded([hit.path for hit in hits], on_error="return", batch_size=batch_size)
    ranked, unread = [], []
    for some in chunks(hits, batch_size):
        sound = []
        for hit, image in zip(some, islice(seen, len(some)), strict=True):
            if isinstance(image, ImageError):
                on_problem(str(image))
                unread.append(hit)
            else:
                sound.append((hit, image))
        if sound:
            scores_N1 = reader.compare([image for _, image in sound], ids, text_1E, batch_size).score
            scores = scores_N1[:, 0].tolist()
            ranked += [
                hit._replace(score=score, is_reranked=True) for (hit, _), score in zip(sound, scores, strict=True)
            ]
    ranked.sort(key=lambda hit: (-hit.score, hit.row))
    return ranked + unread
