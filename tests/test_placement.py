"""Where the pieces of a model go, and that a divided model answers as a whole one.

None of this runs on a GPU. That no operation mixes devices is checked with torch's fake tensors, which have a shape
and a device and no values: the meta device stands for the GPU. That the hooks change no value is checked with every
piece on the CPU, under two names.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from blip2 import checkpoint, native, placement
from blip2.checkpoint.load import _device_of, empty_model
from blip2.checkpoint.quantize import Quantization
from blip2.compat import Blip2ForConditionalGeneration
from blip2.compat.names import unfuse
from blip2.config import Blip2Config
from blip2.errors import OptionError
from blip2.generation import Engine, GenerateOptions
from blip2.model import Blip2, Blip2Matcher
from blip2.placement import Plan, place, plan
from blip2.published import FLAN_T5_XXL, PUBLISHED
from blip2.quantized import QuantizedLinear
from tests import tiny

GB = 10**9
GPU = "cuda:0"
ELSEWHERE = "meta"
OPT_2_7B = PUBLISHED["Salesforce/blip2-opt-2.7b"].config
T5_XXL = Blip2Config(language=FLAN_T5_XXL)
MATCHER = PUBLISHED["Salesforce/blip2-itm-vit-g"].config


def on_gpu(found: Plan) -> list[str]:
    return [name for name, device in found.devices.items() if device == GPU]


def divided(model: Blip2 | Blip2Matcher, moved: Callable[[str], bool], here: str, there: str) -> Plan:
    """A plan for a model in memory: what is ``moved`` by its name is there, the rest is here."""
    whole = plan(model.config, device=here)
    pieces = tuple(replace(piece, device=there) if moved(piece.name) else piece for piece in whole.pieces)
    return Plan(pieces, None, "a test")


# ---- the plan ----


def test_what_fits_goes_to_the_gpu_whole():
    found = plan(OPT_2_7B, free_bytes=24 * GB)
    assert set(found.devices.values()) == {GPU} and not found.is_split
    assert found.dtype is None and found.device == GPU
    assert "everything fits" in found.reason
    assert found.lines()[0] == "cuda:0: 7.7 GB, everything"


def test_weights_leave_room_for_what_is_computed():
    need = plan(OPT_2_7B, device="cuda:0").num_bytes(GPU)
    assert plan(OPT_2_7B, free_bytes=need + GB).is_split
    assert not plan(OPT_2_7B, free_bytes=int((need + GB) / 0.9) + 1000).is_split


def test_the_image_half_goes_first_then_the_layers_from_the_first():
    found = plan(OPT_2_7B, free_bytes=8 * GB)
    number = len(on_gpu(found)) - 3
    assert 0 < number < 32
    assert on_gpu(found) == ["", "vision", "language", *(f"language.blocks.{layer}" for layer in range(number))]
    assert found.device == GPU, "the precision has to suit the GPU"
    room = 0.9 * 8 * GB - GB
    layer = found.pieces[-1].num_bytes
    assert room - layer < found.num_bytes(GPU) <= room, "as many layers as fit, and not one more"
    assert f"language.blocks {number} to 31" in found.lines()[1]


def test_a_decoder_goes_before_an_encoder():
    layers = [name for name in on_gpu(plan(T5_XXL, free_bytes=12 * GB)) if name.count(".")]
    assert layers and all(name.startswith("language.decoder.") for name in layers)
    layers = on_gpu(plan(T5_XXL, free_bytes=24 * GB))
    assert "language.decoder.23" in layers and "language.encoder.0" in layers and "language.encoder.23" not in layers


def test_a_matching_model_keeps_its_image_encoder_on_the_cpu():
    assert plan(MATCHER, free_bytes=3 * GB).devices == {"": GPU, "vision": "cpu"}
    assert "quantised" not in plan(MATCHER, free_bytes=3 * GB).reason, "which it cannot be"


@pytest.mark.parametrize("family", ["opt", "t5", "llama"])
def test_whatever_room_there_is(family):
    config = Blip2Config(tiny.VISION, tiny.QFORMER, tiny.language_config(family))
    total = plan(config).num_bytes("cpu")
    held = []
    for room in range(0, total + 10_000, 10_000):
        found = plan(config, free_bytes=int((GB + room) / 0.9) + 1, dtype=torch.float32)
        held.append(found.num_bytes(GPU))
        assert held[-1] <= room and found.num_bytes("cpu") == total - held[-1]
        assert found.devices["language"] == GPU or not any(name.startswith("language") for name in on_gpu(found)), (
            "no layer is apart from the tables"
        )
    assert held[0] == 0 and held[-1] == total and len(set(held)) > 4


def test_quantised_weights_take_less_room():
    assert plan(OPT_2_7B, free_bytes=8 * GB).is_split
    assert not plan(OPT_2_7B, free_bytes=8 * GB, quantize=Quantization(8)).is_split
    assert "int8" in plan(OPT_2_7B, free_bytes=8 * GB).reason


@pytest.mark.parametrize(
    ("options", "device", "reason"),
    [
        ({}, "cpu", "there is no GPU"),
        ({"free_bytes": GB}, "cpu", "no part of the model fits"),
        ({"device": "cpu", "free_bytes": 80 * GB}, "cpu", "as requested"),
        ({"device": "cuda:1", "free_bytes": GB}, "cuda:1", "as requested"),
        ({"gpu": "cuda:1", "free_bytes": 80 * GB}, "cuda:1", "cuda:1 has 80.0 GB free"),
    ],
)
def test_one_device(options, device, reason):
    found = plan(OPT_2_7B, **options)
    assert set(found.devices.values()) == {device} == {found.device} and not found.is_split
    assert reason in found.reason


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_both_sides_compute_in_bfloat16(dtype):
    found = plan(OPT_2_7B, free_bytes=8 * GB, dtype=dtype)
    assert found.is_split and found.dtype == torch.bfloat16
    assert ("a CPU does not support float16" in found.reason) == (dtype != torch.bfloat16)


def test_float32_is_for_both_sides():
    found = plan(OPT_2_7B, free_bytes=8 * GB, dtype=torch.float32)
    assert found.dtype == torch.float32 and "bfloat16" not in found.reason
    assert len(on_gpu(found)) < len(on_gpu(plan(OPT_2_7B, free_bytes=8 * GB)))


def test_float16_is_not_for_the_cpu_alone():
    with pytest.raises(OptionError, match="float16 is not supported on a CPU"):
        plan(OPT_2_7B, dtype=torch.float16)


# ---- the checkpoint ----


@pytest.fixture(scope="module", params=["opt", "t5", "llama", "matcher"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    return tiny.save_matching(path) if request.param == "matcher" else tiny.save_generative(request.param, path)


@pytest.mark.parametrize("quantize", [None, Quantization(8), Quantization(4, parts=("language", "vision"))])
def test_the_bytes_are_those_of_the_loaded_model(folder, quantize):
    found = placement.plan_for(folder, device="cpu", quantize=quantize)
    model = placement.load(folder, found, quantize=quantize)
    assert found.num_bytes("cpu") == sum(t.nbytes for t in [*model.parameters(), *model.buffers()])


def test_what_the_checkpoint_is_quantised_to_counts(tmp_path):
    model = checkpoint.load(tiny.save_generative("t5", tmp_path / "whole"), quantize="int8")
    checkpoint.save(model, tmp_path / "small", quantization=Quantization(8).as_json())
    small = placement.plan_for(tmp_path / "small", device="cpu")
    assert small == placement.plan_for(tmp_path / "whole", device="cpu", quantize=Quantization(8))


def test_another_gpu_than_this_machines_can_be_planned_for(folder):
    found = placement.plan_for(folder, free_bytes=8 * GB)
    assert set(found.devices.values()) == {GPU}


def test_without_a_gpu_auto_is_the_cpu(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = placement.plan_for(folder)
    assert found.device == "cpu"
    assert placement.load(folder, found).vision.position_embedding.device.type == "cpu"


def test_this_gpu_is_asked_what_is_free(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2 * GB, 8 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 3 * GB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: GB)
    assert "cuda:1 has 4.0 GB free" in placement.plan_for(folder).reason


def test_a_divided_model_needs_accelerate_before_anything_is_read(folder, monkeypatch):
    model = checkpoint.load(folder)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.setattr(checkpoint, "load", lambda *_, **__: pytest.fail("read in vain"))
    with pytest.raises(OptionError, match=r"pip install .*\[split\]"):
        placement.load(folder, divided(model, lambda name: name == "vision", "cpu", "cpu:0"))


def test_a_whole_model_needs_no_accelerate(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    placement.load(folder, placement.plan_for(folder, device="cpu"))


def test_importing_the_plan_imports_no_accelerate():
    check = "import sys, blip2.placement; print('accelerate' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# ---- a divided model ----

DIVISIONS = {
    "image encoder": lambda name: name == "vision",
    "image half": lambda name: name in ("", "vision"),
    "language model": lambda name: name.startswith("language"),
    "last layers": lambda name: name in ("language.blocks.1", "language.decoder.1", "language.encoder.1"),
    "first layers": lambda name: name in ("language.blocks.0", "language.decoder.0", "language.encoder.0"),
    "all layers": lambda name: name.count(".") == 2,
    "decoder": lambda name: name.startswith("language.decoder."),
    "encoder": lambda name: name.startswith("language.encoder."),
}
by_division = pytest.mark.parametrize("moved", DIVISIONS.values(), ids=DIVISIONS.keys())
by_family = pytest.mark.parametrize("family", ["opt", "t5", "llama"])


@by_family
def test_hooks_change_no_answer(family):
    """All pieces on the CPU, but under two names, so that every hook is there and every hook is called."""
    pytest.importorskip("accelerate")
    calls = []

    def answers(model: Blip2) -> list:
        pixels_BCHW = torch.linspace(-1, 1, 3 * 3 * 32 * 32).reshape(3, 3, 32, 32)
        engine = Engine(model.language, eos_token_ids=[model.config.language.eos_token_id])
        with torch.no_grad():
            prompts = list(model.prompt(model.encode(pixels_BCHW)))
        return engine.generate(prompts, GenerateOptions(num_beams=3, max_new_tokens=6))

    model = tiny.generative(family)
    expected = answers(model)
    place(model, divided(model, lambda name: name.count(".") == 2, "cpu", "cpu:0"))
    for name, module in model.named_modules():
        if hasattr(module, "_hf_hook"):
            module._hf_hook.post_forward = partial(
                lambda name, before, module, output: calls.append(name) or before(module, output),
                name, module._hf_hook.post_forward,
            )  # fmt: skip
    assert answers(model) == expected
    layers = {f"language.blocks.{n}" for n in range(2)} if family != "t5" else {
        f"language.{stack}.{n}" for stack in ("encoder", "decoder") for n in range(2)
    } | {f"language.decoder.{n}.cross_attention.key_value" for n in range(2)}  # fmt: skip
    assert set(calls) == {"vision", "qformer"} | layers


class OneDeviceAnOperation(TorchDispatchMode):
    """Only `Tensor.to` takes values from one device to another; numbers (0 dimensions) go with any.

    There are no values to decide by, so whatever is asked of them has the same ``answer``.
    """

    def __init__(self, answer: bool) -> None:
        super().__init__()
        self.answer = answer

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            return self.answer
        if func is not torch.ops.aten._to_copy.default:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.dim()]
            devices = {str(tensor.device) for tensor in tensors}
            assert len(devices) <= 1, f"{func} mixes devices {devices}"
        return func(*args, **kwargs)


@contextmanager
def without_values(*, answer: bool = False):
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(), OneDeviceAnOperation(answer):
        patch.setattr(native, "kernels", lambda: None)  # they read memory, of which there is none
        yield


def put_fake(model: nn.Module, found: Plan) -> None:
    """Weights without values where the plan has them, as `checkpoint.load` would put them."""
    for name, parameter in list(model.named_parameters()):
        owner, _, last = name.rpartition(".")
        fake = torch.empty(parameter.shape, device=_device_of(name, found.devices, "meta"), dtype=parameter.dtype)
        setattr(model.get_submodule(owner), last, nn.Parameter(fake, requires_grad=False))


def run(model: Blip2, *, num_steps: int = 2) -> None:
    """From pixels to logits, with all that decoding asks of a language model and its state."""
    image_size = model.config.vision.image_size
    pixels_BCHW = torch.zeros(2, 3, image_size, image_size, device=model.vision.position_embedding.device)
    home = model.language.token_embedding.weight.device
    prompt_BQD = model.prompt(model.encode(pixels_BCHW))
    assert prompt_BQD.device == home
    words_BTD = model.language.embed(torch.zeros(2, 3, dtype=torch.long, device=home))
    prompt_BTD = torch.cat([prompt_BQD, words_BTD], dim=1)
    lengths_B = torch.full((2,), prompt_BTD.shape[1], device=home)
    logits_RV, state = model.language.prefill(prompt_BTD, lengths_B, num_steps + 1)
    for _ in range(num_steps):
        state.select(torch.arange(3, device=home))
        logits_RV = model.language.step(logits_RV[:1, 0].long().expand(3), state)
        assert logits_RV.device == home and len(logits_RV) == 3


@cache
def config_of(family: str) -> Blip2Config:
    return Blip2Config(tiny.VISION, tiny.QFORMER, tiny.language_config(family))


@pytest.mark.parametrize("answer", [False, True], ids=["rows of mixed length", "rows of one length"])
@by_division
@by_family
@torch.no_grad()
def test_nothing_mixes_devices(family, moved, answer):
    pytest.importorskip("accelerate")
    model = empty_model(config_of(family)).eval()
    found = divided(model, moved, ELSEWHERE, "cpu")
    if not found.is_split:
        pytest.skip("this family has no such layers")
    with without_values(answer=answer):
        put_fake(model, found)
        run(place(model, found))


@by_division
@pytest.mark.parametrize("family", ["opt", "t5"])
@torch.no_grad()
def test_the_drop_in_mixes_no_devices(family, moved):
    """Its layers are taken apart before they are placed, and called by itself."""
    pytest.importorskip("accelerate")
    model = empty_model(config_of(family)).eval()
    found = divided(model, moved, ELSEWHERE, "cpu")
    if not found.is_split:
        pytest.skip("this family has no such layers")
    unfuse(model)
    with without_values():
        put_fake(model, found)
        drop_in = Blip2ForConditionalGeneration(place(model, found))
        run(drop_in.model)
        ids = torch.zeros(2, 3, dtype=torch.long)
        decoder = {} if family == "opt" else {"decoder_input_ids": ids}
        size = drop_in.config.vision_config.image_size
        output = drop_in(torch.zeros(2, 3, size, size), ids, torch.ones_like(ids), **decoder, output_attentions=True)
        assert output.logits.device == model.language.token_embedding.weight.device == drop_in.device


@by_family
@torch.no_grad()
def test_the_check_of_devices_itself(family):
    """Without hooks the same run fails."""
    model = empty_model(config_of(family)).eval()
    found = divided(model, DIVISIONS["all layers"], ELSEWHERE, "cpu")
    with without_values(), pytest.raises(AssertionError, match="mixes devices"):
        put_fake(model, found)
        run(model)


@pytest.mark.parametrize(("config", "free_bytes"), [(OPT_2_7B, 8 * GB), (T5_XXL, 3 * GB)], ids=["opt", "t5"])
@torch.no_grad()
def test_published_models_run_as_planned(config, free_bytes):
    pytest.importorskip("accelerate")
    found = plan(config, free_bytes=free_bytes, gpu=ELSEWHERE)
    assert found.is_split
    model = empty_model(config).eval()
    with without_values():
        put_fake(model, found)
        run(place(model, found), num_steps=1)


@torch.no_grad()
def test_a_matcher_mixes_no_devices(tmp_path):
    pytest.importorskip("accelerate")
    model = checkpoint.load(tiny.save_matching(tmp_path))
    assert isinstance(model, Blip2Matcher)
    found = divided(model, DIVISIONS["image encoder"], ELSEWHERE, "cpu")
    with without_values():
        put_fake(model, found)
        place(model, found)
        patches_BPD = model.encode(torch.zeros(2, 3, 32, 32))
        text_BT = torch.zeros(2, 3, dtype=torch.long, device=ELSEWHERE)
        mask_BT = torch.ones(2, 3, dtype=torch.bool, device=ELSEWHERE)
        assert model.match(patches_BPD, text_BT, mask_BT).device == torch.device(ELSEWHERE)
        assert model.embed_image(patches_BPD)[0].device == model.embed_text(text_BT, mask_BT).device


@by_family
@torch.no_grad()
def test_keys_and_values_are_where_their_layer_is(family):
    model = empty_model(config_of(family)).eval()
    found = divided(model, DIVISIONS["last layers"], ELSEWHERE, "cpu")
    with without_values():
        put_fake(model, found)
        place(model, found)
        prompt_BTD = torch.zeros(2, 3, model.config.language.hidden_size, device=ELSEWHERE)
        _, state = model.language.prefill(prompt_BTD, torch.full((2,), 3, device=ELSEWHERE), 4)
        cache = state.cache if family == "t5" else state
        assert [str(keys.device) for keys in cache.keys] == [ELSEWHERE, "cpu"]
        assert cache.lengths_B.device == torch.device(ELSEWHERE)
        if family == "t5":
            assert [str(key.device) for key, _ in state.encoded.keys_values] == [ELSEWHERE, "cpu"]


@by_family
def test_a_divided_checkpoint_answers_as_a_whole_one(family, tmp_path):
    pytest.importorskip("accelerate")
    folder = tiny.save_generative(family, tmp_path)
    whole = checkpoint.load(folder, quantize="int8")
    found = divided(whole, DIVISIONS["last layers"], "cpu", "cpu:0")
    model = placement.load(folder, found, quantize="int8")
    assert any(isinstance(module, QuantizedLinear) for module in model.modules())
    prompt_BTD = torch.linspace(-1, 1, 2 * 3 * 24).reshape(2, 3, 24)
    lengths_B = torch.tensor([3, 2])
    with torch.inference_mode():
        expected, got = (it.language.prefill(prompt_BTD, lengths_B, 4)[0] for it in (whole, model))
    assert torch.equal(got, expected)
