"""What the verbs have in common: which model, how it decodes, how results are shown."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from blip2.cli import debug_option

if TYPE_CHECKING:
    from blip2.api import Pipeline

Decorator = Callable[[Any], Any]

MODEL = (
    click.option(
        "-m", "--model", metavar="NAME", help="Folder of a model, or its name on the Hugging Face hub, such as "
        "Salesforce/blip2-opt-2.7b.  [default: the bundled miniature]",
    ),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ..."),
    click.option(
        "--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto", show_default=True,
        help="Precision of image encoder and language model.",
    ),
)  # fmt: skip

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

OUTPUT = (
    click.option("--batch-size", type=int, default=16, show_default=True, help="Pictures at a time."),
    click.option("-r", "--recursive", is_flag=True, help="Look for pictures in the folders within a folder, too."),
    click.option("--json", "as_json", is_flag=True, help="One JSON object a line, with score, tokens and seconds."),
)


def with_options(*groups: tuple[Decorator, ...]) -> Decorator:
    """Add groups of options to a verb, shown in this order, and --debug at the end."""

    def add(command: Any) -> Any:
        command = debug_option(command)
        for option in reversed([option for group in groups for option in group]):
            command = option(command)
        return command

    return add


def given(decoding: dict[str, Any]) -> dict[str, Any]:
    """The decoding options that were given; the task's defaults stand for the others."""
    # By identity: 0 equals False, and a seed of 0 was given.
    return {name: value for name, value in decoding.items() if not (value is None or value is False or value == ())}


def load_pipeline(model: str | None, device: str, dtype: str) -> Pipeline:
    """The model that the options name."""
    from blip2.api import load  # imports torch

    return load(model, device=device, dtype=None if dtype == "auto" else dtype)
