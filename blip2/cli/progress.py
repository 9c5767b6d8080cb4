"""Progress of a run over a collection: a bar on a terminal, plain lines elsewhere, JSON lines with --log-json."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from blip2.cli import of_image

if TYPE_CHECKING:
    from blip2.api.collect import CollectionRun
    from blip2.collection import Result, Summary

LINE_S = 30.0
"""Seconds between plain lines."""
MAX_MESSAGES = 10
"""Number of failures reported one by one. The summary lists half as many reasons."""


@contextmanager
def bytes_bar(
    doing: str, *, from_bytes: int = 0, stays: bool = True
) -> Iterator[tuple[Callable[[int, int], None] | None, Callable[[], None]]]:
    """A progress bar on standard error if that is a terminal: a function to call with bytes done and in total, and one
    to call when only writing is left. ``from_bytes``: a smaller total has no bar. ``stays``: when it is finished."""
    if not sys.stderr.isatty():
        yield None, lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TextColumn("left:"),
        TimeRemainingColumn(),
    )  # fmt: skip
    bar = Progress(*columns, console=Console(stderr=True), redirect_stdout=False, transient=not stays)
    task = bar.add_task(doing, total=None)

    def update(done: int, total: int) -> None:
        if total >= from_bytes:
            bar.start()
            bar.update(task, completed=done, total=total)

    try:
        yield update, lambda: bar.update(task, description="writing")
    finally:
        bar.stop()


class Progress:
    """Reports a run on standard error. A context manager around the run. ``exit_code``: 1 if something failed."""

    def __init__(self, started: CollectionRun, *, is_json: bool) -> None:
        self._started = started
        self._is_json = is_json
        self._num_shown = 0
        self._next_s = time.monotonic() + LINE_S
        self._stack = ExitStack()
        self._bar: Any = None
        self.exit_code = 0
        for problem in started.plan.problems:
            self.problem(of_image(problem))
        if started.plan.skipped_files:
            self.tell(started.plan.skipped_files)

    # ---- during the run ----

    def __enter__(self) -> Progress:
        if sys.stderr.isatty() and not self._is_json:
            self._bar = self._stack.enter_context(_bar())
            self._task = self._bar.add_task("", total=self._started.plan.source.num_records)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        self._bar = None

    def update(self, summary: Summary, results: Sequence[Result]) -> None:
        for result in results:
            if result.status == "failed":
                self._failure(result)
        if self._bar is not None:
            self._bar.update(self._task, completed=summary.settled, total=summary.total, failed=summary.failed)
        elif time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + LINE_S
            self._line(summary)

    def problem(self, message: str) -> None:
        self.exit_code = 1
        self.tell(message, "problem")

    def tell(self, message: str, event: str = "note") -> None:
        if self._is_json:
            self._event(event, message=message)
        else:
            print(f"blip2: {click.format_filename(message)}", file=sys.stderr, flush=True)

    # ---- after the run ----

    def end(self, summary: Summary, html: Path | None) -> int:
        """Print the summary and return the exit code."""
        plan = self._started.plan
        failed = summary.failed + summary.failed_before
        self.exit_code = 1 if failed else self.exit_code
        outputs = plan.request.outputs
        written = [outputs.output, outputs.sidecar and f"*{outputs.sidecar}", outputs.xmp and "*.xmp",
                   outputs.embed and "the images' metadata"]  # fmt: skip
        for note in summary.notes:
            self.tell(note)
        if self._is_json:
            self._event(
                "summary", **_counts(summary), copies=summary.copies, repeated=summary.repeated,
                reasons=dict(summary.reasons.most_common()),
                is_complete=summary.is_complete, written=[name for name in written if name],
                errors=str(plan.journal.errors) if failed else None, html=str(html) if html else None,
            )  # fmt: skip
            return self.exit_code
        counts = [f"{summary.done:,} done", f"{summary.skipped:,} skipped", f"{summary.failed:,} failed"]
        if summary.before:
            counts.append(f"{summary.before:,} in earlier runs" + _of_which_failed(summary))
        rate = f"; {_rate(summary)} images/s" if summary.rate else ""
        self.tell(f"{', '.join(counts)}{rate}; in {', '.join(name for name in written if name)}")
        for reason, number in summary.reasons.most_common(MAX_MESSAGES // 2):
            self.tell(f"{number:,} failed: {of_image(reason)}")
        if failed:
            self.tell(f"the failures are listed in {plan.journal.errors}; add --retry-failed to try them again")
        if summary.skipped and not summary.done and plan.request.takes_text:
            self.tell("skipped images already have a text; --if-exists overwrite, append or prepend changes it")
        if summary.copies:
            self.tell(f"{_number(summary.copies, 'copy', 'copies')} of other images, given the same result")
        if summary.repeated and plan.request.takes_text:  # answers and labels are few
            self.tell(f"{_number(summary.repeated, 'caption is', 'captions are')} the same as that of another image")
        if summary.is_limited:
            without = "without it and --restart" if plan.request.run_options.restart else "without it"
            self.tell(f"stopped at --limit; {without}, the same command processes the rest")
        elif not summary.is_complete:
            self.tell("other parts are not finished; the last one to finish completes the output")
        if html:
            self.tell(f"review page: {html}")
        return self.exit_code

    # ---- one event ----

    def _failure(self, result: Result) -> None:
        self._num_shown += 1
        if self._is_json:
            self._event("failed", key=result.key, name=result.name, error_message=result.error_message)
        elif self._num_shown <= MAX_MESSAGES:
            self.tell(of_image(result.error_message))
        elif self._num_shown == MAX_MESSAGES + 1:
            self.tell("further failures are only counted")

    def _line(self, summary: Summary) -> None:
        if self._is_json:
            self._event("progress", **_counts(summary), seconds_left=_seconds_left(summary))
            return
        of = "" if summary.total is None else f" of {summary.total:,}"
        left = _seconds_left(summary)
        self.tell(
            f"{summary.settled:,}{of} images, {_rate(summary)} images/s"
            + ("" if left is None else f", {_duration(left)} left")
            + (f", {summary.failed:,} failed" if summary.failed else "")
        )

    def _event(self, event: str, **values: Any) -> None:
        print(json.dumps({"event": event, **values}), file=sys.stderr, flush=True)


def _counts(summary: Summary) -> dict[str, Any]:
    return {
        "total": summary.total, "done": summary.done, "skipped": summary.skipped, "failed": summary.failed,
        "before": summary.before, "failed_before": summary.failed_before, "seconds": round(summary.seconds, 3),
        "rate": round(summary.rate, 3),
    }  # fmt: skip


def _of_which_failed(summary: Summary) -> str:
    return f" ({summary.failed_before:,} of them failed)" if summary.failed_before else ""


def _rate(summary: Summary) -> str:
    return f"{summary.rate:.3g}" if summary.rate < 1000 else f"{summary.rate:,.0f}"


def _seconds_left(summary: Summary) -> float | None:
    if summary.total is None or not summary.rate:
        return None
    return round((summary.total - summary.settled) / summary.rate)


def _duration(seconds: float) -> str:
    """59 s, 12 min, 3 h 5 min"""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _number(number: int, what: str, several: str = "") -> str:
    return f"{number:,} {what if number == 1 else several or what + 's'}"


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(TextColumn):
        def render(self, task: Task) -> Text:
            return Text("" if task.speed is None else f"{task.speed:.3g} images/s")

    class Failed(TextColumn):
        def render(self, task: Task) -> Text:
            failed = task.fields.get("failed", 0)
            return Text(f"{failed:,} failed" if failed else "", style="red")

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("images,"), Rate(""), Failed(""),
               TextColumn("time left:"), TimeRemainingColumn())  # fmt: skip
    return Progress(*columns, console=Console(stderr=True), redirect_stdout=False)
