"""Base of both drop-in models: loading, saving, moving, and small methods that programs call.

The layers have Hugging Face's names (see `names`). ``self.model`` is this package's model, which computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from blip2.compat.config import Blip2Config, InstructBlipConfig, built, content_of, public
from blip2.compat.loading import Device, device_and_dtype, load_model
from blip2.compat.merging import merge
from blip2.compat.names import Named, name_layers, unfuse
from blip2.compat.parts import Part
from blip2.compat.pixels import preprocessor_in
from blip2.compat.saving import save
from blip2.config import Blip2Config as Generative
from blip2.errors import CheckpointError, OptionError
from blip2.model import Blip2, Blip2Matcher
from blip2.quantized import QuantizedLinear

# Parts cast by .to(dtype). The Q-Former, its query tokens and the heads stay in float32, as in the loader.
CAST = ("vision_model", "language_model")


class PreTrained(Named):
    """A model under Hugging Face's names. ``is_matching``: which of the two kinds."""

    is_matching: ClassVar[bool] = False
    config_class: ClassVar[type[Blip2Config]] = Blip2Config
    main_input_name = "pixel_values"
    base_model_prefix = "blip"
    supports_gradient_checkpointing = True
    is_parallelizable = False
    is_activation_checkpointing = False
    _keys_to_ignore_on_save = None
    model: Any
    config: Blip2Config
    query_tokens: nn.Parameter
    preprocessor: dict[str, Any] | None = None
    """Preprocessing settings from a file of the model, saved with it."""

    def __init__(self, model: Any) -> None:
        """``model``: one of this package, whose layers are reused, or a configuration (ours, transformers', or a
        dictionary) for a model with random weights."""
        super().__init__()
        config = None
        if not isinstance(model, nn.Module):
            config = public(model)
            if type(config) is not self.config_class:
                raise OptionError(f"config is a {type(config).__name__}; give a {self.config_class.__name__}")
            model = drawn(config, is_matching=self.is_matching)
        unfuse(model)
        self.__dict__["model"] = model
        self.config = config or public(model.config)
        self.name_or_path = ""
        name_layers(self, model, self._parts())
        self.train(model.training)

    def _parts(self) -> dict[str, Any]:
        """Callable modules by path."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls, name: str | Path | None, *args: Any, **options: Any) -> Any:
        """The model in a folder or on the hub, in evaluation mode; see `loading.load_model`.

        ``output_loading_info=True`` also returns a report whose lists of keys are empty: a missing or unexpected key is
        a CheckpointError that names it.
        """
        wants_report = options.pop("output_loading_info", False)
        config = options.pop("config", None)
        state = options.pop("state_dict", None)
        if name is None or state is not None:
            model = cls._from_state(name, config, state, options)
        else:
            loaded, folder = load_model(name, options)
            cls._check_kind(loaded, name)
            model = cls._of_folder(loaded, folder)
            if config is not None:
                model.set_config(config)
        model.name_or_path = str(name or "")
        if not wants_report:
            return model
        return model, {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}

    @classmethod
    def _check_kind(cls, loaded: Any, name: Any) -> None:
        if isinstance(loaded, Blip2) and cls.is_matching:
            raise CheckpointError(f"{name} is a generative model; load it with Blip2ForConditionalGeneration")
        if isinstance(loaded, Blip2Matcher) and not cls.is_matching:
            raise CheckpointError(f"{name} is a matching model; load it with Blip2ForImageTextRetrieval")
        asked, reads_prompt = cls.config_class is InstructBlipConfig, loaded.config.qformer.has_text
        if isinstance(loaded, Blip2) and asked != reads_prompt:
            what = "an InstructBLIP, whose Q-Former reads the prompt" if reads_prompt else "a BLIP-2"
            right = "InstructBlipForConditionalGeneration" if reads_prompt else "Blip2ForConditionalGeneration"
            raise CheckpointError(f"{name} is {what}; load it with {right}")

    @classmethod
    def _of_folder(cls, loaded: Any, folder: Path) -> Any:
        model = cls(loaded)
        model.preprocessor = preprocessor_in(folder)
        model.config = cls.config_class.from_pretrained(folder, dtype=model.dtype)
        model.point_parts_to_config()
        return model

    @classmethod
    def _from_state(cls, name: Any, config: Any, state: Any, options: Mapping[str, Any]) -> Any:
        if config is None:
            if name is None:
                raise OptionError("neither a name nor a config is given; give the folder of a model, or a config")
            config = cls.config_class.from_pretrained(name)
        if state is None:
            raise OptionError("neither a name nor a state_dict is given; give the folder of a model")
        if options:
            raise OptionError(f"with a state_dict, {', '.join(sorted(options))} has no effect; leave it out")
        model = cls(config)
        model.load_state_dict(state)
        return model.eval()

    @classmethod
    def from_config(cls, config: Any, **options: Any) -> Any:
        return cls(config)

    _from_config = from_config

    def set_config(self, config: Any) -> None:
        """Use another configuration from now on. OptionError if the model has another architecture."""
        config = public(config)
        here, there = (content_of(built(each, is_matching=self.is_matching)) for each in (self.config, config))
        if wrong := list(_differences(here, there)):
            raise OptionError(
                f"config has {', '.join(wrong)}; a model's sizes are those of its weights, leave config out "
                "or change other settings"
            )
        self.config = config
        self.point_parts_to_config()

    def point_parts_to_config(self) -> None:
        """Let each part use its own part of the configuration."""
        for name, part in self.named_modules():
            if isinstance(part, Part):
                part.config = _part_config(self.config, name)

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Write the model in the published layout, which `from_pretrained` and transformers read; see `saving.save`."""
        save(self, Path(folder), options)

    def load_adapter(self, name: str | Path, adapter_name: str | None = None, *, weight: float = 1.0) -> None:
        """Merge a LoRA or DoRA in the format of `peft`, by its folder or hub name, into the weights.

        The merge is permanent: another adapter is added to it, and a LoRA with ``weight`` -1 is subtracted.
        ``adapter_name`` has no effect. See `merging.merge`.
        """
        merge(self, name, weight)

    # ---- properties -------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.query_tokens.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the image encoder (and the language model); the Q-Former is in float32."""
        dtype: torch.dtype = self.model.vision.position_embedding.dtype
        return dtype

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of weights; a tied table is counted once."""
        left_out: set[int] = set()
        if exclude_embeddings:
            tables = [module for module in self.modules() if isinstance(module, nn.Embedding)]
            left_out = {id(module.weight) for module in tables}
        return sum(
            parameter.numel()
            for parameter in self.parameters()
            if id(parameter) not in left_out and (parameter.requires_grad or not only_trainable)
        )

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of all weights."""
        tensors: Iterator[Tensor] = self.parameters()
        buffers = self.buffers() if return_buffers else iter(())
        return sum(tensor.nbytes for tensor in (*tensors, *buffers))

    @property
    def is_quantized(self) -> bool:
        return any(isinstance(module, QuantizedLinear) for module in self.modules())

    # ---- moving -----------------------------------------------------------------------------------------

    def to(  # type: ignore[override]
        self, device: Device | torch.dtype | Tensor | None = None, dtype: torch.dtype | None = None, **options: Any
    ) -> Self:
        """Move the model, and cast image encoder and language model, as ``from_pretrained(dtype=...)`` would.

        Raises OptionError for a missing device, float16 on a CPU or for a T5, and a dtype for a quantised model.
        """
        if isinstance(device, Tensor):
            return self.to(device.device, device.dtype)
        place, asked = device_and_dtype(device, dtype)
        if asked not in (None, self.dtype):
            self._check_dtype(asked, place or self.device)
            for name in CAST:
                part = self._modules.get(name)
                if part is not None:
                    part.to(dtype=asked)
        if place is not None:
            super().to(place, **{key: value for key, value in options.items() if key == "non_blocking"})
        return self

    def _check_dtype(self, dtype: torch.dtype, place: torch.device) -> None:
        if self.is_quantized:
            raise OptionError(f"a quantised model cannot be cast; load it unquantised for {dtype}")
        if not dtype.is_floating_point:
            raise OptionError(f"{dtype} is not supported; use float32, bfloat16 or float16")
        if dtype == torch.float16 and place.type == "cpu":
            raise OptionError("float16 is not supported on a CPU; use bfloat16, or move the model to a GPU first")

    def half(self) -> Self:
        return self.to(torch.float16)

    def bfloat16(self) -> Self:
        return self.to(torch.bfloat16)

    def float(self) -> Self:
        return self.to(torch.float32)

    def double(self) -> Self:
        return super().to(torch.float64)

    def train(self, mode: bool = True) -> Self:
        self.model.train(mode)
        super().train(mode)
        return self

    # ---- training ---------------------------------------------------------------------------------------

    @property
    def is_gradient_checkpointing(self) -> bool:
        return any(part.gradient_checkpointing for part in self._called())

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **how: Any
    ) -> None:
        """Only keep the layers' inputs in training, and compute the rest again: less memory, more time.

        The arguments change no value; checkpointing is per layer.
        """
        for part in self._called():
            part.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        for part in self._called():
            part.gradient_checkpointing = False

    def enable_input_require_grads(self) -> None:
        """Make the embedded tokens require gradients, which adapters in frozen layers need with checkpointing."""
        embedding = self.get_input_embeddings()
        assert embedding is not None
        self._input_hook = embedding.register_forward_hook(_let_gradients_through)

    def disable_input_require_grads(self) -> None:
        self._input_hook.remove()

    def _called(self) -> list[Part]:
        return [part for part in self.modules() if isinstance(part, Part)]

    def get_input_embeddings(self) -> Any:
        raise NotImplementedError

    def get_output_embeddings(self) -> Any:
        return None

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The weights under the reference's names. A tied table is listed under each of its names, each in separate
        memory, since safetensors does not save shared memory."""
        state = super().state_dict(*args, **kwargs)
        seen: set[int] = set()
        for name, tensor in state.items():
            if not isinstance(tensor, Tensor) or isinstance(tensor, nn.Parameter) or not tensor.numel():
                continue
            if tensor.device.type != "meta" and tensor.data_ptr() in seen:
                state[name] = tensor.clone()
            seen.add(tensor.data_ptr())
        return state

    def tie_weights(self, **options: Any) -> None:
        """Does nothing: tied tables are always a single table here."""

    def can_generate(self) -> bool:
        return hasattr(self, "generate")

    def push_to_hub(self, *args: Any, **options: Any) -> None:
        raise OptionError("uploading is not supported; use save_pretrained, and then: hf upload NAME FOLDER")


def drawn(config: Blip2Config, *, is_matching: bool) -> Blip2 | Blip2Matcher:
    """A model with random weights, drawn as in the reference, except for the query tokens.

    Zero query tokens, as in the reference, would all stay equal.
    """
    made = built(config, is_matching=is_matching)
    model: Blip2 | Blip2Matcher = Blip2(made) if isinstance(made, Generative) else Blip2Matcher(made)
    std = getattr(config, "initializer_range", 0.02)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            nn.init.normal_(parameter, std=std)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    return model.eval()


def _part_config(config: Blip2Config, name: str) -> Any:
    if name.startswith("vision_model"):
        return config.vision_config
    return config.text_config if name.startswith("language_model") else config.qformer_config


def _differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> Iterator[str]:
    """Sizes that differ; token ids and the like may differ."""
    for name, value in here.items():
        other = there.get(name)
        if isinstance(value, dict) and isinstance(other, dict):
            yield from _differences(value, other)
        elif value != other and not name.endswith(("token_id", "token_index", "dropout", "dropout_prob")):
            yield f"{name} of {other} (not {value})"


def _let_gradients_through(module: nn.Module, inputs: Any, output: Tensor) -> None:
    output.requires_grad_(True)
