"""A folder gives all its images; nothing in it stops the others, is waited for, or is passed over without a word."""

from __future__ import annotations

import os
import socket

import pytest

from blip2.data import folders
from blip2.data.folders import find_in


@pytest.fixture
def place(tmp_path):
    """``place("a.png", "within/b.jpg")`` makes empty files."""

    def make(*names: str) -> str:
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        return str(tmp_path)

    return make


def names_of(found: folders.Found, top: str) -> list[str]:
    return [os.path.relpath(path, top) for path in found.images]


def test_all_suffixes_and_all_folders_within(place):
    names = ["a.JPG", "b.jpe", "c.jfif", "d.tif", "e.TIFF", "f.avif", "g.dib", "h.apng", "within/deep/i.webp", "j.heic"]
    top = place(*names)
    found = find_in([top])
    assert names_of(found, top) == sorted(names)
    assert found.is_complete and found.skipped_files() == ""
    assert names_of(find_in([top], recursive=False), top) == sorted(set(names) - {"within/deep/i.webp"})


def test_what_is_no_picture_is_counted_in_one_line(place):
    top = place("a.png", "b.txt", "c.TXT", "notes", "d.mov", "within/e.json", ".hidden.png", ".git/x.png", ".DS_Store")
    os.symlink(top, os.path.join(top, "circle"))
    found = find_in([top])
    assert names_of(found, top) == ["a.png"]
    assert found.is_complete
    told = found.skipped_files()
    assert told.startswith("skipped in folders: 5 other files (2 .txt, ") and told.endswith("), 1 linked folder")
    assert "1 without a suffix" in told and "\n" not in told


def test_pictures_that_this_installation_cannot_read_are_counted_with_the_remedy(place, monkeypatch):
    monkeypatch.setattr(folders, "suffixes", lambda: (frozenset({".png"}), {".heic": "pip install pillow-heif"}))
    found = find_in([place("a.png", "b.heic", "within/c.HEIC")])
    assert found.skipped_files() == "skipped in folders: 2 images (pip install pillow-heif reads them)"
    assert not found.is_complete
    assert find_in([place() + "/within"]).problems == []  # there are images in it


def test_what_should_be_a_picture_and_is_none_is_named_and_not_opened(place, monkeypatch):
    top = place("a.png")
    os.mkfifo(os.path.join(top, "pipe.png"))
    os.symlink("nowhere.png", os.path.join(top, "gone.png"))
    os.symlink("self.png", os.path.join(top, "self.png"))
    os.symlink("a.png", os.path.join(top, "link.png"))
    with socket.socket(socket.AF_UNIX) as bound:
        monkeypatch.chdir(top)  # names of sockets are short
        bound.bind("socket.png")
        found = find_in([top])
    assert names_of(found, top) == ["a.png", "link.png"]
    told = {os.path.basename(problem.split(": ")[0]): problem for problem in found.problems}
    assert told.keys() == {"pipe.png", "gone.png", "self.png", "socket.png"}
    assert "it was not opened" in told["pipe.png"] and "a broken link" in told["gone.png"]


def test_a_folder_that_cannot_be_read_is_named_and_the_others_are_read(place, monkeypatch):
    top = place("a.png", "lost+found/b.png", "z/c.png")
    scandir = os.scandir

    def refusing(path):
        if os.path.basename(path) == "lost+found":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    found = find_in([top])
    assert names_of(found, top) == ["a.png", "z/c.png"]
    problem = "this folder cannot be read (Permission denied); check its permissions"
    assert found.problems == [f"{top}/lost+found: {problem}"]
    assert found.unknown == [f"{top}/lost+found"]
    assert find_in([top], exclude=["lost+found"]).is_complete


def test_what_is_excluded(place):
    top = place("a.png", "b.gif", "trash/c.png", "trash/within/d.png", "e/trash.png")
    for patterns, left in (
        (["trash"], ["a.png", "b.gif", "e/trash.png"]),
        (["*.gif", "e"], ["a.png", "trash/c.png", "trash/within/d.png"]),
        (["trash/within"], ["a.png", "b.gif", "e/trash.png", "trash/c.png"]),
    ):
        assert names_of(find_in([top], exclude=patterns), top) == left


def test_places_in_order_and_folders_without_pictures(place, tmp_path):
    top = place("full/a.png", "full/b.png", "empty/notes.txt")
    found = find_in(["x.png", f"{top}/full", f"{top}/empty", "https://example.org/y.png"])
    assert found.images == ["x.png", f"{top}/full/a.png", f"{top}/full/b.png", "https://example.org/y.png"]
    assert found.problems == [f"{top}/empty: there are no images in this folder"]
    assert found.unknown == [f"{top}/empty"]


def test_a_deep_tree(tmp_path):
    deep = tmp_path
    for _ in range(400):  # as deep as names may be long
        deep = deep / "d"
    deep.mkdir(parents=True)
    (deep / "a.png").touch()
    assert find_in([str(tmp_path)]).images == [str(deep / "a.png")]
