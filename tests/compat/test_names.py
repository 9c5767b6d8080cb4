"""The layers under the names that Hugging Face's users know: what is frozen, replaced, moved or copied there is what
computes. Equality of names and values with the reference is tested in tests/parity/test_reference_cases.py."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from blip2 import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor, linear
from blip2.errors import CheckpointError, OptionError
from tests import tiny

LEARNING = ("qformer", "query_tokens", "language_projection")


@pytest.fixture(params=[False, True], ids=["plain", "packed"])
def model(request, any_model, monkeypatch):
    """One to change; its layers are packed as those of published sizes are, or not."""
    if request.param:
        monkeypatch.setattr(linear, "MIN_PACKED_WEIGHTS", 1)
    return Blip2ForConditionalGeneration.from_pretrained(any_model)


@pytest.fixture
def inputs(any_model):
    processor = Blip2Processor.from_pretrained(any_model)
    return processor(images=tiny.picture(1), text="a photo of", return_tensors="pt")


def logits(model, inputs):
    decoder = {} if model.config.use_decoder_only_language_model else {"decoder_input_ids": torch.tensor([[0, 5]])}
    with torch.no_grad():
        return model(**inputs, **decoder).logits


def attention_of(model):
    """The first attention of the language model, and the names of its queries' and its output's layer."""
    if model.config.use_decoder_only_language_model:
        attention = model.language_model.get_decoder().layers[0].self_attn
        return attention, "q_proj", "out_proj" if hasattr(attention, "out_proj") else "o_proj"
    return model.language_model.encoder.block[0].layer[0].SelfAttention, "q", "o"


def test_frozen_by_name(model, inputs):
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith(LEARNING)
    assert model.num_parameters(only_trainable=True) < model.num_parameters()
    optimiser = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    changed = logits(model, inputs)
    model.train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimiser.step()
    learned = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert learned and all(name.startswith(LEARNING) for name in learned)
    assert not torch.equal(logits(model.eval(), inputs), changed)
    assert model.model.qformer.query_tokens is model.query_tokens


@pytest.mark.parametrize("part", ["queries", "output", "projection", "queries of the Q-Former", "tokens"])
def test_what_is_replaced_is_used(model, inputs, part):
    """As adapters do it: another module in the place of a layer."""
    attention, query, output = attention_of(model)
    owner, name = {
        "queries": (attention, query),
        "output": (attention, output),
        "projection": (model, "language_projection"),
        "queries of the Q-Former": (model.qformer.encoder.layer[1].attention.attention, "query"),
        "tokens": (model, "query_tokens"),
    }[part]
    before, ids = logits(model, inputs), model.generate(**inputs)
    undoes_factors = model.config.text_config.model_type == "qwen3"  # whose heads are normed

    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            said = self.base(x) * 30
            return said.flip(-1) if undoes_factors else said

    old = getattr(owner, name)
    setattr(owner, name, nn.Parameter(torch.randn_like(old)) if part == "tokens" else Adapted(old))
    assert not torch.allclose(logits(model, inputs), before, atol=1e-4)
    assert not torch.equal(model.generate(**inputs), ids)
    setattr(owner, name, old)
    assert torch.equal(logits(model, inputs), before)


def test_each_parameter_that_is_given_for_a_call_is_used(model, inputs):
    before = logits(model, inputs)
    given = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name in ("query_tokens", "vision_model.embeddings.class_embedding", "language_projection.weight"):
        changed = given | {name: torch.randn_like(given[name])}
        decoder = {} if model.config.use_decoder_only_language_model else {"decoder_input_ids": torch.tensor([[0, 5]])}
        with torch.no_grad():
            out = torch.func.functional_call(model, changed, (), {**inputs, **decoder})
        assert not torch.allclose(out.logits, before, atol=1e-4), name
    assert torch.equal(logits(model, inputs), before)


def test_padding_learns_nothing_from_being_looked_up(model, inputs):
    """As in the reference: an OPT's token for padding is in no row's embeddings, a T5's is."""
    embedding = model.get_input_embeddings()
    is_opt = model.config.use_decoder_only_language_model
    padding = model.config.text_config.pad_token_id
    embedding(torch.tensor([[padding, 7]])).sum().backward()
    assert embedding.weight.grad[7].any() and bool(embedding.weight.grad[padding].any()) is not is_opt
    if is_opt:
        model.resize_token_embeddings(padding)
        assert embedding(torch.tensor([[0]])).shape[-1] == embedding.embedding_dim


def test_a_head_of_its_own_is_used(model, inputs):
    before, ids = logits(model, inputs), model.generate(**inputs)
    old = model.get_output_embeddings()
    head = nn.Linear(old.in_features, old.out_features, bias=False)
    model.set_output_embeddings(head)
    assert model.get_output_embeddings() is head
    assert not torch.allclose(logits(model, inputs), before, atol=1e-3)
    assert not torch.equal(model.generate(**inputs), ids)


def test_copies_are_whole_and_their_own(model, inputs):
    before = logits(model, inputs)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for twin in (
        copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False)
    ):  # fmt: skip
        assert torch.equal(logits(twin, inputs), before)
        computing = {id(parameter) for parameter in twin.model.parameters()}
        assert {id(parameter) for parameter in twin.parameters()} == computing
        assert not computing & {id(parameter) for parameter in model.parameters()}
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(0.5)
        assert not torch.equal(logits(twin, inputs), before)
    assert torch.equal(logits(model, inputs), before)


def test_moved_and_cast_together(model, inputs):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.bfloat16().float()
    assert {id(parameter) for parameter in model.parameters()} == {id(each) for each in model.model.parameters()}
    assert set(model.state_dict()) == set(state)
    assert not any(model.load_state_dict(state))
    head = model.get_output_embeddings().weight
    if model.config.text_config.tie_word_embeddings:
        assert head is model.get_input_embeddings().weight
    meta = copy.deepcopy(model).to_empty(device="cpu")
    assert not any(meta.load_state_dict(state))
    assert torch.equal(logits(meta, inputs), logits(model, inputs))


def test_modes_reach_the_layers_that_compute(model):
    model.train()
    model.vision_model.eval()
    assert model.model.qformer.training and model.model.qformer.layers[0].self_attention.training
    assert not model.model.vision.training and not any(block.training for block in model.model.vision.blocks)
    assert not any(module.training for module in model.eval().model.modules())


def test_hooks_are_where_the_values_pass(model, inputs):
    seen = []
    layer = model.vision_model.encoder.layers[0]
    handles = [
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output)),
        model.vision_model.register_forward_hook(lambda module, inputs, output: seen.append(output.last_hidden_state)),
        model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(output)),
    ]
    model.generate(**inputs, max_new_tokens=1)
    assert [each.dim() for each in seen[:3]] == [3, 3, 3] and not torch.equal(seen[0], seen[1])
    for handle in handles:
        handle.remove()
    attention = attention_of(model)[0]
    with pytest.raises(OptionError, match="hook the layers in it"):
        model.vision_model.encoder.register_forward_hook(print)
    with pytest.raises(OptionError, match="cannot be called"):
        attention(seen[0])
    with pytest.raises(OptionError, match="replace the layers in it"):
        model.vision_model.encoder = nn.Identity()
    with pytest.raises(OptionError, match="cannot be replaced"):
        model.vision_model.encoder.layers[0] = nn.Identity()


def test_settings_that_are_changed_are_heeded(model, inputs):
    ids = model.generate(**inputs, max_new_tokens=6)
    skipped = inputs["input_ids"].shape[1] if model.config.use_decoder_only_language_model else 1
    first = int(ids[0, skipped])
    model.config.text_config.eos_token_id = first
    model.generation_config = {}
    assert model.generate(**inputs, max_new_tokens=6).shape[1] == skipped + 1
    model.config.return_dict = False
    assert isinstance(logits_or_tuple(model, inputs), tuple)
    model.config.image_token_index = 9
    with pytest.raises(OptionError, match=r"image tokens \(9\)"):
        model.generate(**inputs)


def logits_or_tuple(model, inputs):
    decoder = {} if model.config.use_decoder_only_language_model else {"decoder_input_ids": torch.tensor([[0, 5]])}
    return model(**inputs, **decoder)


def test_arguments_that_do_not_exist(model, inputs):
    with pytest.raises(TypeError, match="no argument 'output_atentions'"):
        model(**inputs, output_atentions=True)


def test_made_of_a_configuration(any_model, tmp_path):
    torch.manual_seed(0)
    config = Blip2Config.from_pretrained(any_model)
    config.text_config.vocab_size += 3
    model = Blip2ForConditionalGeneration(config)
    assert model.get_input_embeddings().weight.shape[0] == config.text_config.vocab_size
    assert model.query_tokens.std() > 0, "equal queries would stay equal"
    config.text_config.dropout = config.text_config.dropout_rate = 0.25
    model.save_pretrained(tmp_path)
    again = Blip2ForConditionalGeneration.from_pretrained(tmp_path)
    assert again.config.text_config.to_dict() == model.config.text_config.to_dict()
    with pytest.raises(OptionError, match="language model is one of opt, t5, llama"):
        Blip2Config(text_config={"model_type": "bloom"})
    with pytest.raises(CheckpointError, match="activation_function is 'gelu'"):
        Blip2ForConditionalGeneration(Blip2Config(text_config={"activation_function": "gelu"}))


def test_every_weight_has_memory_of_its_own(model, tmp_path):
    """Otherwise safetensors refuses to write it, and accelerate leaves weights out."""
    for name, parameter in model.named_parameters():
        assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.itemsize, name
    state = model.state_dict()
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)
    save_file(state, tmp_path / "model.safetensors")
    assert not any(model.load_state_dict(load_file(tmp_path / "model.safetensors")))


def test_a_quantised_model_is_asked_like_any_other(any_model, inputs, tmp_path):
    model = Blip2ForConditionalGeneration.from_pretrained(any_model, load_in_8bit=True)
    before = logits(model, inputs)
    assert not any(model.load_state_dict(model.state_dict()))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(Blip2ForConditionalGeneration.from_pretrained(tmp_path), inputs), before)
    assert torch.equal(logits(copy.deepcopy(model), inputs), before)
    with pytest.raises(OptionError, match="resize it unquantised"):
        model.resize_token_embeddings(999)


def test_a_decoder_is_its_own_and_shares_the_table(model):
    language = model.language_model
    decoder = language.get_decoder()
    assert decoder.get_decoder() is decoder
    assert decoder.get_input_embeddings().weight is language.get_input_embeddings().weight
    with pytest.raises(OptionError, match="set it on language_model"):
        decoder.set_input_embeddings(nn.Embedding(3, 4))
    with pytest.raises(OptionError, match=r"(Decoder|Body) has no encoder"):
        decoder.get_encoder()
