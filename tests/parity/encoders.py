"""Random encoders of every family, of odd shapes, as the reference saves them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers

FAMILIES = ("EVA-CLIP", "CLIP", "SigLIP", "DINOv2", "DINOv2 with registers", "DINOv3", "ViT")
KINDS = {"CLIP": "CLIP", "SigLIP": "Siglip", "DINOv2": "Bit", "DINOv2 with registers": "Bit", "DINOv3": "DINOv3ViT",
         "ViT": "ViT", "EVA-CLIP": "Blip"}  # fmt: skip


def shape(family: str, chance: random.Random) -> dict[str, Any]:
    """Sizes as config.json names them."""
    heads = chance.choice([1, 2, 3, 5])
    head_size = chance.choice([4, 8, 12, 20]) if family == "DINOv3" else chance.choice([3, 4, 7, 8, 16])
    patch = chance.choice([3, 4, 7, 14])
    sizes: dict[str, Any] = {
        "hidden_size": heads * head_size,
        "num_attention_heads": heads,
        "num_hidden_layers": chance.randint(2, 5),
        "patch_size": patch,
        "image_size": patch * chance.randint(1, 6) + chance.randrange(patch),
        "layer_norm_eps": chance.choice([1e-5, 1e-6, 1e-12]),
        "hidden_act": chance.choice(["gelu", "quick_gelu", "gelu_pytorch_tanh"]),
    }
    if family.startswith("DINOv2"):
        sizes |= {"mlp_ratio": chance.choice([1, 2, 4]), "use_swiglu_ffn": chance.random() < 0.4}
    else:
        sizes["intermediate_size"] = chance.randint(5, 70)
    if family in ("DINOv2", "DINOv2 with registers", "ViT"):
        sizes["qkv_bias"] = chance.random() < 0.7
    if family in ("DINOv2 with registers", "DINOv3"):
        sizes["num_register_tokens"] = chance.randint(0 if family == "DINOv3" else 1, 5)
    if family == "DINOv3":
        biases = ("query_bias", "key_bias", "value_bias", "proj_bias", "mlp_bias")
        sizes |= {name: chance.random() < 0.6 for name in biases}
        sizes |= {"use_gated_mlp": chance.random() < 0.4, "rope_theta": chance.choice([10.0, 100.0, 1000.0])}
        if sizes["use_gated_mlp"]:
            sizes["hidden_act"] = chance.choice(["gelu", "silu"])
    if family == "SigLIP":
        sizes["vision_use_head"] = chance.random() < 0.5
    return sizes


def build(family: str, sizes: dict[str, Any], seed: int, *, whole: bool = False) -> torch.nn.Module:
    """The reference's model; ``whole``: with what else its files hold (a text encoder, a classifier)."""
    if family == "EVA-CLIP":
        model = transformers.Blip2VisionModel(transformers.Blip2VisionConfig(**sizes))
    elif family in ("CLIP", "SigLIP") and whole:
        text = {"hidden_size": sizes["hidden_size"], "num_attention_heads": sizes["num_attention_heads"],
                "num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": 50, "bos_token_id": 1,
                "eos_token_id": 2}  # fmt: skip
        kind = "Siglip" if family == "SigLIP" else "CLIP"
        config = getattr(transformers, f"{kind}Config")(vision_config=sizes, text_config=text)
        model = getattr(transformers, f"{kind}Model")(config)
    else:
        kind = {"CLIP": "CLIPVision", "SigLIP": "SiglipVision", "DINOv2": "Dinov2", "ViT": "ViT",
                "DINOv2 with registers": "Dinov2WithRegisters", "DINOv3": "DINOv3ViT"}[family]  # fmt: skip
        ending = "ForImageClassification" if whole and family in ("DINOv2", "ViT") else "Model"
        model = getattr(transformers, f"{kind}{ending}")(getattr(transformers, f"{kind}Config")(**sizes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name and parameter.dim() == 1
            if parameter.dim() in (2, 4) and "embeddings.position" not in name:
                values *= parameter[0].numel() ** -0.5
            elif name.endswith("weight") and is_norm:
                values = 1 + 0.3 * values
            elif name.endswith("bias"):
                values *= 0.2
            parameter.copy_(values)
    return model.eval()


def settings(family: str, size: int) -> dict[str, Any]:
    """preprocessor_config.json for images of that size."""
    square = {"height": size, "width": size}
    content = {"image_processor_type": f"{KINDS[family]}ImageProcessor", "size": square, "do_resize": True,
               "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}  # fmt: skip
    if family in ("CLIP", "DINOv2", "DINOv2 with registers"):
        content |= {"size": {"shortest_edge": size + size // 7}, "do_center_crop": True, "crop_size": square}
    return content


def save(model: torch.nn.Module, family: str, folder: Path, size: int) -> Path:
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings(family, size)))
    return folder


def reference(model: torch.nn.Module, family: str, pixels_BCHW: torch.Tensor, layer: str, class_token: bool):
    """What a Q-Former would see of it: the reference's own states, without registers."""
    for name in ("vision_model", "dinov2", "vit"):
        if family != "EVA-CLIP":
            model = getattr(model, name, model)
    resizes = {} if family.startswith("DINO") else {"interpolate_pos_encoding": True}
    with torch.inference_mode():
        found = model(pixels_BCHW, output_hidden_states=True, **resizes)
    if family == "EVA-CLIP":
        return found.hidden_states[-1][:, 0 if class_token else 1 :]
    # The reference's own last_hidden_state: normed, where the family norms its patches.
    states_BPD = found.last_hidden_state if layer == "last" else found.hidden_states[-2]
    if family == "SigLIP":
        return states_BPD
    prefix = 1 + getattr(model.config, "num_register_tokens", 0)
    return torch.cat([states_BPD[:, : int(class_token)], states_BPD[:, prefix:]], dim=1)


def difference(family: str, seed: int, folder: Path) -> tuple[float, str]:
    """The largest difference of one random encoder's features from the reference's, and what it was."""
    from blip2 import checkpoint

    chance = random.Random(f"{family} {seed}")
    sizes = shape(family, chance)
    whole, class_token = chance.random() < 0.4, chance.random() < 0.7
    layer = "second-last" if family == "EVA-CLIP" else chance.choice(["second-last", "last"])
    trained = sizes["image_size"]
    seen = trained if chance.random() < 0.5 else sizes["patch_size"] * chance.randint(1, 7) + chance.randrange(3)
    seen = max(seen, sizes["patch_size"])
    theirs = build(family, sizes, seed, whole=whole)
    save(theirs, family, folder, seen)
    ours, _ = checkpoint.load_encoder(folder, layer=layer, class_token=class_token)
    worst, told = 0.0, f"{sizes} seen at {seen}, {layer}, class token {class_token}, whole {whole}"
    for height, width in ((seen, seen), (seen + sizes["patch_size"], seen)):
        if (height, width) != (seen, seen) and seen // sizes["patch_size"] != trained // sizes["patch_size"]:
            continue  # resized twice is not resized once
        pixels_BCHW = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(seed))
        wanted_BPD = reference(theirs, family, pixels_BCHW, layer, class_token)
        with torch.inference_mode():
            found_BPD = ours.features(pixels_BCHW)
        assert found_BPD.shape == wanted_BPD.shape, told
        worst = max(worst, float((found_BPD - wanted_BPD).abs().max() / wanted_BPD.abs().max().clamp(min=1)))
    return worst, told
