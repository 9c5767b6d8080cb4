"""A Unix socket in place of an address."""

from __future__ import annotations

import socket
import stat
import threading

import httpx
import pytest
import uvicorn

from blip2.errors import OptionError
from blip2.serve.app import create_app
from blip2.serve.connection import Connection
from blip2.serve.unix import listen_at
from tests.serve.conftest import eventually


def test_a_server_answers_there_and_leaves_nothing_behind(models, tmp_path) -> None:
    path = tmp_path / "blip2.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))  # as a server leaves it that was killed
    with listen_at(path) as listener:
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        server = uvicorn.Server(uvicorn.Config(create_app(lambda: models), http=Connection, log_level="critical"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        eventually(lambda: server.started)
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://any.example") as client:
            eventually(lambda: client.get("/ready").status_code == 200)
            assert client.get("/v1/models").json()["data"][0]["id"] == "miniature"
        with pytest.raises(OptionError, match="another server is listening there"), listen_at(path):
            pass
        server.should_exit = True
        thread.join(20)
    assert list(tmp_path.iterdir()) == []


def test_where_it_cannot_be(tmp_path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    for path, words in (
        (file, "file already exists there"),
        (tmp_path, "folder already"),
        (tmp_path / "none" / "a.sock", "cannot be opened"),
        (tmp_path / ("a" * 200), "too long"),
    ):
        with pytest.raises(OptionError, match=words), listen_at(path):
            pass
    assert file.read_text() == "mine" and list(tmp_path.iterdir()) == [file]
