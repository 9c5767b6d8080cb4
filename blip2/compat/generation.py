"""``generate``: Hugging Face's way into decoding."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from blip2 import checkpoint
from blip2.compat.loading import check_names
from blip2.compat.options import KNOWN, WITHOUT_EFFECT, decoding, from_config, merged
from blip2.generation import Engine
from blip2.model import Blip2


class Prompt(NamedTuple):
    """What the language model reads, row by row, and the ids that the rows are made of."""

    embeddings_BSD: Tensor
    is_real_BS: Tensor
    ids_BT: Tensor


class Writer(Protocol):
    """What ``generate`` needs of a model."""

    model: Blip2
    generation_config: Any

    @property
    def config(self) -> Any: ...

    @property
    def device(self) -> torch.device: ...

    def _prompt(
        self, pixel_values: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None, interpolate: bool, /
    ) -> Prompt: ...


class Generates:
    """What a model needs to have ``generate``: its parts, and `_prompt`."""

    @torch.no_grad()
    def generate(
        self: Writer,
        pixel_values: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        interpolate_pos_encoding: bool = False,
        generation_config: Any = None,
        **options: Any,
    ) -> Tensor:
        """Go on from images and prompts: ``int64[B * num_return_sequences, ...]``, filled with padding.

        An OPT's rows are the prompt's ids and the new ones, a T5's the start token and the new ones; the end token is
        there where the model wrote it. Without ``input_ids`` the prompt is the image and the token that begins a text.
        N images go with N prompts, with one, or one with many.

        Options (default): max_new_tokens (20) or max_length, which counts the prompt's ids too, min_new_tokens (0) or
        min_length, num_beams (1), length_penalty (1), early_stopping (False), num_return_sequences (1), do_sample
        (False), temperature (1), top_k (50), top_p (1), repetition_penalty (1), no_repeat_ngram_size (0), eos_token_id
        and pad_token_id (the model's); or these in a ``generation_config``, a dictionary or an object with to_dict().

        Raises OptionError for an image that would be ignored, numbers that do not pair, options that are not possible;
        TypeError for an option that does not exist.
        """
        check_names("generate", options, (*KNOWN, *WITHOUT_EFFECT, "generation_config"))
        language = self.config.language
        tokens = {"eos_token_id": language.eos_token_id, "pad_token_id": language.pad_token_id}
        given = {} if generation_config is None else from_config(generation_config)
        asked = merged(tokens, from_config(self.generation_config), given, options)

        prompt = self._prompt(pixel_values, input_ids, attention_mask, interpolate_pos_encoding)
        if language.family == "opt":
            before_BT = prompt.ids_BT
            room = language.max_position_embeddings - prompt.is_real_BS.shape[1]
        else:
            before_BT = prompt.ids_BT.new_full((len(prompt.ids_BT), 1), language.decoder_start_token_id)
            room = None
        how = decoding(asked, prompt_length=before_BT.shape[1], room=room)

        engine = Engine(
            self.model.language,
            eos_token_ids=[how.eos_token_id],
            damage=partial(checkpoint.damage, self.model),
        )
        answers = [
            torch.tensor([*answer.tokens, *[how.eos_token_id] * (answer.finish_reason == "eos")], device=self.device)
            for answers in engine.generate(rows_of(prompt), how.options)
            for answer in answers
        ]
        new_BT = nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=how.fill_token_id)
        return torch.cat([before_BT.repeat_interleave(how.options.num_return, dim=0), new_BT], dim=1)


def rows_of(prompt: Prompt) -> list[Tensor]:
    """Each row without its padding: ``float[S_i, D]``."""
    return [row_SD[real_S] for row_SD, real_S in zip(prompt.embeddings_BSD, prompt.is_real_BS, strict=True)]
