"""What the reference's own tests ask of its models, asked of the drop-in beside it: the same names, shapes and values.

One model of each family. Texts and tokens are in test_compat.py.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch.testing import assert_close

import blip2
from tests.parity.conftest import SIZES, _generative, matching

WATCHED = {"output_attentions": True, "output_hidden_states": True}


@pytest.fixture(scope="module", params=["opt, 3 queries", "t5, 3 queries, heads narrower than the model"])
def twins(request, tmp_path_factory):
    """``theirs`` and ``ours`` from one folder, and what both read."""
    folder = tmp_path_factory.mktemp("twins")
    theirs = _generative(SIZES[request.param])
    theirs.save_pretrained(folder)
    theirs.set_attn_implementation("eager")  # the only way in which the reference shows its attention
    ours = blip2.Blip2ForConditionalGeneration.from_pretrained(folder)
    is_opt = request.param.startswith("opt")
    queries, token = theirs.config.num_query_tokens, theirs.config.image_token_index
    side = theirs.config.vision_config.image_size
    ids = torch.tensor([[token] * queries + [9, 33, 12, 7], [token] * queries + [44, 8, 5, 3]])
    mask = torch.ones_like(ids)
    mask[1, queries if is_opt else -1] = 0
    labels = ids.masked_fill(mask == 0, -100) if is_opt else torch.tensor([[14, 3, 5], [7, -100, -100]])
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(4))
    inputs = {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask}
    decoder = {} if is_opt else {
        "decoder_input_ids": torch.tensor([[0, 14, 3], [0, 7, 9]]),
        "decoder_attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    }  # fmt: skip
    return SimpleNamespace(
        theirs=theirs, ours=ours, folder=folder, is_opt=is_opt, inputs=inputs, decoder=decoder, labels=labels
    )


def compare(theirs, ours, path="output"):
    """All that the reference gives, in its order, down to the tensors."""
    if isinstance(theirs, torch.Tensor):
        assert_close(ours, theirs, atol=1e-4, rtol=0, msg=lambda text: f"{path}: {text}")
    elif isinstance(theirs, tuple | list):
        assert len(theirs) == len(ours), path
        for place, (one, other) in enumerate(zip(theirs, ours, strict=True)):
            compare(one, other, f"{path}[{place}]")
    elif hasattr(theirs, "keys"):
        assert list(theirs.keys()) == list(ours.keys()), path
        for key in theirs.keys():  # noqa: SIM118
            compare(theirs[key], ours[key], f"{path}.{key}")
            assert getattr(ours, key) is ours[key]
    else:  # the reference's cache, and ours
        assert path.endswith("past_key_values") and len(ours) == len(theirs), path


@pytest.mark.parametrize(
    "options",
    [
        {},
        {**WATCHED},
        {"use_cache": False},
        {"return_dict": False, "use_cache": False},
        {"return_dict": False, "use_cache": False, **WATCHED},
        {"labels": True, "use_cache": False},
        {"labels": True, "use_cache": False, "num_items_in_batch": torch.tensor(11)},
    ],
    ids=lambda options: ", ".join(options) or "defaults",
)
@torch.no_grad()
def test_forward(twins, options):
    options = options | ({"labels": twins.labels} if "labels" in options else {})
    inputs = {**twins.inputs, **twins.decoder, **options}
    theirs = twins.theirs(**inputs)
    compare(theirs, twins.ours(**inputs))


@torch.no_grad()
def test_forward_with_vectors_in_place_of_ids(twins):
    ids = twins.inputs["input_ids"]
    rest = {"pixel_values": twins.inputs["pixel_values"], "attention_mask": twins.inputs["attention_mask"]}
    theirs = twins.theirs(
        **rest, **twins.decoder, input_ids=None, inputs_embeds=twins.theirs.get_input_embeddings()(ids)
    )
    ours = twins.ours(**rest, **twins.decoder, inputs_embeds=twins.ours.get_input_embeddings()(ids))
    compare(theirs.logits, ours.logits)
    for given in (ids, None):
        vectors = twins.theirs.get_input_embeddings()(ids)
        assert torch.equal(
            twins.ours.get_placeholder_mask(given, vectors), twins.theirs.get_placeholder_mask(given, vectors)
        )


@torch.no_grad()
def test_parts_by_themselves(twins):
    theirs, ours, pixels = twins.theirs, twins.ours, twins.inputs["pixel_values"]
    words = torch.tensor([[9, 33, 12], [4, 8, 2]])
    for options in ({}, WATCHED, {"return_dict": False}):
        seen = theirs.vision_model(pixels, **options)
        compare(seen, ours.vision_model(pixels, **options))
        look = {"query_embeds": theirs.query_tokens.expand(2, -1, -1), "encoder_hidden_states": seen[0], **options}
        compare(theirs.qformer(**look), ours.qformer(**look))
        half = torch.ones(seen[0].shape[:2])
        half[:, 2:] = 0
        look["encoder_attention_mask"] = half
        compare(theirs.qformer(**look), ours.qformer(**look))
    text = {"input_ids": words, **({} if twins.is_opt else {"labels": words})}
    compare(theirs.language_model(**text).logits, ours.language_model(**text).logits)
    compare(theirs.language_projection(look["query_embeds"]), ours.language_projection(look["query_embeds"]))
    compare(theirs.get_image_features(pixels), ours.get_image_features(pixels))
    compare(theirs.get_image_features(pixels, return_dict=False), ours.get_image_features(pixels, return_dict=False))


@torch.no_grad()
def test_a_text_goes_on_where_it_stopped(twins):
    words = torch.tensor([[9, 33, 12], [4, 8, 2]])
    language = twins.ours.language_model
    if twins.is_opt:
        first = language(input_ids=words[:, :2])
        second = language(input_ids=words[:, 2:], past_key_values=first.past_key_values)
        compare(language(input_ids=words).logits[:, 2:], second.logits)
        last = twins.theirs.language_model(input_ids=words, logits_to_keep=1).logits
        compare(last, language(input_ids=words, logits_to_keep=1).logits)
    else:
        written = twins.decoder["decoder_input_ids"]
        first = language(input_ids=words, decoder_input_ids=written[:, :2])
        second = language(
            encoder_outputs=(first.encoder_last_hidden_state,),
            decoder_input_ids=written[:, 2:],
            past_key_values=first.past_key_values,
        )
        compare(language(input_ids=words, decoder_input_ids=written).logits[:, 2:], second.logits)


@torch.no_grad()
def test_the_language_model_writes_by_itself(twins):
    """As programs do that put the prompt together themselves."""
    words = torch.tensor([[9, 33, 12], [4, 8, 2]])
    vectors = twins.theirs.get_input_embeddings()(words)
    for prompt in ({"inputs_embeds": vectors}, {"input_ids": words}):
        asked = {**prompt, "attention_mask": torch.ones_like(words), "max_new_tokens": 6, "num_beams": 2}
        theirs = twins.theirs.language_model.generate(**asked, pad_token_id=1, eos_token_id=5)
        ours = twins.ours.language_model.generate(**asked, pad_token_id=1, eos_token_id=5)
        assert ours.tolist() == theirs.tolist()
    assert copy.deepcopy(twins.ours).language_model.generate(**asked, eos_token_id=5).shape == ours.shape


def test_names_and_state(twins):
    names = [name for name, _ in twins.theirs.named_parameters()]
    assert [name for name, _ in twins.ours.named_parameters()] == names
    assert twins.ours.num_parameters() == twins.theirs.num_parameters()
    assert twins.ours.num_parameters(exclude_embeddings=True) == twins.theirs.num_parameters(exclude_embeddings=True)
    theirs, ours = twins.theirs.state_dict(), twins.ours.state_dict()
    assert set(theirs) == set(ours) and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    copied = copy.deepcopy(twins.theirs)
    other = {name: tensor * 0.9 for name, tensor in ours.items()}
    assert not any(twins.theirs.load_state_dict(ours))
    assert not any(copied.load_state_dict(other))
    fresh = blip2.Blip2ForConditionalGeneration(twins.theirs.config)
    assert not any(fresh.load_state_dict(copied.state_dict()))
    inputs = {**twins.inputs, **twins.decoder}
    with torch.no_grad():
        compare(copied(**inputs).logits, fresh(**inputs).logits)
    del other["query_tokens"]
    report = fresh.load_state_dict({**other, "strange": torch.ones(1)}, strict=False)
    assert (report.missing_keys, report.unexpected_keys) == (["query_tokens"], ["strange"])
    with pytest.raises(RuntimeError, match="query_tokens"):
        fresh.load_state_dict(other)


def test_a_step_of_training_with_dropout(twins):
    """The same random numbers fall out, so that loss and gradients are the same."""
    theirs, ours = copy.deepcopy(twins.theirs).train(), copy.deepcopy(twins.ours).train()
    inputs = {**twins.inputs, "labels": twins.labels}
    losses = []
    for model in (theirs, ours):
        torch.manual_seed(5)
        losses.append(model(**inputs).loss)
        losses[-1].backward()
    compare(*losses)
    assert abs(losses[0] - twins.theirs(**inputs).loss) > 1e-3, "nothing falls out"
    gradients = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        if parameter.grad is None:
            assert gradients[name].grad is None, name
        else:
            assert_close(
                gradients[name].grad, parameter.grad, atol=1e-3, rtol=1e-3, msg=lambda text, at=name: at + text
            )
    expected = {name: parameter.grad for name, parameter in ours.named_parameters()}
    ours.zero_grad()
    ours.gradient_checkpointing_enable()
    assert ours.is_gradient_checkpointing
    torch.manual_seed(5)
    ours(**inputs).loss.backward()
    for name, parameter in ours.named_parameters():
        if parameter.grad is not None:
            assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_more_and_fewer_tokens(twins):
    theirs, ours = copy.deepcopy(twins.theirs), copy.deepcopy(twins.ours)
    for number, multiple in ((80, None), (81, 8), (50, None)):
        for model in (theirs, ours):
            model.resize_token_embeddings(number, pad_to_multiple_of=multiple)
        assert ours.config.text_config.vocab_size == theirs.config.text_config.vocab_size
        for name in ("get_input_embeddings", "get_output_embeddings"):
            assert getattr(ours, name)().weight.shape == getattr(theirs, name)().weight.shape
            assert_close(getattr(ours, name)().weight, getattr(theirs, name)().weight, atol=1e-2, rtol=0)
    ids = twins.inputs["input_ids"].clamp(max=49)
    for model in (theirs, ours):
        model.config.image_token_index = 49
        model.language_model.config.eos_token_id = 45
    inputs = {**twins.inputs, "input_ids": ids, "max_new_tokens": 4}
    assert ours.generate(**inputs).shape[0] == 2


@pytest.mark.parametrize("name", ["Blip2Model", "Blip2VisionModel", "Blip2QFormerModel"])
@torch.no_grad()
def test_the_other_classes(twins, name):
    their_class, our_class = getattr(transformers, name), getattr(blip2, name)
    pixels = twins.inputs["pixel_values"]
    if name == "Blip2Model":
        theirs = their_class.from_pretrained(twins.folder, attn_implementation="eager").eval()
        theirs.load_state_dict(twins.theirs.state_dict())
        ours = our_class.from_pretrained(twins.folder)
        inputs = {**twins.inputs, **twins.decoder, "use_cache": False}
        words = torch.tensor([[9, 33, 12], [4, 8, 2]])
        compare(theirs.get_text_features(words), ours.get_text_features(words))
        compare(theirs.get_qformer_features(pixels), ours.get_qformer_features(pixels))
        compare(theirs.get_image_features(pixels), ours.get_image_features(pixels))
    elif name == "Blip2VisionModel":
        theirs, ours = twins.theirs.vision_model, our_class.from_pretrained(twins.folder)
        inputs = {"pixel_values": pixels}
    else:
        theirs = twins.theirs.qformer
        ours = our_class(theirs.config).eval()
        ours.load_state_dict(theirs.state_dict())
        patches = twins.theirs.vision_model(pixels).last_hidden_state
        inputs = {"query_embeds": twins.theirs.query_tokens.expand(2, -1, -1), "encoder_hidden_states": patches}
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    for options in ({}, WATCHED):
        compare(theirs(**inputs, **options), ours(**inputs, **options))


@pytest.fixture(scope="module", params=[None, 49], ids=["no image token", "image token"])
def matchers(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("matchers")
    theirs = matching(3, request.param)
    theirs.save_pretrained(folder)
    theirs.set_attn_implementation("eager")
    ids = torch.tensor([[4, 11, 7, 32, 9], [4, 25, 9, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    text = {"input_ids": ids, "attention_mask": mask}
    if request.param is not None:
        queries = torch.full((2, 8), request.param)
        ids, mask = torch.cat([queries, ids], 1), torch.cat([torch.ones_like(queries), mask], 1)
    pixels = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(8))
    inputs = {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask}
    ours = blip2.Blip2ForImageTextRetrieval.from_pretrained(folder)
    return SimpleNamespace(theirs=theirs, ours=ours, folder=folder, inputs=inputs, text=text)


@pytest.mark.parametrize("head", [False, True])
@torch.no_grad()
def test_matching(matchers, head):
    for options in ({}, WATCHED, {"return_dict": False}):
        inputs = {**matchers.inputs, "use_image_text_matching_head": head, **options}
        compare(matchers.theirs(**inputs), matchers.ours(**inputs))


def test_names_and_state_of_a_matching_model(matchers):
    names = [name for name, _ in matchers.theirs.named_parameters()]
    assert [name for name, _ in matchers.ours.named_parameters()] == names
    assert not any(matchers.theirs.load_state_dict(matchers.ours.state_dict()))
    assert not any(matchers.ours.load_state_dict(matchers.theirs.state_dict()))


@pytest.mark.parametrize("name", ["Blip2VisionModelWithProjection", "Blip2TextModelWithProjection"])
@torch.no_grad()
def test_vectors_to_compare(matchers, name):
    theirs = getattr(transformers, name).from_pretrained(matchers.folder, attn_implementation="eager").eval()
    if "Text" in name:  # transformers leaves in this buffer what was in the memory before
        position_ids = theirs.embeddings.position_ids
        position_ids.copy_(torch.arange(position_ids.shape[-1])[None])
    ours = getattr(blip2, name).from_pretrained(matchers.folder)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    inputs = {"pixel_values": matchers.inputs["pixel_values"]} if "Vision" in name else matchers.text
    for options in ({}, WATCHED, {"return_dict": False}):
        compare(theirs(**inputs, **options), ours(**inputs, **options))


def test_configurations(twins):
    theirs, ours = twins.theirs.config, twins.ours.config
    for part in ("vision_config", "qformer_config", "text_config"):
        for name, value in getattr(theirs, part).to_dict().items():
            if hasattr(getattr(ours, part), name) and name not in ("transformers_version", "dtype", "_name_or_path"):
                assert getattr(getattr(ours, part), name) == value, (part, name)
    for name in ("num_query_tokens", "image_token_index", "image_token_id", "model_type", "is_encoder_decoder",
                 "use_decoder_only_language_model", "initializer_range", "image_text_hidden_size"):  # fmt: skip
        assert getattr(ours, name) == getattr(theirs, name), name
    read = transformers.Blip2Config(**ours.to_dict()).text_config.to_dict()
    tied = {"tie_word_embeddings": read["tie_word_embeddings"]}  # the reference's own words for a T5 change as it reads
    assert read == theirs.text_config.to_dict() | tied
    assert blip2.Blip2Config(**theirs.to_dict()).text_config.hidden_size == theirs.text_config.hidden_size
    defaults, expected = blip2.Blip2Config(), transformers.Blip2Config()
    for part in ("vision_config", "qformer_config", "text_config"):
        for name, value in getattr(defaults, part).to_dict().items():
            assert getattr(getattr(expected, part), name) == value, (part, name)
