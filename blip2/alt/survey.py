"""All images without a text in some pages, and the collection of those to describe."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from blip2.alt.address import image_of
from blip2.alt.pages import Page, read_page
from blip2.alt.report import MAX_ADDRESS_CHARS, Row, check_file
from blip2.alt.scan import context_of, images_in
from blip2.collection.record import Record, Unit, runs_of
from blip2.collection.sources.files import UNIT_FILES
from blip2.disk import stamp_of
from blip2.errors import CollectionError
from blip2.image import name_of


@dataclass(frozen=True)
class Finding:
    """``row``: what is known without a model. ``key``: of its image in `Survey.pictures`, "" if there is no image to
    describe."""

    row: Row
    key: str


@dataclass
class Survey:
    """``images``: each image once, by its key: its path or URL, or a digest of a data URL."""

    num_pages: int = 0
    num_images: int = 0
    findings: list[Finding] = field(default_factory=list)
    images: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    """Pages that could not be read, one line each."""

    @property
    def num_by_hand(self) -> int:
        return sum(not finding.key for finding in self.findings)


def survey(pages: Sequence[tuple[str, str]], *, root: str = "", remote: bool = False, weak: bool = False) -> Survey:
    """``pages``: each with the folder in which it was found. ``weak``: include images with a useless text."""
    found = Survey()
    for path, folder in pages:
        try:
            check_file(path)
            _add(found, read_page(path, folder), root, remote, weak)
        except CollectionError as error:
            found.problems.append(str(error))
        except OSError as error:
            found.problems.append(f"{name_of(path)}: cannot be read ({error.strerror}); check path and permissions")
    return found


def _add(found: Survey, page: Page, root: str, remote: bool, weak: bool) -> None:
    found.num_pages += 1
    for check, image in images_in(page):
        found.num_images += 1
        if not (image.is_missing or (weak and image.is_weak)):
            continue
        source, problem = image_of(page, image, root=root, remote=remote)
        key = _key(source)
        if key:
            found.images[key] = source
        shown = (source or image.address).replace(os.sep, "/")
        row = Row(
            page.path.replace(os.sep, "/"), page.line_of(image.start), shown[:MAX_ADDRESS_CHARS], "", None, "",
            context_of(page, image), (image.alt or "").strip(), problem, check,
        )  # fmt: skip
        if source.startswith("data:") or len(shown) > MAX_ADDRESS_CHARS:
            row = replace(row, image=f"{shown[:40]}...")
        found.findings.append(Finding(row, key))


def _key(image: str) -> str:
    is_data = re.match("data:", image, re.IGNORECASE)
    return f"data-{hashlib.sha256(image.encode('utf-8', 'replace')).hexdigest()}" if is_data else image


class PageImages:
    """The images of a survey as a source of a collection."""

    def __init__(self, images: Mapping[str, str]) -> None:
        self._images = images
        self._keys = list(images)

    @property
    def num_records(self) -> int:
        return len(self._keys)

    @cached_property
    def units(self) -> list[Unit]:
        return runs_of(len(self._keys), UNIT_FILES)

    def stamp(self, unit: Unit) -> str:
        return self._stamps[unit.number]

    def records(self, unit: Unit) -> Iterator[Record]:
        for key in self._keys[unit.start : unit.stop]:
            yield Record(key, self._images[key], name_of(self._images[key]), _stamp(key))

    def description(self) -> Mapping[str, Any]:
        return {"source": "pages"}

    @cached_property
    def _stamps(self) -> list[str]:
        """The stamp of each unit, taken once, as for files."""
        found = []
        for unit in self.units:
            digest = hashlib.blake2b(digest_size=16)
            for key in self._keys[unit.start : unit.stop]:
                digest.update(os.fsencode(f"{key}\0{_stamp(key)}\0"))
            found.append(digest.hexdigest())
        return found


def _stamp(path: str) -> str:
    found = stamp_of(path)
    return "" if found is None else f"{found.size}-{found.mtime_ns}"
