"""Where the files of well-known data sets have images and texts: the table for `blip2.data.convert`.

Schemas: the data sets' own pages and files (cocodataset.org, visualqa.org, okvqa.allenai.org, aokvqa, GQA,
visualgenome.org, nocaps.org, LLaVA); "list" is the format of BLIP's bootstrapped lists and LAVIS's annotations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from blip2.data.stream import MEMBER


@dataclass(frozen=True)
class Joined:
    """Records of another section to join: the ``fields`` of the record in ``section`` whose ``key`` equals the item's
    ``of``."""

    section: str
    key: str
    of: str
    fields: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """``help``: its files, on one short line. ``image``: templates of the image name; the first one counts whose fields
    exist (and whose file exists, if the folder of the images is known). ``items``: the section with the items, see
    `stream.Element`; ``within``: the list in each item that has the texts. Of text fields the first existing one
    counts. ``split``: the field with the split; ``renamed``: splits that count as others. ``by``: whether a row has all
    texts of an image, or one text."""

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
"""File names of 2014, and of 2017."""
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
