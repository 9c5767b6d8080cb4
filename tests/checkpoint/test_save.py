"""Saving: in files of a size, the earlier model whole until the new one is, and a full disk is one line."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, safe_open

from blip2 import checkpoint
from blip2.checkpoint import save as save_function
from blip2.checkpoint.files import INDEX, WEIGHTS
from blip2.checkpoint.tensors import named_tensors
from blip2.errors import CheckpointError
from blip2.model import Blip2

save_module = __import__("sys").modules[save_function.__module__]


@pytest.fixture
def model(opt_model: Path) -> Blip2:
    return checkpoint.load(opt_model)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def test_files_of_at_most_a_size(model: Blip2, tmp_path: Path) -> None:
    checkpoint.save(model, tmp_path, max_shard_size_bytes=40_000)
    files = weights(tmp_path)
    assert [path.name for path in files] == [
        f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)
    ]
    index = json.loads((tmp_path / INDEX).read_text())
    inside = {name: path.name for path in files for name in load_file(path)}
    assert index["weight_map"] == inside
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for _, tensor in named_tensors(model))
    for path in files:
        tensors = load_file(path)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 40_000 or len(tensors) == 1
        assert safe_open(path, framework="pt").metadata() == {"format": "pt"}
    again = checkpoint.load(tmp_path)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))


def test_a_tensor_above_the_size_has_a_file_of_its_own(model: Blip2, tmp_path: Path) -> None:
    checkpoint.save(model, tmp_path, max_shard_size_bytes=1)
    assert len(weights(tmp_path)) == len(list(named_tensors(model)))
    checkpoint.load(tmp_path)


@pytest.mark.parametrize("sizes", [(10**9, 40_000), (40_000, 10**9), (20_000, 40_000), (40_000, 20_000)])
def test_an_earlier_save_of_another_size_leaves_nothing(model: Blip2, tmp_path: Path, sizes: tuple[int, int]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "model-of-something-else.safetensors").write_bytes(b"mine")
    (tmp_path / "model-00007-of-00009.safetensors.part").write_bytes(b"of a save that was killed")
    checkpoint.save(model, tmp_path, max_shard_size_bytes=sizes[0])
    with torch.no_grad():
        model.projection.bias += 1
    checkpoint.save(model, tmp_path, max_shard_size_bytes=sizes[1])
    assert torch.equal(checkpoint.load(tmp_path).projection.bias, model.projection.bias)
    (tmp_path / "fresh").mkdir()
    checkpoint.save(model, tmp_path / "fresh", max_shard_size_bytes=sizes[1])
    wanted = contents(tmp_path / "fresh").keys() | {"notes.txt", "model-of-something-else.safetensors"}
    shutil.rmtree(tmp_path / "fresh")
    assert contents(tmp_path).keys() == wanted


@pytest.fixture
def small_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """From the call on, no file of this process may grow beyond so many bytes: a write fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size_bytes: resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit", [1, 100, 60_000])
def test_a_full_disk_leaves_the_earlier_model(model: Blip2, tmp_path: Path, small_disk, limit: int) -> None:
    checkpoint.save(model, tmp_path)
    before = contents(tmp_path)
    with torch.no_grad():
        model.projection.bias += 1
    small_disk(limit)
    with pytest.raises(CheckpointError, match=r"cannot be written .*; free some space there, or save") as caught:
        checkpoint.save(model, tmp_path)
    small_disk(resource.RLIM_INFINITY)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert contents(tmp_path) == before


def test_a_failure_after_some_files_leaves_the_earlier_model(
    model: Blip2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(model, tmp_path, max_shard_size_bytes=60_000)
    before = contents(tmp_path)
    write, calls = save_module.save_file, []

    def full_at_the_third(*args, **keywords) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        write(*args, **keywords)

    monkeypatch.setattr(save_module, "save_file", full_at_the_third)
    with pytest.raises(CheckpointError, match="No space left on device"):
        checkpoint.save(model, tmp_path, max_shard_size_bytes=20_000)
    assert contents(tmp_path) == before


def test_a_folder_that_cannot_be_is_one_line(model: Blip2, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        checkpoint.save(model, tmp_path / "file" / "model")


def test_one_file_at_a_time_is_in_memory(model: Blip2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors are taken as they are written, not gathered first."""
    taken, seen = [], []
    write = save_module.save_file

    def one_by_one(model: Blip2) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in named_tensors(model):
            taken.append(name)
            yield name, tensor

    def noting(tensors: dict, *args, **keywords) -> None:
        seen.extend(tensors)
        assert taken[-1] == seen[-1]
        write(tensors, *args, **keywords)

    monkeypatch.setattr(save_module, "named_tensors", one_by_one)
    monkeypatch.setattr(save_module, "save_file", noting)
    checkpoint.save(model, tmp_path, max_shard_size_bytes=20_000)
    assert len(seen) == len(list(named_tensors(model)))


def test_quantised_tensors_are_not_cast_and_views_are_written(
    model: Blip2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the tensors are: codes beside their scales, rows of one tensor, one that is not contiguous."""
    fused = torch.arange(24.0).reshape(6, 4)
    tensors = {
        "query": fused[:3], "key": fused[3:], "turned": fused.T, "ids": torch.arange(3),
        "weight.scales": torch.ones(3, dtype=torch.bfloat16), "weight.codes": torch.arange(5, dtype=torch.uint8),
    }  # fmt: skip
    monkeypatch.setattr(save_module, "named_tensors", lambda model: iter(tensors.items()))
    quantization = {"bits": 8, "group_size": 4, "parts": ["language"]}
    checkpoint.save(model, tmp_path, dtype=torch.float16, quantization=quantization)
    written = load_file(tmp_path / WEIGHTS)
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(written[name], tensor.half() if tensor.dtype == torch.float32 else tensor), name
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["quantization_config"] == {"quant_method": "blip2"} | quantization


def test_saved_over_the_files_that_it_was_loaded_from(opt_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(opt_model, tmp_path / "model"))
    model = checkpoint.load(folder)
    checkpoint.save(model, folder)
    assert load_file(folder / WEIGHTS).keys() == load_file(opt_model / WEIGHTS).keys()
    for name, tensor in load_file(opt_model / WEIGHTS).items():
        assert torch.equal(load_file(folder / WEIGHTS)[name], tensor), name
    assert len({os.stat(path).st_mode for path in folder.iterdir() if path.name != "tokenizer.json"}) == 1


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantised_model_says_so_by_itself(any_model: Path, tmp_path: Path, kind: str) -> None:
    """Whoever saves it (`save_pretrained` among them): otherwise the folder could not be read again."""
    model = checkpoint.load(any_model, quantize=kind)
    checkpoint.save(model, tmp_path)
    again = checkpoint.load(tmp_path)
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
