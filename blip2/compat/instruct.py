"""InstructBLIP under its Hugging Face names: the Q-Former reads the prompt beside the image.

    from blip2 import InstructBlipForConditionalGeneration, InstructBlipProcessor

    inputs = processor(images=image, text="What is unusual about this image?", return_tensors="pt")
    model.generate(**inputs, num_beams=5, max_new_tokens=256, repetition_penalty=1.5)

N images, M rows of the Q-Former's ids, B rows after pairing, P patches, Q query tokens, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from blip2.checkpoint import QFORMER_TOKENIZER
from blip2.compat.config import InstructBlipConfig
from blip2.compat.generation import Generates
from blip2.compat.generative import Generative, Words
from blip2.compat.parts import InstructedQFormer
from blip2.compat.processor import Blip2Processor
from blip2.compat.prompts import Seen, features_of
from blip2.compat.records import ModelOutput, returned
from blip2.compat.tokenizer import Blip2Tokenizer
from blip2.errors import OptionError
from blip2.tasks.speaker import num_pairs


class InstructBlipForConditionalGeneration(Generates, Generative):
    """A generative model that encodes an image depending on the prompt; `from_pretrained` returns one in evaluation
    mode."""

    config_class = InstructBlipConfig
    qformer_class = InstructedQFormer

    def _look(self, patches_NPD: Tensor, **given: Any) -> ModelOutput:
        ids_MT = given.pop("input_ids")
        if ids_MT is None:
            raise OptionError(
                "qformer_input_ids are missing, and this model's Q-Former reads the prompt; make them with "
                "InstructBlipProcessor(images=..., text=...)"
            )
        ids_MT = ids_MT.to(patches_NPD.device)
        mask_MT = given.pop("attention_mask")
        mask_MT = torch.ones_like(ids_MT) if mask_MT is None else mask_MT.to(ids_MT.device)
        if mask_MT.shape != ids_MT.shape:
            raise OptionError(
                f"qformer_attention_mask is {list(mask_MT.shape)}, qformer_input_ids are {list(ids_MT.shape)}; pass "
                "both as the processor returned them"
            )
        if ids_MT.numel() and int(ids_MT.max()) >= (size := self.config.qformer_config.vocab_size):
            raise OptionError(
                f"qformer_input_ids contain {int(ids_MT.max())}, this Q-Former has {size} tokens; use its processor"
            )
        number = num_pairs(len(patches_NPD), len(ids_MT))
        queries_BQD = self.query_tokens.expand(number, -1, -1)
        mask_BS = torch.cat([mask_MT.new_ones(queries_BQD.shape[:2]), mask_MT.expand(number, -1)], dim=1)
        output: ModelOutput = self.qformer(
            input_ids=ids_MT.expand(number, -1),
            attention_mask=mask_BS,
            query_embeds=queries_BQD,
            encoder_hidden_states=patches_NPD.expand(number, -1, -1),
            return_dict=True,
            **given,
        )
        return output

    def _read(
        self, pixel_values: Tensor, interpolate: bool, qformer_input_ids: Any, qformer_attention_mask: Any
    ) -> Seen:
        reads = {"input_ids": qformer_input_ids, "attention_mask": qformer_attention_mask}
        return self._see(pixel_values, interpolate, reads)

    def get_image_features(
        self,
        pixel_values: Tensor,
        qformer_input_ids: Tensor,
        qformer_attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        return_dict: bool | None = None,
    ) -> Any:
        """``last_hidden_state`` of the image encoder, and ``pooler_output`` float[B, Q, D], the soft prompts."""
        seen = self._read(pixel_values, interpolate_pos_encoding, qformer_input_ids, qformer_attention_mask)
        return returned(features_of(seen), return_dict, self.config)

    def generate(  # type: ignore[override]
        self,
        pixel_values: Tensor,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        interpolate_pos_encoding: bool = False,
        **options: Any,
    ) -> Any:
        """As `Blip2ForConditionalGeneration.generate`. ``qformer_input_ids`` int[M, T] and ``qformer_attention_mask``
        are the Q-Former's input. Raises OptionError without them."""
        with torch.no_grad():
            self.sync()
            seen = self._read(pixel_values, interpolate_pos_encoding, qformer_input_ids, qformer_attention_mask)
            prompt = self._joined(seen, input_ids, attention_mask, inputs_embeds)
        return Words(self, prompt).generate(cast("Any", None), **options)

    def forward(
        self,
        pixel_values: Tensor,
        qformer_input_ids: Tensor,
        qformer_attention_mask: Tensor | None = None,
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
    ) -> Any:
        """As `Blip2ForConditionalGeneration`, with the Q-Former's input."""
        self.sync()
        seen = self._read(pixel_values, interpolate_pos_encoding, qformer_input_ids, qformer_attention_mask)
        prompt = self._joined(seen, input_ids, attention_mask, inputs_embeds)
        decoder = {"decoder_input_ids": decoder_input_ids, "decoder_attention_mask": decoder_attention_mask}
        output = self._write(
            seen,
            prompt,
            labels,
            num_items_in_batch,
            decoder,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            use_cache=False if use_cache is None and labels is not None else use_cache,
            logits_to_keep=logits_to_keep,
        )
        return returned(output, return_dict, self.config)


class InstructBlipProcessor(Blip2Processor):
    """Both tokenizers and the image settings of a model; `from_pretrained` returns one."""

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        qformer_tokenizer: Any,
        num_query_tokens: int | None = None,
        **ours: Any,
    ) -> None:
        super().__init__(image_processor, tokenizer, num_query_tokens, **ours)
        self.qformer_tokenizer = Blip2Tokenizer.of(qformer_tokenizer)

    @classmethod
    def _others(cls, folder: Path) -> dict[str, Any]:
        return {"qformer_tokenizer": Blip2Tokenizer.from_folder(folder / QFORMER_TOKENIZER)}

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "qformer_input_ids", "qformer_attention_mask"]

    def files(self) -> dict[str, bytes]:
        its = self.qformer_tokenizer.files()
        return {f"{QFORMER_TOKENIZER}/{name}": content for name, content in its.items()} | super().files()

    def _rows(self, texts: list[str], has_image_tokens: bool, options: Mapping[str, Any]) -> dict[str, list[Any]]:
        """The columns of the texts, with those for the Q-Former."""
        read = self.qformer_tokenizer.columns(texts, reads_tokens=False, options=options)
        columns = {f"qformer_{name}": read[name] for name in ("input_ids", "attention_mask") if name in read}
        return columns | super()._rows(texts, has_image_tokens, options)
