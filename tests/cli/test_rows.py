"""``blip2 rows``: what each published layout becomes, what is counted, and what is refused with its place."""

import json

import pytest

from blip2.data import read_rows
from blip2.data.kinds import KINDS

COCO = "COCO_train2014_000000000009.jpg"
KARPATHY = {
    "dataset": "coco",
    "images": [
        {"filepath": "train2014", "filename": COCO, "split": "train", "cocoid": 9,
         "sentences": [{"raw": "two dogs", "tokens": ["two"]}, {"raw": " a dog\nruns "}]},
        {"filepath": "val2014", "filename": "b.jpg", "split": "restval", "sentences": [{"raw": "a cat"}, {"raw": " "}]},
        {"filepath": "val2014", "filename": "c.jpg", "split": "test", "sentences": [{"raw": "a bird"}]},
    ],
}  # fmt: skip
QUESTIONS = {
    "info": {}, "data_subtype": "train2014",
    "questions": [
        {"image_id": 9, "question": "how many dogs?", "question_id": 90},
        {"image_id": 9, "question": "what colour?", "question_id": 91},
    ],
}  # fmt: skip
ANNOTATIONS = {
    "annotations": [
        {"question_id": 90, "image_id": 9, "answers": [{"answer": a} for a in ("two", "2", "two")],
         "multiple_choice_answer": "two", "question_type": "how many"},
        {"question_id": 91, "image_id": 9, "answers": [{"answer": "red"}] * 3},
        {"question_id": 92, "image_id": 9, "answers": [{"answer": "red"}]},
    ],
}  # fmt: skip
CAPTIONS = {
    "images": [{"id": 9, "file_name": "9.jpg", "domain": "in-domain"}, {"id": 8, "file_name": "8.jpg"}],
    "annotations": [
        {"image_id": 9, "id": 1, "caption": "a"}, {"image_id": 8, "id": 2, "caption": "b"},
        {"image_id": 9, "id": 3, "caption": "c"},
    ],
}  # fmt: skip
GENOME = [{"id": 9, "regions": [{"region_id": 1, "image_id": 9, "phrase": "a dog"}, {"image_id": 9, "phrase": "a cat"}],
           "qas": [{"image_id": 9, "question": "who?", "answer": "a dog."}]}]  # fmt: skip
TALK = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a dog"}]
LLAVA = [
    {"id": "1", "image": "9.jpg", "conversations": TALK},
    {"id": "2", "image": "9.jpg", "conversations": [*TALK, *TALK]},
    {"id": "3", "conversations": TALK},
    {"id": "4", "image": "9.jpg", "conversations": TALK[:1]},
]
ASKED = {"question": "what is it?", "answer": "a dog"}


@pytest.fixture
def convert(run, tmp_path):
    """``convert(kind, values, *options)`` gives rows, and what was told."""

    def made(kind, values, *options):
        files = []
        for number, value in enumerate(values):
            files.append(tmp_path / f"{number}.json")
            files[-1].write_text(value if isinstance(value, str) else json.dumps(value))
        out = tmp_path / "rows.jsonl"
        done = run("rows", kind, *files, "-o", out, *options)
        if done.exit_code:
            assert not out.exists() and done.stdout == "" and done.stderr.count("\n") == 1
            return None, done.stderr
        assert done.stdout == f"{out}\n"
        read_rows([out])
        return [json.loads(line) for line in out.read_text().splitlines()], done.stderr

    return made


@pytest.mark.parametrize(
    ("kind", "values", "rows"),
    [
        ("karpathy", [KARPATHY], [
            {"image": f"train2014/{COCO}", "captions": ["two dogs", "a dog runs"]},
            {"image": "val2014/b.jpg", "captions": ["a cat"]}, {"image": "val2014/c.jpg", "captions": ["a bird"]}]),
        ("coco", [CAPTIONS], [
            {"image": "9.jpg", "captions": ["a", "c"]}, {"image": "8.jpg", "captions": ["b"]}]),
        ("vqav2", [ANNOTATIONS, QUESTIONS], [
            {"image": f"train2014/{COCO}", "question": "how many dogs?", "answers": {"two": 2, "2": 1}},
            {"image": f"train2014/{COCO}", "question": "what colour?", "answer": "red"}]),
        ("aokvqa", [[{"split": "val", "image_id": 9, "question": "who?", "direct_answers": ["a", "b", "b"],
                      "choices": ["a"], "correct_choice_idx": 0}]], [
            {"image": "val2017/000000000009.jpg", "question": "who?", "answers": {"b": 2, "a": 1}}]),
        ("gqa", [{"07": {"imageId": "n9", "question": "who?", "answer": "me", "isBalanced": True}}], [
            {"image": "n9.jpg", "question": "who?", "answer": "me"}]),
        ("vg-regions", [GENOME], [{"image": "9.jpg", "captions": ["a dog", "a cat"]}]),
        ("vg-qa", [GENOME], [{"image": "9.jpg", "question": "who?", "answer": "a dog."}]),
        ("llava", [LLAVA], [{"image": "9.jpg", **ASKED}, {"image": "9.jpg", "dialogues": [[ASKED, ASKED]]}]),
        ("list", [[{"url": "https://a.b/c.jpg", "caption": "a"}, {"image": "d.jpg", "caption": ["a", "b"]},
                   {"image": "d.jpg", "question": "who?", "answer": ["a", "a", "b"], "dataset": "vqa"}]], [
            {"image": "https://a.b/c.jpg", "captions": ["a"]}, {"image": "d.jpg", "captions": ["a", "b"]},
            {"image": "d.jpg", "question": "who?", "answers": {"a": 2, "b": 1}}]),
        ("list", ['{"image": "a.jpg", "caption": "a"}\n{"image": "b.jpg", "caption": "b"}\n'], [
            {"image": "a.jpg", "captions": ["a"]}, {"image": "b.jpg", "captions": ["b"]}]),
    ],
)  # fmt: skip
def test_each_layout(convert, kind, values, rows, monkeypatch):
    monkeypatch.setattr("blip2.data.jsonl.re.match", lambda *_: None)  # addresses are rows too, before the download
    assert convert(kind, values)[0] == rows


def test_okvqa_is_as_vqav2_and_nocaps_as_coco(convert):
    assert convert("okvqa", [QUESTIONS, ANNOTATIONS]) == convert("vqav2", [QUESTIONS, ANNOTATIONS])
    assert convert("nocaps", [CAPTIONS])[0] == convert("coco", [CAPTIONS])[0]
    assert convert("nocaps", [CAPTIONS], "--split", "in-domain")[0] == [{"image": "9.jpg", "captions": ["a", "c"]}]


def test_restval_is_of_train_and_what_is_left_out_is_counted(convert):
    rows, told = convert("karpathy", [KARPATHY], "--split", "train")
    assert [row["image"] for row in rows] == [f"train2014/{COCO}", "val2014/b.jpg"]
    first, *left_out = told.splitlines()
    assert first == "2 rows about 2 images: 3 captions"
    assert left_out[0].startswith("left out: 1, its caption is empty; the first: ")
    assert left_out[0].endswith("0.json: images[1].sentences[1]")
    assert left_out[1].startswith("left out: 1, it belongs to another split") and left_out[1].endswith("images[2]")
    assert len(left_out) == 2
    _, told = convert("llava", [LLAVA])
    assert "left out: 1, it has no image" in told and "its speakers do not alternate" in told
    _, told = convert("vqav2", [QUESTIONS, ANNOTATIONS])
    assert "2 rows about 1 images: 2 questions" in told and "left out: 1, it is not among the questions" in told


def test_rows_by_picture_and_by_text(convert):
    rows, _ = convert("vqav2", [QUESTIONS, ANNOTATIONS], "--by", "picture")
    [row] = rows
    assert [asked["question"] for asked in row["questions"]] == ["how many dogs?", "what colour?"]
    rows, _ = convert("coco", [CAPTIONS], "--by", "text")
    assert [row["captions"] for row in rows] == [["a"], ["b"], ["c"]]


def test_pictures_are_found_wherever_they_were_unpacked(convert, tmp_path):
    """By their path, else by their name, else by that of another year; and rows name them from where the rows are."""
    images = tmp_path / "images"
    for name in ("a/b.jpg", "val2014/c.jpg", "twice/c.jpg", "000000000009.jpg"):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        (images / name).touch()
    rows, told = convert("karpathy", [KARPATHY], "--images", images)
    assert [row["image"] for row in rows] == ["images/a/b.jpg", "images/val2014/c.jpg"]
    assert "left out: 2, its image does not exist; the first: " in told
    rows, _ = convert("vqav2", [QUESTIONS, ANNOTATIONS], "--images", images)
    assert {row["image"] for row in rows} == {"images/000000000009.jpg"}
    (images / "val2014" / "c.jpg").rename(images / "c2.jpg")
    (images / "more").mkdir()
    (images / "more" / "c.jpg").touch()
    _, told = convert("karpathy", [KARPATHY], "--images", images)
    assert "left out: 1, several images have its name" in told


@pytest.mark.parametrize(
    ("kind", "values", "options", "problem"),
    [
        ("karpathy", [CAPTIONS], [], "0.json: images[0]: has no 'sentences'; its fields are id, file_name, domain;"),
        ("coco", [{"annotations": []}], [], "has no 'images'; name all files"),
        ("vqav2", [ANNOTATIONS], [], "has no 'questions'; name all files"),
        ("vqav2", [QUESTIONS], [], "gives no rows (it has no 'annotations')"),
        ("vqav2", [QUESTIONS, QUESTIONS, ANNOTATIONS], [], "1.json: questions[0]: 'question_id' 90 appears twice"),
        ("gqa", [{"1": {"imageId": "a", "question": "who?"}}], [], "0.json: 1: has no 'answer'"),
        ("gqa", [{"1": {"question": "who?"}}], [], "has no image field ({imageId}.jpg); its fields are question"),
        ("gqa", [{"1": {"imageId": "a", "question": 3, "answer": "a"}}], [], "'question' has to be a text"),
        ("vg-qa", [[{"qas": [7]}]], [], "0.json [0].qas[0]: has to be an object, not int"),
        ("vg-qa", [[{"qas": 7}]], [], "0.json [0]: 'qas' has to be a list"),
        ("aokvqa", [[{"image_id": "x", "split": "val"}]], [], "'val' and image_id 'x' cannot be the name of an image"),
        ("list", [[{"image": "a", "caption": 3}]], [], "'caption' has to be a text, or a list of texts"),
        ("list", [[{"image": "a", "caption": "\ud83d"}]], [], "0.json [0]: 'captions' has unpaired surrogates"),
        ("llava", [[{"image": "a", "conversations": 3}]], [], "a conversation has to be a list of objects"),
        ("list", ["[1, 2"], [], "0.json [0]: has to be an object, not int"),
        ("list", ['[{"image": "a", "caption": "b"},\n{'], [], "0.json:2: is not JSON"),
        ("karpathy", [KARPATHY], ["--split", "tain"], "has no split 'tain'; its splits are train (2), test (1)"),
        ("coco", [CAPTIONS], ["--split", "train"], "--split is 'train', but files of this kind have no splits"),
        ("coco", [CAPTIONS], ["--images", "nowhere"], "--images: there is no folder nowhere"),
    ],
)
def test_what_is_refused_is_named_with_its_place(convert, kind, values, options, problem):
    rows, told = convert(kind, values, *options)
    assert rows is None and problem in told


def test_an_output_that_cannot_be_written(run, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(KARPATHY))
    done = run("rows", "karpathy", tmp_path / "a.json", "-o", tmp_path / "absent" / "rows.jsonl")
    assert done.exit_code == 1 and "absent/rows.jsonl: cannot be written" in done.stderr


def test_every_kind_is_in_the_help(run):
    told = run("rows", "--help").stdout
    assert all(f"\n  {name} " in told for name in KINDS)
