"""The command ``blip2``: one file per subcommand, imported only when it is called, so that help is fast.

Exit codes: 0 success; 1 something failed; 2 wrong usage; 130 Ctrl-C.
Errors are one line on standard error; ``--debug`` shows the traceback as well.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

import click
from click.shell_completion import CompletionItem

from blip2.errors import Blip2Error, OptionError, in_python

COMMANDS = {
    "caption": "Generate captions for images.",
    "ask": "Answer a question about one or more images.",
    "chat": "Chat about an image.",
    "match": "Score how well texts match an image.",
    "alt": "Write alt texts for images in web pages and Markdown.",
    "explain": "Show which image regions a text or an answer comes from.",
    "index": "Encode images once, to search them or ask about them later.",
    "search": "Search an index of images by text or by image.",
    "serve": "Start an HTTP server with an OpenAI-compatible API.",
    "assemble": "Combine pretrained parts into a model to train.",
    "rows": "Convert published data sets to training rows.",
    "train": "Train a Q-Former from a recipe.",
    "curves": "Plot losses, scores and learning rates of training runs.",
    "evaluate": "Evaluate a model on benchmarks, or against references of your own.",
    "models": "List the published models: purpose, size and memory.",
    "pull": "Download a model from the Hugging Face hub.",
    "info": "Show a model's parts, precision and memory on this machine.",
    "quantize": "Save a copy of a model with 8-bit or 4-bit weights.",
    "merge": "Merge LoRA adapters into a model.",
    "convert": "Convert checkpoints from and to LAVIS .pth files.",
    "doctor": "Check this installation and this machine.",
}
"""Each subcommand is `command` in the file of its name. The text is its line in ``blip2 --help``."""


COMPLETE = "_BLIP2_COMPLETE"
"""The environment variable through which a shell asks for completions; click derives it from the program name."""


class Failure(click.ClickException):
    """One line on standard error, and an exit code."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code

    def show(self, file: Any = None) -> None:
        click.echo(f"blip2: {self.message}", err=True)


class Cli(click.Group):
    """The group of all subcommands: imports them by name, and turns exceptions into one-line errors."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return importlib.import_module(f"blip2.cli.{name}").command

    def shell_complete(self, context: click.Context, incomplete: str) -> list[CompletionItem]:
        """The subcommands, from the table, so that none has to be imported."""
        verbs = [CompletionItem(name, help=words) for name, words in COMMANDS.items() if name.startswith(incomplete)]
        return verbs + super(click.Group, self).shell_complete(context, incomplete)

    def resolve_command(
        self, context: click.Context, arguments: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = arguments[0]
        if name not in COMMANDS and not name.startswith("-"):
            near = difflib.get_close_matches(name.lower(), [*COMMANDS, "--help"], n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
            context.fail(f"No such command {name!r}; {hint}")
        return super().resolve_command(context, arguments)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        if COMPLETE in os.environ:
            importlib.import_module("blip2.cli.complete").use()
        kwargs |= {"standalone_mode": False, "prog_name": "blip2"}
        code = 0
        try:
            result = super().main(*args, **kwargs)
            code = result if isinstance(result, int) else 0
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            code = 2
        except click.UsageError as error:
            Failure(_usage(error), 2).show()
            code = 2
        except click.Abort:
            code = 130
        except Failure as failure:
            failure.show()
            code = failure.code
        sys.exit(code)

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except (click.ClickException, click.exceptions.Exit, click.Abort, KeyboardInterrupt, BrokenPipeError):
            raise
        except Exception as error:
            if context.meta.get("debug"):
                raise
            verb = context.invoked_subcommand
            raise _failure(error, self.get_command(context, verb) if verb else None) from error


def _failure(error: Exception, verb: click.Command | None) -> Failure:
    if isinstance(error, Blip2Error):
        return Failure(of_image(in_flags(error, verb)), 2 if isinstance(error, OptionError) else 1)
    what = " ".join(str(error).split())
    what = f"{type(error).__name__}: {what}" if what else type(error).__name__
    return Failure(f"{what} (this should not happen; --debug shows the traceback)")


def in_flags(error: Blip2Error, verb: click.Command | None) -> str:
    """The message of an error with command-line flags for option names: "num_beams is 0" -> "--beams is 0".

    The flags are those of the subcommand: each parameter is named as in the Python API.
    """
    flags = {
        parameter.name: max(parameter.opts, key=len)
        for parameter in (verb.params if verb is not None else ())
        if isinstance(parameter, click.Option)
    }

    def spelled(name: str, value: str | None) -> str:
        if (flag := flags.get(name)) is None:
            return in_python(name, value)
        if value is None:
            return flag
        if value in ("False", "None"):
            return f"leave out {flag}"
        return f"add {flag}" if value == "True" else f"give {flag} {value.strip(chr(39))}"

    return error.message_with(spelled)


def of_image(message: str) -> str:
    """The message of an image error with command-line flags for Python parameters. The image's name is not changed."""
    message = message.replace("with allow_truncated=True", "with --allow-truncated")
    message = message.replace("raise max_pixels", "raise --max-pixels").replace(", or raise max_bytes", "")
    if message.endswith("but text; name an image"):
        message += ", or give a list of names by --files-from"
    return message


def _usage(error: click.UsageError) -> str:
    help_command = f"{error.ctx.command_path} --help" if error.ctx is not None else "blip2 --help"
    return f"{' '.join(error.format_message().split())} (see {help_command})"


def debug_option(command: Any) -> Any:
    """``--debug``, for every subcommand and for `blip2` itself."""

    def remember(context: click.Context, parameter: click.Parameter, value: bool) -> None:
        if value:
            context.meta["debug"] = True

    return click.option(
        "--debug", is_flag=True, expose_value=False, callback=remember, help="Show the traceback of an error."
    )(command)


def threads_option(command: Any) -> Any:
    """``--threads``, for every subcommand. OpenMP and torch read the number of threads when torch is imported."""

    def remember(context: click.Context, parameter: click.Parameter, value: int | None) -> None:
        if value is not None:
            os.environ["OMP_NUM_THREADS"] = str(value)
            if "torch" in sys.modules:
                sys.modules["torch"].set_num_threads(value)

    return click.option(
        "--threads", metavar="N", type=click.IntRange(1, 1024), expose_value=False, callback=remember,
        help="Number of CPU threads.  [default: chosen by the model's size]",
    )(command)


def _show_version(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        from blip2.version import report

        click.echo(report())
        context.exit()


@click.group(cls=Cli, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version,
    help="Show the version and the commit it was built from, and exit.",
)
@debug_option
def cli() -> None:
    """BLIP-2: captions, visual question answering, image-text matching and search.

    \b
    blip2 caption photo.jpg
    blip2 ask photo.jpg "how many dogs are there?"
    blip2 chat photo.jpg

    Without --model, the bundled miniature is used. It only knows simple drawings: for photographs, name a published
    model, such as --model Salesforce/blip2-opt-2.7b.
    """


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the command ``blip2``. Always exits the program."""
    if sys.stdin is None:  # closed by <&- and by some service managers
        sys.stdin = open(os.devnull)  # noqa: SIM115
    try:
        cli(arguments)
    except SystemExit as ended:
        code = ended.code
    if code == 130:
        # Threads may still wait for a download or for standard input; their results are no longer needed.
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(130)
    sys.exit(code)
