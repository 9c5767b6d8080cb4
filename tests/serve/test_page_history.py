"""What the page keeps in the browser, and what people copy from it."""

from __future__ import annotations

import pytest

from tests.serve.browsing import SAMPLE, ask, browser, drop_file, expect, needs_browser, opened, show
from tests.serve.conftest import PICTURES

pytestmark = needs_browser
__all__ = ["browser", "opened"]


def test_the_history_is_kept_in_the_browser_alone(opened, server) -> None:
    page = opened.go(server)
    drop_file(page, PICTURES[0])
    expect(page.locator("#history-count")).to_have_text("1")
    expect(ask(page, "how many dogs are there?")).to_have_text("two")
    sent = []
    page.on("request", lambda request: sent.append(request.method))
    page.reload()
    expect(page.locator("#models")).to_contain_text("compares")
    page.get_by_text("History (1)").click()
    entry = page.locator("#history-list .entry")
    expect(entry).to_contain_text("1 answer")
    show(page, "history")
    entry.click()
    expect(page.locator("#caption")).to_have_text("a boat and two dogs")
    expect(page.locator(".turn .said")).to_have_text("two")
    assert set(sent) == {"GET"}  # nothing of it is sent, not even for a caption
    # The conversation continues, and stays one entry.
    expect(ask(page, "and cats?")).to_have_text("zero")
    expect(entry).to_contain_text("2 answers")
    expect(entry).to_have_count(1)
    asked = []
    page.once("dialog", lambda dialog: (asked.append(dialog.message), dialog.dismiss()))
    page.get_by_role("button", name="Clear the history").click()
    assert asked == ["Remove all 1 images from the history?"]
    expect(entry).to_have_count(1)
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Clear the history").click()
    expect(page.locator("#history-count")).to_have_text("0")
    expect(page.locator("#history summary")).to_be_focused()  # the button is gone
    page.get_by_label("Keep a history").uncheck()
    page.get_by_role("button", name=SAMPLE).click()
    expect(page.locator("#caption")).to_have_text("a boat and two dogs")
    page.reload()
    expect(page.locator("#models")).to_contain_text("compares")
    expect(page.locator("#history-count")).to_have_text("0")
    expect(page.locator("#history-keep")).not_to_be_checked()


def test_the_history_is_bounded(opened, server) -> None:
    page = opened.go(server)
    expect(page.locator("#history-count")).to_have_text("0")
    page.evaluate(
        """() => new Promise((resolve) => {
            const opening = indexedDB.open(`blip2 ${location.pathname}`, 1);
            opening.onsuccess = () => {
                const transaction = opening.result.transaction("images", "readwrite");
                for (let at = 1; at <= 60; at++) {
                    const file = new Blob([new Uint8Array(at === 55 ? 2 ** 26 : 9)], { type: "image/png" });
                    const entry = { id: `${at}`, at, file, name: "image", thumbnail: "data:,", caption: `number ${at}`, said: [] };
                    transaction.objectStore("images").put(entry);
                }
                transaction.oncomplete = () => (opening.result.close(), resolve());
            };
        })"""  # noqa: E501
    )
    page.get_by_role("button", name=SAMPLE).click()
    expect(page.locator("#history-count")).to_have_text("6")  # the seventh would be more than 64 MiB with the others
    page.reload()
    expect(page.locator("#history-count")).to_have_text("6")


@pytest.mark.parametrize("how", ["throws", "fails"])
def test_a_browser_that_stores_nothing(opened, server, how) -> None:
    refuse = {
        "throws": """
            for (const name of ["localStorage", "sessionStorage", "indexedDB"])
                Object.defineProperty(window, name, { get() { throw new DOMException("no", "SecurityError"); } });
        """,
        "fails": "IDBObjectStore.prototype.put = () => { throw new DOMException('full', 'QuotaExceededError'); };",
    }[how]
    opened.page.add_init_script(refuse)
    page = opened.go(server)
    drop_file(page, PICTURES[0])
    expect(page.locator("#caption")).to_have_text("a boat and two dogs")
    expect(page.locator("#history-note")).to_have_text(
        "This browser does not store the history, so it ends with this page."
    )
    expect(ask(page, "how many dogs are there?")).to_have_text("two")


@pytest.mark.parametrize("has_clipboard", [True, False])
def test_a_conversation_as_markdown(opened, server, has_clipboard) -> None:
    page = opened.page
    if not has_clipboard:  # as at http:// on another machine
        page.add_init_script("navigator.clipboard.writeText = () => Promise.reject(new DOMException('no'))")
    opened.go(server)
    page.set_input_files("#file", {"name": "a_b*.png", "mimeType": "image/png", "buffer": PICTURES[0].read_bytes()})
    expect(page.locator("#caption")).to_have_text("a boat and two dogs")
    expect(page.get_by_role("button", name="Copy conversation as Markdown")).to_be_hidden()
    ask(page, "how many dogs are there?")
    page.get_by_role("button", name="Copy conversation as Markdown").click()
    expect(page.locator("#spoken")).to_have_text("Copied")
    lines = ["**Image:** a\\_b\\*.png", "**Caption:** a boat and two dogs"]
    lines += ["**Question:** how many dogs are there?", "**Answer:** two"]
    assert page.evaluate("navigator.clipboard.readText()") == "\n\n".join(lines) + "\n"
