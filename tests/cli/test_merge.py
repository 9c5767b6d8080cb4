"""``--adapter`` and ``blip2 merge``, with an adapter in the layout that `peft` writes."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import blip2
from blip2 import checkpoint
from tests import tiny

RANK, ALPHA = 2, 6
MODULES = (
    "qformer.encoder.layer.0.crossattention.attention.value",
    "qformer.encoder.layer.1.output_query.dense",
    "vision_model.encoder.layers.0.self_attn.qkv",
    "language_projection",
)


def write_adapter(folder, base, *, strength=0.5, modules=MODULES, **config):
    """A LoRA of ``modules`` with random matrices."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for module in modules:
        rows, columns = load_file(base / "model.safetensors")[f"{module}.weight"].shape
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator)
        tensors[f"base_model.model.{module}.lora_B.weight"] = strength * torch.randn(rows, RANK, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    content = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "use_rslora": False} | config
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


def test_heads_that_share_keys(tmp_path):
    """Queries have more rows than keys and values, which are one layer with them here."""
    base = tiny.save_generative("llama", tmp_path / "base")
    before = load_file(base / "model.safetensors")
    modules = [f"language_model.model.layers.1.self_attn.{name}_proj" for name in "qkv"]
    assert len({before[f"{module}.weight"].shape[0] for module in modules}) == 2
    adapter = write_adapter(tmp_path / "adapter", base, modules=modules)
    checkpoint.save(blip2.load(base, adapter=adapter, dtype="float32").speaker.model, tmp_path / "merged")
    change = load_file(adapter / "adapter_model.safetensors")
    for name, weight in load_file(tmp_path / "merged" / "model.safetensors").items():
        wanted, module = before[name], name.removesuffix(".weight")
        if module in modules:
            first, second = (change[f"base_model.model.{module}.lora_{half}.weight"] for half in "AB")
            wanted = wanted + ALPHA / RANK * second @ first
        torch.testing.assert_close(weight, wanted, rtol=1e-6, atol=1e-6, msg=name)


def test_it_is_told_beside_the_model(run, opt_model, matching_model, adapter, tmp_path):
    told = " ".join(run("info", opt_model, "--adapter", f"{adapter}=0.5").output.split())
    assert "LoRA of rank 2, with weight 0.5" in told
    assert "changes 3 in the Q-Former, 1 in the image encoder" in told
    content = json.loads(run("info", opt_model, "--adapter", adapter, "--json").output)
    [found] = content["adapters"]
    change = load_file(adapter / "adapter_model.safetensors")
    assert found["parameters"] == sum(tensor.numel() for tensor in change.values())
    assert found["changes"] == sorted(f"{module}.weight" for module in MODULES)
    assert "the adapter belongs to another model" in run("info", matching_model, "--adapter", adapter).output
    assert "is not downloaded" in run("info", "Salesforce/blip2-opt-2.7b", "--adapter", adapter).output


@pytest.fixture
def adapter(opt_model, tmp_path):
    return write_adapter(tmp_path / "adapter", opt_model)


@pytest.mark.parametrize(("config", "scale"), [({}, ALPHA / RANK), ({"use_rslora": True}, ALPHA / math.sqrt(RANK))])
def test_what_is_added(opt_model, tmp_path, config, scale):
    adapter = write_adapter(tmp_path / "adapter", opt_model, **config)
    checkpoint.save(blip2.load(opt_model, adapter=adapter, dtype="float32").speaker.model, tmp_path / "merged")
    before, after = (load_file(folder / "model.safetensors") for folder in (opt_model, tmp_path / "merged"))
    change = load_file(adapter / "adapter_model.safetensors")
    for name, weight in before.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in change:
            weight = weight + scale * change[f"{module}.lora_B.weight"] @ change[f"{module}.lora_A.weight"]
        torch.testing.assert_close(after[name], weight, rtol=1e-6, atol=1e-6, msg=name)


def test_the_result_stands_alone(run, opt_model, adapter, tmp_path, pictures):
    base = shutil.copytree(opt_model, tmp_path / "base")
    asked = ["--num-captions", 2, *pictures[:3]]
    plain = run("caption", "--model", base, *asked)
    changed = run("caption", "--model", base, "--adapter", adapter, *asked)
    assert (plain.exit_code, changed.exit_code) == (0, 0) and plain.stdout != changed.stdout
    out = tmp_path / "merged"
    result = run("merge", base, out, "--adapter", adapter)
    assert (result.exit_code, result.stdout) == (0, f"{out}\n")
    shutil.rmtree(base), shutil.rmtree(adapter)
    assert run("caption", "--model", out, *asked).stdout == changed.stdout
    assert run("merge", out, out, "--adapter", adapter).exit_code == 1


def test_weights_of_adapters(run, opt_model, adapter, pictures):
    def captions(*options):
        result = run("caption", "--model", opt_model, "--num-captions", 2, pictures[0], *options)
        assert result.exit_code == 0, result.stderr
        return result.stdout

    whole, nothing = captions("--adapter", adapter), captions("--adapter", f"{adapter}=0")
    assert nothing == captions() != whole == captions("--adapter", f"{adapter}=1.0")


@pytest.mark.parametrize("options", [{"quantize": "int8"}, {"dtype": "bfloat16"}, {"vision": "int8"}])
def test_merged_first_then_quantised(run, opt_model, adapter, tmp_path, options):
    assert run("merge", opt_model, tmp_path / "merged", "--adapter", adapter).exit_code == 0
    direct, merged = blip2.load(opt_model, adapter=adapter, **options), blip2.load(tmp_path / "merged", **options)
    for (name, one), other in zip(
        direct.speaker.model.state_dict().items(), merged.speaker.model.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name
    assert direct.speaker.identity == merged.speaker.identity != blip2.load(opt_model).speaker.identity


def test_the_precision_of_the_files_is_kept(run, opt_model, adapter, tmp_path):
    half = tmp_path / "half"
    tokenizer = opt_model / "tokenizer.json"
    checkpoint.save(checkpoint.load(opt_model), half, tokenizer=tokenizer, dtype=torch.bfloat16)
    assert run("merge", half, tmp_path / "merged", "--adapter", adapter).exit_code == 0
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_an_adapter_of_another_model(run, any_model, adapter, tmp_path):
    file = adapter / "adapter_model.safetensors"
    save_file({name.replace("qformer", "bert"): each for name, each in load_file(file).items()}, file)
    for arguments in (["caption", "--model", any_model, "x.png"], ["merge", any_model, tmp_path / "out"]):
        result = run(*arguments, "--adapter", adapter)
        assert result.exit_code == 1 and result.stderr.count("\n") == 1
        assert "there is no bert.encoder.layer.0.crossattention.attention.value" in result.stderr
    assert not (tmp_path / "out").exists()
