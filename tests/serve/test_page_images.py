"""Several images on the page: the strip, captions for all, what is downloaded."""

from __future__ import annotations

import csv
import json
import os
import re
from pathlib import Path

from blip2.serve.limits import Limits
from tests.serve.browsing import REFUSED, ask, browser, drop_paths, expect, needs_browser, opened, show
from tests.serve.conftest import PICTURES, eventually, serving, slowed

pytestmark = needs_browser
__all__ = ["browser", "opened"]


def test_several_images_each_with_its_conversation(opened, models) -> None:
    opened.allowed = REFUSED
    with serving(lambda: models, limits=Limits(max_pixels=150_000)) as server:
        page = opened.go(server)
        page.set_input_files("#file", [PICTURES[0], PICTURES[1], PICTURES[2], Path(__file__)])
        expect(page.locator("#notice-text")).to_have_text(re.compile(r"^test_page_images\.py is not an image"))
        strip = page.locator("#strip button")
        expect(strip).to_have_count(3)
        expect(page.locator("#progress")).to_have_text("2 of 3 captions")  # the second is too large for this server
        expect(page.locator("#spoken")).to_have_text("2 of 3 captions are ready.")
        expect(strip.nth(1).locator("img")).to_have_attribute("alt", "flowers.png: no caption")
        expect(page.locator("#caption")).to_have_text("a boat and two dogs")
        expect(ask(page, "how many dogs are there?")).to_have_text("two")
        strip.nth(0).focus()
        page.keyboard.press("ArrowRight")
        expect(strip.nth(1)).to_be_focused()
        expect(page.locator("#notice-text")).to_contain_text("too large for this server")
        page.keyboard.press("End")
        expect(strip.nth(2)).to_have_attribute("aria-current", "true")
        expect(page.get_by_role("alert")).to_be_hidden()
        expect(page.locator("#caption")).to_contain_text("cats")
        expect(page.locator(".turn")).to_have_count(0)
        expect(ask(page, "how many cats are there?")).to_have_text("four")
        with page.expect_download() as as_csv:
            page.get_by_role("button", name="Download CSV").click()
        rows = list(csv.DictReader(as_csv.value.path().open(encoding="utf-8", newline="")))
        assert [row["file_name"] for row in rows] == ["picture.png", "cats.png"]
        assert rows[0]["text"] == "a boat and two dogs"
        with page.expect_download() as as_json:
            page.get_by_role("button", name="Download JSON").click()
        first, second, third = json.loads(as_json.value.path().read_text("utf-8"))
        assert first["conversation"] == [{"question": "how many dogs are there?", "answer": "two"}]
        assert first["model"] == "miniature" and third["text"] == rows[1]["text"]
        assert second["text"] is None and "too large" in second["error"]
        strip.nth(0).click()
        expect(page.locator(".turn .said")).to_have_text("two")
        page.get_by_role("button", name="Remove").click()
        expect(strip).to_have_count(2)
        expect(strip.nth(0)).to_be_focused()
        page.keyboard.press("Delete")
        expect(page.locator("#caption")).to_contain_text("cats")
        expect(page.locator("#many")).to_be_hidden()  # one is no strip
        page.get_by_role("button", name="Remove").click()
        expect(page.get_by_role("button", name="Drop images here")).to_be_focused()
        expect(page.locator("#intro")).to_be_visible()


def test_a_dropped_folder_gives_its_images(opened, server, tmp_path) -> None:
    folder = tmp_path / "holiday"
    (folder / "day 2").mkdir(parents=True)
    for name, picture in (("10.png", PICTURES[0]), ("2.png", PICTURES[2]), ("day 2/1.png", PICTURES[1])):
        (folder / name).write_bytes(picture.read_bytes())
    (folder / "notes.txt").write_text("not an image")
    (tmp_path / "empty").mkdir()
    page = opened.go(server)
    expect(page.get_by_role("button", name="Drop images here")).to_be_visible()
    drop_paths(page, tmp_path / "empty")
    expect(page.locator("#notice-text")).to_have_text("This folder has no images.")
    drop_paths(page, folder, PICTURES[0])
    expect(page.locator("#progress")).to_have_text("4 of 4 captions")
    names = [image.get_attribute("alt").split(":")[0] for image in page.locator("#strip img").all()]
    assert names == ["2.png", "10.png", "1.png", PICTURES[0].name]
    expect(page.get_by_role("alert")).to_be_hidden()


def test_captions_can_be_stopped_and_go_on_when_the_server_is_back(opened, models) -> None:
    opened.allowed = re.compile("Failed to load resource|ERR_")
    with serving(lambda: models) as server:
        page = opened.go(server)
        with slowed(models, 0.3):
            page.set_input_files("#file", PICTURES * 3)
            expect(page.get_by_role("button", name="Stop captions")).to_be_visible()
            page.wait_for_timeout(1500 * bool(os.environ.get("BLIP2_SHOTS")))
            show(page, "captions")
            page.get_by_role("button", name="Stop captions").click()
            expect(page.get_by_role("button", name="Caption the rest")).to_be_focused()
            eventually(lambda: server.metric("blip2_requests_running") == server.metric("blip2_rows") == 0)
    page.get_by_role("button", name="Caption the rest").click()
    expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached")
    with serving(lambda: models, port=int(server.url.rpartition(":")[2])):
        expect(page.locator("#progress")).to_have_text("9 of 9 captions")
        expect(page.get_by_role("alert")).to_be_hidden()


def test_an_answer_goes_on_while_another_image_is_shown(opened, models) -> None:
    with serving(lambda: models) as server:
        page = opened.go(server)
        page.set_input_files("#file", PICTURES[::2])
        expect(page.locator("#progress")).to_have_text("2 of 2 captions")
        with slowed(models, 0.3):
            page.get_by_label("Your question").fill("what is in the picture?")
            page.keyboard.press("Enter")
            expect(page.get_by_role("button", name="Stop", exact=True)).to_be_visible()
            page.locator("#strip button").nth(1).click()
            expect(page.get_by_role("button", name="Ask", exact=True)).to_be_visible()
            expect(page.locator(".turn")).to_have_count(0)
            page.locator("#strip button").nth(0).click()
        expect(page.locator(".turn .said")).to_have_text("a boat and two dogs")
        expect(page.get_by_role("button", name="Ask again")).to_be_visible()
