"""Markdown: which images have no text, and the text after one was written."""

from __future__ import annotations

import pytest

from blip2.alt import images_in

WRITTEN = [
    ("a ![](a.png) b", "a ![A cat](a.png) b"),
    ('![ ](<a b.png> "title")\n', '![A cat](<a b.png> "title")\n'),
    ("![][r]\n\n[r]: a.png 'title'\n", "![A cat][r]\n\n[r]: a.png 'title'\n"),
    ("[![](a.png)](b.html)", "[![A cat](a.png)](b.html)"),
    ("# ![](a) #\n\n![](b)\n===\n", "# ![A cat](a) #\n\n![A cat](b)\n===\n"),
    ("> - ![](a)\n>   b ![](c)\n", "> - ![A cat](a)\n>   b ![A cat](c)\n"),
    ("> a\nlazy ![](a)\n", "> a\nlazy ![A cat](a)\n"),
    ("\t![](no)\n\n1.\t![](a)\n\n\t![](b)\n", "\t![](no)\n\n1.\t![A cat](a)\n\n\t![A cat](b)\n"),
    ("|a|b|\r\n|-|-|\r\n|![](c)|![](c)|\r\n", "|a|b|\r\n|-|-|\r\n|![A cat](c)|![A cat](c)|\r\n"),
    ("|a|\n|-|\n|x \\| ![](c\\|d)|\n", "|a|\n|-|\n|x \\| ![A cat](c\\|d)|\n"),
    ("---\ntitle: ![](no)\n---\n![](a)", "---\ntitle: ![](no)\n---\n![A cat](a)"),
    ("+++\nx = '![](no)'\n+++\n\n![](a)\r", "+++\nx = '![](no)'\n+++\n\n![A cat](a)\r"),
    ("![\n](a)", "![A cat\n](a)"),
    ("**![](a)** ~~![](b)~~", "**![A cat](a)** ~~![A cat](b)~~"),
    ("<img src=a> <b>![](c)</b>", '<img src=a alt="A cat"> <b>![A cat](c)</b>'),
    ("> <div>\n> <img\n>   src=a>\n> </div>\n", '> <div>\n> <img\n>   src=a alt="A cat">\n> </div>\n'),
    ("![](a)\u2028![](b)\x0b![](c)", "![A cat](a)\u2028![A cat](b)\x0b![A cat](c)"),
]

LEFT = [
    "![a dog](a)", "![a ![](b)](c)", "```\n![](a)\n```", "~~~~\n![](a)", "`![](a)`", "    ![](a)\n", "\\![](a)",
    "!\\[](a)", "![][unknown]", "![]", "! [](a)", "<!-- ![](a) -->", "<!--\n![](a)\n\n<img src=a>\n-->",
    "<pre>\n![](a)\n</pre>", "`<img src=a>`", "```html\n<img src=a>\n```", '<img src=a alt="">',
    "- ```\n  ![](a)\n  ```", "![](a b)", "<script>\n'<img src=a>'\n</script>",
]  # fmt: skip


@pytest.mark.parametrize(("before", "after"), WRITTEN)
def test_written(pages, before, after):
    assert pages.filled(before, name="page.md") == (after.encode(), [])


@pytest.mark.parametrize("source", LEFT)
def test_left_as_it_is(pages, source):
    assert [image for _, image in images_in(pages.page(source, "page.md")) if image.is_missing] == []


def test_what_means_something_to_markdown_is_escaped(pages):
    text = r"[a] *b* `c` \d <e> f_g_ |h| &amp; {i} ]( !"
    for source in ("![](a)", "|x|\n|-|\n|![](a)|\n"):
        content, problems = pages.filled(source, text, "page.md")
        assert problems == []
        assert [image.alt for _, image in images_in(pages.page(content, "page.md"))] == [text]
    plain = "A dog (brown), 3-4 m; it's #1!"
    assert pages.filled("![](a)", plain, "p.md")[0] == f"![{plain}](a)".encode()


def test_mdx(pages):
    source = (
        "import a from './a'\n\n{/* ![](no) <img src=no> */}\n\n<Tabs>\n![](a.png)\n    ![](b.png)\n</Tabs>\n\n"
        '<img src="c.png" />\n\n<img src={d} />\n\n<img src="e.png" alt={f} />\n\n<img src="g.png" {...h} />\n'
    )
    page = pages.page(source, "page.mdx")
    found = [(image.address, bool(image.wrong)) for _, image in images_in(page) if image.is_missing]
    assert found == [("a.png", False), ("b.png", False), ("c.png", False), ("{d}", True)]


@pytest.mark.parametrize("address", ["{{site.url}}/a.png", "a/{%b%}.png"])
def test_addresses_of_templates(pages, address):
    (found,) = [image for _, image in images_in(pages.page(f"![]({address})", "page.md"))]
    assert found.is_missing and "template" in found.wrong
