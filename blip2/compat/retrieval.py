"""``Blip2ForImageTextRetrieval``: the matching model behind Hugging Face's arguments and outputs.

N images, M texts, B pairs, Q queries, T tokens, E width of the space in which images and texts are compared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blip2 import checkpoint
from blip2.compat.loading import Device, device_and_dtype, load_model
from blip2.compat.records import ModelOutput
from blip2.config import MatcherConfig
from blip2.errors import CheckpointError, OptionError
from blip2.model import Blip2Matcher, similarity
from blip2.tasks.speaker import num_pairs


class Blip2ForImageTextRetrieval(nn.Module):
    """A model that compares images with texts; `from_pretrained` makes one, in evaluation mode."""

    def __init__(self, model: Blip2Matcher) -> None:
        super().__init__()
        self.model = model

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> Blip2ForImageTextRetrieval:
        """The model in a folder or of that name on the hub; see `loading.load_model` for the options."""
        model, _ = load_model(name, options)
        if not isinstance(model, Blip2Matcher):
            raise CheckpointError(f"{name} writes about images; load it with Blip2ForConditionalGeneration")
        return cls(model)

    @property
    def config(self) -> MatcherConfig:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.qformer.query_tokens.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the image encoder; the rest is in float32."""
        return self.model.vision.position_embedding.dtype

    def to(  # type: ignore[override]
        self, device: Device | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> Blip2ForImageTextRetrieval:
        """Move the model; OptionError for a device that is not there, or another precision than it was loaded in."""
        place, asked = device_and_dtype(device, dtype)
        if asked not in (None, self.dtype):
            raise OptionError(f"the model is in {self.dtype}; for {asked} give from_pretrained(..., dtype={asked})")
        return self if place is None else super().to(place)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model in the published layout, which `from_pretrained` and transformers read."""
        checkpoint.save(self.model, Path(folder))

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        use_image_text_matching_head: bool = False,
    ) -> ModelOutput:
        """How well images ``float[N, 3, H, W]`` and texts ``int[M, T]`` fit each other.

        By default every image with every text, by the cosine of their vectors: ``logits_per_image`` float[N, M],
        ``logits_per_text`` its transpose, ``image_embeds`` float[N, Q, E], ``text_embeds`` float[M, E]. No temperature
        is applied.

        ``use_image_text_matching_head``: pair by pair, N images with N texts, with one, or one with many, by the
        matching head: ``logits_per_image`` float[B, 2], whose softmax [:, 1] is the probability of a match.

        Image tokens before the text are passed over, and a text without them is read whole. Raises OptionError for
        image tokens in another number than the model's, and for numbers that do not pair.
        """
        ids_MT, is_real_MT = self._words(input_ids, attention_mask)
        patches_NPD = self.model.encode(pixel_values.to(self.device))
        if use_image_text_matching_head:
            number = num_pairs(len(patches_NPD), len(ids_MT))
            logits_B2 = self.model.match(patches_NPD, ids_MT.expand(number, -1), is_real_MT.expand(number, -1))
            return ModelOutput(loss=None, logits_per_image=logits_B2, logits_per_text=logits_B2.t())
        images_NQE, _ = self.model.embed_image(patches_NPD)
        texts_ME = self.model.embed_text(ids_MT, is_real_MT)
        logits_NM = similarity(images_NQE, texts_ME)
        return ModelOutput(
            loss=None,
            logits_per_image=logits_NM,
            logits_per_text=logits_NM.t(),
            text_embeds=texts_ME,
            image_embeds=images_NQE,
        )

    def _words(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The texts alone, right-padded, and ``bool[M, T]``: which ids are no padding."""
        ids_MT = input_ids.to(self.device)
        is_real_MT = torch.ones_like(ids_MT) if attention_mask is None else attention_mask.to(self.device)
        if is_real_MT.shape != ids_MT.shape:
            raise OptionError(
                f"attention_mask is {list(is_real_MT.shape)}, input_ids are {list(ids_MT.shape)}; pass on both as the "
                "processor made them"
            )
        queries, token, vocabulary = (
            self.config.qformer.num_query_tokens, self.config.image_token_id, self.config.qformer.vocab_size
        )  # fmt: skip
        is_image_MT = ids_MT == token if token is not None else torch.zeros_like(ids_MT, dtype=torch.bool)
        for row, count in enumerate(is_image_MT.sum(dim=1).tolist()):
            if count not in (0, queries):
                raise OptionError(
                    f"row {row} of input_ids has {count} image tokens ({token}), which are 0 or {queries}; make "
                    "input_ids with Blip2Processor"
                )
        is_word_MT = is_real_MT.bool() & ~is_image_MT
        rows = [row_T[is_word_T] for row_T, is_word_T in zip(ids_MT, is_word_MT, strict=True)]
        for row, words_T in enumerate(rows):
            if not len(words_T):
                raise OptionError(f"row {row} of input_ids has no text; give each image something to compare with")
            if (largest := int(words_T.max())) >= vocabulary:
                raise OptionError(
                    f"input_ids hold {largest}, this model has {vocabulary} tokens; use its own processor"
                )
        lengths_M1 = torch.tensor([[len(words_T)] for words_T in rows], device=self.device)
        texts_MT = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return texts_MT, torch.arange(texts_MT.shape[1], device=self.device) < lengths_M1
