"""``blip2 alt``: alt texts for the images of web pages and Markdown, reviewed by a person before they are written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from blip2.cli import Failure, of_image
from blip2.cli.images import READING, echo, of_reading, shown
from blip2.cli.options import DECODING, MODEL, given, of_loading, of_model, with_options
from blip2.cli.report import bar, tell

if TYPE_CHECKING:
    from blip2.alt.survey import Survey
    from blip2.collection import Record
    from blip2.collection.run import Outcome
    from blip2.errors import ImageError


@click.command("alt")
@click.argument("pages", nargs=-1, metavar="PAGES...")
@click.option("--report", type=click.Path(path_type=Path), default="alt.csv", show_default=True, metavar="FILE",
              help="CSV file for the proposed texts; a page of the same name (.html) shows the images.")
@click.option("--apply", "applied", type=click.Path(path_type=Path), metavar="FILE",
              help="Write the approved texts of this report into the pages.")
@click.option("--dry-run", is_flag=True, help="Only list images without alt text; with --apply, only show the changes.")
@click.option("--root", type=click.Path(path_type=Path), metavar="DIR", help='Folder for addresses that begin with '
              '"/".  [default: the folder given as PAGES]')
@click.option("--remote", is_flag=True, help="Also download images from the web.")
@click.option("--include-weak", is_flag=True, help='Also list images with a useless text: a file name, "image".')
@click.option("--approve-all", is_flag=True, help="Mark every proposed text as approved. Read them anyway.")
@click.option("--restart", is_flag=True, help="Start again; the earlier report, with your edits, is overwritten.")
@click.option("-r", "--recursive/--no-recursive", default=True, help="Whether to search subfolders for pages.  "
              "[default: yes]")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Skip files and folders with this name or path. "
              "Repeatable.")
@click.option("--prompt", default="", metavar="TEXT", help="Text that the captions continue.")
@click.option("--batch-size", type=int, default=16, show_default=True, help="Images per batch.")
@with_options(READING, DECODING, MODEL)
@click.pass_context
def command(
    context: click.Context,
    /,
    pages: tuple[str, ...],
    report: Path,
    applied: Path | None,
    dry_run: bool,
    root: Path | None,
    remote: bool,
    include_weak: bool,
    approve_all: bool,
    restart: bool,
    recursive: bool,
    exclude: tuple[str, ...],
    prompt: str,
    batch_size: int,
    **others: Any,
) -> None:
    """Write alt texts for images in web pages and Markdown.

    PAGES are HTML or Markdown files, or folders of them. The first run finds images without alt text, describes each of
    them once and writes a report; no page is changed. Edit the texts in the report, write yes into the column
    "approved" (or decorative for an image that needs no text), and apply the report. Only the bytes of these alt texts
    change.

    In HTML, alt="" marks an image as decorative: it is left alone, and so are images hidden from screen readers and
    anything in code, comments and templates. The same command resumes an interrupted run and keeps your edits in the
    report. The exit code is 1 if a page or an image could not be read, or a row could not be applied.

    \b
    blip2 alt site/ --dry-run
    blip2 alt site/ README.md
    blip2 alt --apply alt.csv --dry-run
    blip2 alt --apply alt.csv
    blip2 alt docs/ --root docs/static --report docs-alt.csv
    """
    if applied is not None:
        if pages:
            raise click.UsageError("--apply takes its pages from the report; give no PAGES, or leave out --apply")
        context.exit(_apply(applied, dry_run))
    if not pages:
        raise click.UsageError("Missing argument 'PAGES...'.")
    from blip2.alt.pages import find_pages
    from blip2.alt.survey import survey
    from blip2.tasks.speaker import check_batch_size

    if root is not None and not root.is_dir():
        raise click.UsageError(f"--root {root}: there is no such folder")
    located = find_pages(pages, recursive=recursive, exclude=exclude)
    found = survey(located.pages, root=str(root or ""), remote=remote, weak=include_weak)
    problems = located.problems + found.problems
    for line in problems:
        tell(line)
    if dry_run or not found.findings:
        for finding in found.findings:
            row = finding.row
            echo([f"{shown(row.file)}:{row.line}", shown(row.image), row.problem][: 3 if row.problem else 2], False)
        tell(_counted(found))
        context.exit(int(bool(problems)))
    model = of_model(others) | of_reading(others)
    check_batch_size(batch_size)
    decoding = {"num_return": None, "prompt": prompt, **others}
    is_failed = _describe(found, report, model, decoding, batch_size, approve_all=approve_all, restart=restart)
    context.exit(int(bool(problems) or is_failed))


def _describe(
    found: Survey,
    path: Path,
    model: dict[str, Any],
    decoding: dict[str, Any],
    batch_size: int,
    *,
    approve_all: bool,
    restart: bool,
) -> bool:
    """Write the report. True if an image could not be described."""
    from blip2.alt.sink import Report, failures
    from blip2.alt.survey import PageImages
    from blip2.alt.wording import word
    from blip2.api.collect import Model
    from blip2.api.loading import as_pipeline
    from blip2.api.work import captions
    from blip2.collection import Job, Journal, run
    from blip2.collection.journal import beside
    from blip2.tasks.defaults import CAPTION, merged

    prompt = decoding.pop("prompt")
    merged(CAPTION, given(decoding))
    source, sink = PageImages(found.images), Report(path, found, approve_all=approve_all, restart=restart)
    sink.check(source)
    journal = Journal(beside(path))
    loading = of_loading(model)
    describer = Model(as_pipeline, loading.pop("model", None), loading)
    asked = {"verb": "alt", **describer.description, "prompt": prompt, "options": given(decoding)}

    def work(records: Iterator[Record]) -> Iterator[Outcome | ImageError]:
        for first in records:  # load no model if there is nothing to do
            yield from captions(describer.get(journal), prompt, given(decoding), batch_size)(chain([first], records))

    with _stoppable(path), journal.held():
        journal.begin(asked, restart=restart)
        describer.agreed(journal)
        # Images that failed before (missing, not downloadable) are tried again each time.
        job = Job(source, [sink], journal, word, asked, retries=True)
        with bar(source.num_records) as advance:
            summary = run(job, work, lambda summary, results: advance(len(results)))
        wrong = failures(found, (result for unit in source.units for result in journal.results(unit)))
    for line in wrong:
        tell(of_image(line))
    described = source.num_records - len(wrong)
    earlier = summary.before - summary.failed_before
    before = f" ({earlier:,} of them earlier)" if earlier else ""
    by_hand = f", {found.num_by_hand:,} left for you to write" if found.num_by_hand else ""
    tell(f"{_counted(found)}: {described:,} different images described{before}, {len(wrong):,} failed{by_hand}")
    tell(f"open {sink.page} to review, write yes in the column approved of {path}, then: blip2 alt --apply {path}")
    return bool(wrong)


@contextmanager
def _stoppable(path: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise Failure(f"stopped before {path} was written; the same command resumes", 130) from None
    except OSError as error:
        wrong = f"{error.filename or path}: cannot be written ({error.strerror})"
        raise Failure(f"{wrong}; fix that, and the same command resumes") from None


def _counted(found: Survey) -> str:
    return (
        f"{len(found.findings):,} of {found.num_images:,} images without alt text in {found.num_pages:,} "
        f"page{'' if found.num_pages == 1 else 's'}"
    )


def _apply(path: Path, dry_run: bool) -> int:
    from blip2.alt.apply import apply
    from blip2.alt.report import read_report
    from blip2.errors import CollectionError

    try:
        rows = read_report(path)
    except OSError as error:
        raise CollectionError(f"{path}: cannot be read ({error.strerror}); name a report of blip2 alt") from None
    num_done = num_before = num_pages = num_problems = 0
    for change in apply(rows):
        try:
            if not dry_run:
                change.write()
        except (OSError, CollectionError) as error:
            reason = f"cannot be written ({error.strerror})" if isinstance(error, OSError) else str(error)
            change.problems.append(f"{change.path}: {reason}")
            change.done.clear()
        if dry_run and change.done:
            echo([change.diff()], False)
        elif change.done:
            for line, row in change.done:
                echo([f"{shown(change.path)}:{line}", "decorative" if row.is_decorative else row.alt], False)
        for problem in change.problems:
            tell(problem)
        num_done, num_before = num_done + len(change.done), num_before + change.num_before
        num_pages, num_problems = num_pages + bool(change.done), num_problems + len(change.problems)
    pages = f"{num_pages:,} page{'' if num_pages == 1 else 's'}"
    message = f"{num_done:,} alt text{'' if num_done == 1 else 's'} in {pages}"
    message = f"would write {message}" if dry_run else f"wrote {message}"
    message += f", {num_before:,} already there" if num_before else ""
    tell(message + (f", {num_problems:,} failed" if num_problems else ""))
    if not (num_done or num_before or num_problems):
        tell(f"no row of {path} is approved; write yes in the column approved")
    return int(bool(num_problems))
