"""One file of all captions, read back by the tools that each format is for."""

import csv
import json
import os
from pathlib import Path

import pandas
import pyarrow.parquet
import pytest
from datasets import load_dataset
from pycocotools.coco import COCO

from blip2.collection import Record
from blip2.collection.run import Outcome
from blip2.collection.sinks import Outputs
from blip2.data import read_rows
from blip2.errors import CollectionError, ImageError, OptionError
from tests.collection.written_by_run import Listed, captioned, drawn, said_twice


def loaded(tmp_path, kind, **options):
    return load_dataset(kind, cache_dir=str(tmp_path / "cache"), **options)["train"]


def json_rows(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture
def photos(tmp_path):
    return drawn(tmp_path / "photos", "a.jpg", "sub/b.c.png", "\u043a\u043e\u0442.webp", "bad.jpg")


def test_image_folder(tmp_path, photos):
    folder = tmp_path / "photos"
    captioned(photos, Outputs(output=str(folder / "metadata.jsonl")))
    found = loaded(tmp_path, "imagefolder", data_dir=str(folder))
    assert found["text"][:] == ["a a.jpg", "a b.c.png", "a \u043a\u043e\u0442.webp"]  # without the one that failed
    assert [image.size for image in found["image"]] == [(8, 6)] * 3


def test_columns_of_the_source_have_the_same_type_in_every_row(tmp_path):
    columns = [{"n": 1, "title": "x", "text": "was"}, {"n": 2.5, "tags": ["a"]}, {"title": None, "n": float("nan")}]
    paths = drawn(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    records = [Record(Path(path).name, path, path, "1", columns=had) for path, had in zip(paths, columns, strict=True)]
    captioned(Listed(records), Outputs(output=str(tmp_path / "metadata.jsonl"), format="imagefolder"))
    assert json_rows(tmp_path / "metadata.jsonl") == [
        {"file_name": "a.jpg", "text": "a a.jpg", "n": 1.0, "title": "x", "text_original": "was", "tags": None},
        {"file_name": "b.jpg", "text": "a b.jpg", "n": 2.5, "title": None, "text_original": None, "tags": '["a"]'},
        {"file_name": "c.jpg", "text": "a c.jpg", "n": None, "title": None, "text_original": None, "tags": None},
    ]
    assert loaded(tmp_path, "imagefolder", data_dir=str(tmp_path))["n"][:] == [1.0, 2.5, None]


def test_json_lines_have_everything(tmp_path, photos):
    raw = os.fsdecode(bytes(tmp_path / "photos") + b"/\xff.jpg")
    os.link(photos[0], raw)
    captioned([*photos, raw], Outputs(output=str(tmp_path / "all.jsonl"), format="jsonl", constants={"model": "tiny"}))
    first, _, _, bad, odd = json_rows(tmp_path / "all.jsonl")
    assert first == {
        "file_name": "photos/a.jpg", "path_bytes": "", "key": "a.jpg", "caption": "a a.jpg", "captions": ["a a.jpg"],
        "score": -0.5, "scores": [-0.5], "tokens": 4, "caption_original": "", "model": "tiny",
        "sha256": first["sha256"],
        "width": 8, "height": 6, "status": "success", "error_message": "",
    }  # fmt: skip
    assert len(first["sha256"]) == 64 and odd["sha256"] == first["sha256"]
    assert bad["status"] == "failed" and bad["error_message"].endswith("damaged") and bad["caption"] == ""
    assert odd["file_name"] == "photos/\ufffd.jpg" and odd["path_bytes"] == "cGhvdG9zL/8uanBn"
    assert loaded(tmp_path, "json", data_files=str(tmp_path / "all.jsonl"))["score"][:] == [-0.5] * 3 + [None, -0.5]


def none_said(record):
    return Outcome(["None" if record.key == "a.jpg" else 'two "dogs", one cat'], [0.0], [1])


def test_csv(tmp_path, photos):
    path = tmp_path / "all.csv"
    (sink,) = captioned(photos, Outputs(output=str(path)), none_said)
    with open(path, newline="", encoding="utf-8") as file:
        assert [row["text"] for row in csv.DictReader(file)] == ["None", *['two "dogs", one cat'] * 3]
    # What the note says: pandas, and datasets by it, take this caption for no caption, unless they are told.
    assert "keep_default_na=False" in sink.notes[0] and "1 here" in sink.notes[0]
    assert loaded(tmp_path, "csv", data_files=str(path))["text"][0] is None
    told = loaded(tmp_path, "csv", data_files=str(path), keep_default_na=False)
    assert told["text"][:2] == ["None", 'two "dogs", one cat']
    assert told["file_name"][1] == "photos/sub/b.c.png"


def test_csv_names_and_mark(tmp_path, photos):
    outputs = Outputs(output=str(tmp_path / "all.csv"), image_column="image", caption_column="prompt", csv_bom=True)
    captioned(photos[:1], outputs)
    assert (tmp_path / "all.csv").read_bytes() == b"\xef\xbb\xbfimage,prompt\nphotos/a.jpg,a a.jpg\n"


def test_open_clip(tmp_path, photos):
    captioned(photos, Outputs(output=str(tmp_path / "all.tsv")), none_said)
    found = pandas.read_csv(tmp_path / "all.tsv", sep="\t", keep_default_na=False)  # as its CsvDataset has it
    assert found["filepath"].tolist() == photos
    assert found["title"].tolist() == ["None", *['two "dogs", one cat'] * 3]


def test_our_own_training_reads_its_rows(tmp_path, photos):
    captioned(photos, Outputs(output=str(tmp_path / "rows.jsonl"), format="train"), said_twice)
    rows = read_rows([tmp_path / "rows.jsonl"])
    assert next((row.image, row.captions) for row in rows) == (photos[0], ("a a.jpg", "two"))


@pytest.mark.parametrize(
    ("format", "first"),
    [
        ("sd-scripts", {"image_path": "{}/photos/a.jpg", "caption": "a a.jpg", "image_size": [8, 6]}),
        ("musubi", {"image_path": "{}/photos/a.jpg", "caption": "a a.jpg"}),
        ("invoke", {"image": "photos/a.jpg", "text": "a a.jpg"}),
    ],
)
def test_rows_of_trainers(tmp_path, photos, format, first):
    captioned(photos, Outputs(output=str(tmp_path / "x.jsonl"), format=format))
    expected = {key: value.format(tmp_path) if isinstance(value, str) else value for key, value in first.items()}
    assert json_rows(tmp_path / "x.jsonl")[0] == expected


def test_kohya(tmp_path, photos):
    """Its trainer takes a key that is a file, and buckets by image_size; `tags` of an earlier tagger stay."""
    records = [Record(Path(path).name, path, path, "1", columns={"tags": "x, y"}) for path in photos[:2]]
    captioned(Listed(records), Outputs(output=str(tmp_path / "meta.json"), format="kohya"))
    found = json.loads((tmp_path / "meta.json").read_text("ascii"))
    assert found == {
        path: {"caption": f"a {Path(path).name}", "image_size": [8, 6], "tags": "x, y"} for path in photos[:2]
    }
    assert all(os.path.exists(key) for key in found)


def test_coco(tmp_path, capsys):
    paths = drawn(tmp_path, "000000000042.jpg", "COCO_val2014_000000000007.jpg")
    captioned(paths, Outputs(output=str(tmp_path / "truth.json"), format="coco-dataset"), said_twice)
    captioned(paths, Outputs(output=str(tmp_path / "found.json"), format="coco"))
    truth = COCO(str(tmp_path / "truth.json"))
    assert sorted(truth.imgs) == [7, 42] and truth.imgs[42]["width"] == 8
    assert [entry["caption"] for entry in truth.imgToAnns[42]] == ["a 000000000042.jpg", "two"]
    results = truth.loadRes(str(tmp_path / "found.json"))
    assert [entry["caption"] for entry in results.imgToAnns[7]] == ["a COCO_val2014_000000000007.jpg"]


def test_coco_of_pictures_without_numbers(tmp_path, photos):
    with pytest.raises(CollectionError, match="coco-dataset"):
        captioned(photos, Outputs(output=str(tmp_path / "found.json"), format="coco"))
    assert not (tmp_path / "found.json").exists()
    captioned(photos, Outputs(output=str(tmp_path / "found.json"), format="coco-dataset", replaces=True))
    assert [image["id"] for image in json.loads((tmp_path / "found.json").read_text())["images"]] == [1, 2, 3]


def never_seen(record):
    return ImageError(f"{record.name}: damaged")


def test_coco_twice_or_never(tmp_path):
    both = drawn(tmp_path, "1.jpg", "1.png")
    with pytest.raises(CollectionError, match=r"1\.jpg and .*1\.png have the same image id 1"):
        captioned(both, Outputs(output=str(tmp_path / "x.json"), format="coco"))
    with pytest.raises(CollectionError, match="no image has a caption"):
        captioned(drawn(tmp_path, "7.jpg"), Outputs(output=str(tmp_path / "y.json"), format="coco"), never_seen)


@pytest.mark.parametrize("images", [False, True])
def test_parquet(tmp_path, photos, images, monkeypatch):
    monkeypatch.setattr("blip2.collection.sinks.parquet.GROUP_ROWS", 2)
    path = tmp_path / "all.parquet"
    captioned(photos, Outputs(output=str(path), with_images=images or None, constants={"model": "tiny"}))
    found = loaded(tmp_path, "parquet", data_files=str(path))
    told = pandas.read_parquet(path)
    assert pyarrow.parquet.ParquetFile(path).num_row_groups == 2
    if images:
        assert [image.size for image in found["image"]] == [(8, 6)] * 3
        assert told["image"][1] == {"bytes": Path(photos[1]).read_bytes(), "path": "b.c.png"}
    else:
        assert told["status"].tolist() == ["success"] * 3 + ["failed"]
        assert told["error_message"][3].endswith("damaged")
    assert found["caption"][:3] == ["a a.jpg", "a b.c.png", "a \u043a\u043e\u0442.webp"]
    assert found["model"][0] == "tiny" and found["captions"][0] == ["a a.jpg"]
    before = path.read_bytes()
    path.unlink()
    captioned(photos, Outputs(output=str(path), with_images=images or None, constants={"model": "tiny"}))
    assert path.read_bytes() == before


def test_rows_become_columns_before_their_group_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("blip2.collection.sinks.parquet.GROUP_ROWS", 4)
    monkeypatch.setattr("blip2.collection.sinks.parquet.BATCH_ROWS", 3)
    pictures = drawn(tmp_path, *(f"{number:02}.png" for number in range(10)))
    captioned(pictures, Outputs(output=str(tmp_path / "a.parquet")))
    table = pyarrow.parquet.ParquetFile(tmp_path / "a.parquet")
    assert [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)] == [4, 4, 2]
    assert table.read()["key"].to_pylist() == [f"{number:02}.png" for number in range(10)]


def test_parquet_a_unit(tmp_path):
    records = [Record(str(n), Path(p).read_bytes(), str(n), "1", columns={"n": n})
               for n, p in enumerate(drawn(tmp_path, "a.jpg", "b.png", "c.jpg"))]  # fmt: skip
    captioned(Listed(records, 2), Outputs(output=str(tmp_path / "out"), format="parquet", with_images=True))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["00000.parquet", "00001.parquet"]
    found = loaded(tmp_path, "parquet", data_dir=str(tmp_path / "out"))
    assert found["n"][:] == [0, 1, 2] and found["caption"][2] == "a 2" and found["image"][1].size == (8, 6)


@pytest.mark.parametrize(
    ("outputs", "error", "told"),
    [
        ({"output": "metadata.csv"}, OptionError, "metadata.jsonl"),
        ({"output": "x.json"}, OptionError, "coco-dataset"),
        ({"output": "x.xlsx"}, OptionError, "*.parquet"),
        ({"output": "x.csv", "format": "coco"}, OptionError, "*.json"),
        ({"output": "x.csv", "format": "excel"}, OptionError, "imagefolder"),
        ({"output": "out"}, OptionError, "webdataset"),
        ({"output": "x.csv", "with_images": True}, OptionError, "parquet"),
        ({"output": "there.csv"}, CollectionError, "--if-exists overwrite"),
        ({"output": "there.csv/x.csv"}, CollectionError, "not a folder"),
        ({"output": f"{'x' * 260}.csv"}, CollectionError, "264 bytes"),
        ({"output": "elsewhere/metadata.jsonl"}, CollectionError, "--format jsonl"),
        ({"output": "photos/metadata.jsonl"}, CollectionError, "metadata.parquet"),
        ({"output": "photos/x.jsonl", "format": "train", "odd": True}, CollectionError, "UTF-8"),
        ({"output": "photos/x.jsonl", "odd": True}, CollectionError, "--format jsonl"),
    ],
)
def test_told_before_the_model_is_loaded(tmp_path, photos, outputs, error, told):
    (tmp_path / "there.csv").write_text("a person's")
    (tmp_path / "photos" / "metadata.parquet").touch()
    if outputs.pop("odd", False):
        photos.append(os.fsdecode(bytes(tmp_path / "photos") + b"/\xff.jpg"))

    def never(record):
        raise AssertionError("the model is at work")

    outputs["output"] = str(tmp_path / outputs["output"])
    with pytest.raises(error) as caught:
        captioned(photos, Outputs(**outputs), never)
    assert told in str(caught.value)
    assert (tmp_path / "there.csv").read_text() == "a person's"


@pytest.mark.parametrize("format", ["imagefolder", "train", "musubi", "open-clip", "kohya"])
def test_formats_that_name_files_need_some(tmp_path, format):
    source = Listed([Record("a", b"", "a", "1")])
    suffix = {"open-clip": "tsv", "kohya": "json"}.get(format, "jsonl")
    with pytest.raises(CollectionError, match="parquet"):
        captioned(source, Outputs(output=str(tmp_path / f"x.{suffix}"), format=format), lambda record: 1 / 0)


def test_an_earlier_run_is_replaced_and_not_piled_up(tmp_path, photos):
    captioned(photos, Outputs(output=str(tmp_path / "one.jsonl"), format="jsonl"))
    for before, after in (("one", "two"), ("two", "three")):
        rows = [
            Record(row["key"], row["file_name"], row["key"], "1", row["caption"], row)
            for row in json_rows(tmp_path / f"{before}.jsonl")
        ]
        captioned(Listed(rows), Outputs(output=str(tmp_path / f"{after}.jsonl"), format="jsonl"), if_exists="overwrite")
    first, last = (json_rows(tmp_path / f"{name}.jsonl")[0] for name in ("one", "three"))
    assert {*last} - {*first} == {"score_original", "scores_original", "tokens_original"}
    assert last["caption_original"] == "a a.jpg" and last["score_original"] == -0.5


def test_a_full_disk(tmp_path, photos, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(CollectionError, match="disk is full"):
        captioned(photos, Outputs(output=str(tmp_path / "x.csv")))
