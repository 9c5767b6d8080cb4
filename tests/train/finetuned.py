"""Fine-tuning written out plainly, row by row, over the reference's models: what `test_finetuning` compares with.

Nothing of `blip2.train` is used: texts to ids, losses, layer decay, learning rates and AdamW's groups stand here.
"""

from __future__ import annotations

import json
import math
import re

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

DECAY, PEAK, LEAST, WARM_UP, STEPS = 0.5, 2e-3, 1e-4, 2, 5


def bicubic(grid_NN: np.ndarray, size: int) -> np.ndarray:
    """A square resized as torch does it (a = -0.75, ``align_corners`` False, the border repeated), in float64."""
    side, a = len(grid_NN), -0.75

    def weight(x: float) -> float:
        x = abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    matrix = np.zeros((size, side))
    for row in range(size):
        centre = (row + 0.5) * side / size - 0.5
        for place in range(math.floor(centre) - 1, math.floor(centre) + 3):
            matrix[row, min(max(place, 0), side - 1)] += weight(centre - place)
    return matrix @ grid_NN @ matrix.T


def resized_positions(positions_1PD: torch.Tensor, size: int) -> torch.Tensor:
    """For ``size`` x ``size`` patches; the class token's stays as it is."""
    side = math.isqrt(positions_1PD.shape[1] - 1)
    grid = positions_1PD[0, 1:].double().numpy().reshape(side, side, -1)
    channels = [bicubic(grid[:, :, each], size).flatten() for each in range(grid.shape[-1])]
    return torch.cat([positions_1PD[:, :1], torch.tensor(np.stack(channels, -1))[None].float()], dim=1)


def learning_rate(step: int) -> float:
    if step < WARM_UP:
        return PEAK * (step + 1) / WARM_UP
    return LEAST + (PEAK - LEAST) * (1 + math.cos(math.pi * (step - WARM_UP) / (STEPS - 1 - WARM_UP))) / 2


def share(name: str, num_layers: int) -> float:
    """Of the learning rate, as ``get_num_layer`` and ``get_optimizer_params`` of the authors' code number layers."""
    if not name.startswith("vision_model.") or "post_layernorm" in name:
        return 1.0
    found = re.match(r"vision_model\.encoder\.layers\.(\d+)\.", name)
    layer_id = int(found[1]) + 1 if found else 0
    return DECAY ** (num_layers + 1 - layer_id)


def train(parameters: dict[str, torch.Tensor], num_layers: int, loss) -> list[float]:
    """AdamW over ``parameters`` by published name, each in a group of its own; the loss of each step."""
    groups = [
        {"params": [each], "weight_decay": 0.05 if each.dim() >= 2 else 0.0, "share": share(name, num_layers)}
        for name, each in parameters.items()
    ]
    optimizer, found = torch.optim.AdamW(groups, betas=(0.9, 0.999)), []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step) * group["share"]
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        found.append(value.item())
    return found


def generative(start, text_branch=None, size: int | None = None):
    """The reference's model of a folder, with the text branch of another, for images of ``size`` pixels."""
    config, state = json.loads((start / "config.json").read_text()), load_file(start / "model.safetensors")
    kind = transformers.Blip2ForConditionalGeneration
    if text_branch is not None:
        kind = transformers.InstructBlipForConditionalGeneration
        other = json.loads((text_branch / "config.json").read_text())["qformer_config"]
        config["model_type"] = "instructblip"
        config["vision_config"]["model_type"] = "instructblip_vision_model"
        del config["qformer_config"]["use_qformer_text_input"]
        config["qformer_config"] |= {"model_type": "instructblip_qformer", "vocab_size": other["vocab_size"],
                                     "max_position_embeddings": other["max_position_embeddings"]}  # fmt: skip
        for name, tensor in load_file(text_branch / "model.safetensors").items():
            if name.startswith("embeddings."):
                state[f"qformer.{name}"] = tensor
            elif re.match(r"qformer\.encoder\.layer\.\d+\.(intermediate|output)\.", name):
                state[name] = tensor
        for name in ("weight", "bias"):
            state[f"qformer.embeddings.layernorm.{name}"] = state.pop(f"qformer.layernorm.{name}")
    if size is not None:
        config["vision_config"]["image_size"] = size
        name = "vision_model.embeddings.position_embedding"
        state[name] = resized_positions(state[name], size // config["vision_config"]["patch_size"])
    folder = start / "plain"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    model, told = kind.from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"], told
    model.language_model.requires_grad_(False)
    return model


def sum_of_tokens(model, pixels_1CHW, prompt: str, target: str, tokenizer, reader=None) -> tuple[torch.Tensor, int]:
    """Of one text: the negative log-likelihood of its target's tokens, its end included, and how many they are."""
    config = model.config
    language = config.text_config
    queries = [config.image_token_index] * config.num_query_tokens
    asked = tokenizer.encode(prompt, add_special_tokens=False).ids
    given = {}
    if reader is not None:
        given["qformer_input_ids"] = torch.tensor([reading_ids(prompt, reader)])
    if language.model_type == "t5":
        target_ids = [*tokenizer.encode(target, add_special_tokens=False).ids, 1]
        read, decoded = [*queries, *asked, 1], torch.tensor([[0, *target_ids[:-1]]])
        logits_TV = model(pixels_1CHW, input_ids=torch.tensor([read]), decoder_input_ids=decoded, **given).logits[0]
    else:
        end = language.eos_token_id
        target_ids = [*tokenizer.encode(f" {target}", add_special_tokens=False).ids, end]
        read = [*queries, 2, *asked, *target_ids[:-1]]
        logits_TV = model(pixels_1CHW, input_ids=torch.tensor([read]), **given).logits[0, -len(target_ids) :]
    return F.cross_entropy(logits_TV, torch.tensor(target_ids), reduction="sum"), len(target_ids)


def reading_ids(text: str, reader) -> list[int]:
    ids = reader.encode(text, add_special_tokens=False).ids
    return [reader.token_to_id("[CLS]"), *ids, reader.token_to_id("[SEP]")]


def tokenizers_of(start, text_branch=None):
    reader = None
    if text_branch is not None:
        reader = Tokenizer.from_file(str(text_branch / "tokenizer.json"))
    return Tokenizer.from_file(str(start / "tokenizer.json")), reader


def retrieval_losses(model, pixels_BCHW, ids_BT, mask_BT, image_id_B) -> torch.Tensor:
    """ITC, ITM and ITG of the authors' fine-tuning, with the hardest negatives, over our model's parts."""
    patches_BPD = model.vision(pixels_BCHW)
    seen = model.qformer(image_BPD=patches_BPD)
    images_BQE = F.normalize(model.vision_projection(seen.hidden_BSD), dim=-1)
    read = model.qformer(text_BT=ids_BT, text_mask_BT=mask_BT)
    text_BE = F.normalize(model.text_projection(read.hidden_BSD[:, 0]), dim=-1)
    i2t_BB = torch.stack([(image_QE @ text_BE.T).amax(0) for image_QE in images_BQE]) / model.temperature
    same_BB = (image_id_B[:, None] == image_id_B[None]).float()
    targets_BB = 0.9 * same_BB / same_BB.sum(1, keepdim=True) + 0.1 / len(image_id_B)
    itc = sum(-(logits.log_softmax(1) * targets_BB).sum(1).mean() for logits in (i2t_BB, i2t_BB.T)) / 2
    wrong_text_B = i2t_BB.masked_fill(same_BB.bool(), -10000).argmax(1)
    wrong_image_B = i2t_BB.T.masked_fill(same_BB.bool(), -10000).argmax(1)
    labels, logits = [], []
    for image, text, label in [
        *((each, each, 1) for each in range(len(ids_BT))),
        *((wrong_image_B[each], each, 0) for each in range(len(ids_BT))),
        *((each, wrong_text_B[each], 0) for each in range(len(ids_BT))),
    ]:
        pair = {"text_BT": ids_BT[text][None], "text_mask_BT": mask_BT[text][None]}
        both = model.qformer(image_BPD=patches_BPD[image][None], **pair)
        logits.append(model.itm_head(both.hidden_BSD[0, : model.config.qformer.num_query_tokens]).mean(0))
        labels.append(label)
    itm = F.cross_entropy(torch.stack(logits), torch.tensor(labels))
    written = ids_BT.clone()
    written[:, 0] = model.config.bos_token_id
    logits_BTV = model.caption_logits(written, mask_BT, seen)
    labels_BT = written.masked_fill(~mask_BT, -100)
    itg = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten(), label_smoothing=0.1)
    return itc + itm + itg
