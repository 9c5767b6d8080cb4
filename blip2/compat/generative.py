"""``Blip2ForConditionalGeneration``: the generative model with Hugging Face's arguments and outputs.

N images, M rows of ids, B rows after pairing, Q query tokens, T tokens of ``input_ids``, S of the language model's
input, D its width, V its vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from blip2.checkpoint.settings import read_json
from blip2.compat.base import PreTrained
from blip2.compat.decoder import DecoderBody, DecoderModel
from blip2.compat.generation import Generates
from blip2.compat.language import LanguagePart, next_token_loss
from blip2.compat.names import put_weight
from blip2.compat.opt import OPTBody, OPTDecoder, OPTModel
from blip2.compat.options import GenerationConfig
from blip2.compat.parts import Part, QFormerModel, VisionModel
from blip2.compat.prompts import Prompts, Seen, features_of, right_padded
from blip2.compat.records import ModelOutput, PartsOutput, Prompt, returned
from blip2.compat.t5 import T5Decoder, T5Encoder, T5Model
from blip2.config import DecoderConfig, LanguageConfig
from blip2.errors import OptionError
from blip2.language import Decoder
from blip2.linear import Table, readable
from blip2.model import Blip2

NAMES: dict[str, dict[str, type[Part]]] = {
    "opt": {"language_model": OPTModel, "language_model.model": OPTBody, "language_model.model.decoder": OPTDecoder},
    "decoder": {"language_model": DecoderModel, "language_model.model": DecoderBody},
    "t5": {"language_model": T5Model, "language_model.encoder": T5Encoder, "language_model.decoder": T5Decoder},
}
"""Callable parts of a language model, by family."""


class Generative(Prompts, PreTrained):
    """Image encoder, Q-Former, projection and language model; see the classes below."""

    loss_type = "ForConditionalGeneration"  # tells Trainer how labels are counted
    _no_split_modules = ("Block", "Layer", "EncoderBlock", "DecoderBlock")

    vision_model: VisionModel
    qformer: QFormerModel
    language_projection: nn.Linear
    language_model: LanguagePart
    query_tokens: nn.Parameter
    qformer_class: ClassVar[type[QFormerModel]] = QFormerModel

    def __init__(self, model: Any, generation_config: Mapping[str, Any] | None = None) -> None:
        super().__init__(model)
        self.generation_config: Any = GenerationConfig(generation_config or {})
        self._prepare()
        self.language_model.__dict__["writer"] = self  # so that language_model has generate, too

    def _prepare(self) -> None:
        """Prepare for training the language model: its dropout."""
        text, language = self.config.text_config, self.model.language
        dropout = getattr(text, "dropout_rate" if language.config.has_encoder else "dropout", 0.0)
        for module in language.modules():
            if hasattr(module, "dropout"):
                module.dropout = dropout
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = text.attention_dropout
        if isinstance(language, Decoder):  # the padding token's row gets no gradient
            pad, table = text.pad_token_id, language.token_embedding
            table.padding_idx = pad if pad is not None and 0 <= pad < table.num_embeddings else None

    def _parts(self) -> dict[str, Any]:
        model, config = cast("Blip2", self.model), self.config
        text = partial(partial, core=model.language, config=config.text_config)
        names = NAMES[model.language.config.family]
        return {
            "vision_model": lambda: VisionModel(model.vision, config.vision_config),
            "qformer": lambda: self.qformer_class(model.qformer, config.qformer_config),
            **{path: text(made) for path, made in names.items()},
        }

    @classmethod
    def _of_folder(cls, loaded: Any, folder: Path) -> Any:
        model = super()._of_folder(loaded, folder)
        path = folder / "generation_config.json"
        model.generation_config = GenerationConfig(read_json(path) if path.exists() else {})
        return model

    def generation_settings(self) -> dict[str, Any]:
        """The content of generation_config.json."""
        settings = self.generation_config
        return dict(settings) if isinstance(settings, Mapping) else dict(settings.to_dict())

    def sync(self) -> None:
        """Take over outside changes that have other names here: token ids, a replaced head."""
        model, text = cast("Blip2", self.model), self.config.text_config
        language = model.language
        names = ("eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id")
        asked: dict[str, Any] = {name: getattr(text, name) for name in names if hasattr(language.config, name)}
        if isinstance(language.config, DecoderConfig) and (ends := asked["eos_token_id"]) is not None:
            asked["end_token_ids"] = (ends,) if isinstance(ends, int) else tuple(ends)
            asked["eos_token_id"] = asked["end_token_ids"][0]
        asked = {name: value for name, value in asked.items() if isinstance(value, int) or name == "end_token_ids"}
        if any(getattr(language.config, name) != value for name, value in asked.items()):
            language.config = _changed(language.config, **asked)
        if model.config.language is not language.config or model.config.image_token_id != self.config.image_token_id:
            model.config = replace(model.config, language=language.config, image_token_id=self.config.image_token_id)
        if not language.config.has_encoder and language.output is None:
            head, table = self.language_model.lm_head, cast("nn.Module", language.token_embedding)
            if not isinstance(table, Table) or getattr(head, "weight", None) is not table.weight:
                language.output = head

    @property
    def device(self) -> torch.device:
        """The device of the token table."""
        device: torch.device = self.model.language.token_embedding.weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the language model; the Q-Former is in float32."""
        dtype: torch.dtype = self.model.language.token_embedding.weight.dtype
        return dtype

    # ---- parts ------------------------------------------------------------------------------------------

    def get_input_embeddings(self) -> Any:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, embedding: nn.Embedding) -> None:
        self.language_model.set_input_embeddings(embedding)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, head: nn.Module) -> None:
        self.language_model.set_output_embeddings(head)

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        return self.vision_model if modality == "image" else self.language_model.get_encoder()

    def get_decoder(self) -> nn.Module:
        return self.language_model.get_decoder()

    def write_on(self, vectors_BSD: Tensor, is_real_BS: Tensor, ids_BT: Tensor, **options: Any) -> Any:
        """See `LanguagePart.generate`."""
        self.sync()
        return Words(self, Prompt(vectors_BSD, is_real_BS, ids_BT)).generate(cast("Any", None), **options)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Resize the token table (and the head). New rows are the mean of the existing ones.

        Raises OptionError for a quantised table, and for a size below 1.
        """
        old = cast("nn.Embedding", self.get_input_embeddings())
        number = old.num_embeddings if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of:
            number = -(-number // pad_to_multiple_of) * pad_to_multiple_of
        if number < 1:
            raise OptionError(f"new_num_tokens is {number}; a model needs at least one")
        if number == old.num_embeddings:
            return old
        if self.is_quantized:
            raise OptionError("a quantised token table cannot be resized; resize it unquantised, then quantise")
        head, language = cast("Any", self.get_output_embeddings()), self.model.language
        is_tied = head.weight is old.weight
        put_weight(old, _resized(old.weight, number))
        old.num_embeddings = number
        if old.padding_idx is not None and old.padding_idx >= number:
            old.padding_idx = None
        if is_tied:
            head.weight = old.weight
        else:
            put_weight(head, _resized(head.weight, number))
        head.out_features = number
        language.config = _changed(language.config, vocab_size=number)
        self.config.text_config.vocab_size = number
        self.sync()
        return old

    # ---- features ---------------------------------------------------------------------------------------

    def get_text_features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **decoder: Any,
    ) -> Any:
        """``last_hidden_state`` of the text alone: of a decoder, or of a T5's encoder."""
        for name, value in decoder.items():
            if name not in ("decoder_input_ids", "decoder_attention_mask", "labels"):
                raise TypeError(f"get_text_features has no argument {name!r}")
            if value is not None:
                raise OptionError(f"get_text_features does not use {name}; leave it out")
        part = self.get_encoder() if self.model.language.config.has_encoder else self.language_model.get_decoder()
        seen = part(
            input_ids=input_ids,
            attention_mask=attention_mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        output = ModelOutput(
            last_hidden_state=seen.last_hidden_state,
            pooler_output=None,
            hidden_states=seen.hidden_states,
            attentions=seen.attentions,
        )
        return returned(output, return_dict, self.config)

    def get_qformer_features(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """The query tokens after the Q-Former, ``float[N, Q, D]``."""
        patches_NPD = self.vision_model(pixel_values, interpolate_pos_encoding, return_dict=True).last_hidden_state
        return cast("Tensor", self._look(patches_NPD).last_hidden_state)

    def _write(
        self, seen: Seen, prompt: Prompt, labels: Tensor | None, number: Any, decoder: dict[str, Any], **options: Any
    ) -> PartsOutput:
        """The language model's output for a prompt, with the outputs of the other parts."""
        if not self.model.language.config.has_encoder:
            if any(value is not None for value in decoder.values()):
                raise OptionError("decoder_input_ids are only for a T5; leave them out")
            outputs = self.language_model(
                inputs_embeds=prompt.embeddings_BSD, attention_mask=prompt.is_real_BS, return_dict=True, **options
            )
            logits, loss = outputs.logits, None
            if labels is not None:
                logits = logits[:, -labels.shape[1] :]
                loss = next_token_loss(logits, labels, number)
        else:
            if options.pop("logits_to_keep", 0):
                raise OptionError("logits_to_keep is for a decoder; a T5 returns the logits of decoder_input_ids")
            embeddings_BSD, is_real_BS = right_padded(prompt)
            outputs = self.language_model(
                inputs_embeds=embeddings_BSD,
                attention_mask=is_real_BS,
                labels=None if labels is None else labels.to(self.device),
                return_dict=True,
                **decoder,
                **options,
            )
            logits, loss = outputs.logits, outputs.loss
        return PartsOutput(
            loss=loss,
            logits=logits,
            vision_outputs=seen.vision,
            qformer_outputs=seen.qformer,
            language_model_outputs=outputs,
        )


class Words(Generates):
    """A language model alone, as `Generates` needs it: the prompt is already computed."""

    def __init__(self, whole: Generative, prompt: Prompt) -> None:
        self.model = whole.model
        self.config = whole.config
        self.device = whole.device
        self.language_model = whole.language_model
        self.generation_config = whole.generation_config
        self._given = prompt

    def _prompt(self, *_: Any) -> Prompt:
        return self._given


class Blip2ForConditionalGeneration(Generates, Generative):
    """A generative model; `from_pretrained` returns one in evaluation mode."""

    def get_image_features(
        self, pixel_values: Tensor, interpolate_pos_encoding: bool = False, return_dict: bool | None = None
    ) -> Any:
        """``last_hidden_state`` of the image encoder, and ``pooler_output`` float[N, Q, D], the soft prompts."""
        return returned(features_of(self._see(pixel_values, interpolate_pos_encoding)), return_dict, self.config)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **others: Any,
    ) -> Any:
        """``logits`` of every token, and with ``labels`` the ``loss`` (labels of -100 are ignored).

        OPT: logits float[B, S, V] of the prompt, with labels only of its last tokens. T5: float[B, T', V] of
        ``decoder_input_ids`` int[B, T'], by default the labels shifted by one.

        ``inputs_embeds`` float[M, S, D] replaces the ids; the image token's own vector then marks the place of the
        image. ``output_attentions`` and ``output_hidden_states`` are for the language model
        (``language_model_outputs``). ``use_cache`` returns ``past_key_values``, by default only without labels.
        ``num_items_in_batch``: labels of a whole training step, as counted by `Trainer`.
        """
        for name in others:
            raise TypeError(f"the model has no argument {name!r}")
        self.sync()
        seen = self._see(pixel_values, interpolate_pos_encoding)
        prompt = self._joined(seen, input_ids, attention_mask, inputs_embeds)
        output = self._write(
            seen,
            prompt,
            labels,
            num_items_in_batch,
            {"decoder_input_ids": decoder_input_ids, "decoder_attention_mask": decoder_attention_mask},
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            use_cache=False if use_cache is None and labels is not None else use_cache,
            logits_to_keep=logits_to_keep,
        )
        return returned(output, return_dict, self.config)


def _changed(config: LanguageConfig, **values: Any) -> Any:
    """The configuration with changed values; a decoder's is saved as it was published."""
    if isinstance(config, DecoderConfig):
        settings = {name: value for name, value in values.items() if name != "end_token_ids"}
        if ends := values.get("end_token_ids"):
            settings["eos_token_id"] = ends[0] if len(ends) == 1 else list(ends)
        values["published"] = config.published | settings
    return replace(config, **values)


def _resized(weight: Tensor, number: int) -> Tensor:
    old = readable(weight)
    new = old.new_empty(number, old.shape[1])
    kept = min(number, len(old))
    new[:kept] = old[:kept]
    new[kept:] = old.float().mean(dim=0).to(old.dtype)
    return new

