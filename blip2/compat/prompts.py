"""The input of a language model: an image's vectors and tokens, in one row.

N images, M rows of ids, B rows after pairing, Q query tokens, T tokens of ``input_ids``, S of the language model's
input, D its width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from blip2.compat.config import Blip2Config
from blip2.compat.records import ModelOutput, Prompt
from blip2.errors import OptionError
from blip2.tasks.speaker import num_pairs

NOTHING: Mapping[str, Any] = {}


class Seen(NamedTuple):
    """Outputs of the parts that lead to the soft prompts ``float[N, Q, D]``."""

    prompts_NQD: Tensor
    vision: ModelOutput
    qformer: ModelOutput


def features_of(seen: Seen) -> ModelOutput:
    """The result of ``get_image_features``."""
    return ModelOutput(
        last_hidden_state=seen.vision.last_hidden_state,
        pooler_output=seen.prompts_NQD,
        hidden_states=None,
        attentions=None,
        vision_outputs=seen.vision,
        qformer_outputs=seen.qformer,
    )


class Prompts:
    """Makes prompts from images and ids. No image is ever ignored, in part or whole."""

    config: Blip2Config
    model: Any
    query_tokens: nn.Parameter
    vision_model: Any
    qformer: Any
    language_projection: nn.Linear

    @property
    def device(self) -> torch.device:
        """See `generative.Generative`."""
        raise NotImplementedError

    def sync(self) -> None:
        """See `generative.Generative`."""

    def _look(self, patches_NPD: Tensor, **watching: Any) -> ModelOutput:
        output: ModelOutput = self.qformer(
            query_embeds=self.query_tokens.expand(len(patches_NPD), -1, -1),
            encoder_hidden_states=patches_NPD,
            return_dict=True,
            **watching,
        )
        return output

    def _see(
        self, pixel_values: Tensor, interpolate: bool = False, reads: Mapping[str, Any] = NOTHING, **watching: Any
    ) -> Seen:
        """``reads``: the Q-Former's text input."""
        vision = self.vision_model(pixel_values, interpolate, return_dict=True, **watching)
        qformer = self._look(vision.last_hidden_state, **reads, **watching)
        queries_NQD = qformer.last_hidden_state[:, : self.query_tokens.shape[1]]
        weight = getattr(self.language_projection, "weight", queries_NQD)
        projected_NQD = self.language_projection(queries_NQD.to(weight))
        language = self.model.language
        return Seen(projected_NQD.to(language.token_embedding.weight.device, language.dtype), vision, qformer)

    def _prompt(
        self,
        pixel_values: Tensor,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        interpolate: bool,
        inputs_embeds: Tensor | None = None,
    ) -> Prompt:
        """Images in the places of their tokens, or before the text if the model has no image token."""
        self.sync()
        return self._joined(self._see(pixel_values, interpolate), input_ids, attention_mask, inputs_embeds)

    def _joined(
        self, seen: Seen, input_ids: Tensor | None, attention_mask: Tensor | None, inputs_embeds: Tensor | None = None
    ) -> Prompt:
        token = self.config.image_token_id
        if input_ids is None and inputs_embeds is not None:
            return self._joined_with_vectors(seen, attention_mask, inputs_embeds)
        images = len(seen.prompts_NQD)
        ids_MT = self._begin(images) if input_ids is None else input_ids.to(self.device)
        if input_ids is None and attention_mask is None:
            attention_mask = torch.ones_like(ids_MT)  # some tokenizers begin a text with the padding token
        is_real_MT = self._is_real(ids_MT, attention_mask)
        number = num_pairs(images, len(ids_MT))
        images_BQD = seen.prompts_NQD.expand(number, -1, -1)
        ids_BT, is_real_BT = ids_MT.expand(number, -1), is_real_MT.expand(number, -1)
        is_image_BT = ids_BT == token if token is not None else torch.zeros_like(is_real_BT)
        words_BT = ids_BT.masked_fill(is_image_BT, 0)
        self._check(words_BT, is_image_BT, is_real_BT)
        words_BTD = self.model.language.embed(words_BT)
        if inputs_embeds is not None:
            words_BTD = inputs_embeds.to(words_BTD).expand(number, -1, -1)
        if token is None:
            is_real_BS = torch.cat([is_real_BT.new_ones(images_BQD.shape[:2]), is_real_BT], dim=1)
            return Prompt(torch.cat([images_BQD, words_BTD], dim=1), is_real_BS, ids_BT)
        return Prompt(words_BTD.masked_scatter(is_image_BT[:, :, None], images_BQD), is_real_BT, ids_BT)

    def _joined_with_vectors(self, seen: Seen, attention_mask: Tensor | None, inputs_embeds: Tensor) -> Prompt:
        """Tokens given as vectors; the image replaces the image token's vectors. There are no ids."""
        vectors_MSD = inputs_embeds.to(seen.prompts_NQD)
        number = num_pairs(len(seen.prompts_NQD), len(vectors_MSD))
        vectors_BSD = vectors_MSD.expand(number, -1, -1)
        if attention_mask is None:
            attention_mask = vectors_MSD.new_ones(vectors_MSD.shape[:2])
        is_real_BS = attention_mask.to(self.device).bool().expand(number, -1)
        is_image_BS1 = self.get_placeholder_mask(None, vectors_BSD)
        self._check_images(is_image_BS1[..., 0], is_real_BS, "inputs_embeds")
        joined_BSD = vectors_BSD.masked_scatter(is_image_BS1, seen.prompts_NQD.expand(number, -1, -1))
        return Prompt(joined_BSD, is_real_BS, torch.empty(number, 0, dtype=torch.long, device=self.device))

    def _begin(self, rows: int) -> Tensor:
        """The ids of a prompt without text."""
        config, text = self.config, self.config.text_config
        image = [] if config.image_token_id is None else [config.image_token_id] * self.query_tokens.shape[1]
        language = self.model.language.config
        begin = language.eos_token_id if language.has_encoder else text.bos_token_id
        begin = language.bos_token_id if begin is None else begin
        return torch.tensor([[*image, begin]] * rows, device=self.device)

    def _is_real(self, ids_MT: Tensor, attention_mask: Tensor | None) -> Tensor:
        """``bool[M, T]``: which ids are not padding."""
        if attention_mask is None:
            if (ids_MT == (pad := self.model.language.config.pad_token_id)).any():
                raise OptionError(
                    f"input_ids contain the padding token {pad}, but there is no attention_mask to mark it as "
                    "padding; pass the processor's"
                )
            return torch.ones_like(ids_MT, dtype=torch.bool)
        if attention_mask.shape != ids_MT.shape:
            raise OptionError(
                f"attention_mask is {list(attention_mask.shape)}, input_ids are {list(ids_MT.shape)}; pass both as "
                "the processor returned them"
            )
        return attention_mask.to(self.device).bool()

    def _check(self, words_BT: Tensor, is_image_BT: Tensor, is_real_BT: Tensor) -> None:
        """Check that no image is ignored, in part or whole, and that every token exists."""
        if self.config.image_token_id is not None:
            self._check_images(is_image_BT, is_real_BT, "input_ids")
        vocabulary = self.model.language.config.vocab_size
        if words_BT.numel() and int(words_BT.max()) >= vocabulary:
            raise OptionError(
                f"input_ids contain {int(words_BT.max())}, this model has {vocabulary} tokens; use its own processor"
            )

    def _check_images(self, is_image_BT: Tensor, is_real_BT: Tensor, where: str) -> None:
        queries, token = self.query_tokens.shape[1], self.config.image_token_id
        for row, count in enumerate((is_image_BT & is_real_BT).sum(dim=1).tolist()):
            if count != queries:
                raise OptionError(
                    f"row {row} of {where} has {count} image tokens ({token}) unmasked by attention_mask, "
                    f"but the image needs {queries}; make input_ids with Blip2Processor(images=..., text=...)"
                )
            if is_image_BT[row].sum() != queries:
                raise OptionError(f"row {row} of attention_mask masks image tokens ({token}) of {where}; unmask them")

    def get_placeholder_mask(self, input_ids: Tensor | None, inputs_embeds: Tensor) -> Tensor:
        """``bool[B, S, 1]``: the places of the image's vectors, by ids, or by the image token's embedding."""
        token = self.config.image_token_id
        if token is None:
            raise OptionError("this model has no image token; its image is put before the text")
        if input_ids is not None:
            return (input_ids == token)[..., None].to(inputs_embeds.device)
        vector_D = self.model.language.embed(torch.tensor(token, device=self.device))
        return (inputs_embeds == vector_D.to(inputs_embeds)).all(-1, keepdim=True)


def right_padded(prompt: Prompt) -> tuple[Tensor, Tensor]:
    """The rows with their real tokens first, wherever the padding was."""
    is_real_BS = prompt.is_real_BS
    order_BS = is_real_BS.long().argsort(dim=1, descending=True, stable=True)
    embeddings_BSD = prompt.embeddings_BSD.gather(1, order_BS[..., None].expand_as(prompt.embeddings_BSD))
    return embeddings_BSD, is_real_BS.gather(1, order_BS)
