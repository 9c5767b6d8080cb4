"""The authors' names: literal tables from LAVIS's to the published (Hugging Face) names, and both conversions.

``{}`` is the number of a layer. ``.*`` stands for ``.weight`` and ``.bias``. Written from the authors' modules
(``eva_vit.py``, ``clip_vit.py``, ``Qformer.py``, ``blip2_qformer.py``). Where the layouts differ in more than names:

- EVA-CLIP has no bias for the keys and two parameters for the others; the published layout has one ``qkv.bias``.
- CLIP's class and position embeddings have no leading 1s.
- The Q-Former's caption head repeats the word table and its own bias, to which it is tied.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from blip2.checkpoint.keys import INSTRUCT, QFORMER_TEXT
from blip2.checkpoint.keys import QFORMER as PUBLISHED_QFORMER
from blip2.errors import CheckpointError

Table = dict[str, str]

CLASS = "vision_model.embeddings.class_embedding"
POSITIONS = "vision_model.embeddings.position_embedding"
POST_NORM = "vision_model.post_layernorm."  # belongs to the image encoder by name only: it is trained
PREFIXES = {"opt": "opt", "t5": "t5", "decoder": "llm"}
"""Prefixes of the language model's weights, by family; the last is the Vicuna of an InstructBLIP."""


def _table(theirs: str, ours: str, names: Table) -> Table:
    """The table with both prefixes added, and ``.*`` expanded."""
    return {
        theirs + their.replace(".*", ending): ours + our.replace(".*", ending)
        for their, our in names.items()
        for ending in ((".weight", ".bias") if their.endswith(".*") else ("",))
    }


# EVA-CLIP g/14: eva_vit_g.pth, and files in which it was trained.
EVA = _table("visual_encoder.", "vision_model.embeddings.", {
    "cls_token": "class_embedding",
    "pos_embed": "position_embedding",
    "patch_embed.proj.*": "patch_embedding.*",
}) | _table("visual_encoder.blocks.{}.", "vision_model.encoder.layers.{}.", {
    "norm1.*": "layer_norm1.*",
    "attn.qkv.weight": "self_attn.qkv.weight",
    "attn.q_bias": "self_attn.q_bias",
    "attn.v_bias": "self_attn.v_bias",
    "attn.proj.*": "self_attn.projection.*",
    "norm2.*": "layer_norm2.*",
    "mlp.fc1.*": "mlp.fc1.*",
    "mlp.fc2.*": "mlp.fc2.*",
})  # fmt: skip

# CLIP L/14: clip_vit_L.pth. The published layout has no such encoder; its names there are ours.
CLIP = _table("visual_encoder.", "vision_model.", {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre.*": "pre_layernorm.*",
}) | _table("visual_encoder.transformer.resblocks.{}.", "vision_model.encoder.layers.{}.", {
    "ln_1.*": "layer_norm1.*",
    "attn.in_proj_weight": "self_attn.qkv.weight",
    "attn.in_proj_bias": "self_attn.qkv.bias",
    "attn.out_proj.*": "self_attn.projection.*",
    "ln_2.*": "layer_norm2.*",
    "mlp.c_fc.*": "mlp.fc1.*",
    "mlp.c_proj.*": "mlp.fc2.*",
})  # fmt: skip

QFORMER = _table("", "", {
    "ln_vision.*": "vision_model.post_layernorm.*",
    "query_tokens": "query_tokens",
    "vision_proj.*": "vision_projection.*",
    "text_proj.*": "text_projection.*",
    "itm_head.*": "itm_head.*",
    "temp": "temp",
}) | _table("Qformer.bert.", "", {
    "embeddings.LayerNorm.*": "qformer.layernorm.*",
    "embeddings.word_embeddings.weight": "embeddings.word_embeddings.weight",
    "embeddings.position_embeddings.weight": "embeddings.position_embeddings.weight",
}) | _table("Qformer.bert.encoder.layer.{}.", "qformer.encoder.layer.{}.", {
    "attention.self.query.*": "attention.attention.query.*",
    "attention.self.key.*": "attention.attention.key.*",
    "attention.self.value.*": "attention.attention.value.*",
    "attention.output.dense.*": "attention.output.dense.*",
    "attention.output.LayerNorm.*": "attention.output.LayerNorm.*",
    "crossattention.self.query.*": "crossattention.attention.query.*",
    "crossattention.self.key.*": "crossattention.attention.key.*",
    "crossattention.self.value.*": "crossattention.attention.value.*",
    "crossattention.output.dense.*": "crossattention.output.dense.*",
    "crossattention.output.LayerNorm.*": "crossattention.output.LayerNorm.*",
    "intermediate_query.dense.*": "intermediate_query.dense.*",
    "output_query.dense.*": "output_query.dense.*",
    "output_query.LayerNorm.*": "output_query.LayerNorm.*",
    "intermediate.dense.*": "intermediate.dense.*",
    "output.dense.*": "output.dense.*",
    "output.LayerNorm.*": "output.LayerNorm.*",
}) | _table("Qformer.cls.predictions.", "qformer_lm_head.", {
    "transform.dense.*": "transform.dense.*",
    "transform.LayerNorm.*": "transform.LayerNorm.*",
    "bias": "bias",
    "decoder.*": "decoder.*",
})  # fmt: skip

# The language model has its own names in both layouts; only the prefix differs.
LANGUAGE = {f"{prefix}_model.": "language_model." for prefix in PREFIXES.values()}
PROJECTION = {f"{prefix}_proj.": "language_projection." for prefix in PREFIXES.values()}
# An InstructBLIP's Q-Former reads text beside its language model; the published layout then groups the weights.
WORDS = QFORMER_TEXT["qformer.word_embedding.weight"]
TOGETHER = _table("", "", {(PUBLISHED_QFORMER | QFORMER_TEXT)[ours]: theirs for ours, theirs in INSTRUCT.items()})

# Not independent weights in LAVIS's files: a buffer, and second names of the language model's embeddings. Saving
# removes frozen weights by their first name, so the second names remain.
DROPPED = {
    "Qformer.bert.embeddings.position_ids",
    "opt_model.lm_head.weight",
    "t5_model.encoder.embed_tokens.weight",
    "t5_model.decoder.embed_tokens.weight",
}
# The caption head's copies, under their names in the tables, and the original weights.
TIED = {
    "qformer_lm_head.decoder.weight": "embeddings.word_embeddings.weight",
    "qformer_lm_head.decoder.bias": "qformer_lm_head.bias",
}


def family_of(state: dict[str, Tensor]) -> str | None:
    """The language model's family in a LAVIS state, from its projection; None for a model of stage 1."""
    return next((family for family, prefix in PREFIXES.items() if f"{prefix}_proj.weight" in state), None)


def to_published(state: dict[str, Tensor], path: Path, *, strict: bool = True) -> dict[str, Tensor]:
    """LAVIS's tensors under the published names, merged where the published layout has one instead of two.

    An unknown name is a `CheckpointError` that mentions ``path``, or is ignored if not ``strict``.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in DROPPED:
            continue
        published = _published_name(name)
        if published is not None:
            tensors[published] = tensor
        elif strict:
            raise CheckpointError(f"{path}: {name} is not a weight of BLIP-2; the file belongs to another model")
    for name in [name for name in tensors if name.endswith("_attn.q_bias")]:
        query, value = tensors.pop(name), tensors.pop(name.replace("q_bias", "v_bias"), None)
        if value is None:
            raise CheckpointError(f"{path}: {name.replace('q_bias', 'v_bias')} is missing; fetch the file again")
        tensors[name.replace("q_bias", "qkv.bias")] = torch.cat([query, torch.zeros_like(query), value])
    if "language_projection.weight" in tensors and WORDS in tensors:
        tensors = {TOGETHER.get(name, name): tensor for name, tensor in tensors.items()}
    for copy, original in TIED.items():
        if copy in tensors and not _equal(tensors.pop(copy), tensors.get(original)):
            raise CheckpointError(f"{path}: {copy} differs from {original}; in BLIP-2 they are tied")
    if CLASS in tensors:
        tensors[CLASS] = tensors[CLASS].reshape(1, 1, -1)
    if POSITIONS in tensors:
        tensors[POSITIONS] = tensors[POSITIONS].reshape(1, *tensors[POSITIONS].shape[-2:])
    return tensors


def to_authors(tensors: dict[str, Tensor], path: Path, *, family: str | None, is_clip: bool) -> dict[str, Tensor]:
    """Published tensors under LAVIS's names, for a language model of this ``family`` and this kind of image encoder.

    Raises `CheckpointError` if EVA-CLIP's keys have a bias other than zero, which LAVIS does not support.
    """
    apart = {together: name for name, together in TOGETHER.items()}
    tensors = {apart.get(name, name): tensor for name, tensor in tensors.items()}
    if not is_clip:
        for name in [name for name in tensors if name.endswith("_attn.qkv.bias")]:
            query, key, value = tensors.pop(name).chunk(3)
            if key.any():
                raise CheckpointError(
                    f"{path}: {name} has a bias for the keys, which LAVIS does not support; write only the trained "
                    "weights"
                )
            tensors[name.replace("qkv.bias", "q_bias")] = query.clone()  # saving a view would save the whole tensor
            tensors[name.replace("qkv.bias", "v_bias")] = value.clone()
    elif CLASS in tensors:
        tensors |= {CLASS: tensors[CLASS].flatten(), POSITIONS: tensors[POSITIONS][0]}
    tensors |= {copy: tensors[original] for copy, original in TIED.items() if "qformer_lm_head.bias" in tensors}
    table = {ours: theirs for theirs, ours in (QFORMER | (CLIP if is_clip else EVA)).items()}
    prefix = PREFIXES.get(family or "")
    prefixes = {"language_model.": f"{prefix}_model.", "language_projection.": f"{prefix}_proj."}
    names = {name: _renamed(name, table, prefixes) for name in tensors}
    return {theirs: tensors[name] for name, theirs in names.items() if theirs is not None}


def _published_name(name: str) -> str | None:
    return _renamed(name, QFORMER | EVA | CLIP, LANGUAGE | PROJECTION)


def _renamed(name: str, table: Table, prefixes: Table) -> str | None:
    """By its prefix, or by the table with the layer's number removed; None if unknown."""
    for before, after in prefixes.items():
        if name.startswith(before):
            return after + name.removeprefix(before)
    number = re.search(r"(?<=\.)\d+(?=\.)", name)
    if number is None:
        return table.get(name)
    found = table.get(f"{name[: number.start()]}{{}}{name[number.end() :]}")
    return None if found is None else found.format(number[0])


def _equal(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and torch.equal(one, other)
