"""Attentions and hidden states of each step of ``generate``, computed by a second pass over the generated text.

Generation itself does not keep them. The second pass runs step by step without earlier results, so it takes longer, but
only when it is requested.

B prompts, R rows, S vectors of a prompt, T new tokens, H heads, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from blip2.compat.prompts import right_padded
from blip2.compat.records import Prompt

Layers = tuple[Tensor, ...]


def states_of(
    part: Any,
    prompt: Prompt,
    ids: Sequence[Tensor],
    *,
    has_encoder: bool,
    attentions: bool,
    hidden_states: bool,
) -> dict[str, Any]:
    """Each step's states under the reference's names: a tuple of steps of tuples of layers, ``[R, H, 1, S + T]`` or
    ``[R, 1, D]`` each; a decoder's first step covers the whole prompt.

    ``part``: the model's ``language_model``. ``ids``: the input of each step, ``int[R, ...]``, the prompt's first.
    """
    watching = {
        "output_attentions": attentions, "output_hidden_states": hidden_states, "return_dict": True, "use_cache": False
    }  # fmt: skip
    copies = len(ids[0]) // len(prompt.is_real_BS)
    if not has_encoder:
        return _of_decoder(part, prompt, ids, copies, watching)
    vectors_BSD, is_real_BS = right_padded(prompt)
    encoded = part.encoder(
        inputs_embeds=vectors_BSD,
        attention_mask=is_real_BS,
        **{name: value for name, value in watching.items() if name != "use_cache"},
    )
    repeated = (encoded.last_hidden_state.repeat_interleave(copies, dim=0),)
    steps = [
        part(
            encoder_outputs=repeated,
            attention_mask=is_real_BS.repeat_interleave(copies, dim=0),
            decoder_input_ids=ids_RT,
            **watching,
        )
        for ids_RT in ids
    ]
    return {
        "encoder_attentions": encoded.attentions,
        "encoder_hidden_states": encoded.hidden_states,
        "decoder_attentions": tuple(_last(step.decoder_attentions, 2) for step in steps) if attentions else None,
        "cross_attentions": tuple(_last(step.cross_attentions, 2) for step in steps) if attentions else None,
        "decoder_hidden_states": tuple(_last(step.decoder_hidden_states, 1) for step in steps)
        if hidden_states
        else None,
    }


def _of_decoder(
    part: Any, prompt: Prompt, ids: Sequence[Tensor], copies: int, watching: dict[str, bool]
) -> dict[str, Any]:
    vectors_RSD = prompt.embeddings_BSD.repeat_interleave(copies, dim=0)
    is_real_RS = prompt.is_real_BS.repeat_interleave(copies, dim=0)
    seen = []
    for number, ids_RT in enumerate(ids):
        new_RT = ids_RT[:, prompt.ids_BT.shape[1] :]
        step = part(
            inputs_embeds=torch.cat([vectors_RSD, part.embedded(new_RT, None).to(vectors_RSD)], dim=1),
            attention_mask=torch.cat([is_real_RS, torch.ones_like(new_RT, dtype=torch.bool)], dim=1),
            **watching,
        )
        if number == 0:
            seen.append((step.attentions, step.hidden_states))
        else:
            seen.append((_last(step.attentions, 2), _last(step.hidden_states, 1)))
    return {
        "attentions": tuple(attentions for attentions, _ in seen) if watching["output_attentions"] else None,
        "hidden_states": tuple(states for _, states in seen) if watching["output_hidden_states"] else None,
    }


def _last(layers: Layers | None, dim: int) -> Layers | None:
    """The last token of each layer."""
    return None if layers is None else tuple(layer.narrow(dim, layer.shape[dim] - 1, 1) for layer in layers)
