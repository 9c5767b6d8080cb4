"""``blip2 info``: parts, precision, memory and layers, of folders and of published names; never a download."""

import json
import shutil

import pytest

from blip2 import checkpoint
from blip2.checkpoint.describe import describe
from blip2.published import PUBLISHED

XXL = "Salesforce/blip2-flan-t5-xxl"


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    """As before the first download, and as if there were a network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def rows(result):
    """Lines that begin with a label, by label."""
    assert (result.exit_code, result.stderr) == (0, "")
    return {line[:16].strip(): line[16:] for line in result.stdout.splitlines() if line[:1].strip()}


def test_the_miniature_is_told_by_default(run):
    told = rows(run("info"))
    assert "miniature" in told
    assert told["Folder"] == str(checkpoint.BUNDLED["miniature"])
    assert told["Language model"].split()[0] in ("OPT,", "2.1")
    assert told["Precision"].startswith("float32: lower precision does not speed up a small model")
    assert told["Quantised"] == "nothing"
    assert run("info").stdout == run("info", "miniature").stdout


def test_a_published_name_needs_no_download(run):
    told = rows(run("info", XXL, "--quantize", "int4", "--dtype", "bfloat16"))
    assert told["Not here"].startswith("48.9 GB to download (blip2 pull)")
    assert told["Licence"] == PUBLISHED[XXL].licence
    assert told["Together"].split()[:3] == ["12.2", "B", "8.58"]
    assert told["Quantised"] == "265 layers, to 4 bits, groups of 64 inputs"
    text = run("info", XXL, "--quantize", "int4", "--dtype", "bfloat16").stdout
    assert "language.decoder.*.cross_attention.key_value  24 layers  int4\n" in text
    assert "language.output                                 1 layer  int8\n" in text
    assert "Q-Former in float32: all of it" in text
    assert "Language model in float32: language.encoder_bias.table, language.decoder_bias.table" in text


def test_an_image_encoder_in_8_bits(run):
    told = rows(run("info", XXL, "--dtype", "bfloat16", "--quantize", "int4", "--vision", "int8"))
    how = "421 layers, to 4 bits, groups of 64 inputs; the image encoder in 8 bits, activations as well"
    assert told["Quantised"] == how
    assert "vision.blocks.*.fc1 39 layers int8" in " ".join(
        run("info", XXL, "--dtype", "bfloat16", "--vision", "int8").stdout.split()
    )
    assert "is for the CPU" in run("info", XXL, "--device", "cuda", "--vision", "int8").stderr


def test_what_quantising_would_save(run):
    told = rows(run("info", XXL, "--dtype", "bfloat16"))
    assert told["--quantize"] == "int8 13.7 GB, int4 8.58 GB"
    assert "--quantize" not in rows(run("info", XXL, "--quantize", "int8"))
    assert "--quantize" not in rows(run("info", "miniature-itm"))


def test_json_has_every_layer(run, opt_model):
    told = json.loads(run("info", opt_model, "--quantize", "int4", "--json").stdout)
    expected = describe(checkpoint.read_config(opt_model), quantization=checkpoint.quantization("int4"))
    assert told["quantized"] == {name: f"int{bits}" for name, bits in expected.quantized.items()}
    assert set(told["kept"]) == set(expected.kept)
    assert told["memory_bytes"] == expected.num_bytes == sum(part["memory_bytes"] for part in told["parts"])
    assert told["parameters"] == expected.num_parameters
    assert told["quantization"] == {"bits": 4, "group_size": 64, "parts": ["language"]}
    assert told["disk"]["dtypes"] == ["float32"] and told["disk"]["files"] == 1
    assert (told["kind"], told["image_size_px"], told["device"]) == ("generative", 32, "cpu")


def test_a_gpu_need_not_be_there(run):
    told = json.loads(run("info", XXL, "--device", "cuda", "--json").stdout)
    assert told["precision"]["vision"] == "float16"
    assert told["precision"]["language"] == "bfloat16"
    assert "a T5 overflows in float16" in told["precision"]["reason"]


def test_matching_models(run, matching_model):
    told = rows(run("info", matching_model, "--quantize", "int8"))
    assert told["For"] == "image-text matching and search"
    assert told["Quantised"].startswith("nothing; there is no language model")
    assert "Language model" not in told
    assert json.loads(run("info", matching_model, "--quantize", "int8", "--json").stdout)["quantization"] is None


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nobody/nothing"], 1, "nobody/nothing: is neither a folder nor in the cache"),
        (["/no/such/model"], 1, "/no/such/model: no such folder"),
        ([XXL, "--quantize-vision"], 2, "--quantize-vision is set without"),
        ([XXL, "--dtype", "float16", "--device", "cpu"], 2, "float16 is not supported on a CPU"),
        ([XXL, "--device", "gpu"], 2, "device 'gpu' cannot be used"),
    ],
)
def test_wrong_use(run, arguments, code, words):
    result = run("info", *arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert words in result.stderr and result.stderr.count("\n") == 1


def test_folders_that_are_no_models(run, opt_model, tmp_path):
    def told(folder):
        result = run("info", folder)
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)
        return result.stderr

    assert "there is no config.json" in told(tmp_path)
    folder = tmp_path / "model"
    shutil.copytree(opt_model, folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b.safetensors"}}')
    assert "'../b.safetensors' is not a .safetensors file of this folder" in told(folder)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model.safetensors").write_bytes((opt_model / "model.safetensors").read_bytes()[:-100])
    assert "is damaged or incomplete" in told(folder)
    (folder / "model.safetensors").unlink()
    assert "model.safetensors is missing" in told(folder)


def test_a_preprocessor_of_another_size_is_told(run, opt_model, tmp_path):
    folder = shutil.copytree(opt_model, tmp_path / "model")
    (folder / "preprocessor_config.json").write_text('{"size": 224}')
    for verb in (["info", folder], ["caption", "a.png", "--model", folder], ["quantize", folder, tmp_path / "o", "--to",
                                                                            "int8"]):  # fmt: skip
        result = run(*verb)
        assert result.exit_code == 1
        assert "preprocessor_config.json: size is 224, but the model takes images of 32 pixels" in result.stderr
