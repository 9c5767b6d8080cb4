"""`blip2 serve`: what it is told, and what it says when it cannot."""

from __future__ import annotations

import builtins
import socket
import sys

import pytest

from blip2.cli.serve import _keys
from blip2.errors import OptionError


def test_without_its_packages_it_says_what_to_install(run, monkeypatch) -> None:
    plain = builtins.__import__

    def without(name, *arguments, **options):
        if name == "blip2.serve.app":
            raise ModuleNotFoundError("No module named 'fastapi'")
        return plain(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    done = run("serve")
    assert done.exit_code == 1 and "fastapi" in done.stderr
    assert "pip install" in done.stderr and "[serve]" in done.stderr


def test_without_ray_it_says_what_to_install(run, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr("blip2.serve.replicas.prepare", lambda address: None)  # the environment is the other tests'
    done = run("serve", "--engine", "ray", "--port", "0")
    assert done.exit_code == 1 and "pip install" in done.stderr and "[ray]" in done.stderr


def test_a_port_that_is_taken(run) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run("serve", "--port", str(port))
    assert done.exit_code == 2 and f"port {port} of 127.0.0.1 cannot be opened" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "99999"], "cannot be opened"),
        (["--max-rows", "0"], "--max-rows is 0; use 1 or more"),
        (["--deadline", "-1"], "--deadline is -1"),
        (["--api-key", ""], "an API key is empty"),
        (["--api-key", "schlüssel"], "--api-key: key contains a character that no client can send"),
        (["--uds", "a.sock", "--port", "8000"], "--uds replaces the address; leave out --port"),
        (["--trust-proxy", "proxy.example"], "--trust-proxy is 'proxy.example'; give an address"),
        (["--allow-host", "http://a.org"], "--allow-host is 'http://a.org'; give only a name"),
        (["--cors-origin", "a.org"], "--cors-origin is 'a.org'; give a scheme and a host"),
        (["--root-path", "blip2"], "--root-path is 'blip2'; give a path such as /blip2"),
        (["--replicas", "2"], "--replicas needs --engine ray"),
        (["--address", "auto"], "--address needs --engine ray"),
        (["--engine", "ray", "--replicas", "0"], "--replicas is 0; use 1 or more"),
        (["--engine", "ray", "--max-rows", "0"], "--max-rows is 0"),
    ],
)
def test_what_cannot_be(run, arguments, words) -> None:
    done = run("serve", *arguments)
    assert done.exit_code == 2 and words in done.stderr


def test_a_model_that_is_not_there_ends_it(run, tmp_path) -> None:
    done = run("serve", "--port", "0", "-m", str(tmp_path / "nowhere"))
    assert done.exit_code == 1 and "nowhere" in done.stderr


def test_what_is_done_with_system_messages(run, monkeypatch) -> None:
    seen = []

    def create(load, *, limits, **others):
        seen.append(limits.system_prompt)
        raise OptionError("far enough")

    monkeypatch.setattr("blip2.serve.app.create_app", create)
    for arguments in ([], ["--system-prompt", "ignore"], ["--system-prompt", "refuse"], ["--system-prompt", "obey"]):
        assert run("serve", "--port", "0", *arguments).exit_code == 2
    assert seen == ["refuse", "ignore", "refuse"]


def test_keys_come_from_flags_a_file_and_the_environment(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("BLIP2_API_KEY", raising=False)
    file = tmp_path / "keys"
    file.write_text("one\n\n two \n")
    assert _keys(("zero",), file) == ["zero", "one", "two"]
    assert _keys((), None) == []
    monkeypatch.setenv("BLIP2_API_KEY", "three")
    assert _keys((), None) == ["three"]
    monkeypatch.setenv("BLIP2_API_KEY", "")
    with pytest.raises(OptionError, match="empty"):
        _keys((), None)
    monkeypatch.delenv("BLIP2_API_KEY")
    file.write_bytes("one\r\ntwo".encode("utf-8-sig"))
    assert _keys((), file) == ["one", "two"]
    for text in ("\n", "# none yet\n"):
        file.write_text(text)
        with pytest.raises(OptionError, match="contains no key"):
            _keys((), file)
    file.write_bytes("# of the team\r\none\r\n\r\n  two\t# Anna's\r\nthr#ee\r\n#four".encode("utf-8-sig"))
    assert _keys((), file) == ["one", "two", "thr#ee"]
    for key in ("a b", "é", "a\u200bb", "a\x00b"):
        file.write_text(f"good\n{key}\n", "utf-8")
        with pytest.raises(OptionError, match="keys: key 2 contains a character that no client can send") as error:
            _keys((), file)
        assert key not in str(error.value)
    monkeypatch.setenv("BLIP2_API_KEY", "\ufefffive\n# comment\nsix\n")
    assert _keys((), None) == ["five", "six"]
    monkeypatch.delenv("BLIP2_API_KEY")
    with pytest.raises(OptionError, match="cannot be read"):
        _keys((), tmp_path / "missing")


@pytest.mark.parametrize("domain", ["https://example.org/", "example.org:80", "a.org,b.org", "", "."])
def test_what_is_no_host_is_refused(run, domain):
    result = run("serve", "--allow-images-from", domain)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"blip2: --allow-images-from is {domain!r}; give only a host")


@pytest.mark.parametrize(
    ("arguments", "is_warned"),
    [
        (["--host", "0.0.0.0"], True),
        (["--host", "0.0.0.0", "--api-key", "k"], False),
        ([], False),
        (["--host", "::1"], False),
    ],
)
def test_a_server_for_everybody_without_a_key_is_warned_of(run, monkeypatch, arguments, is_warned) -> None:
    monkeypatch.delenv("BLIP2_API_KEY", raising=False)
    monkeypatch.setattr("blip2.serve.run.run", lambda app, listener, **options: None)
    done = run("serve", "--port", "0", *arguments)
    assert done.exit_code == 0 and ("no key is set; add --api-key-file FILE" in done.stderr) is is_warned
