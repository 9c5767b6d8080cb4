"""Options that several subcommands share: the model, decoding, output."""

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
from blip2.cli.progress import bytes_bar
from blip2.errors import OptionError
from blip2.plaintext import NotTextError, filled_lines

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from blip2.api import Matcher, Pipeline

Decorator = Callable[[Any], Any]

LABEL_WIDTH = 16

REVISION = click.option("--revision", help="Branch, tag or commit on the hub.  [default: a tested commit]")

PRECISION = (
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ..."),
    click.option(
        "--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto", show_default=True,
        help="Precision of the image encoder and the language model.",
    ),
    click.option(
        "--quantize", type=click.Choice(["int8", "int4"]), help="Quantise the language model's weights to 8 or 4 bits.",
    ),
    click.option("--quantize-vision", is_flag=True, help="With --quantize: quantise the image encoder as well."),
    click.option(
        "--vision", type=click.Choice(["int8"]), help="CPU only: run the image encoder in 8 bits (weights and "
        "activations). Faster on processors with VNNI, slightly less accurate."
    ),
)  # fmt: skip

ADAPTER = click.option(
    "--adapter", multiple=True, metavar="NAME", help="LoRA or DoRA adapter to merge: a folder or a name on the hub. "
    "Repeatable; NAME=0.5 sets a weight.",
)  # fmt: skip
MODEL = (
    click.option(
        "-m", "--model", metavar="NAME", help="Model folder, or a name on the Hugging Face hub such as "
        "Salesforce/blip2-opt-2.7b.  [default: the bundled miniature]",
    ),
    REVISION,
    *PRECISION,
    ADAPTER,
)  # fmt: skip
INDEX_MODEL = (
    click.option(
        "-m", "--model", metavar="NAME", help="Model folder, or a name on the Hugging Face hub.  [default: the model "
        "that made the index; the bundled miniature for a new one]",
    ),
    REVISION,
    *PRECISION,
    ADAPTER,
)  # fmt: skip
CHAT_TEMPLATE = click.option("--chat-template", is_flag=True, help="Format the prompt with the language model's own "
                             "chat template.")  # fmt: skip
LARGE_BYTES = 2**30
"""Models of fewer bytes are loaded without a progress bar."""
MODEL_NAMES = ("model", "revision", "device", "dtype", "quantize", "quantize_vision", "vision", "adapter")

# Ranges are checked by GenerateOptions.
DECODING = (
    click.option("--beams", "num_beams", type=int, help="Number of beams; 1 is greedy decoding."),
    click.option("--max-new-tokens", type=int, help="Maximum length of the generated text, in tokens."),
    click.option("--min-new-tokens", type=int, help="Minimum length of the generated text, in tokens."),
    click.option("--length-penalty", type=float, help="With beams: above 0 favours longer texts, below 0 shorter."),
    click.option("--repetition-penalty", type=float, help="Above 1: makes tokens that already occur less likely."),
    click.option("--no-repeat-ngram", "no_repeat_ngram_size", type=int, help="Never repeat an n-gram of this size."),
    click.option("--stop", multiple=True, metavar="TEXT", help="Stop before this text. Repeatable."),
    click.option("--sample", is_flag=True, help="Sample each token instead of searching for the most likely text."),
    click.option("--temperature", type=float, help="With --sample: below 1 is less random, above 1 more random."),
    click.option("--top-k", type=int, help="With --sample: sample from the k most likely tokens."),
    click.option("--top-p", type=float, help="With --sample: sample from the most likely tokens whose probabilities "
                 "sum to p."),
    click.option("--seed", type=int, help="With --sample: seed; the same seed gives the same text."),
)  # fmt: skip
DECODING_NAMES = (
    "num_beams", "max_new_tokens", "min_new_tokens", "length_penalty", "repetition_penalty", "no_repeat_ngram_size",
    "stop", "sample", "temperature", "top_k", "top_p", "seed",
)  # fmt: skip

OUTPUT = (
    click.option("--batch-size", type=int, default=16, show_default=True, help="Images per batch."),
    click.option("--json", "as_json", is_flag=True, help="Print a JSON object per line: text, score, tokens, seconds."),
)


def with_options(*groups: tuple[Decorator, ...]) -> Decorator:
    """Add groups of options to a subcommand, shown in this order, then --threads and --debug."""

    def add(command: Any) -> Any:
        command = threads_option(debug_option(command))
        for option in reversed([option for group in groups for option in group]):
            command = option(command)
        return command

    return add


def given(decoding: dict[str, Any]) -> dict[str, Any]:
    """The decoding options that were given; the task's defaults apply to the others."""
    # Compare by identity: 0 equals False, but a seed of 0 was given.
    return {name: value for name, value in decoding.items() if not (value is None or value is False or value == ())}


def of_model(options: dict[str, Any]) -> dict[str, Any]:
    """Take the options of `MODEL` out of all options of a subcommand, for `load_pipeline`."""
    return {name: options.pop(name) for name in MODEL_NAMES}


def of_template(options: dict[str, Any]) -> dict[str, bool]:
    """Take `CHAT_TEMPLATE` out of all options, for `load_pipeline`. Empty if the flag was not given."""
    return {"chat_template": True} if options.pop("chat_template") else {}


def load_pipeline(**options: Any) -> Pipeline:
    """The generative model that the options name."""
    from blip2.api.loading import as_pipeline

    return as_pipeline(_load(**options))


def load_matcher(**options: Any) -> Matcher:
    """The matching model that the options name; the bundled one by default."""
    from blip2.api.loading import as_matcher

    return as_matcher(_load(**(options | {"model": options["model"] or "miniature-itm"})))


def _load(*, progress: Callable[[int, int], None] | None = None, **options: Any) -> Pipeline | Matcher:
    """``progress``: as for `blip2.load`; without it, large models have a bar."""
    from blip2.api import load  # imports torch

    with bytes_bar("loading the model", from_bytes=LARGE_BYTES, stays=False) as (bar, _):
        return load(options.pop("model"), **of_loading(options), progress=progress or bar)


def of_loading(options: dict[str, Any]) -> dict[str, Any]:
    """Options under their Python names. A dtype of None lets the device decide."""
    dtype = None if options["dtype"] == "auto" else options["dtype"]
    return {**options, "dtype": dtype, "adapter": adapters_in(options.get("adapter") or ())}


def adapters_in(texts: Sequence[str]) -> dict[str, float] | None:
    """Adapter names with weights, from NAME or NAME=0.5; None if there are none."""
    found = {}
    for text in texts:
        weighted = re.fullmatch(r"(.+)=([-+]?\d*\.?\d+)", text)
        name, weight = (text, 1.0) if weighted is None else (weighted[1], float(weighted[2]))
        found[name] = weight
    return found or None


def lines_in(path: Path, what: str) -> list[str]:
    """The lines of a text file without empty ones, one ``what`` each. OptionError if there are none."""
    how = f"give a text file with one {what} per line"
    try:
        found = filled_lines(path)
    except OSError as error:
        raise OptionError(f"{path}: cannot be read ({error.strerror}); {how}") from None
    except NotTextError as error:
        raise OptionError(f"{path}: {error}; {how}") from None
    if not found:
        raise OptionError(f"{path}: contains no {what}; {how}")
    return found


@contextmanager
def printing() -> Iterator[Console]:
    """A console on standard output: with colours on a terminal, plain text elsewhere."""
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
    """A label and a text whose further lines are aligned with its first."""
    from rich.table import Table

    grid = Table.grid()
    grid.add_column(width=LABEL_WIDTH, style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(label, text)
    return grid


def in_bytes(number: float) -> str:
    """1.97 GB, 48.9 GB: decimal units, as for disks and downloads."""
    if number < 1e8:
        return f"{number / 1e6:.1f} MB"
    return f"{number / 1e9:.2f} GB" if number < 1e10 else f"{number / 1e9:.1f} GB"


def in_words(number: int) -> str:
    """Numbers of parameters: 3.9 M, 986 M, 12.2 B (billions)."""
    if number < 999.5e6:
        return f"{number / 1e6:.1f} M" if number < 99.95e6 else f"{number / 1e6:.0f} M"
    return f"{number / 1e9:.1f} B"
