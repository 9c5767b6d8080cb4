"""Well-known benchmarks: their files, prompts, decoding and published scores.

Published scores are from the paper (arXiv 2301.12597) and from the settings files of the authors' library (LAVIS).
Schemas are those of `blip2.data.kinds`; a mirror is a data set on the Hugging Face hub as parquet, with images.
"""

from __future__ import annotations

from dataclasses import replace

from blip2.data.kinds import KINDS, Joined, Kind
from blip2.evaluate.benchmark import (
    ANSWERS,
    ANSWERS_LAVIS,
    ASK,
    CAPTION,
    CAPTIONS,
    CAPTIONS_LAVIS,
    CHOOSE,
    OKVQA,
    OKVQA_LAVIS,
    ONE_ANSWER,
    PAIR,
    PAIRS,
    RETRIEVAL,
    RETRIEVE,
    Benchmark,
    Layout,
    Origin,
    Published,
    Settings,
)

# ---- models ----

OPT_2, OPT_6 = "Salesforce/blip2-opt-2.7b", "Salesforce/blip2-opt-6.7b"
XL, XXL = "Salesforce/blip2-flan-t5-xl", "Salesforce/blip2-flan-t5-xxl"
OPT_2_COCO, OPT_6_COCO, XL_COCO = f"{OPT_2}-coco", f"{OPT_6}-coco", f"{XL}-coco"
ITM_COCO = "Salesforce/blip2-itm-vit-g-coco"


def _by_model(name: str, **scores: float) -> dict[str, dict[str, float]]:
    models = {"opt_2": OPT_2, "opt_6": OPT_6, "xl": XL, "xxl": XXL}
    return {models[model]: {name: score} for model, score in scores.items()}


# ---- file kinds that are not for training ----

MIRRORED_CAPTIONS = Kind(
    help="", image=("{image}",), split="split",
    caption=("annotations_captions", "caption", "captions", "sentences_raw", "text", "answer"),
)  # fmt: skip
MIRRORED_QUESTIONS = Kind(help="", image=("{image}",), question=("question",), answer=("answers", "answer"))
MIRRORED_AOKVQA = replace(MIRRORED_QUESTIONS, answer=("direct_answers",))
MIRRORED_GQA = replace(
    MIRRORED_QUESTIONS, answer=("answer",), joined=Joined("images", "id", "imageId", ("image",))
)
TEST_QUESTIONS = Kind(
    help="", items="questions", image=("test2015/COCO_test2015_{image_id:012}.jpg",), question=("question",)
)
WINOGROUND = Kind(help="pairs of images and captions", image=("{image}",), caption=("caption",))

# ---- origins of files ----

HUB = "https://huggingface.co/datasets"
KARPATHY = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
LISTS = "https://storage.googleapis.com/sfr-vision-language-research/datasets"
COCO_VAL = Origin("val2014/", "http://images.cocodataset.org/zips/val2014.zip", "6.2 GB")
FLICKR = Origin("flickr30k-images/", "in the format of https://shannon.cs.illinois.edu/DenotationGraph/", "4.4 GB")
VG = Origin("images of Visual Genome", "https://homes.cs.washington.edu/~ranjay/visualgenome/api.html", "15 GB")


def _mirror(name: str, size: str) -> Origin:
    return Origin(f"or the parquet files of {name}, with the images", f"{HUB}/{name}", size)


COCO_LAYOUTS = (
    Layout(KINDS["karpathy"], ("*/dataset_coco.json",), "test"),
    Layout(KINDS["list"], ("*/coco_karpathy_test.json",)),
    Layout(MIRRORED_CAPTIONS, ("*coco*5k_test*/*.parquet",), "test"),
    Layout(MIRRORED_CAPTIONS, ("*coco*karpathy*/*test*.parquet",), "test"),
)
COCO_ORIGINS = (
    Origin("dataset_coco.json", KARPATHY, "36 MB"), COCO_VAL,
    Origin("or coco_karpathy_test.json of LAVIS", f"{LISTS}/coco_karpathy_test.json", "2 MB"),
    _mirror("nlphuji/mscoco_2014_5k_test_image_text_retrieval", "0.8 GB"),
)  # fmt: skip
FLICKR_LAYOUTS = (
    Layout(KINDS["karpathy"], ("*/dataset_flickr30k.json",), "test"),
    Layout(KINDS["list"], ("*/flickr30k_test.json",)),
    Layout(MIRRORED_CAPTIONS, ("*flickr*1k_test*/*.parquet",), "test"),
)
FLICKR_ORIGINS = (
    Origin("dataset_flickr30k.json", KARPATHY, "36 MB"), FLICKR,
    Origin("or flickr30k_test.json of LAVIS", f"{LISTS}/flickr30k_test.json", "0.4 MB"),
    _mirror("nlphuji/flickr_1k_test_image_text_retrieval", "0.15 GB"),
)  # fmt: skip
CAPTION_KEEP = {"id": ("cocoid", "image_id", "img_id", "id")}
QUESTION_KEEP = {"id": ("question_id", "id", "#"), "type": ("answer_type",)}
AOKVQA_LAYOUTS = (
    Layout(KINDS["aokvqa"], ("*/aokvqa_v1p0_val.json",)),
    Layout(MIRRORED_AOKVQA, ("*a-okvqa*/validation*.parquet",)),
)
AOKVQA_ORIGINS = (
    Origin("aokvqa_v1p0_val.json", "https://prior-datasets.s3.us-east-2.amazonaws.com/aokvqa/aokvqa_v1p0.tar.gz",
           "some MB"),
    Origin("val2017/", "http://images.cocodataset.org/zips/val2017.zip", "0.8 GB"),
    _mirror("HuggingFaceM4/A-OKVQA", "about 0.1 GB for validation"),
)  # fmt: skip
AOKVQA_KEEP = {
    "id": ("question_id",), "choices": ("choices",), "right": ("correct_choice_idx",),
    "is_difficult": ("difficult_direct_answer",),
}  # fmt: skip

TABLE_2, TABLE_3, TABLE_5 = (f"BLIP-2 paper, table {number}" for number in (2, 3, 5))
NOTED = "noted in LAVIS' settings for this evaluation"

BENCHMARKS: dict[str, Benchmark] = {
    "coco": Benchmark(
        title="COCO captions, Karpathy's test part", task=CAPTION, rows=5000, layouts=COCO_LAYOUTS,
        origins=COCO_ORIGINS, keep=CAPTION_KEEP, settings={"paper": CAPTIONS, "lavis": CAPTIONS_LAVIS},
        published={
            "paper": Published(f"{TABLE_3}, after training on COCO", {
                OPT_2_COCO: {"CIDEr": 145.8, "BLEU-4": 43.7}, OPT_6_COCO: {"CIDEr": 145.2, "BLEU-4": 43.5},
                XL_COCO: {"CIDEr": 144.5, "BLEU-4": 42.4},
            }),
            "lavis": Published(f"{NOTED}, before it had these penalties", {
                OPT_2_COCO: {"CIDEr": 146.1, "BLEU-4": 43.8, "SPICE": 25.2},
                OPT_6_COCO: {"CIDEr": 145.1, "BLEU-4": 43.4, "SPICE": 25.1},
            }),
        },
        server="coco", result="captions_val2014_blip2_results.json",
    ),
    "nocaps": Benchmark(
        title="NoCaps, validation, by domain", task=CAPTION, rows=4500,
        layouts=(
            Layout(KINDS["nocaps"], ("*/nocaps_val_4500_captions.json",)),
            Layout(MIRRORED_CAPTIONS, ("*nocaps*/validation*.parquet",)),
        ),
        origins=(
            Origin("nocaps_val_4500_captions.json and its images", "https://nocaps.org/download", "about 1.4 GB"),
            _mirror("lmms-lab/NoCaps, which has no domains", "about 1.4 GB for validation"),
        ),
        keep={"id": ("image_id", "img_id"), "type": ("domain",)},
        settings={
            "paper": CAPTIONS,
            "lavis": replace(CAPTIONS_LAVIS, image_size=224, prompt="", decoding={
                **CAPTIONS_LAVIS.decoding, "max_new_tokens": 80, "min_new_tokens": 10}),
        },
        published={"paper": Published(f"{TABLE_3}, after training on COCO", {
            OPT_2_COCO: {"CIDEr": 119.7, "SPICE": 15.4, "in-domain CIDEr": 123.0, "near-domain CIDEr": 117.8,
                         "out-domain CIDEr": 123.4},
            OPT_6_COCO: {"CIDEr": 121.0, "SPICE": 15.3, "in-domain CIDEr": 123.7, "near-domain CIDEr": 119.2,
                         "out-domain CIDEr": 124.4},
            XL_COCO: {"CIDEr": 121.6, "SPICE": 15.8, "in-domain CIDEr": 123.7, "near-domain CIDEr": 120.2,
                      "out-domain CIDEr": 124.8},
        })},
        server="coco", result="nocaps_val_results.json", has_domains=True,
    ),
    "flickr30k": Benchmark(
        title="Flickr30k captions, Karpathy's test part", task=CAPTION, rows=1000, layouts=FLICKR_LAYOUTS,
        origins=FLICKR_ORIGINS, keep={"id": ("img_id",)},
        settings={"paper": replace(CAPTIONS, image_size=224),
                  "lavis": replace(CAPTIONS_LAVIS, image_size=224)},
        published={"paper": Published("InstructBLIP paper, table 1, zero-shot; others measured 64 with this model", {
            XL: {"CIDEr": 76.1}})},
        server="coco", result="flickr30k_results.json",
    ),
    "vqav2": Benchmark(
        title="VQAv2, validation, zero-shot", task=ASK, rows=214_354,
        layouts=(
            Layout(KINDS["vqav2"], ("*/v2_openended_mscoco_val2014_questions.json",
                                    "*/v2_mscoco_val2014_annotations.json")),
            Layout(KINDS["list"], ("*/vqa_val.json",)),
            Layout(MIRRORED_QUESTIONS, ("*vqav2*/validation*.parquet",)),
        ),
        origins=(
            Origin("v2_OpenEnded_mscoco_val2014_questions.json and v2_mscoco_val2014_annotations.json",
                   "https://visualqa.org/download.html", "13 MB packed"), COCO_VAL,
            _mirror("lmms-lab/VQAv2", "tens of GB"),
        ),
        keep=QUESTION_KEEP, settings={"paper": ANSWERS, "lavis": ANSWERS_LAVIS},
        published={
            "paper": Published(TABLE_2, _by_model("accuracy", opt_2=53.5, opt_6=54.3, xl=63.1, xxl=65.2)),
            "lavis": Published(NOTED, {
                XL: {"accuracy": 63.13, "yes/no": 84.28, "number": 41.01, "other": 52.90},
                OPT_2: {"accuracy": 51.88},
            }),
        },
        server="vqa", result="v2_OpenEnded_mscoco_val2014_blip2_results.json",
    ),
    "vqav2-test-dev": Benchmark(
        title="VQAv2, test-dev, zero-shot; scored by its server", task=ASK, rows=107_394,
        layouts=(Layout(TEST_QUESTIONS, ("*/v2_openended_mscoco_test-dev2015_questions.json",)),),
        origins=(
            Origin("v2_OpenEnded_mscoco_test-dev2015_questions.json", "https://visualqa.org/download.html", "8 MB"),
            Origin("test2015/", "http://images.cocodataset.org/zips/test2015.zip", "12.4 GB"),
        ),
        keep=QUESTION_KEEP, settings={"paper": ANSWERS, "lavis": ANSWERS_LAVIS},
        published={"paper": Published(TABLE_2, _by_model("accuracy", opt_2=52.3, opt_6=52.6, xl=63.0, xxl=65.0))},
        server="vqa", result="v2_OpenEnded_mscoco_test-dev2015_blip2_results.json", is_scored=False,
    ),
    "okvqa": Benchmark(
        title="OK-VQA, validation, zero-shot", task=ASK, rows=5046,
        layouts=(
            Layout(KINDS["okvqa"], ("*/openended_mscoco_val2014_questions.json",
                                    "*/mscoco_val2014_annotations.json")),
            Layout(KINDS["list"], ("*/okvqa_val*.json",)),
            Layout(MIRRORED_QUESTIONS, ("*ok-vqa*/val*.parquet",)),
        ),
        origins=(
            Origin("OpenEnded_mscoco_val2014_questions.json and mscoco_val2014_annotations.json",
                   "https://okvqa.allenai.org/download.html", "1 MB packed"), COCO_VAL,
            _mirror("lmms-lab/OK-VQA", "0.83 GB"),
        ),
        keep=QUESTION_KEEP, settings={"paper": OKVQA, "lavis": OKVQA_LAVIS},
        published={
            "paper": Published(TABLE_2, _by_model("accuracy", opt_2=31.7, opt_6=36.4, xl=40.7, xxl=45.9)),
            "lavis": Published(NOTED, {XL: {"accuracy": 41.22}}),
        },
        server="vqa", result="OpenEnded_mscoco_val2014_blip2_results.json",
    ),
    "gqa": Benchmark(
        title="GQA, balanced test-dev, zero-shot", task=ASK, rows=12_578,
        layouts=(
            Layout(KINDS["gqa"], ("*/testdev_balanced_questions.json",)),
            Layout(MIRRORED_GQA, ("*/testdev_balanced_instructions*.parquet", "*/testdev_balanced_images*.parquet")),
        ),
        origins=(
            Origin("testdev_balanced_questions.json", "https://downloads.cs.stanford.edu/nlp/data/gqa/questions1.2.zip",
                   "1.4 GB"),
            Origin("its images", "https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip", "20 GB"),
            _mirror("lmms-lab/GQA, its folders testdev_balanced_*", "under 0.1 GB"),
        ),
        keep={"id": ("question_id", "#", "id"), "type": ("types",)},
        settings={"paper": ONE_ANSWER, "lavis": ANSWERS_LAVIS},
        published={
            "paper": Published(TABLE_2, _by_model("accuracy", opt_2=34.6, opt_6=36.4, xl=44.2, xxl=44.7)),
            "lavis": Published(NOTED, {XL: {"accuracy": 43.98}}),
        },
        server="gqa", result="testdev_balanced_predictions.json",
    ),
    "aokvqa": Benchmark(
        title="A-OKVQA, validation, direct answers", task=ASK, rows=1145, layouts=AOKVQA_LAYOUTS,
        origins=AOKVQA_ORIGINS, keep=AOKVQA_KEEP,
        settings={"paper": replace(ANSWERS, rule="aokvqa"), "lavis": replace(ANSWERS_LAVIS, rule="aokvqa")},
        server="aokvqa", result="predictions_val_direct_answer.json",
    ),
    "aokvqa-choices": Benchmark(
        title="A-OKVQA, validation, multiple choice", task=CHOOSE, rows=1145, layouts=AOKVQA_LAYOUTS,
        origins=AOKVQA_ORIGINS, keep=AOKVQA_KEEP,
        settings={"paper": Settings(image_size=224), "lavis": Settings(image_size=224, prompt=ANSWERS_LAVIS.prompt)},
        server="aokvqa", result="predictions_val_multiple_choice.json",
    ),
    "vg-qa": Benchmark(
        title="Visual Genome questions, all of them", task=ASK, rows=1_445_322,
        layouts=(
            Layout(KINDS["vg-qa"], ("*/question_answers.json",)),
            Layout(KINDS["list"], ("*/vg_qa.json",)),
        ),
        origins=(Origin("question_answers.json", VG.where, "0.8 GB"), VG),
        keep={"id": ("qa_id", "question_id")}, settings={"paper": ONE_ANSWER, "lavis": ANSWERS_LAVIS},
        server="vqa", result="vg_qa_results.json",
    ),
    "coco-retrieval": Benchmark(
        title="Retrieval on COCO, Karpathy's test part", task=RETRIEVE, rows=5000, layouts=COCO_LAYOUTS,
        origins=COCO_ORIGINS, keep=CAPTION_KEEP, settings={"paper": RETRIEVAL, "lavis": RETRIEVAL},
        published={"paper": Published(f"{TABLE_5}, after training on COCO", {ITM_COCO: {
            "text R@1": 85.4, "text R@5": 97.0, "text R@10": 98.5,
            "image R@1": 68.3, "image R@5": 87.7, "image R@10": 92.6,
        }})},
    ),
    "flickr30k-retrieval": Benchmark(
        title="Retrieval on Flickr30k, Karpathy's test part", task=RETRIEVE, rows=1000, layouts=FLICKR_LAYOUTS,
        origins=FLICKR_ORIGINS, keep={"id": ("img_id",)},
        settings={"paper": RETRIEVAL, "lavis": RETRIEVAL},
        published={"paper": Published(f"{TABLE_5}, zero-shot after training on COCO", {ITM_COCO: {
            "text R@1": 97.6, "text R@5": 100.0, "text R@10": 100.0,
            "image R@1": 89.7, "image R@5": 98.1, "image R@10": 98.9,
        }})},
    ),
    "winoground": Benchmark(
        title="Winoground", task=PAIR, rows=800,
        layouts=(
            Layout(WINOGROUND, ("*winoground*.parquet",)),
            Layout(WINOGROUND, ("*winoground*/examples.jsonl",)),
        ),
        origins=(Origin("examples.jsonl with images/, or the parquet files", f"{HUB}/facebook/winoground, whose terms "
            "have to be accepted", "some hundred MB"),),
        settings={"paper": PAIRS, "lavis": PAIRS},
    ),
}  # fmt: skip
