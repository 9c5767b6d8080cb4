"""Random InstructBLIPs of the reference, with their processors, in folders as they are published."""

from __future__ import annotations

import random

import torch
import transformers

from tests import tiny
from tests.parity.decoders import FAMILIES, redraw

LANGUAGES = ("t5", "llama")


def _text(family: str, chance: random.Random):
    if family == "llama":
        text = FAMILIES["llama"](chance)
        # As with Vicuna: the configuration says that a text begins with "<s>", the tokenizer says "</s>".
        text.update({"vocab_size": 352, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1})
        text.update({"max_position_embeddings": 200})
        if text.rope_parameters["rope_type"] == "dynamic":  # which depends on the text's length
            text.rope_parameters = {"rope_type": "default", "rope_theta": 10_000.0}
        text.tie_word_embeddings = False
        return text
    layers = chance.randint(2, 3)
    return transformers.T5Config(
        vocab_size=208, d_model=chance.randint(9, 40), d_kv=chance.randint(2, 12), d_ff=chance.randint(9, 50),
        num_layers=layers, num_decoder_layers=chance.randint(1, layers), num_heads=chance.randint(1, 5),
        relative_attention_num_buckets=chance.choice([4, 8, 32]),
        relative_attention_max_distance=chance.choice([20, 128]), eos_token_id=1, pad_token_id=0,
        decoder_start_token_id=0, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip


def model(family: str, seed: int):
    """The random model number ``seed``, by which everything matters and nothing explodes."""
    chance = random.Random(f"instruct {family} {seed}")
    text = _text(family, chance)
    text._attn_implementation = "eager"
    heads, width, patch = chance.randint(1, 3), chance.randint(4, 9), chance.choice([7, 8, 14])
    vision = transformers.InstructBlipVisionConfig(
        hidden_size=heads * width, num_attention_heads=heads, num_hidden_layers=chance.randint(1, 3),
        intermediate_size=chance.randint(9, 40), image_size=patch * chance.randint(2, 4), patch_size=patch,
    )  # fmt: skip
    heads = chance.randint(1, 4)
    qformer = transformers.InstructBlipQFormerConfig(
        hidden_size=heads * chance.randint(4, 9), num_attention_heads=heads, num_hidden_layers=chance.randint(2, 5),
        intermediate_size=chance.randint(9, 40), cross_attention_frequency=chance.choice([1, 2, 3]), vocab_size=206,
        max_position_embeddings=160,
    )  # fmt: skip
    config = transformers.InstructBlipConfig(
        vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=chance.choice([1, 4, 32]),
        image_token_index=3 if family == "t5" else tiny.opt_tokenizer().token_to_id("<image>"),
    )  # fmt: skip
    made = transformers.InstructBlipForConditionalGeneration._from_config(config, attn_implementation="eager")
    redraw(made.language_model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if not name.startswith("language_model."):
                values = torch.randn(parameter.shape, generator=generator)
                is_norm = "norm" in name.lower() and name.endswith("weight")
                # Queries outweigh nothing, so that the text beside them matters.
                scale = 1.5 * parameter[0].numel() ** -0.5 if parameter.dim() > 1 and "embed" not in name else 0.5
                parameter.copy_(1 + 0.3 * values if is_norm else values * scale)
    return made.eval()


def processor(family: str, made):
    """Of that model, with the tokenizers' settings of the published ones."""
    words, padding = (tiny.t5_tokenizer(), "right") if family == "t5" else (tiny.opt_tokenizer(), "left")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="</s>", unk_token="<unk>", pad_token="<pad>", padding_side=padding,
        truncation_side="left",
        **({} if family == "t5" else {"bos_token": "</s>"}),
    )  # fmt: skip
    reads = tiny.instruction_tokenizer()
    qformer_tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=reads, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]",
        bos_token="[DEC]", truncation_side="left",
    )  # fmt: skip
    side = made.config.vision_config.image_size
    images = transformers.BlipImageProcessor(size={"height": side, "width": side})
    number = made.config.num_query_tokens
    return transformers.InstructBlipProcessor(images, tokenizer, qformer_tokenizer, num_query_tokens=number)


def saved(family: str, seed: int, folder):
    """The model and its processor, and written into the folder."""
    made = model(family, seed)
    its = processor(family, made)
    made.save_pretrained(folder)
    its.save_pretrained(folder)
    return made, its
