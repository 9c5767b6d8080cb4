"""What a BLIP-2 model is made of: frozen dataclasses that mirror the published ``config.json``.

The field names are the field's own; `checkpoint/` translates them to and from the names in the published
files. Sizes are from Li et al. 2023 (section 3 and 4) and from the published configurations.
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
class ConvolutionalConfig:
    """An EfficientNet-Lite, of whose last grid each place is a patch, before or behind the head's convolution, which
    classes are told by (``has_head``). The defaults are Lite0."""

    widths: tuple[int, ...] = (16, 24, 40, 80, 112, 192, 320)
    depths: tuple[int, ...] = (1, 2, 2, 3, 3, 4, 1)
    """Channels and blocks of each stage (`convolutional.STAGES`)."""
    image_size: int = 224
    has_head: bool = True
    layer_norm_eps: float = 1e-6
    keeps_class_token: ClassVar[bool] = False
    patch_size: ClassVar[int] = 32
    rotary_base: ClassVar[float] = 0.0

    hidden_size = property(lambda self: 1280 if self.has_head else self.widths[-1])
    num_tokens = num_patches = property(lambda self: (-(-self.image_size // 32)) ** 2)
    num_layers = property(lambda self: sum(self.depths))
    intermediate_size = property(lambda self: 6 * self.widths[0] * 16**2, doc="Numbers of the widest layer, a patch.")


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
        """Any of these ends an answer."""
        return (self.eos_token_id,)


@dataclass(frozen=True)
class T5Config:
    """An encoder-decoder language model of the make of T5. The defaults are Flan-T5-XL."""

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
    """Whether the feed-forward layers have one; the first T5's have not."""
    activation: Literal["gelu", "gelu_new", "relu", "silu"] = "gelu"
    """BLIP-2 was trained with the exact (erf) GELU, although Flan-T5 itself used the tanh form."""
    scales_output: bool = False
    """Whether what the output table reads is divided by the root of the width, as where it is the table of tokens."""
    has_bias_in_each_layer: bool = False
    """Whether each layer learns about distances for itself (UMT5); else all of a stack share that."""
    decoder_start_token_id: int = 0
    eos_token_id: int = 1
    pad_token_id: int = 0
    model_type: Literal["t5", "mt5", "umt5"] = "t5"
    """The name of its kind in config.json."""

    family: Literal["t5"] = field(default="t5", init=False)
    kind: ClassVar[str] = "T5"
    max_position_embeddings: ClassVar[int] = sys.maxsize
    """Relative positions have no end."""
    has_encoder: ClassVar[bool] = True
    overflows_in_float16: ClassVar[bool] = True

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Any of these ends an answer."""
        return (self.eos_token_id,)


@dataclass(frozen=True)
class Rotary:
    """How positions turn queries and keys (Su et al., 2021), and how that was stretched to longer texts."""

    size: int
    """So many of a head's numbers are turned, the first ones."""
    base: float = 10_000.0
    scaling: Literal["default", "linear", "llama3", "yarn", "longrope"] = "default"
    factor: float = 1.0
    """How many times longer than those that the model was trained with first, which had ``original_length`` tokens."""
    original_length: int = 0
    slow: float = 1.0
    """What turns less often within the original length is stretched whole, ..."""
    fast: float = 1.0
    """... and what turns more often not at all (llama3, yarn)."""
    is_rounded: bool = True
    """Whether these two are rounded to whole frequencies (yarn)."""
    factors: tuple[float, ...] = ()
    """By which each frequency is divided (longrope)."""
    amplitude: float = 1.0
    """Of cosine and sine (yarn, longrope)."""


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only language model; `checkpoint.decoders` makes one of a published configuration.

    The defaults are of a plain Llama; what is said of Gemma, Granite and others is theirs alone.
    """

    model_type: str
    """The name of its kind in config.json."""
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    """As many heads of queries share one of keys and values as the one number is in the other."""
    head_size: int
    intermediate_size: int
    max_position_embeddings: int
    """The longest text, in tokens, whose positions do not depend on how long it becomes."""
    rotary: Rotary | None
    bos_token_id: int
    eos_token_id: int
    """What an answer ends with."""
    end_token_ids: tuple[int, ...]
    """Any of these ends an answer."""
    pad_token_id: int
    norm_eps: float = 1e-6
    activation: Literal["silu", "gelu", "gelu_new", "relu"] = "silu"
    """``gelu_new`` is the tanh form."""
    is_tied: bool = False
    """Whether the table of tokens is the output table, too."""
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    has_feed_forward_bias: bool = False
    has_head_norms: bool = False
    """Whether each head's query and key are normed (Qwen3, Gemma 3)."""
    has_post_norms: bool = False
    """Whether what a block's two halves say is normed before it is added (Gemma 2 and 3)."""
    norm_offset: float = 0.0
    """Added to the weights of the norms (Gemma: 1)."""
    window: int | None = None
    """How many tokens a layer with a window sees, the present one among them."""
    window_layers: tuple[bool, ...] = ()
    """Which layers have that window; empty: none."""
    window_rotary: Rotary | None = None
    """Of these layers, where it is another (Gemma 3)."""
    unturned_layers: tuple[bool, ...] = ()
    """Which layers know of no positions (SmolLM3); empty: none."""
    attention_scale: float | None = None
    """Of the scores; 1/sqrt(head_size) unless given."""
    attention_cap: float | None = None
    """Scores of attention are bent to stay below it (Gemma 2), by a tanh; so are those of tokens by ``logit_cap``."""
    logit_cap: float | None = None
    embedding_scale: float = 1.0
    """Of embedded tokens (Gemma)."""
    input_scale: float = 1.0
    """Of all that is read, image queries too (Granite), as are the next two."""
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    make: Literal["llama", "gpt"] = "llama"
    """The make of its layers."""
    positions: Literal["rotary", "learned", "slopes"] = "rotary"
    """By ``rotary``, by a table (GPT-2), or by what is far counting less (BLOOM)."""
    is_interleaved: bool = False
    """Whether each head's query, key and value are side by side (GPT-NeoX, BLOOM)."""
    is_parallel: bool = False
    """Whether a block's two halves read the same (GPT-NeoX)."""
    has_embedding_norm: bool = False
    """Whether what is read is normed first (BLOOM)."""
    published: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """The part of config.json that says all this, which is written again as it is."""

    family: Literal["decoder"] = field(default="decoder", init=False)
    has_encoder: ClassVar[bool] = False

    @property
    def kind(self) -> str:
        return self.model_type

    @property
    def overflows_in_float16(self) -> bool:
        """The larger Gemmas were trained in bfloat16, with activations beyond what float16 holds."""
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
    """Which adapters are merged into what sees (`checkpoint.adapters`); "" for none."""

    @property
    def reads_prompt(self) -> bool:
        """Whether the Q-Former reads the prompt beside the picture (InstructBLIP, Dai et al. 2023, section 2.3), so
        that what it sees of a picture is another with each prompt."""
        return self.qformer.has_text

    @property
    def manner(self) -> str:
        """How it is asked (`text.QUESTION_TEMPLATES`)."""
        return "instruct" if self.reads_prompt else self.language.family

    @property
    def kept_shape(self) -> tuple[int, int]:
        """Of what is kept of a picture (`encoded.EncodedImage`): the queries after the Q-Former, or where that reads
        the prompt the patches before it."""
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
    """Whether the learned temperature and the Q-Former's own caption head exist; the published files lack both."""
    image_token_id: int | None = None
    adapted: str = ""
    """As in `Blip2Config`."""
