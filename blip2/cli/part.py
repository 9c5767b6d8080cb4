"""What ``blip2 info`` shows for a single part: a language model, an image encoder, a BERT."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from blip2.cli.options import in_bytes, in_words, labelled, printing


def show_part(name: str | None, revision: str | None, as_json: bool) -> bool:
    """Print the report if the name is that of a part of a model, not of a whole one; return whether it was."""
    from blip2.checkpoint.describe import find, stored

    folder = find(name, revision)
    if folder is None:
        return False
    from blip2.checkpoint.parts import describe_part

    if (part := describe_part(folder)) is None:
        return False
    files = stored(folder)
    if as_json:
        content = {"model": name, "folder": str(folder), **asdict(part), "disk_bytes": files.num_bytes}
        click.echo(json.dumps(content, indent=2))
        return True
    dtypes = [str(dtype).removeprefix("torch.") for dtype in files.dtypes]
    with printing() as out:
        out.print(str(name), style="bold")
        out.print(labelled("For", f"the {part.kind} of a model: blip2 assemble {part.option} {name}"))
        out.print(labelled("Folder", str(folder)))
        out.print(labelled("On disk", f"{in_bytes(files.num_bytes)}: {', '.join(dtypes)}"))
        out.print(labelled("Family", part.family))
        out.print(labelled("Architecture", part.architecture))
        out.print(labelled("Parameters", in_words(part.num_parameters)))
        out.print(labelled("Memory", ", ".join(f"{kind} {in_bytes(n)}" for kind, n in part.memory_bytes.items())))
    return True
