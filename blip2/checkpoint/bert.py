"""BERT's weights, from which a Q-Former is initialised (section 3.1 of the paper; ``init_Qformer`` in LAVIS).

Its feed-forward layers are copied twice, for text and for query tokens; cross-attention and query tokens are new.
BERT's embedding of the first segment is added to the position embeddings.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from blip2.checkpoint.bounds import BOUNDS, check_value
from blip2.checkpoint.reader import find_tensors
from blip2.checkpoint.settings import read_json
from blip2.config import QFormerConfig
from blip2.errors import CheckpointError

ALIASES = {"bert-base-uncased": "google-bert/bert-base-uncased"}
"""Short names of BERTs, and their current repositories."""
FIELDS = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "intermediate_size",
    "max_position_embeddings": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "layer_norm_eps": "layer_norm_eps",
}
LAYER = r"^encoder\.layer\.(\d+)\."
# Names in BERT's files, without "bert.", and in the published layout of BLIP-2.
NAMES = {
    r"^embeddings\.LayerNorm\.": ("qformer.layernorm.",),
    r"^(embeddings\.(word|position)_embeddings\.)": (r"\1",),
    LAYER + r"attention\.self\.": (r"qformer.encoder.layer.\1.attention.attention.",),
    LAYER + r"attention\.output\.": (r"qformer.encoder.layer.\1.attention.output.",),
    LAYER + r"(intermediate|output)\.": (r"qformer.encoder.layer.\1.\2.", r"qformer.encoder.layer.\1.\2_query."),
    r"^cls\.predictions\.(transform\.|bias)": (r"qformer_lm_head.\1",),
}
NOT_TAKEN = re.compile(r"^(pooler\.|cls\.seq_relationship\.|cls\.predictions\.decoder\.|embeddings\.position_ids)")
SENTENCES, POSITIONS = "embeddings.token_type_embeddings.weight", "embeddings.position_embeddings.weight"


def bert_config(folder: Path) -> QFormerConfig:
    """The configuration of a Q-Former with the size of a BERT. Raises `CheckpointError` for another kind of model."""
    path = folder / "config.json"
    content = read_json(path)
    if content.get("model_type") != "bert":
        raise CheckpointError(
            f"{path}: model_type is {content.get('model_type')!r}; a Q-Former starts from a BERT, such as "
            f"{ALIASES['bert-base-uncased']}, from a BLIP-2, or from scratch"
        )
    plain = QFormerConfig()
    try:
        fields = {
            ours: check_value(theirs, content.get(theirs, getattr(plain, ours)), getattr(plain, ours), "config.json",
                              BOUNDS.get(theirs))
            for theirs, ours in FIELDS.items()
        }  # fmt: skip
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return QFormerConfig(**fields)


def read_bert(folder: Path) -> tuple[QFormerConfig, dict[str, Tensor]]:
    """The Q-Former's configuration, and its initial weights from BERT by their published names, float32.

    Raises `CheckpointError` as `bert_config` does, and for weights of another model.
    """
    config = bert_config(folder)
    found: dict[str, Tensor] = {}
    places = {_plain(name): place for name, place in find_tensors(folder).items()}
    for name, place in places.items():
        targets = _targets(name)
        if not targets and not NOT_TAKEN.match(name) and name != SENTENCES:
            raise CheckpointError(f"{folder}: {name} is unexpected in a BERT; these are the weights of another model")
        if targets:
            tensor = place.read().float()
            found |= dict.fromkeys(targets, tensor)
    if SENTENCES in places and POSITIONS in found:
        found[POSITIONS] = found[POSITIONS] + places[SENTENCES].read().float()[0]
    return config, found


def _plain(name: str) -> str:
    """The current form of a name: without "bert.", and norms with weight and bias."""
    return re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name)).removeprefix("bert.")


def _targets(name: str) -> list[str]:
    for pattern, replacements in NAMES.items():
        if re.match(pattern, name):
            return [re.sub(pattern, replacement, name) for replacement in replacements]
    return []
