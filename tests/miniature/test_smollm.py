"""A language model out of a GGUF file: the same weights, the same words, and labels that are the answers."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers

from blip2 import checkpoint
from blip2.checkpoint.decoders import parse_decoder
from blip2.data import Row, Turn
from blip2.text import Tokenizer
from blip2.train.recipes import load_recipe
from blip2.train.texts import TextSource
from miniature import smollm

FOLDER = Path(smollm.__file__).parent
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
NAMES = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "\u0120t", "wo", "\u0120two", "12"]
SAID = {
    "general.architecture": "llama", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": NAMES,
    "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(NAMES) - len(SPECIAL)),
    "tokenizer.ggml.merges": ["\u0120 t", "w o", "\u0120t wo", "1 2"], "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.padding_token_id": 2, "llama.embedding_length": 24,
    "llama.feed_forward_length": 20, "llama.block_count": 2, "llama.attention.head_count": 6,
    "llama.attention.head_count_kv": 2, "llama.context_length": 64, "llama.rope.freq_base": 5000.0,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}  # fmt: skip


def test_digits_stand_alone_and_any_text_comes_back():
    tokenizer = Tokenizer(smollm.tokenizer_of(SAID))
    assert [tokenizer.name_of(token) for token in tokenizer.encode("12 two")] == ["1", "2", "\u0120two"]
    for text in ("two dogs", "12 \u00e9l\u00e9phants\n", "<|im_end|>", "\U0001f415"):
        assert tokenizer.decode_all(tokenizer.encode(text), skip_special_tokens=False) == text
    assert tokenizer.reading_tokens().encode("<|im_start|>") == [1]  # as a chat writes it; a person means the letters


def test_labels_are_the_answers_with_their_end():
    tokenizer, config = Tokenizer(smollm.tokenizer_of(SAID)), parse_decoder(smollm.config_of(SAID))
    recipe = load_recipe(FOLDER / "smollm.toml").data
    turns = (Turn("how many dogs are there?", "two"), Turn("and cats?", "zero"))
    row = Row("a.png", captions=("two dogs",), questions=turns[:1], dialogues=(turns,))
    source = TextSource(tokenizer, config, replace(recipe, max_prompt_tokens=512, max_text_tokens=64))
    said = {"caption": ["two dogs"], "question": ["two"], "dialogue": ["two", "zero"]}
    for text in source.draw(row, 40, random.Random(0)):
        assert text.prompt_ids[0] == config.bos_token_id
        assert text.target_ids[-1] == config.eos_token_id and config.eos_token_id not in text.target_ids[:-1]
        assert tokenizer.decode(text.target_ids) in said[text.kind]
        begun = tokenizer.decode_all(text.prompt_ids + text.target_ids, skip_special_tokens=True)
        assert begun == "two dogs" or begun.endswith((" Answer: two", " Answer: zero"))


def test_rows_of_each_head_are_as_published():
    """GGUF has the two halves of a head in turns; llama.cpp's own rule is the other way round."""
    weight = np.arange(2 * 6 * 3).reshape(12, 3)
    interleaved = weight.reshape(2, 2, 3, 3).swapaxes(1, 2).reshape(12, 3)
    assert (smollm.unpermuted(interleaved, 2) == weight).all()


def written(path, tensors, **said):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, (SAID | said)["general.architecture"])
    for name, value in (SAID | said).items():
        if name == "general.architecture":
            continue
        kinds = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
        kinds[type(value)](name, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_file_becomes_the_model_that_it_was_made_of(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**(smollm.config_of(SAID) | {"rope_theta": 5000.0}))
    reference = transformers.LlamaForCausalLM(config).eval()
    names = {theirs: ours for ours, theirs in smollm.LAYER.items()} | {"model.embed_tokens": "token_embd"}
    names["model.norm"] = "output_norm"
    tensors = {}
    for name, tensor in reference.state_dict().items():
        place, _, last = name.rpartition(".")
        if place == "lm_head":
            continue
        if place.startswith("model.layers."):
            _, _, number, part = place.split(".", 3)
            if part in ("self_attn.q_proj", "self_attn.k_proj"):
                tensor = tensor.unflatten(0, (-1, 2, 2)).transpose(1, 2).flatten(0, 2)  # heads of 4 numbers
            place = f"blk.{number}.{names[part]}"
        else:
            place = names[place]
        tensors[f"{place}.{last}"] = tensor.contiguous()
    smollm.write(written(tmp_path / "a.gguf", tensors), tmp_path / "out")
    ours = checkpoint.load_language(tmp_path / "out")
    ids_1T = torch.tensor([[1, 30, 40, 50, 60, 70]])
    with torch.inference_mode():
        torch.testing.assert_close(ours.logits(ours(ours.embed(ids_1T))), reference(ids_1T).logits, atol=1e-5, rtol=0)


def test_another_make_is_refused(tmp_path):
    path = written(tmp_path / "a.gguf", {}, **{"tokenizer.ggml.pre": "llama-bpe"})
    with pytest.raises(ValueError, match=r"a\.gguf: holds llama with the tokenizer llama-bpe"):
        smollm.write(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["stage1", "stage2", "ablation", "smollm", "bert"])
def test_recipes_are_recipes(name):
    assert load_recipe(FOLDER / f"{name}.toml").optim.steps > 0
