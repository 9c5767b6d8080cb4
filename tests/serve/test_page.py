"""The page, in a real browser against a real server."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from blip2.serve.hosts import Door
from blip2.serve.limits import Limits
from tests.serve.browsing import (
    CHROMIUM,
    PHONE,
    REFUSED,
    SAMPLE,
    ask,
    browser,
    drop,
    drop_file,
    expect,
    is_wider_than_the_screen,
    needs_browser,
    opened,
    show,
)
from tests.serve.conftest import PICTURES, eventually, serving, slowed, user

pytestmark = needs_browser
__all__ = ["browser", "opened"]


@contextmanager
def proxied(server: str, prefix: str, takes_off: bool) -> Iterator[str]:
    """A reverse proxy that shows a server below a path, as nginx does with a slash after proxy_pass, or without."""

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not self.path.startswith(f"{prefix}/"):
                self.send_error(404)
                return
            path = self.path.removeprefix(prefix) if takes_off else self.path
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
            with httpx.stream(self.command, server + path, headers=headers, content=body, timeout=30) as answer:
                self.send_response(answer.status_code)
                for name, value in answer.headers.items():
                    if name not in ("connection", "transfer-encoding"):
                        self.send_header(name, value)
                self.end_headers()
                for piece in answer.iter_raw():
                    self.wfile.write(piece)

        do_POST = do_GET

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{proxy.server_port}"
        proxy.shutdown()


def test_a_dropped_picture_is_captioned_and_asked_about(opened, server) -> None:
    page = opened.go(server)
    expect(page.locator("#models")).to_have_text("miniature answers, miniature-itm compares")
    expect(page.get_by_text("does not know photographs")).to_be_visible()
    drop_file(page, PICTURES[0])
    expect(page.locator("#caption")).to_have_text("a boat and two dogs")
    expect(page.locator("#image")).to_have_attribute("alt", "Your image: a boat and two dogs")
    assert page.evaluate("document.getElementById('image').naturalWidth") == 258
    expect(ask(page, "how many dogs are there?")).to_have_text("two")
    expect(page.locator("#spoken")).to_have_text("two")
    sent = []
    page.on("request", lambda request: sent.append(request) if request.method == "POST" else None)
    expect(ask(page, "and cats?")).to_have_text("zero")
    messages = json.loads(sent[0].post_data)["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert [part["type"] for part in messages[0]["content"]] == ["text", "image_url"]
    page.get_by_role("button", name="Copy the answer to: how many dogs are there?").click()
    assert page.evaluate("navigator.clipboard.readText()") == "two"
    page.get_by_role("button", name="Ask again: and cats?").click()
    expect(page.locator(".turn")).to_have_count(2)
    expect(page.get_by_role("button", name="Ask again: and cats?")).to_be_visible()
    # Another image begins anew.
    page.set_input_files("#file", PICTURES[2])
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.locator("#caption")).to_contain_text("cats")
    expect(ask(page, "how many cats are there?")).to_have_text("four")


def test_a_pasted_picture(opened, server) -> None:
    page = opened.go(server)
    page.evaluate(
        """async () => {
            const blob = await (await fetch("/page/dogs-and-boat.webp")).blob();
            const data = new DataTransfer();
            data.items.add(new File([blob], "pasted.webp", { type: "image/webp" }));
            document.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data, cancelable: true }));
        }"""
    )
    expect(page.locator("#caption")).to_have_text("a boat and two dogs")


def test_stop_reaches_the_server(opened, models) -> None:
    with serving(lambda: models) as server, slowed(models, 0.4):
        page = opened.go(server)
        page.get_by_role("button", name=SAMPLE).click()
        page.get_by_label("Your question").fill("what is in the picture?")
        page.get_by_role("button", name="Ask", exact=True).click()
        answer = page.locator(".turn .said")
        expect(answer).not_to_have_text("")
        stop = page.get_by_role("button", name="Stop")
        expect(stop).to_be_focused()
        stop.click()
        expect(page.locator(".turn .problem")).to_have_text("Stopped.")
        eventually(lambda: server.metric("blip2_requests_running") == server.metric("blip2_rows") == 0)
        expect(page.get_by_label("Your question")).to_be_focused()
        said = answer.inner_text()
        page.wait_for_timeout(600)
        assert answer.inner_text() == said
        page.get_by_label("Your question").fill("what is in the picture?")
        page.keyboard.press("Enter")
        expect(page.locator(".turn .said").last).not_to_have_text("")
        page.keyboard.press("Escape")
        expect(page.locator(".turn .problem").last).to_have_text("Stopped.")
    opened.allowed = REFUSED


def test_three_texts(opened, server) -> None:
    page = opened.go(server)
    page.get_by_role("button", name=SAMPLE).click()
    page.get_by_role("tab", name="Match").click()
    page.get_by_label("Texts to compare").fill("two cats\n\ntwo dogs and a boat\na dog and a boat\n")
    page.get_by_role("button", name="Compare").click()
    rows = page.locator("#match-rows tr")
    expect(rows).to_have_count(3)
    expect(rows.nth(0)).to_contain_text("two dogs and a boat")
    expect(rows.nth(0).locator("td").nth(0)).to_have_text("96.9 %")
    expect(rows.nth(0).locator("td").nth(1)).to_have_text("0.74")
    full, empty = (rows.nth(place).locator(".bar span").first.bounding_box()["width"] for place in (0, 2))
    assert full > 50 and empty < 5
    assert page.locator("#spoken").inner_text().startswith("two dogs and a boat matches best")


def test_where_it_looks(opened, server) -> None:
    page = opened.page
    is_offered = "/explain" in server.http.get("/openapi.json").json()["paths"]
    if not is_offered:  # the page against what the server is going to say
        api = server.http.get("/openapi.json").json()
        api["paths"]["/explain"] = {"post": {}}
        heat = [[0.0] * 8 for _ in range(8)]
        heat[2][1] = 1.0
        page.route("**/openapi.json", lambda route: route.fulfill(json=api))
        page.route("**/explain", lambda route: route.fulfill(json={"text": "", "score": 0.5, "heat": heat}))
    opened.go(server)
    expect(page.locator("#models")).to_contain_text("compares")
    page.get_by_role("button", name=SAMPLE).click()
    page.get_by_role("button", name="Where it looks", exact=True).click()
    light = page.locator("#light")
    expect(light).to_be_visible()
    expect(page.locator("#look-what")).to_have_text("Where it looks for “a boat and two dogs”")
    page.get_by_role("button", name="boat", exact=True).press("Enter")
    expect(page.locator("#look-what")).to_have_text("Where it looks for “boat”")
    expect(page.get_by_role("button", name="boat", exact=True)).to_be_focused()
    assert light.bounding_box() == page.locator("#image").bounding_box()
    darkest = """(() => {
        const context = Object.assign(document.createElement("canvas"), { width: 8, height: 8 }).getContext("2d");
        context.drawImage(document.getElementById("light"), 0, 0, 8, 8);
        return Math.max(...context.getImageData(0, 0, 8, 8).data);
    })()"""
    before = page.evaluate(darkest)
    page.get_by_label("Strength").press("Home")
    assert before > 100 and page.evaluate(darkest) == 0
    page.get_by_role("button", name="Hide").click()
    expect(light).to_be_hidden()
    ask(page, "how many dogs are there?")
    page.get_by_role("button", name="Where it looks for the answer: two").click()
    expect(page.locator("#look-what")).to_have_text("Where it looks for “two”")
    expect(light).to_be_visible()


def test_where_it_looks_is_not_offered_where_the_server_cannot_tell(opened, server) -> None:
    api = server.http.get("/openapi.json").json()
    api["paths"].pop("/explain", None)
    opened.page.route("**/openapi.json", lambda route: route.fulfill(json=api))
    page = opened.go(server)
    page.get_by_role("button", name=SAMPLE).click()
    expect(page.locator("#caption")).to_have_text("a boat and two dogs")
    ask(page, "is there a boat?")
    expect(page.get_by_role("button", name="Where it looks")).to_have_count(0)


def test_models_of_ours_say_what_they_know_and_others_nothing(opened, server) -> None:
    """The miniature, the one that `make photographs` makes, and any other."""
    models = server.http.get("/v1/models").json()

    def go(name: str) -> tuple[bool, bool]:
        models["data"][0]["id"] = name
        opened.page.route("**/v1/models", lambda route: route.fulfill(json=models))
        page = opened.go(server)
        expect(page.locator("#models")).to_contain_text(f"{name} answers")
        return tuple(page.get_by_text(text).is_visible() for text in ("does not know photographs", "for every image"))

    assert go("miniature") == (True, False)
    assert go("photographs") == (False, True)
    expect(opened.page.locator("#ideas")).to_contain_text("is there a fish?")
    assert go("blip2-opt-2.7b") == (False, False)


def test_with_the_keyboard_alone(opened, server) -> None:
    page = opened.go(server)
    expect(page.locator("#models")).to_contain_text("compares")

    def focused() -> str:
        return page.evaluate(
            "document.activeElement.id || document.activeElement.dataset.sample || document.activeElement.tagName"
        )

    def tab_to(wanted: str, key: str = "Tab") -> None:
        for _ in range(25):
            page.keyboard.press(key)
            outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert outline == "solid" or focused() == "BODY", f"{focused()} does not show that it has the focus"
            if focused() == wanted:
                return
        raise AssertionError(f"{wanted} cannot be reached")

    page.keyboard.press("Tab")
    with page.expect_file_chooser():
        assert focused() == "drop"  # a round trip: by its end the browser has been told to leave choosers to us
        page.keyboard.press("Enter")
    tab_to("dogs-and-boat.webp")
    page.keyboard.press("Enter")
    expect(page.locator("#caption")).to_have_text("a boat and two dogs")
    assert focused() == "question"
    page.keyboard.type("how many dogs are there?")
    page.keyboard.press("Enter")
    expect(page.locator(".turn .said")).to_have_text("two")
    tab_to("tab-ask", "Shift+Tab")
    page.keyboard.press("ArrowRight")
    assert focused() == "tab-match"
    tab_to("texts")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#match-rows tr")).to_have_count(3)


@pytest.mark.parametrize(
    "opened", [{"viewport": PHONE, "is_mobile": True, "has_touch": True}], indirect=True, ids=["phone"]
)
def test_on_a_phone(opened, server) -> None:
    page = opened.go(server)
    expect(page.get_by_role("button", name="Take a photo")).to_be_visible()
    assert not is_wider_than_the_screen(page)
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Take a photo").tap()
    assert chooser.value.element.get_attribute("capture") == "environment"
    chooser.value.set_files(PICTURES[1])
    expect(page.locator("#caption")).to_contain_text("dogs")
    ask(page, "how many flowers are there, and is the background green or is it " + "very" * 30 + " blue?")
    assert not is_wider_than_the_screen(page)
    page.get_by_role("tab", name="Match").tap()
    page.get_by_role("button", name="Compare").tap()
    expect(page.locator("#match-rows tr")).to_have_count(3)
    assert not is_wider_than_the_screen(page)


@pytest.mark.parametrize("opened", [{"color_scheme": "light"}, {"color_scheme": "dark"}], indirect=True)
def test_names_headings_and_contrast(opened, server) -> None:
    page = opened.go(server)
    for has_picture in (False, True):
        if has_picture:
            page.get_by_role("button", name=SAMPLE).click()
            expect(page.locator("#caption")).to_have_text("a boat and two dogs")
            ask(page, "how many dogs are there?")
        found = page.evaluate(
            """() => {
                const seen = (element) => element.checkVisibility();
                const all = (selector) => [...document.querySelectorAll(selector)].filter(seen);
                const name = (element) => element.getAttribute("aria-label") || element.innerText?.trim()
                    || element.labels?.[0]?.innerText || element.querySelector("img")?.alt;
                const rgb = (color) => color.match(/[\\d.]+/g).map(Number);
                const light = (color) => rgb(color).slice(0, 3).map((v) => v / 255)
                    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
                    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
                const ground = (element) => {
                    for (let at = element; at; at = at.parentElement) {
                        const { backgroundColor } = getComputedStyle(at);
                        if ((rgb(backgroundColor)[3] ?? 1) > 0) return backgroundColor;
                    }
                };
                const contrast = (element) => {
                    const colors = [getComputedStyle(element).color, ground(element)];
                    const [a, b] = colors.map(light).sort((x, y) => y - x);
                    return (a + 0.05) / (b + 0.05);
                };
                const hasText = (element) => [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
                return {
                    nameless: all("button, input, textarea, a, summary").filter((e) => !name(e))
                        .map((e) => e.outerHTML),
                    without_alt: all("img").filter((e) => !e.alt).map((e) => e.outerHTML),
                    headings: all("h1, h2, h3").map((e) => Number(e.tagName[1])),
                    faint: all("body *").filter((e) => hasText(e) && contrast(e) < 4.5).map((e) => e.outerHTML),
                    landmarks: all("header, main, footer").map((e) => e.tagName),
                    ids: [...document.querySelectorAll("[id]")].map((e) => e.id),
                    low: all("button, summary, input:not([type=range])")
                        .filter((e) => e.getBoundingClientRect().height < 24).map((e) => e.outerHTML),
                };
            }"""
        )
        assert found["nameless"] == found["without_alt"] == found["faint"] == found["low"] == []
        assert found["headings"][0] == 1 and found["headings"].count(1) == 1
        steps = zip(found["headings"], found["headings"][1:], strict=False)
        assert all(after <= before + 1 for before, after in steps), found["headings"]
        assert found["landmarks"] == ["HEADER", "MAIN", "FOOTER"]
        assert len(found["ids"]) == len(set(found["ids"]))
    assert page.locator("html").get_attribute("lang") == "en"


def test_what_is_no_picture(opened, server) -> None:
    page = opened.go(server)
    drop(page, b"not a picture", "notes.png", "image/png")
    expect(page.get_by_role("alert")).to_contain_text("notes.png is not an image that can be opened here")
    page.get_by_role("button", name="Close").click()
    expect(page.get_by_role("alert")).to_be_hidden()
    expect(page.get_by_role("button", name="Drop images here")).to_be_focused()
    # What the browser can draw and the server does not read is drawn for it.
    drawing = b'<svg xmlns="http://www.w3.org/2000/svg" width="200" height="100"><circle r="90" fill="red"/></svg>'
    drop(page, drawing, "drawn.svg", "image/svg+xml")
    expect(page.get_by_text("Sent as a JPEG of 200 × 100 pixels.")).to_be_visible()
    expect(page.locator("#caption")).not_to_have_text("")


def test_what_is_too_large(opened, models) -> None:
    opened.allowed = REFUSED
    with serving(lambda: models, limits=Limits(max_pixels=100_000)) as server:
        page = opened.go(server)
        drop_file(page, PICTURES[1])
        expect(page.get_by_role("alert")).to_contain_text("too large for this server")
        drop_file(page, PICTURES[0])
        expect(page.get_by_role("alert")).to_be_hidden()
        expect(page.locator("#caption")).to_have_text("a boat and two dogs")


def test_a_busy_server_and_one_that_has_gone(opened, models) -> None:
    opened.allowed = re.compile("Failed to load resource|ERR_")
    with serving(lambda: models) as server:
        page = opened.go(server)
        expect(page.locator("#models")).to_contain_text("compares")
        said_no = []

        def busy(route: Any) -> None:
            if len(said_no) < 2:
                said_no.append(route)
                body = {"error": {"message": "full", "code": "queue_full"}}
                route.fulfill(status=429, headers={"Retry-After": "1"}, json=body)
            else:
                route.continue_()

        page.route("**/caption", busy)
        page.get_by_role("button", name=SAMPLE).click()
        expect(page.locator("#caption")).to_have_text("The server is busy; trying again in 1 s…")
        expect(page.locator("#caption")).to_have_text("a boat and two dogs")
        assert len(said_no) == 2
    page.get_by_label("Your question").fill("how many dogs are there?")
    page.keyboard.press("Enter")
    expect(page.locator(".turn .problem")).to_have_text("The server cannot be reached; check that it is running.")
    expect(page.locator("#models")).to_have_text("The server cannot be reached; trying again…")


def test_each_refusal_is_one_sentence_that_is_announced(opened, server) -> None:
    opened.allowed = REFUSED
    page = opened.go(server)
    answers: list[tuple[int, str]] = []
    page.route(
        "**/caption",
        lambda route: route.fulfill(
            status=answers[0][0],
            headers={"Retry-After": "0.01"},
            json={"error": {"message": "of the server", "code": answers[0][1]}},
        ),
    )
    for status, code, sentence in (
        (429, "queue_full", "The server is busy and refused this 8 times; try again in a moment."),
        (503, "out_of_memory", "The server is not available; try again in a moment."),
        (413, "image_too_large", "This image is too large for this server; give a smaller one."),
        (415, "format", "This file is not an image that the server can read; give a PNG, JPEG, WebP or GIF."),
        (400, "invalid_image", "The server cannot read this image; the file may be damaged."),
        (400, "invalid_value", "The server refused this: of the server"),
    ):
        answers[:] = [(status, code)]
        drop_file(page, PICTURES[0])
        expect(page.get_by_role("alert")).to_be_visible()
        expect(page.locator("#notice-text")).to_have_text(sentence)
        expect(page.get_by_role("button", name="Try again")).to_be_visible(visible=status in (429, 503))
        page.get_by_role("button", name="Close").click()
    page.unroute("**/caption")
    late = {"error": {"message": "", "code": "deadline"}}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=504, json=late))
    page.get_by_label("Your question").fill("is there a boat?")
    page.keyboard.press("Enter")
    expect(page.locator("#spoken")).to_have_text("The answer took longer than this server allows; try again later.")


def test_a_server_that_comes_back_is_found_without_a_reload(opened, models) -> None:
    opened.allowed = re.compile("Failed to load resource|ERR_")
    with serving(lambda: models, keys=["secret"]) as server:
        page = opened.go(server)
        page.get_by_label("This server needs a key").fill("secret")
        page.keyboard.press("Enter")
        expect(page.locator("#models")).to_contain_text("compares")
    page.get_by_role("button", name=SAMPLE).click()
    expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached")
    expect(page.locator("#models")).to_have_text("The server cannot be reached; trying again…")
    show(page, "gone")
    may_load = threading.Event()

    def load() -> Any:
        may_load.wait(20)
        return models

    with serving(load, waits=False, port=int(server.url.rpartition(":")[2]), keys=["secret"]):
        expect(page.locator("#models")).to_have_text("The model is loading…")
        may_load.set()
        expect(page.locator("#models")).to_have_text("miniature answers, miniature-itm compares")
        expect(page.get_by_role("alert")).to_be_hidden()
        expect(page.locator("#caption")).to_have_text("a boat and two dogs")
        expect(ask(page, "how many dogs are there?")).to_have_text("two")


@pytest.mark.parametrize("takes_off", [True, False])
def test_behind_a_proxy_that_shows_it_at_a_path(opened, models, takes_off) -> None:
    door = Door(root_path="" if takes_off else "/tools/blip2")
    with serving(lambda: models, door=door) as server, proxied(server.url, "/tools/blip2", takes_off) as url:
        asked = []
        page = opened.page
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{url}/tools/blip2/")
        expect(page.locator("#models")).to_have_text("miniature answers, miniature-itm compares")
        page.get_by_role("button", name=SAMPLE).click()
        expect(page.locator("#caption")).to_have_text("a boat and two dogs")
        expect(ask(page, "how many dogs are there?")).to_have_text("two")
        page.get_by_role("button", name="Where it looks for the answer: two").click()
        expect(page.locator("#light")).to_be_visible()
        page.get_by_role("tab", name="Match").click()
        page.get_by_role("button", name="Compare").click()
        expect(page.locator("#match-rows tr")).to_have_count(3)
        described = page.get_by_role("link", name="openapi.json").evaluate("link => link.href")
        assert described == f"{url}/tools/blip2/openapi.json"
        assert httpx.get(described).json().get("servers") == (None if takes_off else [{"url": "/tools/blip2"}])
        assert all(each.startswith((f"{url}/tools/blip2/", "blob:", "data:")) for each in asked) and len(asked) > 12


def test_a_server_that_is_still_loading(opened, models) -> None:
    opened.allowed = REFUSED
    may_load = threading.Event()

    def load() -> Any:
        may_load.wait(20)
        return models

    with serving(load, waits=False) as server:
        page = opened.go(server)
        expect(page.locator("#models")).to_have_text("The model is loading…")
        expect(page.locator("#elapsed")).to_have_text(re.compile(r"^\([2-9] s so far\)$"))
        assert page.locator("#models").get_attribute("role") == "status"  # announced; the time is not
        show(page, "loading")
        page.get_by_role("button", name=SAMPLE).click()
        expect(page.locator("#caption")).to_have_text("The model is loading…")
        may_load.set()
        expect(page.locator("#models")).to_contain_text("compares")
        expect(page.locator("#caption")).to_have_text("a boat and two dogs")


def test_a_key_is_asked_for_only_where_it_is_needed(opened, models) -> None:
    opened.allowed = REFUSED
    with serving(lambda: models, keys=["secret"]) as server:
        page = opened.go(server)
        field = page.get_by_label("This server needs a key")
        expect(field).to_be_focused()
        expect(page.locator("#models")).to_have_text("A key is needed")
        expect(page.get_by_role("button", name="Drop images here")).to_be_hidden()  # not before the key is given
        show(page, "key")
        for wrong in ("wrong", "schlüssel"):
            field.fill(wrong)
            page.keyboard.press("Enter")
            expect(page.get_by_role("alert")).to_contain_text("did not accept this key")
            page.get_by_role("button", name="Close").click()
        assert page.evaluate("sessionStorage.length") == 0
        show(page, "wrong-key")
        field.fill("secret")
        page.keyboard.press("Enter")
        expect(page.locator("#models")).to_contain_text("compares")
        expect(field).to_be_hidden()
        page.get_by_role("button", name=SAMPLE).click()
        expect(page.locator("#caption")).to_have_text("a boat and two dogs")
        page.reload()
        expect(page.locator("#models")).to_contain_text("compares")
        expect(field).to_be_hidden()
        assert page.evaluate("localStorage.length") == 0


ELSEWHERE = """async ([url, headers, body]) => {
    try {
        const response = await fetch(url, { method: "POST", headers, body });
        return [response.status, response.headers.get("x-request-id"), (await response.text()).slice(-16)];
    } catch (error) {
        return String(error);
    }
}"""
"""A page of another site asks; what it can read of the answer."""


@contextmanager
def another_site() -> Iterator[str]:
    class Site(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<link rel=icon href=data:,><p>another site</p>")

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as site:
        threading.Thread(target=site.serve_forever, daemon=True).start()
        yield f"http://localhost:{site.server_port}"
        site.shutdown()


def test_a_page_of_another_site(opened, models) -> None:
    opened.allowed = re.compile("CORS policy|Failed to load resource")
    page = opened.page
    body = json.dumps({"messages": [user("", PICTURES[0])], "stream": True})
    headers = {"Authorization": "Bearer secret", "Content-Type": "application/json", "X-Stainless-OS": "Linux"}
    with another_site() as elsewhere:
        page.goto(elsewhere)
        with serving(lambda: models, keys=["secret"], door=Door(cors_origins=(elsewhere,))) as server:
            url = f"{server.url}/v1/chat/completions"
            status, name, end = page.evaluate(ELSEWHERE, [url, headers, body])
            assert status == 200 and end.endswith("data: [DONE]\n\n")
            assert re.fullmatch("[0-9a-f]{16}", name)
            assert page.evaluate(ELSEWHERE, [url, headers | {"Authorization": "Bearer no"}, body])[0] == 401
        with serving(lambda: models) as server:
            url = f"{server.url}/v1/chat/completions"
            assert "Failed to fetch" in page.evaluate(ELSEWHERE, [url, headers, body])
            # What needs no permission is sent, and refused there.
            assert "Failed to fetch" in page.evaluate(ELSEWHERE, [url, {"Content-Type": "text/plain"}, body])
            assert server.metric("blip2_requests_rejected_total", reason="cross_site") == 1
            assert server.metric("blip2_request_seconds_count", status="200", route="/v1/chat/completions") == 0


def test_a_name_that_is_made_to_point_here(browser, models) -> None:
    """DNS rebinding: to the browser, the page of evil.example and this server are one site."""
    with serving(lambda: models, door=Door(allow_hosts=())) as server:
        rules = "--host-resolver-rules=MAP evil.example 127.0.0.1"
        with browser.browser_type.launch(executable_path=CHROMIUM, args=["--no-sandbox", rules]) as rebound:
            page = rebound.new_page()
            answer = page.goto(f"http://evil.example:{server.url.rpartition(':')[2]}/")
            assert answer.status == 421 and "--allow-host evil.example" in page.inner_text("body")
            assert (
                page.evaluate("fetch('caption', { method: 'POST', body: '{}' }).then((answer) => answer.status)") == 421
            )
