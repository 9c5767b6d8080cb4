"""Driving the page: what the tests of it share. The fixture `opened` of this module gives a page in a real browser."""

from __future__ import annotations

import base64
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.serve.conftest import Running

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives the page")
expect = sync_api.expect
expect.set_options(timeout=20_000)  # a machine may have much else to do
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")]
DESKTOP, PHONE = {"width": 1180, "height": 820}, {"width": 360, "height": 740}
REFUSED = re.compile("Failed to load resource")
"""What a browser itself writes down where a server says no."""
SAMPLE = "Two dogs and a boat on blue"


@dataclass
class Opened:
    """A page, and what its console complained of."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    allowed: re.Pattern[str] | None = None

    def go(self, server: Running) -> Any:
        self.page.goto(server.url)
        return self.page


# Of this module alone: while it is there, asyncio is taken in this thread.
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Any, request: pytest.FixtureRequest) -> Iterator[Opened]:
    """At the end the console has to be empty: no error, nothing that the policy forbids."""
    options = {"viewport": DESKTOP, "reduced_motion": "reduce", **getattr(request, "param", {})}
    context = browser.new_context(**options)
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.set_default_timeout(20_000)
    opened = Opened(page)
    page.on("console", lambda said: said.type in ("error", "warning") and opened.complaints.append(said.text))
    page.on("pageerror", lambda error: opened.complaints.append(str(error)))
    yield opened
    context.close()
    assert [said for said in opened.complaints if not (opened.allowed and opened.allowed.search(said))] == []


def drop(page: Any, content: bytes, name: str, kind: str) -> None:
    """As a person does who drags a file in."""
    data = page.evaluate_handle(
        """([content, name, type]) => {
            const data = new DataTransfer();
            data.items.add(new File([Uint8Array.from(atob(content), (c) => c.charCodeAt(0))], name, { type }));
            return data;
        }""",
        [base64.b64encode(content).decode(), name, kind],
    )
    for event in ("dragenter", "dragover", "drop"):
        page.dispatch_event("body", event, {"dataTransfer": data})


def drop_file(page: Any, path: Path) -> None:
    drop(page, path.read_bytes(), path.name, "image/png")


def drop_paths(page: Any, *paths: Path) -> None:
    """As a person does who drags files and folders from the desktop."""
    session = page.context.new_cdp_session(page)
    data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        session.send("Input.dispatchDragEvent", {"type": kind, "x": 200, "y": 200, "data": data})


def ask(page: Any, question: str) -> Any:
    """Where the answer is, once it is whole."""
    page.get_by_label("Your question").fill(question)
    page.keyboard.press("Enter")
    turn = page.locator(".turn").last
    expect(turn.locator(".asked")).to_have_text(question)
    expect(turn.get_by_role("button", name="Ask again")).to_be_visible()
    return turn.locator(".said")


def show(page: Any, name: str) -> None:
    """Pictures for people, where BLIP2_SHOTS names a folder: both widths, light and dark."""
    if not (folder := os.environ.get("BLIP2_SHOTS")):
        return
    for width, size in (("desktop", DESKTOP), ("phone", PHONE)):
        page.set_viewport_size(size)
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
            page.screenshot(path=f"{folder}/{name}-{width}-{scheme}.png")
    page.set_viewport_size(DESKTOP)


def is_wider_than_the_screen(page: Any) -> bool:
    return page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")
