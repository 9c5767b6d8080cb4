"""Small benchmarks in the forms that the real ones have: a dozen drawn scenes, with their captions and questions."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from blip2.scores.answers import DIGITS
from miniature import texts, world
from tests import tiny

NUMBER = 12
needs_drawings = pytest.mark.skipif(not world.FONT_PATH.exists(), reason="needs fonts-noto-color-emoji")
"""What the bundled model says is right only of images of its world; all else is tested with any."""
FIRST_ID = 522400


@dataclass(frozen=True)
class Drawn:
    """An image with what is true of it. ``id``: of the image; its questions are id * 1000 and on."""

    id: int
    content: bytes
    captions: list[str]
    questions: list[tuple[str, str]]

    @property
    def file(self) -> str:
        return f"COCO_val2014_{self.id:012}.jpg"

    @property
    def cell(self) -> dict[str, Any]:
        """As `datasets` writes it."""
        return {"bytes": self.content, "path": None}

    def asked(self) -> list[tuple[int, str, str]]:
        return [(self.id * 1000 + number, *each) for number, each in enumerate(self.questions)]


@cache
def drawn() -> list[Drawn]:
    found = []
    for number in range(NUMBER):
        scene = world.make_scene(77_000_000 + number, "test")
        file = io.BytesIO()
        (world.render(scene) if world.FONT_PATH.exists() else tiny.picture(number)).save(file, "PNG")
        captions = [texts.plain_caption(scene, world.make_rng(number, at)) for at in range(5)]
        rng = world.make_rng(number, "questions")
        asked = [texts.ask(scene, rng, kind) for kind in ("count", "exist", "background")]
        questions = [(question.question, question.answer) for question in asked if question is not None]
        found.append(Drawn(FIRST_ID + number, file.getvalue(), captions, questions[: 1 + number % 3]))
    return found


def pictures(folder: Path, name: str = "{}") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for each in drawn():
        (folder / name.format(each.file)).write_bytes(each.content)


def text(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def ten(answer: str) -> list[dict[str, Any]]:
    """Of ten people, of whom two say something else; numbers are digits there."""
    said = [DIGITS.get(answer, answer)] * 8 + ["something else"] * 2
    return [{"answer": each, "answer_confidence": "yes", "answer_id": at} for at, each in enumerate(said, 1)]


# ---- captions ----


def karpathy(folder: Path, *, name: str = "dataset_coco.json") -> None:
    pictures(folder / "val2014")
    images = [
        {"filepath": "val2014", "filename": each.file, "cocoid": each.id, "split": "test",
         "sentences": [{"raw": caption, "tokens": caption.split()} for caption in each.captions]}
        for each in drawn()
    ]  # fmt: skip
    images.append({**images[0], "split": "train", "cocoid": 1})
    text(folder / "annotations" / name, {"images": images, "dataset": "coco"})


def coco_list(folder: Path) -> None:
    pictures(folder / "coco" / "images" / "val2014")
    rows = [{"image": f"val2014/{each.file}", "caption": each.captions} for each in drawn()]
    text(folder / "coco" / "annotations" / "coco_karpathy_test.json", rows)


def coco_mirror(folder: Path) -> None:
    rows = [{"image": each.cell, "caption": each.captions, "cocoid": each.id, "split": "test"} for each in drawn()]
    parquet(folder / "mscoco_2014_5k_test_image_text_retrieval" / "data" / "test-00000-of-00001.parquet", rows)


def flickr_karpathy(folder: Path) -> None:
    pictures(folder / "flickr30k-images")
    images = [
        {"filename": each.file, "split": "test", "sentences": [{"raw": caption} for caption in each.captions]}
        for each in drawn()
    ]
    text(folder / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})


def flickr_list(folder: Path) -> None:
    pictures(folder / "flickr30k" / "images" / "flickr30k-images")
    rows = [{"image": f"flickr30k-images/{each.file}", "caption": each.captions} for each in drawn()]
    text(folder / "flickr30k" / "annotations" / "flickr30k_test.json", rows)


def flickr_mirror(folder: Path) -> None:
    rows = [{"image": each.cell, "caption": each.captions, "img_id": str(each.id)} for each in drawn()]
    parquet(folder / "flickr_1k_test_image_text_retrieval" / "data" / "test-00000-of-00001.parquet", rows)


def nocaps(folder: Path) -> None:
    pictures(folder / "nocaps" / "val")
    domains = ["in-domain", "near-domain", "out-domain"]
    images = [{"id": at, "file_name": each.file, "domain": domains[at % 3]} for at, each in enumerate(drawn())]
    said = [{"image_id": at, "caption": caption, "id": at * 10 + number}
            for at, each in enumerate(drawn()) for number, caption in enumerate(each.captions)]  # fmt: skip
    text(folder / "nocaps" / "nocaps_val_4500_captions.json", {"images": images, "annotations": said})


def nocaps_mirror(folder: Path) -> None:
    rows = [{"image": each.cell, "image_id": at, "annotations_captions": each.captions, "image_file_name": each.file}
            for at, each in enumerate(drawn())]  # fmt: skip
    parquet(folder / "lmms-lab" / "NoCaps" / "data" / "validation-00000-of-00001.parquet", rows)


# ---- questions ----


def questions_and_annotations(folder: Path, questions: str, annotations: str) -> None:
    pictures(folder / "val2014")
    asked = [
        {"question_id": name, "image_id": each.id, "question": question}
        for each in drawn() for name, question, _ in each.asked()
    ]  # fmt: skip
    told = [
        {"question_id": name, "image_id": each.id, "answer_type": "number" if answer.isalpha() else "other",
         "question_type": "how many", "multiple_choice_answer": answer, "answers": ten(answer)}
        for each in drawn() for name, _, answer in each.asked()
    ]  # fmt: skip
    told = told[::2] + told[1::2]  # images do not stand side by side
    text(folder / "vqa" / questions, {"info": {}, "data_subtype": "val2014", "questions": asked})
    text(folder / "vqa" / annotations, {"info": {}, "data_subtype": "val2014", "annotations": told})


def vqav2(folder: Path) -> None:
    questions_and_annotations(
        folder, "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"
    )


def okvqa(folder: Path) -> None:
    questions_and_annotations(folder, "OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json")


def test_dev(folder: Path) -> None:
    pictures(folder / "test2015")
    for path in (folder / "test2015").iterdir():
        path.rename(path.with_name(path.name.replace("val2014", "test2015")))
    asked = [
        {"question_id": name, "image_id": each.id, "question": question}
        for each in drawn() for name, question, _ in each.asked()
    ]  # fmt: skip
    found = {"data_subtype": "test-dev2015", "questions": asked}
    text(folder / "v2_OpenEnded_mscoco_test-dev2015_questions.json", found)


def sentence(answer: str) -> str:
    """As Visual Genome has them."""
    return f"{answer.capitalize()}."


def answer_list(folder: Path, name: str, *, people: bool = True, said: Any = str) -> None:
    """As the authors' library has them."""
    pictures(folder / "images" / "val2014")
    rows = [
        {"question_id": number, "question": question, "image": f"val2014/{each.file}",
         "answer": [each["answer"] for each in ten(answer)] if people else said(answer)}
        for each in drawn() for number, question, answer in each.asked()
    ]  # fmt: skip
    text(folder / "annotations" / name, rows)


def question_mirror(folder: Path, path: str, *, objects: bool) -> None:
    rows = [
        {"image": each.cell, "question_id": name if objects else str(name), "question": question,
         "answers": ten(answer) if objects else [one["answer"] for one in ten(answer)], "answer_type": "other"}
        for each in drawn() for name, question, answer in each.asked()
    ]  # fmt: skip
    parquet(folder / path, rows)


def gqa(folder: Path) -> None:
    pictures(folder / "gqa" / "images")
    for each in drawn():
        (folder / "gqa" / "images" / each.file).rename(folder / "gqa" / "images" / f"n{each.id}.jpg")
    found = {
        str(name): {"imageId": f"n{each.id}", "question": question, "answer": answer, "isBalanced": True,
                    "types": {"structural": "query" if number else "verify"}}
        for each in drawn() for number, (name, question, answer) in enumerate(each.asked())
    }  # fmt: skip
    text(folder / "gqa" / "testdev_balanced_questions.json", found)


def gqa_mirror(folder: Path) -> None:
    asked = [
        {"id": str(name), "imageId": f"n{each.id}", "question": question, "answer": answer,
         "types": {"structural": "query"}}
        for each in drawn() for name, question, answer in each.asked()
    ]  # fmt: skip
    parquet(folder / "GQA" / "testdev_balanced_instructions" / "testdev-00000-of-00001.parquet", asked)
    images = [{"id": f"n{each.id}", "image": each.cell} for each in drawn()]
    parquet(folder / "GQA" / "testdev_balanced_images" / "testdev-00000-of-00001.parquet", images)


def _aokvqa(each: Drawn) -> dict[str, Any]:
    question, answer = each.questions[0]
    choices = [*dict.fromkeys(["purple", answer, "nothing at all", "seven"])]
    return {
        "question_id": f"q{each.id}", "question": question, "choices": choices,
        "direct_answers": [answer] * 2 + ["x"] * 8,
        "correct_choice_idx": choices.index(answer), "difficult_direct_answer": each.id % 4 == 0,
    }  # fmt: skip


def aokvqa(folder: Path) -> None:
    pictures(folder / "val2017")
    rows = []
    for each in drawn():
        (folder / "val2017" / each.file).rename(folder / "val2017" / f"{each.id:012}.jpg")
        rows.append({**_aokvqa(each), "split": "val", "image_id": each.id})
    text(folder / "aokvqa_v1p0_val.json", rows)


def aokvqa_mirror(folder: Path) -> None:
    rows = [
        {**row, "image": each.cell, "direct_answers": str(row["direct_answers"])}
        for each in drawn() for row in [_aokvqa(each)]
    ]  # fmt: skip
    parquet(folder / "A-OKVQA" / "data" / "validation-00000-of-00001.parquet", rows)


def vg(folder: Path) -> None:
    pictures(folder / "VG_100K")
    rows = []
    for each in drawn():
        (folder / "VG_100K" / each.file).rename(folder / "VG_100K" / f"{each.id}.jpg")
        rows.append({"id": each.id, "qas": [{"qa_id": name, "image_id": each.id, "question": question,
                                             "answer": sentence(answer)}
                                            for name, question, answer in each.asked()]})  # fmt: skip
    text(folder / "question_answers.json", rows)


# ---- pairs ----


def _pairs() -> list[tuple[Drawn, Drawn]]:
    return list(zip(drawn()[::2], drawn()[1::2], strict=True))


def winoground(folder: Path) -> None:
    root = folder / "winoground"
    (root / "images").mkdir(parents=True)
    lines = []
    for number, pair in enumerate(_pairs()):
        row: dict[str, Any] = {"id": number, "collapsed_tag": "Object"}
        for side, each in enumerate(pair):
            (root / "images" / f"ex_{number}_img_{side}.png").write_bytes(each.content)
            row |= {f"image_{side}": f"ex_{number}_img_{side}", f"caption_{side}": each.captions[0]}
        lines.append(json.dumps(row) + "\n")
    (root / "examples.jsonl").write_text("".join(lines))


def winoground_mirror(folder: Path) -> None:
    rows = [
        {"id": number, "image_0": first.cell, "image_1": second.cell, "caption_0": first.captions[0],
         "caption_1": second.captions[0], "collapsed_tag": "Object"}
        for number, (first, second) in enumerate(_pairs())
    ]  # fmt: skip
    parquet(folder / "winoground" / "data" / "test-00000-of-00001.parquet", rows)


LAYOUTS = {
    "coco": {"official": karpathy, "lavis": coco_list, "mirror": coco_mirror},
    "nocaps": {"official": nocaps, "mirror": nocaps_mirror},
    "flickr30k": {"official": flickr_karpathy, "lavis": flickr_list, "mirror": flickr_mirror},
    "vqav2": {
        "official": vqav2, "lavis": lambda folder: answer_list(folder, "vqa_val.json"),
        "mirror": lambda folder: question_mirror(folder, "VQAv2/data/validation-00000-of-00001.parquet", objects=True),
    },
    "vqav2-test-dev": {"official": test_dev},
    "okvqa": {
        "official": okvqa, "lavis": lambda folder: answer_list(folder, "okvqa_val_eval.json"),
        "mirror": lambda folder: question_mirror(folder, "OK-VQA/data/val2014-00000-of-00001.parquet", objects=False),
    },
    "gqa": {
        "official": gqa, "mirror": gqa_mirror,
        "lavis": lambda folder: answer_list(folder, "testdev_balanced_questions.json", people=False),
    },
    "aokvqa": {"official": aokvqa, "mirror": aokvqa_mirror},
    "aokvqa-choices": {"official": aokvqa, "mirror": aokvqa_mirror},
    "vg-qa": {"official": vg, "lavis": lambda folder: answer_list(folder, "vg_qa.json", people=False, said=sentence)},
    "coco-retrieval": {"official": karpathy, "lavis": coco_list, "mirror": coco_mirror},
    "flickr30k-retrieval": {"official": flickr_karpathy, "lavis": flickr_list, "mirror": flickr_mirror},
    "winoground": {"official": winoground, "mirror": winoground_mirror},
}  # fmt: skip
"""By benchmark and form: what writes it into a folder."""
