"""Language models of many families, each from its own published files: the reference's logits and tokens."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from blip2 import checkpoint
from blip2.checkpoint import decoders, gpts
from blip2.errors import CheckpointError
from blip2.generation import Engine, GenerateOptions
from blip2.language import pad_rows
from blip2.quantized import QuantizedLinear

transformers = pytest.importorskip("transformers")

from tests.parity.decoders import ENCODER_DECODERS, FAMILIES, reference, whole  # noqa: E402

logging.getLogger("transformers").setLevel(logging.ERROR)

DEFAULTS = decoders.LLAMAS | gpts.DEFAULTS
ALL = [*FAMILIES, *ENCODER_DECODERS]
LENGTHS = (7, 1, 12, 4)
LONGEST = 12
WAYS = [{}, {"num_beams": 4}, {"num_beams": 3, "length_penalty": -1.0}]
TOLERANCE = 1e-4


def pair(family, seed, folder):
    theirs = reference(family, seed)
    theirs.save_pretrained(folder)
    return theirs, checkpoint.load_language(folder)


@torch.inference_mode()
def difference(theirs, ours, ids):
    """The largest, of logits over their size where that is above 1: of whole texts, and of prefill and steps, all rows
    in a batch. What follows a prompt goes on from it, or with an encoder from a token of its own."""
    worst = 0.0
    prompts = [ours.embed(torch.tensor(row)) for row in ids]
    logits_BV, state = ours.prefill(*pad_rows(prompts), 6)
    following_BT = torch.tensor([[(3 * row + 5 * step) % 37 for step in range(6)] for row in range(len(ids))])
    stepped = [logits_BV, *(ours.step(token_B, state) for token_B in following_BT[:, :5].T)]
    for number, row in enumerate(ids):
        following, length_1 = following_BT[number].tolist(), torch.tensor([len(row)])
        if ours.config.has_encoder:
            decoded_1T = torch.tensor([[0, *following[:5]]])
            expected_TV = theirs(input_ids=torch.tensor([row]), decoder_input_ids=decoded_1T).logits[0]
            whole_TV = ours.logits(ours(prompts[number][None], length_1, decoded_1T))[0]
            written_TV = expected_TV
        else:
            text_1T = torch.tensor([row + following])
            expected_TV = theirs(input_ids=text_1T).logits[0]
            whole_TV = ours.logits(ours(ours.embed(text_1T)))[0]
            written_TV = expected_TV[len(row) - 1 : -1]
        size = max(1.0, expected_TV.abs().max().item())
        cached_TV = torch.stack([step[number] for step in stepped])
        worst = max(worst, (whole_TV - expected_TV).abs().max().item() / size)
        worst = max(worst, (cached_TV - written_TV).abs().max().item() / size)
    return worst


@torch.inference_mode()
def tokens(theirs, ours, ids, options):
    """The reference's answers to each prompt alone, and ours in a batch."""
    ends = ours.config.end_token_ids
    expected = []
    for row in ids:
        out = theirs.generate(
            inputs_embeds=theirs.get_input_embeddings()(torch.tensor([row])), max_new_tokens=LONGEST, do_sample=False,
            attention_mask=torch.ones(1, len(row), dtype=torch.long), eos_token_id=list(ends), pad_token_id=1,
            **options,
        )[0, int(ours.config.has_encoder) :].tolist()  # fmt: skip
        end = next((place for place, token in enumerate(out) if token in ends), len(out))
        expected.append(out[:end])
    engine = Engine(ours, eos_token_ids=ends)
    prompts = [ours.embed(torch.tensor(row)) for row in ids]
    answers = engine.generate(prompts, GenerateOptions(max_new_tokens=LONGEST, **options))
    return expected, [own[0].tokens for own in answers]


def prompts_for(theirs, seed):
    generator = torch.Generator().manual_seed(seed)
    most = theirs.config.vocab_size
    return [torch.randint(0, most, (length,), generator=generator).tolist() for length in LENGTHS]


def check(family, seed, folder, ways=WAYS):
    theirs, ours = pair(family, seed, folder)
    ids = prompts_for(theirs, seed)
    found = difference(theirs, ours, ids)
    assert found < TOLERANCE, (family, seed)
    for options in ways:
        expected, own = tokens(theirs, ours, ids, options)
        assert own == expected, (family, seed, options)
    return found


@pytest.mark.parametrize("family", ALL)
def test_the_same_logits_and_tokens(family, tmp_path):
    check(family, 0, tmp_path, WAYS[:2])


@pytest.mark.slow
@pytest.mark.parametrize("family", ALL)
def test_sixty_of_each(family, tmp_path):
    worst = max(check(family, seed, tmp_path / str(seed)) for seed in range(60))
    print(f"\n{family}: 60 configurations, largest difference {worst:.1e}, all tokens equal")


def whole_pair(family, seed, folder):
    theirs = whole(family, seed)
    theirs.save_pretrained(folder)
    return theirs, checkpoint.load(folder)


@torch.inference_mode()
def check_whole(family, seed, folder):
    """Pictures with texts, each alone in the reference and all together here; and the reference reads what is saved."""
    theirs, ours = whole_pair(family, seed, folder / "theirs")
    pixels_BCHW = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(seed))
    texts = [[2], [2, 9, 33, 12, 30], [2, 8, 7]]
    begun = 1 if ours.config.language.has_encoder else None  # an answer of its own, with the start token
    prompts = ours.prompt(ours.encode(pixels_BCHW))
    prompts = [
        torch.cat([picture_QD, ours.language.embed(torch.tensor(text))])
        for picture_QD, text in zip(prompts, texts, strict=True)
    ]
    ends = list(ours.config.language.end_token_ids)
    checkpoint.save(ours, folder / "ours")
    again = transformers.Blip2ForConditionalGeneration.from_pretrained(folder / "ours", attn_implementation="eager")
    image = theirs.config.image_token_index
    for options in WAYS[:2]:
        engine = Engine(ours.language, eos_token_ids=ends)
        answers = engine.generate(prompts, GenerateOptions(max_new_tokens=LONGEST, **options))
        for picture, text, own in zip(pixels_BCHW, texts, answers, strict=True):
            ids_1T = torch.tensor([[image] * 5 + text])
            for model in (theirs, again):
                out = model.generate(
                    pixel_values=picture[None], input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T),
                    max_new_tokens=LONGEST, do_sample=False, eos_token_id=ends, pad_token_id=1, **options,
                )[0, begun or ids_1T.shape[1] :].tolist()  # fmt: skip
                end = next((place for place, token in enumerate(out) if token in ends), len(out))
                assert own[0].tokens == out[:end], (family, seed, options)


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "umt5"])
def test_a_whole_blip2(family, tmp_path):
    check_whole(family, 1, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", ALL)
def test_ten_whole_ones_of_each(family, tmp_path):
    for seed in range(10):
        check_whole(family, seed, tmp_path / str(seed))


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "phi3", "gpt2", "t5"])
@torch.inference_mode()
def test_in_8_and_4_bits(family, kind, tmp_path):
    """The logits of the weights that the codes stand for; activations have 15 bits."""
    theirs = reference(family, 2)
    theirs.save_pretrained(tmp_path)
    ours = checkpoint.load_language(tmp_path, quantize=kind)
    plain = checkpoint.load_language(tmp_path)
    quantized = {name: each for name, each in ours.named_modules() if isinstance(each, QuantizedLinear)}
    assert {"blocks.0.qkv", "encoder.0.feed_forward.down"} & quantized.keys()
    ids = prompts_for(theirs, 2)
    if plain.output is None:
        plain.output = torch.nn.Linear(1, 1, bias=False)  # the table, which stays as it is where words are looked up
    for name, each in quantized.items():
        plain.get_submodule(name).weight = torch.nn.Parameter(each.dequantized())
    prompts, lengths_B = pad_rows([plain.embed(torch.tensor(row)) for row in ids])
    next_B = torch.tensor([3, 4, 5, 6])
    expected, its_state = plain.prefill(prompts, lengths_B, 2)
    found, state = ours.prefill(prompts, lengths_B, 2)
    torch.testing.assert_close(found, expected, atol=3e-3, rtol=3e-3)
    torch.testing.assert_close(ours.step(next_B, state), plain.step(next_B, its_state), atol=3e-3, rtol=3e-3)


@pytest.mark.parametrize("family", ["bloom", "gpt2", "gpt_neox", "gemma2", "umt5"])
@torch.inference_mode()
def test_steps_in_memory_that_stays(family, tmp_path):
    """As they are recorded for a GPU (`blip2.generation.replay`)."""
    theirs, ours = pair(family, 1, tmp_path)
    prompts = pad_rows([ours.embed(torch.tensor(row)) for row in prompts_for(theirs, 1)[:3]])
    (_, state), (_, same) = ours.prefill(*prompts, 5), ours.prefill(*prompts, 5)
    home = state.fixed()
    state.settle(home)
    for token in (3, 7, 4):
        tokens_R = torch.tensor([token, token + 1, token + 2, 0])  # rows are rounded up
        expected = ours.step(tokens_R[:3], same)
        torch.testing.assert_close(ours.step(tokens_R, home)[:3], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "bloom", "llama"])
def test_files_of_a_bare_model_with_the_buffers_of_old(family, tmp_path):
    """What openai-community/gpt2 and bigscience/bloom-560m hold: no prefix, no head, masks as tensors."""
    _, ours = pair(family, 1, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "bare")
    tensors = load_file(tmp_path / "bare" / "model.safetensors")
    bare = {name.removeprefix("transformer.").removeprefix("model."): tensor for name, tensor in tensors.items()}
    assert bare.keys() != tensors.keys()
    bare |= {"h.0.attn.bias": torch.ones(1, 1, 4, 4), "layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    save_file(bare, tmp_path / "bare" / "model.safetensors", metadata={"format": "pt"})
    again = checkpoint.load_language(tmp_path / "bare")
    assert all(map(torch.equal, again.state_dict().values(), ours.state_dict().values()))


def test_the_end_is_in_the_generation_config(tmp_path):
    """Llama 3 ends a turn by another token than a text, and only this file says so."""
    _, ours = pair("llama", 0, tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    config = checkpoint.read_language(tmp_path)
    assert (config.end_token_ids, config.eos_token_id) == ((7, 9), 7)
    assert config.rotary == ours.config.rotary


def fields(family, **changed):
    return DEFAULTS[family] | {"model_type": family, "eos_token_id": 2} | changed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (fields("llama", num_key_value_heads=5), "num_key_value_heads is 5 in llama, and does not divide"),
        (fields("llama", hidden_act="mish"), "hidden_act is 'mish' in llama; use one of silu"),
        (fields("llama", rope_scaling={"rope_type": "spiral"}), "rope_type is 'spiral' in llama; use one of default"),
        (fields("llama", rope_scaling={"rope_type": "linear"}), "factor is None in rope_scaling of llama"),
        (fields("llama", partial_rotary_factor=0.5), "partial_rotary_factor is 0.5 in llama"),
        (fields("llama", head_dim=7), "head_dim is 7 in llama, of which 7 dimensions are rotated"),
        (fields("llama", eos_token_id=None), "there is no eos_token_id in llama"),
        (fields("llama", eos_token_id=[2, 32000]), "eos_token_id is 32000 in llama"),
        (fields("mistral", sliding_window=0), "sliding_window is 0 in mistral"),
        (fields("qwen2", use_sliding_window=True, layer_types=["sliding_attention"]), "layer_types is .* a list of 32"),
        (fields("smollm3", no_rope_layers=[1]), "no_rope_layers is .* a list of 36 of 0 and 1"),
        (fields("gemma", use_bidirectional_attention=True), "only causal language models"),
        (fields("phi3", rope_scaling={"type": "su", "short_factor": [1.0]}), "short_factor is .* a list of 48"),
        (fields("bloom", apply_residual_connection_post_layernorm=True), "in bloom; only False is supported"),
        (fields("gpt2", n_head=7), "number of heads is 7 in gpt2, which does not divide the width"),
        ({"model_type": "llama", "vocab_sizd": 3}, "there is vocab_sizd but no vocab_size in llama"),
    ],
)
def test_what_would_be_built_wrongly_is_refused(content, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read_language(tmp_path)


def test_null_is_not_absent(tmp_path):
    """Mistral's second version has no window, and says so by null; a Mistral that says nothing has one of 4096."""
    for said, window in (({}, 4096), ({"sliding_window": None}, None)):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral"} | said))
        assert checkpoint.read_language(tmp_path).window == window
