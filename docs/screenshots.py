"""Screenshots of the page, as it is now: docs/page-*.png. `make screenshots`; needs playwright and a Chromium."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

DOCS = Path(__file__).parent
DESKTOP, PHONE = (1180, 820), (360, 760)


def talk(page: Page, url: str) -> None:
    """An image and two questions."""
    page.goto(url)
    page.get_by_role("button", name="Two dogs and a boat on blue").click()
    expect(page.locator("#caption")).to_have_text("a boat and two dogs")
    for number, question in enumerate(("how many dogs are there?", "and cats?"), 1):
        page.get_by_label("Your question").fill(question)
        page.keyboard.press("Enter")
        expect(page.get_by_role("button", name="Copy the answer")).to_have_count(number)


def compare(page: Page, url: str) -> None:
    talk(page, url)
    page.get_by_role("tab", name="Match").click()
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#match-rows tr")).to_have_count(3)
    if page.locator("#look-caption").is_visible():
        page.get_by_role("button", name="Where it looks for: two dogs and a boat").click()
        expect(page.locator("#light")).to_be_visible()


def many(page: Page, url: str) -> None:
    """Several images, with the history of them."""
    page.goto(url)
    expect(page.locator("#models")).to_contain_text("miniature")
    page.set_input_files("#file", sorted((DOCS.parent / "examples").glob("*.png")))
    expect(page.locator("#spoken")).to_contain_text("captions are ready")
    page.get_by_label("Your question").fill("what color is the background?")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Copy the answer")).to_have_count(1)
    page.get_by_text("History (").click()
    expect(page.locator("#history-list li").first).to_be_visible()


def start(page: Page, url: str) -> None:
    page.goto(url)
    expect(page.locator("#models")).to_contain_text("miniature")


SHOTS = {
    "desktop-light": (talk, DESKTOP, "light"),
    "desktop-dark": (compare, DESKTOP, "dark"),
    "desktop-start": (start, DESKTOP, "light"),
    "desktop-images": (many, DESKTOP, "light"),
    "phone-light": (talk, PHONE, "light"),
    "phone-dark": (compare, PHONE, "dark"),
    "phone-images": (many, PHONE, "dark"),
}


def take(url: str, folder: Path) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, (show, (width, height), scheme) in SHOTS.items():
            page = browser.new_page(
                viewport={"width": width, "height": height},
                color_scheme=scheme,
                reduced_motion="reduce",
                has_touch=width < 500,
                is_mobile=width < 500,
            )
            show(page, url)
            if width < 500:  # all of it; a "full page" image would forget that this is a phone
                page.set_viewport_size({"width": width, "height": page.evaluate("document.body.scrollHeight")})
            page.wait_for_timeout(300)
            shot = Image.open(BytesIO(page.screenshot())).convert("RGB")
            shot.quantize(128, dither=Image.Dither.NONE).save(folder / f"page-{name}.png", optimize=True)
            page.close()
        browser.close()


def main() -> None:
    command = [sys.executable, "-m", "blip2", "serve", "--port", "0"]
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env) as server:
        try:
            assert server.stdout is not None
            url = next(word for line in server.stdout for word in line.split() if word.startswith("http://"))
            take(url, Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS)
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
