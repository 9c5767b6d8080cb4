"""Collections as training data: what is read of each, in which order, and how a run goes on in the middle of one."""

import io
import json
import os
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from blip2.data import Row, Turn, read_rows
from blip2.data.joined import Joined
from blip2.data.positions import RECORD
from blip2.errors import ImageError, RecipeError
from blip2.train.recipes import SourceRecipe
from blip2.train.sources import open_sources
from tests.collection.written import jpeg, sample, shards, tar

KINDS = ["captions", "questions", "dialogues"]


@pytest.fixture
def opened(tmp_path):
    """``opened(source, ...)`` gives rows, and what was told."""

    def open_it(*sources, kinds=KINDS, **fields):
        told = []
        recipes = [SourceRecipe((str(source),), **fields) for source in sources]
        rows = open_sources(recipes, tmp_path, keep=tmp_path / "kept", kinds=kinds, tell=told.append)
        return rows, told

    return open_it


def test_samples_are_read_from_where_they_lie(opened, tmp_path):
    shards(tmp_path / "s", [3, 4])
    rows, told = opened("s/{00000..00001}.tar")
    assert isinstance(rows, Joined) and len(rows) == 7
    assert [rows[number].captions for number in (6, 0, 3)] == [("dog 6",), ("dog 0",), ("dog 3",)]
    assert all(np.array_equal(rows.image(number), _decoded(number)) for number in (5, 2))
    assert told == [f"{tmp_path}/s/{{00000..00001}}.tar: 7 rows"]
    rows, told = opened("s/{00000..00001}.tar")
    assert len(rows) == 7 and told == []  # found before


def _decoded(number):
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(jpeg(number))))


def test_a_folder_of_shards_and_a_changed_one(opened, tmp_path):
    """Another shard, or another content, is looked at again; nothing else is."""
    shards(tmp_path / "s", [2])
    assert len(opened("s")[0]) == 2
    shards(tmp_path / "s", [2, 2])
    assert len(opened("s")[0]) == 4
    before = os.stat(tmp_path / "s" / "00000.tar")
    tar(tmp_path / "s" / "00000.tar", dict(sample(7, txt="cat 7") + sample(8, txt="cat 8")))
    os.utime(tmp_path / "s" / "00000.tar", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert before.st_size == os.stat(tmp_path / "s" / "00000.tar").st_size
    rows, told = opened("s")
    assert rows[0].captions == ("cat 7",) and len(told) == 1


@pytest.mark.parametrize(
    ("fields", "columns", "row"),
    [
        ({"txt": "a dog"}, {}, Row("", ("a dog",))),
        ({"txt": "a dog", "json": '{"caption": "a dog", "url": "x"}'}, {}, Row("", ("a dog",))),
        ({"json": '{"top_caption": "a", "all_captions": ["b", "c"]}'}, {"text": "all_captions"}, Row("", ("b", "c"))),
        ({"txt": "a", "json": '{"q": "who?", "a": "me"}'}, {"question": "q", "answer": "a"},
         Row("", ("a",), (Turn("who?", "me"),))),
        ({"json": '{"q": "who?", "a": ["me", "me", "you"]}'}, {"question": "q", "answer": "a"},
         Row("", (), (Turn("who?", "me", (("me", 2), ("you", 1))),))),
        ({"json": '{"questions": [{"question": "who?", "answer": "me"}], "captions": ["a"]}'}, {},
         Row("", ("a",), (Turn("who?", "me"),))),
    ],
)  # fmt: skip
def test_texts_of_a_sample(opened, tmp_path, fields, columns, row):
    tar(tmp_path / "a.tar", dict(sample(1, **fields)))
    rows, _ = opened("a.tar", **columns)
    found = rows[0]
    assert (found.captions, found.questions, found.dialogues) == (row.captions, row.questions, row.dialogues)
    assert found.image == f"{tmp_path}/a.tar: 000001" and found.content is None


def test_what_cannot_be_learnt_is_left_out_and_counted(opened, tmp_path):
    members = [*sample(1, txt="a"), *sample(2), *sample(3, json='{"caption": 3}'), ("000004.txt", b"b")]
    members += [*sample(5, json="{"), *sample(6, json='{"captions": ["c", 7]}')]
    tar(tmp_path / "a.tar", dict(members))
    rows, [told] = opened("a.tar")
    assert [rows[number].captions for number in range(len(rows))] == [("a",)]
    place = f"{tmp_path}/a.tar"
    first = f"{place}: 1 rows; left out: 1, it has no text of the kind, the first is {place}: 000002; left "
    assert told.startswith(first)
    assert "left out: 2, cannot be read, the first is " in told and "has no image, but txt" in told
    assert "left out: 2, its texts cannot be used, the first is " in told
    with pytest.raises(RecipeError, match=r"no rows to train on \(.*needed are dialogues, see data.sources text"):
        opened("a.tar", kinds=["dialogues"])


def test_a_damaged_shard_loses_what_comes_after(opened, tmp_path):
    shards(tmp_path / "s", [3])
    path = tmp_path / "s" / "00000.tar"
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        content[archive.getmembers()[4].offset] ^= 0xFF
    path.write_bytes(content)
    rows, [told] = opened("s")
    assert len(rows) == 1 and "left out: 2, cannot be read, the first is " in told
    assert "download or pack it again" in told


def test_what_changes_while_it_is_read_is_a_bad_picture(opened, tmp_path):
    shards(tmp_path / "s", [3])
    rows, _ = opened("s")
    with (tmp_path / "s" / "00000.tar").open("r+b") as file:
        file.write(b"x" * 20_000)
    with pytest.raises(ImageError, match=r"00000\.tar"):
        rows.image(0)
    assert rows[0].captions == () and "00000.tar" in rows[0].image


def test_positions_that_are_damaged(opened, tmp_path):
    """Told where they are used; where their end is, they are found again."""
    shards(tmp_path / "s", [3])
    opened("s")
    [path] = (tmp_path / "kept").glob("*.positions")
    content = bytearray(path.read_bytes())
    content[RECORD.itemsize + 3] ^= 1
    path.write_bytes(content)
    rows, _ = opened("s")
    assert rows[0].captions == ("dog 0",)
    with pytest.raises(RecipeError, match=r"is damaged .* delete it and start again"):
        rows[1]
    path.write_bytes(content[:-9])
    rows, told = opened("s")
    assert rows[1].captions == ("dog 1",) and len(told) == 1


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda folder: None, "s.tar: no such file"),
        (lambda folder: (folder / "s.tar").write_bytes(b"junk"), "s.tar: cannot be read as a tar file"),
        (lambda folder: tarfile.open(folder / "s.tar", "w:gz").close(), "s.tar"),
    ],
)
def test_what_is_no_collection(opened, tmp_path, make, problem):
    make(tmp_path)
    with pytest.raises(RecipeError) as raised:
        opened("s.tar")
    assert problem in str(raised.value) and "\n" not in str(raised.value)


def test_packed_shards_are_to_be_unpacked(opened, tmp_path):
    with tarfile.open(tmp_path / "s.tar.gz", "w:gz") as archive:
        for name, content in sample(1, txt="a"):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    with pytest.raises(RecipeError, match="is compressed, so its middle cannot be read; decompress it"):
        opened("s.tar.gz")


def test_parquet(opened, tmp_path):
    table = {"image": [{"bytes": jpeg(n), "path": None} for n in range(9)], "caption": [f"dog {n}" for n in range(9)]}
    pyarrow.parquet.write_table(pa.table(table), tmp_path / "a.parquet", row_group_size=4)
    rows, _ = opened("a.parquet")
    assert [rows[number].captions[0] for number in (8, 1, 5, 2)] == ["dog 8", "dog 1", "dog 5", "dog 2"]
    assert np.array_equal(rows.image(7), _decoded(7))


def test_json_lines_are_not_in_memory_and_say_the_same(opened, tmp_path, rows):
    found, _ = opened(rows)
    assert isinstance(found, Joined)
    expected = read_rows([rows])
    assert [found[number] for number in range(len(found))] == expected
    with rows.open("a") as file:
        file.write('\n{"image": "absent.png", "caption": "a"}\n')
    found, [told] = opened(rows)
    assert len(found) == len(expected) and f"{rows}:10: " in told and "its image does not exist" in told
    with rows.open("a") as file:
        file.write("{\n")
    with pytest.raises(RecipeError, match=r"rows\.jsonl:11: is not JSON"):
        opened(rows)


def test_folders_and_rows_of_other_tools_are_lists(opened, tmp_path, pictures):
    """Whose rows are in memory."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
    (folder / "metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": f"{number}.jpg", "text": f"dog {number}"}) + "\n" for number in range(2))
    )
    rows, [told] = opened("photos")
    assert rows == [Row(str(folder / f"{number}.jpg"), (f"dog {number}",)) for number in range(2)]
    assert "left out: 1, it has no text of the kind" in told
    (folder / "2.txt").write_text("dog 2\n")  # as other trainers have them
    rows, told = opened("photos")
    assert [row.captions for row in rows] == [("dog 0",), ("dog 1",), ("dog 2",)] and told[0].endswith(": 3 rows")
    (tmp_path / "web.csv").write_text("url,caption\nhttps://a.b/c.jpg,a dog\n")
    with pytest.raises(RecipeError, match="its image is a URL, which has to be downloaded first"):
        opened("web.csv")
    coco = {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 1, "caption": c} for c in "ab"]}
    (folder / "coco.json").write_text(json.dumps(coco))
    rows, _ = opened("photos/coco.json")
    assert rows == [Row(str(folder / "1.jpg"), ("a", "b"))]


def test_samples_whose_members_do_not_stand_side_by_side(opened, tmp_path):
    """Also in a later shard than the first."""
    shards(tmp_path / "s", [2])
    members = sample(1, txt="a") + sample(2, txt="b")
    tar(tmp_path / "s" / "00001.tar", dict(members[i] for i in (0, 2, 1, 3)))
    with pytest.raises(RecipeError, match=r"00001\.tar: the members of '000001' are not adjacent"):
        opened("s")


def test_a_source_that_cannot_be_read_is_named_and_not_the_place_of_its_positions(opened, tmp_path, monkeypatch):
    shards(tmp_path / "s", [2])

    def broken(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("blip2.collection.sources.shards.tarball.is_packed", broken)
    with pytest.raises(RecipeError, match=r"data\.sources: .*/s: cannot be read \(Input/output error\); check it"):
        opened("s")
