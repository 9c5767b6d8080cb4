"""A program of notebooks, examples/drop_in.py, by the reference's classes and by ours: the same losses."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from blip2 import linear

pytest.importorskip("accelerate")
PROGRAM = Path(__file__).parents[2] / "examples" / "drop_in.py"


@pytest.fixture(scope="module")
def folder(any_model, tmp_path_factory):
    """A model whose tokenizer is set as the published ones are."""
    made = tmp_path_factory.mktemp("published")
    shutil.copytree(any_model, made, dirs_exist_ok=True)
    is_opt = json.loads((made / "config.json").read_text())["use_decoder_only_language_model"]
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>"}
    settings["padding_side"] = "left" if is_opt else "right"
    (made / "tokenizer_config.json").write_text(json.dumps(settings))
    return made


@pytest.mark.parametrize("is_packed", [False, True], ids=["small layers", "layers in oneDNN's order"])
def test_the_same_losses(folder, is_packed, monkeypatch, capfd):
    spec = importlib.util.spec_from_file_location("drop_in", PROGRAM)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    if is_packed:
        monkeypatch.setattr(linear, "MIN_PACKED_WEIGHTS", 1)
    theirs, ours = (program.main(library, str(folder)) for library in ("transformers", "blip2"))
    assert len(ours) == 6 and ours == pytest.approx(theirs, abs=1e-5, rel=1e-5)
    assert ours[4] != pytest.approx(ours[0], abs=1e-3), "nothing was learned"
