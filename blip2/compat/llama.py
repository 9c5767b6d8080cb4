"""A Llama (a Vicuna) as ``language_model``, behind the reference's arguments and outputs.

B rows, T tokens of this call, S tokens so far, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from blip2.compat.language import LanguagePart, Past, causal_mask, checked_mask, next_token_loss
from blip2.compat.parts import Watched
from blip2.compat.records import ModelOutput, returned
from blip2.language.decoder import Decoder
from blip2.language.rotary import View, turns


class LlamaBody(LanguagePart):
    """A Llama without its head."""

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
        """``last_hidden_state`` float[B, T, D]. ``attention_mask`` [B, S] is of the tokens so far and these."""
        core = cast("Decoder", self.core)
        x_BTD = self.embedded(input_ids, inputs_embeds)
        num_rows, num_tokens = x_BTD.shape[:2]
        num_past = 0 if past_key_values is None else past_key_values.get_seq_length()
        is_real_BS = checked_mask(attention_mask, (num_rows, num_past + num_tokens), x_BTD.device)
        if position_ids is None:  # real tokens are counted
            position_ids = (is_real_BS.long().cumsum(dim=1) - 1).clamp(min=0)[:, num_past:]
        is_plain = not num_past and bool(is_real_BS.all())
        mask = None if is_plain else causal_mask(is_real_BS, num_tokens)
        cache = past_key_values
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = Past()
        assert core.config.rotary is not None, "no Llama"
        view = View(mask, turns(core.config.rotary, position_ids, x_BTD.dtype))
        watched = Watched(self.config, output_attentions, output_hidden_states)
        with watched.attention():
            watched.state(x_BTD)
            for number, block in enumerate(core.blocks):
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


class LlamaModel(LanguagePart):
    """A Llama as ``language_model``."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Past | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **others: Any,
    ) -> Any:
        """``logits`` float[B, T, V], and with ``labels`` int[B, T] the ``loss``, each token's label the one after it.

        ``logits_to_keep``: of so many last tokens, or of these. ``others``: as for `LlamaBody`.
        """
        seen = cast("LlamaBody", self.model)(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **others,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self.scores(seen.last_hidden_state[:, kept])
        output = ModelOutput(
            loss=None if labels is None else next_token_loss(logits_BTV, labels, num_items_in_batch),
            logits=logits_BTV,
            past_key_values=seen.past_key_values,
            hidden_states=seen.hidden_states,
            attentions=seen.attentions,
        )
        return returned(output, return_dict, self.config)

    def get_input_embeddings(self) -> nn.Module:
        return cast("LlamaBody", self.model).get_input_embeddings()

    def set_input_embeddings(self, embedding: nn.Embedding) -> None:
        cast("Any", self.model).embed_tokens = embedding

    def get_decoder(self) -> nn.Module:
        return cast("nn.Module", self.model)
