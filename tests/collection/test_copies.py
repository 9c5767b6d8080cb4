"""`dedupe`: of equal images the model sees the first, and each record has words of its own place."""

import hashlib
import json

import pytest

from blip2.api.collect import captioning
from blip2.collection import run
from blip2.collection.copies import Copies, First
from blip2.collection.record import Record
from blip2.collection.request import Request, planned
from blip2.collection.run import Outcome
from blip2.errors import CollectionError, ImageError, OptionError
from tests.collection.test_engines import begin, noted
from tests.collection.written import jpeg

CONTENTS = "ABACBDAAEFAB" "BGHAGG"
"""Two units: each letter is a content."""
FIRST = [0, 1, 3, 5, 8, 9] + [12, 13, 14, 15]
"""Those that the model sees."""


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.setattr("blip2.collection.sources.files.UNIT_FILES", 12)
    return filled(tmp_path / "photos")


def filled(folder):
    folder.mkdir()
    for number, letter in enumerate(CONTENTS):
        (folder / f"{number:02}.png").write_bytes(b"bad" if letter == "D" else jpeg(ord(letter), "PNG"))
    return folder


class Model:
    """Says what it saw, and in which company."""

    def __init__(self, batch_size=3, stops_at=None):
        self.heard = []
        self._batch_size, self._stops_at = batch_size, stops_at

    def __call__(self, records):
        while batch := records.batch(self._batch_size):
            self.heard += [int(record.key[:2]) for record in batch]
            for record in batch:
                if self._stops_at == 0:
                    raise KeyboardInterrupt
                self._stops_at = None if self._stops_at is None else self._stops_at - 1
                with open(record.image, "rb") as file:
                    content = file.read()
                if content == b"bad":
                    yield ImageError(f"{record.name}: damaged")
                else:
                    seen = hashlib.sha256(content).hexdigest()[:6]
                    yield Outcome([f"{seen} with {batch[0].key[:2]}", "x"], [-0.5, -0.75], [3, 1])


def do(folder, model, **options):
    options = {"output": str(folder.parent / f"{folder.name}.jsonl"), "format": "jsonl", "dedupe": True, **options}
    with planned(Request.of([str(folder)], options)).begun() as job:
        return run(job, model)


def rows(folder):
    return [json.loads(line) for line in (folder.parent / f"{folder.name}.jsonl").read_text().splitlines()]


def test_the_first_is_seen_and_each_has_its_words(photos):
    model = Model()
    summary = do(photos, model, template="{name}: {caption}")
    assert model.heard == FIRST
    found = rows(photos)
    assert [row["key"] for row in found] == [f"{number:02}.png" for number in range(18)]
    said = {}
    for number, row in enumerate(found):
        of = (number // 12, CONTENTS[number])
        name, _, words = row["caption"].partition(": ")
        if CONTENTS[number] == "D":
            assert row["status"] == "failed"
            continue
        assert name == f"{number:02}" and row["scores"] == [-0.5, -0.75] and row["sha256"]
        assert said.setdefault(of, words) == words
    assert (summary.done, summary.failed, summary.copies, summary.repeated) == (17, 1, 8, 0)


def test_a_copy_of_what_cannot_be_read_fails_by_its_own_name(photos):
    (photos / "06.png").write_bytes(b"bad")
    summary = do(photos, Model())
    assert (summary.failed, summary.copies) == (2, 8)
    assert [row["error_message"] for row in rows(photos) if row["status"] == "failed"] == [
        f"{photos}/05.png: damaged", f"{photos}/06.png: damaged",
    ]  # fmt: skip
    again = Model()
    do(photos, again, retry_failed=True)
    assert again.heard == [5]


@pytest.mark.parametrize("stops_at", range(10))
def test_stopped_anywhere_it_writes_the_same(photos, tmp_path, stops_at):
    (tmp_path / "u").mkdir()
    other = filled(tmp_path / "u" / "photos")
    do(other, Model(), sidecar=".txt")
    with pytest.raises(KeyboardInterrupt):
        do(photos, Model(stops_at=stops_at), sidecar=".txt")
    do(photos, Model(), sidecar=".txt", limit=1)
    do(photos, Model(), sidecar=".txt")
    assert do(photos, Model(stops_at=0), sidecar=".txt").before == 18
    undisturbed, stopped = (
        {path.name: path.read_text().replace(str(folder.parent), "") for path in folder.glob("*.txt")}
        for folder in (other, photos)
    )
    assert stopped == undisturbed and len(stopped) == 17
    assert (photos.parent / "photos.jsonl").read_text() == (other.parent / "photos.jsonl").read_text().replace(
        str(other.parent), str(photos.parent)
    )


def test_parts_write_the_same(photos, tmp_path):
    (tmp_path / "u").mkdir()
    other = filled(tmp_path / "u" / "photos")
    do(other, Model())
    for number in (2, 1):
        do(photos, Model(), shard=(number, 2))
    assert [row["caption"] for row in rows(photos)] == [row["caption"] for row in rows(other)]


def test_workers_write_the_same(photos, tmp_path):
    (tmp_path / "u").mkdir()
    for folder, machines in ((photos, {}), (filled(tmp_path / "u" / "photos"), {"devices": "cpu,cpu"})):
        options = {"output": str(folder.parent / "photos.csv"), "dedupe": True}
        begin(folder.parent, folder, options, machines).run()
        assert len(noted(folder.parent)) == 10
    assert (tmp_path / "u" / "photos.csv").read_bytes() == (tmp_path / "photos.csv").read_bytes()
    assert "photos/02.png,a 00.png" in (tmp_path / "photos.csv").read_text()


def test_a_picture_that_has_a_text_says_nothing_of_its_copies(photos):
    (photos / "00.txt").write_text("by hand")
    model = Model()
    do(photos, model, sidecar=".txt")
    assert model.heard == [1, 2, *FIRST[2:]]
    assert (photos / "00.txt").read_text() == "by hand" and "by hand" not in (photos / "02.txt").read_text()


def test_without_it_all_are_seen_and_another_command_is_told(photos):
    model = Model()
    do(photos, model, dedupe=False)
    assert model.heard == [*range(18)]
    with pytest.raises(CollectionError, match="dedupe was not given and is true"):
        do(photos, Model())


def record(picture, asked=""):
    return Record("k", picture, "n", "", asked=asked)


def test_what_is_equal(tmp_path, monkeypatch):
    for name, content in {"a": b"1234", "b": b"12345", "c": b"4321", "d": b"1234"}.items():
        (tmp_path / name).write_bytes(content)
    a, b, c, d = (str(tmp_path / name) for name in "abcd")
    copies, pictures = Copies(), []

    def place(*given):
        """Of the first that it equals."""
        pictures.append(First())
        return pictures.index(copies.first(record(*given), pictures[-1]))

    with monkeypatch.context() as changed:
        changed.setattr("builtins.open", None)  # no file is read whose size is its own
        assert [place(a), place(b), place(b)] == [0, 1, 1]
    assert [place(c), place(d), place(a), place(a, "how many?"), place(d, "how many?")] == [3, 0, 0, 6, 6]
    assert [place(b"1234"), place(b"1234"), place("-"), place("-")] == [0, 0, 10, 11]
    address = "https://example.org/a.png"
    assert [place(address), place(address), place(f"{address}?2"), place("gone.png")] == [12, 12, 14, 15]


def test_what_is_sampled_needs_a_seed(photos):
    options = {"output": str(photos.parent / "all.jsonl"), "dedupe": True, "sample": True, "num_beams": 1}
    with pytest.raises(OptionError, match="sampling without a seed differs each time; give seed, or leave out"):
        captioning(photos, **options)
    assert captioning(photos, seed=3, **options)
