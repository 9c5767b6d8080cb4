"""``blip2 alt``: a small site from its first report to its last, with the bundled model."""

from __future__ import annotations

import csv
import os
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "guides" / "alt-texts.md").read_text("utf-8")
INDEX = (
    '<meta charset=utf-8>\r\n<h1>Garden</h1>\r\n<img src="/img/none.png" alt="">\r\n'
    '<p>Ours: <img src="/img/flowers.png?v=2">\r\n'
)
BLOG = "# Cats\n\n![](../img/cats.png) and\n`![](code.png)`\n"


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("cats", "flowers"):
        Path("site/img").mkdir(parents=True, exist_ok=True)
        Path(f"site/img/{name}.png").write_bytes((ROOT / "examples" / f"{name}.png").read_bytes())
    Path("site/blog").mkdir()
    Path("site/index.html").write_bytes(INDEX.encode())
    Path("site/blog/cats.md").write_text(BLOG)
    return Path("site")


def rows():
    with open("alt.csv", encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def approve(**by_picture: str):
    """As a person does in a spreadsheet, which writes semicolons."""
    found = rows()
    for row in found:
        if (text := by_picture.get(Path(row["image"]).stem)) is not None:
            row |= {"approved": "yes", "alt": text or row["alt"]}
    with open("alt.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, found[0].keys(), delimiter=";")
        table.writeheader()
        table.writerows(found)


def test_the_guide(run, site):
    """Its commands, in order; those that show what they print print it."""
    for block in re.findall(r"```console\n(.*?)```", GUIDE, re.S):
        for shown in block.removeprefix("$ ").split("\n$ "):
            command, _, output = shown.strip("\n").partition("\n")
            if "--apply alt.csv --dry-run" in command:
                approve(cats="", flowers="Two sunflowers & two dogs")
            done = run(*shlex.split(command)[1:])
            assert done.exit_code == 0, done.stderr
            assert done.stdout.strip("\n") == output or not output
    assert (site / "index.html").read_bytes() == INDEX.replace(
        '?v=2"', '?v=2" alt="Two sunflowers &amp; two dogs"'
    ).encode()
    assert re.fullmatch(
        re.escape(BLOG).replace(re.escape("![](../"), r"!\[[A-Z][a-z, ]*cats?[a-z, ]*\]\(\.\./"),
        (site / "blog/cats.md").read_text(),
    )
    assert run("alt", "site").stderr == "blip2: 0 of 3 images without alt text in 2 pages\n"


def test_reports_and_runs(run, site):
    (site / "more.md").write_text("![](img/cats.png) ![](gone.png) ![](https://example.org/x.png)\n")
    result = run("alt", site)
    assert result.exit_code == 1  # for the one that is not there
    missing, counted, next_step = result.stderr.splitlines()
    assert missing.startswith("blip2: site/more.md:1: site/gone.png: no such file")
    assert counted.endswith("5 of 6 images without alt text in 3 pages: 2 different images described, 1 failed, "
                            "1 left for you to write")  # fmt: skip
    assert next_step.endswith("then: blip2 alt --apply alt.csv")
    found = rows()
    assert [(row["file"], row["line"], row["image"]) for row in found] == [
        ("site/blog/cats.md", "3", "site/img/cats.png"), ("site/index.html", "4", "site/img/flowers.png"),
        ("site/more.md", "1", "site/img/cats.png"), ("site/more.md", "1", "site/gone.png"),
        ("site/more.md", "1", "https://example.org/x.png"),
    ]  # fmt: skip
    assert found[0]["alt"] == found[2]["alt"] != "" and not any(row["approved"] for row in found)
    assert "no such file" in found[3]["problem"] and "--remote" in found[4]["problem"]
    page = Path("alt.html").read_text()
    assert page.count("<article>") == 4 and page.count("data:image/jpeg;base64,") == 2 and found[0]["alt"] in page
    assert "Ours: <mark>image</mark>" in page

    # What a person wrote stays when the same command is given again, and no image is described again.
    approve(flowers="Sunflowers")
    os.rename(site / "img/flowers.png", site / "gone.png")
    (site / "img/flowers.png").write_bytes((site / "gone.png").read_bytes())
    os.utime(site / "img/flowers.png", ns=(os.stat(site / "gone.png").st_mtime_ns,) * 2)
    result = run("alt", site)
    assert result.exit_code == 0 and "3 different images described (2 of them earlier), 0 failed" in result.stderr
    found = rows()
    assert (found[1]["alt"], found[1]["approved"]) == ("Sunflowers", "yes") and found[3]["alt"]
    result = run("alt", site, "--restart", "--approve-all")
    assert [bool(row["approved"]) for row in rows()] == [True] * 4 + [False] and rows()[1]["alt"] != "Sunflowers"

    result = run("alt", "--apply", "alt.csv", "--dry-run")
    assert '+<p>Ours: <img src="/img/flowers.png?v=2" alt="' in result.stdout
    assert result.stderr == "blip2: would write 4 alt texts in 3 pages\n"
    assert (site / "index.html").read_bytes() == INDEX.encode()
    assert run("alt", "--apply", "alt.csv").stderr == "blip2: wrote 4 alt texts in 3 pages\n"
    assert run("alt", "--apply", "alt.csv").stderr == "blip2: wrote 0 alt texts in 0 pages, 4 already there\n"


def test_another_model_or_prompt_is_told(run, site):
    assert run("alt", site, "--beams", 1).exit_code == 0
    result = run("alt", site, "--beams", 2)
    assert result.exit_code == 1 and "started by another command" in result.stderr and "--restart" in result.stderr
    assert run("alt", site, "--beams", 2, "--restart").exit_code == 0


def test_nothing_is_lost(run, site):
    Path("alt.html").write_text("<p>mine")
    result = run("alt", site)
    assert result.exit_code == 1 and "alt.html: exists and is not a report of blip2 alt" in result.stderr
    assert Path("alt.html").read_text() == "<p>mine" and not Path("alt.csv").exists()
    Path("other.csv").write_text("a,b\n1,2\n")
    result = run("alt", site, "--report", "other.csv")
    assert result.exit_code == 1 and "not a report of blip2 alt" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Missing argument 'PAGES...'"),
        (["site", "--apply", "alt.csv"], "--apply takes its pages from the report"),
        (["site", "--root", "nowhere"], "--root nowhere: there is no such folder"),
        (["site", "--beams", "0"], "--beams is 0"),
    ],
)
def test_wrong_use(run, site, arguments, words):
    result = run("alt", *arguments)
    assert result.exit_code == 2 and words in result.stderr and result.stderr.count("\n") == 1


def test_pages_that_cannot_be_read(run, site):
    result = run("alt", "site/img/cats.png", "none.md", site, "--dry-run")
    assert result.exit_code == 1 and len(result.stdout.splitlines()) == 2
    assert "cats.png: not a page" in result.stderr and "none.md: cannot be read (No such file" in result.stderr
    assert run("alt", "--apply", "alt.csv").stderr.startswith("blip2: alt.csv: cannot be read (No such file")


def test_a_run_that_is_stopped_goes_on(run, site, monkeypatch):
    from blip2.api import work as works

    def stopped(*options):
        def work(records):
            assert next(records).key == "site/img/cats.png"
            raise KeyboardInterrupt
            yield

        return work

    with monkeypatch.context() as patch:
        patch.setattr(works, "captions", stopped)
        result = run("alt", site)
    assert result.exit_code == 130 and not Path("alt.csv").exists()
    assert result.stderr.strip() == "blip2: stopped before alt.csv was written; the same command resumes"
    assert run("alt", site).exit_code == 0 and len(rows()) == 2
