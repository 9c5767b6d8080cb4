"""A T5 as ``language_model``, with the reference's arguments and outputs.

B rows, T tokens of this call, S tokens so far, P tokens of the encoder's prompt, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.compat.language import NOT_A_LABEL, LanguagePart, Past, causal_mask, checked_mask, loss_of
from blip2.compat.parts import Watched, seen_by_all
from blip2.compat.records import ModelOutput, returned
from blip2.errors import OptionError
from blip2.language import T5
from blip2.language.float16 import own_precision


class T5Encoder(LanguagePart):
    """The encoder of a T5."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """``last_hidden_state`` float[B, P, D] of a prompt."""
        core = cast("T5", self.core)
        x_BPD = self.embedded(input_ids, inputs_embeds)
        is_real_BP = checked_mask(attention_mask, tuple(x_BPD.shape[:2]), x_BPD.device)
        positions_P = torch.arange(x_BPD.shape[1], device=x_BPD.device)
        assert core.encoder_bias is not None, "a UMT5 has no configuration here"
        bias = torch.where(seen_by_all(is_real_BP), core.encoder_bias(positions_P, positions_P)[None], float("-inf"))
        watched = Watched(self.config, output_attentions, output_hidden_states)
        with own_precision(core, x_BPD.device), watched.attention():
            x_BPD = self.dropped(x_BPD)
            watched.state(x_BPD)
            for block in core.encoder:
                x_BPD = self.run(block, x_BPD, bias)
                watched.state(x_BPD)
            x_BPD = self.dropped(core.encoder_norm(x_BPD))
        output = ModelOutput(
            last_hidden_state=x_BPD, hidden_states=watched.states(x_BPD), attentions=watched.attentions()
        )
        return returned(output, return_dict, self.config)

    def dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.config.dropout_rate, self.training)


class T5Decoder(T5Encoder):
    """The decoder of a T5, without its head."""

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Past | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """``last_hidden_state`` float[B, T, D], given the encoder's ``encoder_hidden_states`` float[B, P, D]."""
        core = cast("T5", self.core)
        if encoder_hidden_states is None:
            raise OptionError("encoder_hidden_states are missing; a T5's decoder needs the encoder's output")
        x_BTD = self.embedded(input_ids, inputs_embeds)
        num_rows, num_tokens = x_BTD.shape[:2]
        num_past = 0 if past_key_values is None else past_key_values.get_seq_length()
        is_real_BS = checked_mask(attention_mask, (num_rows, num_past + num_tokens), x_BTD.device)
        is_seen_BP = checked_mask(encoder_attention_mask, tuple(encoder_hidden_states.shape[:2]), x_BTD.device)
        keys_S = torch.arange(is_real_BS.shape[1], device=x_BTD.device)
        positions_BT = keys_S[None, num_past:]
        assert core.decoder_bias is not None, "a UMT5 has no configuration here"
        bias = core.decoder_bias(positions_BT, keys_S)
        bias = torch.where(causal_mask(is_real_BS, num_tokens), bias, float("-inf"))
        cache = past_key_values
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = Past()
        watched = Watched(self.config, output_attentions, output_hidden_states)
        with own_precision(core, x_BTD.device), watched.attention():
            x_BTD = self.dropped(x_BTD)
            watched.state(x_BTD)
            for number, block in enumerate(core.decoder):
                x_BTD = self.run(
                    block,
                    x_BTD,
                    layer=number,
                    cache=cache,
                    positions_BT=positions_BT,
                    bias=bias,
                    encoded=cast("Any", block).cross_attention.keys_values(encoder_hidden_states),
                    encoded_mask=seen_by_all(is_seen_BP),
                )
                watched.state(x_BTD)
            x_BTD = self.dropped(core.decoder_norm(x_BTD))
        output = ModelOutput(
            last_hidden_state=x_BTD,
            past_key_values=cache,
            hidden_states=watched.states(x_BTD),
            attentions=watched.attentions(lambda place: place % 2 == 0),
            cross_attentions=watched.attentions(lambda place: place % 2 == 1),
        )
        return returned(output, return_dict, self.config)


class T5Model(LanguagePart):
    """A T5 as ``language_model``."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Past | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """``logits`` float[B, T, V] of the decoder's input, by default ``labels`` int[B, T] shifted by one, and with
        labels the ``loss``. ``encoder_outputs``: of an earlier call, instead of a prompt.
        """
        watching = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        if encoder_outputs is None:
            encoder_outputs = cast("T5Encoder", self.encoder)(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                return_dict=True,
                **watching,
            )
        elif not isinstance(encoder_outputs, dict):
            names = ("last_hidden_state", "hidden_states", "attentions")
            encoder_outputs = ModelOutput(dict.fromkeys(names) | dict(zip(names, encoder_outputs, strict=False)))
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            if labels is None:
                raise OptionError("a T5 computes logits of decoder_input_ids; give them, or labels")
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        written = cast("T5Decoder", self.decoder)(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=encoder_outputs.last_hidden_state,
            encoder_attention_mask=attention_mask,
            inputs_embeds=decoder_inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            return_dict=True,
            **watching,
        )
        with own_precision(cast("T5", self.core), self.device):
            logits_BTV = self.scores(written.last_hidden_state)
        output = ModelOutput(
            loss=None if labels is None else loss_of(logits_BTV, labels),
            logits=logits_BTV,
            past_key_values=written.past_key_values,
            decoder_hidden_states=written.hidden_states,
            decoder_attentions=written.attentions,
            cross_attentions=written.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )
        return returned(output, return_dict, self.config)

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """The decoder's input for the labels: the start token, then all but the last."""
        start_B1 = labels.new_full((len(labels), 1), self.config.decoder_start_token_id)
        shifted_BT = torch.cat([start_B1, labels[:, :-1]], dim=1)
        return shifted_BT.masked_fill(shifted_BT == NOT_A_LABEL, self.config.pad_token_id)

    def get_input_embeddings(self) -> nn.Module:
        return cast("nn.Module", self.shared)

    def set_input_embeddings(self, embedding: nn.Embedding) -> None:
        """Replace the token table, which encoder and decoder share."""
        self.shared = embedding
        for stack in (self.encoder, self.decoder):
            cast("Any", stack).embed_tokens = embedding

    def get_encoder(self) -> nn.Module:
        return cast("nn.Module", self.encoder)

    def get_decoder(self) -> nn.Module:
        return cast("nn.Module", self.decoder)
