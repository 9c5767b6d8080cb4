"""The site: its commands and snippets run, its links lead somewhere, its search finds what people ask for.

Guides with a test of their own (tests/cli/test_guides.py, test_alt.py) are run there.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from docs import generate
from docs.generate import figure, questions
from tests import documents

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if not {"generated", "_build"} & {*path.relative_to(DOCS).parts})
ELSEWHERE = "".join((ROOT / f"tests/cli/{name}.py").read_text("utf-8") for name in ("test_guides", "test_alt"))
RUN_HERE = [page for page in PAGES if f'"{page.name}"' not in ELSEWHERE]
needs_sphinx = pytest.mark.skipif(find_spec("furo") is None, reason="needs blip2[docs]")


def named(page: Path) -> str:
    return page.relative_to(DOCS).as_posix()


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    documents.prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def has(language: str) -> list[Path]:
    return [page for page in RUN_HERE if documents.blocks(page.read_text("utf-8"), language)]


@pytest.mark.parametrize("page", has("python"), ids=named)
def test_the_python_runs(page: Path, folder: Path) -> None:
    for code in documents.blocks(page.read_text("utf-8"), "python"):
        documents.run_python(code, str(page))


@pytest.mark.parametrize("page", has("console"), ids=named)
def test_the_commands_print_what_is_shown(page: Path, folder: Path) -> None:
    """In order, in one folder. What asks a server is in the next test."""
    if page.name == "captions.md":
        pytest.importorskip("webdataset")
    text = page.read_text("utf-8")
    documents.write_recipes(text)
    for command in documents.commands(text):
        if command.line.startswith("curl "):
            continue
        done = documents.run(command)
        if command.line == "blip2 doctor":  # which finds what is wrong with the machine of the test
            assert done.exit_code in (0, 1) and done.stdout
            continue
        documents.check(command, done, folder)


def test_the_requests_are_answered(folder: Path) -> None:
    pytest.importorskip("uvicorn")
    import uvicorn

    import blip2
    from blip2.serve.app import create_app
    from blip2.serve.connection import Connection
    from blip2.serve.run import listen
    from blip2.serve.service import Models

    models = Models(blip2.load(), blip2.load("miniature-itm"))
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(create_app(lambda: models), http=Connection, log_level="critical"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    asked = [each for page in RUN_HERE for each in documents.commands(page.read_text("utf-8")) if "curl " in each.line]
    assert len(asked) >= 5
    try:
        for command in asked:
            here = command.line.replace(":8000", f":{listener.getsockname()[1]}")
            curl = here.replace("curl ", "curl --silent --fail --retry 20 --retry-connrefused --retry-all-errors ", 1)
            done = subprocess.run(["bash", "-c", curl], capture_output=True, text=True)
            assert done.returncode == 0 and done.stdout.startswith("{"), (command.line, done)
    finally:
        server.should_exit = True
        thread.join(20)


def test_every_command_that_is_shown_exists() -> None:
    """Those that do not run here, too: each subcommand, and each option that stands beside one."""
    from blip2.cli import COMMANDS, cli

    shown = {page.name: documents.blocks(page.read_text("utf-8"), "(?:sh|console)") for page in PAGES}
    shown["README.md"] = documents.blocks((ROOT / "README.md").read_text("utf-8"), "(?:sh|console)")
    for name in COMMANDS:  # and in --help
        text = cli.get_command(None, name).help or ""  # type: ignore[arg-type, union-attr]
        parts = text.split("\n\n")
        shown[f"{name} --help"] = [part for part in parts if re.match(r"\s*\x08\s*(blip2|curl|printf) ", part)]
        assert shown[f"{name} --help"], name
    assert sum(map(len, shown.values())) > 50
    for place, blocks in shown.items():
        for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
            for verb, rest in re.findall(r"(?<![\w/.-])blip2 ([a-z]+)((?: [^#|;&]*)?)", line.partition(" #")[0]):
                command = cli.get_command(None, verb)  # type: ignore[arg-type]
                assert command is not None, (place, line)
                known = {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
                assert {*re.findall(r"(?<=\s)--[a-z-]+", rest)} <= known | {"--help"}, (place, line)


def test_generated_pages_cover_the_code(tmp_path: Path) -> None:
    """They are made at each build; here, that nothing is left out of them."""
    import blip2
    from blip2.cli import COMMANDS
    from blip2.train.recipes import Recipe
    from docs.generate import recipe_keys
    from docs.generate.markdown import fields_of

    written = {path.relative_to(tmp_path).as_posix(): path.read_text("utf-8") for path in generate.write(tmp_path)}
    told = written["python.md"] + written["transformers.md"] + written["options.md"] + "__version__"
    assert [name for name in blip2.__all__ if name not in told] == []
    for name in COMMANDS:
        assert COMMANDS[name] in written[f"cli/{name}.md"] and f"cli/{name}" in written["command-line.md"]
    for kind in recipe_keys.tables(Recipe).values():
        for field in fields_of(kind):
            assert f"`{field.name}: " in written["recipe.md"]
    for route in ("/caption", "/ask", "/match", "/explain", "/v1/chat/completions", "/v1/embeddings"):
        assert f"## POST {route}\n" in written["http.md"]
    for page in (DOCS / "guides").glob("*.md"):
        assert f"guides/{page.name}" in written["guides.md"]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.md")}
    generate.write(tmp_path)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.md")}


def test_the_figure_is_what_is_drawn() -> None:
    remedy = "python -m docs.generate.figure > docs/architecture.svg"
    assert (DOCS / "architecture.svg").read_text("utf-8") == figure.svg(), remedy


def test_links_of_the_sources_lead_somewhere() -> None:
    """From each file, as they are followed where the repository is shown."""
    lost = []
    for page in [*PAGES, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"))]:
        text = re.sub(r"^```.*?^```|`[^`\n]+`(?!\])", "", page.read_text("utf-8"), flags=re.S | re.M)
        for target in re.findall(r"\]\(((?!https?:|mailto:|#)[^)#\s]+)", text):
            path = (page.parent / target).resolve()
            if not path.exists() and "generated" not in path.parts:
                lost.append((page.name, target))
    assert lost == []


class _Links(HTMLParser):
    """What a page refers to: ``led`` by links, ``fetched`` to show it; and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.led: list[str] = []
        self.fetched: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attributes}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        if tag == "a" and "href" in found:
            self.led.append(found["href"])
        elif tag in ("script", "img", "iframe", "source", "video", "audio") and "src" in found:
            self.fetched.append(found["src"])
        elif tag == "link" and found.get("rel") not in ("canonical", "next", "prev", "index", "search"):
            self.fetched.append(found["href"])


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-E", "-b", "html", str(DOCS), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return out


@needs_sphinx
@pytest.mark.slow
def test_the_site_is_built_without_warnings_and_fetches_nothing(site: Path) -> None:
    pages = {path: _Links(path.read_text("utf-8")) for path in site.rglob("*.html")}
    assert len(pages) > 50
    lost = []
    for path, links in pages.items():
        assert [each for each in links.fetched if urlsplit(each).netloc] == [], path
        for link in [*links.led, *links.fetched]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            has_anchor = target not in pages or unquote(parts.fragment) in pages[target].anchors
            if not target.exists() or (parts.fragment and not has_anchor):
                lost.append((path.name, link))
    assert lost == []
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?https?:|@import ['\"]?https?:", style.read_text("utf-8")), style


@needs_sphinx
@pytest.mark.slow
def test_the_search_finds_the_page_of_each_question(site: Path) -> None:
    """From the file system, in a browser without a network: among the first five, beside the list of questions."""
    playwright = pytest.importorskip("playwright.sync_api")
    if (chromium := shutil.which("chromium") or shutil.which("google-chrome")) is None:
        pytest.skip("there is no Chromium")
    found = questions.questions()
    assert len(found) >= 30
    missed = []
    with playwright.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.context.set_offline(True)
        for each in found:
            page.goto(f"{(site / 'search.html').as_uri()}?q={each['search'].replace(' ', '+')}")
            page.wait_for_selector("ul.search li", timeout=20_000)
            page.wait_for_function("document.querySelector('.search-summary')?.textContent.includes('found')")
            links = page.eval_on_selector_all("ul.search li a", "found => found.map(a => a.getAttribute('href'))")
            pages = list(dict.fromkeys(urlsplit(link).path for link in links))
            pages = [name for name in pages if name != "generated/faq.html"]
            wanted = each["page"].removesuffix(".md") + ".html"
            if wanted not in pages[:5]:
                missed.append((each["search"], wanted, pages[:6]))
        browser.close()
    assert missed == []
