"""Folders, lists, patterns, and what was said of their images before."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import unicodedata

import pytest

from blip2.collection.sources import open_source
from blip2.errors import CollectionError, OptionError
from tests.collection.written import jpeg, pictures, records, tar, told


def test_a_folder_with_sidecars(tmp_path):
    pictures(tmp_path, ["b/2.jpg", "1.jpg", "a.b.png", "3.jpg", "4.jpg", "5.jpg"])
    (tmp_path / "1.txt").write_text(" one\n line \n", "utf-8-sig")
    (tmp_path / "a.b.txt").write_text("dots")
    (tmp_path / "3.txt").write_text(" \n")
    (tmp_path / "4.txt").write_bytes(b"\xff\xfe\xfd")
    (tmp_path / "5.txt").mkdir()
    (tmp_path / "b/2.jpg.txt").write_text("whole name")
    found = told(open_source([str(tmp_path)], caption_suffix=".txt"))
    assert found.pop("4.jpg").startswith(f"!{tmp_path}/4.txt: cannot be read (is not UTF-16 text")
    assert found.pop("5.jpg").startswith(f"!{tmp_path}/5.txt: cannot be read (Is a directory); fix or remove it")
    assert found == {"1.jpg": "one line", "3.jpg": "", "a.b.png": "dots", "b/2.jpg": ""}
    found = told(open_source([str(tmp_path)], caption_suffix=".txt", keeps_suffix=True))
    assert found["b/2.jpg"] == "whole name"
    assert set(told(open_source([str(tmp_path)])).values()) == {""}
    assert told(open_source([str(tmp_path)], caption_suffix="txt"))["a.b.png"] == "dots"
    for suffix in ("/x", ".", "..", "a/b", "\0"):
        with pytest.raises(OptionError, match="caption_suffix"):
            open_source([str(tmp_path)], caption_suffix=suffix)


def test_several_places_have_keys_of_their_own(tmp_path):
    pictures(tmp_path, ["x/a.jpg", "y/a.jpg", "z/a.jpg"])
    source = open_source([str(tmp_path / "x"), f"{tmp_path}/y/", str(tmp_path / "z/a.jpg"), f"{tmp_path}/x/./a.jpg"])
    assert list(told(source)) == ["x/a.jpg", "y/a.jpg", "z/a.jpg"]


def test_a_list_keeps_order_and_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path, ["b.jpg", "a.jpg"])
    source = open_source(["b.jpg", "absent.jpg", "a.jpg", "https://example.org/x.jpg"])
    assert list(told(source)) == ["b.jpg", "absent.jpg", "a.jpg", "https://example.org/x.jpg"]
    assert [record.image for record in records(source)] == list(told(source))


def test_patterns(tmp_path):
    pictures(tmp_path, ["x/a.jpg", "x/b.png", "y/[1].jpg", "y/deep/c.jpg"])
    (tmp_path / "x/a.txt").write_text("a")

    def keys(pattern):
        return [os.path.relpath(key, tmp_path) for key in told(open_source([f"{tmp_path}/{pattern}"]))]

    assert keys("x/*") == ["x/a.jpg", "x/b.png"]
    assert keys("**/*.jpg") == ["x/a.jpg", "y/[1].jpg", "y/deep/c.jpg"]
    assert keys("{y,x}/*.jpg") == ["y/[1].jpg", "x/a.jpg"]
    assert keys("y/[1].jpg") == ["y/[1].jpg"]  # a file of that name
    everything = ["x/a.jpg", "x/b.png", "y/[1].jpg", "y/deep/c.jpg"]
    assert [*told(open_source([f"{tmp_path}/*"]))] == everything  # folders that fit are looked into
    assert [*told(open_source([f"{tmp_path}/y/*"]))] == ["[1].jpg", "deep/c.jpg"]
    with pytest.raises(CollectionError, match="matches no file"):
        keys("*.gif")


def test_what_is_left_out(tmp_path):
    pictures(tmp_path, ["a.jpg", "b/a.jpg", "thumbs/a.jpg"])
    (tmp_path / "notes.txt").write_text("x")
    source = open_source([str(tmp_path)], exclude=["thumbs"])
    assert list(told(source)) == ["a.jpg", "b/a.jpg"]
    assert "1 .txt" in source.skipped_files()
    assert list(told(open_source([str(tmp_path)], recursive=False))) == ["a.jpg"]


def test_nothing_there(tmp_path):
    with pytest.raises(CollectionError, match="there are no images in this folder"):
        open_source([str(tmp_path)])
    with pytest.raises(CollectionError, match="there is nothing to read"):
        open_source([])


def test_kinds_are_not_mixed(tmp_path):
    pictures(tmp_path, ["a.jpg"])
    (tmp_path / "rows.csv").write_text("image\na.jpg\n")
    with pytest.raises(CollectionError, match=r"a.jpg \(images\) .*rows.csv \(rows\) cannot be read together"):
        open_source([str(tmp_path / "a.jpg"), str(tmp_path / "rows.csv")])


def test_names_that_are_no_text(tmp_path):
    name = os.fsdecode(b"\xff\xe9.jpg")
    pictures(tmp_path, [name])
    (tmp_path / os.fsdecode(b"\xff\xe9.txt")).write_text("old")
    assert told(open_source([str(tmp_path)], caption_suffix=".txt")) == {name: "old"}


def test_accents_of_macos_and_of_others_are_two_files(tmp_path):
    both = [unicodedata.normalize(form, "é.jpg") for form in ("NFC", "NFD")]
    pictures(tmp_path, both)
    assert sorted(told(open_source([str(tmp_path)]))) == sorted(both)


def test_links_and_a_folder_that_cannot_be_written(tmp_path):
    pictures(tmp_path, ["a.jpg"])
    (tmp_path / "b.jpg").symlink_to("a.jpg")
    (tmp_path / "gone.jpg").symlink_to("nowhere")
    tmp_path.chmod(0o555)
    try:
        source = open_source([str(tmp_path)])
        assert list(told(source)) == ["a.jpg", "b.jpg"]
        assert "a broken link" in source.problems[0]
    finally:
        tmp_path.chmod(0o755)


# ---- img2dataset's files ----


def test_img2dataset_files(tmp_path):
    for number in range(2):
        stem = tmp_path / f"00000/{number:09}"
        pictures(tmp_path, [f"00000/{number:09}.jpg"])
        stem.with_suffix(".txt").write_text(["", "a dog"][number])
        stem.with_suffix(".json").write_text(json.dumps({"key": f"{number:09}", "url": "http://x/", "width": 8}))
    (tmp_path / "00000.parquet").write_bytes(b"PAR1")
    (tmp_path / "00000_stats.json").write_text("{}")
    first, second = records(open_source([str(tmp_path)]))
    assert (first.key, first.text, second.text) == ("00000/000000000.jpg", "", "a dog")
    assert second.columns == {"key": "000000001", "url": "http://x/", "width": 8}
    (tmp_path / "00000/000000001.json").write_text("{")
    assert "is not JSON" in records(open_source([str(tmp_path)]))[1].problem


# ---- ImageFolder ----


def test_imagefolder_as_datasets_reads_it(tmp_path):
    import datasets

    pictures(tmp_path / "d", ["a.jpg", "sub/b.jpg", "sub/c.jpg"])
    (tmp_path / "d/metadata.jsonl").write_text(
        '{"file_name": "a.jpg", "text": "one", "n": 1}\n{"file_name": "sub/b.jpg", "text": "two", "n": 2}\n'
    )
    loaded = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "d"), cache_dir=str(tmp_path / "cache"))
    found = records(open_source([str(tmp_path / "d")]))
    assert [(record.text, record.columns["n"]) for record in found if record.columns] == [
        (row["text"], row["n"]) for row in loaded["train"]
    ]
    assert [record.key for record in found] == ["a.jpg", "sub/b.jpg", "sub/c.jpg"]  # those without a row too


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_imagefolder_metadata_at_any_depth(tmp_path, suffix):
    import pandas

    pictures(tmp_path, ["a.jpg", "sub/b.jpg"])
    for place, name in ((tmp_path, "a.jpg"), (tmp_path / "sub", "b.jpg")):
        rows = pandas.DataFrame({"file_name": [name, f"no-{name}"], "text": ["None", "lost"]})
        if suffix == "jsonl":
            rows.to_json(place / "metadata.jsonl", orient="records", lines=True)
        else:
            getattr(rows, f"to_{suffix}")(place / f"metadata.{suffix}", index=False)
    source = open_source([str(tmp_path)])
    assert told(source) == {"a.jpg": "None", "sub/b.jpg": "None"}
    assert [line.split(": ")[1] for line in source.problems] == [
        f"{tmp_path}/no-a.jpg is missing; restore it, or remove the row",
        f"{tmp_path}/sub/no-b.jpg is missing; restore it, or remove the row",
    ]
    assert open_source([str(tmp_path)], exclude=["b.jpg", "metadata.*"]).problems == []
    assert len(open_source([str(tmp_path)], exclude=["b.jpg"]).problems) == 2


def test_imagefolder_rules(tmp_path):
    pictures(tmp_path / "d", ["a.jpg"])
    pictures(tmp_path, ["out.jpg"])
    lines = ['{"file_name": "../out.jpg"}', f'{{"file_name": "{tmp_path}/out.jpg"}}', '{"file_name": "http://a/b.jpg"}',
             '{"text": "x"}', "rubbish"]  # fmt: skip
    (tmp_path / "d/metadata.jsonl").write_text("\n".join(['{"file_name": "./a.jpg", "text": "one"}', *lines]))
    source = open_source([str(tmp_path / "d")])
    assert told(source) == {"a.jpg": "one"}
    assert len(source.problems) == 5
    assert all(f"metadata.jsonl:{number}: " in line for number, line in enumerate(source.problems, start=2))
    (tmp_path / "d/metadata.csv").write_text("file_name,text\na.jpg,two\n")
    with pytest.raises(CollectionError, match="both describe the images"):
        open_source([str(tmp_path / "d")])
    assert told(open_source([str(tmp_path / "d")], exclude=["*.jsonl"])) == {"a.jpg": "two"}
    (tmp_path / "d/metadata.csv").write_text("file_name,text\na.jpg,two\na.jpg,three\n")
    with pytest.raises(CollectionError, match=r"metadata.csv:2 and .*metadata.csv:3 both describe"):
        open_source([str(tmp_path / "d")], exclude=["*.jsonl"])
    (tmp_path / "d/metadata.csv").write_text("camera,lens\nx,y\n")  # of something else
    assert told(open_source([str(tmp_path / "d")])) == {"a.jpg": "one"}


def test_imagefolder_from_a_mac(tmp_path):
    pictures(tmp_path, [unicodedata.normalize("NFD", "é.jpg")])
    (tmp_path / "metadata.csv").write_text(f"file_name,text\n{unicodedata.normalize('NFC', 'é.jpg')},one\n")
    assert list(told(open_source([str(tmp_path)])).values()) == ["one"]


def test_a_folder_of_parquet_is_rows(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "data").mkdir()
    for number in range(2):
        table = pa.table({"image": [{"bytes": jpeg(number), "path": "x.jpg"}]})
        pq.write_table(table, tmp_path / f"data/train-{number:05}-of-00002.parquet")
    assert [record.image for record in records(open_source([str(tmp_path)]))] == [jpeg(0), jpeg(1)]


def test_no_torch_and_no_formats_until_they_are_needed(tmp_path):
    pictures(tmp_path, ["a.jpg"])
    check = (
        "import sys; from blip2.collection.sources import open_source; open_source(sys.argv[1:]);"
        "print({'torch', 'pyarrow', 'webdataset', 'braceexpand', 'pandas'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", check, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_other_processes_get_the_same(tmp_path):
    pictures(tmp_path / "d", ["a.jpg", "b.jpg"])
    (tmp_path / "rows.csv").write_text("image,text\nd/a.jpg,one\nd/b.jpg,two\n")
    tar(tmp_path / "a.tar", {"a.jpg": jpeg(1)})
    for name in ("d", "rows.csv", "a.tar"):
        source = open_source([str(tmp_path / name)])
        next(source.records(source.units[0]))
        records(source)
        assert records(pickle.loads(pickle.dumps(source))) == records(source)


def test_files_that_are_nothing(tmp_path):
    for name, content, what in (
        ("a.gz", b"\x1f\x8b123", "is compressed, but not a tar file"), ("a.jsonl", b"", "is empty"),
        ("a.tar", b"x" * 600, "cannot be read as a tar file"), ("a.parquet", b"PAR1", "cannot be read"),
        ("a.json", b"hello", "is not a json file"), ("b.csv", b"x\n", "is known to hold images"),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CollectionError, match=what):
            open_source([str(tmp_path / name)])


def test_a_moved_folder_is_the_same_pictures(tmp_path):
    pictures(tmp_path / "d", ["a.jpg", "b/c.jpg"])
    before = open_source([str(tmp_path / "d")])
    stamps = [before.stamp(unit) for unit in before.units]
    after = open_source([shutil.move(str(tmp_path / "d"), str(tmp_path / "e"))])
    assert [after.stamp(unit) for unit in after.units] == stamps
