"""The models that their authors published on the Hugging Face hub."""

from __future__ import annotations

from dataclasses import dataclass

from blip2.config import (
    Blip2Config,
    DecoderConfig,
    LanguageConfig,
    MatcherConfig,
    OPTConfig,
    QFormerConfig,
    Rotary,
    T5Config,
    VisionConfig,
)


@dataclass(frozen=True)
class Published:
    """A model that its authors published on the Hugging Face hub."""

    config: Blip2Config | MatcherConfig
    """That of the newest revision; older ones may have a vocabulary of 50272 and no image token."""
    purpose: str
    licence: str
    size_gb: float
    """Gigabytes (10**9 bytes) of weights, published in fp32."""
    revision: str | None
    """The default commit to download; None: the newest, where no good one is known."""


COCO_VISION = VisionConfig(image_size=364)
OPT_6_7B = OPTConfig(hidden_size=4096, intermediate_size=16384)


def _vicuna(width: int, num_layers: int, num_heads: int, intermediate_size: int) -> DecoderConfig:
    """The first Llama's sizes; the vocabulary of 32,002 tokens, the last of them for images, is padded to a multiple of
    64."""
    return DecoderConfig(
        "llama", vocab_size=32064, hidden_size=width, num_layers=num_layers, num_heads=num_heads,
        num_key_value_heads=num_heads, head_size=128, intermediate_size=intermediate_size,
        max_position_embeddings=2048, rotary=Rotary(128), bos_token_id=2, eos_token_id=2, end_token_ids=(2,),
        pad_token_id=32000,
    )  # fmt: skip


def _instruct(language: LanguageConfig, image_token_id: int) -> Blip2Config:
    return Blip2Config(qformer=QFormerConfig(vocab_size=30523, has_text=True), language=language,
                       image_token_id=image_token_id)  # fmt: skip


FLAN_T5_XXL = T5Config(hidden_size=4096, num_heads=64, intermediate_size=10240)

ANSWERS = "zero-shot captions and answers"
CAPTIONS = "captions in the style of COCO"
INSTRUCTED = "instructions, which the Q-Former also reads"
MATCHES = "image-text matching and search"
MIT = "MIT"
OPT_LICENCE = "MIT; its OPT under Meta's own licence, for non-commercial research"
FLAN_LICENCE = "MIT; its Flan-T5 under Apache-2.0"
VICUNA_LICENCE = "MIT; its Vicuna under Meta's licence of the first Llama, for non-commercial research"

# Sources of the commits: (1) several places, among them registries of file checksums; (2) a version of MTEB's table of
# models; (3) a public record of the files of that snapshot. The pins of opt-6.7b, opt-6.7b-coco and flan-t5-xxl are of
# March 2024, before the vocabulary grew for the image token; both revisions can be read.
PUBLISHED: dict[str, Published] = {
    # Before November 2024, and still requested by many programs: 51572668da0eb669e01a189dc22abe6088589a24
    "Salesforce/blip2-opt-2.7b": Published(
        Blip2Config(image_token_id=50265),
        ANSWERS, OPT_LICENCE, 15.0, "59a1ef6c1e5117b3f65523d1c6066825bcf315e3",  # (1)
    ),
    "Salesforce/blip2-opt-2.7b-coco": Published(
        Blip2Config(vision=COCO_VISION, image_token_id=50265), CAPTIONS, OPT_LICENCE, 15.0, None
    ),
    "Salesforce/blip2-opt-6.7b": Published(
        Blip2Config(language=OPT_6_7B, image_token_id=50265),
        ANSWERS, OPT_LICENCE, 31.0, "1d33d60155fd1323b97556e0f1dd5148a9749f5b",  # (2)
    ),
    "Salesforce/blip2-opt-6.7b-coco": Published(
        Blip2Config(vision=COCO_VISION, language=OPT_6_7B, image_token_id=50265),
        CAPTIONS, OPT_LICENCE, 31.0, "0d580de59320a25a4d2c386387bcef310d5f286e",  # (2)
    ),
    "Salesforce/blip2-flan-t5-xl": Published(
        Blip2Config(language=T5Config(), image_token_id=32100),
        ANSWERS, FLAN_LICENCE, 15.8, "0eb0d3b46c14c1f8c7680bca2693baafdb90bb28",  # (1)
    ),
    "Salesforce/blip2-flan-t5-xl-coco": Published(
        Blip2Config(vision=COCO_VISION, language=T5Config(), image_token_id=32100), CAPTIONS, FLAN_LICENCE, 15.8, None
    ),
    "Salesforce/blip2-flan-t5-xxl": Published(
        Blip2Config(language=FLAN_T5_XXL, image_token_id=32100),
        ANSWERS, FLAN_LICENCE, 48.9, "43206cbc865b9d5b3dd7d080e5d94b4143ca8e74",  # (2)
    ),
    "Salesforce/instructblip-flan-t5-xl": Published(
        _instruct(T5Config(), 32100), INSTRUCTED, FLAN_LICENCE, 16.1, None
    ),
    "Salesforce/instructblip-flan-t5-xxl": Published(
        _instruct(FLAN_T5_XXL, 32100), INSTRUCTED, FLAN_LICENCE, 49.2, None
    ),
    "Salesforce/instructblip-vicuna-7b": Published(
        _instruct(_vicuna(4096, 32, 32, 11008), 32001), INSTRUCTED, VICUNA_LICENCE, 31.7, None
    ),
    "Salesforce/instructblip-vicuna-13b": Published(
        _instruct(_vicuna(5120, 40, 40, 13824), 32001), INSTRUCTED, VICUNA_LICENCE, 56.8, None
    ),
    "Salesforce/blip2-itm-vit-g": Published(
        MatcherConfig(has_lm_head=False), MATCHES, MIT, 4.7, "520bf73fd0ef6ccce791cd3f06908040aef2d8cc"  # (3)
    ),
    "Salesforce/blip2-itm-vit-g-coco": Published(
        MatcherConfig(vision=COCO_VISION, has_lm_head=False),
        MATCHES, MIT, 4.7, "b1c997706e13245bbd2af5b2717239488d849f07",  # (2)
    ),
}  # fmt: skip
