"""What ``from_pretrained`` makes of its arguments: place, device, precision, quantisation."""

from __future__ import annotations

import json
import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch

from blip2 import Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval, Blip2Processor, checkpoint
from blip2.compat import loading
from blip2.errors import CheckpointError, OptionError

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture
def asked(monkeypatch, opt_model):
    """What the loader is asked for, in place of loading."""
    seen = {}

    def plan_for(folder, **arguments):
        seen.update(arguments, folder=folder)

    def resolve(name, **arguments):
        seen.update(arguments, name=name)
        return opt_model

    monkeypatch.setattr(loading.placement, "plan_for", plan_for)
    monkeypatch.setattr(loading.placement, "load", lambda folder, plan, **arguments: None)
    monkeypatch.setattr(checkpoint, "resolve", resolve)
    monkeypatch.setattr(loading, "find_device", lambda name: torch.device("cuda:0" if name == "auto" else name))
    return seen


def test_the_defaults(asked, opt_model):
    loading.load_model("someone/model", {})
    assert asked == {
        "name": "someone/model", "revision": None, "local_files_only": False, "folder": opt_model,
        "device": "cpu", "dtype": None, "quantize": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("device_map", "device"),
    [(None, "cpu"), ("auto", "auto"), ("cuda:1", "cuda:1"), ({"": 2}, "cuda:2"), (3, "cuda:3"), ({"": "cpu"}, "cpu"),
     (torch.device("cuda", 1), "cuda:1")],
)  # fmt: skip
def test_the_device(asked, device_map, device):
    loading.load_model("someone/model", {"device_map": device_map})
    assert asked["device"] == device


@pytest.mark.parametrize("device_map", [{"vision_model": 0, "language_model": 1}, {}])
def test_a_model_is_not_divided(asked, device_map):
    with pytest.raises(OptionError, match="one device"):
        loading.load_model("someone/model", {"device_map": device_map})


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"torch_dtype": torch.float16}, torch.float16),
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": "float32", "torch_dtype": torch.float16}, torch.float32),
        ({}, torch.float32),  # what the reference takes for a file that says nothing
        ({"torch_dtype": "auto"}, torch.float32),
        ({"load_in_8bit": True}, None),
    ],
)
def test_the_precision_on_a_gpu(asked, options, dtype):
    loading.load_model("someone/model", {"device_map": "auto", **options})
    assert asked["dtype"] == dtype


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_precision_that_the_file_names(asked, opt_model, tmp_path, monkeypatch, key):
    shutil.copytree(opt_model, tmp_path, dirs_exist_ok=True)
    content = json.loads((tmp_path / "config.json").read_text()) | {key: "float16"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    monkeypatch.setattr(checkpoint, "resolve", lambda name, **_: tmp_path)
    for options, dtype in (
        ({"device_map": "auto"}, torch.float16),
        ({"device_map": "auto", "dtype": "auto"}, torch.float16),
        ({}, None),  # a CPU computes best in its own default
    ):
        loading.load_model("someone/model", options)
        assert asked["dtype"] == dtype


def test_float16_on_a_cpu_is_bfloat16_and_says_so(opt_model):
    with pytest.warns(UserWarning, match="float16 is not computed on a CPU"):
        model = Blip2ForConditionalGeneration.from_pretrained(opt_model, torch_dtype=torch.float16)
    assert model.dtype == torch.bfloat16
    pixels = torch.rand(1, 3, 32, 32).half()
    assert model.generate(pixels, max_new_tokens=3).shape == (1, 4 + 1 + 3)


def test_other_precisions_say_nothing(opt_model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Blip2ForConditionalGeneration.from_pretrained(opt_model).dtype == torch.float32
        assert Blip2ForConditionalGeneration.from_pretrained(opt_model, dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(OptionError, match="'int8' is not a precision"):
        Blip2ForConditionalGeneration.from_pretrained(opt_model, dtype="int8")


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"load_in_8bit": True}, "int8"),
        ({"load_in_4bit": True}, "int4"),
        ({"load_in_8bit": False}, None),
        ({"quantization_config": {"load_in_4bit": True}}, "int4"),
        ({"quantization_config": SimpleNamespace(load_in_8bit=True, load_in_4bit=False)}, "int8"),
    ],
)
def test_quantisation(asked, options, kind):
    loading.load_model("someone/model", options)
    assert asked["quantize"] == checkpoint.quantization(kind)


@pytest.mark.parametrize(
    "options",
    [{"load_in_8bit": True, "load_in_4bit": True}, {"quantization_config": {"bits": 4, "quant_method": "gptq"}}],
)
def test_quantisation_that_is_not_clear(asked, options):
    with pytest.raises(OptionError, match="load_in_4bit"):
        loading.load_model("someone/model", options)


def test_where_the_files_come_from(asked, opt_model):
    place = {"revision": "51572668", "local_files_only": True}
    loading.load_model("someone/model", {**place, "low_cpu_mem_usage": True})
    assert {key: asked[key] for key in place} == place
    asked.clear()
    Blip2Processor.from_pretrained("someone/model", **place)
    assert {key: asked[key] for key in place} == place


def test_an_argument_that_does_not_exist(opt_model):
    with pytest.raises(TypeError, match=r"'load_in_2bit'; it takes .*load_in_4bit, load_in_8bit"):
        Blip2ForConditionalGeneration.from_pretrained(opt_model, load_in_2bit=True)


def test_each_class_names_the_other_for_the_other_kind_of_model(opt_model, matching_model):
    with pytest.raises(CheckpointError, match="Blip2ForImageTextRetrieval"):
        Blip2ForConditionalGeneration.from_pretrained(matching_model)
    with pytest.raises(CheckpointError, match="Blip2ForConditionalGeneration"):
        Blip2ForImageTextRetrieval.from_pretrained(opt_model)


@no_gpu
def test_a_gpu_that_is_not_there(opt_model):
    assert Blip2ForConditionalGeneration.from_pretrained(opt_model, device_map="auto").device.type == "cpu"
    with pytest.raises(OptionError, match="cannot be used"):
        Blip2ForConditionalGeneration.from_pretrained(opt_model, device_map={"": 0})
    with pytest.raises(OptionError, match="cannot be used"):
        Blip2ForConditionalGeneration.from_pretrained(opt_model).to("cuda")
