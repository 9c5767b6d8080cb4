"""Where the files of well-known data sets have pictures and texts: a table, which `blip2.data.convert` goes by.

Schemas: the data sets' own pages and files (cocodataset.org, visualqa.org, okvqa.allenai.org, aokvqa, GQA,
visualgenome.org, nocaps.org, LLaVA); "list" is what BLIP's bootstrapped lists and LAVIS's annotations are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from blip2.data.stream import MEMBER


@dataclass(frozen=True)
class Joined:
    """Other records of the same files: those of ``section``, found by their ``key`` in what an item has as ``of``.
    ``fields`` are kept of them."""

    section: str
    key: str
    of: str
    fields: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """``help``: its files, on one short line. ``image``: names of the picture, of which the first is taken whose fields
    are there (and which is there, if the folder of the pictures is known). ``items``: the section that holds items, see
    `stream.Element`; ``within``: the list in each item that holds what is said. Of texts the first field counts that is
    there. ``split``: the field that names a part of the data set; ``renamed``: parts that count as others. ``by``:
    whether a row is a picture with all that is said of it, or one text."""

    help: str
    image: tuple[str, ...]
    items: str = ""
    within: str = ""
    joined: Joined | None = None
    caption: tuple[str, ...] = ()
    question: tuple[str, ...] = ()
    answer: tuple[str, ...] = ()
    talk: tuple[str, ...] = ()
    split: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict)
    by: str = "text"


COCO_IMAGE = ("{data_subtype}/COCO_{data_subtype}_{image_id:012}.jpg", "{image_id:012}.jpg")
"""Of 2014; of 2017."""
QUESTIONS = Joined("questions", "question_id", "question_id", ("question", "image_id"))
VG_IMAGE = ("{image_id}.jpg",)

KINDS = {
    "karpathy": Kind(
        help="dataset_coco.json, dataset_flickr30k.json; restval counts as train",
        items="images", within="sentences", image=("{filepath}/{filename}", "{filename}"), caption=("raw",),
        split="split", renamed={"restval": "train"}, by="picture",
    ),
    "coco": Kind(
        help="captions_train2017.json",
        items="annotations", joined=Joined("images", "id", "image_id", ("file_name",)), image=("{file_name}",),
        caption=("caption",), by="picture",
    ),
    "nocaps": Kind(
        help="nocaps_val_4500_captions.json; the domains are its splits",
        items="annotations", joined=Joined("images", "id", "image_id", ("file_name", "domain")), image=("{file_name}",),
        caption=("caption",), split="domain", by="picture",
    ),
    "vqav2": Kind(
        help="questions and annotations, two files",
        items="annotations", joined=QUESTIONS, image=COCO_IMAGE, question=("question",), answer=("answers",),
    ),
    "okvqa": Kind(
        help="questions and annotations, two files",
        items="annotations", joined=QUESTIONS, image=COCO_IMAGE, question=("question",), answer=("answers",),
    ),
    "aokvqa": Kind(
        help="aokvqa_v1p0_train.json; the direct answers",
        image=("{split}2017/{image_id:012}.jpg", "{image_id:012}.jpg"), question=("question",),
        answer=("direct_answers",), split="split",
    ),
    "gqa": Kind(
        help="train_balanced_questions.json",
        items=MEMBER, image=("{imageId}.jpg",), question=("question",), answer=("answer",),
    ),
    "vg-regions": Kind(
        help="region_descriptions.json; regions are captions",
        within="regions", image=VG_IMAGE, caption=("phrase",), by="picture",
    ),
    "vg-qa": Kind(
        help="question_answers.json",
        within="qas", image=VG_IMAGE, question=("question",), answer=("answer",),
    ),
    "llava": Kind(
        help="llava_instruct_150k.json; conversations",
        image=("{image}",), talk=("conversations",),
    ),
    "list": Kind(
        help="[{image or url, caption}] of BLIP and LAVIS; also questions, or JSON lines",
        image=("{image}", "{url}"), caption=("caption", "captions", "text"), question=("question",),
        answer=("answers", "answer"),
    ),
}  # fmt: skip
