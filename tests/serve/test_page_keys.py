"""The page without a mouse, and for those who listen: keys, focus, and what axe-core finds."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.serve.browsing import DESKTOP, PHONE, SAMPLE, ask, browser, drop_file, expect, needs_browser, opened, show
from tests.serve.conftest import PICTURES

pytestmark = needs_browser
__all__ = ["browser", "opened"]

AXE = "axe-core@4.10.3"
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]


@pytest.fixture(scope="session")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The program that looks for faults of accessibility; skips where it cannot be had."""
    folder = tmp_path_factory.mktemp("axe")
    if (npm := shutil.which("npm")) is None:
        pytest.skip("there is no npm to fetch axe-core")
    try:
        subprocess.run([npm, "pack", AXE, "--silent"], cwd=folder, check=True, capture_output=True, timeout=60)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        pytest.skip("npm cannot fetch axe-core")
    [packed] = folder.glob("*.tgz")
    with tarfile.open(packed) as package:
        member = package.extractfile("package/axe.min.js")
        assert member is not None
        return member.read().decode()


def found_by(axe: str, page: Any) -> list[str]:
    """Each finding in one line, with where it is."""
    page.evaluate(axe)  # not as a script of the page: its policy forbids that
    found = page.evaluate("(tags) => axe.run(document, { runOnly: tags, resultTypes: ['violations'] })", RULES)
    return [
        f"{each['impact']} {each['id']}: {node['html'][:120]}" for each in found["violations"] for node in each["nodes"]
    ]


@pytest.mark.parametrize(
    "opened",
    [
        {"color_scheme": "light"},
        {"color_scheme": "dark"},
        {"color_scheme": "dark", "viewport": PHONE, "is_mobile": True, "has_touch": True},
    ],
    indirect=True,
    ids=["light", "dark", "phone"],
)
def test_axe_finds_nothing(opened, server, axe) -> None:
    page = opened.go(server)
    expect(page.locator("#models")).to_contain_text("compares")
    assert found_by(axe, page) == []
    page.set_input_files("#file", [*PICTURES, Path(__file__)])
    expect(page.get_by_role("alert")).to_be_visible()
    expect(page.locator("#progress")).to_have_text("3 of 3 captions")
    ask(page, "how many dogs are there?")
    page.get_by_role("button", name="Where it looks", exact=True).click()
    expect(page.locator("#light")).to_be_visible()
    page.get_by_text("History (").click()
    page.get_by_text("What this model knows").click()
    assert found_by(axe, page) == []
    page.get_by_role("tab", name="Match").click()
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#match-rows tr")).to_have_count(3)
    assert found_by(axe, page) == []
    page.get_by_label("Texts to compare").blur()
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_be_visible()
    assert found_by(axe, page) == []
    page.get_by_role("button", name="Close").last.click()
    page.evaluate("document.getElementById('image').removeAttribute('alt')")
    assert [each for each in found_by(axe, page) if each.startswith("critical image-alt")]  # it does look


def test_the_keys(opened, server) -> None:
    page = opened.go(server)
    expect(page.locator("#models")).to_contain_text("compares")
    page.keyboard.press("?")
    dialog = page.get_by_role("dialog", name="Keyboard shortcuts")
    expect(dialog).to_be_visible()
    show(page, "keys")
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    for key in ("/", "m", "n", "c"):  # nothing to do yet, and no error
        page.keyboard.press(key)
    with page.expect_file_chooser() as chooser:
        page.evaluate("1")  # by the end of a round trip the browser has been told to leave choosers to us
        page.keyboard.press("o")
    chooser.value.set_files(PICTURES)
    expect(page.locator("#progress")).to_have_text("3 of 3 captions")
    field = page.get_by_label("Your question")
    expect(field).to_be_focused()
    page.keyboard.type("no? map/")  # while somebody types, keys are letters
    expect(field).to_have_value("no? map/")
    expect(dialog).to_be_hidden()
    page.keyboard.press("Escape")
    expect(field).not_to_be_focused()
    strip = page.locator("#strip button")
    page.keyboard.press("p")
    expect(strip.nth(2)).to_have_attribute("aria-current", "true")
    page.keyboard.press("n")
    expect(strip.nth(0)).to_have_attribute("aria-current", "true")
    page.keyboard.press("Control+m")
    expect(page.locator("#match")).to_be_hidden()
    page.keyboard.press("m")
    expect(page.get_by_label("Texts to compare")).to_be_focused()
    page.keyboard.press("Escape")
    page.keyboard.press("/")
    expect(field).to_be_focused()
    expect(field).to_have_value("no? map/")
    ask(page, "how many dogs are there?")
    page.keyboard.press("Escape")
    page.keyboard.press("c")
    expect(page.locator("#spoken")).to_have_text("Copied")
    assert "**Answer:** two" in page.evaluate("navigator.clipboard.readText()")
    # Who dictates can switch them off (WCAG 2.1.4).
    page.keyboard.press("?")
    dialog.get_by_label("Single keys work outside text fields").uncheck()
    dialog.get_by_role("button", name="Close").click()
    expect(page.locator("#keys-on")).not_to_be_checked()
    page.keyboard.press("?")
    page.reload()
    expect(page.locator("#models")).to_contain_text("compares")
    page.keyboard.press("?")
    expect(dialog).to_be_hidden()
    page.get_by_role("button", name="Keyboard shortcuts").click()
    expect(dialog).to_be_visible()


def test_the_order_of_the_focus_is_that_of_the_page(opened, server) -> None:
    page = opened.go(server)
    expect(page.locator("#models")).to_contain_text("compares")
    page.set_input_files("#file", PICTURES)
    expect(page.locator("#progress")).to_have_text("3 of 3 captions")
    ask(page, "how many dogs are there?")
    page.evaluate("document.activeElement.blur(); document.body.focus()")
    page.locator("#strip button").nth(0).focus()
    order = ["strip"]
    for _ in range(40):
        page.keyboard.press("Tab")
        where = page.evaluate(
            "document.activeElement.closest('[id]:not([id=work], [id=ask], [id=main], [id=many])')?.id ?? ''"
        )
        if where and where != order[-1]:
            order.append(where)
        if where == "keys-open":
            break
    wanted = ["strip", "save-csv", "save-json", "another", "look-caption", "remove", "tab-ask", "turns", "copy-all"]
    wanted += ["question", "send", "ideas", "history", "knows", "keys-open"]
    assert [each for each in order if each in wanted] == wanted
    assert page.viewport_size == DESKTOP
    drop_file(page, PICTURES[0])
    expect(page.get_by_label("Your question")).to_be_focused()  # where one goes on, whatever had the focus


def test_the_example_is_the_first_thing_after_the_files(opened, server) -> None:
    page = opened.go(server)
    expect(page.locator("#models")).to_contain_text("compares")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name=SAMPLE)).to_be_focused()
