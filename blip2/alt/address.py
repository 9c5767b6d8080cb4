"""From an image's address in a page to the image."""

from __future__ import annotations

import os
import re
from urllib.parse import unquote, urljoin

from blip2.alt.image import Image
from blip2.alt.pages import Page


def image_of(page: Page, image: Image, *, root: str = "", remote: bool = False) -> tuple[str, str]:
    """The path or URL, and why there is none ("" if there is one).

    ``root``: the folder for addresses that begin with "/"; by default the one in which the page was found.
    """
    if image.wrong:
        return "", image.wrong
    address = re.sub(r"[\t\r\n]", "", image.address).strip()
    if re.match("data:", address, re.IGNORECASE):
        return address, ""
    if image.base:
        address = _joined(image.base, address)
    if re.match(r"(?:https?:)?//", address, re.IGNORECASE):
        address = address if address[0] != "/" else f"https:{address}"
        return (address, "") if remote else ("", f"{address}: is on the web; add --remote to download it")
    if re.match(r"file:", address, re.IGNORECASE):
        return _file("", re.sub(r"file:(?://(?:localhost)?(?=/))?", "", address, flags=re.IGNORECASE)), ""
    if re.match(r"[a-z][a-z0-9+.-]+:", address, re.IGNORECASE):
        return "", f"{address[:80]}: is neither a file nor a URL"
    if address.startswith("/"):
        if not (root := root or page.root):
            return "", f"{address}: begins with the site's root; name that folder with --root"
        return _file(root, address.lstrip("/")), ""
    return _file(os.path.dirname(page.path), address), ""


def _joined(base: str, address: str) -> str:
    if re.match(r"[a-z][a-z0-9+.-]+:|/", base, re.IGNORECASE):
        return urljoin(base, address)
    if re.match(r"[a-z][a-z0-9+.-]+:|/", address, re.IGNORECASE):
        return address
    folder, slash, _ = re.split(r"[?#]", base, maxsplit=1)[0].rpartition("/")  # urljoin would drop its ".."
    return folder + slash + address


def _file(folder: str, address: str) -> str:
    """The path of an address, which may have a query and percent-encoded characters."""
    plain = re.split(r"[?#]", address, maxsplit=1)[0]
    tried = [os.path.normpath(os.path.join(folder, _unquoted(one))) for one in (plain, address)]
    tried += [os.path.normpath(os.path.join(folder, one)) for one in (plain, address)]
    path = next((path for path in tried if "\0" not in path and os.path.isfile(path)), tried[0].replace("\0", "\ufffd"))
    # Make it a path even if the name looks like standard input or a URL.
    return os.path.join(".", path) if path == "-" or re.match("[a-z][a-z0-9+.-]+:", path, re.IGNORECASE) else path


def _unquoted(text: str) -> str:
    return unquote(text, "utf-8", "surrogateescape")
