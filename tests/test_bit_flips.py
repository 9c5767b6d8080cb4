"""A bit that flips on the disk is an error that names the file, or changes nothing; never another answer.

    pytest -s -m slow tests/test_bit_flips.py     1,000 of them, and what became of them
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import blip2
from blip2 import checkpoint
from blip2.checkpoint.pickled import unpickled
from blip2.checkpoint.tensors import named_tensors
from blip2.encoded import EncodedImage
from blip2.errors import Blip2Error
from blip2.train.state import load_state, save_state
from tests.train.test_loop import Vector, recipe


class Kept(NamedTuple):
    """A file, where in it bits flip (bytes), and all that is to be had of it, comparable."""

    path: Path
    region: range
    answers: Callable[[], Any]


def an_index(folder: Path, matching_model: Path, pictures: list[str]) -> Kept:
    matcher, path = blip2.load(matching_model), folder / "photos.index"
    blip2.Index.update(path, pictures, matcher)

    def answers() -> Any:
        index = blip2.Index.open(path)
        found = index.search(matcher, "two dogs", 3), index.search_picture(matcher, pictures[1], 2)
        return found, index.near_duplicates(0.5), index.paths, index.kind, index.model_name

    return Kept(path, whole(path), answers)


def an_encoded_image(folder: Path, matching_model: Path, pictures: list[str]) -> Kept:
    path = folder / "seen.safetensors"
    EncodedImage(torch.randn(4, 16), "0123456789abcdef").save(path)

    def answers() -> Any:
        image = EncodedImage.load(path)
        return image.queries_QD.dtype, image.queries_QD.tolist(), image.model

    return Kept(path, whole(path), answers)


def a_training_state(folder: Path, matching_model: Path, pictures: list[str]) -> Kept:
    model = Vector()
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values())
    (model.weight**2).sum().backward()
    optimizer.step()
    save_state(folder, parameters, optimizer, recipe(folder), step=7)

    def answers() -> Any:
        model = Vector()
        parameters = dict(model.named_parameters())
        optimizer = torch.optim.AdamW(parameters.values())
        step = load_state(folder, parameters, optimizer, recipe(folder))
        moments = [{name: value.tolist() for name, value in state.items()} for state in optimizer.state.values()]
        return step, model.weight.tolist(), moments

    return Kept(folder / "state.safetensors", whole(folder / "state.safetensors"), answers)


def a_header_of_weights(folder: Path, matching_model: Path, pictures: list[str]) -> Kept:
    shutil.copytree(matching_model, folder, dirs_exist_ok=True)
    path = folder / "model.safetensors"

    def answers() -> Any:
        return {name: tensor.tolist() for name, tensor in named_tensors(checkpoint.load(folder))}

    return Kept(path, range(8 + int.from_bytes(path.read_bytes()[:8], "little")), answers)


def a_lavis_file(folder: Path, matching_model: Path, pictures: list[str]) -> Kept:
    path = folder / "stage2.pth"
    torch.save({"model": {f"weight{number}": torch.randn(20, 30) for number in range(4)}}, path)

    def answers() -> Any:
        return {name: tensor.tolist() for name, tensor in unpickled(path)["model"].items()}

    return Kept(path, whole(path), answers)


def whole(path: Path) -> range:
    return range(path.stat().st_size)


KINDS = {
    "index": an_index,
    "encoded image": an_encoded_image,
    "training state": a_training_state,
    "checkpoint's header": a_header_of_weights,
    "LAVIS file": a_lavis_file,
}


def flip(kept: Kept, number: int) -> Counter[str]:
    """Flip a random bit so many times; what became of it."""
    content, wanted, found = kept.path.read_bytes(), kept.answers(), Counter[str]()
    chance = random.Random(number)
    for _ in range(number):
        flipped = bytearray(content)
        flipped[chance.choice(kept.region)] ^= 1 << chance.randrange(8)
        kept.path.write_bytes(flipped)
        try:
            found["the same answer" if kept.answers() == wanted else "ANOTHER ANSWER"] += 1
        except Blip2Error as error:
            is_told = str(kept.path.parent) in str(error) and ";" in str(error) and "\n" not in str(error)
            found["an error that names the file" if is_told else f"UNCLEAR: {error}"] += 1
        except Exception as error:
            found[f"RAW: {error!r}"] += 1
    return found


@pytest.mark.parametrize("number", [20, pytest.param(250, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bits(kind, number, tmp_path, matching_model, pictures):
    found = flip(KINDS[kind](tmp_path, matching_model, pictures), number)
    print(f"\n{kind}: {number} flips, {dict(found)}")
    assert found.keys() <= {"the same answer", "an error that names the file"}
    assert found["an error that names the file"] > number / 2
