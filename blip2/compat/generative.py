"""``Blip2ForConditionalGeneration``: the generative model behind Hugging Face's arguments and outputs.

N images, M rows of ids, B rows after they are paired, Q queries, T tokens of ``input_ids``, S of the language model's
input, D its width, V its vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2 import checkpoint
from blip2.checkpoint.settings import read_json
from blip2.compat.generation import Generates, Prompt, rows_of
from blip2.compat.loading import Device, device_and_dtype, load_model
from blip2.compat.records import ModelOutput
from blip2.config import Blip2Config
from blip2.errors import CheckpointError, OptionError
from blip2.language import OPT, pad_rows
from blip2.model import Blip2
from blip2.tasks.speaker import num_pairs

NOT_A_LABEL = -100


class Blip2ForConditionalGeneration(Generates, nn.Module):
    """A model that writes; `from_pretrained` makes one, in evaluation mode."""

    def __init__(self, model: Blip2, generation_config: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.model = model
        self.generation_config = dict(generation_config or {})

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> Blip2ForConditionalGeneration:
        """The model in a folder or of that name on the hub; see `loading.load_model` for the options."""
        model, folder = load_model(name, options)
        if not isinstance(model, Blip2):
            raise CheckpointError(f"{name} compares images with texts; load it with Blip2ForImageTextRetrieval")
        path = folder / "generation_config.json"
        return cls(model, read_json(path) if path.exists() else None)

    @property
    def config(self) -> Blip2Config:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.language.token_embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the language model; the Q-Former is in float32."""
        return self.model.language.token_embedding.weight.dtype

    def to(  # type: ignore[override]
        self, device: Device | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> Blip2ForConditionalGeneration:
        """Move the model; OptionError for a device that is not there, or another precision than it was loaded in."""
        place, asked = device_and_dtype(device, dtype)
        if asked not in (None, self.dtype):
            raise OptionError(f"the model is in {self.dtype}; for {asked} give from_pretrained(..., dtype={asked})")
        return self if place is None else super().to(place)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model in the published layout, which `from_pretrained` and transformers read."""
        checkpoint.save(self.model, Path(folder))
        text = json.dumps(self.generation_config, indent=2) + "\n"
        (Path(folder) / "generation_config.json").write_text(text, encoding="utf-8")

    def get_image_features(self, pixel_values: Tensor, *, interpolate_pos_encoding: bool = False) -> ModelOutput:
        """``last_hidden_state`` of the image encoder, and ``pooler_output`` float[N, Q, D], the soft prompts."""
        patches_NPD = self.model.vision(self._pixels(pixel_values, interpolate_pos_encoding))
        return ModelOutput(last_hidden_state=patches_NPD, pooler_output=self.model.prompt(self.model.look(patches_NPD)))

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> ModelOutput:
        """``logits`` of every token, and with ``labels`` the ``loss`` (labels of -100 do not count).

        OPT: logits float[B, S, V] of the prompt, with labels of their last tokens only. T5: float[B, T', V] of
        ``decoder_input_ids`` int[B, T'], which by default are the labels one place later.
        """
        prompt = self._prompt(pixel_values, input_ids, attention_mask, interpolate_pos_encoding)
        language = self.model.language
        if labels is not None:
            labels = labels.to(self.device)
        if isinstance(language, OPT):
            if decoder_input_ids is not None:
                raise OptionError("decoder_input_ids are for a T5; an OPT has no decoder apart, leave them out")
            logits_BSV = language.logits(
                language(prompt.embeddings_BSD, positions_BT=_positions(prompt), mask=_causal_mask(prompt))
            )
            if labels is None:
                return ModelOutput(loss=None, logits=logits_BSV)
            logits_BSV = logits_BSV[:, -labels.shape[1] :]
            return ModelOutput(loss=_loss(logits_BSV[:, :-1], labels[:, 1:]), logits=logits_BSV)
        if decoder_input_ids is None:
            if labels is None:
                raise OptionError("a T5 computes logits of decoder_input_ids; give them, or labels")
            decoder_input_ids = self._one_later(labels)
        hidden_BTD = language(*pad_rows(rows_of(prompt)), decoder_input_ids.to(self.device))
        logits_BTV = language.logits(hidden_BTD)
        return ModelOutput(loss=None if labels is None else _loss(logits_BTV, labels), logits=logits_BTV)

    def _pixels(self, pixel_values: Tensor, interpolate: bool) -> Tensor:
        size = self.config.vision.image_size
        if pixel_values.dim() != 4:
            raise OptionError(f"pixel_values are {list(pixel_values.shape)}; give them as [images, 3, {size}, {size}]")
        if tuple(pixel_values.shape[2:]) != (size, size) and not interpolate:
            raise OptionError(
                f"pixel_values are {list(pixel_values.shape)}, this model sees {size}x{size}; use its own processor, "
                "or pass interpolate_pos_encoding=True"
            )
        return pixel_values.to(self.device)

    def _prompt(
        self, pixel_values: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None, interpolate: bool
    ) -> Prompt:
        """Images in the places of their tokens, or before the text of a model that has no such token."""
        image_token_id = self.config.image_token_id
        pixels = self._pixels(pixel_values, interpolate)
        ids_MT = self._begin(len(pixels)) if input_ids is None else input_ids.to(self.device)
        is_real_MT = self._is_real(ids_MT, attention_mask)
        number = num_pairs(len(pixels), len(ids_MT))
        images_BQD = self.model.prompt(self.model.encode(pixels)).expand(number, -1, -1)
        ids_BT, is_real_BT = ids_MT.expand(number, -1), is_real_MT.expand(number, -1)
        is_image_BT = ids_BT == image_token_id if image_token_id is not None else torch.zeros_like(is_real_BT)
        words_BT = ids_BT.masked_fill(is_image_BT, 0)
        self._check(words_BT, is_image_BT, is_real_BT)
        words_BTD = self.model.language.embed(words_BT)
        if image_token_id is None:
            is_real_BS = torch.cat([is_real_BT.new_ones(images_BQD.shape[:2]), is_real_BT], dim=1)
            return Prompt(torch.cat([images_BQD, words_BTD], dim=1), is_real_BS, ids_BT)
        return Prompt(words_BTD.masked_scatter(is_image_BT[:, :, None], images_BQD), is_real_BT, ids_BT)

    def _begin(self, rows: int) -> Tensor:
        """The ids of a prompt without words."""
        config = self.config
        image = [] if config.image_token_id is None else [config.image_token_id] * config.qformer.num_query_tokens
        bos = config.language.bos_token_id if config.language.family == "opt" else config.language.eos_token_id
        return torch.tensor([[*image, bos]] * rows, device=self.device)

    def _is_real(self, ids_MT: Tensor, attention_mask: Tensor | None) -> Tensor:
        """``bool[M, T]``: which ids are no padding."""
        if attention_mask is None:
            if (ids_MT == (pad := self.config.language.pad_token_id)).any():
                raise OptionError(
                    f"input_ids hold the padding token {pad}, but there is no attention_mask to say that it is "
                    "padding; pass on the processor's"
                )
            return torch.ones_like(ids_MT, dtype=torch.bool)
        if attention_mask.shape != ids_MT.shape:
            raise OptionError(
                f"attention_mask is {list(attention_mask.shape)}, input_ids are {list(ids_MT.shape)}; pass on both as "
                "the processor made them"
            )
        return attention_mask.to(self.device).bool()

    def _check(self, words_BT: Tensor, is_image_BT: Tensor, is_real_BT: Tensor) -> None:
        """No image is ignored, in part or whole, and every word is one that the model has."""
        config = self.config
        queries, token = config.qformer.num_query_tokens, config.image_token_id
        for row, count in enumerate((is_image_BT & is_real_BT).sum(dim=1).tolist() if token is not None else ()):
            if count != queries:
                raise OptionError(
                    f"row {row} of input_ids has {count} image tokens ({token}) that attention_mask shows, the image "
                    f"needs {queries}; make input_ids with Blip2Processor(images=..., text=...)"
                )
            if is_image_BT[row].sum() != queries:
                raise OptionError(f"row {row} of attention_mask hides image tokens ({token}) of input_ids; show them")
        if words_BT.numel() and int(words_BT.max()) >= config.language.vocab_size:
            raise OptionError(
                f"input_ids hold {int(words_BT.max())}, this model has {config.language.vocab_size} tokens; "
                "use its own processor"
            )

    def _one_later(self, labels_BT: Tensor) -> Tensor:
        """What the decoder reads to write the labels: the start token, then all but the last."""
        language = self.config.language
        assert language.family == "t5"
        start_B1 = labels_BT.new_full((len(labels_BT), 1), language.decoder_start_token_id)
        shifted_BT = torch.cat([start_B1, labels_BT[:, :-1]], dim=1)
        return shifted_BT.masked_fill(shifted_BT == NOT_A_LABEL, language.pad_token_id)


def _positions(prompt: Prompt) -> Tensor:
    """Real tokens are counted; padding has the place before the first, which an OPT keeps a row for."""
    is_real_BS = prompt.is_real_BS.long()
    return is_real_BS.cumsum(dim=1) * is_real_BS - 1


def _causal_mask(prompt: Prompt) -> Tensor:
    """``bool[B, 1, S, S]``: each token sees the real ones up to its own; one that would see none sees itself."""
    length = prompt.is_real_BS.shape[1]
    own_SS = torch.eye(length, dtype=torch.bool, device=prompt.is_real_BS.device)
    mask_BSS = own_SS.new_ones(length, length).tril() & prompt.is_real_BS[:, None]
    return (mask_BSS | (own_SS & ~mask_BSS.any(dim=-1, keepdim=True)))[:, None]


def _loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), labels_BT.flatten(), ignore_index=NOT_A_LABEL)
