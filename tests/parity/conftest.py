"""Tiny random models of the reference implementation (transformers), and the same weights loaded by this package.

The weights are redrawn: as the reference initialises them, nothing varies (the queries are zero, biases are zero,
the vision weights are 1e-10), and a test of equality would hold for almost any code.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from blip2 import checkpoint

transformers = pytest.importorskip("transformers")
logging.getLogger("transformers").setLevel(logging.ERROR)

# Sizes are odd on purpose: head counts differ between parts, patch grids are 2x2 to 5x5, T5's heads do not make up
# its width, encoder and decoder differ in depth, and 32 queries reach T5's far (logarithmic) distances.
# vision (width, heads, layers, feed-forward, image, patch); qformer (width, heads, layers, feed-forward,
# cross-attention frequency, queries); the language model by its published field names. The reference's own cache
# fails where a T5 has more decoder than encoder layers. The seeds are of models whose answers differ from image to
# image in length and words (`test_the_comparison_is_one`); most random models repeat one token.
SIZES = {
    "opt, 3 queries": {
        "seed": 2,
        "vision": (24, 3, 2, 40, 42, 14),
        "qformer": (32, 4, 4, 48, 2, 3),
        "opt": {"hidden_size": 30, "num_attention_heads": 5, "num_hidden_layers": 2, "ffn_dim": 50, "vocab_size": 61},
    },
    "opt, 8 queries, cross-attention in every third layer": {
        "seed": 25,
        "vision": (16, 2, 3, 24, 40, 8),
        "qformer": (30, 3, 5, 36, 3, 8),
        "opt": {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3, "ffn_dim": 48, "vocab_size": 67},
    },
    "opt, 32 queries": {
        "seed": 14,
        "vision": (20, 5, 2, 30, 28, 14),
        "qformer": (24, 2, 3, 40, 2, 32),
        "opt": {"hidden_size": 28, "num_attention_heads": 7, "num_hidden_layers": 2, "ffn_dim": 44, "vocab_size": 64},
    },
    "t5, 3 queries, heads narrower than the model": {
        "seed": 11,
        "vision": (24, 4, 2, 36, 30, 10),
        "qformer": (32, 2, 5, 40, 3, 3),
        "t5": {"d_model": 24, "d_kv": 5, "num_heads": 4, "d_ff": 36, "num_layers": 4, "num_decoder_layers": 3,
               "vocab_size": 59, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 11,
               "dense_act_fn": "gelu"},
    },
    "t5, 8 queries, heads wider, tanh GELU": {
        "seed": 25,
        "vision": (16, 2, 2, 28, 24, 8),
        "qformer": (20, 5, 4, 32, 2, 8),
        "t5": {"d_model": 26, "d_kv": 11, "num_heads": 3, "d_ff": 40, "num_layers": 3, "num_decoder_layers": 2,
               "vocab_size": 66, "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
               "dense_act_fn": "gelu_new"},
    },
    "t5, 32 queries, far distances": {
        "seed": 35,
        "vision": (18, 3, 1, 32, 35, 7),
        "qformer": (24, 3, 3, 36, 2, 32),
        "t5": {"d_model": 32, "d_kv": 8, "num_heads": 6, "d_ff": 30, "num_layers": 2, "num_decoder_layers": 2,
               "vocab_size": 71, "relative_attention_num_buckets": 12, "relative_attention_max_distance": 24,
               "dense_act_fn": "gelu"},
    },
}  # fmt: skip
ENDS = [5, 17, 29, 41]  # several, so that rows end at different times


def _vision_config(sizes):
    width, heads, layers, feed_forward, image, patch = sizes
    return transformers.Blip2VisionConfig(
        hidden_size=width, num_attention_heads=heads, num_hidden_layers=layers, intermediate_size=feed_forward,
        image_size=image, patch_size=patch,
    )  # fmt: skip


def _qformer_config(sizes, **more):
    width, heads, layers, feed_forward, frequency, _ = sizes
    return transformers.Blip2QFormerConfig(
        hidden_size=width, num_attention_heads=heads, num_hidden_layers=layers, intermediate_size=feed_forward,
        cross_attention_frequency=frequency, **more,
    )  # fmt: skip


def redraw(model, seed):
    """Weights by which everything matters and nothing explodes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name.lower()
            if name.endswith("bias") and "relative" not in name:
                values = values * 0.2
            elif is_norm:
                values = 1 + 0.3 * values
            elif "embed_tokens" in name and "opt" in model.config.text_config.model_type:
                values = values * 0.5  # tied to the output: larger ones make OPT repeat itself
            elif parameter.dim() == 2 and "embed" not in name and "shared" not in name and "relative" not in name:
                values = values * 1.5 * parameter.shape[1] ** -0.5
                if name.endswith(("SelfAttention.q.weight", "EncDecAttention.q.weight")):
                    values = values * 0.3  # T5 does not scale its scores
            elif parameter.dim() == 4:
                values = values * parameter[0].numel() ** -0.5
            parameter.copy_(values)
    return model.eval()


def _generative(sizes):
    family = "opt" if "opt" in sizes else "t5"
    if family == "opt":
        text = transformers.OPTConfig(
            word_embed_proj_dim=sizes["opt"]["hidden_size"], max_position_embeddings=64, bos_token_id=2,
            eos_token_id=ENDS[0], pad_token_id=1, **sizes["opt"],
        )  # fmt: skip
    else:
        fields = dict(sizes["t5"])
        activation = fields.pop("dense_act_fn")
        text = transformers.T5Config(
            feed_forward_proj="gated-gelu", tie_word_embeddings=False, eos_token_id=ENDS[0], decoder_start_token_id=0,
            **fields,
        )  # fmt: skip
        text.dense_act_fn = activation
        text.tie_word_embeddings = False
    config = transformers.Blip2Config(
        vision_config=_vision_config(sizes["vision"]),
        qformer_config=_qformer_config(sizes["qformer"]),
        text_config=text,
        num_query_tokens=sizes["qformer"][5],
        image_token_index=text.vocab_size - 1,
        tie_word_embeddings=family == "opt",
    )
    model = transformers.Blip2ForConditionalGeneration(config)
    if family == "t5":  # as published: one table for both inputs, another for the output
        language = model.language_model
        language.encoder.embed_tokens.weight = language.decoder.embed_tokens.weight = language.shared.weight
        language.lm_head.weight = torch.nn.Parameter(torch.empty_like(language.shared.weight))
    return redraw(model, sizes["seed"])


def matching(seed, image_token=None, sizes=SIZES["opt, 8 queries, cross-attention in every third layer"], shared=12):
    """The reference's matching model; ``shared``: the width of the space in which images and texts are compared."""
    config = transformers.Blip2Config(
        vision_config=_vision_config(sizes["vision"]),
        qformer_config=_qformer_config(
            sizes["qformer"], use_qformer_text_input=True, vocab_size=50, max_position_embeddings=20
        ),
        num_query_tokens=sizes["qformer"][5],
        image_text_hidden_size=shared,
        image_token_index=image_token,
    )
    return redraw(transformers.Blip2ForImageTextRetrieval(config), seed)


def load(reference, folder):
    reference.save_pretrained(folder)
    return checkpoint.load(folder)


@pytest.fixture(scope="session", params=SIZES)
def pair(request, tmp_path_factory):
    """``theirs`` and ``ours`` with the same weights, and three images."""
    theirs = _generative(SIZES[request.param])
    ours = load(theirs, tmp_path_factory.mktemp("generative"))
    side = theirs.config.vision_config.image_size
    pixels_BCHW = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(7))
    return SimpleNamespace(theirs=theirs, ours=ours, pixels_BCHW=pixels_BCHW, family=ours.config.language.family)


@pytest.fixture(scope="session", params=[None, 49], ids=["no image token", "image token"])
def matching_pair(request, tmp_path_factory):
    theirs = matching(seed=3, image_token=request.param)
    ours = load(theirs, tmp_path_factory.mktemp("matching"))
    pixels_BCHW = torch.randn(3, 3, 40, 40, generator=torch.Generator().manual_seed(8))
    return SimpleNamespace(theirs=theirs, ours=ours, pixels_BCHW=pixels_BCHW, image_token=request.param)


@pytest.fixture(scope="session")
def texts(pair):
    """Three prompts of mixed length, begun (OPT) or ended (T5) as the tokenizers do it."""
    words = [[], [9, 33, 12, 50, 7], [44, 8]]
    return [[2, *each] for each in words] if pair.family == "opt" else [[*each, 1] for each in words]


@pytest.fixture(scope="session")
def their_inputs(pair, texts):
    """Ids and mask as the reference takes them.

    OPT is padded between image and text, which is how its positions (counted by the mask) come out right. T5's
    positions are distances in the padded row, so it is right only if padded at the end.
    """
    queries = pair.theirs.config.num_query_tokens
    longest = max(len(text) for text in texts)
    pad = pair.theirs.config.text_config.pad_token_id
    ids, mask = [], []
    for text in texts:
        padding = [pad] * (longest - len(text))
        body = [*padding, *text] if pair.family == "opt" else [*text, *padding]
        real = [0] * len(padding) + [1] * len(text)
        ids.append([pair.theirs.config.image_token_index] * queries + body)
        mask.append([1] * queries + (real if pair.family == "opt" else real[::-1]))
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@pytest.fixture(scope="session")
def our_prompts(pair, texts):
    """The same as vectors, one sequence an image."""
    with torch.inference_mode():
        prompts_BQD = pair.ours.prompt(pair.ours.encode(pair.pixels_BCHW))
        return [
            torch.cat([prompt_QD, pair.ours.language.embed(torch.tensor(text))])
            for prompt_QD, text in zip(prompts_BQD, texts, strict=True)
        ]


@pytest.fixture(scope="session", params=["opt", "t5"])
def any_model(request, tmp_path_factory):
    """The folder of a tiny random model, of each family in turn that the names of the reference are for."""
    from tests import tiny

    return tiny.save_generative(request.param, tmp_path_factory.mktemp(request.param))
