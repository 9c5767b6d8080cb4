"""The result of one record: from what was known before, or from the model's output."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from blip2.collection.columns import plain
from blip2.collection.record import FAILED, SKIPPED, SUCCESS, Record, Result, sha256_of
from blip2.errors import ImageError
from blip2.image import name_of, stored_size

if TYPE_CHECKING:
    from blip2.collection.run import Job, Known, Outcome


def without_model(job: Job, known: Known, wants: frozenset[str], record: Record) -> Result | None:
    if (before := known.get((record.key, record.stamp))) is not None:
        # The source may have changed, and a person may have edited what an earlier run wrote.
        before = replace(before, columns=plain(record.columns) or before.columns)
        is_changed = job.skips and record.is_described and _blanks_apart(record.text) != _blanks_apart(before.text)
        return replace(before, text=record.text) if is_changed else before
    if record.problem:
        return failed(begun(wants, record), record.problem)
    if job.skips and record.is_described:
        return replace(begun(wants, record), status=SKIPPED, text=record.text)
    return None


def _blanks_apart(text: str) -> list[list[str]]:
    """The words of each line: texts read beside an image are compared without regard to blanks."""
    return [words for line in text.split("\n") if (words := line.split())]


def begun(wants: frozenset[str], record: Record) -> Result:
    """The result of an image before the model processes it."""
    width, height = (0, 0)
    digest = ""
    if record.image is not None and "size" in wants:
        width, height = stored_size(record.image) or (0, 0)
    if record.image is not None and "sha256" in wants:
        digest = sha256_of(record.image)
    path = record.image if isinstance(record.image, str) else ""
    return Result(
        record.key, record.stamp, FAILED, record.name, old=record.text, path=path, width=width, height=height,
        sha256=digest, columns=plain(record.columns),
    )  # fmt: skip


def result_of(job: Job, record: Record, begun: Result, outcome: Outcome | ImageError) -> Result:
    if isinstance(outcome, ImageError):
        return failed(begun, str(outcome))
    if not (text := job.word(record, outcome)):
        return failed(begun, f"{record.name}: the options leave nothing of the caption {outcome.captions[0]!r}")
    return replace(
        begun, status=SUCCESS, text=text, captions=outcome.captions, scores=outcome.scores, tokens=outcome.tokens
    )


def why_failed(result: Result) -> str:
    """The reason of a failure, without the image's name."""
    return result.error_message.removeprefix(f"{name_of(result.name)}: ").removeprefix(f"{result.name}: ")


def failed(begun: Result, message: str) -> Result:
    return replace(begun, status=FAILED, error_message=message)
