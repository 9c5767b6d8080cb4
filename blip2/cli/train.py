"""``blip2 train``: run a training recipe."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from blip2.cli import Failure
from blip2.cli.options import with_options

if TYPE_CHECKING:
    from blip2.train import Progress

Show = Callable[["Progress"], None]


@click.command("train")
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("-s", "--set", "changes", multiple=True, metavar="NAME=VALUE", help="Override a value of the recipe, "
              "such as optim.steps=100. Repeatable.")  # fmt: skip
@click.option("--devices", type=click.IntRange(1), default=1, metavar="N", help="Number of processes, one GPU each "
              "if there are GPUs. The result is that of a single process.")  # fmt: skip
@click.option("--dry-run", "is_dry", is_flag=True, help="Report what the recipe does: trainable parameters, memory, "
              "rows, steps, and the texts of the first batch. Nothing is written.")  # fmt: skip
@click.option("--sheet", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.html", help="With --dry-run: "
              "write the report as a page with the images of the first batch.")  # fmt: skip
@click.option("--overfit", "number", type=click.IntRange(1), metavar="N", help="Sanity check: overfit the first N "
              "rows and report whether the loss fell. The model is not saved.")  # fmt: skip
@with_options()
@click.pass_context
def command(
    context: click.Context,
    /,
    recipe: Path,
    changes: tuple[str, ...],
    devices: int,
    is_dry: bool,
    sheet: Path | None,
    number: int | None,
) -> None:
    """Train a Q-Former from a recipe.

    RECIPE is a TOML file: the stage, the model to start from, the data, the hyperparameters. Progress is printed on
    standard error, the folder of the finished model on standard output. Ctrl-C saves the state and stops; the same
    command resumes.

    \b
    blip2 train stage1.toml
    blip2 train stage2.toml --set optim.peak_lr=5e-5 --set out=runs/second
    blip2 train stage1.toml --devices 8
    torchrun --nproc-per-node 8 -m blip2 train stage1.toml
    blip2 train stage2.toml --dry-run --sheet first-batch.html
    blip2 train stage2.toml --overfit 8
    """
    overrides = dict(_parsed(change) for change in changes)
    if sheet is not None and not is_dry:
        raise click.UsageError("--sheet needs --dry-run; give both")
    if is_dry and number is not None:
        raise click.UsageError("--dry-run and --overfit exclude each other; give one of them")
    from blip2.train import OtherProcessFailed, TrainingStopped, load_recipe, run
    from blip2.train.group import end_with_launcher, group_of_environment

    group = group_of_environment()
    if (is_dry or number is not None) and max(devices, group.size) > 1:
        raise click.UsageError("--dry-run and --overfit are for one process; leave --devices out")
    if is_dry:
        _tell(recipe, overrides, sheet)
        return
    if devices > 1:
        if group.size > 1:
            raise click.UsageError("torchrun has already started the processes; leave out --devices")
        load_recipe(recipe, overrides)
        from blip2.train.launch import launch

        flags = [*(f"--set={change}" for change in changes), *(["--debug"] if context.meta.get("debug") else [])]
        raise click.exceptions.Exit(launch(["train", str(recipe), *flags], devices))
    end_with_launcher()
    with _display() if group.is_first else nullcontext(lambda progress: None) as show:
        try:
            if number is not None:
                from blip2.train import overfit

                verdict = overfit(recipe, number, report=show, overrides=overrides)
                if not verdict.is_learnt:
                    raise Failure(str(verdict))
                click.echo(verdict)
                return
            folder = run(recipe, report=show, overrides=overrides)
        except TrainingStopped as stopped:
            raise Failure(str(stopped), 130) from None
        except OtherProcessFailed as failure:
            raise click.exceptions.Exit(130 if isinstance(failure.__cause__, TrainingStopped) else 1) from None
    if group.is_first:
        click.echo(folder)


def _tell(recipe: Path, overrides: dict[str, Any], sheet: Path | None) -> None:
    from blip2.disk import write_text
    from blip2.train import preview

    found = preview(recipe, overrides=overrides)
    if sheet is not None:
        try:
            write_text(sheet, found.sheet())
        except OSError as error:
            raise Failure(f"{sheet}: cannot be written ({error.strerror or error}); name another file") from None
    for line in found.lines():
        click.echo(line)


def _parsed(change: str) -> tuple[str, Any]:
    """``optim.steps=100`` with the value as TOML. What is not TOML is a string, so that names need no quotes."""
    import tomllib

    name, equals, value = change.partition("=")
    if not name.strip() or not equals:
        raise click.UsageError(f"--set takes NAME=VALUE, such as optim.steps=100, not {change!r}")
    try:
        return name.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name.strip(), value.strip()


def line_of(progress: Progress) -> str:
    """A progress report as a line of text, without the phase and the step."""
    parts = [f"{name} {value:.4g}" for name, value in {**progress.losses, **progress.scores}.items()]
    if progress.learning_rate:
        parts.append(f"lr {progress.learning_rate:.2e}")
    if progress.images_per_s:
        parts.append(f"{progress.images_per_s:.0f} images/s")
    measures = progress.measures
    parts += [
        text.format(measures[name])
        for name, text in (
            ("tokens_per_s", "{:.0f} tokens/s"), ("mfu", "mfu {:.1%}"), ("gradient_norm", "gradient {:.3g}"),
            ("skipped", "skipped {:.0%}"), ("peak_memory_mb", "{:.0f} MB"),
        )
        if measures.get(name)
    ]  # fmt: skip
    if math.isfinite(progress.left_s):
        parts.append(f"{time_of(progress.left_s)} left")
    if progress.message:
        parts.append(progress.message)
    return "  ".join(parts)


def time_of(seconds: float) -> str:
    """75 -> "1:15", 4000 -> "1:06:40"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def _display() -> Iterator[Show]:
    """On a terminal, a bar with the last losses beside it; elsewhere, one line per report."""
    if not sys.stderr.isatty():
        yield lambda progress: click.echo(
            f"{progress.phase} {progress.step}/{progress.steps}  {line_of(progress)}".rstrip(), err=True
        )
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[line]}"))
    with Bars(*columns, console=Console(stderr=True), redirect_stdout=False) as bars:
        tasks: dict[str, Any] = {}

        def show(progress: Progress) -> None:
            if progress.scores or progress.message:  # stays above the bar
                bars.console.print(
                    f"{progress.phase} {progress.step}: {line_of(progress)}", markup=False, highlight=False
                )
                return
            if progress.phase not in tasks:
                tasks[progress.phase] = bars.add_task(progress.phase, total=progress.steps, line="")
            bars.update(tasks[progress.phase], completed=progress.step, line=line_of(progress))

        yield show
