"""COCO's, Karpathy's and kohya's files, read beside the tools that they are for."""

import json

import pytest
from pycocotools.coco import COCO

from blip2.collection.sources import open_source
from blip2.errors import CollectionError
from tests.collection.written import pictures, records, told

IMAGES = [
    {"id": 9, "file_name": "a.jpg", "width": 8, "height": 6},
    {"id": 4, "file_name": "b.jpg", "width": 8, "height": 6},
    {"id": 5, "file_name": "c.jpg", "width": 8, "height": 6},
]
CAPTIONS = [
    {"image_id": 4, "id": 1, "caption": "two dogs"},
    {"image_id": 9, "id": 2, "caption": "a cat "},
    {"image_id": 4, "id": 3, "caption": "dogs\nplay"},
]


@pytest.fixture
def folder(tmp_path):
    pictures(tmp_path / "val", ["a.jpg", "b.jpg", "c.jpg"])
    return tmp_path


def write(path, value, indent=None):
    path.write_text(json.dumps(value, indent=indent))
    return str(path)


@pytest.mark.parametrize("indent", [None, 1])
def test_coco(folder, indent):
    path = write(folder / "captions.json", {"info": {}, "images": IMAGES, "annotations": CAPTIONS}, indent)
    found = records(open_source([path], images=str(folder / "val")))
    theirs = COCO(path)
    assert [(record.key, record.columns["image_id"], record.columns["captions"]) for record in found] == [
        (image["file_name"], number, [said["caption"] for said in theirs.imgToAnns[number]])
        for number, image in theirs.imgs.items()
    ]
    assert [record.text for record in found] == ["a cat", "two dogs", ""]
    assert found[0].columns["width"] == 8
    assert found[0].image == str(folder / "val/a.jpg")


def test_coco_with_an_image_a_line(folder):
    lines = ['{"images": [', f"{json.dumps(IMAGES[0])},", json.dumps(IMAGES[1]), '], "annotations": []', "}"]
    (folder / "val/a.json").write_text("\n".join(lines))
    assert [record.columns["image_id"] for record in records(open_source([str(folder / "val/a.json")]))] == [9, 4]


def test_coco_without_annotations(folder):
    path = write(folder / "val/image_info.json", {"images": IMAGES})
    assert told(open_source([path])) == {"a.jpg": "", "b.jpg": "", "c.jpg": ""}


def test_coco_whose_pictures_are_elsewhere(folder):
    path = write(folder / "captions.json", {"images": IMAGES, "annotations": CAPTIONS})
    with pytest.raises(CollectionError, match=r"none of the images.*name their folder with images"):
        open_source([path])


def test_coco_with_twins_and_rubbish(folder):
    path = write(folder / "val/a.json", {"images": [*IMAGES, {"id": 9, "file_name": "d.jpg"}]})
    with pytest.raises(CollectionError, match="two images have the id 9"):
        open_source([path])
    path = write(folder / "val/a.json", {"images": [IMAGES[0], 3, {"file_name": "b.jpg"}], "annotations": [3, {}]})
    found = told(open_source([path]))
    assert found.pop("a.jpg") == ""
    assert [text.split("]: ")[1] for text in found.values()] == ["an image needs 'id' and 'file_name'"] * 2


KARPATHY = {
    "dataset": "coco",
    "images": [
        {"filename": "a.jpg", "filepath": "val", "split": "test", "cocoid": 9, "imgid": 0,
         "sentences": [{"raw": "a cat", "tokens": ["a", "cat"]}, {"raw": "cats"}]},
        {"filename": "b.jpg", "filepath": "val", "split": "train", "cocoid": 4, "imgid": 1, "sentences": []},
        {"filename": "c.jpg", "filepath": "val", "split": "restval", "cocoid": 5, "imgid": 2, "sentences": []},
    ],
}  # fmt: skip


def test_karpathy(folder):
    path = write(folder / "dataset_coco.json", KARPATHY)
    first = records(open_source([path]))[0]
    assert (first.key, first.text, first.image) == ("val/a.jpg", "a cat", str(folder / "val/a.jpg"))
    assert first.columns == {"image_id": 9, "split": "test", "captions": ["a cat", "cats"]}
    assert list(told(open_source([path], split="test"))) == ["val/a.jpg"]
    assert list(told(open_source([path], split="train,restval"))) == ["val/b.jpg", "val/c.jpg"]
    with pytest.raises(CollectionError, match=r"no split 'dev', but test \(1\), train \(1\), restval \(1\)"):
        open_source([path], split="dev")


def test_flickr30k_has_no_folders(folder):
    images = [{"filename": "a.jpg", "imgid": 0, "split": "train", "sentences": [{"raw": "a cat"}]}]
    path = write(folder / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})
    [record] = records(open_source([path], images=str(folder / "val")))
    assert (record.key, record.text, record.columns["image_id"]) == ("a.jpg", "a cat", 0)


def test_split_is_refused_where_there_is_none(folder):
    path = write(folder / "val/image_info.json", {"images": IMAGES})
    for named in (path, str(folder / "val"), str(folder / "val/a.jpg")):
        with pytest.raises(CollectionError, match="leave out split"):
            open_source([named], split="test")


def test_kohya(folder):
    pictures(folder / "val", ["d.e.png", "twice.jpg", "twice.png"])
    meta = {
        "a": {"caption": "a cat", "tags": "cat, 1animal", "image_size": [8, 6]},
        "b.jpg": {"tags": "dog"},
        str(folder / "val/c.jpg"): {"caption": "two dogs"},
        "d.e": {"caption": "dots"},
        "twice": {"caption": "which"},
        "absent": {"caption": "none"},
    }
    path = write(folder / "meta.json", meta, indent=2)
    found = told(open_source([path], images=str(folder / "val")))
    twice, absent = list(found.values())[-2:]
    assert list(found.items())[:4] == [
        ("a.jpg", "a cat"), ("b.jpg", ""), (str(folder / "val/c.jpg"), "two dogs"), ("d.e.png", "dots")
    ]  # fmt: skip
    assert "twice.jpg or twice.png; write keys with suffixes" in twice or "twice.png or twice.jpg" in twice
    assert "'absent': there is no image of this name" in absent
    first = records(open_source([path], images=str(folder / "val")))[0]
    assert first.columns == {"caption": "a cat", "tags": "cat, 1animal", "image_size": [8, 6]}


def test_json_of_no_known_tool(folder):
    for value in ({"a": 1}, {"images": []}, {"version": "1", "shapes": [1]}):
        for indent in (None, 1):
            with pytest.raises(CollectionError, match="known"):
                open_source([write(folder / "a.json", value, indent)])
    (folder / "torn.json").write_text('[{"image": "a.jpg"},\n{"ima')
    with pytest.raises(CollectionError, match="is not JSON"):
        open_source([str(folder / "torn.json")])
