"""Bytes to text and back, pages in folders, and where their images are."""

from __future__ import annotations

import codecs

import pytest

from blip2.alt import find_pages, images_in, read_page
from blip2.alt.address import image_of
from blip2.alt.scan import context_of
from blip2.errors import CollectionError

TEXT = "Köln – 犬"
REFERENCES = "K&#246;ln &#8211; &#29356;"


@pytest.mark.parametrize(
    ("before", "encoding", "name", "written"),
    [
        ("<p>é<img src=a>", "utf-8", "a.html", TEXT),
        ("<p><img src=a>", "utf-8", "a.html", REFERENCES),  # a browser may take it for anything
        ("<meta charset=utf8><img src=a>", "utf-8", "a.html", TEXT),
        ("<meta charset='latin1'>é“<img src=a>", "cp1252", "a.html", "Köln – &#29356;"),
        ("<meta content='text/html; charset=Shift_JIS'>犬ソ<img src=a>", "cp932", "a.htm", "K&#246;ln &#8211; 犬"),
        ("<?xml encoding='iso-8859-15'?>€<img src='a'/>", "iso-8859-15", "a.xhtml", "Köln &#8211; &#29356;"),
        ("<meta charset=martian>é<img src=a>", "latin-1", "a.html", REFERENCES),
        ("<meta charset=hex><img src=a>", "utf-8", "a.html", REFERENCES),
        ("![](a)", "utf-8", "a.md", TEXT),
        ("é ![](a)", "latin-1", "a.md", REFERENCES),
    ],
)  # fmt: skip
def test_encodings(pages, before, encoding, name, written):
    after, problems = pages.filled(before.encode(encoding), TEXT, name)
    assert problems == []
    expected = before.replace("![]", f"![{written}]") if name.endswith("md") else before
    expected = expected.replace("src=a>", f'src=a alt="{written}">').replace("src='a'/", f"src='a' alt=\"{written}\"/")
    if encoding == "cp932":
        assert after == expected.encode("cp932")
    else:
        assert after.decode(encoding) == expected


@pytest.mark.parametrize(
    ("mark", "encoding"),
    [(codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be")],
)
def test_byte_order_marks(pages, mark, encoding):
    for source, name in (("<meta charset=latin1><img src=a>\r\n", "a.html"), ("---\nx: 1\n---\n![](a)\n", "a.md")):
        after, problems = pages.filled(mark + source.encode(encoding), TEXT, name)
        expected = source.replace("src=a", f'src=a alt="{TEXT}"').replace("![]", f"![{TEXT}]")
        assert (after, problems) == (mark + expected.encode(encoding), [])


def test_bytes_that_are_no_text_stay(pages):
    assert pages.filled(b"<meta charset=utf-8>\xff\xfe\x80<img src=a>")[0] == (
        b'<meta charset=utf-8>\xff\xfe\x80<img src=a alt="A cat">'
    )


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [(b"", "a.txt", "not a page"), (b"a\0b", "a.md", "NUL"), (codecs.BOM_UTF16_LE + b"abc", "a.html", "encoding")],
)
def test_refused(pages, content, name, words):
    with pytest.raises(CollectionError, match=words):
        pages.page(content, name)


def test_lines_are_counted_however_they_end(pages):
    page = pages.page("<p>\r\n<p>\r<p>\n\n<img src=a>")
    assert [page.line_of(image.start) for _, image in images_in(page)] == [5]


def test_folders(tmp_path):
    for name in ("b.md", "a/c.HTML", "a/x.css", ".hidden/d.md", "node_modules/e.md", "drafts/f.mdx", "g.md~"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    top = str(tmp_path)
    assert find_pages([top]).pages == [(f"{top}/{name}", top) for name in ("a/c.HTML", "b.md", "drafts/f.mdx")]
    assert find_pages([top], recursive=False).pages == [(f"{top}/b.md", top)]
    assert [path for path, _ in find_pages([top], exclude=["drafts", "b.*"]).pages] == [f"{top}/a/c.HTML"]
    both = find_pages([f"{top}/b.md", top])
    assert [path for path, _ in both.pages] == [f"{top}/b.md", f"{top}/a/c.HTML", f"{top}/drafts/f.mdx"]
    (tmp_path / "empty").mkdir()
    assert find_pages([f"{top}/empty"]).problems[0].startswith(f"{top}/empty: there are no pages in this folder")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("<img src=img/a.png>", "page/img/a.png"),
        ("<img src=' ../a%20b.png?v=1#x '>", "a b.png"),
        ("<img src=a%2520b.png>", "page/a%20b.png"),
        ("<img src=c%3Fd.png>", "page/c?d.png"),
        ("<base href='../'><img src=->", "./-"),  # no standard input
        ("<img src='../data%3Aa,b'>", "./data:a,b"),
        ("<img src=e?f.png>", "page/e?f.png"),  # as wget saves it; there is no "e"
        ("<img src=&#97;.png>", "page/a.png"),
        ("<img src='a.png?x=1&copy=2'>", "page/a.png"),
        ("<img src=/img/a.png>", "root/img/a.png"),
        ("<base href=/sub/><img src=a.png>", "root/sub/a.png"),
        ("<base href=sub/><img src=a.png>", "page/sub/a.png"),
        ("<img src=data:image/gif;base64,R0lG data-src=a.png>", "page/a.png"),
        ("<img src='data:image/gif;base64,R0lG' srcset='a.png 100w, b,c.png 200w'>", "page/b,c.png"),
        ("<img srcset='a.png, b.png 2x'>", "page/b.png"),
        ("<img src=https://x.org/a.png>", "https://x.org/a.png"),
        ("<img src=//x.org/a.png>", "https://x.org/a.png"),
        ("<base href=http://x.org/y/><img src=a.png>", "http://x.org/y/a.png"),
        ("<img src=file:///a/b.png>", "/a/b.png"),
        ("<img src=data:image/png;base64,AAAA>", "data:image/png;base64,AAAA"),
    ],
)
def test_where_pictures_are(tmp_path, monkeypatch, source, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "e?f.png").touch()
    (tmp_path / "page" / "index.html").write_text(source)
    page = read_page("page/index.html")
    ((_, image),) = images_in(page)
    assert image_of(page, image, root="root", remote=True) == (expected, "")
    picture, problem = image_of(page, image)
    if expected.startswith("http"):
        assert (picture, problem) == ("", f"{expected}: is on the web; add --remote to download it")
    elif expected.startswith("root/"):
        assert picture == "" and "--root" in problem
        assert image_of(read_page("page/index.html", "top"), image)[0] == expected.replace("root", "top")


@pytest.mark.parametrize(
    "source", ["<img>", "<img src>", "<img src='{{ a }}'>", "<img src=blob:a>", "<input type=image src=a>"]
)
def test_pictures_that_nobody_can_describe(pages, source):
    page = pages.page(source)
    ((_, image),) = images_in(page)
    picture, problem = image_of(page, image, remote=True)
    assert image.is_missing and picture == "" and problem


def test_context(pages):
    source = "<title>x</title><h1>Our&nbsp;cats</h1><p>before <img src=a> <a href=b>after</a>{{ x }}<script>y</script>"
    page = pages.page(source)
    assert context_of(page, images_in(page)[0][1]) == "Our cats before […] after"
    page = pages.page("# Our *cats*\n\n- [b](<c> 'd') ![](a)\n- after\n\n|e|\n|:-:|\n\n[f]: g\n", "a.md")
    assert context_of(page, images_in(page)[0][1]) == "Our cats b […] after e"
