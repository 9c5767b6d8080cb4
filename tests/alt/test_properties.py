"""Whatever a page holds: nothing changes but the texts, a second time changes nothing, and nothing is missing then."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blip2.alt import apply, images_in, read_page
from blip2.alt.report import Row

PIECES = [
    "<img src=a>", "<img src='b' alt=' '>", '<img alt="" src=c>', "<IMG\nSRC=d/>", "<img src=a alt=", "<img",
    "<p title=\"", "'", "![](a)", "![ ](<b c> 't')", "![][r]", "\n[r]: x\n", "![a](", "[![](d)](e)", "![\n](f)", "`",
    "```\n", "    ", "\t", "> ", "- ", "1. ", "|a|b|\n|-|-|\n", "|", "\\|", "\\", "---\n", "+++\n", "\n", "\r\n",
    "\r", "\n\n", " ", "word", "é", "\u2028", "<!--", "-->", "<script>", "</script>", "<div>\n", "</div>", "<pre>",
    "<title>", "<svg>", "<?php", "?>", "{{", "}}", "{%", "%}", "{/*", "*/}", "{", "}", "<%", "<![CDATA[", "]]>", "<",
    ">", "&amp;", "#", "===\n", "~~", "*",
]  # fmt: skip
PAGES = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)
TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1, max_size=12).map(
    lambda text: " ".join(text.split())
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(PAGES, TEXTS.filter(bool), st.sampled_from(["a.html", "a.xhtml", "a.md", "a.mdx"]))
def test_only_the_texts_change(tmp_path, content, text, name):
    path = tmp_path / name
    path.write_bytes(content.encode())
    page = read_page(str(path))
    missing = [(check, image) for check, image in images_in(page) if image.is_missing]
    old = {check: (image.alt or "").strip() for check, image in missing}
    rows = [Row(str(path), 1, "", text, None, "yes", "", old[check], "", check) for check in old]
    changes = list(apply(rows))
    for change in changes:
        change.write()
    after = path.read_bytes().decode()
    problems = [problem for change in changes for problem in change.problems]
    if problems:  # then it is left as it was
        assert after == content and "cannot be written safely" in problems[0]
        return
    # What stands between the texts is as it was.
    place = 0
    for piece in _between(content, [image for _, image in missing]):
        place = after.index(piece, place) + len(piece)
    added = [image for _, image in missing]
    assert len(after) - len(content) == sum(
        len(image.written(text, page.new_in)) - (image.edit_stop - image.edit_start) for image in added
    )
    again = read_page(str(path))
    assert not [image for _, image in images_in(again) if image.is_missing]
    assert sum(image.alt == text for _, image in images_in(again)) >= len(missing)
    for change in apply(rows):
        assert (change.done, change.num_before, change.problems) == ([], len(missing), [])


def _between(content, images):
    places = [0, *(place for image in images for place in (image.edit_start, image.edit_stop)), len(content)]
    return [content[start:stop] for start, stop in zip(places[::2], places[1::2], strict=True)]


@settings(max_examples=50, deadline=None)
@given(TEXTS)
def test_markdown_reads_back_what_was_written(text):
    from blip2.alt.markdown import images_of_markdown

    for source in ("![](a)", "|a|\n|-|\n|![](a)|", "# ![](a)", "[![](a)](b)"):
        (image,) = images_of_markdown(source)
        written = source[: image.edit_start] + image.written(text, "utf-8") + source[image.edit_stop :]
        assert [found.alt for found in images_of_markdown(written)] == [text or None]
