"""A real server on a free port of this machine, in a thread, and ways to speak to it."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

import blip2
from blip2.serve.app import create_app
from blip2.serve.connection import Connection
from blip2.serve.run import listen
from blip2.serve.service import Models, Service

EXAMPLES = Path(__file__).parents[2] / "examples"
PICTURES = [EXAMPLES / f"{name}.png" for name in ("picture", "flowers", "cats")]


def data_url(picture: bytes | Path) -> str:
    content = picture if isinstance(picture, bytes) else picture.read_bytes()
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def user(text: str, picture: bytes | Path | None = None) -> dict[str, Any]:
    """A message as clients write it."""
    if picture is None:
        return {"role": "user", "content": text}
    image = {"type": "image_url", "image_url": {"url": data_url(picture)}}
    return {"role": "user", "content": [*([{"type": "text", "text": text}] if text else []), image]}


@dataclass
class Running:
    url: str
    service: Service
    http: httpx.Client

    def chat(self, *messages: dict[str, Any], **fields: Any) -> httpx.Response:
        return self.http.post("/v1/chat/completions", json={"messages": list(messages), **fields})

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples, as Prometheus reads them."""
        families = text_string_to_metric_families(self.http.get("/metrics").text)
        return sum(
            sample.value
            for family in families
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )


@contextmanager
def serving(
    load: Callable[[], Models],
    *,
    waits: bool = True,
    port: int = 0,
    http: type[Connection] = Connection,
    **options: Any,
) -> Iterator[Running]:
    with running(create_app(load, **options), waits=waits, port=port, http=http) as server:
        yield server


@contextmanager
def running(
    app: FastAPI, *, waits: bool = True, port: int = 0, http: type[Connection] = Connection
) -> Iterator[Running]:
    """Any application of ours."""
    listener = listen("127.0.0.1", port)
    server = uvicorn.Server(uvicorn.Config(app, http=http, log_level="critical", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with httpx.Client(base_url=url, timeout=60) as client:
        eventually(lambda: server.started)
        if waits:
            eventually(lambda: client.get("/ready").status_code == 200)
        yield Running(url, app.state.service, client)
        server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


def eventually(is_so: Callable[[], bool], timeout_s: float = 20) -> None:
    end_s = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < end_s, "it never came to be"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def models() -> Models:
    return Models(blip2.load(), blip2.load("miniature-itm"))


@pytest.fixture(scope="session")
def server(models: Models) -> Iterator[Running]:
    """The miniature, with the limits that a server has by default."""
    with serving(lambda: models) as running:
        yield running


@pytest.fixture
def tiny_models(opt_model: Path, matching_model: Path) -> Models:
    """Fresh ones, to be slowed down or broken."""
    return Models(blip2.load(opt_model), blip2.load(matching_model))


@contextmanager
def slowed(models: Models, seconds: float = 0.02) -> Iterator[Callable[[], int]]:
    """Each step of the language model takes so long at least; gives how many there were."""
    language: Any = models.pipeline.speaker.engine.language
    plain_step = language.step
    steps = 0

    def step(tokens_B: torch.Tensor, state: Any) -> torch.Tensor:
        nonlocal steps
        steps += 1
        time.sleep(seconds)
        return plain_step(tokens_B, state)

    language.step = step
    yield lambda: steps
    del language.step


LONG = {"max_tokens": 90, "min_new_tokens": 90, "temperature": 0}
"""An answer of the tiny model that takes its time."""
