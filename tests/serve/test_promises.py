"""docs/serving.md, SECURITY.md and the proxies' files say what is so: the tests that they name, the limits."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from blip2.serve.limits import Limits

ROOT = Path(__file__).parents[2]
FOLDERS = ("", "tests/serve/", "blip2/", "blip2/serve/", "docs/")
DOCUMENTS = {name: (ROOT / name).read_text() for name in ("docs/serving.md", "SECURITY.md")}
PROXIES = {name: (ROOT / "docs/proxies" / name).read_text() for name in ("nginx.conf", "Caddyfile")}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_file_that_is_named_is_there(name) -> None:
    text = DOCUMENTS[name]
    named = re.findall(r"`([\w/]+\.py|tests/\w+/)`", text) + re.findall(r"(?<=\]\()(?!http)[\w./]+", text)
    assert len(named) > 10
    for path in named:
        beside = (ROOT / name).parent / path
        assert beside.exists() or any((ROOT / folder / path).exists() for folder in FOLDERS), path


def test_the_figures_are_the_defaults() -> None:
    limits, text = Limits(), " ".join(DOCUMENTS["docs/serving.md"].split())
    for words in (
        f"A body may have {limits.max_body_bytes // 2**20} MiB and take {limits.body_s:g} s",
        f"all bodies together may have {limits.flight_bytes // 2**20} MiB",
        f"{limits.max_pixels // 10**6} million pixels",
        f"{limits.max_images} images, {limits.max_texts} texts, {limits.max_prompt_tokens} tokens of text and "
        f"{limits.deadline_s:g} s (then 504), and gets up to {limits.max_new_tokens} tokens",
        f"{limits.max_queue} requests may run or wait",
        f"At {limits.max_connections} connections",
        f"finishes the running requests, within {limits.shutdown_s:g} s",
    ):
        assert words in text


def test_the_figures_of_the_page_are_those_of_its_files() -> None:
    folder, text = ROOT / "blip2/serve/page", " ".join(DOCUMENTS["docs/serving.md"].split())
    constants = dict(re.findall(r"^const (\w+) = ([\d *]+);", "".join(map(Path.read_text, folder.glob("*.js"))), re.M))
    megabytes = int(constants["MAX_BYTES_KEPT"].split(" * ")[0])
    for words in (
        f"is sent again up to {constants['BUSY_TRIES']} times",
        f"Up to {constants['MAX_IMAGES']} images are captioned, {constants['AT_ONCE']} at a time",
        f"The last {constants['MAX_ENTRIES']} images ({megabytes} MiB)",
    ):
        assert words in text
    assert f"The last {constants['MAX_ENTRIES']} images" in (folder / "index.html").read_text()


@pytest.mark.parametrize("name", PROXIES)
def test_a_proxy_gives_up_after_the_server(name) -> None:
    """So that clients read the server's own errors, which say what to do."""
    limits, text = Limits(), PROXIES[name]
    [mebibytes] = re.findall(r"(?:client_max_body_size|max_size)\s+(\d+)(?:m|MiB)\b", text)
    [waits_s] = re.findall(r"(?:proxy_read_timeout|response_header_timeout)\s+(\d+)s", text)
    [body_s] = re.findall(r"(?:client_body_timeout|read_body)\s+(\d+)s", text)
    assert limits.max_body_bytes < int(mebibytes) * 2**20 < 2 * limits.max_body_bytes
    assert limits.deadline_s < int(waits_s) < 2 * limits.deadline_s
    assert int(body_s) == limits.body_s
