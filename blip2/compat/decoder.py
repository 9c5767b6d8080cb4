"""A decoder of the Llama kind as ``language_model``, with the reference's arguments and outputs.

B rows, T tokens of this call, S tokens so far, D width.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from blip2.compat.language import LanguagePart, Past, causal_mask, checked_mask
from blip2.compat.names import tied_head
from blip2.compat.opt import OPTModel
from blip2.compat.parts import Watched
from blip2.compat.records import ModelOutput, returned
from blip2.language import Decoder
from blip2.linear import Table


class DecoderBody(LanguagePart):
    """All layers, without the head."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Past | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """``last_hidden_state`` float[B, T, D]. ``attention_mask`` [B, S] covers earlier tokens and these.

        Positions count the real tokens, unless ``position_ids`` [B, T] are given: padding changes nothing, wherever it
        is. (In the reference, padding between image and text has positions, too.)
        """
        core = cast("Decoder", self.core)
        x_BTD = self.embedded(input_ids, inputs_embeds)
        num_rows, num_tokens = x_BTD.shape[:2]
        num_past = 0 if past_key_values is None else past_key_values.get_seq_length()
        is_real_BS = checked_mask(attention_mask, (num_rows, num_past + num_tokens), x_BTD.device)
        keys_BS = (is_real_BS.long().cumsum(dim=1) - 1).clamp(min=0)
        if position_ids is None:
            position_ids = keys_BS[:, num_past:]
        elif not num_past:
            keys_BS = position_ids
        is_plain = not num_past and bool(is_real_BS.all())
        mask = None if is_plain else causal_mask(is_real_BS, num_tokens)
        cache = past_key_values
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = Past()
        watched = Watched(self.config, output_attentions, output_hidden_states)
        with watched.attention():
            views = core.views(position_ids, mask, keys_BS, x_BTD.dtype)
            x_BTD = core.entered(x_BTD, position_ids)
            watched.state(x_BTD)
            for number, (block, view) in enumerate(zip(core.blocks, views, strict=True)):
                x_BTD = self.run(block, x_BTD, layer=number, cache=cache, positions_BT=position_ids, view=view)
                watched.state(x_BTD)
        x_BTD = core.final_norm(x_BTD)
        output = ModelOutput(
            last_hidden_state=x_BTD,
            past_key_values=cache,
            hidden_states=watched.states(x_BTD),
            attentions=watched.attentions(),
        )
        return returned(output, return_dict, self.config)


class DecoderModel(OPTModel):
    """The layers and the head."""

    def scores(self, hidden: Tensor) -> Tensor:
        """The logits ``float[..., V]``, scaled and soft-capped as the family needs."""
        return cast("Decoder", self.core).logits(hidden)

    def get_decoder(self) -> nn.Module:
        return cast("nn.Module", self.model)

    def set_input_embeddings(self, embedding: nn.Embedding) -> None:
        """Replace the token table; a tied head follows."""
        core, body = cast("Decoder", self.core), cast("Any", self.model)
        is_tied = isinstance(core.token_embedding, Table) and core.output is None
        body.embed_tokens = embedding
        if is_tied:
            self._modules["lm_head"] = tied_head(core)
