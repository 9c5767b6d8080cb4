"""Rows about the shared images, and recipes that train tiny models on them within a second."""

from __future__ import annotations

import json

import pytest

# Words that the tiny tokenizers know the letters of.
COLOURS = ["red", "green", "white", "grey", "teal", "orange", "coral", "silver"]


@pytest.fixture(scope="session", params=["opt", "t5", "llama"])
def any_model(request, tmp_path_factory):
    """The folder of a tiny random model of each kind that is trained here."""
    from tests import tiny

    return tiny.save_generative(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def rows(pictures, tmp_path):
    """Eight rows with every kind of text."""
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for picture, colour in zip(pictures, COLOURS, strict=True):
            row = {
                "image": picture,
                "captions": [f"two dogs and a {colour} car", f"a {colour} car and two dogs"],
                "questions": [
                    {"question": "what colour is the car?", "answer": colour},
                    {"question": "how many dogs are there?", "answer": "two"},
                ],
                "dialogues": [
                    [
                        {"question": "is there a car?", "answer": "yes"},
                        {"question": "what colour?", "answer": colour},
                        {"question": "and dogs?", "answer": "two"},
                    ]
                ],
            }
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture
def write_recipe(rows, tmp_path):
    """``write_recipe(stage, start)`` gives the path of a recipe that trains for six steps into ``out``."""

    def write(stage, start):
        path = tmp_path / f"stage{stage}.toml"
        path.write_text(
            f"""
            stage = {stage}
            start = "{start}"
            out = "out{stage}"
            precision = "fp32"
            threads = 1
            log_every = 1
            checkpoint_every = 4
            evaluate_every = 3
            [data]
            rows = "{rows}"
            features = "features"
            max_prompt_tokens = 64
            texts_per_image = {1 if stage == 1 else 3}
            [optim]
            steps = 6
            batch_size = 4
            warmup_steps = 2
            peak_lr = 1e-3
            [evaluation]
            rows = "{rows}"
            """
        )
        return path

    return write
