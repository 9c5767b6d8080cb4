"""The bundled model: whole, small, and right about the bundled images, whose pairs of kinds it never saw."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import blip2
from blip2 import checkpoint
from blip2.image import load_image, to_pixels
from blip2.model import Blip2Matcher
from blip2.text import Tokenizer
from miniature.texts import read_caption

ROOT = Path(__file__).parents[1]
SHOWN = {  # what is on each image, as a person would count
    "picture": ({"dog": 2, "boat": 1}, "blue"),
    "flowers": ({"dog": 2, "flower": 2}, "green"),
    "cats": ({"dog": 2, "cat": 4, "flower": 1}, "blue"),
}
NUMBERS = ("zero", "one", "two", "three", "four")


@pytest.fixture(scope="module")
def model() -> blip2.Pipeline:
    return blip2.load()


def test_both_checkpoints_are_small() -> None:
    sizes = [checkpoint.resolve(name).joinpath("model.safetensors").stat().st_size for name in checkpoint.BUNDLED]
    assert sum(sizes) <= 30_000_000


@pytest.mark.parametrize("name", SHOWN)
def test_it_answers_about_a_picture(model: blip2.Pipeline, name: str) -> None:
    counts, background = SHOWN[name]
    image = model.encode(ROOT / f"examples/{name}.png")
    asked = {f"how many {kind if kind == 'fish' else kind + 's'} are in the picture?": number
             for kind, number in (counts | {"horse": 0, "banana": 0}).items()}  # fmt: skip
    assert model.ask(image, list(asked)) == [NUMBERS[number] for number in asked.values()]
    assert model.ask(image, ["is there a dog in the picture?", "is there a bus?"]) == ["yes", "no"]
    assert model.ask(image, "what color is the background?") == background


MISNAMED = pytest.mark.xfail(strict=True, reason="captioned as two dogs and two fish; its questions are answered right")
"""As one caption in five (miniature/README.md); with the weights of the first round it was right."""


@pytest.mark.parametrize("name", ["picture", pytest.param("flowers", marks=MISNAMED), "cats"])
def test_its_caption_names_what_is_there(model: blip2.Pipeline, name: str) -> None:
    assert read_caption(model.caption(ROOT / f"examples/{name}.png")) == SHOWN[name][0]


def test_a_follow_up_rests_on_what_was_said(model: blip2.Pipeline) -> None:
    chat = model.chat(ROOT / "examples/picture.png")
    assert [chat.say(question) for question in ("how many dogs are there?", "and boats?", "and cats?")] == [
        "two", "one", "zero",
    ]  # fmt: skip


def test_the_matching_model_tells_right_captions_from_wrong_ones() -> None:
    folder = checkpoint.resolve("miniature-itm")
    matcher, tokenizer = checkpoint.load(folder), Tokenizer.from_folder(folder)
    assert isinstance(matcher, Blip2Matcher)
    settings = checkpoint.image_settings(folder)
    captions = ["two dogs and a boat", "four cats, two dogs and a flower", "two flowers and two dogs"]
    ids = [tokenizer.matching_ids(text, 32) for text in captions]
    text_BT = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ids], batch_first=True)
    mask_BT = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in ids], batch_first=True)
    for right, name in enumerate(("picture", "cats", "flowers")):
        picture = load_image(ROOT / f"examples/{name}.png")
        pixels = to_pixels([picture], size=settings.size, mean=settings.mean, std=settings.std)
        with torch.no_grad():
            patches_BPD = matcher.encode(pixels).expand(len(captions), -1, -1)
            logits_B2 = matcher.match(patches_BPD, text_BT, mask_BT)
        assert int(logits_B2[:, 1].argmax()) == right


def test_the_command_line_uses_it() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "blip2", "ask", "examples/picture.png", "how many dogs are in the picture?"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "two\n", "")
