"""The reference of the command line: a page for each subcommand, from click."""

from __future__ import annotations

from typing import Any

import click

from blip2.cli import COMMANDS, cli, collect, images, options
from docs.generate.markdown import entry, paragraphs, prose

GROUPS: dict[str, tuple[Any, ...]] = {
    "Output files": collect.OUTPUTS,
    "Reading rows": collect.SOURCES,
    "Wording of captions": collect.WORDS,
    "Resuming and dividing the work": collect.RUN_OPTIONS,
    "Several devices or machines": collect.MACHINES,
    "Finding and reading images": images.IMAGE_OPTIONS,
    "Decoding": options.DECODING,
    "Model and precision": (*options.MODEL, options.CHAT_TEMPLATE),
}
"""Options that several subcommands share, in the order in which a page shows them, after its own."""


def overview() -> str:
    """All subcommands, and what holds for each of them."""
    parts = [
        "# Command line",
        "`blip2 COMMAND --help` prints what is on these pages; they are generated from the same source.",
        *(entry(f"[`blip2 {name}`](cli/{name}.md)", text) for name, text in COMMANDS.items()),
        "Exit codes: 0 success; 1 something failed, and a line on standard error says what; 2 wrong usage; 130 Ctrl-C. "
        "Results go to standard output, everything else to standard error.",
        "```{toctree}\n:hidden:\n" + "\n".join(f"cli/{name}" for name in COMMANDS) + "\n```",
    ]
    return "\n\n".join(parts) + "\n"


def pages() -> dict[str, str]:
    return {name: _page(name) for name in COMMANDS}


def _page(name: str) -> str:
    command = cli.get_command(None, name)  # type: ignore[arg-type]
    assert command is not None
    context = click.Context(command, info_name=f"blip2 {name}")
    usage = command.get_usage(context).removeprefix("Usage: ")
    help_text = (command.help or "").partition("\n")[2]
    parts = [f"# blip2 {name}", COMMANDS[name], f"```text\n{' '.join(usage.split())}\n```", paragraphs(help_text)]
    left = [each for each in command.params if isinstance(each, click.Option)]
    shared = {heading: collect.names_of(group) for heading, group in GROUPS.items()}
    grouped = {heading: [each for each in left if each.name in names] for heading, names in shared.items()}
    taken = {each.name for group in grouped.values() for each in group}
    own = [each for each in left if each.name not in taken]
    for heading, group in {"Options": own, **grouped}.items():
        if group:
            parts += [f"## {heading}", *(_option(each, context) for each in group)]
    if command.epilog:
        parts.append(paragraphs(command.epilog))
    return "\n\n".join(part for part in parts if part) + "\n"


def _option(option: click.Option, context: click.Context) -> str:
    """As --help shows it: names and values, the text, the default."""
    record = option.get_help_record(context)
    assert record is not None, option.name
    names, text = record
    return entry(f"`{names}`", prose(" ".join(text.split())))
