"""Parts of a model that can be called alone: ``vision_model``, ``qformer``, ``embeddings``.

Arguments, outputs and values are the reference's. B images or rows, P patches, Q query tokens, S of the Q-Former's
input, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blip2.compat.config import Config
from blip2.compat.names import Named
from blip2.compat.records import ModelOutput, returned
from blip2.errors import OptionError
from blip2.layers import recorded_attention
from blip2.qformer import QFormer
from blip2.vision import VisionTransformer


class Part(Named):
    """A part: one of our modules with the reference's arguments and outputs. ``config``: of this part."""

    def __init__(self, core: nn.Module, config: Any) -> None:
        super().__init__()
        self.__dict__["core"] = core
        self.config = config
        self.gradient_checkpointing = False

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(parameter.dtype for parameter in self.parameters() if parameter.is_floating_point())

    def run(self, layer: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        """A layer's output; with gradient checkpointing it is computed again in the backward pass."""
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(layer, *args, use_reentrant=False, **kwargs)
        return layer(*args, **kwargs)


class Watched:
    """Collects the requested hidden states and attentions of a pass."""

    def __init__(self, config: Config, output_attentions: bool | None, output_hidden_states: bool | None) -> None:
        self.wants_attentions = config.output_attentions if output_attentions is None else output_attentions
        wants_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        self._states: list[Tensor] | None = [] if wants_states else None
        self._attentions: list[Tensor] | None = None

    @contextmanager
    def attention(self) -> Iterator[None]:
        """A context around the layers."""
        if not self.wants_attentions:
            yield
            return
        with recorded_attention() as seen:
            self._attentions = seen
            yield

    def state(self, hidden: Tensor) -> None:
        if self._states is not None:
            self._states.append(hidden)

    def states(self, last: Tensor | None = None) -> tuple[Tensor, ...] | None:
        """All of them; ``last`` replaces the last one, if that is normalised."""
        if self._states is None:
            return None
        return tuple(self._states if last is None else [*self._states[:-1], last])

    def attentions(self, choose: Callable[[int], bool] = lambda place: True) -> tuple[Tensor, ...] | None:
        """The attentions whose index, in the order of computation, is chosen."""
        if self._attentions is None:
            return None
        return tuple(weights for place, weights in enumerate(self._attentions) if choose(place))


class VisionModel(Part):
    """``vision_model``: pixels to patch features."""

    def forward(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """``float[B, 3, H, W]`` to ``last_hidden_state`` float[B, 1 + P, D] and ``pooler_output`` float[B, D]."""
        core = cast("VisionTransformer", self.core)
        size = core.config.image_size
        if pixel_values.dim() != 4:
            raise OptionError(f"pixel_values are {list(pixel_values.shape)}; give them as [images, 3, {size}, {size}]")
        if tuple(pixel_values.shape[2:]) != (size, size) and not interpolate_pos_encoding:
            raise OptionError(
                f"pixel_values are {list(pixel_values.shape)}, this model takes {size}x{size}; use its own processor, "
                "or pass interpolate_pos_encoding=True"
            )
        watched = Watched(self.config, output_attentions, output_hidden_states)
        with watched.attention():
            pixels_BCHW = pixel_values.to(self.device)
            x_BPD, rotation = core.embed(pixels_BCHW), core.rotation(pixels_BCHW)
            watched.state(x_BPD)
            for block in core.blocks:
                x_BPD = self.run(block, x_BPD, rotation)
                watched.state(x_BPD)
        x_BPD = core.post_norm(core.finish(x_BPD))
        output = ModelOutput(
            last_hidden_state=x_BPD,
            pooler_output=core.post_norm(x_BPD[:, 0]),
            hidden_states=watched.states(),
            attentions=watched.attentions(),
        )
        return returned(output, return_dict, self.config)

    def get_input_embeddings(self) -> nn.Module:
        return cast("nn.Module", self.embeddings)


class QFormerModel(Part):
    """``qformer``: query tokens, optionally with text, attend to patch features."""

    def forward(
        self,
        query_embeds: Tensor,
        query_length: int | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """``float[B, S, D]``, of which the first ``query_length`` (default all) are query tokens, to
        ``last_hidden_state``.

        ``attention_mask`` [B, S] and ``encoder_attention_mask`` [B, P]: 1 for what may be attended to. Raises
        OptionError for query tokens without ``encoder_hidden_states`` float[B, P, D].
        """
        core = cast("QFormer", self.core)
        num_queries = query_embeds.shape[1] if query_length is None else query_length
        if num_queries and encoder_hidden_states is None:
            raise OptionError("encoder_hidden_states are missing; give the vision model's output")
        dtype = core.embedding_norm.weight.dtype
        image_BPD = None if encoder_hidden_states is None else encoder_hidden_states.to(query_embeds.device, dtype)
        mask = None if attention_mask is None else seen_by_all(attention_mask)
        bias = None
        if encoder_attention_mask is not None and not bool(encoder_attention_mask.all()):
            hidden = ~seen_by_all(encoder_attention_mask)
            bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, float("-inf"))
        watched = Watched(self.config, output_attentions, output_hidden_states)
        is_cross: list[bool] = []
        with watched.attention():
            x_BSD = core.embedding_norm(query_embeds.to(dtype))
            x_BSD = F.dropout(x_BSD, core.config.dropout, core.training)
            watched.state(x_BSD)
            for layer in core.layers:
                has_cross = bool(num_queries) and layer.cross_attention is not None
                x_BSD, _ = self.run(
                    layer,
                    x_BSD,
                    num_queries=num_queries,
                    image=image_BPD,
                    image_bias=bias if has_cross else None,
                    mask=mask,
                    past=None,
                )
                watched.state(x_BSD)
                is_cross += [False, True] if has_cross else [False]
        output = ModelOutput(
            last_hidden_state=x_BSD,
            pooler_output=x_BSD[:, 0],
            hidden_states=watched.states(),
            attentions=watched.attentions(),  # all of them, as in the reference
            cross_attentions=watched.attentions(lambda place: is_cross[place]),
        )
        return returned(output, return_dict, self.config)

    def get_input_embeddings(self) -> None:
        """There are none: its input is vectors."""


class InstructedQFormer(QFormerModel):
    """``qformer`` of an InstructBLIP: its text is given as ids."""

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        query_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **watching: Any,
    ) -> Any:
        """``int[B, T]`` after ``query_embeds`` float[B, Q, D], or one of the two; ``attention_mask`` [B, Q + T]."""
        if input_ids is None and query_embeds is None:
            raise OptionError("neither input_ids nor query_embeds are given; give one or both")
        core = cast("QFormer", self.core)
        return super().forward(
            embedded(core, input_ids, position_ids, query_embeds),
            query_length=0 if query_embeds is None else query_embeds.shape[1],
            attention_mask=attention_mask,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            **watching,
        )

    def get_input_embeddings(self) -> Any:
        return cast("QFormer", self.core).word_embedding


class TextEmbeddings(Part):
    """``embeddings``: token and position embeddings, after the query tokens."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        query_embeds: Tensor | None = None,
    ) -> Tensor:
        """``int[B, T]`` and ``float[B, Q, D]``, or one of them, to ``float[B, Q + T, D]``."""
        return embedded(cast("QFormer", self.core), input_ids, position_ids, query_embeds)


def embedded(
    core: QFormer, input_ids: Tensor | None, position_ids: Tensor | None, query_embeds: Tensor | None
) -> Tensor:
    """Query tokens ``float[B, Q, D]`` with the text after them, or one of the two, ``float[B, Q + T, D]``."""
    if input_ids is None:
        assert query_embeds is not None, "neither text nor queries"
        return query_embeds
    assert core.word_embedding is not None and core.position_embedding is not None, "no text branch"
    if (length := input_ids.shape[1]) > (most := core.config.max_position_embeddings):
        raise OptionError(f"the text has {length} tokens, the Q-Former takes at most {most}; shorten it")
    if position_ids is None:
        position_ids = torch.arange(length, device=input_ids.device)[None]
    text_BTD = core.word_embedding(input_ids) + core.position_embedding(position_ids)
    return text_BTD if query_embeds is None else torch.cat([query_embeds.to(text_BTD.dtype), text_BTD], dim=1)


def seen_by_all(mask: Tensor) -> Tensor:
    """``[B, S]``, 1 for what may be attended to, to ``bool[B, 1, 1, S]``; unchanged if it broadcasts to [B, H, T,
    S]."""
    if mask.dim() == 3:
        return mask.bool()[:, None]
    return mask.bool()[:, None, None] if mask.dim() == 2 else mask.bool()
