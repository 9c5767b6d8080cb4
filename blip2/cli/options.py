"""What the verbs have in common: which model, how it decodes, how results are shown."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from blip2.cli import debug_option, threads_option
from blip2.errors import OptionError
from blip2.plaintext import NotTextError, filled_lines

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from blip2.api import Matcher, Pipeline

Decorator = Callable[[Any], Any]

LABEL_WIDTH = 16

REVISION = click.option("--revision", help="Branch, tag or commit on the hub.  [default: the known good one]")

PRECISION = (
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ..."),
    click.option(
        "--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto", show_default=True,
        help="Precision of image encoder and language model.",
    ),
    click.option(
        "--quantize", type=click.Choice(["int8", "int4"]), help="Keep the language model's weights in 8 or 4 bits.",
    ),
    click.option("--quantize-vision", is_flag=True, help="With --quantize: the image encoder's, too."),
    click.option(
        "--vision", type=click.Choice(["int8"]), help="On a CPU: see in 8 bits, faster with VNNI, and nearly as well."
    ),
)  # fmt: skip

ADAPTER = click.option(
    "--adapter", multiple=True, metavar="NAME", help="LoRA or DoRA to merge: its folder, or name on the hub; several "
    "may be given, each perhaps as NAME=0.5, with a weight.",
)  # fmt: skip
MODEL = (
    click.option(
        "-m", "--model", metavar="NAME", help="Folder of a model, or its name on the Hugging Face hub, such as "
        "Salesforce/blip2-opt-2.7b.  [default: the bundled miniature]",
    ),
    REVISION,
    *PRECISION,
    ADAPTER,
)  # fmt: skip
INDEX_MODEL = (
    click.option(
        "-m", "--model", metavar="NAME", help="Folder of a model, or its name on the Hugging Face hub.  [default: the "
        "index's own; the bundled miniature for a new one]",
    ),
    REVISION,
    *PRECISION,
    ADAPTER,
)  # fmt: skip
CHAT_TEMPLATE = click.option("--chat-template", is_flag=True, help="Ask in the words of the language model's own chat "
                             "template.")  # fmt: skip
MODEL_NAMES = ("model", "revision", "device", "dtype", "quantize", "quantize_vision", "vision", "adapter")

# Ranges are checked where they are known: by GenerateOptions.
DECODING = (
    click.option("--beams", "num_beams", type=int, help="Beams of the search; 1 takes the likeliest token each time."),
    click.option("--max-new-tokens", type=int, help="Longest text, in tokens."),
    click.option("--min-new-tokens", type=int, help="Shortest text, in tokens."),
    click.option("--length-penalty", type=float, help="With beams: above 0 favours long texts, below 0 short ones."),
    click.option("--repetition-penalty", type=float, help="Above 1: words that are there already become unlikely."),
    click.option("--no-repeat-ngram", "no_repeat_ngram_size", type=int, help="No run of so many tokens comes twice."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be given several times."),
    click.option("--sample", is_flag=True, help="Draw each token by chance instead of searching for the likeliest."),
    click.option("--temperature", type=float, help="With --sample: below 1 is more careful, above 1 bolder."),
    click.option("--top-k", type=int, help="With --sample: draw from the k likeliest tokens."),
    click.option("--top-p", type=float, help="With --sample: draw from the likeliest that have this probability."),
    click.option("--seed", type=int, help="With --sample: the same seed, the same text."),
)

DECODING_NAMES = (
    "num_beams", "max_new_tokens", "min_new_tokens", "length_penalty", "repetition_penalty", "no_repeat_ngram_size",
    "stop", "sample", "temperature", "top_k", "top_p", "seed",
)  # fmt: skip

OUTPUT = (
    click.option("--batch-size", type=int, default=16, show_default=True, help="Pictures at a time."),
    click.option("--json", "as_json", is_flag=True, help="One JSON object a line, with score, tokens and seconds."),
)


def with_options(*groups: tuple[Decorator, ...]) -> Decorator:
    """Add groups of options to a verb, shown in this order, and --threads and --debug at the end."""

    def add(command: Any) -> Any:
        command = threads_option(debug_option(command))
        for option in reversed([option for group in groups for option in group]):
            command = option(command)
        return command

    return add


def given(decoding: dict[str, Any]) -> dict[str, Any]:
    """The decoding options that were given; the task's defaults stand for the others."""
    # By identity: 0 equals False, and a seed of 0 was given.
    return {name: value for name, value in decoding.items() if not (value is None or value is False or value == ())}


def of_model(options: dict[str, Any]) -> dict[str, Any]:
    """Take those of `MODEL` out of all options of a verb, for `load_pipeline`."""
    return {name: options.pop(name) for name in MODEL_NAMES}


def of_template(options: dict[str, Any]) -> dict[str, bool]:
    """Take `CHAT_TEMPLATE` out of all options, for `load_pipeline`; without it nothing, as before there was one."""
    return {"chat_template": True} if options.pop("chat_template") else {}


def load_pipeline(**options: Any) -> Pipeline:
    """The generative model that the options name."""
    from blip2.api.loading import as_pipeline

    return as_pipeline(_load(**options))


def load_matcher(**options: Any) -> Matcher:
    """The matching model that the options name; the bundled one by default."""
    from blip2.api.loading import as_matcher

    return as_matcher(_load(**(options | {"model": options["model"] or "miniature-itm"})))


def _load(**options: Any) -> Pipeline | Matcher:
    from blip2.api import load  # imports torch

    return load(options.pop("model"), **of_loading(options))


def of_loading(options: dict[str, Any]) -> dict[str, Any]:
    """As Python names them: None is the precision that suits the device."""
    dtype = None if options["dtype"] == "auto" else options["dtype"]
    return {**options, "dtype": dtype, "adapter": adapters_in(options.get("adapter") or ())}


def adapters_in(texts: Sequence[str]) -> dict[str, float] | None:
    """Names with weights, from NAME or NAME=0.5; None if there are none."""
    found = {}
    for text in texts:
        weighed = re.fullmatch(r"(.+)=([-+]?\d*\.?\d+)", text)
        name, weight = (text, 1.0) if weighed is None else (weighed[1], float(weighed[2]))
        found[name] = weight
    return found or None


def lines_in(path: Path, what: str) -> list[str]:
    """What a text file holds, one ``what`` a line, without empty lines; OptionError if there is none."""
    how = f"give a text file with one {what} a line"
    try:
        found = filled_lines(path)
    except OSError as error:
        raise OptionError(f"{path}: cannot be read ({error.strerror}); {how}") from None
    except NotTextError as error:
        raise OptionError(f"{path}: {error}; {how}") from None
    if not found:
        raise OptionError(f"{path}: has no {what} in it; {how}")
    return found


@contextmanager
def printing() -> Iterator[Console]:
    """Tables and lines for standard output: as a terminal shows them, or plain text without colours."""
    from rich.console import Console

    if sys.stdout.isatty():
        yield Console(highlight=False, markup=False, emoji=False)
        return
    console = Console(highlight=False, markup=False, emoji=False, width=120, file=StringIO())
    with console.capture() as captured:
        yield console
    for line in captured.get().splitlines():
        click.echo(line.rstrip())


def labelled(label: str, text: str) -> Table:
    """A label and a text, whose further lines stand below its first."""
    from rich.table import Table

    grid = Table.grid()
    grid.add_column(width=LABEL_WIDTH, style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(label, text)
    return grid


def in_bytes(number: float) -> str:
    """1.97 GB, 48.9 GB; decimal, as disks and downloads are counted."""
    if number < 1e8:
        return f"{number / 1e6:.1f} MB"
    return f"{number / 1e9:.2f} GB" if number < 1e10 else f"{number / 1e9:.1f} GB"


def in_words(number: int) -> str:
    """Parameters: 3.9 M, 986 M, 12.2 B (billions)."""
    if number < 999.5e6:
        return f"{number / 1e6:.1f} M" if number < 99.95e6 else f"{number / 1e6:.0f} M"
    return f"{number / 1e9:.1f} B"
