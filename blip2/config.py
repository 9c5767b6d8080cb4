"""Configuration of a BLIP-2 model: frozen dataclasses that mirror the published ``config.json``.

Field names are the usual technical terms; `checkpoint/` translates them to and from the names in published files. Sizes
are from Li et al. 2023 (sections 3 and 4) and from the published configurations.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, repr=False)
class VisionConfig:
    """A vision transformer. The defaults are EVA-CLIP g/14 without its last block.

    The fields from ``num_prefix_tokens`` on serve other families of encoders (`checkpoint.encoders`).
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
    """Learned tokens before the patches: a class token followed by registers, or none."""
    keeps_class_token: bool = True
    """Whether the Q-Former reads the class token, if there is one; it never reads registers."""
    has_gate: bool = False
    """Whether the feed-forward layer is gated; in ``fc1`` the gate's weights come first."""
    rotary_base: float = 0.0
    """Base of the rotary position embedding of the patches; 0: learned positions instead."""
    has_final_norm: bool = False
    """Whether the encoder's own last norm is applied before the one that BLIP-2 trains."""
    has_smooth_resizing: bool = False
    """Whether positions are interpolated with antialiasing for another image size."""

    @property
    def num_patches(self) -> int:
        """Patches of one image, without the prefix tokens."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_kept_prefix_tokens(self) -> int:
        """Prefix tokens that the Q-Former reads: the class token, or none."""
        return min(int(self.keeps_class_token), self.num_prefix_tokens)

    @property
    def num_tokens(self) -> int:
        """Feature vectors of one image that the Q-Former reads."""
        return self.num_kept_prefix_tokens + self.num_patches

    def __repr__(self) -> str:
        """Kept in features and indexes: fields that were added later appear only if they are not the default."""
        shown = [each for each in fields(self) if each.name in FIRST_FIELDS or getattr(self, each.name) != each.default]
        return f"VisionConfig({', '.join(f'{each.name}={getattr(self, each.name)!r}' for each in shown)})"


FIRST_FIELDS = {
    "hidden_size", "num_layers", "num_heads", "intermediate_size", "image_size", "patch_size", "layer_norm_eps",
    "activation", "has_patch_bias", "has_pre_norm",
}  # fmt: skip


CLIP_VIT_L = VisionConfig(
    hidden_size=1024, num_layers=23, intermediate_size=4096, layer_norm_eps=1e-5,
    activation="quick_gelu", has_patch_bias=False, has_pre_norm=True,
)  # fmt: skip


@dataclass(frozen=True)
class ConvolutionalConfig:
    """An EfficientNet-Lite, by default Lite0. The places of its last grid are the patches, before or after the head's
    convolution (``has_head``); ``has_positions`` adds positions, ``keeps_class_token`` puts their mean before them."""

    widths: tuple[int, ...] = (16, 24, 40, 80, 112, 192, 320)
    depths: tuple[int, ...] = (1, 2, 2, 3, 3, 4, 1)
    """Channels and blocks of each stage (`convolutional.STAGES`)."""
    image_size: int = 224
    has_head: bool = True
    has_positions: bool = False
    keeps_class_token: bool = False
    layer_norm_eps: float = 1e-6
    patch_size: ClassVar[int] = 32
    rotary_base: ClassVar[float] = 0.0
    hidden_size = property(lambda self: 1280 if self.has_head else self.widths[-1])
    num_patches = property(lambda self: (-(-self.image_size // 32)) ** 2)
    num_tokens = property(lambda self: self.keeps_class_token + self.num_patches)
    num_layers = property(lambda self: sum(self.depths))
    intermediate_size = property(lambda self: 6 * self.widths[0] * 16**2, doc="Width of the widest layer of a patch.")


@dataclass(frozen=True)
class QFormerConfig:
    """The Querying Transformer. The defaults are those of the published models: BERT-base with cross-attention."""

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
    kind: ClassVar[str] = "OPT"
    model_type: ClassVar[str] = "opt"
    has_encoder: ClassVar[bool] = False
    overflows_in_float16: ClassVar[bool] = False

    @property
    def num_key_value_heads(self) -> int:
        return self.num_heads

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Any of these ends the output."""
        return (self.eos_token_id,)


@dataclass(frozen=True)
class T5Config:
    """An encoder-decoder language model of the T5 architecture. The defaults are Flan-T5-XL."""

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
    has_gate: bool = True
    """Whether the feed-forward layers are gated; those of the first T5 are not."""
    activation: Literal["gelu", "gelu_new", "relu", "silu"] = "gelu"
    """BLIP-2 was trained with the exact (erf) GELU, although Flan-T5 itself uses the tanh approximation."""
    scales_output: bool = False
    """Whether the input of the output layer is divided by the root of the width, as with tied embeddings."""
    has_bias_in_each_layer: bool = False
    """Whether each layer has its own relative position bias (UMT5); else all layers of a stack share one."""
    decoder_start_token_id: int = 0
    eos_token_id: int = 1
    pad_token_id: int = 0
    model_type: Literal["t5", "mt5", "umt5"] = "t5"
    """``model_type`` in config.json."""

    family: Literal["t5"] = field(default="t5", init=False)
    kind: ClassVar[str] = "T5"
    max_position_embeddings: ClassVar[int] = sys.maxsize
    """Relative positions have no limit."""
    has_encoder: ClassVar[bool] = True
    overflows_in_float16: ClassVar[bool] = True

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Any of these ends the output."""
        return (self.eos_token_id,)


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding (Su et al., 2021), and its scaling for longer contexts."""

    size: int
    """Number of rotated dimensions of a head, the first ones."""
    base: float = 10_000.0
    scaling: Literal["default", "linear", "llama3", "yarn", "longrope"] = "default"
    factor: float = 1.0
    """Context extension factor relative to the original training, which had ``original_length`` tokens."""
    original_length: int = 0
    slow: float = 1.0
    fast: float = 1.0
    """Frequencies with fewer than ``slow`` rotations over that length are scaled, above ``fast`` not (llama3, yarn)."""
    is_rounded: bool = True
    """Whether these two are rounded to whole frequencies (yarn)."""
    factors: tuple[float, ...] = ()
    """Divisor of each frequency (longrope)."""
    amplitude: float = 1.0
    """Factor of cosine and sine (yarn, longrope)."""


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only language model; `checkpoint.decoders` builds it from a published configuration.

    The defaults are those of a plain Llama; fields for Gemma, Granite and others apply only to them.
    """

    model_type: str
    """``model_type`` in config.json."""
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    """Each head of keys and values is shared by num_heads / num_key_value_heads heads of queries."""
    head_size: int
    intermediate_size: int
    max_position_embeddings: int
    """The largest number of tokens whose positions do not depend on the length."""
    rotary: Rotary | None
    bos_token_id: int
    eos_token_id: int
    """Last token of an answer in training."""
    end_token_ids: tuple[int, ...]
    """Any of these ends the output."""
    pad_token_id: int
    norm_eps: float = 1e-6
    activation: Literal["silu", "gelu", "gelu_new", "relu"] = "silu"
    """``gelu_new`` is the tanh approximation."""
    is_tied: bool = False
    """Whether input embeddings and output layer share their weights."""
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    has_feed_forward_bias: bool = False
    has_head_norms: bool = False
    """Whether query and key of each head are normalised (Qwen3, Gemma 3)."""
    has_post_norms: bool = False
    """Whether the outputs of attention and feed-forward layer are normalised before the sum (Gemma 2 and 3)."""
    norm_offset: float = 0.0
    """Added to the weights of the norms (Gemma: 1)."""
    window: int | None = None
    """Size of the sliding attention window in tokens, including the current one."""
    window_layers: tuple[bool, ...] = ()
    """Layers with the sliding window; empty: none."""
    window_rotary: Rotary | None = None
    """Rotary embedding of these layers, if different (Gemma 3)."""
    layers_without_rotary: tuple[bool, ...] = ()
    """Layers without position embedding (SmolLM3); empty: none."""
    attention_scale: float | None = None
    """Scale of attention scores; 1/sqrt(head_size) by default."""
    attention_cap: float | None = None
    """Soft cap of attention scores by a tanh (Gemma 2); ``logit_cap`` is the same for the logits."""
    logit_cap: float | None = None
    embedding_scale: float = 1.0
    """Factor of embedded tokens (Gemma)."""
    input_scale: float = 1.0
    """Factor of all inputs, including the image's query tokens (Granite), as are the next two."""
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    make: Literal["llama", "gpt"] = "llama"
    """Architecture of the layers."""
    positions: Literal["rotary", "learned", "slopes"] = "rotary"
    """``rotary``, ``learned`` (GPT-2), or ``slopes`` (ALiBi, BLOOM)."""
    is_interleaved: bool = False
    """Whether query, key and value of each head are adjacent (GPT-NeoX, BLOOM)."""
    is_parallel: bool = False
    """Whether attention and feed-forward layer read the same input (GPT-NeoX)."""
    has_embedding_norm: bool = False
    """Whether the embedded input is normalised (BLOOM)."""
    published: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """The published language model section of config.json, which is written again unchanged."""

    family: Literal["decoder"] = field(default="decoder", init=False)
    has_encoder: ClassVar[bool] = False

    @property
    def kind(self) -> str:
        return self.model_type

    @property
    def overflows_in_float16(self) -> bool:
        """The larger Gemmas were trained in bfloat16, with activations that exceed the range of float16."""
        return self.has_post_norms


LanguageConfig = OPTConfig | T5Config | DecoderConfig


@dataclass(frozen=True)
class Blip2Config:
    """A generative BLIP-2: image encoder, Querying Transformer, projection, language model."""

    vision: VisionConfig | ConvolutionalConfig = field(default_factory=VisionConfig)
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    language: LanguageConfig = field(default_factory=OPTConfig)
    image_token_id: int | None = None
    adapted: str = ""
    """Identifies adapters merged into the image encoder or Q-Former (`checkpoint.adapters`); "" for none."""

    @property
    def reads_prompt(self) -> bool:
        """Whether the Q-Former reads the prompt beside the image (InstructBLIP, Dai et al. 2023, section 2.3), so that
        its output depends on the prompt."""
        return self.qformer.has_text

    @property
    def manner(self) -> str:
        """Key of the question template (`text.QUESTION_TEMPLATES`)."""
        return "instruct" if self.reads_prompt else self.language.family

    @property
    def kept_shape(self) -> tuple[int, int]:
        """Shape of an `encoded.EncodedImage`: the Q-Former's output, or the patch features if the Q-Former reads the
        prompt."""
        if self.reads_prompt:
            return self.vision.num_tokens, self.vision.hidden_size
        return self.qformer.num_query_tokens, self.qformer.hidden_size


@dataclass(frozen=True)
class MatcherConfig:
    """A matching BLIP-2 (stage 1): image encoder and Querying Transformer with its text branch."""

    vision: VisionConfig | ConvolutionalConfig = field(default_factory=VisionConfig)
    qformer: QFormerConfig = field(default_factory=lambda: replace(QFormerConfig(), vocab_size=30523, has_text=True))
    projection_size: int = 256
    bos_token_id: int = 30522
    """``[DEC]``, the first token of a caption that the Q-Former itself generates."""
    has_lm_head: bool = True
    """Whether the temperature and the Q-Former's caption head exist; published files lack both."""
    image_token_id: int | None = None
    adapted: str = ""
    """As in `Blip2Config`."""
