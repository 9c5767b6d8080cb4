"""Tiny random models with real tokenizers, in the published layout: whole, and fast enough for every test."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from blip2 import checkpoint
from blip2.checkpoint.decoders import parse_decoder
from blip2.config import Blip2Config, LanguageConfig, MatcherConfig, OPTConfig, QFormerConfig, T5Config, VisionConfig
from blip2.model import Blip2, Blip2Matcher

CORPUS = [
    "Question: how many dogs are there? Answer: two\n",
    "Question: what colour is the car? Answer: red. Question: where is it? Answer: on the left\n",
    "a photo of two dogs and a red car on green\nQuestion: is there a cat? Short answer: no\n",
    "naïve café — 🐕🚗 日本\n",
]
VISION = VisionConfig(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32, image_size=32, patch_size=16)
QFORMER = QFormerConfig(
    hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, encoder_hidden_size=16, num_query_tokens=4
)


def opt_tokenizer() -> Tokenizer:
    """Byte-level BPE with OPT's special tokens in OPT's places."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(["<image>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    return tokenizer


def t5_tokenizer() -> Tokenizer:
    """Words with their space before them, as SentencePiece writes them; T5's special tokens in T5's places."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<pad>", "</s>", "<unk>", "<image>"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def tokenizer_of(family: str) -> Tokenizer:
    return t5_tokenizer() if family == "t5" else opt_tokenizer()


def matching_tokenizer() -> Tokenizer:
    """WordPiece with BERT's special tokens."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def instruction_tokenizer() -> Tokenizer:
    """What the Q-Former of an InstructBLIP reads: the same, with what begins and ends a text."""
    tokenizer = matching_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    )
    return tokenizer


def llama_fields() -> dict[str, Any]:
    """Of a config.json: heads that share keys, a window in the second layer, norms on queries and keys."""
    return {
        "model_type": "qwen3", "vocab_size": 352, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 128,
        "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1, "tie_word_embeddings": False,
        "bos_token_id": 2, "pad_token_id": 1,
        "eos_token_id": opt_tokenizer().encode("\n", add_special_tokens=False).ids,
    }  # fmt: skip


def language_config(family: str) -> LanguageConfig:
    if family == "llama":
        return parse_decoder(llama_fields())
    if family == "opt":
        return OPTConfig(
            vocab_size=352,
            hidden_size=24,
            num_layers=2,
            num_heads=2,
            intermediate_size=48,
            max_position_embeddings=128,
            eos_token_id=opt_tokenizer().encode("\n", add_special_tokens=False).ids[0],
        )
    return T5Config(
        vocab_size=208, hidden_size=24, head_size=8, num_layers=2, num_decoder_layers=2, num_heads=2,
        intermediate_size=48,
    )  # fmt: skip


@torch.no_grad()
def generative(family: str) -> Blip2:
    """A random model that looks at its image: what comes from there is as strong as the words."""
    torch.manual_seed(7)
    tokenizer = tokenizer_of(family)
    config = Blip2Config(VISION, QFORMER, language_config(family), image_token_id=tokenizer.token_to_id("<image>"))
    model = Blip2(config).eval()
    model.qformer.reset_parameters(std=0.3)
    model.projection.weight *= 4
    if family == "opt":  # the table is input and output at once: let the layers outweigh the token's own row
        model.language.token_embedding.weight *= 0.2
        for name, weight in model.language.blocks.named_parameters():
            weight *= 4 if name.endswith("weight") and weight.dim() == 2 else 1
    return model


def save_generative(family: str, folder: Path) -> Path:
    """Write the model of that family, "opt", "t5" or "llama", with its tokenizer."""
    tokenizer = tokenizer_of(family)
    checkpoint.save(generative(family), folder, tokenizer=tokenizer.to_str())
    return folder


def instructed(family: str) -> Blip2:
    """A random InstructBLIP, "t5" or "llama", to which the prompt matters."""
    torch.manual_seed(7)
    language = language_config("t5")
    if family == "llama":
        fields = {key: value for key, value in llama_fields().items() if "window" not in key}
        language = parse_decoder(fields | {"model_type": "llama", "max_position_embeddings": 400, "eos_token_id": 2})
    qformer = replace(QFORMER, has_text=True, vocab_size=206, max_position_embeddings=140)
    image_token_id = tokenizer_of(family).token_to_id("<image>")
    model = Blip2(Blip2Config(VISION, qformer, language, image_token_id=image_token_id)).eval()
    model.qformer.reset_parameters(std=0.3)
    with torch.no_grad():
        model.projection.weight *= 4
    return model


def save_instructed(family: str, folder: Path) -> Path:
    """Write it with its two tokenizers."""
    tokenizers = {"tokenizer": tokenizer_of(family).to_str(), "qformer_tokenizer": instruction_tokenizer().to_str()}
    checkpoint.save(instructed(family), folder, **tokenizers)
    return folder


def save_matching(folder: Path) -> Path:
    torch.manual_seed(7)
    qformer = replace(QFORMER, has_text=True, vocab_size=200, max_position_embeddings=64)
    model = Blip2Matcher(MatcherConfig(vision=VISION, qformer=qformer, projection_size=8, bos_token_id=5))
    checkpoint.save(model.eval(), folder, tokenizer=matching_tokenizer().to_str())
    return folder


def picture(seed: int, size: int = 40) -> Image.Image:
    """Four squares of random colours."""
    colours = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), np.uint8)
    return Image.fromarray(colours.repeat(size // 2, 0).repeat(size // 2, 1))


def save_pictures(folder: Path, number: int) -> list[str]:
    """So many different PNG files, by name in order."""
    paths = [folder / f"picture{index:03}.png" for index in range(number)]
    for seed, path in enumerate(paths):
        picture(seed).save(path)
    return [str(path) for path in paths]
