"""``blip2 models``: each published model, what it needs, and whether it is here."""

import json
import shutil
from pathlib import Path

import pytest

from blip2.published import PUBLISHED

OPT = "Salesforce/blip2-opt-2.7b"


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_json(run):
    rows = {row["name"]: row for row in json.loads(run("models", "--json").stdout)}
    assert list(rows) == list(PUBLISHED)
    for name, model in PUBLISHED.items():
        row = rows[name]
        assert (row["purpose"], row["licence"], row["revision"]) == (model.purpose, model.licence, model.revision)
        assert row["download_bytes"] == pytest.approx(model.size_gb * 1e9)
        assert row["image_size_px"] == model.config.vision.image_size
        assert row["folder"] is None
    assert list(rows[OPT]["memory_bytes"]) == ["bfloat16", "int8", "int4"]
    assert list(rows["Salesforce/blip2-itm-vit-g"]["memory_bytes"]) == ["bfloat16"]
    needs = rows[OPT]["memory_bytes"]
    assert rows[OPT]["parameters"] == pytest.approx(3.74e9, rel=0.01)
    assert 15e9 > needs["bfloat16"] > needs["int8"] > needs["int4"] > 3e9


def test_the_table_fits_a_terminal(run):
    result = run("models")
    assert (result.exit_code, result.stderr) == (0, "")
    table = [line for line in result.stdout.splitlines() if line.startswith("Salesforce/")]
    assert sorted(line.split()[0] for line in table) == sorted(PUBLISHED)
    assert all(len(line) <= 80 for line in table)
    xxl = next(line for line in table if "xxl" in line)
    assert xxl.split()[1:] == ["12.2", "B", "48.9", "24.7", "13.7", "8.6", "224", "43206cb", "-"]
    assert all(family in result.stdout for family in ("qwen3", "gemma3_text", "dinov2_with_registers", "bert"))
    for model in PUBLISHED.values():
        assert model.purpose[1:] in result.stdout and model.licence in result.stdout


def test_what_is_here(run, cache, opt_model):
    folder = cache / "models--Salesforce--blip2-opt-2.7b" / "snapshots" / PUBLISHED[OPT].revision
    shutil.copytree(opt_model, folder)
    rows = {row["name"]: row["folder"] for row in json.loads(run("models", "--json").stdout)}
    assert Path(rows.pop(OPT)) == folder and set(rows.values()) == {None}
    assert [line.split()[0] for line in run("models").stdout.splitlines() if line.endswith(" yes")] == [OPT]
    (folder / "model.safetensors").unlink()  # as while it is being fetched
    assert " yes" not in run("models").stdout
