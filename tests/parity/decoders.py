"""Random decoders of the reference, one family a function: odd shapes, every switch that a configuration has."""

from __future__ import annotations

import random

import torch
import transformers

ENDS = [5, 17, 29]


def _sizes(chance: random.Random, *, has_head_size: bool = True) -> dict:
    # The reference divides by a head's size less 2, where positions are stretched dynamically.
    groups, each, size = chance.randint(1, 3), chance.randint(1, 4), 2 * chance.randint(2, 7)
    heads = groups * each
    width = heads * (chance.randint(3, 11) if has_head_size else size)
    sizes = {
        "vocab_size": chance.randint(40, 90), "hidden_size": width, "intermediate_size": chance.randint(9, 50),
        "num_hidden_layers": chance.randint(1, 4), "num_attention_heads": heads, "num_key_value_heads": groups,
        "max_position_embeddings": chance.choice([64, 100]), "rms_norm_eps": chance.choice([1e-6, 1e-5]),
        "eos_token_id": chance.choice([ENDS, ENDS[0]]), "bos_token_id": 2, "pad_token_id": 1,
        "tie_word_embeddings": chance.random() < 0.5,
    }  # fmt: skip
    if has_head_size:
        sizes["head_dim"] = size
    return sizes


def _rope(chance: random.Random) -> dict:
    base = chance.choice([10_000.0, 500_000.0, 100.0])
    kind = chance.choice(["default", "linear", "dynamic", "llama3", "yarn", "yarn"])
    rope = {"rope_type": kind, "rope_theta": base}
    if kind != "default":
        rope["factor"] = chance.choice([2.0, 4.0, 1.5])
    if kind in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = chance.choice([16, 40])
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": chance.choice([4.0, 2.5])}
    if kind == "yarn" and chance.random() < 0.5:
        rope |= {"beta_fast": chance.choice([16.0, 4.0]), "beta_slow": 1.0, "truncate": chance.random() < 0.5}
    if kind == "yarn" and chance.random() < 0.3:
        rope["attention_factor"] = 1.3
    return {"rope_parameters": rope}


def _kinds(chance: random.Random, layers: int) -> list[str]:
    return [chance.choice(["sliding_attention", "full_attention"]) for _ in range(layers)]


def llama(chance: random.Random):
    biases = {"attention_bias": chance.random() < 0.5, "mlp_bias": chance.random() < 0.5}
    return transformers.LlamaConfig(**_sizes(chance), **_rope(chance), **biases)


def mistral(chance: random.Random):
    window = chance.choice([None, 3, 7, 50])
    return transformers.MistralConfig(**_sizes(chance), **_rope(chance), sliding_window=window)


def _qwen(chance: random.Random, sizes: dict) -> dict:
    fields = sizes | _rope(chance)
    if chance.random() < 0.6:
        fields |= {"use_sliding_window": True, "sliding_window": chance.choice([2, 5, 9]), "max_window_layers": 1}
        if chance.random() < 0.3:
            fields["layer_types"] = _kinds(chance, sizes["num_hidden_layers"])
    return fields


def qwen2(chance: random.Random):
    return transformers.Qwen2Config(**_qwen(chance, _sizes(chance, has_head_size=False)))


def qwen3(chance: random.Random):
    return transformers.Qwen3Config(**_qwen(chance, _sizes(chance)), attention_bias=chance.random() < 0.5)


def smollm3(chance: random.Random):
    fields = _sizes(chance, has_head_size=False) | _rope(chance)
    fields |= {"attention_bias": chance.random() < 0.3, "mlp_bias": chance.random() < 0.3}
    fields |= {"no_rope_layer_interval": chance.choice([2, 3, 4])}
    if chance.random() < 0.4:
        fields |= {"use_sliding_window": True, "sliding_window": chance.choice([2, 5, 9])}
    return transformers.SmolLM3Config(**fields)


def _gemma(chance: random.Random) -> dict:
    return _sizes(chance) | {"attention_bias": chance.random() < 0.5}


def gemma(chance: random.Random):
    activation = chance.choice(["gelu", "gelu_pytorch_tanh"])
    return transformers.GemmaConfig(**_gemma(chance), **_rope(chance), hidden_act=activation)


def _gemma2(chance: random.Random) -> dict:
    return _gemma(chance) | {
        "query_pre_attn_scalar": chance.choice([4, 9, 30]), "sliding_window": chance.choice([3, 6, 40]),
        "final_logit_softcapping": chance.choice([None, 5.0, 30.0]),
        "attn_logit_softcapping": chance.choice([None, 2.0, 50.0]),
    }  # fmt: skip


def gemma2(chance: random.Random):
    return transformers.Gemma2Config(**_gemma2(chance), **_rope(chance))


def gemma3(chance: random.Random):
    fields = _gemma2(chance)
    if chance.random() < 0.5:
        fields["sliding_window_pattern"] = chance.choice([2, 3])
    else:
        fields["layer_types"] = _kinds(chance, fields["num_hidden_layers"])
    if chance.random() < 0.5:
        fields["rope_parameters"] = {
            "full_attention": _rope(chance)["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        }
    return transformers.Gemma3TextConfig(**fields)


def phi3(chance: random.Random):
    fields = _sizes(chance, has_head_size=False)
    size = fields["hidden_size"] // fields["num_attention_heads"]
    share = chance.choice([1.0, 0.5, 0.75])
    if int(size * share) % 2 or not int(size * share):
        share = 1.0
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": share}
    if chance.random() < 0.5:
        number = int(size * share) // 2
        rope |= {
            "rope_type": "longrope", "short_factor": [1 + chance.random() for _ in range(number)],
            "long_factor": [2 + chance.random() for _ in range(number)],
        }  # fmt: skip
        fields |= {"original_max_position_embeddings": 64, "max_position_embeddings": 200}
    window = chance.choice([None, None, 3, 8])
    return transformers.Phi3Config(**fields, rope_parameters=rope, sliding_window=window)


def granite(chance: random.Random):
    def number() -> float:
        return round(chance.uniform(0.2, 2.5), 3)

    return transformers.GraniteConfig(
        **_sizes(chance, has_head_size=False), **_rope(chance), attention_bias=chance.random() < 0.5,
        mlp_bias=chance.random() < 0.5, embedding_multiplier=number(), logits_scaling=number(),
        residual_multiplier=number(), attention_multiplier=number(),
    )  # fmt: skip


def _gpt(chance: random.Random, size: str, layers: str, heads: str) -> dict:
    number = chance.randint(1, 7)
    return {
        "vocab_size": chance.randint(40, 90), size: number * 2 * chance.randint(2, 7), layers: chance.randint(1, 4),
        heads: number, "eos_token_id": chance.choice([ENDS, ENDS[0]]), "bos_token_id": 2, "pad_token_id": 1,
    }  # fmt: skip


def gpt2(chance: random.Random):
    return transformers.GPT2Config(
        **_gpt(chance, "n_embd", "n_layer", "n_head"), n_positions=64, n_inner=chance.choice([None, 33]),
        activation_function=chance.choice(["gelu_new", "gelu", "relu"]),
        tie_word_embeddings=chance.random() < 0.8,
    )  # fmt: skip


def gpt_neox(chance: random.Random):
    fields = _gpt(chance, "hidden_size", "num_hidden_layers", "num_attention_heads")
    size = fields["hidden_size"] // fields["num_attention_heads"]
    rope = _rope(chance)["rope_parameters"] | {
        "partial_rotary_factor": chance.choice([1.0, 0.5]) if size in (8, 12) else 1.0
    }
    return transformers.GPTNeoXConfig(
        **fields, intermediate_size=chance.randint(9, 50), max_position_embeddings=64, rope_parameters=rope,
        use_parallel_residual=chance.random() < 0.6, tie_word_embeddings=chance.random() < 0.3,
        attention_bias=chance.random() < 0.7,
    )  # fmt: skip


def bloom(chance: random.Random):
    return transformers.BloomConfig(**_gpt(chance, "hidden_size", "n_layer", "n_head"))


def _t5(chance: random.Random) -> dict:
    return {
        "vocab_size": chance.randint(40, 90), "d_model": chance.randint(9, 40), "d_kv": chance.randint(2, 12),
        "d_ff": chance.randint(9, 50), "num_layers": chance.randint(2, 4), "num_decoder_layers": chance.randint(1, 2),
        "num_heads": chance.randint(1, 5), "relative_attention_num_buckets": chance.choice([4, 8, 32]),
        "relative_attention_max_distance": chance.choice([20, 128]), "eos_token_id": ENDS[0], "pad_token_id": 1,
        "decoder_start_token_id": 0, "layer_norm_epsilon": chance.choice([1e-6, 1e-5]),
    }  # fmt: skip


def t5(chance: random.Random):
    fields = _t5(chance)
    if chance.random() < 0.7:  # the first T5; else version 1.1
        return transformers.T5Config(**fields, feed_forward_proj="relu")
    return transformers.T5Config(**fields, feed_forward_proj="gated-gelu", tie_word_embeddings=False)


def mt5(chance: random.Random):
    kind = chance.choice(["gated-gelu", "relu", "gated-silu"])
    return transformers.MT5Config(**_t5(chance), feed_forward_proj=kind)


def umt5(chance: random.Random):
    kind = chance.choice(["gated-gelu", "relu"])
    return transformers.UMT5Config(**_t5(chance), feed_forward_proj=kind)


ENCODER_DECODERS = {each.__name__: each for each in (t5, mt5, umt5)}
FAMILIES = {
    each.__name__: each
    for each in (llama, mistral, qwen2, qwen3, smollm3, gemma, gemma2, gemma3, phi3, granite, gpt2, gpt_neox, bloom)
}


def reference(family: str, seed: int):
    """The family's random model number ``seed``, by which everything matters and nothing explodes."""
    config = (FAMILIES | ENCODER_DECODERS)[family](random.Random(f"{family} {seed}"))
    kind = transformers.AutoModelForSeq2SeqLM if family in ENCODER_DECODERS else transformers.AutoModelForCausalLM
    return redraw(kind.from_config(config, attn_implementation="eager"), seed)


def redraw(model, seed: int):
    """Other weights: as the reference initialises them, nothing varies."""
    generator = torch.Generator().manual_seed(seed)
    has_offset = "gemma" in model.config.model_type
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if "norm" in name or ".ln_" in name:
                values = 0.3 * values + (0 if has_offset or name.endswith("bias") else 1)
            elif name.endswith("bias"):
                values = 0.3 * values
            elif "embed" in name or "relative" in name or "shared" in name or ".wte." in name or ".wpe." in name:
                values = values * 0.5
            elif name.endswith(("SelfAttention.q.weight", "EncDecAttention.q.weight")):  # T5 does not scale its scores
                values = values * 0.5 * parameter.shape[-1] ** -0.5
            else:
                values = values * 1.5 * parameter.shape[0 if "c_" in name else -1] ** -0.5
            parameter.copy_(values)
    model.generation_config.eos_token_id = getattr(model.config, "eos_token_id", None)
    return model.eval()


def whole(family: str, seed: int):
    """A BLIP-2 of the reference with that language model."""
    text = (FAMILIES | ENCODER_DECODERS)[family](random.Random(f"{family} {seed}"))
    text._attn_implementation = "eager"
    vision = transformers.Blip2VisionConfig(
        hidden_size=16, num_attention_heads=2, num_hidden_layers=2, intermediate_size=24, image_size=28, patch_size=14
    )
    qformer = transformers.Blip2QFormerConfig(
        hidden_size=20, num_attention_heads=2, num_hidden_layers=2, intermediate_size=32, cross_attention_frequency=2
    )
    config = transformers.Blip2Config(
        vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=5,
        image_token_index=text.vocab_size - 1, tie_word_embeddings=text.tie_word_embeddings,
    )  # fmt: skip
    model = transformers.Blip2ForConditionalGeneration._from_config(config, attn_implementation="eager")
    redraw(model.language_model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("language_model."):
                values = torch.randn(parameter.shape, generator=generator)
                is_norm = "norm" in name.lower() and name.endswith("weight")
                parameter.copy_(1 + 0.3 * values if is_norm else values * parameter[0].numel() ** -0.5)
    return model.eval()
