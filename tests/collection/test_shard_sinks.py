"""Shards: mirrored and packed, read back by webdataset, datasets, and as img2dataset counts them."""

import io
import json
import tarfile
from pathlib import Path

import pandas
import pytest
import webdataset
from datasets import load_dataset

from blip2.collection.sinks import Outputs
from blip2.collection.sinks.samples import samples, split_name
from blip2.collection.sources import open_source
from blip2.collection.sources.files import Files
from blip2.errors import CollectionError
from tests.collection.written_by_run import captioned, drawn


def made(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as shard:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uname = len(content), 1700000000, "someone"
            shard.addfile(info, io.BytesIO(content))
    return path


def tars(*paths: Path):
    return open_source([str(path) for path in paths])


LONG = "\u043a\u043e\u0442/" + "k" * 101


@pytest.fixture
def shard(tmp_path):
    """A `.JPEG`, a `.webp`, an image that fails, and a missing `txt` and `json` among the first samples."""
    jpg, webp, png = (Path(path).read_bytes() for path in drawn(tmp_path / "d", "a.jpg", "b.webp", "c.png"))
    return made(
        tmp_path / "in" / "00003.tar",
        [
            ("000030000.JPEG", jpg), ("000030000.txt", b"old words"), ("000030000.json", b'{"url": "http://a/b"}'),
            ("000030001.webp", webp), ("000030001.json", b'{"url": "http://a/c", "width": 99}'),
            ("000030002bad.jpg", jpg[:100]), ("000030002bad.txt", b""),
            (f"{LONG}.png", png), (f"{LONG}.txt", b"older"),
            ("__meta__/x.json", b"{}"),
        ],
    )  # fmt: skip


def names(path):
    with tarfile.open(path) as tar:
        return [member.name for member in tar]


def test_a_mirror(tmp_path, shard):
    out = tmp_path / "out"
    captioned(tars(shard), Outputs(output=str(out)), if_exists="overwrite")
    assert sorted(path.name for path in out.iterdir()) == ["00003.parquet", "00003.tar", "00003_stats.json"]
    assert names(out / "00003.tar") == [
        f"{key}.{field}"
        for key, fields in {
            "000030000": ("jpg", "json", "orig.txt", "txt"),
            "000030001": ("jpg", "json", "orig.txt", "txt"),
            LONG: ("jpg", "json", "orig.txt", "txt"),
        }.items()
        for field in fields
    ]
    found = {sample["__key__"]: sample for sample in webdataset.WebDataset(str(out / "00003.tar"), shardshuffle=False)}
    first = found["000030000"]
    assert (first["txt"], first["orig.txt"], first["json"]) == (b"a 000030000", b"old words", b'{"url": "http://a/b"}')
    assert found[LONG]["jpg"] == Path(tmp_path / "d" / "c.png").read_bytes()
    with tarfile.open(out / "00003.tar") as tar:
        assert {(member.mtime, member.uname, member.mode) for member in tar} == {(0, "", 0o444)}
    table = pandas.read_parquet(out / "00003.parquet")
    assert table["key"].tolist() == ["000030000", "000030001", "000030002bad", LONG]
    assert table["caption"].tolist() == ["a 000030000", "a 000030001", "", f"a {'k' * 101}"]
    assert table["status"].tolist() == ["success", "success", "failed", "success"]
    assert table["url"][0] == "http://a/b" and table["width"].tolist()[:2] == [8, 8]
    assert len(table["sha256"][0]) == 64
    stats = json.loads((out / "00003_stats.json").read_text())
    assert (stats["count"], stats["successes"], stats["failed_to_caption"]) == (4, 3, 1)
    assert {"failed_to_download", "failed_to_resize", "duration", "start_time", "end_time", "status_dict"} <= {*stats}


def test_datasets_reads_the_mirror(tmp_path, shard):
    captioned(tars(shard), Outputs(output=str(tmp_path / "out")), if_exists="overwrite")
    cache = str(tmp_path / "cache")
    found = load_dataset("webdataset", data_files=str(tmp_path / "out" / "*.tar"), split="train", cache_dir=cache)
    assert found["txt"][:2] == ["a 000030000", "a 000030001"]
    assert [image.size for image in found["jpg"]] == [(8, 6)] * 3


def test_what_people_wrote_stays(tmp_path, shard):
    captioned(tars(shard), Outputs(output=str(tmp_path / "out")))
    found = {sample.key: sample.members for sample in samples(tmp_path / "out" / "00003.tar")}
    assert [found[key]["txt"] for key in found] == [b"old words", b"a 000030001", b"older"]


def test_arrays_that_some_samples_have_stay_and_are_told(tmp_path):
    picture = Path(drawn(tmp_path, "a.jpg")[0]).read_bytes()
    shard = made(tmp_path / "in.tar", [("a.jpg", picture), ("a.seg.npy", b"12"), ("b.jpg", picture)])
    (sink,) = captioned(tars(shard), Outputs(output=str(tmp_path / "out")))
    assert next(samples(tmp_path / "out" / "in.tar")).members["seg.npy"] == b"12"
    assert "seg.npy" in sink.notes[0]


def test_another_field(tmp_path, shard):
    captioned(tars(shard), Outputs(output=str(tmp_path / "out"), caption_field="blip2.txt"), if_exists="overwrite")
    first = next(samples(tmp_path / "out" / "00003.tar"))
    assert first.members["txt"] == b"old words" and first.members["blip2.txt"] == b"a 000030000"


def test_the_same_bytes_again(tmp_path, shard):
    for out in ("one", "two"):
        captioned(tars(shard), Outputs(output=str(tmp_path / out)))
    for name in ("00003.tar", "00003.parquet", "00003_stats.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_what_was_said_elsewhere_and_downloaded_before(tmp_path):
    picture = Path(drawn(tmp_path, "a.jpg")[0]).read_bytes()
    shard = made(tmp_path / "00001.tar", [("a.jpg", picture), ("a.caption", b"in another field")])
    told = {"count": 9, "successes": 1, "failed_to_download": 6, "failed_to_resize": 2, "start_time": 1.5}
    (tmp_path / "00001_stats.json").write_text(json.dumps(told))
    captioned(tars(shard), Outputs(output=str(tmp_path / "out")), lambda record: 1 / 0)
    assert next(samples(tmp_path / "out" / "00001.tar")).members["txt"] == b"in another field"
    stats = json.loads((tmp_path / "out" / "00001_stats.json").read_text())
    assert [stats[key] for key in told] == [9, 1, 6, 2, 0.0]


def test_rows_of_paths_have_sidecars(tmp_path):
    paths = drawn(tmp_path, "a.jpg", "b.jpg")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"image": path, "n": n}) + "\n" for n, path in enumerate(paths)))
    outputs = Outputs(sidecar=".txt", output=str(tmp_path / "metadata.jsonl"))
    captioned(open_source([str(rows)]), outputs)
    assert (tmp_path / "b.txt").read_text() == "a b.jpg\n"
    assert json.loads((tmp_path / "metadata.jsonl").read_text().splitlines()[1]) == {
        "file_name": "b.jpg", "text": "a b.jpg", "n": 1,
    }  # fmt: skip


def test_a_damaged_shard_is_mirrored_up_to_there(tmp_path, shard):
    shard.write_bytes(shard.read_bytes()[:4200])
    (sink,) = captioned(tars(shard), Outputs(output=str(tmp_path / "out")), if_exists="overwrite")
    assert [sample.key for sample in samples(tmp_path / "out" / "00003.tar")] == ["000030000"]
    assert "is damaged" in sink.notes[0]
    table = pandas.read_parquet(tmp_path / "out" / "00003.parquet")
    assert "damaged" in table["error_message"][1] and table["status"].tolist().count("success") == 1


def test_only_tables(tmp_path, shard):
    captioned(tars(shard), Outputs(output=str(tmp_path / "out"), with_images=False))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["00003.parquet", "00003_stats.json"]


def test_a_folder_is_packed(tmp_path, monkeypatch):
    """Dots in names, one stem twice, many formats: no image is lost, and each knows where it came from."""
    monkeypatch.setattr("blip2.collection.sources.files.UNIT_FILES", 2)
    paths = drawn(tmp_path / "in", "IMG.1.jpg", "IMG.2.jpg", "a.jpg", "a.png", "bad.jpg", "\u043a\u043e\u0442.jpeg")
    source = Files(paths, root=str(tmp_path / "in"))
    captioned(source, Outputs(output=str(tmp_path / "out"), format="webdataset", shard_size=2))
    assert names(tmp_path / "out" / "00002.tar") == ["000020001.jpg", "000020001.json", "000020001.txt"]
    tars = [str(tmp_path / "out" / f"0000{number}.tar") for number in range(3)]
    found = [*webdataset.WebDataset(tars, shardshuffle=False).decode("pil")]
    assert [sample["json"]["name"] for sample in found] == [
        "IMG.1.jpg", "IMG.2.jpg", "a.jpg", "a.png", "\u043a\u043e\u0442.jpeg",
    ]  # fmt: skip
    assert {sample["jpg"].size for sample in found} == {(8, 6)} and found[3]["txt"] == "a a.png"
    read = load_dataset("webdataset", data_files=tars, split="train", cache_dir=str(tmp_path / "cache"))
    assert read["txt"][3] == "a a.png" and len(read) == 5
    table = pandas.read_parquet(tmp_path / "out" / "00001.parquet")
    assert [Path(name).name for name in table["file_name"]] == ["a.jpg", "a.png"]
    assert table["key"].tolist() == ["000010000", "000010001"]


@pytest.mark.parametrize(
    ("others", "output", "told"),
    [
        (["other/00003.tar"], "out", "00003.tar"),
        ([], "in", "the source itself"),
        ([], "d/a.jpg/out", "not a folder"),
    ],
)
def test_told_before(tmp_path, shard, others, output, told):
    more = [made(tmp_path / other, [("a.jpg", b"x")]) for other in others]
    with pytest.raises(CollectionError, match=told):
        captioned(tars(shard, *more), Outputs(output=str(tmp_path / output)), lambda record: 1 / 0)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("a.b/c.jpg", ("a.b/c", "jpg")),
        ("IMG.2024.01.jpg", ("IMG", "2024.01.jpg")),
        (".hidden.jpg", ("", "hidden.jpg")),
        ("noext", ("noext", "")),
    ],
)
def test_names_are_split_as_webdataset_does(name, split):
    assert split_name(name) == split
    theirs = webdataset.tariterators.base_plus_ext(name)
    assert theirs == (split if all(split) else (None, None))


def test_a_shard_that_is_cut_short(tmp_path, shard):
    content = shard.read_bytes()
    shard.write_bytes(content[:3000])
    with pytest.raises(CollectionError, match=r"00003\.tar: is damaged"):
        list(samples(shard))
