"""``blip2 serve``: start the HTTP server."""

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
    click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 accepts other "
                 "machines."),
    click.option("--port", type=int, default=8000, show_default=True, help="Port; 0 chooses a free one."),
    click.option("--uds", type=click.Path(path_type=Path), metavar="FILE", help="Listen on a Unix socket instead, for "
                 "a reverse proxy. Its owner and group may connect (mode 660)."),
    click.option("--root-path", default="", metavar="PATH", help="URL path under which a reverse proxy publishes the "
                 "server, such as /blip2. The proxy may strip it or not."),
    click.option("--trust-proxy", "proxies", multiple=True, metavar="ADDRESS", help="Address or network (10.0.0.0/8) "
                 "of a reverse proxy whose X-Forwarded-For is trusted; proxies on this machine always are. "
                 "Repeatable."),
    click.option("--matching-model", metavar="NAME", help="Model for /match and /v1/embeddings.  [default: the "
                 "bundled one, if --model is not given]"),
)  # fmt: skip

ENGINE = (
    click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True, help="ray: "
                 "several replicas behind one port, with Ray Serve. Each replica has its own models (one GPU, or an "
                 "equal share of the CPU), image cache and the limits below; this process keeps the port, the keys "
                 "and the web page."),
    click.option("--replicas", type=int, help="With --engine ray: number of replicas.  [default: 1]"),
    click.option("--address", metavar="ADDRESS", help="With --engine ray: address of a Ray cluster that this machine "
                 "belongs to. Its machines need blip2 and the model files; the port is opened only here.  "
                 "[default: this machine alone]"),
)  # fmt: skip

DOOR = (
    click.option("--api-key", "keys", multiple=True, metavar="KEY", help="Require this key. Repeatable. Other users of "
                 f"this machine can see it: {KEY_VARIABLE} and --api-key-file are safer."),
    click.option("--api-key-file", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
                 help="File with one key per line; # starts a comment."),
    click.option("--allow-host", "hosts", multiple=True, metavar="NAME", help="Accept requests for this host name, "
                 "besides localhost, IP addresses and names without a dot (.example.org: all subdomains; *: any). "
                 "Repeatable.  [default: none; names of local networks (.local, .lan, .internal, ...) if --host "
                 "accepts other machines; any name if there are keys]"),
    click.option("--cors-origin", "origins", multiple=True, metavar="ORIGIN", help="Allow web pages of this origin to "
                 "use the server from a browser, such as https://example.org or http://localhost:3000 (*: any). "
                 "Repeatable."),
    click.option("--allow-images-from", "domains", multiple=True, metavar="DOMAIN", help="Download images from URLs of "
                 "this host (.example.org: all subdomains; *: any). Repeatable."),
    click.option("--system-prompt", type=click.Choice(["refuse", "ignore"]), default="refuse", show_default=True,
                 help="What to do with a system message, which the model cannot follow. Chat programs that always send "
                 "one need 'ignore'; the response header X-Blip2-Ignored reports it."),
)  # fmt: skip

LOG = (
    click.option("--log-level", type=click.Choice(LEVELS), default="warning", show_default=True, help="What to log to "
                 "standard error. warning: failures; info: one line per request (id, route, status, time, size; never "
                 "its content); debug: also /health, /ready and /metrics."),
)  # fmt: skip

LIMITS = (
    click.option("--max-body-bytes", type=int, help="Maximum size of a request.  [default: 20 MiB]"),
    click.option("--max-flight-bytes", type=int, help="Maximum size of all requests in progress together.  [default: "
                 "16 times --max-body-bytes]"),
    click.option("--max-pixels", type=int, help="Maximum pixels of an image.  [default: 250 million]"),
    click.option("--max-images", type=int, help="Maximum images per request.  [default: 32]"),
    click.option("--max-texts", type=int, help="Maximum texts to match or embed per request.  [default: 256]"),
    click.option("--max-prompt-tokens", type=int, help="Maximum tokens of a question including the earlier turns.  "
                 "[default: 2048]"),
    click.option("--max-new-tokens", type=int, help="Maximum tokens to generate per answer; larger requests are "
                 "reduced to this.  [default: 512]"),
    click.option("--max-queue", type=int, help="Maximum requests running and waiting; further ones get 429. One client "
                 "(a key or an address) can have at most three quarters of them.  [default: 128]"),
    click.option("--max-connections", type=int, help="Maximum connections; beyond it, an idle one is closed.  "
                 "[default: 1024]"),
    click.option("--max-rows", type=int, help="Maximum sequences in the running batch; each beam is one.  "
                 "[default: 64]"),
    click.option("--deadline", "deadline_s", type=float, help="Seconds after which an unfinished answer fails "
                 "with 504.  [default: 120]"),
    click.option("--body-timeout", "body_s", type=float, help="Seconds for a request to arrive.  [default: 30]"),
    click.option("--shutdown-timeout", "shutdown_s", type=float, help="Seconds to finish running requests after a stop "
                 "signal.  [default: 30]"),
    click.option("--cache-entries", type=int, help="Maximum encoded images in the cache.  [default: 4096]"),
    click.option("--cache-bytes", type=int, help="Maximum size of the cache.  [default: 512 MiB]"),
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
    """Start an HTTP server with an OpenAI-compatible API.

    /v1 offers chat completions with images, embeddings and models. /caption, /ask, /match and /explain are plain
    endpoints for JSON and forms. /health, /ready, /metrics and /openapi.json are for operators, and / is a web page.
    SIGTERM and Ctrl-C finish the running requests first. BLIP2_API_KEY can hold keys, one per line.

    \b
    blip2 serve
    curl -F image=@photo.jpg http://127.0.0.1:8000/caption
    curl -F image=@photo.jpg -F question="how many dogs are there?" http://127.0.0.1:8000/ask
    blip2 serve --engine ray --replicas 2
    """
    for flag, value in (("--replicas", replicas), ("--address", address)):
        if engine == "local" and value is not None:
            raise OptionError(f"{flag} needs --engine ray")
    if replicas is not None and replicas < 1:
        raise OptionError(f"--replicas is {replicas}; use 1 or more")
    if (wrong := next((name for name in domains if not name.strip(".") or set(name) & set("/:@ ,")), None)) is not None:
        raise OptionError(f"--allow-images-from is {wrong!r}; give only a host, such as example.org or .example.org")
    for proxy in proxies:
        try:
            ipaddress.ip_network(proxy)
        except ValueError:
            raise OptionError(f"--trust-proxy is {proxy!r}; give an address or a network, such as 10.0.0.0/8") from None
    if uds is not None:
        source = click.get_current_context().get_parameter_source
        if other := next((name for name in ("host", "port") if source(name) is not ParameterSource.DEFAULT), None):
            raise OptionError(f"--uds replaces the address; leave out --{other}")
    try:
        from blip2.serve.app import create_app
        from blip2.serve.fetch import Fetcher
        from blip2.serve.front import create_front
        from blip2.serve.hosts import Door, default_hosts, is_loopback
        from blip2.serve.limits import Limits
        from blip2.serve.loading import Loading
        from blip2.serve.log import logging_at
        from blip2.serve.replicas import run_replicas
        from blip2.serve.run import listen, run
        from blip2.serve.service import Models
        from blip2.serve.trimmer import share_one_arena
        from blip2.serve.unix import listen_at
    except ImportError as error:
        raise Failure(f"serving needs more packages ({error}); {install_line('serve')}") from error

    model = of_model(others)
    template = of_template(others)
    limits = Limits(
        **{field.name: others[field.name] for field in fields(Limits) if others.get(field.name) is not None}
    )

    loading = Loading()

    def load() -> Models:
        pipeline = load_pipeline(**model, **template, progress=loading.note)
        if matching_model is None and model["model"] is not None:
            return Models(pipeline)
        matching = model | {"model": matching_model, "revision": None, "quantize": None, "quantize_vision": False}
        matching["adapter"] = ()
        return Models(pipeline, load_matcher(**matching, progress=loading.note))

    all_keys = _keys(keys, api_key_file)
    allowed = hosts or default_hosts(host if uds is None else None, bool(all_keys))
    door = Door(cors_origins=origins, allow_hosts=allowed, root_path=root_path)
    if uds is None and not all_keys and not is_loopback(host):
        click.echo(
            f"blip2: warning: --host {host} accepts anyone who can reach this machine, and no key is set; add "
            "--api-key-file FILE", err=True,
        )  # fmt: skip

    def create(load: Callable[[], Models], replica: str | None = None) -> Any:
        fetcher = Fetcher(domains=domains, max_bytes=limits.max_body_bytes)
        if replica is not None:  # the front process of the replicas checks hosts and keys
            return create_app(load, limits=limits, fetcher=fetcher, replica=replica)
        return create_app(load, limits=limits, keys=all_keys, door=door, fetcher=fetcher, loading=loading)

    def on_open() -> None:
        if uds is not None:
            click.echo(f"listening at {uds} (Ctrl-C stops)")
            return
        port = listener.getsockname()[1]
        click.echo(f"listening at http://{f'[{host}]' if ':' in host else host}:{port} (Ctrl-C stops)")

    def serve(app: Any, on_open: Callable[[], None] = lambda: None, ends_process: bool = False) -> None:
        # Uvicorn's own warnings are about malformed HTTP, which is frequent on the internet.
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
    """All API keys. OptionError for an empty key, one that no client can send, or a file without keys."""
    sources = [("--api-key", list(given))]
    if file is not None:
        sources.append((str(file), _without_comments(lines_in(file, "key"))))
        if not sources[-1][1]:
            raise OptionError(f"{file}: contains no key; give a text file with one key per line")
    if (variable := os.environ.get(KEY_VARIABLE)) is not None:
        lines = lines_of(BytesIO(os.fsencode(variable)))
        sources.append((KEY_VARIABLE, _without_comments(line.strip() for line in lines) or [""]))
    for source, found in sources:
        for place, key in enumerate(found, 1):
            if not key:
                raise OptionError(f"{source}: an API key is empty; use a few dozen random characters")
            if not all("!" <= each <= "~" for each in key):
                number = f" {place}" if len(found) > 1 else ""
                raise OptionError(
                    f"{source}: key{number} contains a character that no client can send; use printable "
                    "ASCII characters without spaces"
                )
    return [key for _, found in sources for key in found]


def _without_comments(lines: Iterable[str]) -> list[str]:
    """Each line without its comment (``#`` at the beginning or after a space); empty lines are dropped."""
    found = (COMMENT.sub("", line).strip() for line in lines)
    return [line for line in found if line]
