"""The report's table, as it is written and as spreadsheets give it back; and what is applied of it."""

from __future__ import annotations

import csv
import io
import os
import stat
from dataclasses import replace

import pytest

from blip2.alt import apply, images_in, read_report
from blip2.alt.report import COLUMNS, Row, csv_of
from blip2.alt.wording import MAX_CHARS, alt_text
from blip2.errors import CollectionError

ROWS = [
    Row("a.html", 3, "a.png", 'A "cat", é; 犬', -0.5, "yes", "b […] c", "", "", "at-1e5-1"),
    Row("=b.md", 12, "-1.png", "=1+1", None, "", "@x", "'+", "\tnone", "at-2-1"),
]


def saved(content: bytes, encoding: str, delimiter: str, *, line_end: str = "\r\n", head: str = "") -> bytes:
    """As a spreadsheet saves it."""
    stream = io.StringIO()
    rows = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""))
    csv.writer(stream, delimiter=delimiter, lineterminator=line_end).writerows(rows)
    return (head + stream.getvalue()).encode(encoding)


@pytest.mark.parametrize(
    ("encoding", "delimiter", "options"),
    [
        ("utf-8-sig", ",", {}), ("utf-8", ",", {"line_end": "\n"}), ("utf-8", ";", {}), ("utf-16", "\t", {}),
        ("utf-8-sig", ";", {"head": "sep=;\r\n"}),
    ],
)  # fmt: skip
def test_read_back(tmp_path, encoding, delimiter, options):
    path = tmp_path / "alt.csv"
    path.write_bytes(saved(csv_of(ROWS), encoding, delimiter, **options))
    first, second = read_report(path)
    for row, expected in ((first, ROWS[0]), (second, ROWS[1])):
        for name in ("file", "line", "image", "alt", "approved", "context", "old", "check"):
            assert getattr(row, name) == getattr(expected, name)
    assert first.is_approved and not second.is_approved


def test_excel_of_the_west_has_its_own_encoding(tmp_path):
    content = saved(csv_of([Row("a.html", 3, "", "Ein Café – schön", None, "x", "", "", "", "at-1-1")]), "cp1252", ";")
    (tmp_path / "alt.csv").write_bytes(content)
    (row,) = read_report(tmp_path / "alt.csv")
    assert (row.alt, row.is_approved) == ("Ein Café – schön", True)


def test_no_cell_is_a_formula():
    content = csv_of([Row("+a.md", 1, "=cmd|x", "=HYPERLINK(1)", -0.5, "", "@b", "-c", "\td", "at-1-1")])
    cells = next(csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""))).items()
    assert {name for name, cell in cells if cell[:1] in tuple("=+-@\t\r")} == {"score"}


def test_columns_in_another_order(tmp_path):
    (tmp_path / "alt.csv").write_text("Check,mine,Approved,ALT,file\nat-1-1,?,TRUE,  A\u00a0\tcat ,a.md\n,,,,\n")
    (row,) = read_report(tmp_path / "alt.csv")
    assert (row.check, row.alt, row.file, row.is_approved) == ("at-1-1", "A cat", "a.md", True)


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n", "<html>"])
def test_no_report(tmp_path, content):
    (tmp_path / "alt.csv").write_text(content)
    with pytest.raises(CollectionError, match="not a report of blip2 alt"):
        read_report(tmp_path / "alt.csv")


# ---- applied ----


def problems_of(rows):
    changes = list(apply(rows))
    for change in changes:
        change.write()
    return [problem.partition(": ")[2] for change in changes for problem in change.problems]


def test_only_what_is_approved(pages):
    page = pages.page("<img src=a><img src=b><img src=c>")
    first, second, third = pages.rows(page, "A cat")
    rows = [first, replace(second, approved="no"), third]
    assert problems_of(rows) == []
    assert (pages.folder / "page.html").read_text() == '<img src=a alt="A cat"><img src=b><img src=c alt="A cat">'


def test_decorative(pages):
    assert pages.filled("<img src=a><img alt=' ' src=b>", "", approved="Decorative") == (
        b"<img src=a alt=\"\"><img alt='' src=b>", []
    )  # fmt: skip
    assert "Markdown cannot mark" in pages.filled("![](a)", "", "page.md", approved="decorative")[1][0]


@pytest.mark.parametrize(
    ("now", "words"),
    [
        ("<p><img src=b>", "the page has changed here"),
        ("<p><img src=a alt='A dog'>", "has got another text since the report was made, 'A dog'; left unchanged"),
        ("<p><img src=a alt=''>", "has been marked as decorative"),
        ("<p><img width=2 src=a>", "the page has changed here"),
        ("", "the page has changed here"),
    ],
)
def test_pages_that_changed(pages, now, words):
    rows = pages.rows(pages.page("<p><img src=a>"), "A cat")
    pages.page(now)
    (problem,) = problems_of(rows)
    assert problem.startswith(words)
    assert (pages.folder / "page.html").read_text() == now


def test_changes_elsewhere_do_no_harm(pages):
    rows = pages.rows(pages.page("<img src=a><img src=a>"), "A cat")
    pages.page("<h1>é</h1>\n<img src=x><img src=a alt='A cat'> <img src=a>")
    assert problems_of(rows) == []
    text = (pages.folder / "page.html").read_text()
    assert text == "<h1>é</h1>\n<img src=x><img src=a alt='A cat'> <img src=a alt=\"A cat\">"
    (change,) = apply(rows)
    assert (change.done, change.num_before) == ([], 2)


def test_problems_are_told(pages):
    (row,) = pages.rows(pages.page("<img src=a>"), "A cat")
    for wrong, words in (
        ({"approved": "maybe"}, "approved is 'maybe'; write yes, decorative, or nothing"),
        ({"alt": ""}, "approved without a text; write one, or mark it as decorative"),
    ):
        assert problems_of([replace(row, **wrong)]) == [words]
    assert problems_of([replace(row, file="none.md")])[0].startswith("no such page")
    assert problems_of([row, replace(row, alt="A dog")]) == ["is in the report twice; the first row was used"]
    assert (pages.folder / "page.html").read_text() == '<img src=a alt="A cat">'


def test_rights_stay_and_links_stay(pages):
    (row,) = pages.rows(pages.page("<img src=a>", "real.html"), "A cat")
    os.chmod(pages.folder / "real.html", 0o640)
    (pages.folder / "page.html").symlink_to("real.html")
    assert problems_of([replace(row, file=str(pages.folder / "page.html"))]) == []
    assert (pages.folder / "page.html").is_symlink()
    assert stat.S_IMODE(os.stat(pages.folder / "real.html").st_mode) == 0o640
    assert images_in(pages.page((pages.folder / "real.html").read_bytes()))[0][1].alt == "A cat"


def test_a_page_that_another_program_writes(pages):
    (change,) = apply(pages.rows(pages.page("<img src=a>"), "A cat"))
    pages.page("<img src=a>!")
    with pytest.raises(CollectionError, match="has just been changed"):
        change.write()
    assert (pages.folder / "page.html").read_text() == "<img src=a>!"


# ---- the texts ----


@pytest.mark.parametrize(
    ("caption", "text"),
    [
        ("a dog on a sofa", "A dog on a sofa"),
        ("an image of a dog", "A dog"),
        ("this is a close up picture of the sea", "The sea"),
        ("a black and white photo of a man", "A black and white photo of a man"),
        ("a painting of a dog", "A painting of a dog"),
        ("a man taking a picture of a dog", "A man taking a picture of a dog"),
        ("a dog a dog a dog", "A dog"),
        ("  two\ncats ", "Two cats"),
        ("a photo of", ""),
        ("élan", "Élan"),
    ],
)
def test_alt_text(caption, text):
    assert alt_text(caption) == text


def test_long_ones_are_cut_at_a_word():
    ways = "walking along the beach, running after a ball, swimming in the sea, sleeping in the shade of the"
    text = alt_text(f"a man and a woman {ways} horse-chestnut trees")
    assert text == f"A man and a woman {ways.removesuffix(' of the')}" and len(text) <= MAX_CHARS
    assert len(alt_text("x" * 300)) == MAX_CHARS


def test_columns():
    assert COLUMNS == ("file", "line", "image", "alt", "score", "approved", "context", "old", "problem", "check")
