"""Text files beside images: as trainers read them, and never one for two images."""

import os
import unicodedata
from pathlib import Path

import pytest

from blip2.collection.sinks import Outputs
from blip2.collection.sinks.places import check_beside
from blip2.collection.sinks.sidecar import Sidecars
from blip2.errors import CollectionError, OptionError
from tests.collection.written_by_run import captioned, drawn, said_twice


def trainers_caption(picture: str, extension: str) -> str:
    """The rules of kohya's trainer: UTF-8 and nothing else, not empty, and the first line is the caption."""
    lines = Path(os.path.splitext(picture)[0] + extension).read_bytes().decode("utf-8", "strict").splitlines()
    assert lines, "the trainer stops at an empty file"
    return lines[0].strip()


def test_a_trainer_reads_them(tmp_path):
    paths = drawn(tmp_path / "10_sks dog", "a.jpg", "b.c.png", "\u043a\u043e\u0442.webp")
    raw = os.fsdecode(bytes(tmp_path / "10_sks dog") + b"/\xff.jpg")
    os.link(paths[0], raw)
    captioned([*paths, raw], Outputs(sidecar="caption"), template="{concept}, {caption}")
    assert [trainers_caption(path, ".caption") for path in [*paths, raw]] == [
        "sks dog, a a.jpg", "sks dog, a b.c.png", "sks dog, a \u043a\u043e\u0442.webp", "sks dog, a \ufffd.jpg",
    ]  # fmt: skip
    assert (tmp_path / "10_sks dog" / "b.c.caption").read_bytes() == b"sks dog, a b.c.png\n"


def test_nothing_stays_of_a_run_that_was_killed(tmp_path):
    paths = drawn(tmp_path / "in", "a.jpg")
    (tmp_path / "in" / ".a.txt.part").write_text("half a capt")
    (tmp_path / "in" / ".all.csv.part").write_text("half a ta")
    captioned(paths, Outputs(sidecar=".txt", output=str(tmp_path / "in" / "all.csv")), journal=tmp_path / "journal")
    assert sorted(path.name for path in (tmp_path / "in").iterdir()) == ["a.jpg", "a.txt", "all.csv"]


def test_several_captions_are_several_lines(tmp_path):
    captioned(drawn(tmp_path, "a.jpg"), Outputs(sidecar=".txt"), said_twice)
    assert (tmp_path / "a.txt").read_text() == "a a.jpg\ntwo\n"


@pytest.mark.parametrize(
    ("if_exists", "text"),
    [
        ("skip", "mine\n\n of two lines"),
        ("overwrite", "a a.jpg\n"),
        ("append", "mine, a a.jpg\nof two lines, a a.jpg\n"),
        ("prepend", "a a.jpg, mine\na a.jpg, of two lines\n"),
    ],
)
def test_if_exists(tmp_path, if_exists, text):
    paths = drawn(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    (tmp_path / "a.txt").write_text("mine\n\n of two lines")
    (tmp_path / "b.txt").write_text(" \n")  # empty is missing
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\xfa")  # no text: a person has to look at it
    for _ in range(2):
        captioned(paths, Outputs(sidecar=".txt"), if_exists=if_exists, journal=tmp_path / ".blip2")
        assert (tmp_path / "a.txt").read_text() == text
        assert (tmp_path / "b.txt").read_text() == "a b.jpg\n"
        assert (tmp_path / "c.txt").read_bytes() == b"\xff\xfe\xfa"


def test_pictures_of_one_name(tmp_path):
    paths = drawn(tmp_path, "a.jpg", "a.png", "b.jpg")
    with pytest.raises(CollectionError) as caught:
        captioned(paths, Outputs(sidecar=".txt"))
    for told in ("a.txt", "a.jpg", "a.png", "--sidecar-name full"):
        assert told in str(caught.value)
    captioned(paths, Outputs(sidecar=".txt", sidecar_name="full"))
    assert sorted(path.name for path in tmp_path.glob("*.txt")) == ["a.jpg.txt", "a.png.txt", "b.jpg.txt"]
    # A second run sees what it wrote under these names.
    captioned(paths, Outputs(sidecar=".txt", sidecar_name="full"), lambda record: 1 / 0, journal=tmp_path / "other")


@pytest.mark.parametrize(
    ("one", "other"),
    [("a.jpg", "A.png"), (unicodedata.normalize("NFC", "\xe9.jpg"), unicodedata.normalize("NFD", "\xe9.png"))],
)
def test_spellings_that_a_file_system_takes_for_one(tmp_path, one, other, monkeypatch):
    paths = drawn(tmp_path, one, other)
    Sidecars(".txt").check(type("Source", (), {"images": paths})())  # this one tells them apart
    monkeypatch.setattr("blip2.collection.sinks.places._is_blind", lambda picture: True)
    with pytest.raises(CollectionError, match="--sidecar-name full"):
        Sidecars(".txt").check(type("Source", (), {"images": paths})())


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    paths = drawn(tmp_path / "photos", "a.jpg")
    monkeypatch.setattr("os.access", lambda place, mode: Path(place) != tmp_path / "photos")  # as root may write all
    with pytest.raises(CollectionError, match="photos: is not writable"):
        captioned(paths, Outputs(sidecar=".txt"), lambda record: 1 / 0)


def test_a_disk_that_becomes_full_loses_nothing(tmp_path, monkeypatch):
    paths = drawn(tmp_path, *(f"{n:02}.jpg" for n in range(40)))
    written, seen = Sidecars.some, []

    def full(self, results):
        if "20.jpg" in [result.key for result in results]:
            raise OSError(28, "No space left on device")
        written(self, results)

    def work(record):
        seen.append(record.key)
        from blip2.collection.run import Outcome

        return Outcome(["x"], [0.0], [1])

    with monkeypatch.context() as patched:
        patched.setattr(Sidecars, "some", full)
        with pytest.raises(OSError, match="No space"):
            captioned(paths, Outputs(sidecar=".txt"), work, journal=tmp_path / ".blip2")
    captioned(paths, Outputs(sidecar=".txt"), work, journal=tmp_path / ".blip2")
    assert sorted(seen) == sorted({*seen}) and len(seen) == 40
    assert len([*tmp_path.glob("*.txt")]) == 40


@pytest.mark.parametrize("suffix", [".jpg", "PNG", ".", "../x", ".a\n"])
def test_suffixes_that_are_none(suffix):
    with pytest.raises(OptionError, match=r"give \.txt"):
        Sidecars(suffix)


def test_a_name_that_is_too_long(tmp_path):
    with pytest.raises(CollectionError, match="249 bytes"):
        check_beside([str(tmp_path / ("x" * 251 + ".jpg"))], Sidecars(".txt", keeps_suffix=True).path, "")
