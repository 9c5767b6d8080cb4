"""``blip2 pull``: download a model."""

from __future__ import annotations

import os

import click

from blip2.cli import Failure
from blip2.cli.options import REVISION, with_options


@click.command("pull")
@click.argument("name")
@with_options((REVISION,))
def command(name: str, revision: str | None) -> None:
    """Download a model from the Hugging Face hub.

    NAME is a repository on the hub; `blip2 models` lists the published ones. Only missing files are downloaded.
    Progress is printed on standard error, the folder on standard output. Ctrl-C stops, and the same command resumes.

    \b
    blip2 pull Salesforce/blip2-opt-2.7b
    blip2 pull somebody/blip2-of-mine --revision v2
    """
    from blip2.checkpoint import hub
    from blip2.checkpoint.names import BUNDLED
    from blip2.errors import CheckpointError

    if name in BUNDLED:
        raise CheckpointError(f"{name} is bundled with the package; there is nothing to download")
    if os.path.isdir(name) or name.count("/") != 1:
        raise click.UsageError(f"{name or repr(name)} is not a name on the hub, such as Salesforce/blip2-opt-2.7b")
    try:
        folder = hub.cached(name, revision) if hub.is_offline() else hub.pull(name, revision)
    except KeyboardInterrupt:
        raise Failure("stopped; the downloaded data is kept, and the same command resumes", 130) from None
    click.echo(folder)
