"""The page's files: their types, their policy, and who gets them."""

from __future__ import annotations

import re

import httpx

from tests.serve.conftest import Running, serving


def test_the_files_and_their_headers(server) -> None:
    page = server.http.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    names = set(re.findall(r'"page/([^"]+)"', page.text))
    names |= {name for path in names if path.endswith(".js") for name in _imports(server, path)}
    assert {"page.js", "api.js", "chat.js", "style.css", "icon.svg", "dogs-and-boat.webp"} <= names
    kinds = {"js": "text/javascript; charset=utf-8", "css": "text/css; charset=utf-8"}
    kinds |= {"svg": "image/svg+xml", "webp": "image/webp"}
    for name in names:
        found = server.http.get(f"/page/{name}")
        assert found.headers["content-type"] == kinds[name.rpartition(".")[2]]
        assert "default-src 'none'" in found.headers["content-security-policy"]
        assert "unsafe" not in found.headers["content-security-policy"]
        assert found.headers["cache-control"] == "no-cache"
        again = server.http.get(f"/page/{name}", headers={"If-None-Match": found.headers["etag"]})
        assert again.status_code == 304 and not again.content
    for name in ("", "none.js", "..%2fapp.py", "__init__.py"):
        assert server.http.get(f"/page/{name}").status_code == 404
    # No address begins at the root: a proxy may show the page anywhere.
    scripts = [server.http.get(f"/page/{name}").text for name in names if name.endswith(".js")]
    assert not re.search(r"""(?:src|href|action)=["']/|(?:fetch|request)\(["'`]/""", "".join([page.text, *scripts]))
    assert not re.search(r"<script(?! type=\"module\" src=)|<style|style=|https?://", page.text)


def test_a_key_guards_everything_but_the_page(models) -> None:
    with serving(lambda: models, keys=["secret"]) as server:
        assert server.http.get("/").status_code == server.http.get("/page/page.js").status_code == 200
        refused = [server.http.get("/v1/models"), server.http.get("/metrics"), server.http.post("/page/page.js")]
        assert [answer.status_code for answer in refused] == [401, 401, 401]


def _imports(server: Running, name: str) -> set[str]:
    answer: httpx.Response = server.http.get(f"/page/{name}")
    found = set(re.findall(r'from "\./([^"]+)"', answer.text))
    return found.union(*(_imports(server, each) for each in found))
