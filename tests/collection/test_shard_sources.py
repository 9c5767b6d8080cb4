"""Shards: what webdataset wrote is read as webdataset reads it, and a damaged one is told to be so."""

import io
import json
import os
import subprocess
import tarfile

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from blip2.collection.sources import Shards, open_source
from blip2.errors import CollectionError
from tests.collection.written import jpeg, pictures, records, tar, told


@pytest.fixture
def shards(tmp_path):
    """Two shards of five and two, by webdataset's own writer."""
    with webdataset.ShardWriter(str(tmp_path / "%05d.tar"), maxcount=5, verbose=0) as writer:
        for number in range(7):
            sample = {"__key__": f"{number:09}", "jpg": jpeg(number), "txt": f"dog {number}", "json": {"width": number}}
            writer.write(sample)
    return tmp_path


def test_what_webdataset_wrote(shards):
    source = open_source([f"{shards}/{{00000..00001}}.tar"])
    found = records(source)
    theirs = list(webdataset.WebDataset(f"{shards}/{{00000..00001}}.tar", shardshuffle=False))
    assert [(record.key, record.image, record.text, record.columns["width"]) for record in found] == [
        (sample["__key__"], sample["jpg"], sample["txt"].decode(), json.loads(sample["json"])["width"])
        for sample in theirs
    ]
    assert [unit.place for unit in source.units] == [f"{shards}/00000.tar", f"{shards}/00001.tar"]
    assert [len(list(source.records(unit))) for unit in source.units] == [5, 2]


def test_what_datasets_reads_of_them(shards):
    import datasets

    files = sorted(map(str, shards.glob("*.tar")))
    loaded = datasets.load_dataset("webdataset", data_files=files, cache_dir=str(shards / "cache"), split="train")
    assert [(row["__key__"], row["txt"]) for row in loaded] == list(told(open_source(files)).items())


def test_img2dataset_tars(shards):
    assert open_source([str(shards)]).num_records is None
    for number, count in enumerate((5, 2)):
        (shards / f"{number:05}_stats.json").write_text(json.dumps({"count": 9, "successes": count}))
        (shards / f"{number:05}.parquet").write_bytes(b"PAR1")
    for named in (str(shards), f"{shards}/*"):
        source = open_source([named])
        assert source.num_records == 7 == len(records(source))
    (shards / "00001_stats.json").write_text("{")
    assert open_source([str(shards)]).num_records is None


def test_a_folder_a_pattern_and_a_list_are_the_same(shards):
    expected = told(open_source([f"{shards}/{{00000..00001}}.tar"]))
    for named in ([str(shards)], [f"{shards}/*.tar"], [f"{shards}/00000.tar", f"{shards}/00001.tar"]):
        assert told(open_source(named)) == expected


def test_stamps_tell_pictures_and_shards_apart(shards):
    source = open_source([str(shards)])
    first = records(source)
    assert len({record.stamp for record in first}) == 7
    os.utime(shards / "00001.tar", ns=(1, 1))
    again = open_source([str(shards)])
    assert again.stamp(again.units[0]) == source.stamp(source.units[0])
    assert again.stamp(again.units[1]) != source.stamp(source.units[1])
    assert [record.stamp for record in records(again)] == [record.stamp for record in first]


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_packed(tmp_path, mode):
    path = tar(tmp_path / "a.tar", {"a.jpg": jpeg(1), "a.txt": b"one", "b.JPEG": jpeg(2)}, mode)
    assert told(open_source([str(path)])) == {"a": "one", "b": ""}


def test_names(tmp_path):
    long = "я" * 101
    members = {
        f"{long}.jpg": jpeg(1), "a.b/c.png": jpeg(2, "PNG"), "__meta__.json": b"{}", ".hidden.jpg": jpeg(3),
        "noext": b"", "__x__/d.jpg": jpeg(4), "d.JPG": jpeg(5), "d.TXT": "\ufeffein  Hund\n".encode(),
    }  # fmt: skip
    path = tar(tmp_path / "a.tar", members)
    assert told(open_source([str(path)])) == {long: "", "a.b/c": "", "d": "ein Hund"}
    keys = [sample["__key__"] for sample in webdataset.WebDataset(str(path), shardshuffle=False)]
    assert [record.key for record in records(open_source([str(path)]))] == [key for key in keys if key != "__meta__"]


def test_dots_that_merge_pictures_are_told(tmp_path):
    path = tar(tmp_path / "a.tar", {"IMG.1.jpg": jpeg(1), "IMG.2.jpg": jpeg(2)})
    with pytest.raises(CollectionError, match=r"IMG: has several images \(1.jpg, 2.jpg\); name the right one"):
        open_source([str(path)])
    tar(path, {"IMG.1.jpg": jpeg(1), "IMG.2.jpg": jpeg(2), "b.jpg": jpeg(3)})
    found = told(open_source([str(path)]))
    assert found["b"] == ""
    assert "several images" in found["IMG"]
    assert records(open_source([str(path)], image_column="jpg"))[1].image == jpeg(3)


def test_fields_are_chosen(tmp_path):
    members = {"a.jpg": jpeg(1), "a.mask.png": jpeg(2, "PNG"), "a.png": jpeg(3, "PNG"), "a.orig.txt": b"x"}
    path = tar(tmp_path / "a.tar", members)
    with pytest.raises(CollectionError, match="several images"):
        open_source([str(path)])
    [record] = records(open_source([str(path)], image_column="mask.png", caption_column="orig.txt"))
    assert (record.image, record.text) == (jpeg(2, "PNG"), "x")


def test_texts(tmp_path):
    members = {"a.jpg": jpeg(1), "a.json": b'{"caption": "from json", "n": 1}', "b.jpg": jpeg(2), "b.txt": b"\xff",
               "c.jpg": jpeg(3), "c.json": b"[1]", "d.jpg": jpeg(4), "d.txt": b"  ", "e.txt": b"alone"}  # fmt: skip
    path = tar(tmp_path / "a.tar", members)
    found = told(open_source([str(path)]))
    assert found == {
        "a": "from json",
        "b": f"!{path}: b: the text is not UTF-8",
        "c": f"!{path}: c: 'json' is not an object",
        "d": "",
        "e": f"!{path}: e: has no image, but txt",
    }


def test_members_apart_are_an_error_that_names_the_remedy(tmp_path):
    path = tar(tmp_path / "a.tar", {"a.jpg": jpeg(1), "b.jpg": jpeg(2), "a.txt": b"one"})
    with pytest.raises(CollectionError, match=r"'a' are not adjacent.*--sort=name"):
        open_source([str(path)])
    first = tar(tmp_path / "0.tar", {"a.jpg": jpeg(1)})
    source = open_source([str(first), str(path)])
    with pytest.raises(CollectionError, match="--sort=name"):
        records(source)


def test_links_and_twins_are_told(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as file:
        for name, kind in (("a.jpg", tarfile.REGTYPE), ("b.jpg", tarfile.LNKTYPE), ("c.jpg", tarfile.REGTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.jpg" * (kind == tarfile.LNKTYPE)
            content = jpeg(1) if kind == tarfile.REGTYPE else b""
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
        file.addfile(info, io.BytesIO(content))
    found = told(open_source([str(path)]))
    assert found["a"] == ""
    assert "'jpg' is a link" in found["b"]
    assert "two members 'jpg'" in found["c"]


@pytest.mark.parametrize("name", ["pipe:cat a.tar", "pipe:touch hacked |", "s3://bucket/{0..1}.tar", "hf://a/b.tar",
                                  "https://example.org/a.tar", "absent.tar", "{0..3}.tar"])  # fmt: skip
def test_what_is_no_file_is_refused_before_anything_is_opened(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    tar(tmp_path / "0.tar", {"a.jpg": jpeg(1)})
    with pytest.raises(CollectionError):
        open_source([name])
    with pytest.raises(CollectionError):
        Shards(["0.tar", name])
    assert os.listdir() == ["0.tar"]


def test_a_pipe_with_the_name_of_a_shard(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(CollectionError, match="is not a regular file"):
        open_source([str(tmp_path / "a.tar")])


def test_cut_off(tmp_path):
    path = tar(tmp_path / "a.tar", [(f"{n}.{field}", content) for n in range(4)
                                    for field, content in (("jpg", jpeg(n)), ("txt", b"t"))])  # fmt: skip
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"2.txt")])  # the end of a member: only the end mark is missing
    assert list(told(open_source([str(path)])).items())[:2] == [("0", "t"), ("1", "t")]
    last = records(open_source([str(path)]))[2:]
    assert [record.key for record in last] == ["2", "a.tar"]
    assert all("download or pack it again" in record.problem and record.image is None for record in last)


def test_joined_tars_are_told(tmp_path):
    path = tar(tmp_path / "a.tar", {"a.jpg": jpeg(1)})
    path.write_bytes(path.read_bytes() + tar(tmp_path / "b.tar", {"b.jpg": jpeg(2)}).read_bytes())
    found = told(open_source([str(path)]))
    assert found["a"].startswith("!")
    assert "after its end mark" in found["a.tar"]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damage_is_a_problem_and_never_another_picture(tmp_path_factory, data):
    mode = data.draw(st.sampled_from(["w", "w:gz"]))
    members = [(f"{n}.{field}", content) for n in range(4) for field, content in (("jpg", jpeg(n)), ("txt", b"t"))]
    path = tar(tmp_path_factory.getbasetemp() / "damaged.tar", members, mode)
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        del content[place:]
    else:
        content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        found = records(open_source([str(path)]))
    except CollectionError:
        return
    for record in found:
        if record.image is not None and record.key in "0123":
            ours, theirs = record.image, jpeg(int(record.key))
            # A byte within an image itself has no checksum in a tar file: its decoder has to find that.
            assert len(ours) == len(theirs)
            is_told = found[-1].key == "damaged.tar"
            assert is_told or sum(a != b for a, b in zip(ours, theirs, strict=True)) <= 1


def test_what_tar_packs_of_a_folder(tmp_path):
    pictures(tmp_path / "in", ["b/2.jpg", "a/1.jpg"])
    (tmp_path / "in/a/1.txt").write_text("one")
    subprocess.run(["tar", "--sort=name", "-cf", tmp_path / "a.tar", "-C", tmp_path / "in", "."], check=True)
    assert told(open_source([str(tmp_path / "a.tar")])) == {"./a/1": "one", "./b/2": ""}
