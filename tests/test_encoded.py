"""Encoded images on disk: what comes back is what was kept, and nothing else is taken for one."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from blip2 import checkpoint, linear
from blip2.encoded import EncodedImage
from blip2.errors import ImageError
from blip2.model import identity


@pytest.mark.parametrize("half", [False, True])
def test_there_and_back(tmp_path, half):
    image = EncodedImage(torch.randn(32, 768), "0123456789abcdef")
    image.save(tmp_path / "a.safetensors", half=half)
    back = EncodedImage.load(tmp_path / "a.safetensors")
    assert back.model == image.model
    assert torch.equal(back.queries_QD, image.queries_QD.half() if half else image.queries_QD)
    if half:  # 48 KiB and a few words
        assert 0 < (tmp_path / "a.safetensors").stat().st_size - 48 * 1024 < 300


def test_a_model_is_the_same_however_it_is_kept(opt_model, matching_model, monkeypatch):
    """What one saw, the other reads: weights packed for a CPU or not, in another precision, quantised."""
    for folder in (opt_model, matching_model):
        plain = checkpoint.load(folder)
        with monkeypatch.context() as patch:
            patch.setattr(linear, "MIN_PACKED_WEIGHTS", 0)
            packed = checkpoint.load(folder)
        assert not any(isinstance(weight, linear.Weight) for weight in plain.qformer.parameters())
        assert any(isinstance(weight, linear.Weight) for weight in packed.qformer.parameters())
        halved, quantized = checkpoint.load(folder, dtype=torch.bfloat16), checkpoint.load(folder, quantize="int8")
        assert {identity(model) for model in (packed, halved, quantized)} == {identity(plain)}
        with torch.no_grad():
            plain.qformer.query_tokens[0, 0, 0] += 1
        assert identity(plain) != identity(packed)


def test_an_older_one_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    EncodedImage(torch.zeros(2, 3)).save(path)
    EncodedImage(torch.ones(2, 3)).save(path)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("blip2.tensorfile.save_file", full)
    with pytest.raises(ImageError, match=r"a\.safetensors: cannot be written .*No space left"):
        EncodedImage(torch.zeros(2, 3)).save(path)
    assert torch.equal(EncodedImage.load(path).queries_QD, torch.ones(2, 3))
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_one_of_an_earlier_version_is_read(tmp_path):
    """Without a checksum."""
    save_file({"queries": torch.ones(2, 3)}, tmp_path / "a", {"format": "blip2 encoded image", "model": "0123"})
    image = EncodedImage.load(tmp_path / "a")
    assert torch.equal(image.queries_QD, torch.ones(2, 3)) and image.model == "0123"


def test_what_is_none(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(ImageError, match="cannot be read as an encoded image"):
        EncodedImage.load(path)
    save_file({"queries": torch.zeros(2, 3)}, path)
    with pytest.raises(ImageError, match="is a safetensors file, but not an encoded image"):
        EncodedImage.load(path)
    EncodedImage(torch.randn(20, 30)).save(path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ImageError, match="cannot be read as an encoded image"):
        EncodedImage.load(path)
