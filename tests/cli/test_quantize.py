"""``blip2 quantize``: what is written needs nothing of the original, and answers as it does with --quantize."""

import json
import os
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

import blip2
from blip2 import checkpoint


@pytest.fixture
def original(any_model, tmp_path):
    """A copy, to be deleted, whose companions are not what saving would write."""
    folder = tmp_path / "original"
    shutil.copytree(any_model, folder)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": [0.4, 0.5, 0.6]}))
    (folder / "generation_config.json").write_text('{"max_length": 17}')
    (folder / "special_tokens_map.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("kind", "options"),
    [("int8", []), ("int4", []), ("int4", ["--group-size", 32]), ("int8", ["--vision"]), ("int4", ["--vision"])],
)
def test_the_result_stands_alone(run, original, tmp_path, pictures, kind, options):
    vision = "--vision" in options
    quantization = checkpoint.quantization(kind, vision=vision, group_size=32 if "--group-size" in options else 64)
    expected = checkpoint.load(original, quantize=quantization, as_stored=True)
    if 32 not in options:
        texts = blip2.load(original, quantize=kind, quantize_vision=vision).caption(pictures[:3], max_new_tokens=6)
    companions = {
        path.relative_to(original): path.read_bytes()
        for path in original.rglob("*.*")
        if path.name not in ("config.json", "model.safetensors")
    }
    out = tmp_path / "inner" / "out"
    result = run("quantize", original, out, "--to", kind, *options)
    assert (result.exit_code, result.stdout) == (0, f"{out}\n")
    assert " reduced to " in result.stderr and result.stderr.count("\n") == 1

    shutil.rmtree(original)
    loaded = checkpoint.load(out, as_stored=True)
    state = loaded.state_dict()
    assert state.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name
    if 32 not in options:
        assert blip2.load(out).caption(pictures[:3], max_new_tokens=6) == texts
    written = {path.relative_to(out): path.read_bytes() for path in out.rglob("*.*")}
    assert {path: content for path, content in written.items() if path in companions} == companions
    assert {str(path) for path in written.keys() - companions.keys()} == {"config.json", "model.safetensors"}
    told = json.loads(run("info", out, "--json").stdout)
    assert told["quantization"] == quantization.as_json()


def test_what_is_not_quantised_is_kept_bit_by_bit(run, original, tmp_path):
    run("quantize", original, tmp_path / "out", "--to", "int4")
    before, after = load_file(original / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    quantized = {name.rpartition(".")[0] for name in after if name.endswith((".codes", ".scales"))}
    assert quantized and all(name.startswith("language_model.") for name in quantized)
    shared = before.keys() & after.keys()
    assert any(name.startswith("vision_model.") for name in shared)
    assert any(name.startswith("qformer.") for name in shared)
    assert all(before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]) for name in shared)


def test_the_miniature(run, tmp_path):
    picture = "examples/picture.png"
    assert run("quantize", "miniature", tmp_path / "out", "--to", "int8").exit_code == 0
    ours = run("caption", picture, "--model", tmp_path / "out")
    assert ours.stdout == run("caption", picture, "--quantize", "int8").stdout != ""
    assert "17 layers, to 8 bits" in run("info", tmp_path / "out").stdout


def test_matching_models(run, matching_model, tmp_path):
    result = run("quantize", matching_model, tmp_path / "out", "--to", "int8")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "has no language model; add --vision to quantise its image encoder" in result.stderr
    assert run("quantize", matching_model, tmp_path / "out", "--to", "int8", "--vision").exit_code == 0
    shown = run("info", tmp_path / "out").stdout
    assert "vision.blocks.*.qkv" in shown and "int8" in shown


@pytest.mark.parametrize("kind", ["a model", "a file", "other files"])
def test_nothing_is_overwritten(run, opt_model, tmp_path, kind):
    out = tmp_path / "out"
    if kind == "a model":
        shutil.copytree(opt_model, out)
    elif kind == "a file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "notes.txt").write_text("mine")
    before = out.read_text() if kind == "a file" else {path.name: path.read_bytes() for path in out.iterdir()}
    result = run("quantize", opt_model, out, "--to", "int8")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"blip2: {out}: exists already; choose another name, or delete it\n"
    assert before == (out.read_text() if kind == "a file" else {path.name: path.read_bytes() for path in out.iterdir()})


def test_an_empty_folder_will_do(run, opt_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("quantize", opt_model, ".", "--to", "int8").exit_code == 0
    assert run("info", ".").exit_code == 0


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("was_there", [True, False])
def test_a_failure_leaves_nothing(run, opt_model, tmp_path, monkeypatch, error, was_there):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr("shutil.copyfile", fail)  # as late as it can be
    out = tmp_path / "out"
    if was_there:
        out.mkdir()
    result = run("quantize", opt_model, out, "--to", "int8")
    assert result.exit_code == (1 if isinstance(error, OSError) else 130)
    assert result.stdout == ""
    assert out.exists() == was_there and list(tmp_path.rglob("*")) == [out] * was_there
    if isinstance(error, OSError):
        assert f"{out}: cannot be written (No space left on device)" in result.stderr


def test_the_source_is_checked_first(run, opt_model, tmp_path, monkeypatch):
    def told(folder, *options):
        monkeypatch.setattr(checkpoint, "load", None)  # the work, which does not begin
        result = run("quantize", folder, tmp_path / "out", "--to", "int4", *options)
        assert result.stdout == "" and not (tmp_path / "out").exists()
        return result.exit_code, result.stderr

    source = tmp_path / "source"
    assert run("quantize", opt_model, source, "--to", "int8").exit_code == 0
    assert told(source) == (1, f"blip2: {source}: is already quantised to 8 bits; quantise the original\n")
    (source / "config.json").unlink()
    assert told(source)[1].endswith("there is no config.json; is it the folder of a model?\n")
    shutil.copy(opt_model / "config.json", source)
    (source / "tokenizer.json").unlink()
    assert "the tokenizer belongs beside the weights" in told(source)[1]
    assert told("/no/such/model")[0] == 1
    assert told(opt_model, "--group-size", 48)[0] == 2
    result = run("quantize", opt_model, tmp_path / "out", "--to", "int8", "--group-size", 32)
    assert result.exit_code == 2 and "--group-size needs --to int4" in result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_progress_on_a_terminal(tmp_path):
    import contextlib
    import pty
    import subprocess

    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "blip2", "quantize", "miniature", str(tmp_path / "out"), "--to", "int8"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, text=True)
    os.close(theirs)
    output, _ = process.communicate(timeout=120)
    shown = b""
    with contextlib.suppress(OSError):  # the other side has left
        while part := os.read(ours, 4096):
            shown += part
    os.close(ours)
    assert output == f"{tmp_path / 'out'}\n"
    assert b"MB/s" in shown and b"left:" in shown and b" reduced to " in shown
