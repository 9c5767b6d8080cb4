"""What a BLIP-2 model is made of: frozen dataclasses that mirror the published ``config.json``.

The field names are the field's own; `checkpoint/` translates them to and from the names in the published
files. Sizes are from Li et al. 2023 (section 3 and 4) and from the published configurations.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Literal

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, repr=False)
class VisionConfig:
    """A vision transformer. The defaults are EVA-CLIP g/14 without its last block.

    The fields from ``num_prefix_tokens`` on are what other families of encoders need (`checkpoint.encoders`).
    """

    hidden_size: int = 1408
    num_layers: int = 39
    num_heads: int = 16
    intermediate_size: int = 6144
    image_size: int = 224
    patch_size: int = 14
    layer_norm_eps: float = 1e-6
    activation: Literal["gelu", "quick_gelu", "gelu_pytorch_tanh", "silu"] = "gelu"
    has_patch_bias: bool = True
    has_pre_norm: bool = False
    num_prefix_tokens: int = 1
    """Learned tokens before the patches: the class token and the registers after it, or none."""
    keeps_class_token: bool = True
    """Whether the class token, if there is one, is seen by the Q-Former; registers never are."""
    has_gate: bool = False
    """Whether the feed-forward layer is gated; the gate's weights stand above the others in ``fc1``."""
    rotary_base: float = 0.0
    """Of the rotary positions of the patches; 0: there are none, and the positions are learned."""
    has_final_norm: bool = False
    """Whether the encoder's own last norm comes before the one that BLIP-2 trains."""
    has_smooth_resizing: bool = False
    """Whether the positions are resized with antialiasing, where a picture has another size."""

    @property
    def num_patches(self) -> int:
        """Patches of one image, without the tokens before them."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_kept_prefix_tokens(self) -> int:
        """Tokens that the Q-Former sees beside the patches: the class token, or none."""
        return min(int(self.keeps_class_token), self.num_prefix_tokens)

    @property
    def num_tokens(self) -> int:
        """Vectors of one image that the Q-Former sees."""
        return self.num_kept_prefix_tokens + self.num_patches

    def __repr__(self) -> str:
        """Features and indexes are known by it: fields that came later are told where they are not the default."""
        told = [each for each in fields(self) if each.name in FIRST_FIELDS or getattr(self, each.name) != each.default]
        return f"VisionConfig({', '.join(f'{each.name}={getattr(self, each.name)!r}' for each in told)})"


FIRST_FIELDS = {
    "hidden_size", "num_layers", "num_heads", "intermediate_size", "image_size", "patch_size", "layer_norm_eps",
    "activation", "has_patch_bias", "has_pre_norm",
}  # fmt: skip


CLIP_VIT_L = VisionConfig(
    hidden_size=1024, num_layers=23, intermediate_size=4096, layer_norm_eps=1e-5,
    activation="quick_gelu", has_patch_bias=False, has_pre_norm=True,
)  # fmt: skip


@dataclass(frozen=True)
class QFormerConfig:
    """The Querying Transformer. The defaults are the published one: BERT-base with cross-attention."""

    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    encoder_hidden_size: int = 1408
    cross_attention_frequency: int = 2
    layer_norm_eps: float = 1e-12
    dropout: float = 0.1
    num_query_tokens: int = 32
    vocab_size: int = 30522
    max_position_embeddings: int = 512
    has_text: bool = False
    """Whether the text branch exists (word and position embeddings, text feed-forward layers)."""


@dataclass(frozen=True)
class OPTConfig:
    """A decoder-only language model of the OPT family. The defaults are OPT-2.7b as BLIP-2 publishes it."""

    vocab_size: int = 50304
    hidden_size: int = 2560
    num_layers: int = 32
    num_heads: int = 32
    intermediate_size: int = 10240
    max_position_embeddings: int = 2048
    bos_token_id: int = 2
    eos_token_id: int = 50118
    pad_token_id: int = 1

    family: Literal["opt"] = field(default="opt", init=False)


@dataclass(frozen=True)
class T5Config:
    """An encoder-decoder language model of the Flan-T5 family. The defaults are Flan-T5-XL."""

    vocab_size: int = 32128
    hidden_size: int = 2048
    head_size: int = 64
    num_layers: int = 24
    num_decoder_layers: int = 24
    num_heads: int = 32
    intermediate_size: int = 5120
    num_buckets: int = 32
    max_distance: int = 128
    layer_norm_eps: float = 1e-6
    activation: Literal["gelu", "gelu_new"] = "gelu"
    """BLIP-2 was trained with the exact (erf) GELU, although Flan-T5 itself used the tanh form."""
    decoder_start_token_id: int = 0
    eos_token_id: int = 1
    pad_token_id: int = 0

    family: Literal["t5"] = field(default="t5", init=False)


LanguageConfig = OPTConfig | T5Config


@dataclass(frozen=True)
class Blip2Config:
    """A generative BLIP-2: image encoder, Querying Transformer, projection, language model."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    language: LanguageConfig = field(default_factory=OPTConfig)
    image_token_id: int | None = None
    adapted: str = ""
    """Which adapters are merged into what sees (`checkpoint.adapters`); "" for none."""


@dataclass(frozen=True)
class MatcherConfig:
    """A matching BLIP-2 (stage 1): image encoder and Querying Transformer with its text branch."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    qformer: QFormerConfig = field(default_factory=lambda: replace(QFormerConfig(), vocab_size=30523, has_text=True))
    projection_size: int = 256
    bos_token_id: int = 30522
    """``[DEC]``, the first token of a caption that the Q-Former itself generates."""
    has_lm_head: bool = True
    """Whether the learned temperature and the Q-Former's own caption head exist; the published files lack both."""
    image_token_id: int | None = None
    adapted: str = ""
    """As in `Blip2Config`."""


@dataclass(frozen=True)
class Published:
    """A model that its authors published on the Hugging Face hub."""

    config: Blip2Config | MatcherConfig
    """Of the newest revision; an older one may have 50272 rows of vocabulary and no image token."""
    purpose: str
    licence: str
    size_gb: float
    """Gigabytes (10**9 bytes) of weights, in fp32 as they are published."""
    revision: str | None
    """The commit that is fetched unless another is asked for; None where no good one is known: the newest."""


COCO_VISION = VisionConfig(image_size=364)
OPT_6_7B = OPTConfig(hidden_size=4096, intermediate_size=16384)
FLAN_T5_XXL = T5Config(hidden_size=4096, num_heads=64, intermediate_size=10240)

ANSWERS = "captions and questions, without training for either"
CAPTIONS = "captions in the manner of COCO"
MATCHES = "matches images with texts"
MIT = "MIT"
OPT_LICENCE = "MIT; the OPT in it under Meta's own licence, for non-commercial research"
FLAN_LICENCE = "MIT; the Flan-T5 in it under Apache-2.0"

# Where each commit was seen: (1) in many places, among them registries of the checksums of its files; (2) in a version
# of MTEB's table of models; (3) in a public record of the files of that snapshot. The pins of opt-6.7b, opt-6.7b-coco
# and flan-t5-xxl are of March 2024, before the vocabulary grew and the image token came; either revision is read.
PUBLISHED: dict[str, Published] = {
    # Before November 2024, and what many programs still ask for: 51572668da0eb669e01a189dc22abe6088589a24
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
    "Salesforce/blip2-itm-vit-g": Published(
        MatcherConfig(has_lm_head=False), MATCHES, MIT, 4.7, "520bf73fd0ef6ccce791cd3f06908040aef2d8cc"  # (3)
    ),
    "Salesforce/blip2-itm-vit-g-coco": Published(
        MatcherConfig(vision=COCO_VISION, has_lm_head=False),
        MATCHES, MIT, 4.7, "b1c997706e13245bbd2af5b2717239488d849f07",  # (2)
    ),
}  # fmt: skip
