"""The report as an output of a collection: written when all images are described, keeping earlier edits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from blip2.alt.report import Row, csv_of, read_report
from blip2.alt.sheet import GENERATOR, sheet
from blip2.alt.survey import Survey
from blip2.collection.record import FAILED, Result, Source
from blip2.collection.sinks.places import Plain, check_file, check_name, replacing
from blip2.errors import CollectionError


class Report(Plain):
    """``path``: the table; a page of the same name with ".html" shows it with the images.

    Edits in an earlier report of the same name are kept, unless ``restart``. ``approve_all``: mark all rows with a text
    as approved.
    """

    def __init__(self, path: Path, found: Survey, *, approve_all: bool = False, restart: bool = False) -> None:
        super().__init__()
        self.path = path
        self.page = path.with_suffix(".html")
        self._found = found
        self._approve_all = approve_all
        self._restart = restart
        self._earlier: dict[tuple[str, str], Row] = {}

    def check(self, source: Source) -> None:
        if self.path.suffix.lower() in (".html", ".htm"):
            raise CollectionError(f"{self.path}: the report is a table; give a name that ends in .csv")
        check_file(self.path, may_replace=True)
        check_file(self.page, may_replace=True)
        check_name(self.page)
        if self.page.exists() and GENERATOR.encode() not in self.page.read_bytes()[:4096]:
            raise CollectionError(f"{self.page}: exists and is not a report of blip2 alt; give the report another name")
        if self.path.exists():
            try:
                earlier = read_report(self.path)
            except OSError as error:
                raise CollectionError(f"{self.path}: cannot be read ({error.strerror}); check permissions") from None
            if not self._restart:
                self._earlier = {(row.file, row.check): row for row in earlier}

    def whole(self, results: Iterable[Result]) -> None:
        self.path.absolute().parent.mkdir(parents=True, exist_ok=True)
        by_key = {result.key: result for result in results}
        rows = [self._row(finding.row, by_key.get(finding.key)) for finding in self._found.findings]
        self._write(self.path, csv_of(rows))
        images = [self._found.images.get(finding.key, "") for finding in self._found.findings]
        self._write(self.page, sheet(rows, images, self.path.name).encode("utf-8", "replace"))

    def _row(self, row: Row, result: Result | None) -> Row:
        if result is not None and result.status == FAILED:
            row = replace(row, problem=result.error_message)
        elif result is not None:
            row = replace(row, alt=result.line, score=next(iter(result.scores), None))
        if self._approve_all and row.alt:
            row = replace(row, approved="yes")
        before = self._earlier.get((row.file, row.check))
        if before is not None and before.old == row.old:
            row = replace(row, alt=before.alt or row.alt, approved=before.approved.strip() or row.approved)
        return row

    @staticmethod
    def _write(path: Path, content: bytes) -> None:
        with replacing(path) as unfinished:
            unfinished.write_bytes(content)


def failures(found: Survey, results: Iterable[Result]) -> Sequence[str]:
    """A line for each image that could not be described, with the first page that shows it."""
    wrong = {result.key: result.error_message for result in results if result.status == FAILED}
    first = {finding.key: finding.row for finding in reversed(found.findings)}
    return [f"{first[key].file}:{first[key].line}: {message}" for key, message in wrong.items() if key in first]
