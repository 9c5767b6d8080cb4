"""``blip2 serve``: the models behind HTTP."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from blip2.cli import Failure
from blip2.cli.options import MODEL, lines_in, load_matcher, load_pipeline, of_model, with_options
from blip2.errors import OptionError
from blip2.installed import install_line

KEY_VARIABLE = "BLIP2_API_KEY"

ADDRESS = (
    click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0 lets other machines in."),
    click.option("--port", type=int, default=8000, show_default=True, help="0 takes any free one."),
    click.option("--matching-model", metavar="NAME", help="Model for /match and /v1/embeddings.  [default: the "
                 "bundled one, if --model is not given]"),
)  # fmt: skip

ENGINE = (
    click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True, help="ray: "
                 "several replicas behind one port, by Ray Serve. Each has its own models (on a GPU of its own, or an "
                 "equal share of the processors), the limits below for itself, and remembers its own pictures."),
    click.option("--replicas", type=int, help="With --engine ray: how many.  [default: 1]"),
    click.option("--address", metavar="ADDRESS", help="With --engine ray: of a Ray cluster, whose machines have blip2, "
                 "the models' files and the same --port.  [default: this machine alone]"),
)  # fmt: skip

DOOR = (
    click.option("--api-key", "keys", multiple=True, metavar="KEY", help="Only who sends this key is answered; may be "
                 f"given several times. Others on this machine can see it: {KEY_VARIABLE} and a file are safer."),
    click.option("--api-key-file", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
                 help="Keys, one a line."),
    click.option("--allow-images-from", "domains", multiple=True, metavar="DOMAIN", help="Fetch pictures from web "
                 "addresses of this host (.example.org: of all below it; *: of any); may be given several times."),
)  # fmt: skip

LIMITS = (
    click.option("--max-body-bytes", type=int, help="Bytes of a request.  [default: 20 MiB]"),
    click.option("--max-flight-bytes", type=int, help="Bytes of all requests that are being sent, or are sent and "
                 "still needed.  [default: 16 times --max-body-bytes]"),
    click.option("--max-pixels", type=int, help="Pixels of a picture.  [default: 250 million]"),
    click.option("--max-images", type=int, help="Pictures in a request.  [default: 32]"),
    click.option("--max-texts", type=int, help="Texts to match or embed in a request.  [default: 256]"),
    click.option("--max-prompt-tokens", type=int, help="Tokens of a question, with what was said before.  "
                 "[default: 2048]"),
    click.option("--max-new-tokens", type=int, help="Tokens that a request may ask for.  [default: 512]"),
    click.option("--max-queue", type=int, help="Requests in work and waiting; others get 429. One client (a key, or "
                 "an address) has three quarters of them at most.  [default: 128]"),
    click.option("--max-connections", type=int, help="At one more, a connection that does nothing is closed.  "
                 "[default: 1024]"),
    click.option("--max-rows", type=int, help="Answers written at a time; each beam is one.  [default: 64]"),
    click.option("--deadline", "deadline_s", type=float, help="Seconds for an answer, then 504.  [default: 120]"),
    click.option("--body-timeout", "body_s", type=float, help="Seconds for a request to arrive.  [default: 30]"),
    click.option("--shutdown-timeout", "shutdown_s", type=float, help="Seconds that a stop signal waits for what is "
                 "running.  [default: 30]"),
    click.option("--cache-entries", type=int, help="Encoded pictures that are remembered.  [default: 4096]"),
    click.option("--cache-bytes", type=int, help="What they may take.  [default: 512 MiB]"),
)  # fmt: skip


@click.command("serve")
@with_options(ADDRESS, ENGINE, DOOR, LIMITS, MODEL)
def command(
    host: str,
    port: int,
    matching_model: str | None,
    engine: str,
    replicas: int | None,
    address: str | None,
    keys: tuple[str, ...],
    api_key_file: Path | None,
    domains: tuple[str, ...],
    **others: Any,
) -> None:
    """Answer over HTTP, many at once.

    Speaks OpenAI's interface at /v1 (chat completions with pictures, embeddings, models), and plain /caption, /ask
    and /match; /health, /ready, /metrics and /openapi.json for those who run it. SIGTERM and Ctrl-C finish what is
    running. A key may also stand in BLIP2_API_KEY.

    \b
    blip2 serve
    curl -F image=@photo.jpg http://127.0.0.1:8000/caption
    curl -F image=@photo.jpg -F question="how many dogs are there?" http://127.0.0.1:8000/ask
    blip2 serve --engine ray --replicas 2
    """
    for flag, value in (("--replicas", replicas), ("--address", address)):
        if engine == "local" and value is not None:
            raise OptionError(f"{flag} is for several servers behind one port; add --engine ray")
    if replicas is not None and replicas < 1:
        raise OptionError(f"--replicas is {replicas}; use 1 or more")
    if (wrong := next((name for name in domains if not name.strip(".") or set(name) & set("/:@ ,")), None)) is not None:
        raise OptionError(f"--allow-images-from is {wrong!r}; give a host alone, such as example.org, or .example.org")
    try:
        from blip2.serve.app import create_app
        from blip2.serve.fetch import Fetcher
        from blip2.serve.limits import Limits
        from blip2.serve.replicas import run_replicas
        from blip2.serve.run import listen, run
        from blip2.serve.service import Models
    except ImportError as error:
        raise Failure(f"serving needs more packages ({error}); {install_line('serve')}") from error

    model = of_model(others)
    limits = Limits(
        **{field.name: others[field.name] for field in fields(Limits) if others.get(field.name) is not None}
    )

    def load() -> Models:
        if matching_model is None and model["model"] is not None:
            return Models(load_pipeline(**model))
        matching = model | {"model": matching_model, "revision": None, "quantize": None, "quantize_vision": False}
        return Models(load_pipeline(**model), load_matcher(**matching))

    all_keys = _keys(keys, api_key_file)

    def create(load: Callable[[], Models], replica: str | None = None) -> Any:
        fetcher = Fetcher(domains=domains, max_bytes=limits.max_body_bytes)
        return create_app(load, limits=limits, keys=all_keys, fetcher=fetcher, replica=replica)

    def on_open(port: int) -> None:
        click.echo(f"listening at http://{f'[{host}]' if ':' in host else host}:{port} (Ctrl-C stops)")

    if engine == "local":
        listener = listen(host, port)
        run(create(load), listener, on_open=lambda: on_open(listener.getsockname()[1]), ends_process=True)
        return
    try:
        run_replicas(
            load, create, limits, replicas=replicas or 1, address=address, host=host, port=port,
            device=model["device"], on_open=on_open,
        )  # fmt: skip
    except ImportError as error:
        raise Failure(f"--engine ray needs more packages ({error}); {install_line('ray')}") from error


def _keys(given: tuple[str, ...], file: Path | None) -> list[str]:
    """All keys; OptionError for one that is empty, or a file without any."""
    found = list(given)
    if file is not None:
        found += lines_in(file, "key")
    if (variable := os.environ.get(KEY_VARIABLE)) is not None:
        found.append(variable.strip())
    if not all(found):
        raise OptionError("an API key is empty; give one of a few dozen random characters")
    return found
