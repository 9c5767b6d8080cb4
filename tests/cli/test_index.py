"""``blip2 index``, ``blip2 search``, and ``blip2 ask`` of an index: what is printed, and how it ends."""

from __future__ import annotations

import functools
import html.parser
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

import blip2
from tests import tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def matching(matching_model):
    return ["--model", matching_model]


@pytest.fixture(scope="module")
def searched(pictures, matching_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("searched") / "photos.index"
    blip2.Index.update(path, pictures, blip2.load(matching_model))
    return path


@pytest.fixture(scope="module")
def asked(pictures, opt_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("asked") / "seen.index"
    blip2.Index.update(path, pictures, blip2.load(opt_model))
    return path


@pytest.fixture
def photos(tmp_path, pictures):
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in pictures:
        shutil.copy2(path, folder)
    return folder


# ---- index ----


def test_pictures_that_rows_name(run, matching, photos, tmp_path):
    index, rows, table = tmp_path / "photos.index", tmp_path / "rows.jsonl", tmp_path / "table.csv"
    lines = [{"file": f"picture{number:03}.png", "n": number} for number in (0, 1, 1, 77)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = run("index", rows, "--image-column", "file", "--images", photos, "-o", index, *matching)
    assert result.exit_code == 1 and "picture077.png: no such file; fix the row" in result.stderr
    assert "2 new, 0 changed, 0 gone; 2 images in" in result.stderr
    table.write_text("image,caption\nphotos/picture001.png,x\nphotos/picture002.png,y\n")
    result = run("index", table, photos / "picture003.png", "-o", index, *matching)
    assert result.exit_code == 0 and "2 new, 0 changed, 0 gone; 4 images in" in result.stderr
    assert blip2.Index.open(index).paths == [str(photos / f"picture{number:03}.png") for number in range(4)]
    assert "has no column 'nobody'" in run("index", table, "--image-column", "nobody", "-o", index).stderr
    assert "0 new" in run("index", photos, "--exclude", "*[4-7].png", "-o", index, *matching).stderr


def test_rows_and_shards_that_hold_their_pictures(run, matching, photos, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(photos / "picture000.png", "0.png")
    result = run("index", tmp_path / "a.tar", "-o", tmp_path / "photos.index", *matching)
    assert result.exit_code == 1 and "a.tar: contains the images, but an index needs" in result.stderr
    assert result.stderr.count("\n") == 1 and not (tmp_path / "photos.index").exists()


def test_index_and_again(run, matching, photos, tmp_path):
    index = tmp_path / "photos.index"
    result = run("index", photos, "-o", index, *matching)
    told = f"8 new, 0 changed, 0 gone; 8 images in {index}\n"
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", told)
    (photos / "picture000.png").unlink()
    (photos / "broken.png").write_bytes(b"broken")
    result = run("index", photos, "-o", index)
    assert result.exit_code == 1
    problem, told = result.stderr.splitlines()
    assert problem.startswith(f"blip2: {photos / 'broken.png'}: ")
    assert told == f"0 new, 0 changed, 1 gone, 1 could not be read; 7 images in {index}"


def test_the_bundled_models_are_the_default(run, photos, tmp_path):
    for kind, verb in (("search", ["search"]), ("ask", ["ask"])):
        index = tmp_path / f"{kind}.index"
        assert run("index", photos, "-o", index, "--for", kind).exit_code == 0
        result = run(*verb, index, "two dogs")
        assert (result.exit_code, len(result.stdout.splitlines()), result.stderr) == (0, 8, "")


def test_index_that_cannot_be(run, matching, opt_model, photos, searched, tmp_path):
    index = tmp_path / "photos.index"
    (tmp_path / "empty").mkdir()
    for arguments, code, message in (
        ([photos, "-o", index, "-m", opt_model], 1, "cannot compare images with texts"),
        ([photos, "-o", index, "--for", "ask", *matching], 1, "is a matching model"),
        ([photos, "-o", index, "--for", "ask", "--batch-size", 0], 2, "--batch-size is 0"),
        ([tmp_path / "empty", "-o", index], 1, "there are no images in this folder"),
        ([tmp_path / "missing", "-o", index], 1, "no such file or folder"),
        ([photos, "-o", tmp_path], 1, "is a folder"),
        ([photos, "-o", tmp_path / "missing" / "photos.index"], 1, "cannot be written"),
        ([photos, "-o", searched, "--for", "ask"], 1, "is an index to search, not to ask"),
        ([photos], 2, "--output"),
    ):
        result = run("index", *arguments)
        assert (result.exit_code, result.stdout) == (code, "")
        assert message in result.stderr and len(result.stderr.splitlines()) == 1
    assert not index.exists()


@pytest.mark.parametrize("kind", ["search", "ask"])
def test_what_is_found_of_a_picture_that_has_changed_is_told(run, photos, tmp_path, kind):
    """The index knows what was there before; under that name there is something else now."""
    index = tmp_path / "photos.index"
    assert run("index", photos, "-o", index, "--for", kind).exit_code == 0
    os.utime(photos / "picture002.png", ns=(1, 1))  # touched only
    (photos / "picture003.png").unlink()  # "they may be on another disk by then"
    tiny.picture(55, 44).save(photos / "picture001.png")
    options = {"search": ["two dogs", "--json"], "ask": ["is it red?", "--choices", "yes,no", "--json"]}[kind]
    result = run(kind, index, *options)
    assert (result.exit_code, len(result.stdout.splitlines())) == (1, 8)
    told = f"blip2: {photos / 'picture001.png'}: has changed since it was encoded; update the index"
    assert [line for line in result.stderr.splitlines() if "picture" in line] == [f"{told} with blip2 index"]
    assert run("index", photos, "-o", index).exit_code == 0
    result = run(kind, index, *options)
    assert (result.exit_code, len(result.stdout.splitlines()), result.stderr) == (0, 7, "")


def test_stopped_by_ctrl_c_it_says_how_to_go_on(matching_model, tmp_path):
    photos, index = tmp_path / "many", tmp_path / "photos.index"
    photos.mkdir()
    tiny.save_pictures(photos, 8)
    for number in range(3000):
        os.link(photos / "picture000.png", photos / f"copy{number}.png")
    command = [sys.executable, "-m", "blip2", "index", photos, "-o", index, "--model", matching_model]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    effective = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # also if pytest ignores it
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=effective) as run:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("photos.index.unfinished/*.part")) and time.monotonic() < deadline:
            time.sleep(0.01)
        run.send_signal(signal.SIGINT)
        _, told = run.communicate(timeout=60)
    assert run.returncode == 130
    assert told == f"blip2: stopped; finished work is kept beside {index}, and the same command resumes\n"
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert again.stderr == f"3,008 new, 0 changed, 0 gone; 3,008 images in {index}\n"


def test_index_takes_pictures_as_the_other_verbs_do(run, matching, photos, tmp_path):
    index, listed = tmp_path / "photos.index", tmp_path / "list.txt"
    (photos / "within").mkdir()
    (photos / "picture000.png").rename(photos / "within" / "picture000.png")
    (photos / "notes.txt").touch()
    listed.write_text(f"{photos}\n")
    result = run("index", "--files-from", listed, "--exclude", "*1.png", "-o", index, *matching)
    noted, told = result.stderr.splitlines()
    assert result.exit_code == 0 and noted == "blip2: skipped in folders: 1 other file (1 .txt)"
    assert told == f"7 new, 0 changed, 0 gone; 7 images in {index}"
    result = run("index", "--no-recursive", photos, "-o", index, *matching)
    assert result.stderr.endswith(f"1 new, 0 changed, 1 gone; 7 images in {index}\n")
    result = run("index", photos, "--max-pixels", 1, "-o", tmp_path / "other.index", *matching)
    assert result.exit_code == 1 and result.stderr.count("or raise --max-pixels") == 8
    assert run("index", "-o", index).stderr == "blip2: Missing argument 'PHOTOS...'. (see blip2 index --help)\n"


# ---- search ----


def test_names_are_found_as_plain_output_shows_them(run, matching, pictures, tmp_path):
    odd, index = tmp_path / "two\nlines.png", tmp_path / "photos.index"
    shutil.copy(pictures[0], odd)
    run("index", odd, "-o", index, *matching)
    assert run("search", index, "two dogs").stdout.endswith(r"two\nlines.png" + "\n")
    assert run("search", index, "two dogs", "-0").stdout.endswith(f"\t{odd}\0")


def test_search(run, searched, matching_model, pictures):
    hits = blip2.Index.open(searched).search(blip2.load(matching_model), "two dogs", 3)
    result = run("search", searched, "two dogs", "-k", 3)
    assert result.stdout == "".join(f"{hit.score:.4f}\t{hit.path}\n" for hit in hits)
    rows = [json.loads(line) for line in run("search", searched, "two dogs", "-k", 3, "--json").stdout.splitlines()]
    assert rows == [{"path": hit.path, "score": hit.score} for hit in hits]
    result = run("search", searched, "--image", pictures[5], "-k", 1)
    assert result.stdout == f"1.0000\t{pictures[5]}\n"


def test_search_reranked(run, searched, matching_model):
    hits = blip2.Index.open(searched).search(blip2.load(matching_model), "two dogs", 3, rerank=5)
    result = run("search", searched, "two dogs", "-k", 3, "--rerank", 5, "--json")
    for line, hit in zip(result.stdout.splitlines(), hits, strict=True):
        row = json.loads(line)
        assert row == {"path": hit.path, "score": pytest.approx(hit.score), "cosine": hit.cosine, "reranked": True}


def test_search_for_duplicates(run, matching, photos, tmp_path):
    shutil.copy(photos / "picture003.png", photos / "same.png")
    run("index", photos, "-o", tmp_path / "photos.index", *matching)
    result = run("search", tmp_path / "photos.index", "--duplicates", "1.0")
    assert result.stdout == f"1.0000\t1\t{photos / 'picture003.png'}\n1.0000\t1\t{photos / 'same.png'}\n"
    result = run("search", tmp_path / "photos.index", "--duplicates", "--json")  # the random model sees little else
    assert {json.loads(line)["group"] for line in result.stdout.splitlines()} == {1}


class Tags(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.images, self.scripts, self.links = [], 0, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.scripts += tag == "script"
        if tag == "img":
            self.images.append(dict(attributes))
        if tag == "a":
            self.links.append(dict(attributes)["href"])


def test_a_page_that_stands_alone(run, matching, photos, tmp_path):
    odd = photos / 'a&b"><script>alert(1)</script>'.replace("/", "_")
    odd = odd.with_name(odd.name + ".png")
    (photos / "picture000.png").rename(odd)
    index, page = tmp_path / "photos.index", tmp_path / "out.html"
    run("index", photos, "-o", index, *matching)
    (photos / "picture001.png").unlink()
    result = run("search", index, "<script>two dogs", "--html", page)
    assert result.exit_code == 1 and len(result.stdout.splitlines()) == 8
    assert "picture001.png: no such file" in result.stderr
    text = page.read_text("utf-8")
    tags = Tags(text)
    assert tags.scripts == 0 and "&lt;script&gt;two dogs" in text
    assert {image["alt"] for image in tags.images} == {path.name for path in photos.iterdir()}
    assert all(image["src"].startswith("data:image/jpeg;base64,") for image in tags.images)
    assert sorted(tags.links) == sorted(path.as_uri() for path in photos.iterdir())
    assert "http" not in text and "cannot be opened" in text


def test_search_that_cannot_be(run, searched, asked, opt_model, pictures, tmp_path):
    (tmp_path / "garbage.index").write_bytes(b"garbage")
    for arguments, code, message in (
        ([tmp_path / "missing.index", "two dogs"], 1, "no such index"),
        ([tmp_path, "two dogs"], 1, "is a folder"),
        ([tmp_path / "garbage.index", "two dogs"], 1, "not an index of images"),
        ([pictures[0], "two dogs"], 1, "not an index of images"),
        ([asked, "two dogs"], 1, "is an index to ask, not to search"),
        ([asked, "--duplicates"], 1, "is an index to ask, not to search"),
        ([searched, "two dogs", "-m", "miniature-itm"], 1, "cannot read its vectors"),
        ([searched, "two dogs", "-m", opt_model], 1, "cannot compare images with texts"),
        ([searched, ""], 2, "the text is empty"),
        ([searched, "two dogs " * 300], 2, "tokens"),
        ([searched, "two dogs", "-k", 0], 2, "-k is 0"),
        ([searched, "two dogs", "--rerank", -1], 2, "--rerank is -1"),
        ([searched, "--duplicates", 2], 2, "--duplicates is 2.0"),
        ([searched, "--duplicates", "-k", 3], 2, "leave out -k"),
        ([searched], 2, "give a TEXT"),
        ([searched, "two dogs", "--image", pictures[0]], 2, "give a TEXT"),
        ([searched, "--image", pictures[0], "--rerank", 3], 2, "give a TEXT"),
        ([searched, "--image", tmp_path / "missing.png"], 1, "no such file"),
        ([searched, "two dogs", "--html", tmp_path / "missing" / "out.html"], 1, "cannot be written"),
    ):
        result = run("search", *arguments)
        assert (result.exit_code, result.stdout) == (code, ""), arguments
        assert message in result.stderr and len(result.stderr.splitlines()) == 1


# ---- ask ----


def test_an_index_is_asked_without_the_pictures(run, opt_model, photos, tmp_path):
    index = tmp_path / "seen.index"
    options = ["--max-new-tokens", 6]
    on_pictures = run("ask", photos, "is it red?", "--model", opt_model, *options).stdout
    run("index", photos, "-o", index, "--for", "ask", "--model", opt_model)
    shutil.rmtree(photos)
    result = run("ask", index, "is it red?", *options)
    assert (result.exit_code, result.stdout, result.stderr) == (0, on_pictures, "")
    assert len(run("caption", index, *options).stdout.splitlines()) == 8


def test_each_line_of_an_index_has_its_picture_even_a_lone_one(run, opt_model, pictures, tmp_path):
    run("index", pictures[0], "-o", tmp_path / "one.index", "--for", "ask", "--model", opt_model)
    result = run("ask", tmp_path / "one.index", "is it red?", "--max-new-tokens", 6)
    assert result.stdout.startswith(f"{pictures[0]}\t")


def test_an_index_that_cannot_be_asked(run, searched, asked, pictures, tmp_path):
    (tmp_path / "garbage.index").write_bytes(b"garbage")
    for arguments, code, message in (
        ([searched, "is it red?"], 1, "is an index to search, not to ask"),
        ([tmp_path / "garbage.index", "is it red?"], 1, "not an index of images"),
        ([asked, pictures[0], "is it red?"], 2, "give it alone"),
        ([asked, "is it red?", "-m", "miniature"], 1, "cannot read its vectors"),
    ):
        result = run("ask", *arguments)
        assert (result.exit_code, result.stdout) == (code, "")
        assert message in result.stderr and len(result.stderr.splitlines()) == 1
    assert "use blip2 search" in run("match", searched, "two dogs").stderr
