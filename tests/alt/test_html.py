"""HTML: which images have no text, and the bytes after one was written."""

from __future__ import annotations

import pytest

from blip2.alt import images_in

WRITTEN = [
    ("<img src=a.png>", '<img src=a.png alt="A cat">'),
    ('<img src="a.png"/>', '<img src="a.png" alt="A cat"/>'),
    ("<IMG\r\n  SRC = 'a.png'\r\n  width=3 >", "<IMG\r\n  SRC = 'a.png' alt=\"A cat\"\r\n  width=3 >"),
    ("<img src='a>b'alt=' '>", "<img src='a>b'alt='A cat'>"),
    ('<img alt="\n " src=a>', '<img alt="A cat" src=a>'),
    ('<img ALT = "&#32;" src=a>', '<img ALT = "A cat" src=a>'),
    ("<img srcset='a.png 2x'>", "<img alt=\"A cat\" srcset='a.png 2x'>"),
    ("<img src=a/>", '<img src=a/ alt="A cat">'),  # the slash belongs to the value
    ("<img/src=a>", '<img/src=a alt="A cat">'),
    ("<p title='<img src=x>'><img src=a>", "<p title='<img src=x>'><img src=a alt=\"A cat\">"),
    ("<script>a<b '<img src=x>'</script><img src=a>", "<script>a<b '<img src=x>'</script><img src=a alt=\"A cat\">"),
    ("<!-- <img src=x> --><!--><img src=a>", '<!-- <img src=x> --><!--><img src=a alt="A cat">'),
    ("<noscript><img src=a></noscript>", '<noscript><img src=a alt="A cat"></noscript>'),
    ("<svg><style/><title/></svg><img src=a>", '<svg><style/><title/></svg><img src=a alt="A cat">'),
    ("<p aria-hidden=true><br></p><img src=a>", '<p aria-hidden=true><br></p><img src=a alt="A cat">'),
    ("a < b <img src=a> <3", 'a < b <img src=a alt="A cat"> <3'),
    # templates
    ('<a href="{% url "x" %}"><img src=a>', '<a href="{% url "x" %}"><img src=a alt="A cat">'),
    ("{{ <img src=a>", '{{ <img src=a alt="A cat">'),
    ('<img src=a class="<?= $b ? "c" : "d" ?>">', '<img src=a alt="A cat" class="<?= $b ? "c" : "d" ?>">'),
]  # fmt: skip

LEFT = [
    '<img src=a alt="">', "<img src=a alt>", "<img src=a alt= >", '<img src=a alt="a dog">',
    '<img src=a role="presentation">', '<img src=a role="none">', '<img src=a aria-hidden="true">',
    '<img src=a aria-label="a dog">', '<div aria-hidden="true"><p><img src=a></div>',
    "<!-- <img src=a> -->", "<!-- <img src=a>", "<script><img src=a></script>", "<style><img src=a>",
    "<textarea><img src=a></textarea>", "<title><img src=a></title>", "<![CDATA[<img src=a><img src=b>]]>",
    "<image src=a>", "<imgx src=a>", "<img src=a", "<img src='a>", "</img src=a>", "<area href=a>",
    "<?php echo '<img src=a>' ?>", "<?php '<img src=a>'", "<% '<img src=a>' %>", "{{ '<img src=a>' }}",
    "{# <img src=a> #}", "<p title='<img src=a>",
    "<img src=a {% if b %}alt='c'{% endif %}>", "<img src=a {{ attributes }}>", '<img src=a alt="{{ b }}">',
    '<img src=a al{{ "t" }}="b">', '<img src=a :alt="text">',
]  # fmt: skip


@pytest.mark.parametrize(("before", "after"), WRITTEN)
def test_written(pages, before, after):
    assert pages.filled(before) == (after.encode(), [])


@pytest.mark.parametrize("source", LEFT)
def test_left_as_it_is(pages, source):
    assert [image for _, image in images_in(pages.page(source)) if image.is_missing] == []


@pytest.mark.parametrize(
    ("source", "after"),
    [
        ("<img src=a>", '<img src=a alt="a &quot;b&quot; &amp;lt; \'c\' &lt;d> &#123;&#123;e&#125;&#125;">'),
        ("<img src=a alt=' '>", "<img src=a alt='a \"b\" &amp;lt; &#39;c&#39; &lt;d> &#123;&#123;e&#125;&#125;'>"),
    ],
)
def test_quotes(pages, source, after):
    assert pages.filled(source, "a \"b\" &lt; 'c' <d> {{e}}") == (after.encode(), [])


def test_elements_of_xhtml_end_at_their_slash(pages):
    source = '<script src="x"/><img src="a"/>'
    assert b"alt" not in pages.filled(source)[0]  # to HTML all of it is a script
    assert pages.filled(source, name="page.xhtml")[0] == b'<script src="x"/><img src="a" alt="A cat"/>'


@pytest.mark.parametrize("alt", ["image", "Photo", "a.PNG", "IMG_1234", "dsc00012", "photo 3", "...", "the-sea"])
def test_texts_that_say_nothing(pages, alt):
    source = f"<img src='b/the-sea.jpg?v=1' alt='{alt}'>"
    assert pages.filled(source)[0] == source.encode()
    assert pages.filled(source, weak=True)[0] == b"<img src='b/the-sea.jpg?v=1' alt='A cat'>"


def test_texts_that_say_something(pages):
    for alt in ("A dog", "Our logo", "7 dwarfs", "Photo of a sea", "{{ alt }}"):
        assert pages.filled(f"<img src=x alt='{alt}'>", weak=True)[0] == f"<img src=x alt='{alt}'>".encode()
    assert pages.filled("<img src=x alt=image>", weak=True)[0] == b'<img src=x alt="A cat">'
