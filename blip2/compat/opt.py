"""An OPT as ``language_model``, with the reference's arguments and outputs.

B rows, T tokens of this call, S tokens so far, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn

from blip2.compat.language import LanguagePart, Past, causal_mask, checked_mask, next_token_loss
from blip2.compat.names import tied_head
from blip2.compat.parts import Watched
from blip2.compat.records import ModelOutput, returned
from blip2.language import OPT
from blip2.language.opt import POSITION_OFFSET


class OPTDecoder(LanguagePart):
    """The decoder of an OPT, without its head."""

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
        """``last_hidden_state`` float[B, T, D]. ``attention_mask`` [B, S] covers earlier tokens and these."""
        core = cast("OPT", self.core)
        x_BTD = self.embedded(input_ids, inputs_embeds)
        num_rows, num_tokens = x_BTD.shape[:2]
        num_past = 0 if past_key_values is None else past_key_values.get_seq_length()
        is_real_BS = checked_mask(attention_mask, (num_rows, num_past + num_tokens), x_BTD.device)
        if position_ids is None:  # count real tokens; padding has its own row of the table
            position_ids = (is_real_BS.long().cumsum(dim=1) * is_real_BS.long() - 1)[:, num_past:]
        is_plain = not num_past and bool(is_real_BS.all())
        mask = None if is_plain else causal_mask(is_real_BS, num_tokens)
        cache = past_key_values
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = Past()
        watched = Watched(self.config, output_attentions, output_hidden_states)
        with watched.attention():
            x_BTD = x_BTD + core.position_embedding(position_ids + POSITION_OFFSET).to(x_BTD.dtype)
            watched.state(x_BTD)
            for number, block in enumerate(core.blocks):
                x_BTD = self.run(block, x_BTD, layer=number, cache=cache, positions_BT=position_ids, mask=mask)
                watched.state(x_BTD)
        x_BTD = core.final_norm(x_BTD)
        output = ModelOutput(
            last_hidden_state=x_BTD,
            past_key_values=cache,
            hidden_states=watched.states(x_BTD),
            attentions=watched.attentions(),
        )
        return returned(output, return_dict, self.config)


class OPTBody(LanguagePart):
    """The reference's wrapper of the decoder, which adds nothing."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return cast("OPTDecoder", self.decoder)(*args, **kwargs)


class OPTModel(LanguagePart):
    """An OPT as ``language_model``."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Past | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """``logits`` float[B, T, V], and with ``labels`` int[B, T] the ``loss``, each token predicting the next label.

        ``logits_to_keep``: the number of last tokens with logits, or their indices.
        """
        seen = self.get_decoder()(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            position_ids=position_ids,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As in `nn.Module.to`; the head stays tied to the token table."""
        table = self.get_input_embeddings()
        is_tied = getattr(self.lm_head, "weight", None) is table.weight
        super()._apply(fn, recurse)
        if is_tied:
            self.lm_head.weight = table.weight
        return self

    def get_input_embeddings(self) -> nn.Module:
        return cast("LanguagePart", self.get_decoder()).get_input_embeddings()

    def set_input_embeddings(self, embedding: nn.Embedding) -> None:
        """Replace the token table; the tied head follows."""
        decoder = cast("Any", self.model).decoder
        decoder.embed_tokens = embedding
        core = cast("OPT", self.core)
        core.output = None
        self._modules["lm_head"] = tied_head(core)

    def get_decoder(self) -> nn.Module:
        return cast("nn.Module", cast("OPTBody", self.model).decoder)
