"""``blip2 serve``: the models behind HTTP."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import fields
from io import BytesIO
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from blip2.cli import Failure
from blip2.cli.options import (
    CHAT_TEMPLATE,
    MODEL,
    lines_in,
    load_matcher,
    load_pipeline,
    of_model,
    of_template,
    with_options,
)
from blip2.errors import OptionError
from blip2.installed import install_line
from blip2.plaintext import lines_of

KEY_VARIABLE = "BLIP2_API_KEY"
COMMENT = re.compile(r"(^|\s)#.*")
LEVELS = ("error", "warning", "info", "debug")

ADDRESS = (
    click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0 lets other machines in."),
    click.option("--port", type=int, default=8000, show_default=True, help="0 takes any free one."),
    click.option("--uds", type=click.Path(path_type=Path), metavar="FILE", help="Listen at a Unix socket instead, for "
                 "a reverse proxy. Its owner and group may connect (mode 660)."),
    click.option("--root-path", default="", metavar="PATH", help="Where a reverse proxy shows the server, such as "
                 "/blip2. The proxy may take it off, or not."),
    click.option("--trust-proxy", "proxies", multiple=True, metavar="ADDRESS", help="A reverse proxy, or a network of "
                 "them (10.0.0.0/8), that says by X-Forwarded-For whom it asks for; this machine's own are always "
                 "believed. May be given several times."),
    click.option("--matching-model", metavar="NAME", help="Model for /match and /v1/embeddings.  [default: the "
                 "bundled one, if --model is not given]"),
)  # fmt: skip

ENGINE = (
    click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True, help="ray: "
                 "several replicas behind one port, by Ray Serve. Each has its own models (on a GPU of its own, or an "
                 "equal share of the processors), the limits below for itself, and remembers its own pictures; this "
                 "process has the port, the keys and the page."),
    click.option("--replicas", type=int, help="With --engine ray: how many.  [default: 1]"),
    click.option("--address", metavar="ADDRESS", help="With --engine ray: of a Ray cluster that this machine belongs "
                 "to, whose machines have blip2 and the models' files; the port is opened on this one only.  "
                 "[default: this machine alone]"),
)  # fmt: skip

DOOR = (
    click.option("--api-key", "keys", multiple=True, metavar="KEY", help="Only who sends this key is answered; may be "
                 f"given several times. Others on this machine can see it: {KEY_VARIABLE} and a file are safer."),
    click.option("--api-key-file", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
                 help="Keys, one a line; # begins a comment."),
    click.option("--allow-host", "hosts", multiple=True, metavar="NAME", help="A name that the server answers under, "
                 "besides localhost, addresses and names without a dot (.example.org: all below it; *: any); may be "
                 "given several times.  [default: none; with a --host that lets other machines in, those that only a "
                 "local network has (.local, .lan, .internal, ...), and with keys any]"),
    click.option("--cors-origin", "origins", multiple=True, metavar="ORIGIN", help="Web pages that may use the server "
                 "from a browser, such as https://example.org or http://localhost:3000 (*: any); may be given several "
                 "times."),
    click.option("--allow-images-from", "domains", multiple=True, metavar="DOMAIN", help="Fetch pictures from web "
                 "addresses of this host (.example.org: of all below it; *: of any); may be given several times."),
    click.option("--system-prompt", type=click.Choice(["refuse", "ignore"]), default="refuse", show_default=True,
                 help="What to do with a system message, which the model cannot follow. Chat programs that always send "
                 "one need ignore; the answer's header X-Blip2-Ignored tells of it."),
)  # fmt: skip

LOG = (
    click.option("--log-level", type=click.Choice(LEVELS), default="warning", show_default=True, help="What goes "
                 "to standard error. warning: what failed; info: a line for each request, with its id, route, status, "
                 "time and size, and nothing of what was said; debug: those of /health, /ready and /metrics, too."),
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
    click.option("--max-new-tokens", type=int, help="Tokens of an answer; who asks for more gets these.  "
                 "[default: 512]"),
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
@with_options(ADDRESS, ENGINE, DOOR, LOG, LIMITS, (*MODEL, CHAT_TEMPLATE))
def command(
    host: str,
    port: int,
    uds: Path | None,
    root_path: str,
    proxies: tuple[str, ...],
    matching_model: str | None,
    engine: str,
    replicas: int | None,
    address: str | None,
    keys: tuple[str, ...],
    api_key_file: Path | None,
    hosts: tuple[str, ...],
    origins: tuple[str, ...],
    domains: tuple[str, ...],
    log_level: str,
    **others: Any,
) -> None:
    """Answer over HTTP, many at once.

    Speaks OpenAI's interface at /v1 (chat completions with pictures, embeddings, models), and plain /caption, /ask
    and /match; /health, /ready, /metrics and /openapi.json for those who run it. SIGTERM and Ctrl-C finish what is
    running. Keys may also stand in BLIP2_API_KEY, one a line.

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
    for proxy in proxies:
        try:
            ipaddress.ip_network(proxy)
        except ValueError:
            raise OptionError(f"--trust-proxy is {proxy!r}; give an address, or a network such as 10.0.0.0/8") from None
    if uds is not None:
        source = click.get_current_context().get_parameter_source
        if other := next((name for name in ("host", "port") if source(name) is not ParameterSource.DEFAULT), None):
            raise OptionError(f"--uds is instead of an address; leave out --{other}")
    try:
        from blip2.serve.app import create_app
        from blip2.serve.fetch import Fetcher
        from blip2.serve.front import create_front
        from blip2.serve.hosts import Door, default_hosts, is_loopback
        from blip2.serve.limits import Limits
        from blip2.serve.log import logging_at
        from blip2.serve.replicas import run_replicas
        from blip2.serve.run import listen, run
        from blip2.serve.service import Models
        from blip2.serve.tidy import share_one_arena
        from blip2.serve.unix import listen_at
    except ImportError as error:
        raise Failure(f"serving needs more packages ({error}); {install_line('serve')}") from error

    model = of_model(others)
    template = of_template(others)
    limits = Limits(
        **{field.name: others[field.name] for field in fields(Limits) if others.get(field.name) is not None}
    )

    def load() -> Models:
        if matching_model is None and model["model"] is not None:
            return Models(load_pipeline(**model, **template))
        matching = model | {"model": matching_model, "revision": None, "quantize": None, "quantize_vision": False}
        matching["adapter"] = ()
        return Models(load_pipeline(**model, **template), load_matcher(**matching))

    all_keys = _keys(keys, api_key_file)
    allowed = hosts or default_hosts(host if uds is None else None, bool(all_keys))
    door = Door(cors_origins=origins, allow_hosts=allowed, root_path=root_path)
    if uds is None and not all_keys and not is_loopback(host):
        click.echo(
            f"blip2: warning: --host {host} lets in whoever can reach this machine, and there is no key; add "
            "--api-key-file FILE", err=True,
        )  # fmt: skip

    def create(load: Callable[[], Models], replica: str | None = None) -> Any:
        fetcher = Fetcher(domains=domains, max_bytes=limits.max_body_bytes)
        if replica is not None:  # the front of replicas has the door
            return create_app(load, limits=limits, fetcher=fetcher, replica=replica)
        return create_app(load, limits=limits, keys=all_keys, door=door, fetcher=fetcher)

    def on_open() -> None:
        if uds is not None:
            click.echo(f"listening at {uds} (Ctrl-C stops)")
            return
        port = listener.getsockname()[1]
        click.echo(f"listening at http://{f'[{host}]' if ':' in host else host}:{port} (Ctrl-C stops)")

    def serve(app: Any, on_open: Callable[[], None] = lambda: None, ends_process: bool = False) -> None:
        # Its warnings are of requests that are no HTTP, which on the internet are many.
        level = "warning" if log_level in ("info", "debug") else "error"
        run(
            app, listener, on_open=on_open, trusted_proxies=proxies, log_level=level, ends_process=ends_process
        )  # fmt: skip

    def serve_front(front: Any) -> None:
        serve(create_front(front, keys=all_keys, door=door))

    share_one_arena()
    with logging_at(log_level), listen(host, port) if uds is None else listen_at(uds) as listener:
        if engine == "local":
            serve(create(load), on_open, ends_process=True)
            return
        try:
            run_replicas(
                load, create, serve_front, limits, replicas=replicas or 1, address=address, device=model["device"],
                on_open=on_open,
            )  # fmt: skip
        except ImportError as error:
            raise Failure(f"--engine ray needs more packages ({error}); {install_line('ray')}") from error


def _keys(given: tuple[str, ...], file: Path | None) -> list[str]:
    """All keys; OptionError for one that is empty or that no client can send, or a file without any."""
    sources = [("--api-key", list(given))]
    if file is not None:
        sources.append((str(file), _without_comments(lines_in(file, "key"))))
        if not sources[-1][1]:
            raise OptionError(f"{file}: has no key in it; give a text file with one key a line")
    if (variable := os.environ.get(KEY_VARIABLE)) is not None:
        lines = lines_of(BytesIO(os.fsencode(variable)))
        sources.append((KEY_VARIABLE, _without_comments(line.strip() for line in lines) or [""]))
    for source, found in sources:
        for place, key in enumerate(found, 1):
            if not key:
                raise OptionError(f"{source}: an API key is empty; give one of a few dozen random characters")
            if not all("!" <= each <= "~" for each in key):
                number = f" {place}" if len(found) > 1 else ""
                raise OptionError(
                    f"{source}: key{number} has a character that no client can send; use letters, digits and signs of "
                    "plain ASCII, without spaces"
                )
    return [key for _, found in sources for key in found]


def _without_comments(lines: Iterable[str]) -> list[str]:
    """What a ``#`` at the beginning of a line, or after a space, leaves of each; without empty ones."""
    found = (COMMENT.sub("", line).strip() for line in lines)
    return [line for line in found if line]
