"""``Blip2ForImageTextRetrieval``: the matching model with Hugging Face's arguments and outputs.

N images, M texts, B pairs, P patches, Q query tokens, T tokens, E width of the embedding space of images and texts.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.compat.base import PreTrained
from blip2.compat.parts import QFormerModel, TextEmbeddings, VisionModel
from blip2.compat.records import ModelOutput, PartsOutput, returned
from blip2.errors import OptionError
from blip2.model import Blip2Matcher, similarity
from blip2.tasks.speaker import num_pairs


class Matching(PreTrained):
    """Image encoder and Q-Former with its text branch; see the classes below and in `others`."""

    is_matching = True
    unused: ClassVar[tuple[str, ...]] = ()
    """Parts that a class does not expose."""

    vision_model: VisionModel
    qformer: QFormerModel
    embeddings: Any
    query_tokens: nn.Parameter
    vision_projection: nn.Linear
    text_projection: nn.Linear
    itm_head: nn.Linear

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        for name in self.unused:
            self._modules.pop(name, None)

    def _parts(self) -> dict[str, Any]:
        model, config = cast("Blip2Matcher", self.model), self.config
        return {
            "vision_model": lambda: VisionModel(model.vision, config.vision_config),
            "qformer": lambda: QFormerModel(model.qformer, config.qformer_config),
            "embeddings": lambda: TextEmbeddings(model.qformer, config.qformer_config),
        }

    def sync(self) -> None:
        """Take over changes in the configuration."""

    def generation_settings(self) -> None:
        """A matching model has none."""

    def get_input_embeddings(self) -> Any:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, embedding: nn.Embedding) -> None:
        self.embeddings.word_embeddings = embedding

    def look(self, patches_NPD: Tensor, **watching: Any) -> ModelOutput:
        """The query tokens attend to images, ``float[N, 1 + P, D]``."""
        queries_NQD = self.query_tokens.expand(len(patches_NPD), -1, -1)
        output: ModelOutput = self.qformer(
            query_embeds=queries_NQD, encoder_hidden_states=patches_NPD, return_dict=True, **watching
        )
        return output

    def read(self, ids_MT: Tensor, is_real_MT: Tensor, position_ids: Tensor | None = None, **watching: Any) -> Any:
        """Texts alone, ``int[M, T]``."""
        return self.qformer(
            query_embeds=self.embeddings(input_ids=ids_MT, position_ids=position_ids),
            query_length=0,
            attention_mask=is_real_MT,
            return_dict=True,
            **watching,
        )


class Blip2ForImageTextRetrieval(Matching):
    """A matching model; `from_pretrained` returns one in evaluation mode."""

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        use_image_text_matching_head: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """How well images ``float[N, 3, H, W]`` and texts ``int[M, T]`` match.

        By default, the cosine of every image with every text: ``logits_per_image`` float[N, M], ``logits_per_text`` its
        transpose, ``image_embeds`` float[N, Q, E], ``text_embeds`` float[M, E]. No temperature is applied.

        ``use_image_text_matching_head``: pair by pair (N images with N texts, with one, or one with many), with the
        matching head: ``logits_per_image`` float[B, 2], whose softmax [:, 1] is the probability of a match;
        ``text_embeds`` float[B, Q + T, D] are the Q-Former's states, ``image_embeds`` float[N, 1 + P, D] the patches.

        ``text_model_output`` and ``vision_model_output`` are those of the Q-Former and the image encoder.
        ``output_attentions`` and ``output_hidden_states`` are for the image encoder.

        Image tokens before the text are skipped, and a text without them is read completely. Raises OptionError for a
        wrong number of image tokens, and for numbers that do not pair up.
        """
        ids_MT, is_real_MT = self._words(input_ids, attention_mask)
        vision = self.vision_model(
            pixel_values,
            output_attentions=self.config.output_attentions if output_attentions is None else output_attentions,
            output_hidden_states=(
                self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
            ),
            return_dict=True,
        )
        patches_NPD = vision.last_hidden_state
        if use_image_text_matching_head:
            text = self._fused(patches_NPD, ids_MT, is_real_MT)
            states_BSD = text.last_hidden_state.to(_dtype(self.itm_head, text.last_hidden_state))
            logits = self.itm_head(states_BSD[:, : self.query_tokens.shape[1]]).mean(dim=1)
            texts, images = states_BSD, patches_NPD
        else:
            seen = self.look(patches_NPD).last_hidden_state
            text = self.read(ids_MT, is_real_MT)
            first_MD = text.last_hidden_state[:, 0]
            images = F.normalize(self.vision_projection(seen.to(_dtype(self.vision_projection, seen))), dim=-1)
            texts = F.normalize(self.text_projection(first_MD.to(_dtype(self.text_projection, first_MD))), dim=-1)
            logits = similarity(images, texts)
        output = PartsOutput(
            loss=None,
            logits_per_image=logits,
            logits_per_text=logits.t(),
            text_embeds=texts,
            image_embeds=images,
            text_model_output=text,
            vision_model_output=vision,
        )
        return returned(output, return_dict, self.config)

    def _fused(self, patches_NPD: Tensor, ids_MT: Tensor, is_real_MT: Tensor) -> ModelOutput:
        """Query tokens and texts attend to each other, pair by pair."""
        number = num_pairs(len(patches_NPD), len(ids_MT))
        ids_BT, is_real_BT = ids_MT.expand(number, -1), is_real_MT.expand(number, -1)
        queries_BQD = self.query_tokens.expand(number, -1, -1)
        output: ModelOutput = self.qformer(
            query_embeds=self.embeddings(input_ids=ids_BT, query_embeds=queries_BQD),
            query_length=queries_BQD.shape[1],
            attention_mask=torch.cat([is_real_BT.new_ones(queries_BQD.shape[:2]), is_real_BT], dim=1),
            encoder_hidden_states=patches_NPD,
            return_dict=True,
        )
        return output

    def _words(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The texts alone, right-padded, and ``bool[M, T]``: which ids are not padding. T is that of the ids."""
        ids_MT = input_ids.to(self.device)
        is_real_MT = torch.ones_like(ids_MT) if attention_mask is None else attention_mask.to(self.device)
        if is_real_MT.shape != ids_MT.shape:
            raise OptionError(
                f"attention_mask is {list(is_real_MT.shape)}, input_ids are {list(ids_MT.shape)}; pass both as the "
                "processor returned them"
            )
        queries, token, vocabulary = (
            self.query_tokens.shape[1], self.config.image_token_id, self.embeddings.word_embeddings.num_embeddings
        )  # fmt: skip
        is_image_MT = ids_MT == token if token is not None else torch.zeros_like(ids_MT, dtype=torch.bool)
        for row, count in enumerate(is_image_MT.sum(dim=1).tolist()):
            if count not in (0, queries):
                raise OptionError(
                    f"row {row} of input_ids has {count} image tokens ({token}) instead of 0 or {queries}; make "
                    "input_ids with Blip2Processor"
                )
        is_word_MT = is_real_MT.bool() & ~is_image_MT
        rows = [row_T[is_word_T] for row_T, is_word_T in zip(ids_MT, is_word_MT, strict=True)]
        for row, words_T in enumerate(rows):
            if not len(words_T):
                raise OptionError(f"row {row} of input_ids has no text; give each image a text")
            if (largest := int(words_T.max())) >= vocabulary:
                raise OptionError(
                    f"input_ids contain {largest}, this model has {vocabulary} tokens; use its own processor"
                )
        longest = ids_MT.shape[1] - (queries if is_image_MT.any() else 0)
        lengths_M1 = torch.tensor([[len(words_T)] for words_T in rows], device=self.device)
        texts_MT = torch.stack([F.pad(words_T, (0, longest - len(words_T))) for words_T in rows])
        return texts_MT, torch.arange(longest, device=self.device) < lengths_M1


def _dtype(layer: nn.Module, like: Tensor) -> torch.dtype:
    """The dtype in which a layer computes."""
    weight = getattr(layer, "weight", like)
    return cast("torch.dtype", weight.dtype)
