"""What is told of a model from its configuration is what loading makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from blip2 import checkpoint
from blip2.checkpoint.describe import by_pattern, describe, find, part_of, stored
from blip2.checkpoint.load import count_parameters
from blip2.checkpoint.quantize import quantization_in
from blip2.errors import CheckpointError, OptionError
from blip2.linear import Table, Weight
from blip2.published import PUBLISHED

KINDS = [(None, False), ("int8", False), ("int4", False), ("int4", True)]


def bytes_of(model: nn.Module) -> int:
    """What the loaded weights take, counted tensor by tensor."""
    tables = [module.weight for module in model.modules() if isinstance(module, Table)]
    has_head = getattr(getattr(model, "language", None), "output", None) is not None
    twice = sum(table.nbytes for table in tables if isinstance(table, Weight) and not has_head)
    return twice + sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize(("kind", "vision"), KINDS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_it_is_what_loading_makes(any_model: Path, kind: str | None, vision: bool, dtype: torch.dtype | None) -> None:
    quantization = checkpoint.quantization(kind, vision=vision)
    told = describe(checkpoint.read_config(any_model), dtype=dtype, quantization=quantization)
    model = checkpoint.load(any_model, dtype=dtype, quantize=quantization)
    assert told.num_bytes == bytes_of(model)
    assert told.num_parameters == count_parameters(checkpoint.load(any_model))
    quantized = {name for name, module in model.named_modules() if hasattr(module, "codes")}
    assert set(told.quantized) == quantized
    assert not quantized & told.kept.keys()
    for name, parameter in model.named_parameters():
        module = name.rpartition(".")[0]
        if module not in quantized:
            assert told.kept.get(name, told.kept.get(module)) == parameter.dtype


def test_matching_models(matching_model: Path) -> None:
    told = describe(checkpoint.read_config(matching_model), quantization=checkpoint.quantization("int8"))
    assert [part.name for part in told.parts] == ["vision", "qformer"]
    assert told.num_bytes == bytes_of(checkpoint.load(matching_model))
    assert told.quantized == {}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    """In fp32 they are as large as what is published, which has a few tables twice."""
    told = describe(PUBLISHED[name].config, dtype=torch.float32)
    assert told.num_bytes == 4 * told.num_parameters == pytest.approx(PUBLISHED[name].size_gb * 1e9, rel=0.02)


def test_layers_by_pattern() -> None:
    layers = {"a.0.x": 4, "a.1.x": 4, "a.0.y.2.z": 4, "a.1.y.2.z": 4, "a.2.x": 8, "head": 8}
    assert by_pattern(layers) == [("a.*.x", 2, 4), ("a.*.y.*.z", 2, 4), ("a.*.x", 1, 8), ("head", 1, 8)]


def test_parts() -> None:
    names = ["vision.blocks.0.qkv", "language.output", "projection.weight", "itm_head.bias", "qformer.query_tokens"]
    assert [part_of(name) for name in names] == ["vision", "language", "qformer", "qformer", "qformer"]


def test_stored(opt_model: Path, tmp_path: Path) -> None:
    model = checkpoint.load(opt_model)
    checkpoint.save(model, tmp_path, max_shard_size_bytes=40_000, dtype=torch.float16)
    told = stored(tmp_path)
    files = list(tmp_path.glob("*.safetensors"))
    assert (told.num_files, told.num_bytes) == (len(files), sum(path.stat().st_size for path in files))
    assert told.dtypes == (torch.float16,)
    files[0].unlink()
    with pytest.raises(CheckpointError, match=f"{files[0].name} is missing"):
        stored(tmp_path)


def test_how_a_folder_is_quantised(opt_model: Path, tmp_path: Path) -> None:
    int8, int4 = checkpoint.quantization("int8"), checkpoint.quantization("int4")
    assert quantization_in(opt_model) is None
    assert quantization_in(opt_model, int4) == int4
    assert int8 is not None
    model = checkpoint.load(opt_model, quantize=int8)
    checkpoint.save(model, tmp_path, quantization=int8.as_json())
    assert quantization_in(tmp_path) == quantization_in(tmp_path, int8) == int8
    with pytest.raises(OptionError, match="is already quantised to 8 bits"):
        quantization_in(tmp_path, int4)


def test_find_never_fetches(opt_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    name = "Salesforce/blip2-opt-2.7b"
    assert find(name) is None
    assert find(str(opt_model)) == opt_model
    assert find(None) == checkpoint.BUNDLED["miniature"]
    with pytest.raises(CheckpointError, match="nobody/nothing"):
        find("nobody/nothing")
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir(parents=True)  # a folder of that name is meant, as in loading
    assert find(name) == Path(name)
