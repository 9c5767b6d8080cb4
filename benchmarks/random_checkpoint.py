"""Write a checkpoint of a published shape with random weights: what speed and memory are measured on.

    python benchmarks/random_checkpoint.py flan-t5-xl OUT [--dtype bfloat16]
    python benchmarks/random_checkpoint.py                      # the names and their sizes

Everything is as the published repository has it: names and shapes of the weights (taken from the reference
implementation, `transformers`), shards with an index, config.json and its neighbours, a tokenizer of the family
with its special tokens in their places. Only the numbers are noise, of a size that keeps activations in range, and
the words are made up. Prints the bytes and the seconds. One tensor at a time is in memory.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from blip2.checkpoint.preprocessor import ImageSettings, preprocessor_json

OPT = {"model_type": "opt", "vocab_size": 50304, "eos_token_id": 50118, "bos_token_id": 2, "pad_token_id": 1,
       "num_attention_heads": 32, "num_hidden_layers": 32, "max_position_embeddings": 2048}  # fmt: skip
OPT_2_7B = OPT | {"hidden_size": 2560, "word_embed_proj_dim": 2560, "ffn_dim": 10240}
OPT_6_7B = OPT | {"hidden_size": 4096, "word_embed_proj_dim": 4096, "ffn_dim": 16384}
T5 = {"model_type": "t5", "vocab_size": 32128, "d_kv": 64, "num_layers": 24, "num_decoder_layers": 24,
      "feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu", "is_gated_act": True, "bos_token_id": 1,
      "eos_token_id": 1, "pad_token_id": 0, "decoder_start_token_id": 0, "tie_word_embeddings": False}  # fmt: skip
T5_XL = T5 | {"d_model": 2048, "d_ff": 5120, "num_heads": 32}
T5_XXL = T5 | {"d_model": 4096, "d_ff": 10240, "num_heads": 64}

# Name: the language model (None: a matching model), and the side of the image in pixels.
SHAPES: dict[str, tuple[dict[str, Any] | None, int]] = {
    "opt-2.7b": (OPT_2_7B, 224),
    "opt-2.7b-coco": (OPT_2_7B, 364),
    "opt-6.7b": (OPT_6_7B, 224),
    "opt-6.7b-coco": (OPT_6_7B, 364),
    "flan-t5-xl": (T5_XL, 224),
    "flan-t5-xl-coco": (T5_XL, 364),
    "flan-t5-xxl": (T5_XXL, 224),
    "itm-vit-g": (None, 224),
    "itm-vit-g-coco": (None, 364),
}
IMAGE_TOKENS = {"opt": 50265, "t5": 32100}
DTYPES = {"bfloat16": ("BF16", torch.bfloat16), "float16": ("F16", torch.float16), "float32": ("F32", torch.float32)}
SHARD_BYTES = 5_000_000_000
WORDS = ("Question", "Short", "Answer", "a", "an", "the", "of", "photo", "what", "is", "are", "in", "there", "this",
         "picture", "how", "many", "dogs", "cat", "red", "car", "on")  # fmt: skip


class Noise:
    """Normal numbers, drawn once and read from places drawn anew; no two rows of a tensor are the same."""

    def __init__(self, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.block = torch.randn(16_777_259).to(dtype)  # a prime: rows that wrap around do not meet again

    def like(self, name: str, shape: torch.Size) -> Tensor:
        """Noise for the weight of that name: vectors keep their length through every layer."""
        number = shape.numel()
        start = int(torch.randint(len(self.block), ()))
        flat = self.block.roll(-start).repeat(math.ceil(number / len(self.block)))[:number]
        if len(shape) <= 1 and ("norm" in name.lower()) and name.endswith("weight"):
            return flat * 0.1 + 1
        return (flat * self._deviation(name, shape)).reshape(shape)

    @staticmethod
    def _deviation(name: str, shape: torch.Size) -> float:
        if name.endswith(("language_model.shared.weight", "relative_attention_bias.weight")):
            return 1.0
        if len(shape) <= 1 or name.endswith(("query_tokens", "class_embedding", "position_embedding")):
            return 0.02
        deviation = shape[1:].numel() ** -0.5
        return deviation / 8 if name.endswith("Attention.q.weight") else deviation  # T5 does not scale its scores


def reference_config(name: str) -> transformers.Blip2Config:
    text, image_size = SHAPES[name]
    qformer = {"vocab_size": 30523, "use_qformer_text_input": True} if text is None else {}
    return transformers.Blip2Config(
        vision_config={"image_size": image_size},
        qformer_config=qformer,
        text_config=text,
        num_query_tokens=32,
        image_token_index=None if text is None else IMAGE_TOKENS[text["model_type"]],
        architectures=["Blip2ForImageTextRetrieval" if text is None else "Blip2ForConditionalGeneration"],
    )


def shapes(config: transformers.Blip2Config) -> dict[str, torch.Size]:
    """The weights as the published files have them: a shared tensor once, T5's output table apart."""
    with torch.device("meta"):
        model = getattr(transformers, config.architectures[0])(config)
    is_tied = config.text_config.model_type == "opt"
    left_out = ("coder.embed_tokens.weight",) if not is_tied else ("lm_head.weight",)
    return {name: tensor.shape for name, tensor in model.state_dict().items() if not name.endswith(left_out)}


def write_weights(folder: Path, wanted: dict[str, torch.Size], dtype: str) -> int:
    """safetensors by hand (a header in JSON, then the bytes), because the library wants a whole shard in memory."""
    code, torch_dtype = DTYPES[dtype]
    size = torch_dtype.itemsize
    shards: list[dict[str, torch.Size]] = [{}]
    filled = 0
    for name, shape in wanted.items():
        if filled and filled + shape.numel() * size > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += shape.numel() * size
    noise = Noise(torch_dtype)
    files = {}
    for number, shard in enumerate(shards, 1):
        alone = len(shards) == 1
        file = "model.safetensors" if alone else f"model-{number:05}-of-{len(shards):05}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in shard.items():
            header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [end, end + shape.numel() * size]}
            end += shape.numel() * size
            files[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for name, shape in shard.items():
                stream.write(noise.like(name, shape).flatten().view(torch.uint8).numpy().data)
    total = sum(shape.numel() for shape in wanted.values()) * size
    if len(shards) > 1:
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": files})
    return total


def filled_up(known: list[str], size: int, word: str) -> list[str]:
    """The known words, then made-up ones."""
    return known + [word.format(number) for number in range(len(known), size)]


def t5_tokenizer() -> Tokenizer:
    letters = [chr(code) for code in range(33, 127)]
    known = ["<pad>", "</s>", "<unk>", "\u2581", *letters, *(f"\u2581{word}" for word in WORDS)]
    pieces = filled_up(list(dict.fromkeys(known)), 32100, "\u2581w{}")
    scores = [0.0 if piece in known[:3] else -5.0 if piece in known and len(piece) > 1 else -12.0 for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(list(zip(pieces, scores, strict=True)), unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>", "<image>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def opt_tokenizer() -> Tokenizer:
    letters = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {"\u010a"})  # "\n", which ends an answer, is 50118
    known = ["<s>", "<pad>", "</s>", "<unk>", *letters, *WORDS, *(f"\u0120{word}" for word in WORDS)]
    pieces = filled_up(list(dict.fromkeys(known)), 50265, "\u0120w{}")
    pieces[50118] = "\u010a"
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", "<image>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    return tokenizer


def matching_tokenizer() -> Tokenizer:
    special = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 30522: "[DEC]"}
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    known = filled_up([], 104, "[unused{}]") + letters + [f"##{letter}" for letter in letters]
    pieces = filled_up(list(dict.fromkeys(known + [word.lower() for word in WORDS])), 30523, "w{}")
    for index, piece in special.items():
        pieces[index] = piece
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(list(special.values()))
    return tokenizer


def write_neighbours(folder: Path, name: str, config: transformers.Blip2Config, dtype: str) -> None:
    text, image_size = SHAPES[name]
    family = None if text is None else text["model_type"]
    content = config.to_dict() | {"dtype": dtype}
    if text is None:
        del content["text_config"]
    else:
        content["text_config"] |= {"tie_word_embeddings": family == "opt"}  # the reference forgets that T5's are apart
        ids = {key: text[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        start = {"decoder_start_token_id": 0} if family == "t5" else {}
        write_json(folder / "generation_config.json", ids | start)
    tokenizer = {"opt": opt_tokenizer, "t5": t5_tokenizer, None: matching_tokenizer}[family]()
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    pad = {"opt": "<pad>", "t5": "<pad>", None: "[PAD]"}[family]
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": pad, "padding_side": "left"}
    write_json(folder / "tokenizer_config.json", described)
    processor = {"processor_class": "Blip2Processor", "num_query_tokens": 32}
    write_json(folder / "processor_config.json", processor)
    write_json(folder / "preprocessor_config.json", preprocessor_json(ImageSettings(image_size)))
    write_json(folder / "config.json", content)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("name", choices=SHAPES, nargs="?", help="without one, the sizes of all are printed")
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    args = parser.parse_args()
    if args.name is None:
        for name in SHAPES:
            number = sum(shape.numel() for shape in shapes(reference_config(name)).values())
            print(f"{name:15} {number / 1e9:6.2f}e9 weights, {number * DTYPES[args.dtype][1].itemsize / 1e9:6.2f} GB")
        return
    if args.out is None:
        parser.error("where to? give a folder after the name")
    started = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    config = reference_config(args.name)
    total = write_weights(args.out, shapes(config), args.dtype)
    write_neighbours(args.out, args.name, config, args.dtype)
    taken = time.perf_counter() - started
    gigabytes = total / 1e9
    print(
        f"{args.name}: {gigabytes:.2f} GB of {args.dtype} in {args.out}, {taken:.0f} s ({gigabytes / taken:.2f} GB/s)"
    )


if __name__ == "__main__":
    main()
