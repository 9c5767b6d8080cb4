"""The two stages on a data set of others: easy-VQA, drawn shapes with questions and answers (Victor Zhou, MIT).

    pip download --no-deps easy-vqa && unzip easy_vqa-1.0-py3-none-any.whl easy_vqa/*
    python -m miniature.easy_vqa easy_vqa WORK         (rows, language model, start; then the two stages)
    blip2 evaluate WORK/test.jsonl -m WORK/stage2 -o WORK/scores

The image encoder is the bundled miniature's, frozen, which has seen emoji and no drawn shapes. The bundled language
model reads texts about shapes first (no images), because it knows no "triangle", and is frozen then. The Q-Former is
new. An image shows one shape: what it is follows from the answers about it, and is its
caption. 4,000 images and 38,575 questions to learn from, 1,000 and 9,673 to be tested on.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer

from blip2 import checkpoint
from blip2.model import Blip2, Blip2Matcher
from blip2.train import run
from miniature.language import NEWLINE, collate, language_losses
from miniature.schedule import train

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
CAPTIONS = ("a {} {}", "an image of a {} {}", "there is a {} {}")
STEPS, BATCH_SIZE = 600, 64
RECIPE = """
stage = {stage}
start = "{start}"
{qformer}
out = "stage{stage}"
seed = 1
checkpoint_every = 200
evaluate_every = 400
log_every = 20

[data]
rows = "{rows}"
on_bad_picture = "stop"
features = "features"
{data}

[optim]
steps = {steps}
batch_size = 64
peak_lr = 1e-3
min_lr = 2e-5
warmup_steps = 100
clip = 1.0
"""
HELD_OUT = """
[evaluation]
rows = "test.jsonl"
max_rows = 768
"""

Shown = tuple[str, str]
"""Colour and shape."""


def asked(folder: Path, split: str) -> dict[int, list[tuple[str, str]]]:
    """Questions and answers about each image."""
    found = defaultdict(list)
    for question, answer, picture in json.loads((folder / "data" / split / "questions.json").read_text()):
        found[picture].append((question, answer))
    return dict(sorted(found.items()))


def shown(turns: list[tuple[str, str]]) -> Shown | None:
    """What the image shows, where the answers tell. "is there a red shape", "yes"; but not "is there not a ..."."""
    said = [answer for _, answer in turns]
    for question, answer in turns:
        is_there = (answer == "yes") != (" not " in question or " no " in question)
        if answer in ("yes", "no") and is_there:
            said += question.rstrip("?").split()
    colours, shapes = [word for word in COLOURS if word in said], [word for word in SHAPES if word in said]
    return (colours[0], shapes[0]) if len(colours) == len(shapes) == 1 else None


def write_rows(source: Path, folder: Path) -> dict[Shown, list[tuple[str, str]]]:
    """train.jsonl, captions-train.jsonl and test.jsonl; gives what is asked about each image of training."""
    known: dict[Shown, set[tuple[str, str]]] = defaultdict(set)
    for split in ("train", "test"):
        with (folder / f"{split}.jsonl").open("w") as file, (folder / f"captions-{split}.jsonl").open("w") as captioned:
            for number, turns in asked(source, split).items():
                image = {"image": str((source / "data" / split / "images" / f"{number}.png").resolve())}
                if split == "test":
                    for question, answer in turns:
                        kind = "yes or no" if answer in ("yes", "no") else "colour" if answer in COLOURS else "shape"
                        row = image | {"question": question, "answer": answer, "type": kind}
                        file.write(json.dumps(row) + "\n")
                    continue
                told = shown(turns)
                questions = [{"question": question, "answer": answer} for question, answer in turns]
                captions = {}
                if told is not None:
                    known[told] |= set(turns)
                    captions = {"captions": [caption.format(*told) for caption in CAPTIONS]}
                    captioned.write(json.dumps(image | captions) + "\n")
                file.write(json.dumps(image | captions | {"questions": questions}) + "\n")
    return {told: sorted(turns) for told, turns in sorted(known.items())}


def documents(known: dict[Shown, list[tuple[str, str]]], tokenizer: Tokenizer) -> Iterator[tuple]:
    """Texts to learn from, for ever: a description, then a caption or questions, as in `language.segments`."""
    chance = random.Random(0)
    while True:
        told = chance.choice(list(known))
        pieces = [("a {} {}".format(*told), 0.3), ("</s>", 0.0)]
        if chance.random() < 0.5:
            pieces += [(chance.choice(CAPTIONS).format(*told), 1.0), (NEWLINE, 1.0)]
        for question, answer in chance.sample(known[told], 5):
            pieces += [(f"Question: {question} Answer:", 0.1), (f" {answer}", 1.0), (NEWLINE, 1.0)]
        tokens, weights = [], []
        for text, weight in pieces:
            ids = [2] if text == "</s>" else tokenizer.encode(text, add_special_tokens=False).ids
            tokens += ids
            weights += [weight] * len(ids)
        yield tokens, weights, tokens.index(2)


def write_start(known: dict[Shown, list[tuple[str, str]]], folder: Path) -> None:
    """``start-matching`` and ``start-generative``: the bundled parts, the language model taught, new Q-Formers."""
    bundled = checkpoint.resolve("miniature")
    begun = checkpoint.load(bundled, dtype=torch.float32)
    assert isinstance(begun, Blip2)
    path = bundled / "tokenizer.json"
    source = documents(known, Tokenizer.from_file(str(path)))
    batches = (collate([next(source) for _ in range(BATCH_SIZE)]) for _ in iter(int, 1))

    def right(model: torch.nn.Module) -> dict[str, float]:
        with torch.no_grad():
            return {"lm": language_losses(model, next(batches))["lm"].item()}  # type: ignore[arg-type]

    train(begun.language.train(), batches, language_losses, steps=STEPS, peak=5e-4, checkpoint=folder / "language.pt",
          evaluate=right)  # type: ignore[arg-type]  # fmt: skip
    generative = Blip2(begun.config)
    generative.vision, generative.language = begun.vision, begun.language.eval()
    checkpoint.save(generative, folder / "start-generative", tokenizer=path)
    bundled = checkpoint.resolve("miniature-itm")
    found = checkpoint.load(bundled, dtype=torch.float32)
    assert isinstance(found, Blip2Matcher)
    matching = Blip2Matcher(found.config)
    matching.vision = found.vision
    checkpoint.save(matching, folder / "start-matching", tokenizer=bundled / "tokenizer.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the package's folder, which has data/train and data/test")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, nargs=2, default=(250, 500), help="of stage 1, of stage 2")
    options = parser.parse_args()
    torch.manual_seed(0)
    options.folder.mkdir(parents=True, exist_ok=True)
    known = write_rows(options.source, options.folder)
    if not (options.folder / "start-matching").exists():
        write_start(known, options.folder)
    mix = "texts_per_image = 6\nmix = { captions = 1.0, questions = 8.0 }"
    for stage, start, rows, qformer, data in (
        (1, "start-matching", "captions-train.jsonl", "", ""),  # the answers about some do not tell what is shown
        (2, "start-generative", "train.jsonl", 'qformer = "stage1"', mix),
    ):
        path = options.folder / f"stage{stage}.toml"
        held_out = HELD_OUT if stage == 2 else ""  # the test's rows have no captions
        path.write_text(
            RECIPE.format(
                stage=stage, start=start, rows=rows, qformer=qformer, data=data, steps=options.steps[stage - 1]
            )
            + held_out
        )
        run(path)


if __name__ == "__main__":
    main()
