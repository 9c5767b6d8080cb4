"""Rows: JSON lines, JSON arrays, cells and parquet, as people and `datasets` write them."""

import base64
import csv
import datetime
import io
import json
import os
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blip2.collection.sources import open_source
from blip2.collection.sources.rows import UNIT_ROWS
from blip2.errors import CollectionError
from tests.collection.written import jpeg, pictures, records, told


@pytest.fixture
def folder(tmp_path):
    """a.jpg, b.jpg, c.jpg, to be named by rows."""
    pictures(tmp_path, ["a.jpg", "b.jpg", "c.jpg"])
    return tmp_path


def json_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_json_lines(folder):
    rows = [{"image": "a.jpg", "caption": " two\n dogs ", "n": 1}, {"image": "b.jpg", "n": 2.5, "tags": ["x"]}]
    found = records(open_source([json_lines(folder / "rows.jsonl", rows)]))
    assert [(record.key, record.text, record.columns) for record in found] == [
        ("a.jpg", "two dogs", {"caption": " two\n dogs ", "n": 1}),
        ("b.jpg", "", {"n": 2.5, "tags": ["x"]}),
    ]
    assert [record.image for record in found] == [str(folder / "a.jpg"), str(folder / "b.jpg")]


def test_a_json_array_is_the_same(folder):
    rows = [{"image": "a.jpg", "caption": "one"}, {"image": "b.jpg", "caption": "two"}, 3]
    (folder / "compact.json").write_text(json.dumps(rows))
    (folder / "indented.json").write_text(json.dumps(rows, indent=2))
    for name in ("compact.json", "indented.json"):
        path = str(folder / name)
        found = told(open_source([path]))
        assert found == {"a.jpg": "one", "b.jpg": "two", "row-000000002": f"!{path} [2]: it is not an object"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.csv", "file_name,text\na.jpg,None\nb.jpg,007\n"),
        ("rows.tsv", "filepath\ttitle\na.jpg\tNone\nb.jpg\t007\n"),  # open_clip's
        ("rows.txt", "image|caption\r\na.jpg|None\r\nb.jpg|007\r\n"),
        ("excel.csv", "\ufeffImage;Caption\na.jpg;None\n\nb.jpg;007"),
    ],
)
def test_cells_stay_text(folder, name, content):
    (folder / name).write_text(content, encoding="utf-8", newline="")
    assert told(open_source([str(folder / name)])) == {"a.jpg": "None", "b.jpg": "007"}


def test_quotes_and_lines_within_cells(folder):
    with open(folder / "rows.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["image", "caption", "note"], ["a.jpg", 'a "big"\ndog, here', "NA"], ["b.jpg", "", "null"]])
    first, second = records(open_source([str(folder / "rows.csv")]))
    assert (first.text, first.columns) == ('a "big" dog, here', {"caption": 'a "big"\ndog, here', "note": "NA"})
    assert (second.text, second.columns["note"]) == ("", "null")


def test_utf_16_as_powershell_writes_it(folder):
    (folder / "rows.csv").write_text("image,caption\na.jpg,Häuser\n", "utf-16")
    assert told(open_source([str(folder / "rows.csv")])) == {"a.jpg": "Häuser"}


def test_broken_rows_are_problems_of_their_own(folder):
    path = str(folder / "rows.jsonl")
    (folder / "rows.jsonl").write_text(
        '{"image": "a.jpg"}\n{"image": "b.jpg"\n\n{"caption": "x"}\n{"image": "no.jpg"}\n{"image": "ftp://a/b.jpg"}\n'
        '{"image": 3}\n{"image": "c.jpg", "caption": "\\ud800"}\n{"image": "a\\u0000.jpg"}\n[]\n'
    )
    found = told(open_source([path]))
    assert found.pop("a.jpg") == ""
    assert all(text.startswith(f"!{path}:") for text in found.values())
    wanted = ["2: is not JSON", "4: there is no image in 'image'", "5: ", "6: ", "7: 'image' holds",
              "8: has lone surrogates", "9: ", "10: it is not an object"]  # fmt: skip
    for text, what in zip(found.values(), wanted, strict=True):
        assert text.startswith(f"!{path}:{what}")
    assert "no such file" in found["no.jpg"]
    assert "only http and https" in found["ftp://a/b.jpg"]


def test_short_and_long_rows_of_cells(folder):
    path = str(folder / "rows.csv")
    (folder / "rows.csv").write_text("image,caption\na.jpg,one\nb.jpg\nc.jpg,x,y\n")
    found = told(open_source([path]))
    assert found == {
        "a.jpg": "one",
        "row-000000001": f"!{path}:3: it has 1 cells, and the first line has 2; fix it",
        "row-000000002": f"!{path}:4: it has 3 cells, and the first line has 2; fix it",
    }
    (folder / "rows.csv").write_text('image,caption\na.jpg,one\nb.jpg,"two\nc.jpg,x\n')
    with pytest.raises(CollectionError, match=r"rows.csv:3: cannot be read further .*; fix the quotes"):
        open_source([path])


def test_addresses_and_data(folder):
    data = f"data:image/jpeg;base64,{base64.b64encode(jpeg(9)).decode()}"
    rows = [{"url": "https://example.org/a.jpg"}, {"url": data}, {"url": {"bytes": None, "path": "a.jpg"}}]
    found = records(open_source([json_lines(folder / "rows.jsonl", rows)]))
    assert [record.key for record in found] == ["https://example.org/a.jpg", "row-000000001", "a.jpg"]
    assert [record.image for record in found] == ["https://example.org/a.jpg", jpeg(9), str(folder / "a.jpg")]
    assert len({record.stamp for record in found}) == 3
    rows = [{"url": "data:image/jpeg;base64,!"}, {"url": "data:x"}, {"url": {"bytes": "?"}}]
    found = told(open_source([json_lines(folder / "rows.jsonl", rows)]))
    for text, what in zip(found.values(), ["not valid base64", "does not begin with", "are not base64"], strict=True):
        assert what in text


def test_twins_are_refused_by_name_or_told_apart_by_a_column(folder):
    rows = [{"image": "a.jpg", "id": 7}, {"image": "b.jpg", "id": 7}, {"image": "a.jpg", "id": 9}]
    path = json_lines(folder / "rows.jsonl", rows)
    with pytest.raises(CollectionError, match=r"rows.jsonl:1 and .*rows.jsonl:3 are of the same image, a.jpg"):
        open_source([path])
    with pytest.raises(CollectionError, match=r"rows.jsonl:1 and .*rows.jsonl:2 have the same 'id', 7"):
        open_source([path], key_column="id")
    with pytest.raises(CollectionError, match="'no' is empty"):
        open_source([path], key_column="no")
    assert list(told(open_source([path], key_column="row"))) == ["000000000", "000000001", "000000002"]
    rows[1]["id"] = 8
    assert list(told(open_source([json_lines(folder / "rows.jsonl", rows)], key_column="id"))) == ["7", "8", "9"]


def test_columns_that_are_named(folder):
    path = json_lines(folder / "rows.jsonl", [{"image": "x", "photo of it": "a.jpg", "caption": "x", "mine": "one"}])
    assert told(open_source([path], image_column="photo of it", caption_column="mine")) == {"a.jpg": "one"}
    with pytest.raises(CollectionError, match="has no column 'nothing', but 'image', 'photo of it'"):
        open_source([path], image_column="nothing")
    path = json_lines(folder / "rows.jsonl", [{"what": "a.jpg"}])
    with pytest.raises(CollectionError, match=r"\('what'\) is known to hold images; name .* image_column"):
        open_source([path])


def test_pictures_elsewhere(folder):
    path = json_lines(folder / "rows.jsonl", [{"image": "a.jpg"}])
    (folder / "elsewhere").mkdir()
    path = shutil.move(path, folder / "elsewhere/rows.jsonl")
    with pytest.raises(CollectionError, match=r"none of the images .*elsewhere/a.jpg.*name their folder with images"):
        open_source([str(path)])
    assert told(open_source([str(path)], images=str(folder))) == {"a.jpg": ""}


def test_units_are_runs_of_rows_that_only_change_with_them(folder):
    names = [f"p/{number:04}.jpg" for number in range(2 * UNIT_ROWS + 5)]
    for path in [folder / name for name in names]:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    path = json_lines(folder / "rows.jsonl", [{"image": name} for name in names])
    source = open_source([path])
    assert [(unit.start, unit.stop) for unit in source.units] == [(0, 256), (256, 512), (512, 517)]
    assert source.num_records == 517
    assert [record.key for record in source.records(source.units[2])] == names[512:]  # in any order
    assert [record.key for record in source.records(source.units[0])] == names[:256]
    assert [record.key for record in records(source)] == names
    (folder / names[300]).write_bytes(b"another")
    with open(path, "a") as file:
        file.write('{"image": "a.jpg"}\n')
    again = open_source([path])
    same = [source.stamp(unit) == again.stamp(unit) for unit in source.units]
    assert same == [True, False, False]


def test_a_broken_first_row_and_empty_lines(folder):
    path = folder / "rows.jsonl"
    path.write_text("\n" * 40 + '{"image": "b.jpg\n{"image": "a.jpg"}\n')
    assert list(told(open_source([str(path)]))) == ["row-000000000", "a.jpg"]


def test_paths_as_windows_writes_them(folder):
    pictures(folder, ["sub/d.jpg", "odd\\name.jpg"])
    path = json_lines(folder / "rows.jsonl", [{"image": "sub\\d.jpg"}, {"image": "odd\\name.jpg"}])
    found = [record.image for record in records(open_source([path]))]
    assert found == [str(folder / "sub/d.jpg"), str(folder / "odd\\name.jpg")]


def test_several_files(folder):
    first = json_lines(folder / "1.jsonl", [{"image": "a.jpg"}])
    second = json_lines(folder / "2.jsonl", [{"image": "b.jpg"}])
    source = open_source([str(folder / "?.jsonl")])
    assert [unit.place for unit in source.units] == [first, second]
    assert list(told(source)) == ["a.jpg", "b.jpg"]
    with pytest.raises(CollectionError, match=r"1.jsonl:1 and .*3.jsonl:1 are of the same image"):
        open_source([first, json_lines(folder / "3.jsonl", [{"image": "a.jpg"}])])


# ---- parquet ----


@pytest.fixture
def data(folder):
    """Three images with texts, as `datasets` has them."""
    import datasets

    paths = [str(folder / name) for name in ("a.jpg", "b.jpg", "c.jpg")]
    columns = {"image": paths, "text": ["one", None, "None"], "label": [1, 2, 3], "score": [0.5, None, 1.0]}
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def test_parquet_by_datasets_with_the_bytes_of_pictures(folder, data):
    from datasets.table import embed_table_storage

    data = data.with_format("arrow").map(embed_table_storage, batched=True).with_format(None)
    data.to_parquet(folder / "data.parquet")
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        (folder / name).unlink()
    found = records(open_source([str(folder / "data.parquet")]))
    assert [record.image for record in found] == [jpeg(number) for number in range(3)]
    assert [record.key for record in found] == ["a.jpg", "b.jpg", "c.jpg"]
    assert [record.text for record in found] == ["one", "", "None"]
    assert [record.columns["score"] for record in found] == [0.5, None, 1.0]
    assert all(type(record.columns["label"]) is int and "image" not in record.columns for record in found)


def test_parquet_by_datasets_with_paths(folder, data):
    data.to_parquet(folder / "data.parquet")
    source = open_source([str(folder / "data.parquet")])
    assert told(source) == {str(folder / "a.jpg"): "one", str(folder / "b.jpg"): "", str(folder / "c.jpg"): "None"}
    (folder / "a.jpg").write_bytes(jpeg(9))
    again = open_source([str(folder / "data.parquet")])
    assert again.stamp(again.units[0]) != source.stamp(source.units[0])


def test_parquet_whose_names_are_no_keys(tmp_path):
    picture = [{"bytes": jpeg(number), "path": "image.jpg"} for number in range(3)]
    pq.write_table(pa.table({"image": picture}), tmp_path / "a.parquet")
    assert list(told(open_source([str(tmp_path / "a.parquet")]))) == ["000000000", "000000001", "000000002"]
    pq.write_table(pa.table({"jpg": [jpeg(1), None], "key": ["00001", "00002"], "url": ["http://x/", "http://y/"]}),
                   tmp_path / "b.parquet")  # fmt: skip
    path = str(tmp_path / "b.parquet")
    first, second = records(open_source([path]))  # img2dataset's
    assert (first.key, first.image, first.columns["url"]) == ("00001", jpeg(1), "http://x/")
    assert second.problem == f"{path} [1]: there is no image in 'jpg'"


def test_parquet_carries_types(tmp_path):
    when = datetime.datetime(2024, 5, 6, 7, 8, 9)
    table = pa.table({"photo": [jpeg(1)], "when": [when], "tags": [["a", "b"]], "size": [{"w": 3}], "big": [2**62]})
    pq.write_table(table, tmp_path / "a.parquet")
    [record] = records(open_source([str(tmp_path / "a.parquet")]))
    assert record.columns == {"when": when, "tags": ["a", "b"], "size": {"w": 3}, "big": 2**62}


def test_parquet_is_read_from_any_row_group(tmp_path):
    table = pa.table({"image": [jpeg(number % 256) for number in range(600)], "n": range(600)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    source = open_source([str(tmp_path / "a.parquet")])
    for unit in reversed(source.units):
        assert [record.columns["n"] for record in source.records(unit)] == list(range(unit.start, unit.stop))
    assert [record.image for record in source.records(source.units[2])] == [jpeg(n % 256) for n in range(512, 600)]


def test_paths_in_parquet(folder):
    pq.write_table(pa.table({"file_name": ["a.jpg", "b.jpg"], "caption": ["one", "two"]}), folder / "a.parquet")
    shutil.copy(folder / "a.parquet", folder / "without a suffix")
    for name in ("a.parquet", "without a suffix"):
        assert told(open_source([str(folder / name)])) == {"a.jpg": "one", "b.jpg": "two"}


def test_what_img2dataset_tells_of_a_shard_is_not_taken_for_pictures(tmp_path):
    pq.write_table(pa.table({"url": ["http://x/"], "key": ["0"]}), tmp_path / "00000.parquet")
    (tmp_path / "00000.tar").write_bytes(b"")
    with pytest.raises(CollectionError, match=r"only describes the images in .*00000.tar; name that"):
        open_source([str(tmp_path / "00000.parquet")])


def test_damaged_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [jpeg(n) for n in range(50)]}), path, compression="none")
    content = path.read_bytes()
    for cut in (4, 9, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:cut])
        with pytest.raises(CollectionError, match="cannot be read"):
            open_source([str(path)])


# ---- whatever there may be ----

NAMES = ["image", "images", "annotations", "file_name", "filename", "id", "caption", "image_id"]


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(["a.csv", "a.tsv", "a.jsonl", "a.json"]),
    st.one_of(
        st.binary(max_size=60),
        st.binary(max_size=60).map(lambda rest: b'image,caption\na.jpg,one\n"' + rest),
        st.binary(max_size=60).map(lambda rest: b'{"image": "a.jpg"}\n{"image": ' + rest),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=4),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
        ).map(lambda value: json.dumps(value).encode()),
    ),
)
def test_rubbish_is_told(tmp_path_factory, name, content):
    folder = tmp_path_factory.getbasetemp() / "rubbish"
    pictures(folder, ["a.jpg"])
    (folder / name).write_bytes(content)
    try:
        found = records(open_source([str(folder / name)]))
    except CollectionError as error:
        assert "\n" not in str(error)
        return
    for record in found:
        assert record.problem or isinstance(record.image, str)


@given(st.lists(st.lists(st.text(st.characters(exclude_characters="\r", codec="utf-8"), max_size=9), min_size=2,
                         max_size=2), max_size=6))  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_cells_are_read_as_python_writes_them(tmp_path_factory, cells):
    folder = tmp_path_factory.getbasetemp() / "cells"
    pictures(folder, ["a.jpg"])
    file = io.StringIO(newline="")
    csv.writer(file).writerows([["image", "caption", "more"], *(["a.jpg", *row] for row in cells)])
    (folder / "a.csv").write_bytes(file.getvalue().encode())
    if not cells:
        return
    found = records(open_source([str(folder / "a.csv")], key_column="row"))
    marks = str.maketrans("", "", "\ufeff")
    assert [[text.translate(marks) for text in (record.columns["caption"], record.columns["more"])]
            for record in found] == [[text.translate(marks) for text in row] for row in cells]  # fmt: skip
    assert os.path.exists(found[0].name)
