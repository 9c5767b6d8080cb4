"""What ``from_pretrained`` makes of its arguments: place, device, precision, quantisation."""

from __future__ import annotations

import json
import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch

import blip2
from blip2 import Blip2Config, Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval, Blip2Processor, checkpoint
from blip2.checkpoint.decoders import parse_decoder
from blip2.compat import loading
from blip2.config import Blip2Config as OwnConfig
from blip2.errors import CheckpointError, OptionError
from blip2.model import Blip2
from tests import tiny
from tests.checkpoint import fake_hub

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
    with pytest.warns(UserWarning, match="float16 is not supported on a CPU"):
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


@pytest.mark.parametrize(
    "options",
    [
        {"cache_dir": "c"}, {"token": None}, {"token": "hf_x"}, {"use_auth_token": True}, {"force_download": True},
        {"subfolder": ""}, {"max_memory": {"cpu": "9GB", 0: 10**9}}, {"offload_folder": "o"}, {"use_safetensors": True},
        {"device_map": "balanced"}, {"device_map": "sequential"}, {"device_map": {"vision_model": "cpu", "": "cpu"}},
        {"attn_implementation": "eager"}, {"ignore_mismatched_sizes": True}, {"variant": None}, {"proxies": None},
    ],
    ids=str,
)  # fmt: skip
@no_gpu
def test_the_usual_arguments(opt_model, options):
    assert Blip2ForConditionalGeneration.from_pretrained(opt_model, **options).device.type == "cpu"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "fp16"}, "give dtype"),
        ({"proxies": {"https": "x"}}, "HTTPS_PROXY"),
        ({"attn_implementation": "fast"}, "'fast'; use eager"),
        ({"max_memory": {"cpu": "1KB"}}, "max_memory is 0.00 GB for cpu"),
        ({"max_memory": {"cpu": "much"}}, "'much'; give it as \"5GB\""),
        ({"from_tf": True}, "safetensors"),
        ({"state_dict": {}, "device_map": "auto"}, "device_map has no effect"),
    ],
)
def test_what_would_mislead_is_refused(opt_model, options, message):
    with pytest.raises(OptionError, match=message):
        Blip2ForConditionalGeneration.from_pretrained(opt_model, **options)


def test_a_report_of_the_loading(opt_model):
    model, report = Blip2ForConditionalGeneration.from_pretrained(opt_model, output_loading_info=True)
    assert model.config.num_query_tokens == 4 and not any(report.values())
    assert list(report) == ["missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"]


def test_a_configuration_of_ones_own(opt_model):
    config = Blip2Config.from_pretrained(opt_model)
    config.text_config.eos_token_id = 9
    assert Blip2ForConditionalGeneration.from_pretrained(opt_model, config=config).config.language.eos_token_id == 9
    config.text_config.num_hidden_layers = 1
    with pytest.raises(OptionError, match=r"num_hidden_layers of 1 \(not 2\)"):
        Blip2ForConditionalGeneration.from_pretrained(opt_model, config=config)


def test_weights_of_ones_own(opt_model):
    state = Blip2ForConditionalGeneration.from_pretrained(opt_model).state_dict()
    state["query_tokens"] = state["query_tokens"] + 1
    config = Blip2Config.from_pretrained(opt_model)
    for name, options in ((opt_model, {}), (None, {"config": config})):
        model = Blip2ForConditionalGeneration.from_pretrained(name, state_dict=state, **options)
        assert torch.equal(model.query_tokens, state["query_tokens"]) and not model.training


def test_a_folder_in_a_folder(opt_model, tmp_path):
    shutil.copytree(opt_model, tmp_path / "inside")
    model = Blip2ForConditionalGeneration.from_pretrained(tmp_path, subfolder="inside")
    assert model.config == Blip2ForConditionalGeneration.from_pretrained(opt_model).config
    for subfolder in ("outside", "../.."):
        with pytest.raises(CheckpointError, match="leave subfolder out"):
            Blip2ForConditionalGeneration.from_pretrained(tmp_path, subfolder=subfolder)


@pytest.mark.parametrize("files", [1, 2])
def test_a_checkpoint_of_bin_files(opt_model, tmp_path, files):
    expected = Blip2ForConditionalGeneration.from_pretrained(opt_model)
    shutil.copytree(opt_model, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    state = expected.state_dict()
    if files == 1:
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        names = {f"pytorch_model-{part}.bin": list(state)[part::2] for part in (0, 1)}
        for file, inside in names.items():
            torch.save({name: state[name].clone() for name in inside}, tmp_path / file)
        places = {name: file for file, inside in names.items() for name in inside}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    for options in ({}, {"load_in_8bit": True}):
        model = Blip2ForConditionalGeneration.from_pretrained(tmp_path, **options)
        same = Blip2ForConditionalGeneration.from_pretrained(opt_model, **options).state_dict()
        assert all(torch.equal(tensor, same[name]) for name, tensor in model.state_dict().items())
    torch.save({"language_projection.weight": CheckpointError}, tmp_path / "pytorch_model.bin")
    (tmp_path / "pytorch_model.bin.index.json").unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match="was not opened"):
        Blip2ForConditionalGeneration.from_pretrained(tmp_path)


def test_elsewhere_than_in_the_usual_cache(opt_model, tmp_path, monkeypatch):
    with fake_hub.serving(opt_model) as hub:
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        urls = {"ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": template}
        for name, value in {**urls, "HF_HUB_OFFLINE": False}.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        options = {"cache_dir": tmp_path, "token": "hf_x"}
        model = Blip2ForConditionalGeneration.from_pretrained(fake_hub.NAME, **options)
        assert model.config.num_query_tokens == 4 and list(tmp_path.rglob("model.safetensors"))
        assert not list(tmp_path.rglob("*.bin"))
        again = Blip2ForConditionalGeneration.from_pretrained(fake_hub.NAME, **options, local_files_only=True)
        assert torch.equal(again.query_tokens, model.query_tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"safe_serialization": False}, "saved as safetensors"),
        ({"push_to_hub": True}, "hf upload"),
        ({"max_shard_size": "large"}, "'large'; give it as"),
        ({"variant": "fp16"}, "variants of files"),
    ],
)
def test_how_a_model_is_saved(opt_model, tmp_path, options, message):
    model = Blip2ForConditionalGeneration.from_pretrained(opt_model)
    with pytest.raises(OptionError, match=message):
        model.save_pretrained(tmp_path / "not", **options)
    model.save_pretrained(tmp_path / "not", is_main_process=False)
    assert not (tmp_path / "not").exists()
    model.save_pretrained(tmp_path / "parts", max_shard_size="20KB", save_function=torch.save, token=None)
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 2
    read = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "parts").state_dict()
    assert all(torch.equal(tensor, read[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(TypeError, match="'max_shard'"):
        model.save_pretrained(tmp_path, max_shard=1)


@pytest.mark.parametrize("name", ["Blip2ForConditionalGeneration", "Blip2Model"])
def test_a_language_model_that_has_no_names_here(name, tmp_path):
    language = {
        "model_type": "bloom", "vocab_size": 352, "hidden_size": 24, "n_layer": 1, "n_head": 2, "eos_token_id": 2,
    }  # fmt: skip
    model = Blip2(OwnConfig(tiny.VISION, tiny.QFORMER, parse_decoder(language)))
    checkpoint.save(model, tmp_path, tokenizer=tiny.opt_tokenizer().to_str())
    with pytest.raises(OptionError, match=r"the language model is a bloom, .* use blip2.load"):
        getattr(blip2, name).from_pretrained(tmp_path)


def test_the_image_settings_are_saved_with_the_model(opt_model, matching_model, tmp_path):
    settings = checkpoint.ImageSettings(32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3), shortest_edge=40)
    for name, folder in (("ForConditionalGeneration", opt_model), ("ForImageTextRetrieval", matching_model)):
        checkpoint.save(checkpoint.load(folder), tmp_path / "first", settings=settings)
        model = getattr(blip2, f"Blip2{name}").from_pretrained(tmp_path / "first")
        model.save_pretrained(tmp_path / "second")
        assert checkpoint.image_settings(tmp_path / "second", model.model.config) == settings
