"""What a release is made of: the files that name versions, commands and options agree; wheels and sdists are whole."""

from __future__ import annotations

import email
import http.server
import importlib.util
import json
import os
import re
import shutil
import socketserver
import subprocess
import sys
import tarfile
import threading
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import yaml

from blip2 import native
from blip2.cli import cli
from blip2.native import build
from blip2.version import __version__

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text("utf-8"))
WORKFLOWS = {
    path.stem: yaml.load(path.read_text("utf-8"), yaml.BaseLoader)  # in which `on` is no boolean
    for path in (ROOT / ".github/workflows").glob("*.yml")
}
PYTHONS = re.findall(r"Python :: (3\.\d+)$", "\n".join(PROJECT["project"]["classifiers"]), re.M)


def steps(name: str) -> list[dict[str, Any]]:
    return [step for job in WORKFLOWS[name]["jobs"].values() for step in job.get("steps", [])]


# ---- facts that stand in several files ----


def test_pythons() -> None:
    assert PROJECT["project"]["requires-python"] == f">={PYTHONS[0]}"
    assert WORKFLOWS["test"]["jobs"]["test"]["strategy"]["matrix"]["python"] == PYTHONS
    assert re.search(r"^ARG PYTHON=(.*)$", DOCKERFILE, re.M)[1] in PYTHONS
    assert PROJECT["tool"]["cibuildwheel"]["build"] == f"cp{PYTHONS[0].replace('.', '')}-*"
    assert PROJECT["tool"]["mypy"]["python_version"] == PYTHONS[0]


def test_extras_of_the_image() -> None:
    [named] = re.findall(r"'\.\[([\w,]+)\]'", DOCKERFILE)
    assert set(named.split(",")) <= set(PROJECT["project"]["optional-dependencies"])


@pytest.mark.parametrize("name", sorted(WORKFLOWS))
def test_workflows_call_what_is_there(name: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.M))
    commands = [step["run"] for step in steps(name) if "run" in step]
    for command in commands:
        if command.startswith("make "):
            assert command.removeprefix("make ") in targets
        for path in re.findall(r"\.ci/\S+", command):
            assert (ROOT / path).exists()
    assert commands
    assert WORKFLOWS[name]["permissions"] == {"contents": "read"}  # what needs more says so, job by job


def test_a_release_is_tested_on_every_system_and_has_no_password() -> None:
    jobs = WORKFLOWS["release"]["jobs"]
    assert set(jobs["publish"]["needs"]) == set(jobs) - {"publish"}
    assert jobs["publish"]["permissions"] == {"id-token": "write"} and "tag" in jobs["publish"]["if"]
    assert "password" not in (ROOT / ".github/workflows/release.yml").read_text().replace("no password", "")
    for name in ("wheels", "dist"):  # without tags the version is a guess
        [checkout] = [step for step in jobs[name]["steps"] if "checkout" in step.get("uses", "")]
        assert checkout["with"]["fetch-depth"] == "0"


# ---- containers ----


def test_the_server_of_the_compose_file_has_options_that_exist() -> None:
    service = COMPOSE["services"]["blip2"]
    words = [re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", word) for word in service["command"]]
    verb, *options = words
    parsed = cli.get_command(None, verb).make_context(verb, options)  # raises for an option that is not there
    assert str(parsed.params["uds"]) == "/run/blip2/blip2.sock" and parsed.params["model"] == "miniature"
    assert service["network_mode"] == "none" and service["environment"]["HF_HUB_OFFLINE"] == "1"
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"]


def test_the_proxy_of_the_compose_file_is_that_of_the_documentation() -> None:
    nginx = COMPOSE["services"]["nginx"]
    [config] = [volume for volume in nginx["volumes"] if "nginx.conf" in volume]
    text = (ROOT / config.split(":")[0]).read_text()
    sockets, certificates = re.findall(r"unix:(\S+);", text), re.findall(r"ssl_certificate\S* +(\S+);", text)
    mounted = [volume.removesuffix(":ro").rsplit(":", 1)[1] for volume in nginx["volumes"]]
    for path in [*sockets, *certificates]:
        assert str(Path(path).parent) in mounted
    assert nginx["depends_on"] == {"blip2": {"condition": "service_healthy"}}
    assert set(yaml.safe_load((ROOT / "compose.gpu.yaml").read_text())["services"]) == {"blip2"}


def test_the_image_runs_as_nobody_in_particular() -> None:
    final = DOCKERFILE.split("\nFROM ")[-1]
    user = re.search(r"^USER (\d+)$", final, re.M)[1]
    assert int(user) > 0 and f"--uid {user}" in final
    assert "HEALTHCHECK" in final and "apt-get" not in final
    command = json.loads(re.search(r"^CMD (.*)$", final, re.M)[1])
    assert cli.get_command(None, command[0]).make_context(command[0], command[1:]).params["host"] == "0.0.0.0"
    for source in re.findall(r"^COPY (?!--from)(\S+)", DOCKERFILE, re.M):
        assert (ROOT / source).exists()


def test_what_git_ignores_is_not_sent_to_the_build_of_an_image() -> None:
    def patterns(file: str) -> set[str]:
        lines = (ROOT / file).read_text().splitlines()
        return {line.strip("/").removeprefix("**/") for line in lines if line and not line.startswith("#")}

    assert patterns(".gitignore") <= patterns(".dockerignore")
    assert ".git" not in patterns(".dockerignore")  # it knows the version


def module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.mark.skipif(not hasattr(socketserver, "UnixStreamServer"), reason="no Unix sockets")
@pytest.mark.parametrize("place", ["socket", "port"])
@pytest.mark.parametrize(("status", "expected"), [(200, 0), (503, 1)])
def test_the_health_of_a_container(monkeypatch, tmp_path: Path, place: str, status: int, expected: int) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def address_string(self) -> str:
            return "a test"

        def log_message(self, *arguments: Any) -> None:
            pass

        def do_GET(self) -> None:
            self.send_response(status if self.path == "/ready" else 404)
            self.end_headers()

    ready = module(ROOT / "docker/ready.py")
    socket = tmp_path / "s"
    monkeypatch.setattr(ready, "SOCKET", str(socket))
    if place == "socket":
        server: socketserver.BaseServer = socketserver.UnixStreamServer(str(socket), Handler)
    else:
        server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        monkeypatch.setattr(ready, "PORT", server.server_address[1])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(SystemExit) as ended:
            ready.main()
    finally:
        server.shutdown()
        server.server_close()
    assert (ended.value.code != 0) == bool(expected)


def test_a_container_whose_server_does_not_answer(monkeypatch, tmp_path: Path) -> None:
    ready = module(ROOT / "docker/ready.py")
    monkeypatch.setattr(ready, "SOCKET", str(tmp_path / "none"))
    monkeypatch.setattr(ready, "PORT", 1)
    with pytest.raises(SystemExit, match="no answer"):
        ready.main()
    (tmp_path / "left").write_text("")  # a socket whose server is gone
    monkeypatch.setattr(ready, "SOCKET", str(tmp_path / "left"))
    with pytest.raises(SystemExit, match="no answer"):
        ready.main()


# ---- compiling ----


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """``compiled(**environment)``: whether the kernels were compiled, into a folder of the test, and what was said."""
    monkeypatch.setattr(build, "LIBRARY", tmp_path / "kernels.so")

    def compile_it(**environment: str) -> tuple[bool, str]:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        made = build.build()
        assert (made is not None) == (tmp_path / "kernels.so").exists()
        assert [path.name for path in tmp_path.iterdir() if path.suffix in (".o", ".so")] == ["kernels.so"] * bool(made)
        return made is not None, capsys.readouterr().err

    return compile_it


def compiler_that(tmp_path: Path, does: str) -> str:
    path = tmp_path / "compiler"
    path.write_text(f"#!{sys.executable}\nimport sys\nout = sys.argv[sys.argv.index('-o') + 1]\n{does}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.skipif(sys.platform == "win32", reason="no compiler is looked for on Windows")
def test_why_there_are_no_kernels_is_one_line(compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = "blip2: no C kernels, torch's functions are used instead: "
    assert compiled(CC="no-such-cc") == (
        False, f"{begin}there is no C compiler 'no-such-cc'; install gcc, or set CC\n",
    )  # fmt: skip
    failing = compiler_that(tmp_path, "sys.exit('note: hm\\nkernels.c:3:1: error: what is this?\\nmore\\n')")
    assert compiled(CC=failing) == (False, f"{begin}{failing} failed: kernels.c:3:1: error: what is this?\n")
    silent = compiler_that(tmp_path, "sys.exit(4)")
    assert compiled(CC=silent) == (False, f"{begin}{silent} failed: exit code 4\n")
    monkeypatch.setattr(build, "IS_MAC", False)
    clang = compiler_that(tmp_path, "open(out, 'wb').write(b'\\0__kmpc_fork_call\\0')")
    done, said = compiled(CC=clang)
    assert not done and said.startswith(f"{begin}{clang} is clang") and said.count("\n") == 1
    monkeypatch.setattr(sys, "platform", "win32")
    assert compiled() == (False, f"{begin}they support Linux and macOS, not win32\n")


def test_a_build_is_for_every_processor_of_its_kind() -> None:
    """What a processor has is asked when the library is loaded, so that a wheel of one runs on another."""
    assert not [flag for flag in build.FLAGS if flag.startswith(("-march", "-mcpu", "-mtune", "-mavx"))]
    library = native.kernels()
    if library is None:
        pytest.skip("the C kernels are not compiled here")
    found = [library.blip2_prepare(most) for most in range(len(native.LEVELS))]
    assert found[0] == 0 and found == sorted(found)


# ---- what is built ----


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A wheel, one for every machine, and an sdist, as ``make dist`` makes them."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    found = {}
    for name, kind, kernels in (("wheel", "--wheel", ""), ("any", "--wheel", "no"), ("sdist", "--sdist", "")):
        out = tmp_path_factory.mktemp(name)
        command = [sys.executable, "-m", "build", "--no-isolation", kind, "--outdir", str(out), str(ROOT)]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"BLIP2_KERNELS": kernels})
        [found[name]] = out.iterdir()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "any"])
def test_a_wheel(built: dict[str, Path], tmp_path: Path, kind: str) -> None:
    wheel = built[kind]
    has_kernels = kind == "wheel" and sys.platform == "linux" and shutil.which("cc") is not None
    assert wheel.name.startswith(f"blip2-{__version__}-py3-none-")
    assert wheel.stem.endswith("-any") != has_kernels
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        assert json.loads(file.read("blip2/built.json"))["version"] == __version__
        file.extractall(tmp_path)
    assert ("blip2/native/kernels.so" in names) == has_kernels
    assert {"blip2/py.typed", "blip2/native/kernels.c", "blip2/miniature/generative/model.safetensors"} <= names
    assert {Path(name).parts[0] for name in names} == {"blip2", f"blip2-{__version__}.dist-info"}
    assert not [name for name in names if "__pycache__" in name or name.endswith((".o", ".pyc"))]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PATH": "/nowhere"}  # no compiler either
    done = subprocess.run(
        [sys.executable, str(ROOT / ".ci/wheel.py")], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert ("kernels: none" in done.stdout) != has_kernels


@pytest.mark.slow
def test_an_sdist(built: dict[str, Path], tmp_path: Path) -> None:
    with tarfile.open(built["sdist"]) as file:
        sizes = {member.name.partition("/")[2]: member.size for member in file.getmembers()}
        file.extractall(tmp_path, filter="data")
    assert {"pyproject.toml", "hatch_build.py", "README.md", "LICENSE", "NOTICE", "blip2/built.json"} <= set(sizes)
    assert {"blip2/native/kernels.c", "blip2/native/build.py", "tests/test_release.py", "constraints.txt"} <= set(sizes)
    large = {name for name, size in sizes.items() if size > 300_000}
    assert large and all(name.startswith("blip2/miniature/") for name in large)
    assert not [name for name in sizes if "__pycache__" in name or name.endswith((".so", ".o", ".pyc"))]
    [tree] = tmp_path.iterdir()
    told = email.message_from_string((tree / "PKG-INFO").read_text("utf-8"))
    assert told["Version"] == __version__ and told["Requires-Python"] == PROJECT["project"]["requires-python"]
    done = subprocess.run(
        [sys.executable, "-c", "import blip2; print(blip2.__version__)"], cwd=tree, capture_output=True, text=True
    )
    assert done.stdout.strip() == __version__  # without git


def test_click_parses_as_these_tests_think() -> None:
    """That an option which does not exist is noticed above."""
    with pytest.raises(click.NoSuchOption):
        cli.get_command(None, "serve").make_context("serve", ["--no-such-option"])
