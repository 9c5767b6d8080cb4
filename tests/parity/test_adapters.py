"""Adapters that `peft` makes on the reference's model: merged here, the reference's tokens."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from blip2 import checkpoint
from blip2.checkpoint.adapters import Adapters
from blip2.compat import Blip2ForConditionalGeneration
from blip2.errors import CheckpointError, OptionError

peft = pytest.importorskip("peft")

TARGETS = {
    "opt": ["q_proj", "v_proj", "out_proj", "fc1", "query", "qkv", "dense", "language_projection"],
    "t5": ["q", "v", "wi_0", "wo", "lm_head", "key", "value", "projection"],
}
KINDS = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "ranks, biases and a whole projection": {"bias": "lora_only", "modules_to_save": ["language_projection"]},
}


def adapted(theirs, family: str, kind: str, folder, seed: int = 0):
    """The reference's model with an adapter that was trained, by name at least, and is saved."""
    options = dict(KINDS[kind])
    targets = TARGETS[family]
    if "modules_to_save" in options:
        targets = [name for name in targets if name != "language_projection"]
        options |= {"rank_pattern": {targets[0]: 5}, "alpha_pattern": {targets[1]: 3}}
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=targets, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(theirs), config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator)
                    is_new = name.endswith(("lora_A.default.weight", "lora_B.default.weight"))
                    parameter.copy_(0.2 * noise if is_new else parameter * (1 + 0.2 * noise))
        model.save_pretrained(folder)
    return model.eval()


def tokens(model, pixels_BCHW, inputs, **options) -> list[list[int]]:
    with torch.inference_mode():
        return model.generate(pixel_values=pixels_BCHW, **inputs, max_new_tokens=12, **options).tolist()


@pytest.fixture(scope="module")
def base(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    pair.theirs.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_the_references_tokens(pair, their_inputs, base, kind, tmp_path):
    theirs = adapted(pair.theirs, pair.family, kind, tmp_path)
    ours = checkpoint.load(base, adapters=Adapters.of(tmp_path))
    with torch.inference_mode():
        wanted_BPD = theirs.vision_model(pair.pixels_BCHW).last_hidden_state
        torch.testing.assert_close(ours.vision(pair.pixels_BCHW), wanted_BPD, rtol=1e-4, atol=1e-4)
    merged = Blip2ForConditionalGeneration.from_pretrained(_saved(ours, tmp_path / "merged"))
    for options in ({}, {"num_beams": 3}):
        found, wanted = (tokens(each, pair.pixels_BCHW, their_inputs, **options) for each in (merged, theirs))
        assert found == wanted
    plain = Blip2ForConditionalGeneration.from_pretrained(base)
    with torch.inference_mode():
        assert not torch.allclose(plain.get_image_features(pair.pixels_BCHW).last_hidden_state, wanted_BPD, atol=1e-2)
    # Merged and saved it is what the reference reads.
    again = type(pair.theirs).from_pretrained(tmp_path / "merged").eval()
    assert tokens(again, pair.pixels_BCHW, their_inputs) == tokens(theirs, pair.pixels_BCHW, their_inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_the_names_of_the_reference_take_an_adapter(pair, their_inputs, base, kind, tmp_path):
    theirs = adapted(pair.theirs, pair.family, kind, tmp_path)
    wanted = tokens(theirs, pair.pixels_BCHW, their_inputs)
    merged = Blip2ForConditionalGeneration.from_pretrained(base, adapter=str(tmp_path))
    later = Blip2ForConditionalGeneration.from_pretrained(base)
    before = {name: weight.clone() for name, weight in later.state_dict().items()}
    assert tokens(later, pair.pixels_BCHW, their_inputs) != wanted
    later.load_adapter(tmp_path, "mine")
    for ours in (merged, later):
        assert tokens(ours, pair.pixels_BCHW, their_inputs) == wanted
        assert ours.model.config.adapted
    for name, weight in merged.state_dict().items():
        torch.testing.assert_close(later.state_dict()[name], weight, rtol=1e-6, atol=1e-6, msg=name)
    if kind == "LoRA":
        later.load_adapter(tmp_path, weight=-1)
        for name, weight in before.items():
            torch.testing.assert_close(later.state_dict()[name], weight, rtol=1e-5, atol=1e-5, msg=name)
    eight = Blip2ForConditionalGeneration.from_pretrained(base, load_in_8bit=True)
    with pytest.raises(OptionError, match=r"quantised, .*adapter=\.\.\., load_in_8bit=True"):
        eight.load_adapter(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        later.load_adapter(tmp_path / "absent")


def test_a_tied_head_is_not_changed_alone(pair, base, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["lm_head", "query"])
    peft.get_peft_model(copy.deepcopy(pair.theirs), config).save_pretrained(tmp_path)
    ours = Blip2ForConditionalGeneration.from_pretrained(base)
    if pair.family == "opt":
        with pytest.raises(CheckpointError, match="shares its weights with another"):
            ours.load_adapter(tmp_path)
    else:
        ours.load_adapter(tmp_path)


def _saved(model, folder):
    checkpoint.save(model, folder)
    return folder


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_merged_weights_are_those_of_peft(pair, base, kind, tmp_path):
    theirs = adapted(pair.theirs, pair.family, kind, tmp_path).merge_and_unload()
    theirs.save_pretrained(tmp_path / "theirs")
    wanted, found = checkpoint.load(tmp_path / "theirs"), checkpoint.load(base, adapters=Adapters.of(str(tmp_path)))
    for name, weight in wanted.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], weight, rtol=1e-5, atol=1e-5, msg=name)
    for options in ({"dtype": torch.bfloat16}, {"quantize": "int8"}, {"quantize": "int4"}):
        merged, made = (
            checkpoint.load(tmp_path / "theirs", **options),
            checkpoint.load(base, adapters=Adapters.of(str(tmp_path)), **options),
        )
        with torch.inference_mode():
            seen, wanted = (model.encode(pair.pixels_BCHW).float() for model in (made, merged))
        torch.testing.assert_close(seen, wanted, rtol=2e-2, atol=2e-2)


def test_several_with_weights(pair, base, tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    for seed, folder in enumerate(folders):
        adapted(pair.theirs, pair.family, "LoRA", folder, seed)
    plain, one, two, both = (
        checkpoint.load(base, adapters=Adapters.of(asked)).state_dict()
        for asked in (None, folders[0], folders[1], {folders[0]: 0.5, folders[1]: -2})
    )
    for name, weight in plain.items():
        wanted = weight + 0.5 * (one[name] - weight) - 2 * (two[name] - weight)
        torch.testing.assert_close(both[name], wanted, rtol=1e-4, atol=1e-4, msg=name)
    nothing = checkpoint.load(base, adapters=Adapters.of({folders[0]: 0})).state_dict()
    assert all(torch.equal(nothing[name], weight) for name, weight in plain.items())


def test_an_adapter_of_the_language_model_alone(pair, base, tmp_path):
    language = copy.deepcopy(pair.theirs.language_model)
    config = peft.LoraConfig(r=2, target_modules=["q_proj" if pair.family == "opt" else "q"], init_lora_weights=False)
    peft.get_peft_model(language, config).save_pretrained(tmp_path)
    found = checkpoint.load(base, adapters=Adapters.of(tmp_path))
    before = pair.ours.state_dict()
    changed = {name for name, weight in found.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed and all(name.startswith("language.") for name in changed)
    assert found.config.adapted == "" and checkpoint.load(base).config == found.config


def test_what_is_seen_with_an_adapter_is_known_by_it(pair, base, tmp_path):
    from blip2.model import identity

    adapted(pair.theirs, pair.family, "LoRA", tmp_path)
    merged = checkpoint.load(base, adapters=Adapters.of(tmp_path))
    half = checkpoint.load(base, adapters=Adapters.of({tmp_path: 0.5}))
    assert len({identity(model) for model in (pair.ours, merged, half)}) == 3
    assert identity(checkpoint.load(_saved(merged, tmp_path / "merged"))) == identity(merged)


def test_a_quantised_model_takes_none(pair, base, tmp_path):
    adapted(pair.theirs, pair.family, "LoRA", tmp_path)
    checkpoint.save(checkpoint.load(base, quantize="int8"), tmp_path / "small")
    with pytest.raises(CheckpointError, match="already quantised to 8 bits; merge adapters into the original"):
        checkpoint.load(tmp_path / "small", adapters=Adapters.of(tmp_path))


# ---- what is wrong is told ----


@pytest.fixture(scope="module")
def lora(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    adapted(pair.theirs, pair.family, "LoRA", folder)
    return folder


def edited(lora, folder, change=lambda tensors: tensors, **config):
    """A copy with other tensors and fields."""
    folder.mkdir(exist_ok=True)
    save_file(change(load_file(lora / "adapter_model.safetensors")), folder / "adapter_model.safetensors")
    content = json.loads((lora / "adapter_config.json").read_text()) | config
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


def renamed(old: str, new: str):
    return lambda tensors: {name.replace(old, new): value for name, value in tensors.items()}


WRONG = {
    "another kind": ({"peft_type": "IA3"}, None, "peft_type is 'IA3'"),
    "changed base": ({"init_lora_weights": "pissa"}, None, "init_lora_weights is 'pissa'"),
    "absurd": ({"lora_alpha": "x"}, None, "lora_alpha is 'x'"),
    "half a module": (
        {}, lambda tensors: dict(list(tensors.items())[1:]), ".* lacks one of its parts",
    ),
    "unknown": ({}, renamed("qformer.encoder", "bert.encoder"), r"there is no bert\.encoder\.layer\.0\..*more of"),
    "another size": (
        {}, lambda tensors: {name: torch.cat([value, value], 1) if "lora_A" in name else value
                             for name, value in tensors.items()}, "has shape .*, but .* in .*; the adapter belongs to",
    ),
    "a table": ({}, renamed("lora_A.weight", "lora_embedding_A"), "of a kind that is not supported here"),
    "no DoRA": ({"use_dora": True}, None, "lacks one of its parts"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_names_the_module(base, lora, case, tmp_path):
    config, change, message = WRONG[case]
    edited(lora, tmp_path, change or (lambda tensors: tensors), **config)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.load(base, adapters=Adapters.of(tmp_path))
    assert "\n" not in str(caught.value)


def test_what_is_no_adapter(tmp_path, lora):
    with pytest.raises(CheckpointError, match=r"there is no adapter_model\.safetensors; is it the folder"):
        Adapters.of(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        Adapters.of(str(tmp_path / "none"))
    with pytest.raises(CheckpointError, match="neither a folder nor in the cache"):
        Adapters.of("someone/lora")
    with pytest.raises(OptionError, match=r"the weight of .* is nan"):
        Adapters.of({lora: float("nan")})
    assert Adapters.of(None) is None and Adapters.of([]) is None
