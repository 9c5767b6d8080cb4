"""``Blip2Config`` and its parts: the published ``config.json`` as an object with Hugging Face's attributes.

    config = model.config
    config.text_config.vocab_size, config.num_query_tokens, config.to_dict()
    model = Blip2ForConditionalGeneration(Blip2Config(vision_config={...}, text_config={...}))

Attributes can be set. Token ids and output options take effect at once; sizes are only read when a model is built.
Transformers' config objects and dictionaries are accepted wherever these are.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from blip2.checkpoint import resolve
from blip2.checkpoint.decoders import LLAMAS
from blip2.checkpoint.settings import config_json, parse, read_json
from blip2.config import Blip2Config as Generative
from blip2.config import LanguageConfig, MatcherConfig, QFormerConfig, VisionConfig
from blip2.disk import write_text
from blip2.errors import CheckpointError, OptionError

COMMON: dict[str, Any] = {
    "architectures": None, "output_hidden_states": False, "output_attentions": False, "return_dict": True,
    "dtype": None, "is_encoder_decoder": False,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39, "num_attention_heads": 16,
    "image_size": 224, "patch_size": 14, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "attention_dropout": 0.0,
    "initializer_range": 1e-10, "qkv_bias": True,
}  # fmt: skip
QFORMER: dict[str, Any] = {
    "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512, "initializer_range": 0.02, "layer_norm_eps": 1e-12, "pad_token_id": 0,
    "cross_attention_frequency": 2, "encoder_hidden_size": 1408, "use_qformer_text_input": False,
}  # fmt: skip
OPT: dict[str, Any] = {
    "vocab_size": 50272, "hidden_size": 768, "num_hidden_layers": 12, "ffn_dim": 3072,
    "max_position_embeddings": 2048, "do_layer_norm_before": True, "_remove_final_layer_norm": False,
    "word_embed_proj_dim": None, "dropout": 0.1, "attention_dropout": 0.0, "num_attention_heads": 12,
    "activation_function": "relu", "layerdrop": 0.0, "init_std": 0.02, "use_cache": True, "pad_token_id": 1,
    "bos_token_id": 2, "eos_token_id": 2, "enable_bias": True, "layer_norm_elementwise_affine": True,
    "tie_word_embeddings": True,
}  # fmt: skip
T5: dict[str, Any] = {
    "is_encoder_decoder": True, "vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6,
    "num_decoder_layers": None, "num_heads": 8, "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128, "dropout_rate": 0.1, "layer_norm_epsilon": 1e-6, "initializer_factor": 1.0,
    "feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new", "is_gated_act": True, "use_cache": True,
    "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
WHOLE: dict[str, Any] = {
    "num_query_tokens": 32, "image_text_hidden_size": 256, "image_token_index": None, "initializer_factor": 1.0,
    "initializer_range": 0.02,
}  # fmt: skip


class Config:
    """Named values, each of which can be read and set as an attribute."""

    model_type: ClassVar[str] = ""
    defaults: ClassVar[dict[str, Any]] = {}
    attribute_map: ClassVar[dict[str, str]] = {}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    def __init__(self, **values: Any) -> None:
        for name, value in copy.deepcopy({**COMMON, **self.defaults, **values}).items():
            if name not in ("model_type", "transformers_version"):
                setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(self.attribute_map.get(name, name), value)

    def __getattr__(self, name: str) -> Any:
        if name in (mapped := type(self).attribute_map):
            return getattr(self, mapped[name])
        raise AttributeError(f"{type(self).__name__} has no {name}")

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], **changes: Any) -> Any:
        return cls(**{**content, **changes})

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> Any:
        """The config in a model's folder or on the hub; options that do not name a place are attributes to set."""
        places = {key: options.pop(key) for key in ("revision", "local_files_only") if key in options}
        content = read_json(resolve(name, **places) / "config.json")
        kinds = {"vision_config": Blip2VisionConfig, "qformer_config": Blip2QFormerConfig}
        part = next((name for name, kind in kinds.items() if issubclass(cls, kind)), None)
        return cls.from_dict(content.get(part) or {} if part else content, **options)

    @property
    def use_return_dict(self) -> bool:
        return bool(self.return_dict)

    @property
    def torch_dtype(self) -> Any:
        return self.dtype

    @torch_dtype.setter
    def torch_dtype(self, value: Any) -> None:
        self.dtype = value

    def get_text_config(self, decoder: bool = False, encoder: bool = False) -> Config:
        """The part for the text model; for a part, itself."""
        return self

    def update(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            setattr(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """Plain values as a copy, with parts as dictionaries."""
        content = {name: _plain(value) for name, value in vars(self).items()}
        return {"model_type": self.model_type, **content}

    to_diff_dict = to_dict

    def to_json_string(self, use_diff: bool = True) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_text(Path(folder) / "config.json", self.to_json_string())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # it can be changed

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"

    def __iter__(self) -> Iterator[str]:
        return iter(self.to_dict())


class Blip2VisionConfig(Config):
    model_type = "blip_2_vision_model"
    defaults = VISION


class Blip2QFormerConfig(Config):
    model_type = "blip_2_qformer"
    defaults = QFORMER


class InstructBlipVisionConfig(Blip2VisionConfig):
    model_type = "instructblip_vision_model"


class InstructBlipQFormerConfig(Blip2QFormerConfig):
    model_type = "instructblip_qformer"
    defaults = {key: value for key, value in QFORMER.items() if key != "use_qformer_text_input"}


class OPTConfig(Config):
    model_type = "opt"
    defaults = OPT

    word_embed_proj_dim: int | None

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        if self.word_embed_proj_dim is None:
            self.word_embed_proj_dim = self.hidden_size


class T5Config(Config):
    model_type = "t5"
    defaults = T5
    attribute_map = {
        "hidden_size": "d_model", "num_attention_heads": "num_heads", "num_hidden_layers": "num_layers",
        "head_dim": "d_kv",
    }  # fmt: skip

    num_decoder_layers: int | None

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        if self.num_decoder_layers is None:
            self.num_decoder_layers = self.num_layers


class DecoderConfig(Config):
    """Of another decoder. Unset values are the defaults of its family and are left out of files, since null differs."""

    defaults = {"use_cache": True}

    def __init__(self, model_type: str = "llama", **values: Any) -> None:
        super().__init__(**values)
        self.__dict__["model_type"] = model_type

    def __getattr__(self, name: str) -> Any:
        if name in (known := LLAMAS.get(self.__dict__.get("model_type", ""), {})):
            return known[name]
        return super().__getattr__(name)


TEXT: dict[str, type[Config]] = {"opt": OPTConfig, "t5": T5Config, **dict.fromkeys(LLAMAS, DecoderConfig)}


class Blip2Config(Config):
    """Image encoder, Q-Former and language model; ``image_token_id`` is an alias of ``image_token_index``."""

    model_type = "blip-2"
    defaults = WHOLE
    attribute_map = {"image_token_id": "image_token_index"}
    vision_class: ClassVar[type[Blip2VisionConfig]] = Blip2VisionConfig
    qformer_class: ClassVar[type[Blip2QFormerConfig]] = Blip2QFormerConfig

    vision_config: Blip2VisionConfig
    qformer_config: Blip2QFormerConfig
    text_config: Any
    num_query_tokens: int
    image_token_index: int | None

    def __init__(
        self,
        vision_config: Any = None,
        qformer_config: Any = None,
        text_config: Any = None,
        **values: Any,
    ) -> None:
        text = content_of(text_config)
        family = text.get("model_type", "opt")
        if family not in TEXT:
            raise OptionError(f"text_config is of a {family!r}; the language model is one of {', '.join(TEXT)}")
        values.setdefault("is_encoder_decoder", family == "t5")
        values.setdefault("use_decoder_only_language_model", family != "t5")
        super().__init__(**values)
        self.vision_config = self.vision_class(**content_of(vision_config))
        self.qformer_config = self.qformer_class(**content_of(qformer_config))
        self.qformer_config.encoder_hidden_size = self.vision_config.hidden_size
        self.text_config = TEXT[family](**text)

    @classmethod
    def from_vision_qformer_text_configs(
        cls, vision_config: Any, qformer_config: Any, text_config: Any = None, **values: Any
    ) -> Blip2Config:
        return cls(vision_config, qformer_config, text_config, **values)

    def get_text_config(self, decoder: bool = False, encoder: bool = False) -> Config:
        text: Config = self.text_config
        return text

    # The same as this package's configurations; they raise CheckpointError for what cannot be built.

    @property
    def language(self) -> LanguageConfig:
        config = built(self, is_matching=False)
        assert isinstance(config, Generative)
        return config.language

    @property
    def vision(self) -> VisionConfig:
        vision = built(self, is_matching=True).vision
        assert isinstance(vision, VisionConfig)
        return vision

    @property
    def qformer(self) -> QFormerConfig:
        return built(self, is_matching=True).qformer


class InstructBlipConfig(Blip2Config):
    """The config of a model whose Q-Former reads the prompt."""

    model_type = "instructblip"
    defaults = {key: value for key, value in WHOLE.items() if key != "image_text_hidden_size"}
    vision_class = InstructBlipVisionConfig
    qformer_class = InstructBlipQFormerConfig


def public(config: Any) -> Blip2Config:
    """Converts any configuration: ours, this package's internal one, transformers', or a dictionary."""
    if isinstance(config, Blip2Config):
        return config
    content = content_of(config)
    kind = InstructBlipConfig if content.get("model_type") == InstructBlipConfig.model_type else Blip2Config
    return kind(**content)


def built(config: Any, *, is_matching: bool) -> Generative | MatcherConfig:
    """The configuration from which this package builds a model. Raises CheckpointError if it cannot be built."""
    content = public(config).to_dict()
    content["architectures"] = ["Blip2ForImageTextRetrieval" if is_matching else "Blip2ForConditionalGeneration"]
    if is_matching:
        content["text_config"] = None
    try:
        parsed = parse(content)
    except ValueError as error:
        raise CheckpointError(f"the configuration cannot be built: {error}") from None
    check_transformer(parsed, "the configuration")
    return parsed


def check_transformer(config: Generative | MatcherConfig, name: object) -> None:
    """The drop-in classes only support vision transformers. Raises CheckpointError for another image encoder."""
    if not isinstance(config.vision, VisionConfig):
        raise CheckpointError(f"{name}: has a convolutional image encoder, unknown to transformers; use blip2.load")


def content_of(config: Any) -> dict[str, Any]:
    """The values of a config: None, a dictionary, or an object with ``to_dict``."""
    if config is None:
        return {}
    if isinstance(config, Generative | MatcherConfig):
        return config_json(config)
    content = dict(config) if isinstance(config, Mapping) else config.to_dict()
    content.pop("transformers_version", None)
    return content


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, str | int | float | bool | None):
        return value
    text = str(value)
    return text.removeprefix("torch.") if text.startswith("torch.") else copy.deepcopy(value)
