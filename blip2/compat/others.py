"""The reference's other classes: the model without ``generate``, single parts, and embeddings to compare.

N images, M texts, P patches, Q query tokens, T tokens, D width, E width of the embedding space of images and texts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from blip2.api import find_dtype
from blip2.checkpoint.reader import find_tensors
from blip2.compat.base import drawn
from blip2.compat.config import Blip2Config, Blip2QFormerConfig, Blip2VisionConfig, content_of
from blip2.compat.generative import Generative
from blip2.compat.loading import find_folder
from blip2.compat.parts import Part, QFormerModel, VisionModel
from blip2.compat.records import ModelOutput, returned
from blip2.compat.retrieval import Matching

SMALL_VISION = {
    "num_hidden_layers": 1, "image_size": 2, "patch_size": 2, "num_attention_heads": 1, "intermediate_size": 1
}  # fmt: skip
SMALL_QFORMER = {"num_hidden_layers": 1, "hidden_size": 1, "num_attention_heads": 1, "intermediate_size": 1}


class Blip2Model(Generative):
    """Image encoder, Q-Former and language model, without ``generate``."""

    def get_image_features(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """The image encoder's output, ``last_hidden_state`` float[N, 1 + P, D] and ``pooler_output``."""
        return self.vision_model(
            pixel_values, interpolate_pos_encoding, output_attentions, output_hidden_states, return_dict
        )

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
    ) -> Any:
        """As `Blip2ForConditionalGeneration`; requested attentions and states are those of all parts."""
        self.sync()
        watching: dict[str, Any] = {
            "output_attentions": output_attentions, "output_hidden_states": output_hidden_states
        }  # fmt: skip
        seen = self._see(pixel_values, interpolate_pos_encoding, **watching)
        prompt = self._joined(seen, input_ids, attention_mask)
        decoder = {"decoder_input_ids": decoder_input_ids, "decoder_attention_mask": decoder_attention_mask}
        use_cache = False if use_cache is None and labels is not None else use_cache
        output = self._write(seen, prompt, labels, None, decoder, use_cache=use_cache, **watching)
        return returned(output, return_dict, self.config)


class _SinglePart(Part):
    """A single part of a model."""

    name: ClassVar[str]

    @classmethod
    def whole(cls, config: Any) -> Blip2Config:
        """The smallest model with this part."""
        raise NotImplementedError

    def __init__(self, config: Any) -> None:
        """A part with random weights, from its configuration."""
        model = Matching(drawn(self.whole(config), is_matching=True))
        part = getattr(model, self.name)
        self.__dict__.update(part.__dict__)

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> Any:
        """This part of the model in a folder or on the hub; ``dtype``, and the location of the files
        (`find_folder`)."""
        folder = find_folder(name, options, ("dtype", "torch_dtype"))
        config = getattr(Blip2Config.from_pretrained(folder), f"{cls.name.removesuffix('_model')}_config")
        model = cls(config)
        prefix = f"{cls.name}."
        places = {key: place for key, place in find_tensors(folder, pickles=True).items() if key.startswith(prefix)}
        model.load_state_dict({key.removeprefix(prefix): place.read() for key, place in places.items()})
        dtype = options.get("dtype") or options.get("torch_dtype")
        return model.eval() if dtype is None else model.eval().to(find_dtype(dtype))


class Blip2VisionModel(_SinglePart, VisionModel):
    """The image encoder alone."""

    name = "vision_model"

    @classmethod
    def whole(cls, config: Any) -> Blip2Config:
        return Blip2Config(Blip2VisionConfig(**content_of(config)), SMALL_QFORMER)


class Blip2QFormerModel(_SinglePart, QFormerModel):
    """The Q-Former alone."""

    name = "qformer"

    @classmethod
    def whole(cls, config: Any) -> Blip2Config:
        part = Blip2QFormerConfig(**content_of(config))
        return Blip2Config({**SMALL_VISION, "hidden_size": part.encoder_hidden_size}, part)


class Blip2VisionModelWithProjection(Matching):
    """Images to the vectors that are compared with texts."""

    unused = ("embeddings", "text_projection", "itm_head")

    def forward(
        self,
        pixel_values: Tensor,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """``image_embeds`` float[N, Q, E] of length 1, and the image encoder's ``last_hidden_state``."""
        watching: dict[str, Any] = {
            "output_attentions": output_attentions, "output_hidden_states": output_hidden_states
        }  # fmt: skip
        vision = self.vision_model(pixel_values, return_dict=True, **watching)
        queries_NQD = self.look(vision.last_hidden_state).last_hidden_state
        output = ModelOutput(
            image_embeds=F.normalize(self.vision_projection(queries_NQD), dim=-1),
            last_hidden_state=vision.last_hidden_state,
            hidden_states=vision.hidden_states,
            attentions=vision.attentions,
        )
        return returned(output, return_dict, self.config)

    def get_input_embeddings(self) -> Any:
        return cast("Any", self.vision_model.embeddings).patch_embedding


class Blip2TextModelWithProjection(Matching):
    """Texts to the vectors that are compared with images; the vector of a text is its first token's."""

    unused = ("vision_model", "vision_projection", "itm_head")

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """``text_embeds`` float[M, T, E] of length 1, and the Q-Former's ``last_hidden_state``."""
        is_real_MT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        watching: dict[str, Any] = {
            "output_attentions": output_attentions, "output_hidden_states": output_hidden_states
        }  # fmt: skip
        read = self.read(input_ids, is_real_MT, position_ids, **watching)
        output = ModelOutput(
            text_embeds=F.normalize(self.text_projection(read.last_hidden_state), dim=-1),
            last_hidden_state=read.last_hidden_state,
            hidden_states=read.hidden_states,
            attentions=read.attentions,
        )
        return returned(output, return_dict, self.config)
